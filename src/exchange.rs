//! Released checkpoints → runs, and runs → files with the released names.
//!
//! A checkpoint is tensors with names. Their shapes tell most of the networks' settings; what they do not tell
//! is asked for; what training needs besides (data, optimizer, schedule) is taken as published.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::value_parser;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::Tensor;

mod betas;
mod declared;
mod diffusers;
pub mod diffusers_config;
mod export;
mod import;
mod inferred;
mod latte;
mod lora;
mod mcvd;
mod part_weights;
mod replacement;
mod scheduler;
mod stable_diffusion;
mod tats;

pub use diffusers::export_stable_diffusion;
pub use export::export;
pub use import::import;
pub use inferred::{InferredAutoencoder, InferredUNet, Shapes};
pub use latte::{LatteOptions, import_latte};
pub use lora::{export_lora, import_lora};
pub use mcvd::{McvdOptions, import_mcvd};
pub use replacement::Replacements;
pub use stable_diffusion::{ImportedNetwork, StableDiffusionOptions, import_stable_diffusion};
pub use tats::{TatsOptions, import_tats};

use crate::{
    atomic_file::write_atomically,
    checkpoint::{self, Checkpoint, Progress, RunLock},
    codecs::CodecConfig,
    diffusion::FrameConditioning,
    experiment::{DiffusionExperiment, UserError},
    text::{TextEncoderConfig, TokenizerFiles},
    weights::{
        WeightsFile,
        lvdm_checkpoint::{Ignored, Tensors},
    },
};

/// # Errors
/// [`UserError`]: a folder that holds no tokenizer.
fn tokenizer(folder: &Path) -> Result<TokenizerFiles> {
    TokenizerFiles::read(folder).map_err(|error| UserError(format!("--tokenizer: {error:#}")).into())
}

/// Published constants by which raw latents are normalised, with the data that they belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LatentPreset {
    /// Sky Time-lapse: scale 0.33422927, shift 1.4606637
    Sky,
    /// UCF-101: scale 0.220142075, shift 0.5837740898
    Ucf101,
    /// Taichi-HD: scale 0.175733933, shift 0.03291025
    Taichi,
    /// Text to video (Stable Diffusion's): scale 0.18215, shift 0
    Text,
}

impl LatentPreset {
    /// (scale, shift) of z ← scale·(z + shift).
    pub fn constants(self) -> (f64, f64) {
        match self {
            LatentPreset::Sky => (0.33422927, 1.4606637),
            LatentPreset::Ucf101 => (0.220142075, 0.5837740898),
            LatentPreset::Taichi => (0.175733933, 0.03291025),
            LatentPreset::Text => (0.18215, 0.0),
        }
    }

    /// The data set of the published training: where it would lie, and the stride of its frames.
    fn data(self) -> (Value, i64) {
        match self {
            LatentPreset::Sky => (json!({"kind": "frames", "root": "data/sky_timelapse"}), 1),
            LatentPreset::Ucf101 => (json!({"kind": "folder", "root": "data/ucf101"}), 1),
            LatentPreset::Taichi => (json!({"kind": "folder", "root": "data/taichi"}), 4),
            LatentPreset::Text => {
                (json!({"kind": "webvid", "table": "data/webvid/train.csv", "root": "data/webvid/videos"}), 1)
            }
        }
    }
}

/// What a network with a mask channel was trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ConditioningKind {
    /// Continue a video: in training, the first frame was given half of the time, and latent frames were 4 apart
    Prediction,
    /// Fill the frames between two: in training, the first and the last frame were given nine times out of ten
    Interpolation,
}

impl ConditioningKind {
    /// The released training's settings, for a class embedding of so many rows.
    fn settings(self, classes: Option<i64>) -> FrameConditioning {
        let perturbation = classes.map(|rows| rows - 1);
        match self {
            ConditioningKind::Prediction => FrameConditioning { perturbation, ..FrameConditioning::default() },
            ConditioningKind::Interpolation => {
                FrameConditioning { interpolation: 0.9, prediction: 0.0, perturbation, ..FrameConditioning::default() }
            }
        }
    }

    fn latent_stride(self) -> i64 {
        match self {
            ConditioningKind::Prediction => 4,
            ConditioningKind::Interpolation => 1,
        }
    }
}

/// No clip is meant to be longer: a network has tables of relative positions for all of its frames.
const MOST_FRAMES: i64 = 10_000;
/// No side of a video is meant to be longer.
const MOST_PIXELS: i64 = 1 << 16;
/// No network has more heads or groups, and no clip more frames between two.
const MOST_PLACES: i64 = 1 << 16;

/// What the user says of a checkpoint.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ImportOptions {
    /// Scale and shift of the latents, as published for the data set that the network was trained on
    #[arg(long, value_enum, conflicts_with_all = ["scale", "shift"])]
    pub latents: Option<LatentPreset>,
    /// Scale of the latents, in place of --latents: the network sees scale · (z + shift)
    #[arg(long)]
    pub scale: Option<f64>,
    /// Shift of the latents, in place of --latents
    #[arg(long, allow_negative_numbers = true)]
    pub shift: Option<f64>,
    /// What the network was trained for, if it has a mask channel for given frames
    #[arg(long, value_enum)]
    pub conditioning: Option<ConditioningKind>,
    /// Distance between the latent frames that the network sees [default: 4 for prediction, otherwise 1]
    #[arg(long, value_parser = value_parser!(i64).range(..=MOST_PLACES))]
    pub latent_stride: Option<i64>,
    /// Frames that the autoencoder compresses into one latent frame; needed unless it has the released sizes (4)
    #[arg(long, value_parser = value_parser!(i64).range(..=MOST_PLACES))]
    pub temporal_factor: Option<i64>,
    /// Groups in the group norms of the autoencoder; needed unless it has the released sizes (32)
    #[arg(long, value_parser = value_parser!(i64).range(..=MOST_PLACES))]
    pub norm_groups: Option<i64>,
    /// Attention heads; needed for networks without relative positions
    #[arg(long, value_parser = value_parser!(i64).range(..=MOST_PLACES))]
    pub heads: Option<i64>,
    /// Frames in a clip; needed for networks without relative positions
    #[arg(long, value_parser = value_parser!(i64).range(..=MOST_FRAMES))]
    pub frames: Option<i64>,
    /// Height and width of a clip in pixels [default: 256]
    #[arg(long, value_parser = value_parser!(i64).range(..=MOST_PIXELS))]
    pub resolution: Option<i64>,
    /// Folder of the tokenizer (vocab.json and merges.txt, or tokenizer.json); needed for text-to-video networks
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// Leave out tensors and other entries whose names begin with PREFIX; may be given several times
    #[arg(long, value_name = "PREFIX")]
    pub ignore: Vec<String>,
}

impl ImportOptions {
    fn counts(&self) -> [(&'static str, Option<i64>); 6] {
        [
            ("--latent-stride", self.latent_stride),
            ("--temporal-factor", self.temporal_factor),
            ("--norm-groups", self.norm_groups),
            ("--heads", self.heads),
            ("--frames", self.frames),
            ("--resolution", self.resolution),
        ]
    }
}

/// One network of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What the network is called in a run.
    pub name: &'static str,
    /// Each counted once, whether or not it is listed under two names.
    pub tensors: usize,
    /// Numbers that training moves.
    pub parameters: i64,
}

/// What came of an import.
pub struct Imported {
    /// `autoencoder` or `diffusion`.
    pub task: &'static str,
    /// Optimizer steps of the training that wrote the file.
    pub step: i64,
    /// One a network.
    pub parts: Vec<Part>,
    /// What was known and not needed.
    pub ignored: Vec<Ignored>,
}

/// What an exported file says of itself, so that nothing is asked when it is imported.
#[derive(Serialize, Deserialize)]
struct Exported {
    progress: Progress,
    scale: f64,
    shift: f64,
    autoencoder: Value,
    diffusion: Option<DiffusionExperiment>,
    #[serde(default)]
    text_encoder: Option<TextEncoderConfig>,
}

/// What is known of an autoencoder that is not of our training.
#[derive(Serialize, Deserialize)]
struct Carried {
    #[serde(deserialize_with = "CodecConfig::stored")]
    autoencoder: CodecConfig,
}

fn with_prefix(prefix: &str, tensors: Tensors) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
}

/// Warns of weights that are no numbers: a damaged file, or a training that failed.
fn warn_of_infinities(part: &str, tensors: &Tensors) {
    let finite = |tensor: &Tensor| !tensor.is_floating_point() || tensor.isfinite().all().int64_value(&[]) == 1;
    let bad: Vec<&String> = tensors.iter().filter(|(_, tensor)| !finite(tensor)).map(|(name, _)| name).collect();
    if let Some(first) = bad.first() {
        tracing::warn!(
            "{part}: {} tensors hold NaN or infinity, such as `{first}`: what it makes will be broken",
            bad.len()
        );
    }
}

/// Rows of the text encoder that no token stands for: words that were learned and whose tokenizer is not this one.
fn warn_of_unused_rows(rows: i64, tokens: i64) {
    if rows > tokens {
        tracing::warn!(
            "the text encoder has {rows} rows, the tokenizer {tokens} tokens: words that were added to it (of a textual \
             inversion) cannot be written; their tokenizer has an added_tokens.json"
        );
    }
}

/// A file of weights, without the tensors that `--ignore` names.
///
/// # Errors
/// As [`WeightsFile::open`]; [`UserError`]: there is nothing of what is to be left out.
fn open_weights(path: &Path, ignore: &[String]) -> Result<WeightsFile> {
    let mut file = WeightsFile::open(path)?;
    file.ignore(ignore).map_err(|error| UserError(format!("--ignore {error:#}")))?;
    Ok(file)
}

fn mistake<T>(text: String) -> Result<T> {
    Err(UserError(text).into())
}

/// # Errors
/// [`UserError`]: a folder that holds something, or a file.
fn must_be_new(folder: &Path, why: &str) -> Result<()> {
    if folder.exists() && fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_some()) {
        return mistake(format!("{} is there already: {why}", folder.display()));
    }
    Ok(())
}

/// The folder of a run that is being made: unless it was finished, nothing of it stays.
struct NewRun<'a> {
    run: &'a Path,
    is_finished: bool,
    _lock: RunLock,
}

impl<'a> NewRun<'a> {
    /// Takes a folder that is not there yet.
    fn begin(run: &'a Path) -> Result<Self> {
        must_be_new(run, "an import makes a new run")?;
        Ok(NewRun { run, is_finished: false, _lock: RunLock::take(run)? })
    }

    fn finish(mut self) {
        self.is_finished = true;
    }
}

impl Drop for NewRun<'_> {
    fn drop(&mut self) {
        if !self.is_finished {
            // what went wrong before is what is told
            let _ = fs::remove_dir_all(self.run);
        }
    }
}

/// What the experiment of a run says of its origin.
fn imported_from(file: &Path) -> String {
    format!(
        "Imported from {}. The networks are as the file has them; the rest is as published,\nand data.dataset is a \
         placeholder: put in your own before training.",
        file.file_name().unwrap_or_default().to_string_lossy()
    )
}

/// The checkpoint comes last: without it the folder is no run. `note` heads the experiment.
fn write_run(
    run: &Path,
    note: &str,
    task: &str,
    experiment: &impl Serialize,
    progress: Progress,
    tensors: Tensors,
) -> Result<()> {
    let yaml = serde_yaml::to_string(experiment)?;
    write_atomically(&run.join(crate::run_files::EXPERIMENT_FILE), |out| {
        for line in note.lines() {
            writeln!(out, "# {line}")?;
        }
        out.write_all(yaml.as_bytes())?;
        Ok(())
    })?;
    let path = checkpoint::path(run, progress.step);
    Checkpoint { task: task.to_string(), progress, experiment: serde_json::to_value(experiment)?, tensors }.write(&path)
}

/// A network that a run keeps for its own use; of its training nothing is known.
fn carried_checkpoint(task: &str, experiment: Value, tensors: Tensors) -> Checkpoint {
    let progress = Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
    Checkpoint { task: task.to_string(), progress, experiment, tensors }
}

fn latent_tensors(scale: f64, shift: f64) -> [(String, Tensor); 2] {
    [("latent.scale".to_string(), Tensor::from(scale)), ("latent.shift".to_string(), Tensor::from(shift))]
}
