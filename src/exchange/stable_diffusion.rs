//! Stable Diffusion → a run: the image network gains temporal layers that start as the identity, the image autoencoder
//! and the text encoder travel with it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::{
    Carried, Part, carried_checkpoint, import::schedule, latent_tensors, mistake, new_run, tokenizer, with_prefix,
    write_run,
};
use crate::{
    atomic_file::write_atomically,
    checkpoint::Progress,
    diffusion::{NoiseSchedule, ScheduleConfig, ScheduleKind},
    experiment::{DiffusionExperiment, TextConditioning},
    generate::{self, AUTOENCODER_FILE, TEXT_ENCODER_FILE},
    models::{
        ClipText, ClipTextConfig, ImageAutoencoder, ImageAutoencoderConfig, InferredUNet, LatentMoments, Shapes,
        TextEncoder, TextEncoderConfig, TokenizerFiles, UNet3d, UNetConfig, UNetPorts, stable_diffusion as settings,
    },
    nn::Parameters,
    safetensors::read_safetensors,
    weights::{
        lvdm_checkpoint::Tensors,
        read_state_dict,
        stable_diffusion::{Import, Network, split},
    },
};

/// What the user says of a Stable Diffusion.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct StableDiffusionTold {
    /// Frames of the clips that it is to make
    #[arg(long, default_value_t = 16)]
    pub frames: i64,
    /// Height and width of the clips
    #[arg(long, default_value_t = 256)]
    pub resolution: i64,
    /// Of one original file: folder of the tokenizer (vocab.json and merges.txt, or tokenizer.json)
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// Of one original file: attention heads of the U-Net [default: 8]
    #[arg(long)]
    pub heads: Option<i64>,
    /// Of one original file: groups of all group norms [default: 32]
    #[arg(long)]
    pub norm_groups: Option<i64>,
    /// Of one original file: attention heads of the text encoder [default: as many as are 64 wide]
    #[arg(long)]
    pub text_heads: Option<i64>,
}

/// A network that was imported, and what became of the names.
pub struct ImportedNetwork {
    /// What was loaded, and how much.
    pub part: Part,
    /// Every name: loaded, new, ignored.
    pub names: Import,
}

/// A Stable Diffusion as it lies on the disk.
struct Found {
    unet: (UNetConfig, [i64; 2], Tensors),
    autoencoder: (ImageAutoencoderConfig, Tensors),
    text_encoder: (ClipTextConfig, Tensors),
    scale: f64,
    schedule: ScheduleConfig,
    tokenizer: TokenizerFiles,
}

/// Turns a Stable Diffusion 1.x, a folder of diffusers or one original file, into a run.
///
/// # Errors
/// [`crate::experiment::Mistake`] for what the user said; else names what is missing, unknown, of another shape, or a
/// setting that our networks have no counterpart for.
pub fn import_stable_diffusion(path: &Path, told: &StableDiffusionTold, run: &Path) -> Result<Vec<ImportedNetwork>> {
    if !path.exists() {
        return mistake(format!("there is no {}", path.display()));
    }
    let _lock = new_run(run)?;
    let found = if path.is_dir() { folder(path, told)? } else { file(path, told)? };
    let Found { unet: (unet, [inputs, outputs], tensors), scale, .. } = found;
    let (autoencoder, text) = (found.autoencoder, found.text_encoder);
    ensure!(
        inputs == autoencoder.0.latent_channels && outputs == inputs,
        "the U-Net maps {inputs} channels to {outputs}, latents have {}: only a network from latents to latents becomes \
         a video network (not one for inpainting)",
        autoencoder.0.latent_channels
    );
    ensure!(
        text.0.width == unet.context_width,
        "the text encoder is {} wide, the U-Net attends to {}",
        text.0.width,
        unet.context_width
    );
    let latent = autoencoder.0.latent_shape(told.frames, told.resolution, told.resolution);
    let halvings = unet.multipliers.len() as u32 - 1;
    match latent {
        Ok([_, frames, h, _]) if frames >= 1 && h % (1 << halvings) == 0 => {}
        _ => {
            let (frames, side) = (told.frames, told.resolution);
            let factor = (1 << halvings) << (autoencoder.0.widths.len() - 1);
            return mistake(format!(
                "--frames {frames} --resolution {side}: the resolution must be a multiple of {factor}"
            ));
        }
    }

    let mut imported = Vec::new();
    let mut take =
        |part: &'static str, network: Network, parameters: &Parameters, tensors: Tensors| -> Result<Tensors> {
            let names = network.import_all(tensors, parameters).context(part)?;
            let own = parameters.named();
            imported.push(ImportedNetwork {
                part: Part { name: part, tensors: own.len(), parameters: parameters.count() },
                names,
            });
            Ok(with_prefix("model", own.into_iter().collect()).collect())
        };
    let declared = || Parameters::unfilled(Device::Cpu);
    let ports = UNetPorts { inputs, outputs, temporal_length: told.frames, classes: None };
    let parameters = declared();
    UNet3d::new(&parameters.root(), &unet, &ports);
    let network = Network::UNet { blocks_per_level: unet.blocks_per_level as usize };
    let model = take("U-Net", network, &parameters, tensors)?;

    let parameters = declared();
    ImageAutoencoder::new(&parameters.root(), &autoencoder.0);
    let network = Network::Autoencoder { levels: autoencoder.0.widths.len() };
    let mut frames = take("image autoencoder", network, &parameters, autoencoder.1)?;
    frames.extend(latent_tensors(scale, LatentMoments::STABLE_DIFFUSION.shift));

    let parameters = declared();
    ClipText::new(&parameters.root(), &text.0);
    let texts = take("text encoder", Network::TextEncoder, &parameters, text.1)?;
    let text = TextEncoderConfig { text_encoder: text.0, tokenizer: Some(found.tokenizer) };
    TextEncoder::new(&text, parameters.named().into_iter().collect(), Device::Cpu)?;

    let mut experiment: DiffusionExperiment = serde_json::from_value(json!({
        "data": {
            "dataset": {"kind": "webvid", "table": "data/webvid/train.csv", "root": "data/webvid/videos"},
            "frames": told.frames,
            "resolution": told.resolution,
        },
        "autoencoder": run.join(AUTOENCODER_FILE),
        "schedule": found.schedule,
        "objective": {"predict": "noise", "loss": "l2"},
        "optimizer": {"kind": "adamw", "learning_rate": 6e-5, "weight_decay": 0.01},
        "trainer": {"steps": 100_000, "batch": 1},
    }))?;
    experiment.unet = unet;
    experiment.text = Some(TextConditioning::of(run));
    let known = serde_json::to_value(Carried { autoencoder: autoencoder.0.into() })?;
    carried_checkpoint("autoencoder", known, frames).write(&run.join(AUTOENCODER_FILE))?;
    let known = serde_json::to_value(text)?;
    carried_checkpoint(generate::TEXT_ENCODER, known, texts).write(&run.join(TEXT_ENCODER_FILE))?;
    let lists: serde_json::Map<String, Value> = imported
        .iter()
        .map(|network| {
            let Import { loaded, new, ignored } = &network.names;
            (network.part.name.to_string(), json!({"loaded": loaded, "new": new, "unused": ignored}))
        })
        .collect();
    write_atomically(&run.join(NAMES_FILE), |out| Ok(serde_json::to_writer_pretty(out, &lists)?))?;
    let progress = Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
    write_run(run, path, "diffusion", &experiment, progress, model)?;
    Ok(imported)
}

/// All names of an import: ours that were loaded, each with the file's; ours that are new; the file's that are unused.
pub const NAMES_FILE: &str = "imported.json";

/// A folder of diffusers.
fn folder(path: &Path, told: &StableDiffusionTold) -> Result<Found> {
    for (option, given) in [
        ("--heads", told.heads.is_some()),
        ("--norm-groups", told.norm_groups.is_some()),
        ("--text-heads", told.text_heads.is_some()),
    ] {
        if given {
            return mistake(format!("{option}: the config.json files of {} tell it", path.display()));
        }
    }
    let part = |name: &str| -> Result<(Value, Tensors)> {
        let folder = path.join(name);
        let config = folder.join("config.json");
        if !config.is_file() {
            return mistake(format!(
                "{} is no folder of diffusers with a Stable Diffusion: there is no {name}/config.json",
                path.display()
            ));
        }
        Ok((read_json(&config)?, weights(&folder)?))
    };
    let (config, tensors) = part("unet")?;
    let unet = settings::unet(&config).context("unet/config.json")?;
    let (config, frames) = part("vae")?;
    let scale = match &config["scaling_factor"] {
        Value::Null => LatentMoments::STABLE_DIFFUSION.scale,
        scale => {
            scale.as_f64().filter(|scale| *scale > 0.0).with_context(|| format!("vae: scaling_factor = {scale}"))?
        }
    };
    for key in ["shift_factor", "latents_mean", "latents_std"] {
        ensure!(config[key].is_null(), "vae/config.json: {key} = {} is not supported", config[key]);
    }
    let autoencoder = settings::autoencoder(&config).context("vae/config.json")?;
    let (config, texts) = part("text_encoder")?;
    let text_encoder = settings::text_encoder(&config).context("text_encoder/config.json")?;
    let files = told.tokenizer.clone().unwrap_or_else(|| path.join("tokenizer"));
    Ok(Found {
        unet: (unet.0, unet.1, tensors),
        autoencoder: (autoencoder, frames),
        text_encoder: (text_encoder, texts),
        scale,
        schedule: scheduler(&path.join("scheduler/scheduler_config.json"))?,
        tokenizer: tokenizer(&files)?,
    })
}

/// The weights of a part, in single or half precision.
fn weights(folder: &Path) -> Result<Tensors> {
    let names = ["diffusion_pytorch_model", "model"]
        .map(|stem| [format!("{stem}.safetensors"), format!("{stem}.fp16.safetensors")]);
    match names.as_flattened().iter().map(|name| folder.join(name)).find(|file| file.is_file()) {
        Some(file) => Ok(read_safetensors(&file)?.0),
        None => bail!("{} holds no weights; sought were {}", folder.display(), names.as_flattened().join(", ")),
    }
}

/// The noise schedule of the training; that of Stable Diffusion 1.x where the folder says nothing.
fn scheduler(path: &Path) -> Result<ScheduleConfig> {
    let mut schedule = schedule(None, true)?;
    if !path.exists() {
        return Ok(schedule);
    }
    let config = read_json(path)?;
    let context = || path.display().to_string();
    let number = |key: &str, default: f64| match &config[key] {
        Value::Null => Ok(default),
        value => value.as_f64().with_context(|| format!("{}: {key} = {value}", context())),
    };
    match config["prediction_type"].as_str() {
        None | Some("epsilon") => {}
        Some(other) => bail!("{}: prediction_type = {other}; only epsilon is supported", context()),
    }
    schedule.kind = match config["beta_schedule"].as_str() {
        None | Some("scaled_linear") => ScheduleKind::ScaledLinear,
        Some("linear") => ScheduleKind::Linear,
        Some(other) => bail!("{}: beta_schedule = {other}; linear and scaled_linear are known", context()),
    };
    schedule.steps = number("num_train_timesteps", schedule.steps as f64)? as i64;
    schedule.beta_start = number("beta_start", schedule.beta_start)?;
    schedule.beta_end = number("beta_end", schedule.beta_end)?;
    NoiseSchedule::new(&schedule).with_context(context)?;
    Ok(schedule)
}

/// One original file.
fn file(path: &Path, told: &StableDiffusionTold) -> Result<Found> {
    let Some(files) = &told.tokenizer else {
        return mistake(format!(
            "{}: such a file has no tokenizer; give --tokenizer FOLDER, with vocab.json and merges.txt",
            path.display()
        ));
    };
    let tokenizer = tokenizer(files)?;
    let tensors = read_state_dict(path)?;
    let context = || path.display().to_string();
    let [unet, autoencoder, text_encoder] = split(tensors);
    for (part, name) in [(&unet, "U-Net"), (&autoencoder, "image autoencoder"), (&text_encoder, "text encoder")] {
        ensure!(!part.is_empty(), "{} holds no {name} of a Stable Diffusion", path.display());
    }
    let shapes = |network: Network, tensors: &Tensors| Shapes::from(&network.own(tensors));
    let inferred =
        InferredUNet::from_shapes(&shapes(Network::UNet { blocks_per_level: 0 }, &unet)).with_context(context)?;
    let norm_groups = told.norm_groups.unwrap_or(32);
    let unet_config = UNetConfig {
        heads: told.heads.unwrap_or(8),
        norm_groups,
        norm_per_frame: true,
        temporal: true,
        relative_position: true,
        ..inferred.config
    };
    let image = ImageAutoencoderConfig::from_shapes(&shapes(Network::Autoencoder { levels: 0 }, &autoencoder));
    let image = ImageAutoencoderConfig { norm_groups, ..image.with_context(context)? };
    let clip = ClipTextConfig::from_shapes(&shapes(Network::TextEncoder, &text_encoder), told.text_heads);
    let clip = clip.with_context(context)?;
    for checked in [unet_config.validate(), image.validate(), clip.validate()] {
        if let Err(error) = checked {
            return mistake(format!("--heads, --norm-groups or --text-heads do not fit the file: {error:#}"));
        }
    }
    let betas = unet.get("betas").map(|betas| Vec::<f64>::try_from(betas.to_kind(Kind::Double))).transpose()?;
    let schedule = schedule(betas.as_deref(), true).with_context(context)?;
    let number = |name: &str| unet.get(name).map(|value| value.double_value(&[]));
    Ok(Found {
        scale: number("scale_factor").unwrap_or(LatentMoments::STABLE_DIFFUSION.scale),
        unet: (unet_config, [inferred.inputs, inferred.outputs], unet),
        autoencoder: (image, autoencoder),
        text_encoder: (clip, text_encoder),
        schedule,
        tokenizer,
    })
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}
