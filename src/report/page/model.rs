//! What a page shows, as it was read from the folders of runs.

use std::{collections::BTreeMap, path::PathBuf};

use serde_yaml::Value;

use crate::{
    metrics::{Distances, Figure, Interval, Metric, RealVsReal},
    report::{Series, repeats::Seeded},
};

/// What a page shows. A part that is empty has no section.
#[derive(Default)]
pub struct Page {
    /// Where it was found.
    pub title: String,
    /// Training runs.
    pub trainings: Vec<Training>,
    /// One a protocol and set of samples.
    pub evaluations: Vec<Evaluation>,
    /// One a card.
    pub sensitivities: Vec<SensitivityTable>,
    /// Of autoencoders.
    pub reconstructions: Vec<Reconstruction>,
    /// Curves along long videos.
    pub long: Vec<LongEvaluation>,
    /// Folders of videos.
    pub galleries: Vec<Gallery>,
    /// Pictures of several frames.
    pub sheets: Vec<Sheet>,
    /// Of a whole job: its name, and the seconds of each stage.
    pub stages: Vec<(String, BTreeMap<String, f64>)>,
}

/// A training run.
pub struct Training {
    /// The run's folder, below the title.
    pub name: String,
    /// The same from the root.
    pub folder: PathBuf,
    /// What its latest checkpoint says; none where there is no checkpoint yet, or none any more.
    pub trained: Option<Trained>,
    /// The text of `experiment.yaml` and what it says.
    pub experiment: Option<(String, Value)>,
    /// A series a metric, in the order of the log: steps and what was logged at them, NaN where it was not finite.
    pub metrics: Vec<Series>,
}

/// What a checkpoint says of its training.
pub struct Trained {
    /// `autoencoder` or `diffusion`.
    pub task: String,
    /// Of the network that is trained, without a discriminator.
    pub parameters: i64,
    /// Time of training, over all starts.
    pub seconds: f64,
    /// Its seed, and what else its samples depend on.
    pub training: Seeded,
}

/// What was measured under one protocol.
pub struct Evaluation {
    /// The evaluation's folder, below the title.
    pub name: String,
    /// What the figures depend on.
    pub protocol: ProtocolText,
    /// The sets with what they are, in the order of the table.
    pub figures: Vec<(String, String, Figure)>,
    /// What was sampled and how.
    pub generated: String,
    /// The same as the settings of the evaluation.
    pub sampled: serde_json::Value,
    /// The distance between two sets of real clips.
    pub real_vs_real: Option<RealVsReal>,
    /// Of reconstructed real clips.
    pub psnr_db: Option<f64>,
    /// Which clips were reconstructed; none in files of early versions.
    pub psnr_of: Option<String>,
    /// Where it was measured.
    pub device: String,
    /// Protocols that it could not be measured under, and why.
    pub not_measured: BTreeMap<String, String>,
}

/// How the metrics of a card answer to faults of videos.
pub struct SensitivityTable {
    /// The card, below the title.
    pub name: String,
    /// Under which protocol.
    pub protocol_hash: String,
    /// Fault, what it does, and the distance of real clips with it from other real clips.
    pub rows: Vec<(String, String, Figure)>,
}

/// A protocol as a file of figures has it.
#[derive(Debug, Clone, PartialEq)]
pub struct ProtocolText {
    /// What people call it.
    pub name: String,
    /// Equal protocols have equal hashes.
    pub hash: String,
    /// One line; none of long evaluations.
    pub text: Option<String>,
    /// All of it, as JSON.
    pub whole: String,
}

/// What `lvdm evaluate reconstruction` found.
pub struct Reconstruction {
    /// The folder, below the title.
    pub name: String,
    /// Name, mean, standard deviation over clips, what it means.
    pub measures: Vec<(&'static str, f64, f64, &'static str)>,
    /// What they depend on.
    pub text: String,
}

/// Windows along long videos.
pub struct LongEvaluation {
    /// The evaluation's folder, below the title.
    pub name: String,
    /// What the figures depend on.
    pub protocol: ProtocolText,
    /// One a method.
    pub curves: Vec<LongCurve>,
    /// The distance between two sets of real clips.
    pub real_vs_real: Option<Distances>,
    /// Where it was measured.
    pub device: String,
}

/// One method's windows.
pub struct LongCurve {
    /// Of the method.
    pub name: String,
    /// In their order.
    pub windows: Vec<Window>,
    /// Mean absolute difference of neighbouring frames, in grey levels.
    pub motion: Option<f64>,
    /// The same where decoded chunks meet, over its median elsewhere.
    pub seam: Option<f64>,
    /// All that the videos depend on, as JSON.
    pub settings: String,
}

/// One window of long videos against real clips.
pub struct Window {
    /// Of the video.
    pub first_frame: i64,
    /// By metric.
    pub distances: Distances,
    /// 95 %, of the metrics that have one.
    pub intervals: BTreeMap<Metric, Interval>,
}

/// Videos of a folder.
pub struct Gallery {
    /// The folder, below the title.
    pub name: String,
    /// Those that are shown.
    pub videos: Vec<Video>,
    /// How many the folder has, and why not all are shown.
    pub count: usize,
    /// Why not all are.
    pub cut: Option<String>,
}

/// A video with its bytes.
pub struct Video {
    /// Of the file.
    pub name: String,
    /// What it was asked for with.
    pub prompt: Option<String>,
    /// mp4, or an animated GIF where a binary could not write mp4.
    pub bytes: Vec<u8>,
}

/// A sheet of frames. Evaluations of several runs with one autoencoder have the same sheets of it, which are shown once.
pub struct Sheet {
    /// The files that are this picture, by their paths below the title; at least one.
    pub files: Vec<String>,
    /// What is to be seen.
    pub caption: &'static str,
    /// PNG.
    pub bytes: Vec<u8>,
}

#[cfg(test)]
impl Training {
    /// A run with a name and the text of its experiment alone.
    pub(super) fn of(name: &str, text: &str) -> Self {
        let value = serde_yaml::from_str(text).unwrap();
        let (name, folder) = (name.into(), name.into());
        Training { name, folder, trained: None, experiment: Some((text.into(), value)), metrics: Vec::new() }
    }
}
