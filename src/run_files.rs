//! The names of what lies in the folder of a run, besides its checkpoints.

/// The settings that a run was trained with.
pub const EXPERIMENT_FILE: &str = "experiment.yaml";
/// The log: a JSON object a line.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The same numbers and pictures for TensorBoard.
pub const TENSORBOARD_FOLDER: &str = "tensorboard";
/// Figures and times of the whole demo.
pub const SUMMARY_FILE: &str = "summary.json";
