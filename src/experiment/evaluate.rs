//! Generated clips against real ones.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    protocols::EvaluationConfig,
    training::Precision,
    validate::{Experiment, check_data},
};
use crate::{data::DataConfig, diffusion::SamplerChoice, metrics::ProtocolConfig};

/// What is measured against what: `lvdm evaluate FILE`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct EvaluationExperiment {
    /// Seed by which real clips are drawn and videos are sampled.
    #[serde(default)]
    pub seed: u64,
    /// Protocol, or number of clips.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// Clips that nothing was trained on.
    pub real: DataConfig,
    /// What is measured.
    pub generated: Generated,
    /// Clips that the models were trained on: their distance from the real clips is a baseline.
    #[serde(default)]
    pub train: Option<DataConfig>,
    /// Where figures, videos and pictures are put.
    pub out: PathBuf,
}

/// Where generated clips come from.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Generated {
    /// Sampled from a run.
    Run {
        /// Its folder, or one of its checkpoints.
        run: PathBuf,
        /// The run's own where it is not said; without `kind` some of its settings (`{steps: 20}`).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sampler: Option<SamplerChoice>,
        /// Clips in one pass of the network.
        #[serde(default = "batch")]
        batch: i64,
        /// Of the networks when they sample and decode.
        #[serde(default)]
        precision: Precision,
        /// On a GPU, what they compute in float32 is rounded to TF32. The extractor never is.
        #[serde(default)]
        tf32: bool,
        /// How strongly a run follows the captions of the real videos, or the classes that it is told in turn; the run's
        /// own (`text.guidance`, `labels.guidance`) where it is not said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guidance: Option<f64>,
    },
    /// Read from files.
    Clips {
        /// The dataset, with its stride and resolution.
        data: DataConfig,
    },
}

fn batch() -> i64 {
    16
}

impl EvaluationExperiment {
    /// How clips are measured.
    ///
    /// # Errors
    /// A protocol that does not fit the data, or one of long videos.
    pub fn protocol(&self) -> Result<ProtocolConfig> {
        let protocol = self.evaluation.resolve(&self.real).context("evaluation")?;
        ensure!(
            protocol.windows_of.is_none(),
            "evaluation: the protocol {} is a curve along long videos: `lvdm evaluate-long` draws it",
            protocol.name
        );
        if let Generated::Clips { data } = &self.generated {
            let own = DataConfig { frame_stride: protocol.frame_stride.unwrap_or(data.frame_stride), ..data.clone() };
            protocol.agrees_with(&own).context("generated.data")?;
        }
        Ok(protocol)
    }
}

impl Experiment for EvaluationExperiment {
    fn validate(&self) -> Result<()> {
        self.protocol()?;
        check_data(&self.real).context("real")?;
        if let Some(train) = &self.train {
            check_data(train).context("train")?;
        }
        match &self.generated {
            Generated::Clips { data } => check_data(data).context("generated"),
            Generated::Run { run, batch, .. } => {
                ensure!(*batch >= 1, "generated.batch must be at least 1");
                ensure!(run.exists(), "generated.run: there is no {}", run.display());
                Ok(())
            }
        }
    }
}
