//! A released TATS → a run: its autoencoder with the codebook and the discriminators.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::value_parser;
use serde_json::json;
use tch::Tensor;

use super::{
    Imported, MOST_FRAMES, MOST_PIXELS, NewRun, Shapes, declared::Declared, imported_from, latent_tensors, mistake,
    with_prefix, write_run,
};
use crate::{
    autoencoder_loss::{CodecLossConfig, CodecLossSettings, DiscriminatorConfig, TatsLossConfig},
    checkpoint::Progress,
    codecs::{CodebookConfig, CodecConfig, CodecSettings, VqganConfig, VqganNorm},
    experiment::AutoencoderExperiment,
    weights::{
        WeightsFile,
        lvdm_checkpoint::{Ignored, Tensors},
    },
};

/// What the user says of a released TATS.
#[derive(Debug, Clone, clap::Args)]
pub struct TatsOptions {
    /// Downsampling of time, height and width, which leaves no trace in the file [default: 4,8,8 where there are three
    /// stages, as in the released models]
    #[arg(long, value_name = "T,H,W", value_delimiter = ',')]
    pub factors: Option<Vec<i64>>,
    /// Frames in a clip
    #[arg(long, default_value_t = 16, value_parser = value_parser!(i64).range(1..=MOST_FRAMES))]
    pub frames: i64,
    /// Height and width of a clip in pixels
    #[arg(long, default_value_t = 128, value_parser = value_parser!(i64).range(1..=MOST_PIXELS))]
    pub resolution: i64,
}

/// The tensors of a released checkpoint, each part without its prefix.
#[derive(Default)]
struct TatsCheckpoint {
    autoencoder: Tensors,
    /// `image_discriminator.*` and `video_discriminator.*`.
    discriminators: Tensors,
    /// Of a transformer over codes.
    transformer: Tensors,
    ignored: Vec<Ignored>,
    step: i64,
}

/// Where a transformer's checkpoint keeps the autoencoder.
const FIRST_STAGE: &str = "first_stage_model.";
/// The two discriminators.
const DISCRIMINATORS: [&str; 2] = ["image_discriminator.", "video_discriminator."];
/// What an autoencoder has at its top.
const AUTOENCODER: [&str; 5] = ["encoder.", "decoder.", "pre_vq_conv.", "post_vq_conv.", "codebook."];

impl TatsCheckpoint {
    /// # Errors
    /// A file that is damaged, or has no weights; a tensor that belongs nowhere.
    fn read(path: &Path) -> Result<Self> {
        let file = WeightsFile::open(path)?;
        let mut found = TatsCheckpoint::default();
        for (name, value) in file.beside() {
            let step = value.as_int().filter(|_| name == "global_step");
            found.step = step.map_or(found.step, |step| step.max(0));
            found.ignore(name);
        }
        for (name, tensor) in file.read()? {
            if let Some(rest) = name.strip_prefix("transformer.") {
                found.transformer.insert(rest.to_string(), tensor);
                continue;
            }
            let own = name.strip_prefix(FIRST_STAGE).unwrap_or(&name);
            if AUTOENCODER.iter().any(|top| own.starts_with(top)) {
                found.autoencoder.insert(own.to_string(), tensor);
            } else if DISCRIMINATORS.iter().any(|top| own.starts_with(top)) {
                found.discriminators.insert(own.to_string(), tensor);
            } else if own.starts_with("perceptual_model.") {
                found.ignore("perceptual_model.*");
            } else {
                bail!("{}: the tensor `{name}` belongs to no part of TATS", path.display());
            }
        }
        ensure!(
            !found.autoencoder.is_empty(),
            "{} is no checkpoint of TATS: there is no autoencoder with a codebook (`encoder.*`, `codebook.*`) in it",
            path.display()
        );
        Ok(found)
    }

    fn ignore(&mut self, name: &str) {
        match self.ignored.iter_mut().find(|group| group.name == name) {
            Some(group) => group.count += 1,
            None => self.ignored.push(Ignored { name: name.to_string(), count: 1 }),
        }
    }
}

/// The autoencoder's settings, read off its tensors.
///
/// # Errors
/// Names the tensor that is missing; asks for the factors where they are none of the released models'.
fn autoencoder_config(tensors: &Tensors, factors: Option<&[i64]>) -> Result<VqganConfig> {
    let shapes = Shapes::from(tensors);
    let stages = (0..).take_while(|i| shapes.has(&format!("encoder.conv_blocks.{i}.down.conv.weight"))).count();
    let released = VqganConfig::default();
    let factors: [i64; 3] = match factors {
        Some(&[frames, height, width]) => [frames, height, width],
        Some(others) => return mistake(format!("--factors takes three numbers, T,H,W, not {}", others.len())),
        None if stages == 3 => released.factors,
        None => {
            return mistake(format!(
                "give --factors T,H,W: strides leave no trace in the file, and {stages} stages are not those of the released \
                 models"
            ));
        }
    };
    let norm = match shapes.has("encoder.final_block.0.running_mean") {
        true => VqganNorm::Batch,
        false => VqganNorm::Group,
    };
    let config = VqganConfig {
        channels: shapes.axis("encoder.conv_first.conv.weight", 0)?,
        factors,
        latent_channels: shapes.axis("codebook.embeddings", 1)?,
        norm,
        codebook: CodebookConfig { codes: shapes.axis("codebook.embeddings", 0)?, ..released.codebook },
    };
    if let Err(error) = config.validate() {
        return mistake(format!("{error:#}"));
    }
    if factors.iter().max() != Some(&(1 << stages)) {
        return mistake(format!(
            "--factors: the largest is {}, for the autoencoder has {stages} stages",
            1i64 << stages
        ));
    }
    Ok(config)
}

/// Shift and scale of latents: those of the codebook's entries, each as often as it is chosen.
fn normalization(autoencoder: &Tensors) -> (f64, f64) {
    let double = |name: &str| autoencoder[name].to_kind(tch::Kind::Double);
    let (entries, counts) = (double("codebook.embeddings"), double("codebook.N").clamp_min(1e-12));
    let p = (&counts / counts.sum(None)).unsqueeze(1); // [K, 1]
    let mean_of = |values: &Tensor| (values.mean_dim([1i64].as_slice(), true, None) * &p).sum(None).double_value(&[]);
    let mean = mean_of(&entries);
    let variance = mean_of(&(entries - mean).square());
    (1.0 / variance.sqrt().max(1e-12), -mean)
}

/// Turns the autoencoder of a released TATS into a run of the autoencoder.
///
/// # Errors
/// [`crate::experiment::UserError`] for what the user said; a file that is damaged, or holds another network.
pub fn import_tats(file: &Path, options: &TatsOptions, run: &Path) -> Result<Imported> {
    if !file.is_file() {
        return mistake(format!("there is no checkpoint {}", file.display()));
    }
    let new = NewRun::begin(run)?;
    let name = || file.display().to_string();
    let mut found = TatsCheckpoint::read(file)?;
    for _ in 0..found.transformer.len() {
        found.ignore("transformer.*");
    }
    let config = autoencoder_config(&found.autoencoder, options.factors.as_deref()).with_context(name)?;
    if let Err(error) = config.latent_shape(options.frames, options.resolution, options.resolution) {
        return mistake(format!("{error:#}"));
    }
    let network = Declared::codec(&config);
    let autoencoder = network.take(&found.autoencoder).with_context(name)?;
    let mut parts = vec![network.report()];
    let (scale, shift) = normalization(&autoencoder);
    let mut tensors: Tensors = with_prefix("model", autoencoder).chain(latent_tensors(scale, shift)).collect();

    let mut loss = TatsLossConfig::default();
    if !found.discriminators.is_empty() {
        let shapes = Shapes::from(&found.discriminators);
        let blocks = (0..).take_while(|i| shapes.has(&format!("image_discriminator.model{i}.0.weight"))).count() as i64;
        let channels = shapes.axis("image_discriminator.model0.0.weight", 0).with_context(name)?;
        loss.discriminator = DiscriminatorConfig { channels, layers: blocks - 2 };
        loss.validate().with_context(name)?;
        let network = Declared::discriminators(&loss);
        tensors.extend(with_prefix("discriminator", network.take(&found.discriminators).with_context(name)?));
        parts.push(network.report());
    }

    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let experiment: AutoencoderExperiment = serde_json::from_value(json!({
        "data": {
            "dataset": {"kind": "folder", "root": format!("data/{stem}")},
            "frames": options.frames,
            "resolution": options.resolution,
        },
        "autoencoder": CodecConfig::from(config),
        "loss": CodecLossConfig::from(loss),
        "optimizer": {"kind": "adam", "learning_rate": 9.0e-5, "betas": [0.5, 0.9]},
        "trainer": {"steps": found.step + 100_000, "batch": 2, "accumulate": 48, "ema_decay": null, "clip_gradient": 1.0},
    }))?;
    let progress = Progress { step: found.step, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
    write_run(run, &imported_from(file), "autoencoder", &experiment, progress, tensors)?;
    new.finish();
    Ok(Imported { task: "autoencoder", step: found.step, parts, ignored: found.ignored })
}
