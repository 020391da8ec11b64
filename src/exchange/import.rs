//! A released checkpoint → a run.

use std::{borrow::Cow, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Carried, ConditioningKind, Exported, ImportOptions, Imported, LatentPreset, NewRun, Part, betas::schedule,
    carried_checkpoint, declared::Declared, imported_from, latent_tensors, mistake, open_weights, tokenizer,
    warn_of_unused_rows, with_prefix, write_run,
};
use crate::{
    autoencoder_loss::DiscriminatorConfig,
    checkpoint::Progress,
    codecs::{AutoencoderConfig, CodecConfig, CodecSettings, ImageAutoencoderConfig},
    diffusion::{FrameConditioning, ScheduleConfig},
    exchange::{InferredAutoencoder, InferredUNet, Shapes},
    experiment::{AutoencoderExperiment, DiffusionExperiment, TextConditioning, Trained, UserError},
    networks::AttentionKind,
    run::TEXT_ENCODER_TASK,
    run_files::{AUTOENCODER_FILE, TEXT_ENCODER_FILE},
    text::{ClipTextConfig, TextEncoderConfig, Tokenizer},
    text_file::{read_text, trim},
    weights::{
        WeightsKind,
        lvdm_checkpoint::{
            AVERAGED_UNET, DISCRIMINATOR, FIRST_STAGE, Ignored, LvdmCheckpoint, TEXT_ENCODER, Tensors, UNET,
        },
    },
};

/// Options that must be given, each with its reason.
#[derive(Default)]
struct Asked(Vec<String>);

impl Asked {
    fn or<T: Default>(&mut self, known: Option<T>, question: impl FnOnce() -> String) -> T {
        known.unwrap_or_else(|| {
            self.0.push(question());
            T::default()
        })
    }

    fn finish(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        mistake(format!("the file does not tell all; give also {}", self.0.join("; ")))
    }
}

/// Frames of the clips on which the released autoencoders were trained.
const CLIP_FRAMES: i64 = 16;

/// Turns a released checkpoint into a run.
///
/// # Errors
/// [`UserError`] where an option is missing or does not fit the file; else a file that is damaged, or holds
/// anything that is unknown, or lacks anything.
pub fn import(file: &Path, options: &ImportOptions, run: &Path) -> Result<Imported> {
    let file = &*checkpoint_file(file)?;
    let new = NewRun::begin(run)?;
    for (option, value) in options.counts() {
        if let Some(value) = value.filter(|&value| value < 1) {
            return mistake(format!("{option} must be at least 1, not {value}"));
        }
    }
    let mut found = LvdmCheckpoint::read(open_weights(file, &options.ignore)?)?;
    let exported: Option<Exported> = match found.exported.take() {
        None => None,
        Some(value) => Some(serde_json::from_value(value).with_context(|| {
            format!("{} was not written by `lvdm export` but by another verb of this program", file.display())
        })?),
    };
    let import = Import { file, options, run, exported };
    let context = || file.display().to_string();
    let imported = if found.unet.is_empty() { import.autoencoder(found) } else { import.diffusion(found) };
    let imported = imported.with_context(context)?;
    new.finish();
    Ok(imported)
}

/// The file that a path means: itself, or the weights in a folder that DeepSpeed wrote.
fn checkpoint_file(path: &Path) -> Result<Cow<'_, Path>> {
    if path.is_file() {
        return Ok(path.into());
    }
    const STATES: [&str; 2] = ["mp_rank_00_model_states.pt", "checkpoint/mp_rank_00_model_states.pt"];
    let latest = read_text(&path.join("latest")).unwrap_or_default();
    let folders = [path.to_path_buf(), path.join(trim(&latest))];
    let states = folders.iter().flat_map(|folder| STATES.map(|name| folder.join(name)));
    match states.into_iter().find(|file| file.is_file()) {
        Some(file) => {
            tracing::info!("{} is a folder of DeepSpeed: {} is read", path.display(), file.display());
            Ok(file.into())
        }
        None if path.is_dir() => {
            let advice = match WeightsKind::of_folder(path)? {
                WeightsKind::StableDiffusion1(_) => "; `lvdm import stable-diffusion` reads it",
                _ => "",
            };
            mistake(format!("{} is a folder, not a checkpoint of LVDM{advice}", path.display()))
        }
        None => mistake(format!("there is no checkpoint {}", path.display())),
    }
}

struct Import<'a> {
    file: &'a Path,
    options: &'a ImportOptions,
    run: &'a Path,
    exported: Option<Exported>,
}

impl Import<'_> {
    fn exported_diffusion(&self) -> Option<&DiffusionExperiment> {
        self.exported.as_ref()?.diffusion.as_ref()
    }

    fn exported_first_stage(&self) -> Result<Option<CodecConfig>> {
        let Some(exported) = &self.exported else { return Ok(None) };
        let carried: Carried =
            serde_json::from_value(exported.autoencoder.clone()).context("the exported autoencoder")?;
        Ok(Some(carried.autoencoder))
    }

    /// The autoencoder of a diffusion checkpoint: a video's, or Stable Diffusion's for each frame.
    fn first_stage_config(&self, tensors: &Tensors, asked: &mut Asked) -> Result<CodecConfig> {
        if !tensors.contains_key("encoder.conv_in.weight") {
            return Ok(self.autoencoder_config(tensors, asked)?.into());
        }
        if self.options.temporal_factor.is_some_and(|factor| factor != 1) {
            return mistake("--temporal-factor: an image autoencoder makes a latent frame of every frame".to_string());
        }
        let mut config = ImageAutoencoderConfig::from_shapes(&Shapes::from(tensors)).context("image autoencoder")?;
        let exported = match self.exported_first_stage()? {
            Some(CodecConfig::ImageAutoencoder(image)) => Some(image.norm_groups),
            _ => None,
        };
        let released = Some(config.norm_groups).filter(|_| config == ImageAutoencoderConfig::default());
        let groups = self.options.norm_groups.or(exported).or(released);
        let is_known = groups.is_some();
        config.norm_groups =
            asked.or(groups, || "--norm-groups N (of the image autoencoder; they leave no trace)".to_string());
        if is_known && let Err(error) = config.validate() {
            return mistake(format!("{error:#}"));
        }
        Ok(config.into())
    }

    /// Scale and shift of the latents, given by the user or by the file.
    fn latents(&self, found: &LvdmCheckpoint, asked: &mut Asked) -> Result<(f64, f64)> {
        let preset = self.options.latents.map(LatentPreset::constants);
        let given = [self.options.scale.or(preset.map(|p| p.0)), self.options.shift.or(preset.map(|p| p.1))];
        for (name, given, own) in [("scale", given[0], found.scale), ("shift", given[1], found.shift)] {
            if let (Some(given), Some(own)) = (given, own)
                && (given - own).abs() > 1e-6 * own.abs()
            {
                return mistake(format!("the file says {name} = {own}, the options say {given}"));
            }
        }
        let exported = self.exported.as_ref().map(|exported| (exported.scale, exported.shift));
        let scale = given[0].or(found.scale).or(exported.map(|e| e.0));
        let shift = given[1].or(found.shift).or(exported.map(|e| e.1));
        let (Some(scale), Some(shift)) = (scale, shift) else {
            asked.0.push(
                "--latents sky|ucf101|taichi|text (the published scale and shift of the latents), or --scale and --shift"
                    .to_string(),
            );
            return Ok((1.0, 0.0));
        };
        if !(scale.is_finite() && scale > 0.0 && shift.is_finite()) {
            return mistake(format!("a scale of {scale} and a shift of {shift}: the scale must be positive"));
        }
        Ok((scale, shift))
    }

    fn autoencoder_config(&self, tensors: &Tensors, asked: &mut Asked) -> Result<AutoencoderConfig> {
        let inferred = InferredAutoencoder::from_shapes(&Shapes::from(tensors)).context("autoencoder")?;
        let base = match self.exported_first_stage()? {
            Some(CodecConfig::VideoAutoencoder(exported)) => Some(exported),
            _ => inferred.released(),
        };
        let temporal_factor = self.options.temporal_factor.or(base.as_ref().map(|b| b.factors[0]));
        let norm_groups = self.options.norm_groups.or(base.as_ref().map(|b| b.norm_groups));
        let all_known = temporal_factor.is_some() && norm_groups.is_some();
        let temporal_factor = asked.or(temporal_factor, || {
            format!(
                "--temporal-factor N (strides leave no trace, and its autoencoder is not the released one: {inferred})"
            )
        });
        let norm_groups = asked.or(norm_groups, || "--norm-groups N (of the autoencoder; they leave no trace)".into());
        let mut config = base.unwrap_or_else(|| inferred.config(temporal_factor, norm_groups));
        (config.factors[0], config.norm_groups) = (temporal_factor, norm_groups);
        if !all_known {
            return Ok(config);
        }
        if let Err(error) = config.validate() {
            return mistake(format!("{error:#}"));
        }
        let largest = 1 << inferred.blocks;
        if config.factors.into_iter().max() != Some(largest) {
            return mistake(format!(
                "--temporal-factor {temporal_factor}: the largest factor is {largest}, for the autoencoder has {} blocks",
                inferred.blocks
            ));
        }
        Ok(config)
    }

    fn resolution(&self) -> i64 {
        self.options.resolution.unwrap_or(256)
    }

    /// Data, as far as is known: the place is a placeholder.
    fn data(&self, frames: i64) -> Value {
        let (dataset, frame_stride) = match self.options.latents {
            Some(preset) => preset.data(),
            None => {
                let stem = self.file.file_stem().unwrap_or_default().to_string_lossy();
                (json!({"kind": "folder", "root": format!("data/{stem}")}), 1)
            }
        };
        json!({"dataset": dataset, "frames": frames, "frame_stride": frame_stride, "resolution": self.resolution()})
    }

    fn progress(&self, found: &LvdmCheckpoint) -> Progress {
        let step = found.global_step.or(found.updates).unwrap_or(0);
        let fresh =
            Progress { step, position: 0, ema_updates: found.updates.unwrap_or(0), skipped_steps: 0, seconds: 0.0 };
        self.exported.as_ref().map_or(fresh, |exported| exported.progress.clone())
    }

    /// The released training of an autoencoder.
    fn autoencoder_experiment(
        &self,
        config: &AutoencoderConfig,
        discriminator: &DiscriminatorConfig,
        frames: i64,
        average: Option<f64>,
        step: i64,
    ) -> Result<AutoencoderExperiment> {
        let mut experiment: AutoencoderExperiment = match &self.exported {
            Some(exported) => {
                serde_json::from_value(exported.autoencoder.clone()).context("the exported autoencoder's experiment")?
            }
            None => serde_json::from_value(json!({
                "data": self.data(frames),
                "loss": {"discriminator": discriminator},
                "optimizer": {"kind": "adam", "learning_rate": 3.6e-5, "betas": [0.5, 0.9]},
                "trainer": {"steps": step + 100_000, "batch": 1, "accumulate": 2, "ema_decay": average},
            }))?,
        };
        experiment.autoencoder = config.clone().into();
        if let Some(resolution) = self.options.resolution {
            experiment.data.resolution = resolution;
        }
        let data = &experiment.data;
        if let Err(error) = config.latent_shape(data.frames, data.resolution, data.resolution) {
            return mistake(format!("{error:#}"));
        }
        Ok(experiment)
    }

    /// A checkpoint of an autoencoder alone.
    fn autoencoder(self, mut found: LvdmCheckpoint) -> Result<Imported> {
        if found.autoencoder.is_empty() {
            bail!("there is neither a U-Net (`{UNET}*`) nor an autoencoder (`encoder.*`, `decoder.*`) in it");
        }
        for (option, given) in [
            ("--conditioning", self.options.conditioning.is_some()),
            ("--latent-stride", self.options.latent_stride.is_some()),
            ("--heads", self.options.heads.is_some()),
        ] {
            if given {
                return mistake(format!("{option} is for a diffusion checkpoint; this is an autoencoder's"));
            }
        }
        let mut asked = Asked::default();
        let (scale, shift) = self.latents(&found, &mut asked)?;
        let config = self.autoencoder_config(&found.autoencoder, &mut asked)?;
        asked.finish()?;

        let network = Declared::codec(&config);
        let mut tensors: Tensors = with_prefix("model", network.take(&found.autoencoder)?).collect();
        let mut parts = vec![network.report()];
        let average = network.take_average(&mut found, "")?;
        let average_decay = (!average.is_empty()).then(|| found.decay.unwrap_or(0.9999));
        if !average.is_empty() {
            parts.push(Part { name: "autoencoder, average", tensors: average.len(), ..network.report() });
        }
        tensors.extend(with_prefix("ema", average));
        let mut discriminator = DiscriminatorConfig::default();
        if !found.discriminator.is_empty() {
            discriminator =
                DiscriminatorConfig::from_shapes(&Shapes::from(&found.discriminator)).context("discriminator")?;
            let network = Declared::discriminator(&discriminator);
            tensors.extend(with_prefix("discriminator", network.take(&found.discriminator)?));
            parts.push(network.report());
        }
        tensors.extend(latent_tensors(scale, shift));

        let progress = self.progress(&found);
        let frames = self.options.frames.unwrap_or(CLIP_FRAMES.max(config.factors[0]));
        let experiment = self.autoencoder_experiment(&config, &discriminator, frames, average_decay, progress.step)?;
        self.write("autoencoder", &experiment, progress, tensors, parts, found.ignored)
    }

    /// A checkpoint of a U-Net with its autoencoder.
    fn diffusion(self, mut found: LvdmCheckpoint) -> Result<Imported> {
        ensure!(
            !found.autoencoder.is_empty(),
            "its autoencoder is missing: there are no `{FIRST_STAGE}*` beside `{UNET}*`"
        );
        ensure!(found.discriminator.is_empty(), "a discriminator (`{DISCRIMINATOR}*`) beside a U-Net is unknown");
        let mut asked = Asked::default();
        let (scale, shift) = self.latents(&found, &mut asked)?;
        let autoencoder = self.first_stage_config(&found.autoencoder, &mut asked)?;
        let (latent_channels, [temporal_factor, ..]) = (autoencoder.latent_channels(), autoencoder.clip_shape([1; 3]));
        let inferred = InferredUNet::from_shapes(&Shapes::from(&found.unet)).context("U-Net")?;
        let text = inferred.config.attention == AttentionKind::Text;
        ensure!(
            text != found.text_encoder.is_empty(),
            "{} tensors of a text encoder (`{TEXT_ENCODER}*`) beside a U-Net that {} to a text",
            found.text_encoder.len(),
            if text { "attends" } else { "does not attend" }
        );
        let setting = self.unet_setting(&inferred, latent_channels, &mut asked)?;
        asked.finish()?;
        let clip = self.clip(&inferred, &setting, temporal_factor)?;

        let mut config = inferred.config.clone();
        config.heads = setting.heads;
        if let Some(own) = self.exported_diffusion().map(DiffusionExperiment::unet).transpose()? {
            // these leave no trace in the tensors, or not in all
            config.norm_groups = own.norm_groups;
            config.head_width = config.head_width.or(own.head_width);
        }
        if let Err(error) = config.validate() {
            return mistake(format!("{error:#}"));
        }
        let network = Declared::unet(&config, &inferred.ports(clip.latent_frames));
        let mut tensors: Tensors = with_prefix("model", network.take(&found.unet)?).collect();
        let mut parts = vec![network.report()];
        let average = network.take_average(&mut found, AVERAGED_UNET)?;
        let average_decay = (!average.is_empty()).then(|| found.decay.unwrap_or(0.9999));
        if !average.is_empty() {
            parts.push(Part { name: "U-Net, average", tensors: average.len(), ..network.report() });
        }
        tensors.extend(with_prefix("ema", average));

        let first_stage = Declared::codec(&*autoencoder);
        let mut carried: Tensors = with_prefix("model", first_stage.take(&found.autoencoder)?).collect();
        carried.extend(latent_tensors(scale, shift));
        parts.push(first_stage.report());
        let known = match &autoencoder {
            // decoded in pieces of the length of its training, whatever the U-Net's clips are
            CodecConfig::VideoAutoencoder(video) => {
                let frames = CLIP_FRAMES.max(temporal_factor);
                let experiment =
                    self.autoencoder_experiment(video, &DiscriminatorConfig::default(), frames, None, 0)?;
                serde_json::to_value(experiment)?
            }
            _ => serde_json::to_value(Carried { autoencoder: autoencoder.clone() })?,
        };
        let mut files = vec![(AUTOENCODER_FILE, carried_checkpoint("autoencoder", known, carried))];
        if text {
            let exported = self.exported.as_ref().and_then(|exported| exported.text_encoder.clone());
            let (known, own_tokenizer) = exported.map_or((None, None), |e| (Some(e.text_encoder), e.tokenizer));
            let inferred_text = || ClipTextConfig::from_shapes(&Shapes::from(&found.text_encoder), None);
            let config = known.map_or_else(inferred_text, Ok).context("text encoder")?;
            ensure!(
                config.width == inferred.config.context_width,
                "the text encoder is {} wide, the U-Net attends to {}",
                config.width,
                inferred.config.context_width
            );
            let encoder = Declared::text_encoder(&config);
            let tensors = with_prefix("model", encoder.take(&found.text_encoder)?).collect();
            parts.push(encoder.report());
            let tokenizer = self.options.tokenizer.as_deref().map(tokenizer).transpose()?.or(own_tokenizer);
            match &tokenizer {
                None => tracing::warn!("without --tokenizer FOLDER the run cannot read prompts or captions"),
                Some(files) => warn_of_unused_rows(config.vocabulary, Tokenizer::new(files)?.vocabulary()),
            }
            let known = serde_json::to_value(TextEncoderConfig { text_encoder: config, tokenizer })?;
            files.push((TEXT_ENCODER_FILE, carried_checkpoint(TEXT_ENCODER_TASK, known, tensors)));
        }

        let progress = self.progress(&found);
        let mut experiment: DiffusionExperiment = match self.exported_diffusion() {
            Some(exported) => exported.clone(),
            None => serde_json::from_value(json!({
                "data": self.data(clip.frames),
                "autoencoder": "",
                "schedule": schedule(found.betas.as_deref(), text)?,
                "optimizer": {
                    "kind": "adamw",
                    "learning_rate": if setting.conditioning.is_some() { 8e-5 } else { 6e-5 },
                    "weight_decay": 0.01,
                },
                "trainer": {
                    "steps": progress.step + 100_000,
                    "batch": if self.options.latents == Some(LatentPreset::Ucf101) { 2 } else { 3 },
                    "accumulate": 2,
                    "ema_decay": average_decay,
                },
            }))?,
        };
        experiment.autoencoder = self.run.join(AUTOENCODER_FILE).into();
        experiment.data.frames = clip.frames;
        experiment.latent_stride = setting.latent_stride;
        experiment.conditioning = setting.conditioning;
        experiment.start_from = None;
        experiment.trained = Trained::All;
        experiment.text = text.then(|| TextConditioning::of(self.run));
        if let Some(resolution) = self.options.resolution {
            experiment.data.resolution = resolution;
        }
        let data = &experiment.data;
        let latent = autoencoder.latent_shape(data.frames, data.resolution, data.resolution)?;
        let deepest = 1 << (config.multipliers.len() - 1);
        if latent[2] % deepest != 0 {
            return mistake(format!(
                "--resolution {}: latents of {}x{} do not halve {} times",
                data.resolution,
                latent[2],
                latent[3],
                config.multipliers.len() - 1
            ));
        }
        // what leaves no trace in the tensors stays as exported
        let settings = experiment.unet()?;
        (config.recompute, config.norm_per_frame, config.norm_groups) =
            (settings.recompute.clone(), settings.norm_per_frame, settings.norm_groups);
        experiment.network = config.into();
        for (name, checkpoint) in files {
            checkpoint.write(&self.run.join(name))?;
        }
        self.write("diffusion", &experiment, progress, tensors, parts, found.ignored)
    }

    /// The settings of a U-Net that its tensors do not show.
    fn unet_setting(&self, inferred: &InferredUNet, latent_channels: i64, asked: &mut Asked) -> Result<UNetSetting> {
        let options = self.options;
        let exported = self.exported_diffusion();
        ensure!(
            inferred.outputs == latent_channels && (0..=1).contains(&(inferred.inputs - latent_channels)),
            "the U-Net maps {} channels to {}, its autoencoder's latents have {latent_channels}",
            inferred.inputs,
            inferred.outputs
        );
        if let (Some(heads), Some(own)) = (options.heads, inferred.heads.filter(|own| Some(*own) != options.heads)) {
            return mistake(format!("--heads {heads}: the tables of relative positions say {own}"));
        }
        let exported_heads = exported.map(DiffusionExperiment::unet).transpose()?.map(|unet| unet.heads);
        let heads = inferred.heads.or(options.heads).or(exported_heads);
        let heads = asked.or(heads, || "--heads N (without relative positions they leave no trace)".to_string());
        if inferred.temporal_length.is_none() {
            asked.or(options.frames.or(exported.map(|e| e.data.frames)), || {
                "--frames N (of a clip; without relative positions they leave no trace)".to_string()
            });
        }
        let masked = inferred.inputs > latent_channels;
        if !masked {
            ensure!(inferred.classes.is_none(), "it has noise levels (`label_emb`) but no mask channel");
            if options.conditioning.is_some() {
                return mistake("--conditioning: this network has no mask channel".to_string());
            }
        }
        let conditioning = match options.conditioning {
            Some(kind) => Some(kind.settings(inferred.classes)),
            None => exported.and_then(|e| e.conditioning.clone()),
        };
        if masked && conditioning.is_none() {
            asked.0.push(
                "--conditioning prediction|interpolation (it has a mask channel, and both kinds look alike)"
                    .to_string(),
            );
        }
        let stride = options.latent_stride.or(options.conditioning.map(ConditioningKind::latent_stride));
        let latent_stride = stride.or(exported.map(|e| e.latent_stride)).unwrap_or(1);
        Ok(UNetSetting { heads, latent_stride, conditioning: conditioning.filter(|_| masked) })
    }

    /// How long the clips were that the network was trained on.
    fn clip(&self, inferred: &InferredUNet, setting: &UNetSetting, temporal_factor: i64) -> Result<Clip> {
        let stride = setting.latent_stride;
        let frames = self.options.frames.or(self.exported_diffusion().map(|e| e.data.frames));
        let frames = frames
            .or(inferred.temporal_length.map(|length| length * stride * temporal_factor))
            .context("the number of frames is neither in the file nor given (--frames)")?;
        if frames < 1 || frames % temporal_factor != 0 {
            return mistake(format!("--frames {frames}: not a multiple of the temporal factor {temporal_factor}"));
        }
        let latent_frames = (frames / temporal_factor - 1) / stride + 1;
        if let Some(length) = inferred.temporal_length.filter(|&length| length != latent_frames) {
            return mistake(format!(
                "--frames {frames}: with a temporal factor of {temporal_factor} and a latent stride of {stride} these \
                 are {latent_frames} latent frames; the tables of relative positions are for {length}"
            ));
        }
        if let Some(conditioning) = &setting.conditioning {
            let steps = ScheduleConfig::default().steps;
            conditioning
                .validate(latent_frames, steps)
                .map_err(|error| UserError(format!("--conditioning: {error:#}")))?;
        }
        Ok(Clip { frames, latent_frames })
    }

    fn write(
        &self,
        task: &'static str,
        experiment: &impl Serialize,
        progress: Progress,
        tensors: Tensors,
        parts: Vec<Part>,
        ignored: Vec<Ignored>,
    ) -> Result<Imported> {
        let step = progress.step;
        write_run(self.run, &imported_from(self.file), task, experiment, progress, tensors)?;
        Ok(Imported { task, step, parts, ignored })
    }
}

struct UNetSetting {
    heads: i64,
    latent_stride: i64,
    conditioning: Option<FrameConditioning>,
}

struct Clip {
    frames: i64,
    latent_frames: i64,
}
