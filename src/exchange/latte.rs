//! A released Latte → a run: the transformer with its moving average, and Stable Diffusion's image autoencoder, in whose
//! latents it was trained.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::value_parser;
use serde_json::json;
use tch::Device;

use super::{
    Carried, Imported, MOST_PLACES, NewRun, Part, Shapes, carried_checkpoint, imported_from, latent_tensors, mistake,
    stable_diffusion::image_autoencoder, warn_of_infinities, with_prefix, write_run,
};
use crate::{
    checkpoint::Progress,
    codecs::{ImageAutoencoder, ImageAutoencoderConfig, Normalization},
    experiment::{ClassList, DiffusionExperiment, LabelConditioning},
    networks::{LatteConfig, NetworkSettings, Ports},
    nn::Parameters,
    run_files::AUTOENCODER_FILE,
    weights::{latte::LatteWeights, lvdm_checkpoint::Tensors, stable_diffusion::Network},
};

/// What the user says of a released Latte.
#[derive(Debug, Clone, clap::Args)]
pub struct LatteOptions {
    /// Stable Diffusion's image autoencoder: a file, or a folder of diffusers (of the autoencoder alone or of the whole)
    #[arg(long, value_name = "PATH")]
    pub vae: PathBuf,
    /// Attention heads, which cannot be inferred from the file [default: those of the released network of this width]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_PLACES))]
    pub heads: Option<i64>,
    /// Take every n-th frame of a video, when training continues
    #[arg(long, default_value_t = 3, value_parser = value_parser!(i64).range(1..=MOST_PLACES))]
    pub frame_stride: i64,
}

/// Settings and ports of a network, read off its tensors.
struct Inferred {
    config: LatteConfig,
    ports: Ports,
}

/// Width and heads of the released sizes: S, B, L and XL.
const RELEASED_HEADS: [(i64, i64); 4] = [(384, 6), (768, 12), (1024, 16), (1152, 16)];

impl Inferred {
    /// # Errors
    /// Names the tensor that is missing or out of line, and asks for what leaves no trace.
    fn new(tensors: &Tensors, heads: Option<i64>) -> Result<Self> {
        let shapes = Shapes::from(tensors);
        let (hidden_size, channels) =
            (shapes.axis("x_embedder.proj.weight", 0)?, shapes.axis("x_embedder.proj.weight", 1)?);
        let patch_size = shapes.axis("x_embedder.proj.weight", 2)?;
        let depth = (0..).take_while(|i| shapes.has(&format!("blocks.{i}.attn.qkv.weight"))).count() as i64;
        let (places, frames) = (shapes.axis("pos_embed", 1)?, shapes.axis("temp_embed", 1)?);
        let side = (1..=1 << 15).find(|side| side * side >= places).unwrap_or(0);
        ensure!(side * side == places, "`pos_embed` has {places} places, which make no square");
        let released = RELEASED_HEADS.iter().find(|(width, _)| *width == hidden_size).map(|(_, heads)| *heads);
        let Some(heads) = heads.or(released) else {
            return mistake(format!(
                "give --heads N: the file does not tell its attention heads, and its width {hidden_size} is none of the \
                 released sizes"
            ));
        };
        let classes = match shapes.has("y_embedder.embedding_table.weight") {
            true => Some(shapes.axis("y_embedder.embedding_table.weight", 0)? - 1),
            false => None,
        };
        ensure!(patch_size >= 1, "`x_embedder.proj.weight` has patches of {patch_size} places");
        let outputs = shapes.axis("final_layer.linear.weight", 0)? / (patch_size * patch_size);
        let config = LatteConfig { depth, hidden_size, heads, patch_size, recompute: false };
        let latent = [channels, frames, side * patch_size, side * patch_size];
        Ok(Inferred { config, ports: Ports { outputs, classes, ..Ports::of(latent) } })
    }
}

/// Turns a released Latte into a run of the diffusion.
///
/// # Errors
/// [`crate::experiment::UserError`] for what the user said; a file that is damaged, or holds another network.
pub fn import_latte(file: &Path, options: &LatteOptions, run: &Path) -> Result<Imported> {
    if !file.is_file() {
        return mistake(format!("there is no checkpoint {}", file.display()));
    }
    let new = NewRun::begin(run)?;
    let name = || file.display().to_string();
    let average = LatteWeights::read(file, true)?;
    let is_averaged = average.averaged;
    // both where the file has both, so that training goes on from the weights and sampling uses their average
    let last = LatteWeights::read(file, false)?;
    let Inferred { config, ports } = Inferred::new(&average.tensors, options.heads).with_context(name)?;
    config.validate().with_context(name)?;
    let learns_variance = match ports.outputs {
        outputs if outputs == 2 * ports.channels => true,
        outputs if outputs == ports.channels => false,
        outputs => {
            return Err(anyhow::anyhow!(
                "{}: the network makes {outputs} channels of {}; Latte makes as many, or with a learned variance twice as many",
                name(),
                ports.channels
            ));
        }
    };

    let parameters = Parameters::unfilled(Device::Cpu);
    config.build(&parameters.root(), &ports)?;
    let mut parts = vec![Part { name: "Latte", tensors: parameters.named().len(), parameters: parameters.count() }];
    for found in [&last, &average] {
        found.check_embeddings(&parameters.named()).with_context(name)?;
        parameters.check(&found.tensors).with_context(name)?;
        warn_of_infinities("Latte", &found.tensors);
    }
    let trainable: Vec<String> = parameters.trainable().into_iter().map(|(name, _)| name).collect();
    let single = |tensors: Tensors| -> Tensors {
        tensors.into_iter().map(|(name, tensor)| (name, tensor.to_kind(tch::Kind::Float))).collect()
    };
    let mut tensors: Tensors = with_prefix("model", single(last.tensors)).collect();
    if is_averaged {
        let moved = average.tensors.into_iter().filter(|(name, _)| trainable.contains(name)).collect();
        tensors.extend(with_prefix("ema", single(moved)));
        parts.push(Part { name: "Latte, average", ..parts[0].clone() });
    }

    let (vae, scale, vae_tensors) = image_autoencoder(&options.vae, &ImageAutoencoderConfig::default(), None)?;
    ensure!(
        vae.latent_channels == ports.channels,
        "--vae {}: its latents have {} channels, the network is made for {}",
        options.vae.display(),
        vae.latent_channels,
        ports.channels
    );
    let parameters = Parameters::unfilled(Device::Cpu);
    ImageAutoencoder::new(&parameters.root(), &vae);
    let network = Network::Autoencoder { levels: vae.widths.len() };
    network.import_all(vae_tensors, &parameters).context("--vae")?;
    let autoencoder: Tensors = parameters.named().into_iter().collect();
    warn_of_infinities("image autoencoder", &autoencoder);
    parts.push(Part { name: "image autoencoder", tensors: autoencoder.len(), parameters: parameters.count() });
    let mut autoencoder: Tensors = with_prefix("model", autoencoder).collect();
    let published = Normalization::STABLE_DIFFUSION;
    autoencoder.extend(latent_tensors(scale.unwrap_or(published.scale), published.shift));

    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let mut experiment: DiffusionExperiment = serde_json::from_value(json!({
        "data": {
            "dataset": {"kind": "folder", "root": format!("data/{stem}")},
            "frames": ports.frames,
            "frame_stride": options.frame_stride,
            "resolution": ports.height * vae.factor(),
        },
        "autoencoder": run.join(AUTOENCODER_FILE),
        "schedule": {"kind": "linear", "steps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
        "objective": {"predict": "noise", "loss": if learns_variance { "learned_variance" } else { "l2" }},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0},
        "trainer": {"steps": 1_000_000, "batch": 5, "ema_decay": is_averaged.then_some(0.9999)},
        "sampler": {"kind": "respaced_ddpm", "steps": 250},
    }))?;
    experiment.network = config.into();
    experiment.labels = ports
        .classes
        .map(|classes| LabelConditioning { classes: Some(ClassList::Count(classes)), ..Default::default() });
    let known = serde_json::to_value(Carried { autoencoder: vae.into() })?;
    carried_checkpoint("autoencoder", known, autoencoder).write(&run.join(AUTOENCODER_FILE))?;
    // the average goes on as it is: a new one would begin by following the weights closely
    let ema_updates = if is_averaged { 100_000 } else { 0 };
    let progress = Progress { step: 0, position: 0, ema_updates, skipped_steps: 0, seconds: 0.0 };
    write_run(run, &imported_from(file), "diffusion", &experiment, progress, tensors)?;
    new.finish();
    Ok(Imported { task: "diffusion", step: 0, parts, ignored: Vec::new() })
}
