//! A released TATS: the autoencoder's own checkpoint, and a transformer's, which contains it.

use lvdm::{
    autoencoder_loss::{CodecLossConfig, CodecLossSettings, DiscriminatorConfig, TatsLossConfig},
    autoregression::Form,
    checkpoint::Checkpoint,
    codecs::{CodebookConfig, CodecSettings, VqganConfig, VqganNorm},
    data::write_video,
    experiment::{AutoencoderExperiment, ClassList, TransformerExperiment},
    networks::{Gpt, GptConfig, Sequences},
    nn::Parameters,
    run_files::AUTOENCODER_FILE,
};
use tch::{Device, Kind, Tensor};

use crate::{
    Tensors, beside,
    common::{moving_clips, noise, pickle::write_checkpoint, run_in, same, succeed_in},
    latest, network,
};

const FACTORS: [i64; 3] = [2, 4, 4];

fn small(norm: VqganNorm) -> VqganConfig {
    let codebook = CodebookConfig { codes: 24, ..CodebookConfig::default() };
    let channels = if norm == VqganNorm::Group { 16 } else { 4 };
    VqganConfig { channels, factors: FACTORS, latent_channels: 8, norm, codebook }
}

fn discriminators() -> DiscriminatorConfig {
    DiscriminatorConfig { channels: 4, layers: 2 }
}

/// Everything of an autoencoder's checkpoint, under a prefix.
fn released(norm: VqganNorm, prefix: &str) -> Tensors {
    let mut tensors = network(prefix, 5, &|parameters| drop(small(norm).build(&parameters.root())));
    // released names have no second ones
    tensors.retain(|name, _| !name.ends_with(".weight") || !aliases(norm, prefix).contains(name));
    tensors.insert(format!("{prefix}codebook.N"), noise(9, &[24]).abs());
    let loss = TatsLossConfig { discriminator: discriminators(), ..TatsLossConfig::default() };
    tensors.extend(network(prefix, 6, &|parameters| drop(loss.discriminators(&parameters.root()))));
    tensors.insert(format!("{prefix}perceptual_model.lin0.model.1.weight"), noise(10, &[1, 4, 1, 1]));
    tensors
}

fn aliases(norm: VqganNorm, prefix: &str) -> Vec<String> {
    let parameters = Parameters::unfilled(tch::Device::Cpu);
    drop(small(norm).build(&parameters.root()));
    parameters.aliases().into_iter().map(|(alias, _)| format!("{prefix}{alias}")).collect()
}

/// The tensors below a prefix, without it.
fn below(prefix: &str, tensors: &Tensors) -> Tensors {
    let strip =
        |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_string(), tensor.shallow_clone()));
    tensors.iter().filter_map(strip).collect()
}

/// Each tensor arrives as it was, the settings are read off the file, and the run codes videos and trains on.
#[test]
fn a_released_tats_becomes_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (name, norm, prefix) in [("vqgan", VqganNorm::Batch, ""), ("group", VqganNorm::Group, "")] {
        let given = released(norm, prefix);
        let file = format!("{name}.ckpt");
        write_checkpoint(&at.join(&file), &given, &beside);
        let import = ["import", "tats", &file, "--out", name, "--frames", "4", "--resolution", "16"];
        let said = run_in(at, &import);
        assert!(said.error(2).contains("--factors"), "{}", said.err);
        let said = succeed_in(at, &[&import[..], &["--factors", "2,4,4"]].concat());
        assert!(said.out.contains("perceptual_model.* (1)") && said.out.contains("step 3456"), "{}", said.out);

        let found = latest(&at.join(name));
        let own = below(prefix, &given);
        let of = |tops: &[&str]| -> Tensors {
            let is_of = |name: &String| tops.iter().any(|top| name.starts_with(top));
            own.iter().filter(|(name, _)| is_of(name)).map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
        };
        same(&found.part("model"), &of(&["encoder.", "decoder.", "pre_vq", "post_vq", "codebook."]));
        same(&found.part("discriminator"), &of(&["image_discriminator.", "video_discriminator."]));
        let experiment: AutoencoderExperiment = serde_json::from_value(found.experiment.clone()).unwrap();
        assert_eq!(experiment.autoencoder, small(norm).into());
        let CodecLossConfig::Tats(loss) = &experiment.loss else { panic!("{:?}", experiment.loss) };
        assert_eq!(loss.discriminator, discriminators());

        // vectors that are drawn as often as the codebook's counts say are normalised to 0 and 1
        let (entries, counts) = (&own["codebook.embeddings"], &own["codebook.N"]);
        let often = (counts * 1000.0).round().to_kind(Kind::Int64);
        let drawn = entries.repeat_interleave_self_tensor(&often, 0, None);
        let latent = found.part("latent");
        let normalised = (drawn + latent["shift"].double_value(&[])) * latent["scale"].double_value(&[]);
        let (mean, deviation) = (normalised.mean(None).double_value(&[]), normalised.std(false).double_value(&[]));
        assert!(mean.abs() < 1e-2 && (deviation - 1.0).abs() < 1e-2, "{mean} {deviation}");
    }
    let error = run_in(at, &["export", "vqgan", "--out", "out.safetensors"]).error(2).to_string();
    assert!(error.contains("no place for an autoencoder with a codebook"), "{error}");

    let clips = moving_clips(2, 4, 16);
    std::fs::create_dir(at.join("videos")).unwrap();
    for i in 0..2 {
        write_video(&at.join(format!("videos/{i}.mp4")), &clips.get(i), 8.0).unwrap();
    }
    let few = [
        "trainer.steps=3457",
        "trainer.batch=2",
        "trainer.accumulate=1",
        "loss.perceptual_weight=0",
        "--change-settings",
    ];
    let data = "data.dataset={kind: folder, root: videos}";
    let train = ["train", "autoencoder", "vqgan/experiment.yaml", "--run", "vqgan", data, "trainer.device=cpu"];
    let said = succeed_in(at, &[&train[..], &few].concat());
    assert!(said.out.contains("trained to step 3457"), "{}", said.out);
    // what was imported is not begun anew: the codebook has moved, and not to vectors of the batch
    let before = released(VqganNorm::Batch, "");
    let counts = latest(&at.join("vqgan")).part("model")["codebook.N"].shallow_clone();
    let kept = &before["codebook.N"] * 0.99;
    let gained = (counts - kept).sum(None).double_value(&[]);
    assert!((gained - 0.01 * 2.0 * 2.0 * 16.0).abs() < 1e-3, "{gained}: two clips have 2·4·4 codes each");
}

/// What is missing, unknown or of another network is named.
#[test]
fn what_is_not_tats_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let said = |change: &dyn Fn(&mut Tensors)| {
        let mut given = released(VqganNorm::Batch, "");
        change(&mut given);
        write_checkpoint(&at.join("file.ckpt"), &given, &beside);
        let import = ["import", "tats", "file.ckpt", "--out", "run", "--frames", "4", "--resolution", "16"];
        let said = run_in(at, &[&import[..], &["--factors", "2,4,4"]].concat());
        assert!(!at.join("run").exists(), "a failed import leaves nothing");
        said.error(1).to_string()
    };
    let error = said(&|given| drop(given.insert("text_encoder.weight".into(), noise(1, &[2]))));
    assert!(error.contains("`text_encoder.weight` belongs to no part of TATS"), "{error}");
    let error = said(&|given| drop(given.remove("decoder.conv_last.conv.bias")));
    assert!(error.contains("`decoder.conv_last.conv.bias` is missing"), "{error}");
    let error = said(&|given| given.retain(|name, _| name.contains("discriminator")));
    assert!(error.contains("no checkpoint of TATS"), "{error}");
}

/// A transformer's checkpoint becomes a run that carries its autoencoder and samples as the released code does. Its mask says
/// whether it fills gaps, and its tokens how many classes there are.
#[test]
fn a_released_transformer_becomes_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let codes = small(VqganNorm::Batch).codebook.codes;
    for (name, classes, unmasked) in [("plain", 0, 0), ("classes", 3, 0), ("gaps", 0, 16)] {
        let mut given = released(VqganNorm::Batch, "first_stage_model.");
        let latent_frames = if unmasked > 0 { 3 } else { 2 };
        let length = latent_frames * 16;
        let parameters = Parameters::new(Device::Cpu, 1);
        let config = GptConfig { layers: 2, heads: 2, width: 8, recompute: false };
        let sequences = Sequences { vocabulary: codes + classes, length, unmasked };
        Gpt::new(&parameters.root(), &config, sequences);
        let own: Tensors = parameters.named().into_iter().collect();
        given.extend(own.iter().map(|(name, tensor)| (format!("transformer.{name}"), tensor.shallow_clone())));
        let mask = Tensor::ones([1, 1, length, length], (Kind::Float, Device::Cpu)).tril(0);
        let _ = mask.narrow(3, 0, if unmasked > 0 { 17 } else { 1 }).fill_(1.0);
        for i in 0..2 {
            given.insert(format!("transformer.blocks.{i}.attn.mask"), mask.shallow_clone());
        }
        let file = format!("{name}.ckpt");
        write_checkpoint(&at.join(&file), &given, &beside);
        let import = ["import", "tats", &file, "--out", name, "--resolution", "16", "--factors", "2,4,4"];
        assert!(run_in(at, &import).error(2).contains("--heads"));
        let said = succeed_in(at, &[&import[..], &["--heads", "2"]].concat());
        assert!(said.out.contains("transformer") && said.out.contains("step 3456"), "{}", said.out);
        let found = latest(&at.join(name));
        assert_eq!(found.task, "transformer");
        same(&found.part("model"), &own);
        let experiment: TransformerExperiment = serde_json::from_value(found.experiment.clone()).unwrap();
        assert_eq!((experiment.data.frames, experiment.interpolation), (2 * latent_frames, unmasked > 0));
        assert_eq!((experiment.network.clone(), experiment.sampler.form), (config, Form::Released));
        let known = experiment.labels.as_ref().and_then(|labels| labels.classes.as_ref()).map(ClassList::count);
        assert_eq!(known, (classes > 0).then_some(classes));
        let sample = ["sample", name, "--videos", "2", "--device", "cpu", "--out", "videos.npz", "--top-k", "5"];
        let said = run_in(at, &sample);
        assert_eq!(said.status == 0, unmasked == 0, "{name}: {}", said.err);
        // it carries the autoencoder whose codes they are
        same(&Checkpoint::read(&at.join(name).join(AUTOENCODER_FILE)).unwrap().part("model"), &{
            let stage = below("first_stage_model.", &given);
            let tops = ["encoder.", "decoder.", "pre_vq", "post_vq", "codebook."];
            stage.into_iter().filter(|(name, _)| tops.iter().any(|top| name.starts_with(top))).collect()
        });
    }
}
