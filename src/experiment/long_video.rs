//! Long videos: how they are made, and curves along them.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    protocols::EvaluationConfig,
    training::{Numerics, Precision},
    validate::{Experiment, check_data},
};
use crate::{
    data::DataConfig,
    diffusion::{GuidanceConfig, SamplerChoice},
    metrics::ProtocolConfig,
};

/// How long videos are made: `lvdm sample-long`, and each sampled curve of `lvdm evaluate-long`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LongVideoConfig {
    /// The run that begins the video and continues it: a diffusion trained with `conditioning` or `blocks` or, with
    /// `guidance.reconstruction`, any; or a transformer over codes.
    pub prediction: PathBuf,
    /// One that fills gaps: hierarchical generation. Without it generation is autoregressive.
    #[serde(default)]
    pub interpolation: Option<PathBuf>,
    /// Latent frames that a clip is given of the one before; not read for a run with `blocks`, whose past it is.
    #[serde(default = "one")]
    pub overlap: i64,
    /// Latent frames from one sparse frame to the next; the prediction run's `latent_stride` where it is not said.
    #[serde(default)]
    pub gap: Option<i64>,
    /// Weight, form and level of guidance; none for a run with `blocks`.
    #[serde(default)]
    pub guidance: GuidanceConfig,
    /// Of every clip; where it is not said, each run's own.
    #[serde(default)]
    pub sampler: Option<SamplerChoice>,
    /// Clips in one pass of the networks.
    #[serde(default = "batch")]
    pub batch: i64,
    /// Of the networks when they sample and decode.
    #[serde(default)]
    pub precision: Precision,
    /// On a GPU, what they compute in float32 is rounded to TF32.
    #[serde(default)]
    pub tf32: bool,
}

impl LongVideoConfig {
    /// How exactly the networks compute.
    pub fn numerics(&self) -> Numerics {
        Numerics { precision: self.precision, tf32: self.tf32 }
    }
}

/// How a curve's videos are made by one run, each in one piece: as `lvdm sample --frames` makes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WholeVideoConfig {
    /// A run of any kind that makes videos of `frames` frames.
    pub run: PathBuf,
    /// The run's own where it is not said; without `kind` some of its settings (`{steps: 20}`).
    #[serde(default)]
    pub sampler: Option<SamplerChoice>,
    /// Videos in one pass of the model.
    #[serde(default = "batch")]
    pub batch: i64,
    /// Of the networks when they sample and decode.
    #[serde(default)]
    pub precision: Precision,
    /// On a GPU, what they compute in float32 is rounded to TF32.
    #[serde(default)]
    pub tf32: bool,
}

impl WholeVideoConfig {
    /// How exactly the networks compute.
    pub fn numerics(&self) -> Numerics {
        Numerics { precision: self.precision, tf32: self.tf32 }
    }
}

/// Long videos measured window by window, as curves in one figure: `lvdm evaluate-long FILE`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LongEvaluationExperiment {
    /// Seed by which real clips are drawn and videos are sampled.
    #[serde(default)]
    pub seed: u64,
    /// Videos of each curve.
    pub videos: u64,
    /// Frames of each video.
    pub frames: i64,
    /// Protocol, or number of clips.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// Clips that nothing was trained on; a window is as long as one of them.
    pub real: DataConfig,
    /// Clips that the models were trained on: their distance from the real clips is a baseline.
    #[serde(default)]
    pub train: Option<DataConfig>,
    /// One a method, in the order of the legend.
    pub curves: Vec<Curve>,
    /// Where curves, videos and figures are put.
    pub out: PathBuf,
}

/// One curve.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// What the curve is measured on.
    pub source: CurveSource,
}

impl Curve {
    /// Its folder: the name in small letters, digits and hyphens.
    pub fn folder(&self) -> String {
        let letters = self.name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { ' ' });
        letters.collect::<String>().split_whitespace().collect::<Vec<_>>().join("-")
    }
}

/// Where a curve's videos come from.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum CurveSource {
    /// Sampled clip by clip, from a run that continues videos and perhaps a second one that fills gaps.
    Sampled(LongVideoConfig),
    /// Sampled from one run, each video in one piece.
    Run(WholeVideoConfig),
    /// The beginnings of a dataset's first videos; `frames` is not read.
    Videos {
        /// The dataset, with its stride and resolution.
        data: DataConfig,
    },
}

impl CurveSource {
    /// The runs that are sampled; none of videos from files.
    fn runs(&self) -> Vec<&PathBuf> {
        match self {
            CurveSource::Sampled(config) => {
                [Some(&config.prediction), config.interpolation.as_ref()].into_iter().flatten().collect()
            }
            CurveSource::Run(config) => vec![&config.run],
            CurveSource::Videos { .. } => Vec::new(),
        }
    }

    /// How exactly the networks compute, where any is sampled.
    pub fn numerics_mut(&mut self) -> Option<(&mut Precision, &mut bool)> {
        match self {
            CurveSource::Sampled(config) => Some((&mut config.precision, &mut config.tf32)),
            CurveSource::Run(config) => Some((&mut config.precision, &mut config.tf32)),
            CurveSource::Videos { .. } => None,
        }
    }
}

impl LongEvaluationExperiment {
    /// How each window is measured.
    ///
    /// # Errors
    /// A protocol that does not fit: one that has several runs or measures other windows.
    pub fn protocol(&self) -> Result<ProtocolConfig> {
        let protocol = self.evaluation.resolve(&self.real).context("evaluation")?;
        ensure!(
            protocol.runs == 1 && protocol.drop_partial_batch.is_none() && protocol.draw.is_endless(),
            "evaluation: the protocol {} is one of clips; windows are measured by lvdm1024 or by a number of clips",
            protocol.name
        );
        if let Some(whole) = protocol.windows_of {
            ensure!(whole == self.frames, "frames is {}, and the protocol {} says {whole}", self.frames, protocol.name);
        }
        Ok(protocol)
    }
}

impl Experiment for LongEvaluationExperiment {
    fn validate(&self) -> Result<()> {
        self.protocol()?;
        check_data(&self.real).context("real")?;
        if let Some(train) = &self.train {
            check_data(train).context("train")?;
        }
        ensure!(self.videos >= 2, "videos must be at least 2, not {}", self.videos);
        ensure!(self.videos <= 10_000_000, "videos must be at most 10,000,000, not {}", self.videos);
        ensure!(
            self.frames >= self.real.frames,
            "frames: {} make no window of real.frames = {}",
            self.frames,
            self.real.frames
        );
        ensure!(!self.curves.is_empty(), "curves: at least one is needed");
        let mut folders = std::collections::BTreeSet::new();
        for curve in &self.curves {
            let folder = curve.folder();
            ensure!(!folder.is_empty(), "curves: the name `{}` has no letter", curve.name);
            ensure!(folders.insert(folder), "curves: `{}` has the folder of another curve", curve.name);
            match &curve.source {
                CurveSource::Videos { data } => check_data(data).with_context(|| curve.name.clone())?,
                source => {
                    for run in source.runs() {
                        ensure!(run.exists(), "{}: there is no {} (train it first)", curve.name, run.display());
                    }
                    if let CurveSource::Run(WholeVideoConfig { batch, .. }) = source {
                        ensure!(*batch >= 1, "{}: batch must be at least 1, not {batch}", curve.name);
                    }
                }
            }
        }
        Ok(())
    }
}

fn one() -> i64 {
    1
}

fn batch() -> i64 {
    16
}
