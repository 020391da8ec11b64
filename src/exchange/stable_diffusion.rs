//! Stable Diffusion → a run: the image network gains temporal layers that start as the identity, the image autoencoder
//! and the text encoder travel with it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::value_parser;
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::{
    Carried, MOST_FRAMES, MOST_PIXELS, MOST_PLACES, NewRun, Part,
    betas::schedule,
    carried_checkpoint, imported_from, latent_tensors, mistake, open_weights, part_weights,
    replacement::{Replacement, Replacements},
    scheduler::scheduler,
    tokenizer, warn_of_infinities, warn_of_unused_rows, with_prefix, write_run,
};
use crate::{
    atomic_file::write_atomically,
    checkpoint::Progress,
    codecs::{CodecSettings, ImageAutoencoder, ImageAutoencoderConfig, Normalization},
    diffusion::{Predict, ScheduleConfig},
    exchange::{InferredUNet, Shapes, diffusers_config as settings},
    experiment::{DiffusionExperiment, TextConditioning},
    file_format::read_json,
    networks::{Ports, UNet3d, UNetConfig},
    nn::Parameters,
    run::TEXT_ENCODER_TASK,
    run_files::{AUTOENCODER_FILE, NAMES_FILE, TEXT_ENCODER_FILE},
    text::{ClipText, ClipTextConfig, TextActivation, TextEncoder, TextEncoderConfig, TokenizerFiles},
    text_file::{read_text, trim},
    weights::{
        Layout, WeightsKind, is_second,
        lvdm_checkpoint::{Tensors, scalar},
        open_clip,
        stable_diffusion::{Import, Network, has_average, split, take_average, unet_in_place},
    },
};

/// What the user says of a Stable Diffusion.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct StableDiffusionOptions {
    /// Frames in the clips that the network is to generate
    #[arg(long, default_value_t = 16, value_parser = value_parser!(i64).range(1..=MOST_FRAMES))]
    pub frames: i64,
    /// Height and width of these clips in pixels
    #[arg(long, default_value_t = 256, value_parser = value_parser!(i64).range(1..=MOST_PIXELS))]
    pub resolution: i64,
    /// Folder of the tokenizer (vocab.json and merges.txt, or tokenizer.json), for an original file, which has none
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// Attention heads of the U-Net in an original file. In Stable Diffusion 2.x wider levels have more heads, and this is
    /// the number in the first level [default: 8; for Stable Diffusion 2.x one for each 64 channels]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_PLACES))]
    pub heads: Option<i64>,
    /// What the U-Net predicts, where no scheduler_config.json says so: for an original file, and for --unet. Needed for
    /// Stable Diffusion 2.x, of which both kinds were released [default: noise]
    #[arg(long, value_parser = ["noise", "velocity"])]
    pub predict: Option<String>,
    /// Groups in all group norms of an original file [default: 32]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_PLACES))]
    pub norm_groups: Option<i64>,
    /// Attention heads of the text encoder in an original file [default: one for each 64 channels]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_PLACES))]
    pub text_heads: Option<i64>,
    /// Variant of the weights in a folder of diffusers, such as non_ema or fp16; parts without it are taken as they are
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Take the moving average of the U-Net's weights (`model_ema.*`) from an original file that has both
    #[arg(long)]
    pub ema: bool,
    /// Leave out tensors whose names begin with PREFIX; may be given several times
    #[arg(long, value_name = "PREFIX")]
    pub ignore: Vec<String>,
    /// Networks that come from elsewhere.
    #[command(flatten)]
    pub replaced: Replacements,
}

impl StableDiffusionOptions {
    fn predicted(&self) -> Option<Predict> {
        self.predict.as_deref().map(|word| if word == "velocity" { Predict::Velocity } else { Predict::Noise })
    }
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
    schedule: (ScheduleConfig, Predict),
    tokenizer: TokenizerFiles,
}

/// Turns a Stable Diffusion 1.x or 2.x, a folder of diffusers or one original file, into a run.
///
/// # Errors
/// [`crate::experiment::UserError`] for what the user said; else names what is missing, unknown, of another shape, or a
/// setting that our networks have no counterpart for.
pub fn import_stable_diffusion(
    path: &Path,
    options: &StableDiffusionOptions,
    run: &Path,
) -> Result<Vec<ImportedNetwork>> {
    if !path.exists() {
        return mistake(format!("there is no {}", path.display()));
    }
    let new = NewRun::begin(run)?;
    let found = if path.is_dir() { folder(&pipeline_folder(path)?, options)? } else { file(path, options)? };
    let found = replace(found, options)?;
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
    let latent = autoencoder.0.latent_shape(options.frames, options.resolution, options.resolution);
    let halvings = unet.multipliers.len() as u32 - 1;
    match latent {
        Ok([_, frames, h, _]) if frames >= 1 && h % (1 << halvings) == 0 => {}
        _ => {
            let (frames, side) = (options.frames, options.resolution);
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
            let own: Tensors = parameters.named().into_iter().collect();
            warn_of_infinities(part, &own);
            imported.push(ImportedNetwork {
                part: Part { name: part, tensors: own.len(), parameters: parameters.count() },
                names,
            });
            Ok(with_prefix("model", own).collect())
        };
    let declared = || Parameters::unfilled(Device::Cpu);
    let ports = Ports { outputs, text: unet.text_width(), ..Ports::of([inputs, options.frames, 1, 1]) };
    let parameters = declared();
    UNet3d::new(&parameters.root(), &unet, &ports);
    let network = Network::UNet { blocks_per_level: unet.blocks_per_level as usize };
    let model = take("U-Net", network, &parameters, tensors)?;

    let parameters = declared();
    ImageAutoencoder::new(&parameters.root(), &autoencoder.0);
    let network = Network::Autoencoder { levels: autoencoder.0.widths.len() };
    let mut frames = take("image autoencoder", network, &parameters, autoencoder.1)?;
    frames.extend(latent_tensors(scale, Normalization::STABLE_DIFFUSION.shift));

    let parameters = declared();
    ClipText::new(&parameters.root(), &text.0);
    let texts = take("text encoder", Network::TextEncoder, &parameters, text.1)?;
    let text = TextEncoderConfig { text_encoder: text.0, tokenizer: Some(found.tokenizer) };
    let encoder = TextEncoder::new(&text, parameters.named().into_iter().collect(), Device::Cpu)?;
    let [rows, tokens] = encoder.vocabulary();
    warn_of_unused_rows(rows, tokens);

    let mut experiment: DiffusionExperiment = serde_json::from_value(json!({
        "data": {
            "dataset": {"kind": "webvid", "table": "data/webvid/train.csv", "root": "data/webvid/videos"},
            "frames": options.frames,
            "resolution": options.resolution,
        },
        "autoencoder": run.join(AUTOENCODER_FILE),
        "schedule": found.schedule.0,
        "objective": {"predict": found.schedule.1, "loss": "l2"},
        "optimizer": {"kind": "adamw", "learning_rate": 6e-5, "weight_decay": 0.01},
        "trainer": {"steps": 100_000, "batch": 1},
    }))?;
    experiment.network = unet.into();
    experiment.text = Some(TextConditioning::of(run));
    let known = serde_json::to_value(Carried { autoencoder: autoencoder.0.into() })?;
    carried_checkpoint("autoencoder", known, frames).write(&run.join(AUTOENCODER_FILE))?;
    let known = serde_json::to_value(text)?;
    carried_checkpoint(TEXT_ENCODER_TASK, known, texts).write(&run.join(TEXT_ENCODER_FILE))?;
    let lists: serde_json::Map<String, Value> = imported
        .iter()
        .map(|network| {
            let Import { loaded, new, ignored } = &network.names;
            (network.part.name.to_string(), json!({"loaded": loaded, "new": new, "unused": ignored}))
        })
        .collect();
    write_atomically(&run.join(NAMES_FILE), |out| Ok(serde_json::to_writer_pretty(out, &lists)?))?;
    let progress = Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
    write_run(run, &imported_from(path), "diffusion", &experiment, progress, model)?;
    new.finish();
    Ok(imported)
}

/// Puts the networks that come from elsewhere in place of the base's. What neither a configuration file nor a shape
/// shows is as in the base.
fn replace(mut found: Found, options: &StableDiffusionOptions) -> Result<Found> {
    let variant = options.variant.as_deref();
    if let Some(path) = &options.replaced.unet {
        let blocks_per_level = found.unet.0.blocks_per_level as usize;
        let new = Replacement::read("--unet", path, Network::UNet { blocks_per_level }, variant)?;
        if let Some(config) = &new.config {
            (found.unet.0, found.unet.1) = settings::unet(config).context("--unet: config.json")?;
        }
        found.schedule = objective_of(path, &new, found.schedule, options)?;
        found.unet.2 = new.tensors;
    }
    if let Some(path) = &options.replaced.vae {
        let (config, scale, tensors) = image_autoencoder(path, &found.autoencoder.0, variant)?;
        found.autoencoder = (config, tensors);
        found.scale = scale.unwrap_or(found.scale);
    }
    if let Some(path) = &options.replaced.text_encoder {
        let new = Replacement::read("--text-encoder", path, Network::TextEncoder, variant)?;
        let tensors = Shapes::from(&new.under_our_names(Network::TextEncoder));
        match (&new.config, ClipTextConfig::from_shapes(&tensors, options.text_heads)) {
            (Some(config), _) => {
                found.text_encoder.0 = settings::text_encoder(config).context("--text-encoder: config.json")?;
            }
            (None, Ok(clip)) => {
                let base = &found.text_encoder.0;
                let activation = match new.is_second {
                    true => TextActivation::Gelu,
                    false if clip.width == base.width => base.activation,
                    false => clip.activation,
                };
                found.text_encoder.0 = ClipTextConfig { activation, ..clip };
            }
            (None, Err(_)) => {}
        }
        found.text_encoder.1 = new.tensors;
    }
    Ok(found)
}

/// The image autoencoder that `--vae` names: its settings, the factor of its latents where its configuration file says it,
/// and its tensors. What neither a configuration file nor a shape shows is as in `base`.
///
/// # Errors
/// As [`Replacement::read`]; settings that our network has no counterpart for.
pub(super) fn image_autoencoder(
    path: &Path,
    base: &ImageAutoencoderConfig,
    variant: Option<&str>,
) -> Result<(ImageAutoencoderConfig, Option<f64>, Tensors)> {
    let network = Network::Autoencoder { levels: base.widths.len() };
    let new = Replacement::read("--vae", path, network, variant)?;
    let inferred = ImageAutoencoderConfig::from_shapes(&Shapes::from(&new.under_our_names(network)));
    let (config, scale) = match (&new.config, inferred) {
        (Some(config), _) => (
            settings::autoencoder(config).context("--vae: config.json")?,
            Some(latent_scale(config).context("--vae: config.json")?),
        ),
        (None, Ok(image)) => (ImageAutoencoderConfig { norm_groups: base.norm_groups, ..image }, None),
        (None, Err(_)) => (base.clone(), None),
    };
    Ok((config, scale, new.tensors))
}

/// What a U-Net from elsewhere was trained on: as the scheduler's file beside it says, or else `--predict` and the β in its
/// file. Where nothing says it, it predicts noise, by the base's schedule, unless it or the base is of a kind that may
/// predict something else.
///
/// # Errors
/// [`crate::experiment::UserError`]: what the network predicts is not given, or given twice.
fn objective_of(
    path: &Path,
    new: &Replacement,
    (schedule, predict): (ScheduleConfig, Predict),
    options: &StableDiffusionOptions,
) -> Result<(ScheduleConfig, Predict)> {
    if let Some(file) = &new.scheduler {
        if options.predict.is_some() {
            return mistake(format!("--predict: {} says what the U-Net predicts", file.display()));
        }
        return scheduler(file).context("--unet");
    }
    if options.predict.is_none() && (new.is_second || predict != Predict::Noise) {
        return mistake(format!(
            "--unet {}: no scheduler_config.json beside it says what this U-Net predicts; give --predict noise or \
             --predict velocity",
            path.display()
        ));
    }
    let of_file = schedule_of(&new.tensors).context("--unet")?;
    Ok((of_file.unwrap_or(schedule), options.predicted().unwrap_or(Predict::Noise)))
}

/// The schedule that the β in a file follow, where there are some.
fn schedule_of(tensors: &Tensors) -> Result<Option<ScheduleConfig>> {
    let Some(betas) = tensors.get("betas") else { return Ok(None) };
    let betas = Vec::<f64>::try_from(betas.to_kind(Kind::Double).flatten(0, -1))?;
    schedule(Some(&betas), true).map(Some)
}

/// The factor of an autoencoder's latents, by its configuration file.
fn latent_scale(config: &Value) -> Result<f64> {
    for key in ["shift_factor", "latents_mean", "latents_std"] {
        ensure!(config[key].is_null(), "{key} = {} is not supported", config[key]);
    }
    match &config["scaling_factor"] {
        Value::Null => Ok(Normalization::STABLE_DIFFUSION.scale),
        scale => scale.as_f64().filter(|scale| *scale > 0.0).with_context(|| format!("scaling_factor = {scale}")),
    }
}

/// The folder of diffusers that a path means: itself, or the one snapshot of a hub's cache.
///
/// # Errors
/// [`crate::experiment::UserError`]: several snapshots; a folder of something else, named.
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
            let main = read_text(&path.join("refs/main")).unwrap_or_default();
            let shown = |snapshot: &PathBuf| {
                let newest = !main.is_empty() && snapshot.ends_with(trim(&main));
                format!("{}{}", snapshot.display(), if newest { " (main)" } else { "" })
            };
            let several: Vec<String> = several.iter().map(shown).collect();
            mistake(format!("{name} is a hub's cache with several snapshots; give one: {}", several.join(", ")))
        }
    }
}

/// # Errors
/// What it is, where that is known and no Stable Diffusion 1.x or 2.x.
fn supported(kind: &WeightsKind, path: &Path) -> Result<()> {
    use WeightsKind as Kind;
    if matches!(kind, Kind::StableDiffusion1(_) | Kind::StableDiffusion2(_) | Kind::Unknown) {
        return Ok(());
    }
    bail!(
        "{} is {kind}; a Stable Diffusion 1.x or 2.x is wanted, a folder of diffusers or one original file",
        path.display()
    )
}

/// A folder of diffusers.
fn folder(path: &Path, options: &StableDiffusionOptions) -> Result<Found> {
    for (option, given) in [
        ("--heads", options.heads.is_some()),
        ("--norm-groups", options.norm_groups.is_some()),
        ("--text-heads", options.text_heads.is_some()),
        ("--predict", options.predict.is_some() && options.replaced.unet.is_none()),
    ] {
        if given {
            return mistake(format!(
                "{option}: the config.json and scheduler_config.json of {} tell it",
                path.display()
            ));
        }
    }
    if options.ema {
        return mistake("--ema is for one original file; of a folder, --variant names the weights to take".to_string());
    }
    if let Some(variant) = &options.variant {
        part_weights::check_variant(path, &["unet", "vae", "text_encoder"], variant)?;
    }
    let mut unmet: BTreeSet<&String> = options.ignore.iter().collect();
    let mut part = |name: &str| -> Result<(Value, Tensors)> {
        let folder = path.join(name);
        let config = folder.join("config.json");
        let replaced = match name {
            "unet" => options.replaced.unet.is_some(),
            "vae" => options.replaced.vae.is_some(),
            "text_encoder" => options.replaced.text_encoder.is_some(),
            _ => false,
        };
        if replaced {
            let config = if config.is_file() { read_json(&config)? } else { json!({}) };
            return Ok((config, Tensors::new()));
        }
        if !config.is_file() {
            return mistake(format!(
                "{} is no folder of diffusers with a Stable Diffusion: there is no {name}/config.json{}",
                path.display(),
                what_lies_there(path)
            ));
        }
        let mut tensors = part_weights::read(&folder, options.variant.as_deref())?;
        let unfused = tensors.keys().any(|name| name.contains(".base_layer."));
        ensure!(!unfused, "{} is {}", folder.display(), WeightsKind::UnfusedLora);
        for prefix in &options.ignore {
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
    let scale = latent_scale(&config).context("vae/config.json")?;
    let autoencoder = settings::autoencoder(&config).context("vae/config.json")?;
    let (config, texts) = part("text_encoder")?;
    let text_encoder = settings::text_encoder(&config).context("text_encoder/config.json")?;
    if let Some(prefix) = unmet.first() {
        return mistake(format!("--ignore {prefix}: the name of no tensor in {} begins so", path.display()));
    }
    let files = options.tokenizer.clone().unwrap_or_else(|| path.join("tokenizer"));
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
fn file(path: &Path, options: &StableDiffusionOptions) -> Result<Found> {
    if options.variant.is_some() {
        return mistake("--variant is for a folder of diffusers, whose weights have several files".to_string());
    }
    let opened = open_weights(path, &options.ignore)?;
    let kind = WeightsKind::of_shapes(opened.shapes());
    let whole = options.replaced.vae.is_none() || options.replaced.text_encoder.is_none();
    if whole || !matches!(kind, WeightsKind::UNet(Layout::Original)) {
        supported(&kind, path)?;
    }
    if kind == WeightsKind::Unknown {
        let names: Vec<String> = opened.shapes().keys().take(3).map(|name| format!("`{name}`")).collect();
        let (count, names) = (opened.shapes().len(), names.join(", "));
        bail!("{} is no Stable Diffusion: its {count} tensors are called {names} …", path.display());
    }
    let Some(files) = &options.tokenizer else {
        return mistake(format!(
            "{}: such a file has no tokenizer; give --tokenizer FOLDER, with vocab.json and merges.txt",
            path.display()
        ));
    };
    let tokenizer = tokenizer(files)?;
    let context = || path.display().to_string();
    let is_second = is_second(opened.shapes());
    if is_second && options.predict.is_none() && options.replaced.unet.is_none() {
        return mistake(format!(
            "{} holds the U-Net of a Stable Diffusion 2.x: some of them predict noise (those made for 512x512) and some \
             velocity (768x768); give --predict noise or --predict velocity",
            path.display()
        ));
    }
    let predict = options.predicted().unwrap_or(Predict::Noise);
    let tensors = opened.read()?;
    let is_bare = kind == WeightsKind::UNet(Layout::Original);
    let [mut unet, mut autoencoder, mut text_encoder] = split(if is_bare { unet_in_place(tensors) } else { tensors });
    let is_open = open_clip::is_open_clip(&text_encoder);
    if is_open {
        text_encoder = open_clip::as_clip(text_encoder).with_context(context)?;
    }
    if options.ema {
        match take_average(&mut unet).with_context(context)? {
            0 => return mistake(format!("--ema: {} holds no averaged weights (`model_ema.*`)", path.display())),
            count => tracing::info!("{count} tensors of the U-Net are the averaged ones (EMA)"),
        }
    } else if has_average(&unet) {
        tracing::info!("the file also holds averaged weights (EMA): the raw ones are taken; --ema takes the averages");
    }
    let Replacements { vae, text_encoder: text, .. } = &options.replaced;
    for (part, name, replaced, hint) in [
        (&unet, "U-Net", false, ""),
        (&autoencoder, "image autoencoder", vae.is_some(), ": give one with --vae"),
        (&text_encoder, "text encoder", text.is_some(), ": give one with --text-encoder"),
    ] {
        ensure!(replaced || !part.is_empty(), "{} holds no {name} of a Stable Diffusion{hint}", path.display());
    }
    ensure!(
        vae.is_some() || autoencoder.keys().any(|name| name.contains(".encoder.")),
        "{} holds the decoder of its image autoencoder alone: the encoder is missing",
        path.display()
    );
    let shapes = |network: Network, tensors: &Tensors| Shapes::from(&network.own(tensors));
    let inferred =
        InferredUNet::from_shapes(&shapes(Network::UNet { blocks_per_level: 0 }, &unet)).with_context(context)?;
    let norm_groups = options.norm_groups.unwrap_or(32);
    let deepest = inferred.config.multipliers.last().map_or(0, |multiplier| multiplier * inferred.config.channels);
    let head_width = is_second.then(|| options.heads.map_or(64, |heads| inferred.config.channels / heads));
    if head_width == Some(0) || options.heads.is_some_and(|heads| heads < 1) {
        let (heads, channels) = (options.heads.unwrap_or_default(), inferred.config.channels);
        return mistake(format!("--heads {heads}: the first level of the U-Net has {channels} channels"));
    }
    let heads = match head_width {
        Some(head) => deepest / head,
        None => options.heads.unwrap_or(8),
    };
    let unet_config = UNetConfig {
        heads,
        head_width,
        norm_groups,
        norm_per_frame: true,
        temporal: true,
        relative_position: true,
        ..inferred.config
    };
    let image = match vae {
        Some(_) => ImageAutoencoderConfig::default(),
        None => ImageAutoencoderConfig::from_shapes(&shapes(Network::Autoencoder { levels: 0 }, &autoencoder))
            .with_context(context)?,
    };
    let image = ImageAutoencoderConfig { norm_groups, ..image };
    let clip = match text {
        Some(_) => ClipTextConfig::default(),
        None => ClipTextConfig::from_shapes(&shapes(Network::TextEncoder, &text_encoder), options.text_heads)
            .with_context(context)?,
    };
    let is_open = is_open && text.is_none();
    let clip = ClipTextConfig { activation: if is_open { TextActivation::Gelu } else { clip.activation }, ..clip };
    let image_fits = if vae.is_some() { Ok(()) } else { image.validate() };
    for checked in [unet_config.validate(), image_fits, clip.validate()] {
        if let Err(error) = checked {
            return mistake(format!("--heads, --norm-groups or --text-heads do not fit the file: {error:#}"));
        }
    }
    let of_file = schedule_of(&unet).with_context(context)?;
    let schedule = of_file.map_or_else(|| schedule(None, true), Ok)?;
    let scale =
        unet.get("scale_factor").map(|scale| scalar("scale_factor", scale)).transpose().with_context(context)?;
    let Replacements { unet: denoiser, vae, text_encoder: text } = &options.replaced;
    // what comes from elsewhere is not held twice
    for (part, replaced) in [(&mut unet, denoiser), (&mut autoencoder, vae), (&mut text_encoder, text)] {
        if replaced.is_some() {
            part.clear();
        }
    }
    Ok(Found {
        scale: scale.unwrap_or(Normalization::STABLE_DIFFUSION.scale),
        unet: (unet_config, [inferred.inputs, inferred.outputs], unet),
        autoencoder: (image, autoencoder),
        text_encoder: (clip, text_encoder),
        schedule: (schedule, predict),
        tokenizer,
    })
}
