//! Training of a transformer over codes.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    labels::ClassList,
    training::{OptimizerConfig, TrainerConfig},
    validate::{Experiment, check_clip, check_data},
};
use crate::{autoregression::CodeSampling, data::DataConfig, networks::GptConfig};

/// The classes of a transformer's sequences, each of which begins with its class.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SequenceLabels {
    /// The names of the classes, or how many there are. Without it they are those of the data, sorted, and the run keeps
    /// their names.
    pub classes: Option<ClassList>,
}

/// Training of a transformer over the codes of an autoencoder: `lvdm train transformer FILE`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct TransformerExperiment {
    /// Seed of initial weights, crops and shuffles.
    #[serde(default)]
    pub seed: u64,
    /// The clips to train on.
    pub data: DataConfig,
    /// Codes that `lvdm encode` wrote, used instead of decoding and encoding `data`.
    #[serde(default)]
    pub latents: Option<PathBuf>,
    /// A run of `lvdm train autoencoder` with a codebook, or one of its checkpoints, or a run that carries such an autoencoder.
    pub autoencoder: PathBuf,
    /// For sequences that begin with a class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<SequenceLabels>,
    /// Every n-th latent frame of a clip is what the network sees: the sparse frames of hierarchical generation.
    #[serde(default = "one")]
    pub latent_stride: i64,
    /// The network fills the gap between the first and the last latent frame of a clip, which it sees, and makes no videos
    /// alone.
    #[serde(default)]
    pub interpolation: bool,
    /// The network.
    #[serde(default)]
    pub network: GptConfig,
    /// The optimizer. Its weight decay acts on the weights of linear maps alone.
    pub optimizer: OptimizerConfig,
    /// Steps, batches, checkpoints, log.
    pub trainer: TrainerConfig,
    /// How codes are drawn where nothing else is said: for the pictures in the log, and by `lvdm sample` and `lvdm evaluate`.
    #[serde(default)]
    pub sampler: CodeSampling,
}

impl Experiment for TransformerExperiment {
    fn validate(&self) -> Result<()> {
        match &self.latents {
            Some(file) => ensure!(file.exists(), "latents: there is no {}", file.display()),
            None => check_data(&self.data)?,
        }
        ensure!(
            self.autoencoder.exists(),
            "autoencoder: there is no {} (train it first: lvdm train autoencoder …)",
            self.autoencoder.display()
        );
        self.check_settings()
    }
}

impl TransformerExperiment {
    /// As [`Experiment::validate`], but for whether what it names is there.
    ///
    /// # Errors
    /// Names the key and the rule.
    pub fn check_settings(&self) -> Result<()> {
        check_clip(&self.data)?;
        ensure!(
            (1..=self.data.frames).contains(&self.latent_stride),
            "latent_stride must be from 1 to the {} frames of a clip, not {}",
            self.data.frames,
            self.latent_stride
        );
        self.network.validate().context("network")?;
        self.optimizer.validate().context("optimizer")?;
        self.trainer.validate().context("trainer")?;
        self.sampler.validate().context("sampler")
    }
}

fn one() -> i64 {
    1
}
