//! Released checkpoints become runs and come back under their names; what is damaged, hostile or foreign does not.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Read, Write},
    panic::catch_unwind,
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    contents, noise,
    pickle::{Pickle, bytes, write_checkpoint},
    run_in, source, succeed_in, wake, write_packed,
};
use lvdm::{
    autoencoder_loss::{DiscriminatorConfig, PatchDiscriminator},
    checkpoint::{self, Checkpoint},
    codecs::{AutoencoderConfig, ImageAutoencoder, ImageAutoencoderConfig, VideoAutoencoder},
    diffusion::{FrameConditioning, NoiseSchedule, ScheduleConfig},
    exchange::{self, ImportOptions, LatentPreset},
    exchange::{InferredAutoencoder, InferredUNet, Shapes},
    experiment::{AutoencoderExperiment, DiffusionExperiment},
    networks::{AttentionKind, NetworkSettings, Ports, UNet3d, UNetConfig},
    nn::Parameters,
    run::open_latent_space,
    safetensors::{read_safetensors, write_safetensors_atomically},
    text::{ClipText, ClipTextConfig},
    weights::LvdmCheckpoint,
};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use zip::{ZipWriter, write::FileOptions};

type Tensors = BTreeMap<String, Tensor>;

/// What stands beside the weights, as PyTorch Lightning writes it; a class is a dictionary's key.
fn beside(pickle: &mut Pickle) {
    pickle.text("epoch");
    pickle.int(12);
    pickle.text("global_step");
    pickle.int(3456);
    pickle.text("pytorch-lightning_version");
    pickle.text("1.4.2");
    pickle.text("callbacks");
    pickle.raw(b"}(cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}u");
    pickle.text("optimizer_states");
    pickle.raw(b"](}e");
    pickle.text("lr_schedulers");
    pickle.raw(b"]");
    pickle.text("hparams_name");
    pickle.text("kwargs");
}

/// A network's tensors with random values, under a prefix, aliases too.
fn network(prefix: &str, seed: u64, declare: &dyn Fn(&Parameters)) -> Tensors {
    let parameters = Parameters::new(Device::Cpu, seed);
    declare(&parameters);
    wake(&parameters);
    let own: Tensors = parameters.named().into_iter().map(|(n, t)| (n, t.detach())).collect();
    let aliased = parameters.aliases().into_iter().map(|(alias, name)| (alias, own[&name].shallow_clone()));
    own.iter()
        .map(|(n, t)| (n.clone(), t.shallow_clone()))
        .chain(aliased)
        .map(|(n, t)| (format!("{prefix}{n}"), t))
        .collect()
}

/// The average of a network, as released checkpoints name it; of two names of a tensor, the shorter.
fn averaged(prefix: &str, declare: &dyn Fn(&Parameters)) -> Tensors {
    let all = network(prefix, 77, declare);
    let mut tensors: Tensors = all
        .iter()
        .filter(|(name, _)| {
            !all.contains_key(&name.replace(".conv.weight", ".weight")) || !name.ends_with(".conv.weight")
        })
        .map(|(name, tensor)| (format!("model_ema.{}", name.replace('.', "")), tensor.shallow_clone()))
        .collect();
    tensors.insert("model_ema.decay".into(), Tensor::from(0.999f32));
    tensors.insert("model_ema.num_updates".into(), Tensor::from(3456i32));
    tensors
}

fn small_autoencoder() -> AutoencoderConfig {
    AutoencoderConfig { channels: 4, factors: [2, 4, 4], norm_groups: 4, ..AutoencoderConfig::default() }
}

fn small_unet() -> UNetConfig {
    UNetConfig {
        channels: 32,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![2],
        heads: 4,
        ..UNetConfig::default()
    }
}

const SHORT: Ports = Ports::of([4, 4, 1, 1]);
const MASKED: Ports = Ports { outputs: 4, levels: Some(251), ..Ports::of([5, 4, 1, 1]) };

/// The options that the small networks need.
const OPTIONS: [&str; 8] = ["--latents", "sky", "--temporal-factor", "2", "--norm-groups", "4", "--resolution", "16"];

fn told() -> ImportOptions {
    ImportOptions {
        latents: Some(LatentPreset::Sky),
        temporal_factor: Some(2),
        norm_groups: Some(4),
        resolution: Some(16),
        ..ImportOptions::default()
    }
}

fn first_stage() -> Tensors {
    network("first_stage_model.", 1, &|p| drop(VideoAutoencoder::new(&p.root(), &small_autoencoder())))
}

/// The tensors of a diffusion checkpoint.
fn diffusion(ports: Ports, config: &UNetConfig) -> Tensors {
    let declare = |p: &Parameters| drop(UNet3d::new(&p.root(), config, &ports));
    let mut tensors = network("model.diffusion_model.", 2, &declare);
    tensors.extend(averaged("diffusion_model.", &declare));
    tensors.extend(first_stage());
    let betas = NoiseSchedule::new(&ScheduleConfig::default()).unwrap().beta;
    let betas: Vec<f32> = betas.into_iter().map(|beta| beta as f32).collect();
    tensors.insert("betas".into(), Tensor::from_slice(&betas));
    tensors.insert("alphas_cumprod".into(), Tensor::from_slice(&betas).detach().copy());
    tensors.insert("logvar".into(), Tensor::zeros([1000], (Kind::Float, Device::Cpu)));
    tensors
}

/// The tensors of an autoencoder's own checkpoint.
fn autoencoder(with_average: bool) -> Tensors {
    let declare = |p: &Parameters| drop(VideoAutoencoder::new(&p.root(), &small_autoencoder()));
    let discriminator = DiscriminatorConfig { channels: 8, layers: 2 };
    let mut tensors = network("", 1, &declare);
    tensors.extend(network("loss.discriminator.", 4, &|p| {
        drop(PatchDiscriminator::new(&p.root(), 3, &discriminator));
    }));
    tensors.insert("loss.logvar".into(), Tensor::zeros([], (Kind::Float, Device::Cpu)));
    tensors.insert("loss.perceptual_loss.lin0.model.1.weight".into(), noise(1, &[1, 4, 1, 1]));
    if with_average {
        tensors.extend(averaged("", &declare));
    }
    tensors
}

/// A folder with a short-video checkpoint.
fn workplace() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(&folder.path().join("short.ckpt"), &diffusion(SHORT, &small_unet()), &beside);
    folder
}

fn import(folder: &Path, file: &str, out: &str, more: &[&str]) -> common::Said {
    run_in(folder, &[&["import", "lvdm", file, "--out", out], &OPTIONS[..], more].concat())
}

fn latest(run: &Path) -> Checkpoint {
    checkpoint::open(run).unwrap().1
}

/// To the bit.
fn same(a: &Tensors, b: &Tensors) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, tensor) in a {
        assert_eq!((tensor.kind(), tensor.size()), (b[name].kind(), b[name].size()), "{name}");
        assert!(bytes(tensor) == bytes(&b[name]), "{name}");
    }
}

fn under(prefix: &str, tensors: &Tensors) -> Tensors {
    let strip = |(n, t): (&String, &Tensor)| Some((n.strip_prefix(prefix)?.to_string(), t.shallow_clone()));
    tensors.iter().filter_map(strip).collect()
}

/// Raw and averaged weights, autoencoder, settings, scale: all of it is in the run, and the run samples.
#[test]
fn a_short_video_checkpoint_becomes_a_run() {
    let folder = workplace();
    let at = folder.path();
    let said = import(at, "short.ckpt", "run", &[]);
    assert_eq!(said.status, 0, "{}", said.err);
    for line in [
        "U-Net, average",
        "buffers of the noise schedule (2), logvar (1), epoch (1), global_step (1)",
        "callbacks (1), optimizer_states (1), lr_schedulers (0), hparams_name (1)",
        "a run of the diffusion at step 3456: run",
    ] {
        assert!(said.out.contains(line), "{line} is not in\n{}", said.out);
    }
    let given = diffusion(SHORT, &small_unet());
    let run = latest(&at.join("run"));
    same(&run.part("model"), &under("model.diffusion_model.", &given));
    for (name, tensor) in run.part("ema") {
        let stored = &given[&format!("model_ema.{}", format!("diffusion_model.{name}").replace('.', ""))];
        assert!(tensor.equal(stored), "{name}");
    }
    assert_eq!((run.progress.step, run.progress.ema_updates), (3456, 3456));
    let carried = Checkpoint::read(&at.join("run/autoencoder.safetensors")).unwrap();
    let frozen = under("first_stage_model.", &given);
    for (name, tensor) in carried.part("model") {
        assert!(tensor.equal(&frozen[&name]), "{name}");
    }
    assert_eq!(carried.tensors["latent.scale"].double_value(&[]), 0.33422927);
    assert_eq!(carried.tensors["latent.shift"].double_value(&[]), 1.4606637);

    let experiment: DiffusionExperiment = serde_json::from_value(run.experiment).unwrap();
    assert_eq!(experiment.unet().unwrap(), &small_unet());
    assert_eq!(experiment.betas().unwrap(), &ScheduleConfig::default());
    assert_eq!((experiment.data.frames, experiment.data.resolution, experiment.latent_stride), (8, 16, 1));
    assert_eq!((experiment.conditioning, experiment.trainer.ema_decay), (None, Some(0.999)));
    let known: AutoencoderExperiment = serde_json::from_value(carried.experiment).unwrap();
    assert_eq!((known.autoencoder, known.data.frames), (small_autoencoder().into(), 16));
    let written = fs::read_to_string(at.join("run/experiment.yaml")).unwrap();
    assert!(written.starts_with('#') && written.contains("placeholder") && written.contains("data/sky_timelapse"));

    succeed_in(at, &["sample", "run", "--videos", "1", "--steps", "2", "--out", "samples.safetensors"]);
    assert_eq!(read_safetensors(&at.join("samples.safetensors")).unwrap().0["clips"].size(), [1, 3, 8, 16, 16]);
}

/// An imported run is where training goes on, or starts from.
#[test]
fn training_goes_on_from_an_import() {
    let folder = workplace();
    let at = folder.path();
    assert_eq!(import(at, "short.ckpt", "run", &[]).status, 0);
    write_packed(&at.join("clips.safetensors"), 4, 8, 16);
    let train = |rest: &[&str]| {
        let data = "data.dataset={kind: packed, file: clips.safetensors}";
        let common = ["train", "diffusion", "run/experiment.yaml", data, "trainer.batch=1", "sampler.steps=2"];
        succeed_in(at, &[&common, rest].concat())
    };
    let said = train(&["--run", "more", "trainer.steps=1", "start_from=run"]);
    assert!(said.out.contains("trained to step 1"), "{}", said.out);
    let said = train(&["--run", "run", "trainer.steps=3457"]);
    assert!(said.err.contains("no state of the model's optimizer"), "{}", said.err);
    assert!(said.out.contains("trained to step 3457"), "{}", said.out);
}

/// Both kinds of network with a mask channel look alike: the kind is asked for, and brings its training.
#[test]
fn frame_conditioned_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_checkpoint(&at.join("masked.ckpt"), &diffusion(MASKED, &small_unet()), &beside);
    let said = import(at, "masked.ckpt", "run", &[]);
    assert!(said.error(2).contains("--conditioning prediction|interpolation"), "{}", said.err);
    assert!(!at.join("run").exists());

    let experiment =
        |run: &str| -> DiffusionExperiment { serde_json::from_value(latest(&at.join(run)).experiment).unwrap() };
    assert_eq!(import(at, "masked.ckpt", "prediction", &["--conditioning", "prediction"]).status, 0);
    let prediction = experiment("prediction");
    assert_eq!(prediction.conditioning, Some(FrameConditioning::default()));
    assert_eq!((prediction.latent_stride, prediction.data.frames), (4, 32));
    assert_eq!(import(at, "masked.ckpt", "interpolation", &["--conditioning", "interpolation"]).status, 0);
    let interpolation = experiment("interpolation");
    let conditioning = interpolation.conditioning.unwrap();
    assert_eq!((conditioning.interpolation, conditioning.prediction), (0.9, 0.0));
    assert_eq!((interpolation.latent_stride, interpolation.data.frames), (1, 8));
    succeed_in(at, &["sample", "prediction", "--videos", "1", "--steps", "2", "--out", "samples.safetensors"]);
    // and nothing is asked of what was exported
    succeed_in(at, &["export", "prediction", "--out", "prediction.safetensors"]);
    succeed_in(at, &["import", "lvdm", "prediction.safetensors", "--out", "again"]);
    assert_eq!(experiment("again").conditioning, prediction.conditioning);
}

/// A text-to-video checkpoint: image autoencoder per frame, text encoder; both travel with the run and back.
#[test]
fn a_text_checkpoint_becomes_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let config = UNetConfig { attention: AttentionKind::Text, context_width: 64, adaptive_norm: false, ..small_unet() };
    let image =
        ImageAutoencoderConfig { widths: vec![8, 16], blocks_per_level: 1, norm_groups: 4, ..Default::default() };
    let clip = ClipTextConfig {
        vocabulary: 50,
        positions: 7,
        width: 64,
        hidden: 32,
        layers: 2,
        heads: 1,
        ..ClipTextConfig::default()
    };
    let mut given = diffusion(SHORT, &config);
    given.retain(|name, _| !name.starts_with("first_stage_model.") && name != "betas");
    given.extend(network("first_stage_model.", 5, &|p| drop(ImageAutoencoder::new(&p.root(), &image))));
    let text = "cond_stage_model.transformer.text_model.";
    given.extend(network(text, 6, &|p| drop(ClipText::new(&p.root(), &clip))));
    given.insert(
        format!("{text}embeddings.position_ids"),
        Tensor::arange(7, (Kind::Int64, Device::Cpu)).reshape([1, 7]),
    );
    write_checkpoint(&at.join("text.ckpt"), &given, &beside);
    let import = |rest: &[&str]| run_in(at, &[&["import", "lvdm", "text.ckpt", "--out", "run"], rest].concat());
    let options = ["--latents", "text", "--norm-groups", "4", "--resolution", "16"];
    assert!(import(&options[..2]).error(2).contains("--norm-groups"));
    let said = import(&options);
    assert_eq!(said.status, 0, "{}", said.err);
    for words in ["text encoder", "image autoencoder", "position_ids of the text encoder (1)"] {
        assert!(said.out.contains(words), "{}", said.out);
    }
    let run = latest(&at.join("run"));
    let experiment: DiffusionExperiment = serde_json::from_value(run.experiment.clone()).unwrap();
    assert_eq!(experiment.unet().unwrap(), &config);
    assert_eq!((experiment.betas().unwrap().beta_start, experiment.betas().unwrap().beta_end), (0.00085, 0.012));
    assert_eq!((experiment.data.frames, experiment.data.resolution), (4, 16));
    let space = open_latent_space(&at.join("run/autoencoder.safetensors"), Device::Cpu).unwrap();
    assert_eq!(format!("{:?}", space.settings()), format!("{image:?}"));
    assert_eq!((space.normalization.scale, space.normalization.shift), (0.18215, 0.0));
    let encoder = Checkpoint::read(&at.join("run/text_encoder.safetensors")).unwrap();
    assert_eq!(encoder.experiment["text_encoder"], serde_json::to_value(&clip).unwrap());

    succeed_in(at, &["export", "run", "--out", "text.safetensors"]);
    let (exported, _) = read_safetensors(&at.join("text.safetensors")).unwrap();
    given.retain(|name, _| !["alphas_cumprod", "logvar"].contains(&name.as_str()) && !name.ends_with("position_ids"));
    same(&exported, &given);
    succeed_in(at, &["import", "lvdm", "text.safetensors", "--out", "again"]);
    same(&latest(&at.join("again")).tensors, &run.tensors);
    for file in ["autoencoder.safetensors", "text_encoder.safetensors"] {
        assert!(fs::read(at.join("run").join(file)).unwrap() == fs::read(at.join("again").join(file)).unwrap());
    }
    // half a text model is none
    given.retain(|name, _| !name.starts_with(text));
    write_checkpoint(&at.join("text.ckpt"), &given, &beside);
    fs::remove_dir_all(at.join("run")).unwrap();
    assert!(import(&options).error(1).contains("text encoder"));
}

/// An autoencoder's own checkpoint becomes an autoencoder run, with its discriminator and average.
#[test]
fn an_autoencoder_checkpoint_becomes_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for with_average in [false, true] {
        let (file, run) = (format!("{with_average}.ckpt"), format!("run-{with_average}"));
        let given = autoencoder(with_average);
        write_checkpoint(&at.join(&file), &given, &beside);
        let said = import(at, &file, &run, &[]);
        assert_eq!(said.status, 0, "{}", said.err);
        assert!(said.out.contains("loss.* (2)") && said.out.contains("discriminator"), "{}", said.out);
        let found = latest(&at.join(&run));
        assert_eq!(found.task, "autoencoder");
        same(&found.part("discriminator"), &under("loss.discriminator.", &given));
        assert!(found.part("model").iter().all(|(name, tensor)| tensor.equal(&given[name])));
        assert_eq!(found.part("ema").len(), if with_average { found.part("model").len() } else { 0 });
        let experiment: AutoencoderExperiment = serde_json::from_value(found.experiment.clone()).unwrap();
        assert_eq!(experiment.autoencoder, small_autoencoder().into());
        assert_eq!(experiment.loss.discriminator, DiscriminatorConfig { channels: 8, layers: 2 });

        let out = format!("{with_average}.safetensors");
        succeed_in(at, &["export", &run, "--out", &out]);
        let (exported, _) = read_safetensors(&at.join(&out)).unwrap();
        let lost = given.keys().filter(|name| !exported.contains_key(*name)).cloned().collect::<Vec<_>>();
        assert_eq!(lost, ["loss.logvar", "loss.perceptual_loss.lin0.model.1.weight"]);
        assert!(exported.iter().all(|(name, tensor)| tensor.equal(&given[name])));
        let again = format!("again-{with_average}");
        succeed_in(at, &["import", "lvdm", &out, "--out", &again]);
        same(&latest(&at.join(&again)).tensors, &found.tensors);
    }
}

/// Training goes on from an imported autoencoder too; a discriminator that the file lacks starts anew.
#[test]
fn an_imported_autoencoder_is_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let mut given = autoencoder(true);
    given.retain(|name, _| !name.starts_with("loss."));
    write_checkpoint(&at.join("x.ckpt"), &given, &beside);
    let said = import(at, "x.ckpt", "run", &[]);
    assert!(said.status == 0 && !said.out.contains("discriminator"), "{}{}", said.out, said.err);
    write_packed(&at.join("clips.safetensors"), 2, 8, 16);
    let data = "data={dataset: {kind: packed, file: clips.safetensors}, frames: 8, resolution: 16, workers: 1}";
    let loss = "loss={perceptual_weight: 0.0, discriminator: {channels: 4, layers: 1}}";
    let said = succeed_in(
        at,
        &["train", "autoencoder", "run/experiment.yaml", "--run", "run", data, loss, "trainer.steps=3457"],
    );
    assert!(said.out.contains("trained to step 3457"), "{}", said.out);
    for part in ["no discriminator", "no state of the model's optimizer"] {
        assert!(said.err.contains(part), "{}", said.err);
    }
}

/// Export gives the released names, each of an alias's two; import makes the same run of it, to the bit.
#[test]
fn export_and_import_are_inverse() {
    let folder = workplace();
    let at = folder.path();
    assert_eq!(import(at, "short.ckpt", "run", &[]).status, 0);
    let said = succeed_in(at, &["export", "run", "--out", "run.safetensors"]);
    assert!(said.out.contains("U-Net, average"), "{}", said.out);
    let (exported, _) = read_safetensors(&at.join("run.safetensors")).unwrap();
    let mut given = diffusion(SHORT, &small_unet());
    given.retain(|name, _| !["betas", "alphas_cumprod", "logvar"].contains(&name.as_str()));
    same(&exported, &given);

    // with the options again, and with none: the file tells
    succeed_in(at, &[&["import", "lvdm", "run.safetensors", "--out", "again"], &OPTIONS[..]].concat());
    succeed_in(at, &["import", "lvdm", "run.safetensors", "--out", "once-more"]);
    for other in ["again", "once-more"] {
        let (first, second) = (latest(&at.join("run")), latest(&at.join(other)));
        same(&first.tensors, &second.tensors);
        assert_eq!(first.progress, second.progress);
        let settings = |run: &Checkpoint| DiffusionExperiment {
            autoencoder: PathBuf::new().into(),
            ..serde_json::from_value(run.experiment.clone()).unwrap()
        };
        assert_eq!(serde_json::to_value(settings(&first)).unwrap(), serde_json::to_value(settings(&second)).unwrap());
        let carried = |run: &str| fs::read(at.join(run).join("autoencoder.safetensors")).unwrap();
        assert!(carried("run") == carried(other));
    }
    let script = ["sample", "--videos", "1", "--steps", "2", "--out"];
    succeed_in(at, &[&script[..], &["a.safetensors", "run"]].concat());
    succeed_in(at, &[&script[..], &["b.safetensors", "again"]].concat());
    let clips = |file: &str| read_safetensors(&at.join(file)).unwrap().0["clips"].shallow_clone();
    assert!(clips("a.safetensors").equal(&clips("b.safetensors")));
}

/// Python's own reader finds the same names, types, shapes and values in an exported file.
#[test]
fn python_reads_an_export() {
    let folder = workplace();
    let at = folder.path();
    assert_eq!(import(at, "short.ckpt", "run", &[]).status, 0);
    succeed_in(at, &["export", "run", "--out", "run.safetensors"]);
    let output = Command::new("python3")
        .arg(source("tests/read_safetensors.py"))
        .arg(at.join("run.safetensors"))
        .env("PYTHONPATH", source(".python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("Python 3 is needed: apt-get install python3");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "safetensors (`make setup` installs it into .python) says:\n{complaint}");
    let found: BTreeMap<String, (String, Vec<i64>, String)> = serde_json::from_slice(&output.stdout).unwrap();
    let (ours, _) = read_safetensors(&at.join("run.safetensors")).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>());
    for (name, (kind, shape, hash)) in found {
        let tensor = &ours[&name];
        let expected = if tensor.kind() == Kind::Float { "float32" } else { "int32" };
        let sum: String = Sha256::digest(bytes(tensor)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((kind.as_str(), shape, hash), (expected, tensor.size(), sum), "{name}");
    }
}

/// What the file does not tell is asked for: status 2, the option by its name, nothing written.
#[test]
fn missing_options_are_named() {
    let folder = workplace();
    let at = folder.path();
    let bare = UNetConfig { relative_position: false, ..small_unet() };
    write_checkpoint(&at.join("bare.ckpt"), &diffusion(SHORT, &bare), &beside);
    write_checkpoint(&at.join("autoencoder.ckpt"), &autoencoder(false), &beside);
    let before = contents(at);
    let without =
        |name: &str| -> Vec<&str> { OPTIONS.chunks(2).filter(|option| option[0] != name).flatten().copied().collect() };
    let refused = |file: &str, options: &[&str], words: &[&str]| {
        let said = run_in(at, &[&["import", "lvdm", file, "--out", "run"], options].concat());
        let line = said.error(2);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} are not in\n{line}");
        assert!(contents(at) == before);
    };
    refused("short.ckpt", &without("--latents"), &["--latents sky|ucf101|taichi|text", "--scale and --shift"]);
    refused("short.ckpt", &without("--temporal-factor"), &["--temporal-factor"]);
    refused("short.ckpt", &without("--norm-groups"), &["--norm-groups"]);
    refused("short.ckpt", &[], &["--latents", "--temporal-factor", "--norm-groups"]);
    refused("autoencoder.ckpt", &without("--latents"), &["--latents"]);
    refused("autoencoder.ckpt", &without("--norm-groups"), &["--norm-groups"]);
    refused("bare.ckpt", &OPTIONS, &["--heads", "--frames"]);
    let more = |more: &[&'static str]| [&OPTIONS[..], more].concat();
    // what does not fit
    refused("short.ckpt", &more(&["--heads", "2"]), &["--heads 2", "say 4"]);
    refused("short.ckpt", &more(&["--frames", "16"]), &["--frames 16", "8 latent frames", "4"]);
    refused("short.ckpt", &more(&["--conditioning", "prediction"]), &["--conditioning", "no mask channel"]);
    refused("short.ckpt", &more(&["--latent-stride", "0"]), &["--latent-stride"]);
    refused("bare.ckpt", &more(&["--heads", "3", "--frames", "8"]), &["3 heads"]);
    refused("autoencoder.ckpt", &more(&["--heads", "2"]), &["--heads"]);
    let changed = |name: &'static str, value: &'static str| [without(name), vec![name, value]].concat();
    refused("short.ckpt", &changed("--temporal-factor", "8"), &["factor 8", "2 blocks"]);
    refused("short.ckpt", &changed("--norm-groups", "3"), &["norm_groups = 3"]);
    refused("short.ckpt", &changed("--resolution", "12"), &["--resolution 12"]);
    refused("nothing.ckpt", &OPTIONS, &["nothing.ckpt"]);
    // and what does
    assert_eq!(
        run_in(
            at,
            &[&["import", "lvdm", "bare.ckpt", "--out", "bare"], &more(&["--heads", "4", "--frames", "8"])[..]]
                .concat()
        )
        .status,
        0
    );
    let said = import(at, "short.ckpt", "bare", &[]);
    assert!(said.error(2).contains("is there already"), "{}", said.err);
}

/// Scale and shift in the file are used, and a contradiction is noticed.
#[test]
fn a_file_may_hold_its_scale() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let mut tensors = diffusion(SHORT, &small_unet());
    tensors.insert("scale_factor".into(), Tensor::from(0.18215f32));
    write_checkpoint(&at.join("x.ckpt"), &tensors, &beside);
    let with = |options: &[&str]| {
        run_in(at, &[&["import", "lvdm", "x.ckpt", "--out", "run"], &OPTIONS[2..], options].concat())
    };
    assert!(with(&["--latents", "sky"]).error(2).contains("scale = 0.18215"));
    assert!(with(&[]).error(2).contains("--shift"));
    assert_eq!(with(&["--shift", "-0.5"]).status, 0);
    let carried = Checkpoint::read(&at.join("run/autoencoder.safetensors")).unwrap();
    assert_eq!(carried.tensors["latent.scale"].double_value(&[]), 0.18215);
    assert_eq!(carried.tensors["latent.shift"].double_value(&[]), -0.5);
}

/// Anything missing, unknown, misshapen or contradictory: status 1, the tensor by its name, nothing written.
#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let good = diffusion(SHORT, &small_unet());
    let qkv = "model.diffusion_model.middle_block.1.qkv_t.weight";
    type Change<'a> = Box<dyn Fn(&mut Tensors) + 'a>;
    let remove = |name: &'static str| -> Change<'_> { Box::new(move |t| drop(t.remove(name).unwrap())) };
    let put = |name: &'static str, value: Tensor| -> Change<'_> {
        Box::new(move |t| drop(t.insert(name.into(), value.shallow_clone())))
    };
    let keep = |words: &'static [&'static str]| -> Change<'_> {
        Box::new(move |t| t.retain(|name, _| words.iter().any(|word| name.starts_with(word))))
    };
    let cases: Vec<(Change<'_>, &[&str])> = vec![
        (remove(qkv), &["qkv_t.weight` is missing"]),
        (remove("first_stage_model.decoder.conv_out.conv.bias"), &["conv_out.conv.bias` is missing"]),
        (remove("model_ema.diffusion_modelout0bias"), &["1 averaged", "model_ema.diffusion_modelout0bias"]),
        (put("model.diffusion_model.middle_block.1.other", noise(1, &[3])), &["middle_block.1.other` is unknown"]),
        (put("something.else", noise(1, &[3])), &["1 tensors are unknown: `something.else`"]),
        (put("model_ema.what", noise(1, &[3])), &["`model_ema.what`"]),
        (put(qkv, noise(1, &[192, 64, 2])), &["qkv_t.weight` has shape [192, 64, 2]"]),
        (put("model_ema.diffusion_modelout0bias", noise(1, &[33])), &["average of `out.0.bias` has shape [33]"]),
        (
            put("first_stage_model.encoder.conv_first.weight", noise(1, &[4, 3, 3, 3, 3])),
            &["encoder.conv_first.weight", "the file's differ"],
        ),
        (put("betas", noise(1, &[1000]).abs()), &["betas"]),
        (put("scale_factor", noise(1, &[2])), &["scale_factor"]),
        (keep(&["model.", "model_ema."]), &["its autoencoder is missing"]),
        (keep(&["betas", "logvar"]), &["neither a U-Net"]),
        (keep(&["first_stage_model.encoder"]), &["is missing"]),
    ];
    for (change, words) in cases {
        let mut tensors: Tensors = good.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        change(&mut tensors);
        write_checkpoint(&at.join("x.ckpt"), &tensors, &beside);
        let said = import(at, "x.ckpt", "run", &[]);
        let line = said.error(1);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} are not in\n{line}");
        assert!(line.contains("x.ckpt") && !at.join("run").exists(), "{line}");
        assert!(said.out.is_empty(), "{}", said.out);
    }
    let unknown = |pickle: &mut Pickle| {
        beside(pickle);
        pickle.text("a_new_thing");
        pickle.int(1);
    };
    write_checkpoint(&at.join("x.ckpt"), &good, &unknown);
    assert!(import(at, "x.ckpt", "run", &[]).error(1).contains("a_new_thing"));
}

/// Cut short anywhere, or with any bit flipped: an error, or what is imported is right. Never a panic.
#[test]
fn damage_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let config = UNetConfig { multipliers: vec![1], attention_factors: vec![], ..small_unet() };
    let path = at.join("x.ckpt");
    write_checkpoint(&path, &diffusion(SHORT, &config), &beside);
    exchange::import(&path, &told(), &at.join("good")).unwrap();
    succeed_in(at, &["export", "good", "--out", "x.safetensors"]);
    let good = latest(&at.join("good"));
    let attempt = |path: &Path| {
        let run = at.join("run");
        let outcome = catch_unwind(|| exchange::import(path, &told(), &at.join("run"))).expect("no panic");
        match outcome {
            Err(error) => assert!(!run.exists(), "{error:#}"),
            Ok(_) => {
                let found = latest(&run);
                let carried = Checkpoint::read(&run.join("autoencoder.safetensors")).unwrap();
                fs::remove_dir_all(&run).unwrap();
                return Some((found, carried));
            }
        }
        None
    };
    for file in ["x.ckpt", "x.safetensors"] {
        let path = at.join(file);
        let whole = fs::read(&path).unwrap();
        let (length, damaged) = (whole.len(), at.join(format!("damaged-{file}")));
        for cut in [0, 1, 8, 9, 100, length / 3, length / 2, length - 100, length - 1] {
            fs::write(&damaged, &whole[..cut]).unwrap();
            assert!(attempt(&damaged).is_none(), "{file} cut to {cut} of {length} bytes");
        }
        // the pickle or header densely, the rest in places
        let places = (0..20_000).step_by(197).chain((20_000..length).step_by(length / 40)).chain(length - 40..length);
        for place in places {
            let mut flipped = whole.clone();
            flipped[place] ^= 1 << (place % 8);
            fs::write(&damaged, &flipped).unwrap();
            // safetensors have no checksum: a flipped weight is not noticed there
            if let (Some((found, _)), "x.ckpt") = (attempt(&damaged), file) {
                same(&found.tensors, &good.tensors);
            }
        }
    }
}

/// A pickle that runs a command when Python loads it: imported where it stands beside the weights, refused where
/// a weight should be, and the command does not run.
#[test]
fn a_hostile_pickle_runs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let marker = at.join("marker");
    let python = |path: &Path| {
        let script = "
import pickle, sys, zipfile
class Loader(pickle.Unpickler):
    def find_class(self, module, name):
        if module in ('posix', 'builtins', 'collections'):
            return super().find_class(module, name)
        return lambda *arguments: None
    def persistent_load(self, reference):
        return None
Loader(zipfile.ZipFile(sys.argv[1]).open('archive/data.pkl')).load()
";
        Command::new("python3").args(["-c", script]).arg(path).status().unwrap()
    };
    let tensors = diffusion(SHORT, &small_unet());
    let command = format!("echo run > {}", marker.display());
    let call = |pickle: &mut Pickle| {
        pickle.raw(b"cposix\nsystem\n(");
        pickle.text(&command);
        pickle.raw(b"tR");
    };
    let evaluate = |pickle: &mut Pickle| {
        pickle.raw(b"cbuiltins\neval\n(");
        pickle.text(&format!("open({:?}, 'w').close()", marker.display().to_string()));
        pickle.raw(b"tR");
    };
    type Add<'a> = &'a dyn Fn(&mut Pickle);
    let beside_weights: [(&str, Add<'_>); 2] = [("callbacks", &call), ("hyper_parameters", &evaluate)];
    for (key, hostile) in beside_weights {
        write_checkpoint(&at.join("x.ckpt"), &tensors, &|pickle| {
            pickle.text(key);
            hostile(pickle);
        });
        assert!(python(&at.join("x.ckpt")).success() && marker.exists(), "this file is not hostile");
        fs::remove_file(&marker).unwrap();
        let said = import(at, "x.ckpt", key, &[]);
        assert_eq!(said.status, 0, "{}", said.err);
        assert!(said.out.contains(key), "{}", said.out);
        assert!(!marker.exists(), "the command was run");
    }
    // a dictionary that ends in a hostile state dict; the last of equal keys counts
    let cases: [(&str, Add<'_>); 2] = [("state_dict", &call), ("unknown_key", &evaluate)];
    for (key, hostile) in cases {
        let path = at.join("x.ckpt");
        write_checkpoint(&path, &tensors, &beside);
        let mut text = Vec::new();
        let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        archive.by_name("archive/data.pkl").unwrap().read_to_end(&mut text).unwrap();
        let mut pickle = Pickle(text[..text.len() - 2].to_vec());
        pickle.text(key);
        hostile(&mut pickle);
        pickle.raw(b"u.");
        let mut archive = ZipWriter::new(File::create(&path).unwrap());
        archive.start_file("archive/data.pkl", FileOptions::default()).unwrap();
        archive.write_all(&pickle.0).unwrap();
        archive.finish().unwrap();
        assert!(python(&path).success() && marker.exists(), "this file is not hostile");
        fs::remove_file(&marker).unwrap();
        let said = import(at, "x.ckpt", "run", &[]);
        said.error(1);
        assert!(!marker.exists() && !at.join("run").exists());
    }
}

/// Half-precision weights are taken in as float32.
#[test]
fn half_precision_becomes_single() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let half: Tensors = diffusion(SHORT, &small_unet())
        .into_iter()
        .map(
            |(name, t)| {
                if name.starts_with("model") && t.dim() > 0 { (name, t.to_kind(Kind::Half)) } else { (name, t) }
            },
        )
        .collect();
    write_safetensors_atomically(&at.join("x.safetensors"), &half.iter().collect::<Vec<_>>(), &serde_json::Value::Null)
        .unwrap();
    // metadata of no known kind is not one of `lvdm export`
    let said = import(at, "x.safetensors", "run", &[]);
    assert!(said.error(1).contains("lvdm export"), "{}", said.err);
    let dense: Tensors = half.into_iter().map(|(n, t)| (n, t.contiguous())).collect();
    let pairs: Vec<(&str, &Tensor)> = dense.iter().map(|(n, t)| (n.as_str(), t)).collect();
    Tensor::write_safetensors(&pairs, at.join("x.safetensors")).unwrap();
    assert_eq!(import(at, "x.safetensors", "run", &[]).status, 0);
    let run = latest(&at.join("run"));
    assert!(run.part("model").values().chain(run.part("ema").values()).all(|t| t.kind() == Kind::Float));
}

/// Name → shape of a released network, without its prefix.
fn released(file: &str) -> BTreeMap<String, Vec<i64>> {
    let text = fs::read_to_string(source(&format!("tests/parity/names/{file}.json"))).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let prefix = json["prefix"].as_str().unwrap();
    let tensors: Vec<(String, Vec<i64>)> = serde_json::from_value(json["tensors"].clone()).unwrap();
    tensors.into_iter().map(|(name, shape)| (name.strip_prefix(prefix).unwrap().to_string(), shape)).collect()
}

/// The network that was inferred has exactly the released tensors.
fn agree(file: &str, declare: &dyn Fn(&Parameters)) {
    let parameters = Parameters::unfilled(Device::Cpu);
    declare(&parameters);
    let tensors: Tensors = released(file)
        .into_iter()
        .map(|(name, shape)| (name, Tensor::zeros([], (Kind::Float, Device::Cpu)).expand(shape, false)))
        .collect();
    parameters.check(&tensors).unwrap();
}

/// From names and shapes alone, without their memory, to the released configurations.
#[test]
fn released_networks_are_recognised() {
    let short = UNetConfig::default();
    let text = UNetConfig {
        channels: 320,
        multipliers: vec![1, 2, 4, 4],
        blocks_per_level: 2,
        attention_factors: vec![1, 2, 4],
        heads: 8,
        attention: AttentionKind::Text,
        adaptive_norm: false,
        ..UNetConfig::default()
    };
    for (file, config, inputs, length, classes) in [
        ("unet_short", &short, 4, 4, None),
        ("unet_prediction", &short, 5, 4, Some(251)),
        ("unet_interpolation", &short, 5, 5, Some(251)),
        ("unet_text", &text, 4, 16, None),
    ] {
        let found = InferredUNet::from_shapes(&released(file).into_iter().collect()).unwrap();
        assert_eq!(&found.config, config, "{file}");
        assert_eq!((found.heads, found.inputs, found.outputs), (Some(config.heads), inputs, 4), "{file}");
        assert_eq!((found.temporal_length, found.classes), (Some(length), classes), "{file}");
        agree(file, &|p| drop(UNet3d::new(&p.root(), &found.config, &found.ports(0))));
    }
    let found = InferredAutoencoder::from_shapes(&released("autoencoder_3d").into_iter().collect()).unwrap();
    assert_eq!(found.released(), Some(AutoencoderConfig::default()));
    agree("autoencoder_3d", &|p| drop(VideoAutoencoder::new(&p.root(), &found.released().unwrap())));
    let found = ImageAutoencoderConfig::from_shapes(&released("autoencoder_2d").into_iter().collect()).unwrap();
    assert_eq!(found, ImageAutoencoderConfig::default());
    agree("autoencoder_2d", &|p| drop(ImageAutoencoder::new(&p.root(), &found)));
    let found = DiscriminatorConfig::from_shapes(&released("patch_discriminator").into_iter().collect()).unwrap();
    assert_eq!(found, DiscriminatorConfig::default());
    agree("patch_discriminator", &|p| drop(PatchDiscriminator::new(&p.root(), 3, &found)));
}

/// Other networks than the released ones are recognised too, each by its own tensors.
#[test]
fn every_setting_leaves_a_trace() {
    let base = small_unet();
    for config in [
        base.clone(),
        UNetConfig { multipliers: vec![1, 1, 3], attention_factors: vec![1, 4], ..base.clone() },
        UNetConfig { blocks_per_level: 2, adaptive_norm: false, ..base.clone() },
        UNetConfig { attention: AttentionKind::Joint, ..base.clone() },
        UNetConfig { attention: AttentionKind::Text, context_width: 24, ..base.clone() },
        UNetConfig { attention_factors: vec![], heads: 8, ..base.clone() },
        UNetConfig { relative_position: false, heads: 1, ..base },
    ] {
        let parameters = Parameters::unfilled(Device::Cpu);
        let ports = Ports { outputs: 3, text: config.text_width(), levels: Some(9), ..Ports::of([5, 7, 1, 1]) };
        UNet3d::new(&parameters.root(), &config, &ports);
        let tensors: Tensors = parameters.named().into_iter().collect();
        let found = InferredUNet::from_shapes(&Shapes::from(&tensors)).unwrap();
        assert_eq!(found.config, config);
        assert_eq!(found.ports(7), ports);
        assert_eq!(found.heads, config.relative_position.then_some(config.heads));
    }
}

/// All released names together: each goes to its part, and no two averages share a name.
#[test]
fn a_released_checkpoint_is_sorted() {
    let small = || Tensor::zeros([1], (Kind::Float, Device::Cpu));
    for unet in ["unet_short", "unet_prediction", "unet_interpolation", "unet_text"] {
        let names = released(unet);
        let mut tensors = Tensors::new();
        let mut flat = BTreeSet::new();
        for (name, shape) in &names {
            let tensor = small().expand(shape, false);
            let averaged = format!("model_ema.{}", format!("diffusion_model.{name}").replace('.', ""));
            assert!(flat.insert(averaged.clone()), "{averaged} stands for two");
            tensors.insert(averaged, tensor.shallow_clone());
            tensors.insert(format!("model.diffusion_model.{name}"), tensor);
        }
        let autoencoder = released("autoencoder_3d");
        tensors.extend(autoencoder.iter().map(|(n, s)| (format!("first_stage_model.{n}"), small().expand(s, false))));
        let mut found = LvdmCheckpoint::sort(tensors).unwrap();
        assert_eq!((found.unet.len(), found.autoencoder.len()), (names.len(), 122));
        assert!(found.ignored.is_empty());
        let wanted: Vec<_> = names.keys().map(|name| (name.clone(), None)).collect();
        assert_eq!(found.averaged("diffusion_model.", &wanted).unwrap().len(), names.len());
    }
}
