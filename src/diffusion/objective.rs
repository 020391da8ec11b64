//! What the denoiser is trained on (paper, equation 5; with given frames, equation 6).

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

use super::{HybridLoss, NoiseSchedule, Predict};
use crate::networks::{Inputs, Network};

/// How a prediction is compared with its target, averaged over all elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// |x̂ − x|, mean over all.
    L1,
    /// The mean square.
    L2,
    /// The mean square of the noise and, for a network that learns the variance of reverse steps too, the variational
    /// bound through that: see [`HybridLoss`].
    LearnedVariance,
}

/// The released setting is noise and L1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Objective {
    /// What the network predicts.
    pub predict: Predict,
    /// Between the prediction and what it should be.
    pub loss: Loss,
}

impl Default for Objective {
    fn default() -> Self {
        Objective { predict: Predict::Noise, loss: Loss::L1 }
    }
}

impl Objective {
    /// Whether the network gives the variance of reverse steps, in as many channels more.
    pub fn learns_variance(&self) -> bool {
        self.loss == Loss::LearnedVariance
    }

    /// # Errors
    /// A learned variance beside another prediction than the noise.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            !self.learns_variance() || self.predict == Predict::Noise,
            "loss: learned_variance is for predict: noise, of which the bound is made, not {:?}",
            self.predict
        );
        Ok(())
    }

    /// The loss of one batch: z_0 and noise `[B, C, F, h, w]`, t `[B]` int64. Frames that `given.mask` names carry the same
    /// noise at the level `given.level`, without one none; with `made_only` the loss is the mean over the other frames.
    pub fn loss(
        &self,
        network: &dyn Network,
        schedule: &NoiseSchedule,
        z_0: &Tensor,
        t: &Tensor,
        noise: &Tensor,
        given: &Inputs,
        made_only: bool,
    ) -> Tensor {
        let mut z_t = schedule.add_noise(z_0, t, noise);
        let (b, _, f, h, w) = z_0.size5().expect("latents [B, C, F, h, w]");
        let mask = given.mask.as_ref().map(|mask| mask.to_kind(z_0.kind()).expand([b, 1, f, h, w], false));
        if let Some(mask) = &mask {
            let frames = match &given.level {
                Some(s) => schedule.add_noise(z_0, s, noise),
                None => z_0.shallow_clone(),
            };
            z_t = z_t * (1.0 - mask) + frames * mask;
        }
        let prediction = network.forward(&z_t, t, given);
        if self.learns_variance() {
            return HybridLoss::new(schedule, &prediction, z_0, &z_t, t, noise).mean();
        }
        let target_at = |t: &Tensor| match self.predict {
            Predict::Z0 => z_0.shallow_clone(),
            Predict::Noise => noise.shallow_clone(),
            Predict::Velocity => schedule.velocity(z_0, t, noise),
        };
        let target = match &mask {
            None => target_at(t),
            // on given frames: by the noise that was put on them
            Some(mask) => {
                let of_given = match (&given.level, self.predict) {
                    (Some(s), _) => target_at(s),
                    (None, Predict::Z0) => z_0.shallow_clone(),
                    (None, Predict::Noise | Predict::Velocity) => noise.zeros_like(),
                };
                target_at(t) * (1.0 - mask) + of_given * mask
            }
        };
        let prediction = if prediction.kind() == Kind::BFloat16 { prediction.to_kind(Kind::Float) } else { prediction };
        let compare = |reduction| match self.loss {
            Loss::L1 => prediction.l1_loss(&target, reduction),
            Loss::L2 | Loss::LearnedVariance => prediction.mse_loss(&target, reduction),
        };
        match mask {
            Some(mask) if made_only => {
                let made: Tensor = 1.0 - mask;
                let made = made.expand_as(&target);
                (compare(Reduction::None) * &made).sum(None) / made.sum(None)
            }
            _ => compare(Reduction::Mean),
        }
    }
}
