//! Training of a video autoencoder.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    training::{OptimizerConfig, TrainerConfig},
    validate::{Experiment, check_clip, check_data},
};
use crate::{autoencoder_loss::CodecLossConfig, codecs::CodecConfig, data::DataConfig};

/// Training of an autoencoder: `lvdm train autoencoder FILE`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AutoencoderExperiment {
    /// Seed of initial weights, crops, shuffles and noise.
    #[serde(default)]
    pub seed: u64,
    /// The clips to train on.
    pub data: DataConfig,
    /// The network: the video autoencoder, or what `kind` says.
    #[serde(default)]
    pub autoencoder: CodecConfig,
    /// The losses: LVDM's, as in the paper where nothing is said, or what `kind` says.
    #[serde(default)]
    pub loss: CodecLossConfig,
    /// The optimizer; the autoencoder and its discriminators each get one of their own.
    pub optimizer: OptimizerConfig,
    /// Steps, batches, checkpoints, log.
    pub trainer: TrainerConfig,
}

impl Experiment for AutoencoderExperiment {
    fn validate(&self) -> Result<()> {
        check_data(&self.data)?;
        self.check_settings()
    }
}

impl AutoencoderExperiment {
    /// As [`Experiment::validate`], but for whether the data are there.
    ///
    /// # Errors
    /// Names the key and the rule.
    pub fn check_settings(&self) -> Result<()> {
        check_clip(&self.data)?;
        self.autoencoder.validate().context("autoencoder")?;
        self.autoencoder.latent_shape(self.data.frames, self.data.resolution, self.data.resolution).context("data")?;
        self.loss.validate().context("loss")?;
        ensure!(
            self.autoencoder.codebook().is_none() || self.loss.is_regularized(),
            "loss: kl_weight is 0, so that nothing would hold the encoder to the codebook; give `loss: {{kind: tats}}`, or \
             the weight of the commitment as kl_weight"
        );
        ensure!(
            self.autoencoder.codebook().is_none() || self.trainer.ema_decay.is_none(),
            "trainer.ema_decay: the codebook and running statistics are those of the last weights, not of their average: write \
             null"
        );
        self.optimizer.validate().context("optimizer")?;
        self.trainer.validate().context("trainer")
    }
}
