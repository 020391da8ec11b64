//! Each kind of released checkpoint becomes a run, from which sampling and training continue.

use std::fs;

use lvdm::{
    autoencoder_loss::{CodecLossConfig, DiscriminatorConfig},
    checkpoint::Checkpoint,
    codecs::{ImageAutoencoder, ImageAutoencoderConfig},
    diffusion::{FrameConditioning, ScheduleConfig},
    experiment::{AutoencoderExperiment, DiffusionExperiment},
    networks::{AttentionKind, UNetConfig},
    run::open_latent_space,
    safetensors::{read_safetensors, write_safetensors_atomically},
    text::{ClipText, ClipTextConfig},
};
use tch::{Device, Kind, Tensor};

use crate::{
    MASKED, SHORT, Tensors, autoencoder, beside,
    common::{pickle::write_checkpoint, run_in, succeed_in, write_packed},
    diffusion, import, latest, network, same, small_autoencoder, small_unet, under, workplace,
};

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
        let CodecLossConfig::Lvdm(loss) = &experiment.loss else { panic!("{:?}", experiment.loss) };
        assert_eq!(loss.discriminator, DiscriminatorConfig { channels: 8, layers: 2 });

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
