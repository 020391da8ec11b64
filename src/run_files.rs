//! The names of what lies in the folder of a run, of an evaluation, or of sampled videos.

use std::path::Path;

/// The settings that a run was trained with.
pub const EXPERIMENT_FILE: &str = "experiment.yaml";
/// A run's checkpoints, one file a step.
pub const CHECKPOINTS_FOLDER: &str = "checkpoints";
/// The autoencoder that a diffusion run carries.
pub const AUTOENCODER_FILE: &str = "autoencoder.safetensors";
/// The text encoder, with its tokenizer, that a text-to-video run carries.
pub const TEXT_ENCODER_FILE: &str = "text_encoder.safetensors";
/// The run, within that of the second stage of a cascade, that makes videos of a lower resolution.
pub const BASE_FOLDER: &str = "base";
/// All names of an import: ours that were loaded, each with the file's; ours that are new; the file's that are unused.
pub const NAMES_FILE: &str = "imported.json";
/// The log: a JSON object a line.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The same numbers and pictures for TensorBoard.
pub const TENSORBOARD_FOLDER: &str = "tensorboard";
/// Figures of an evaluation under one protocol.
pub const FIGURES_FILE: &str = "figures.json";
/// Figures of an evaluation under every protocol.
pub const CARD_FILE: &str = "card.json";
/// All windows of all curves of long videos, a JSON object a line.
pub const CURVES_FILE: &str = "curves.jsonl";
/// Figures of an autoencoder's reconstructions.
pub const RECONSTRUCTION_FILE: &str = "reconstruction.json";
/// What the videos of a folder were sampled with.
pub const SAMPLING_FILE: &str = "sampling.json";
/// Figures and times of the whole demo.
pub const SUMMARY_FILE: &str = "summary.json";

/// Whether a path is the folder of a run.
pub fn is_run(path: &Path) -> bool {
    path.join(EXPERIMENT_FILE).is_file() && path.join(CHECKPOINTS_FOLDER).is_dir()
}
