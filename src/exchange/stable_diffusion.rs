//! Stable Diffusion → a run: the image network gains temporal layers that start as the identity, the image autoencoder
//! and the text encoder travel with it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::{
    Carried, Part, betas::schedule, carried_checkpoint, latent_tensors, mistake, new_run, open_weights, part_weights,
    scheduler::scheduler, tokenizer, warn_of_infinities, warn_of_unused_rows, with_prefix, write_run,
};
use crate::{
    atomic_file::write_atomically,
    checkpoint::Progress,
    diffusion::ScheduleConfig,
    experiment::{DiffusionExperiment, TextConditioning},
    file_format::read_json,
    generate::{self, AUTOENCODER_FILE, TEXT_ENCODER_FILE},
    models::{
        ClipText, ClipTextConfig, ImageAutoencoder, ImageAutoencoderConfig, InferredUNet, LatentMoments, Shapes,
        TextEncoder, TextEncoderConfig, TokenizerFiles, UNet3d, UNetConfig, UNetPorts, stable_diffusion as settings,
    },
    nn::Parameters,
    weights::{
        WeightsKind,
        lvdm_checkpoint::Tensors,
        stable_diffusion::{Import, Network, has_average, split, take_average},
    },
};

/// What the user says of a Stable Diffusion.
#[derive(Debug, Clone, clap::Args)]
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
    /// Of a folder: the variant of the weights to take where a part has it, such as non_ema or fp16
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Of one original file: take the averaged weights of the U-Net (`model_ema.*`), not the raw ones
    #[arg(long)]
    pub ema: bool,
    /// Leave out tensors whose names begin so (may be given several times)
    #[arg(long, value_name = "PREFIX")]
    pub ignore: Vec<String>,
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
    let found = if path.is_dir() { folder(&pipeline_folder(path)?, told)? } else { file(path, told)? };
    let Found { unet: (unet, [inputs, outputs], tensors), scale, .. } = found;
    let (autoencoder, text) = (found.autoencoder, found.text_encoder);
    ensure!(
        inputs == autoencoder.0.latent_channels && outputs == inputs,
        "the U-Net maps {inputs} channels to {outputs}, latents have {}: only a network from latents to latents becomes \
         a video network",
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
        |part: &'static str, network: Network, parameters: &Parameters, tensors: &Tensors| -> Result<Tensors> {
            let names = network.import(tensors, parameters).context(part)?;
            let own: Tensors = parameters.named().into_iter().collect();
            warn_of_infinities(part, &own);
            imported.push(ImportedNetwork {
                part: Part { name: part, tensors: own.len(), parameters: parameters.count() },
                names,
            });
            Ok(with_prefix("model", own).collect())
        };
    let declared = || Parameters::new(Device::Cpu, 0);
    let ports = UNetPorts { inputs, outputs, temporal_length: told.frames, classes: None };
    let parameters = declared();
    UNet3d::new(&parameters.root(), &unet, &ports);
    let network = Network::UNet { blocks_per_level: unet.blocks_per_level as usize };
    let model = take("U-Net", network, &parameters, &tensors)?;
    drop(tensors);

    let parameters = declared();
    ImageAutoencoder::new(&parameters.root(), &autoencoder.0);
    let network = Network::Autoencoder { levels: autoencoder.0.widths.len() };
    let mut frames = take("image autoencoder", network, &parameters, &autoencoder.1)?;
    frames.extend(latent_tensors(scale, LatentMoments::STABLE_DIFFUSION.shift));

    let parameters = declared();
    ClipText::new(&parameters.root(), &text.0);
    let texts = take("text encoder", Network::TextEncoder, &parameters, &text.1)?;
    let text = TextEncoderConfig { text_encoder: text.0, tokenizer: Some(found.tokenizer) };
    let encoder = TextEncoder::new(&text, &parameters.named().into_iter().collect(), Device::Cpu)?;
    let [rows, tokens] = encoder.vocabulary();
    warn_of_unused_rows(rows, tokens);

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

/// The folder of diffusers that a path means: itself, or the one snapshot of a hub's cache.
///
/// # Errors
/// [`crate::experiment::Mistake`]: several snapshots; a folder of something else, named.
fn pipeline_folder(path: &Path) -> Result<PathBuf> {
    let name = path.display();
    let snapshots = path.join("snapshots");
    if !snapshots.is_dir() {
        let kind = WeightsKind::of_folder(path)?;
        supported(&kind, path).or_else(|error| {
            // a part of a pipeline that lies beside the others
            match path.canonicalize()?.parent() {
                Some(whole) if whole.join("model_index.json").is_file() || whole.join("unet/config.json").is_file() => {
                    mistake(format!("{error:#}. It is a part of {}: give that folder", whole.display()))
                }
                _ => Err(error),
            }
        })?;
        return Ok(path.to_path_buf());
    }
    let mut found: Vec<PathBuf> = fs::read_dir(&snapshots)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    found.retain(|snapshot| snapshot.is_dir());
    found.sort();
    match found.as_slice() {
        [] => mistake(format!("{name} is a hub's cache without a snapshot: nothing was downloaded")),
        [one] => {
            tracing::info!("{name} is a hub's cache: its snapshot {} is taken", one.display());
            pipeline_folder(one)
        }
        several => {
            let main = fs::read_to_string(path.join("refs/main")).unwrap_or_default();
            let shown = |snapshot: &PathBuf| {
                let newest = !main.is_empty() && snapshot.ends_with(main.trim());
                format!("{}{}", snapshot.display(), if newest { " (main)" } else { "" })
            };
            let several: Vec<String> = several.iter().map(shown).collect();
            mistake(format!("{name} is a hub's cache with several snapshots; give one: {}", several.join(", ")))
        }
    }
}

/// # Errors
/// What it is, where that is known and no Stable Diffusion 1.x.
fn supported(kind: &WeightsKind, path: &Path) -> Result<()> {
    if matches!(kind, WeightsKind::StableDiffusion1(_) | WeightsKind::Unknown) {
        return Ok(());
    }
    bail!("{} is {kind}; a Stable Diffusion 1.x is wanted, a folder of diffusers or one original file", path.display())
}

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
    if told.ema {
        return mistake("--ema is for one original file; of a folder, --variant names the weights to take".to_string());
    }
    if let Some(variant) = &told.variant {
        part_weights::check_variant(path, &["unet", "vae", "text_encoder"], variant)?;
    }
    let mut unmet: BTreeSet<&String> = told.ignore.iter().collect();
    let mut part = |name: &str| -> Result<(Value, Tensors)> {
        let folder = path.join(name);
        let config = folder.join("config.json");
        if !config.is_file() {
            return mistake(format!(
                "{} is no folder of diffusers with a Stable Diffusion: there is no {name}/config.json{}",
                path.display(),
                what_lies_there(path)
            ));
        }
        let mut tensors = part_weights::read(&folder, told.variant.as_deref())?;
        let unfused = tensors.keys().any(|name| name.contains(".base_layer."));
        ensure!(!unfused, "{} is {}", folder.display(), WeightsKind::UnfusedLora);
        for prefix in &told.ignore {
            let before = tensors.len();
            tensors.retain(|name, _| !name.starts_with(prefix));
            if tensors.len() < before {
                unmet.remove(prefix);
                tracing::info!("{name}: {} names that begin with `{prefix}` are ignored", before - tensors.len());
            }
        }
        Ok((read_json(&config)?, tensors))
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
    if let Some(prefix) = unmet.first() {
        return mistake(format!("--ignore {prefix}: no tensor in {} is called so", path.display()));
    }
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

/// Models in a folder that is none: one of them may be what is meant.
fn what_lies_there(folder: &Path) -> String {
    let is_weights = |path: &Path| {
        let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        ["safetensors", "ckpt", "pt", "pth", "bin"].contains(&ending.as_str())
    };
    let entries: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    let is_model = |path: &&PathBuf| path.join("unet/config.json").is_file() || path.join("snapshots").is_dir();
    match entries.iter().filter(is_model).min().or(entries.iter().filter(|path| is_weights(path)).min()) {
        Some(other) => format!(" (if {} is meant, give that)", other.display()),
        None => String::new(),
    }
}

/// One original file.
fn file(path: &Path, told: &StableDiffusionTold) -> Result<Found> {
    if told.variant.is_some() {
        return mistake("--variant is for a folder of diffusers, whose weights have several files".to_string());
    }
    let opened = open_weights(path, &told.ignore)?;
    let kind = WeightsKind::of_shapes(opened.shapes());
    supported(&kind, path)?;
    if kind == WeightsKind::Unknown {
        let names: Vec<String> = opened.shapes().keys().take(3).map(|name| format!("`{name}`")).collect();
        let (count, names) = (opened.shapes().len(), names.join(", "));
        bail!("{} is no Stable Diffusion: its {count} tensors are called {names} …", path.display());
    }
    let Some(files) = &told.tokenizer else {
        return mistake(format!(
            "{}: such a file has no tokenizer; give --tokenizer FOLDER, with vocab.json and merges.txt",
            path.display()
        ));
    };
    let tokenizer = tokenizer(files)?;
    let context = || path.display().to_string();
    let [mut unet, autoencoder, text_encoder] = split(opened.read()?);
    if told.ema {
        match take_average(&mut unet).with_context(context)? {
            0 => return mistake(format!("--ema: {} holds no averaged weights (`model_ema.*`)", path.display())),
            count => tracing::info!("{count} tensors of the U-Net are the averaged ones (EMA)"),
        }
    } else if has_average(&unet) {
        tracing::info!("the file also holds averaged weights (EMA): the raw ones are taken; --ema takes the averages");
    }
    for (part, name) in [(&unet, "U-Net"), (&autoencoder, "image autoencoder"), (&text_encoder, "text encoder")] {
        ensure!(!part.is_empty(), "{} holds no {name} of a Stable Diffusion", path.display());
    }
    ensure!(
        autoencoder.keys().any(|name| name.contains(".encoder.")),
        "{} holds the decoder of its image autoencoder alone: the encoder is missing",
        path.display()
    );
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
