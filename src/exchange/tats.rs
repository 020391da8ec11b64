//! A released TATS → a run: its autoencoder with the codebook and the discriminators, or its transformer over the codes of the
//! autoencoder, which the run then carries.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::value_parser;
use serde_json::json;
use tch::{Device, Tensor};

use super::{
    Imported, MOST_FRAMES, MOST_PIXELS, NewRun, Part, Shapes, carried_checkpoint, declared::Declared, imported_from,
    latent_tensors, mistake, with_prefix, write_run,
};
use crate::{
    autoencoder_loss::{CodecLossConfig, CodecLossSettings, DiscriminatorConfig, TatsLossConfig},
    checkpoint::Progress,
    codecs::{CodebookConfig, CodecConfig, CodecSettings, VqganConfig, VqganNorm},
    experiment::{AutoencoderExperiment, TransformerExperiment},
    networks::{Gpt, GptConfig, Sequences},
    nn::Parameters,
    run_files::AUTOENCODER_FILE,
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
    /// Frames in a clip; a transformer's follow from its positions
    #[arg(long, default_value_t = 16, value_parser = value_parser!(i64).range(1..=MOST_FRAMES))]
    pub frames: i64,
    /// Height and width of a clip in pixels
    #[arg(long, default_value_t = 128, value_parser = value_parser!(i64).range(1..=MOST_PIXELS))]
    pub resolution: i64,
    /// Heads of a transformer's attention, which leave no trace in the file [default: one for 64 of its width, as in the
    /// released models]
    #[arg(long)]
    pub heads: Option<i64>,
    /// Every n-th latent frame of a clip is what a transformer sees: 4 of a released model of sparse frames
    #[arg(long, default_value_t = 1, value_parser = value_parser!(i64).range(1..=MOST_FRAMES))]
    pub latent_stride: i64,
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

/// Writes a run of the transformer, which samples as the released code does. Whether it fills gaps its mask says.
fn write_transformer(
    file: &Path,
    options: &TatsOptions,
    autoencoder: &VqganConfig,
    found: &mut TatsCheckpoint,
    run: &Path,
) -> Result<Part> {
    let masks: Vec<String> = found.transformer.keys().filter(|name| name.ends_with(".attn.mask")).cloned().collect();
    let mut fills_gaps = false;
    for name in masks {
        // the first token of a causal transformer sees itself alone
        let mask = found.transformer.remove(&name).expect("it is one of the names");
        fills_gaps |= mask.flatten(0, -2).get(0).sum(None).double_value(&[]) > 1.0;
        found.ignore("transformer.blocks.*.attn.mask");
    }
    let shapes = Shapes::from(&found.transformer);
    let (vocabulary, width) = (shapes.axis("tok_emb.weight", 0)?, shapes.axis("tok_emb.weight", 1)?);
    let length = shapes.axis("pos_emb", 1)?;
    let layers = (0..).take_while(|i| shapes.has(&format!("blocks.{i}.ln1.weight"))).count() as i64;
    let network = GptConfig { layers, heads: options.heads.unwrap_or(width / 64), width, recompute: false };
    if let Err(error) = network.validate() {
        return mistake(format!("{error:#}; give --heads"));
    }
    let codes = autoencoder.codebook.codes;
    ensure!(vocabulary >= codes, "the transformer has {vocabulary} tokens, fewer than the {codes} codes");
    let [_, one, h, w] = autoencoder.latent_shape(autoencoder.factors[0], options.resolution, options.resolution)?;
    if length % (h * w) != 0 {
        return mistake(format!(
            "--resolution {}: latent frames of {} codes do not fill the transformer's {length} positions",
            options.resolution,
            h * w
        ));
    }
    let frames = length / (h * w) * options.latent_stride * autoencoder.factors[0] / one;
    let sequences = Sequences { vocabulary, length, unmasked: if fills_gaps { h * w } else { 0 } };
    let parameters = Parameters::unfilled(Device::Cpu);
    Gpt::new(&parameters.root(), &network, sequences);
    let declared = Declared { part: "transformer", parameters };
    let tensors: Tensors = with_prefix("model", declared.take(&found.transformer)?).collect();
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let mut experiment = json!({
        "data": {
            "dataset": {"kind": "folder", "root": format!("data/{stem}")},
            "frames": frames,
            "resolution": options.resolution,
        },
        "autoencoder": run,
        "latent_stride": options.latent_stride,
        "interpolation": fills_gaps,
        "network": network,
        "optimizer": {"kind": "adamw", "learning_rate": 1.08e-4, "betas": [0.9, 0.95], "weight_decay": 0.01},
        "trainer": {"steps": found.step + 100_000, "batch": 3, "accumulate": 8, "ema_decay": null},
        "sampler": {"top_k": 2048, "top_p": 0.8, "form": "released"},
    });
    if vocabulary > codes {
        experiment["labels"] = json!({"classes": vocabulary - codes});
    }
    let experiment: TransformerExperiment = serde_json::from_value(experiment)?;
    let progress = Progress { step: found.step, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
    write_run(run, &imported_from(file), "transformer", &experiment, progress, tensors)?;
    Ok(declared.report())
}

/// Turns the autoencoder of a released TATS into a run of the autoencoder, and a transformer's checkpoint into a run of the
/// transformer.
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
    if !found.transformer.is_empty() {
        tensors.retain(|name, _| !name.starts_with("discriminator."));
        carried_checkpoint("autoencoder", serde_json::to_value(&experiment)?, tensors)
            .write(&run.join(AUTOENCODER_FILE))?;
        parts.push(write_transformer(file, options, &config, &mut found, run).with_context(name)?);
        new.finish();
        return Ok(Imported { task: "transformer", step: found.step, parts, ignored: found.ignored });
    }
    let progress = Progress { step: found.step, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
    write_run(run, &imported_from(file), "autoencoder", &experiment, progress, tensors)?;
    new.finish();
    Ok(Imported { task: "autoencoder", step: found.step, parts, ignored: found.ignored })
}
