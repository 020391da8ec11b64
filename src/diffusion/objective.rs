//! What the denoiser is trained on (paper, equation 5; with given frames, equation 6).

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    kinds::LossWeightConfig,
    learned_variance::HybridLoss,
    path::{NoisePath, Times},
    prediction::Predict,
};
use crate::networks::{Inputs, Network};

/// How a prediction is compared with its target, averaged over all elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// |x̂ − x|, mean over all.
    L1,
    /// The mean square.
    L2,
    /// The mean square of the noise and, for a network that learns the variance of reverse steps too, the variational
    /// bound through that (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1).
    LearnedVariance,
}

/// What the errors of all elements are made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Their mean.
    #[default]
    Mean,
    /// Their sum over a clip, a square counted half, and of these the mean over clips: the released loss of MCVD. Its gradient
    /// is so large that `trainer.clip_gradient` always acts.
    Sum,
}

/// The released setting is noise and L1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Objective {
    /// What the network predicts.
    pub predict: Predict,
    /// Between the prediction and what it should be.
    pub loss: Loss,
    /// Mean or sum over the elements of a clip.
    #[serde(skip_serializing_if = "is_mean")]
    #[schemars(extend("default" = "mean"))]
    pub reduction: Reduction,
    /// How much the error at each time counts; other than constant only with `loss: l2`.
    pub weight: LossWeightConfig,
}

fn is_mean(reduction: &Reduction) -> bool {
    *reduction == Reduction::Mean
}

impl Default for Objective {
    fn default() -> Self {
        Objective {
            predict: Predict::Noise,
            loss: Loss::L1,
            reduction: Reduction::Mean,
            weight: LossWeightConfig::default(),
        }
    }
}

/// What the loss of one training step is computed from.
pub struct NoisyBatch<'a> {
    /// Clean latents, `[B, C, F, h, w]`.
    pub z_0: &'a Tensor,
    /// Standard normal noise of the shape of z_0.
    pub noise: &'a Tensor,
    /// The diffusion times, one for each clip or one for each frame.
    pub times: &'a Times,
    /// The conditions of the network.
    pub given: &'a Inputs,
    /// The times of the frames that `given.mask` marks, which carry the same noise; without times, these frames are clean.
    pub given_times: Option<&'a Times>,
    /// Whether given frames are left out of the loss.
    pub made_only: bool,
}

impl Objective {
    /// Checks that prediction, loss, weight and path fit together.
    ///
    /// # Errors
    /// Names what does not fit.
    pub fn validate(&self, path: &dyn NoisePath) -> Result<()> {
        self.weight.validate().context("weight")?;
        ensure!(
            self.weight.is_constant() || self.loss == Loss::L2,
            "weight: it is of the squared error, and loss is {}: write loss: l2",
            if self.loss == Loss::L1 { "l1" } else { "learned_variance" }
        );
        ensure!(
            self.reduction == Reduction::Mean || !self.learns_variance(),
            "reduction: loss: learned_variance is a mean: leave reduction out"
        );
        ensure!(
            !self.learns_variance() || self.predict == Predict::Noise,
            "loss: learned_variance is for predict: noise, of which the bound is made, not {:?}",
            self.predict
        );
        ensure!(
            !self.learns_variance() || path.discrete().is_some_and(|schedule| !schedule.ends_in_noise()),
            "loss: learned_variance is for a schedule of steps that does not end in noise alone"
        );
        ensure!(
            self.predict == Predict::Edm || path.input_scale(path.noisiest()) == 1.0,
            "predict: this schedule scales what the network sees of z_t, which is one half of EDM's preconditioning; the \
             other half is what the network predicts: write objective: {{predict: edm, loss: l2}}"
        );
        self.predict.check(path, &[path.noisiest()]).context("predict")
    }

    /// Whether the network also predicts the variance of reverse steps, in as many further channels.
    pub fn learns_variance(&self) -> bool {
        self.loss == Loss::LearnedVariance
    }

    /// Computes what [`Self::loss`] takes from the host at these times, so that the loss itself takes nothing from there.
    pub fn prepare(&self, path: &dyn NoisePath, times: &Times) {
        match path.discrete() {
            Some(schedule) if self.learns_variance() => HybridLoss::prepare(schedule, times),
            _ => {
                self.predict.prepare(times);
                let _ = self.weight_at(times);
            }
        }
    }

    /// How much the error at each time counts, where that differs.
    fn weight_at(&self, times: &Times) -> Option<Tensor> {
        let compute = || times.compute("weight", |_, rates| [self.weight.at(self.predict, rates)]);
        (!self.weight.is_constant()).then(compute).map(|[weight]| weight)
    }

    /// The loss of one batch, a scalar (paper, equation 5; with given frames, equation 6).
    ///
    /// # Panics
    /// With a learned variance on a path that is no schedule of discrete steps; [`Self::validate`] refuses it.
    pub fn loss(&self, network: &dyn Network, path: &dyn NoisePath, batch: &NoisyBatch) -> Tensor {
        let NoisyBatch { z_0, noise, times, given, given_times, made_only } = *batch;
        let mut z_t = times.add_noise(z_0, noise);
        let (b, _, f, h, w) = z_0.size5().expect("latents [B, C, F, h, w]");
        let mask = given.mask.as_ref().map(|mask| mask.to_kind(z_0.kind()).expand([b, 1, f, h, w], false));
        if let Some(mask) = &mask {
            let frames = given_times.map_or_else(|| z_0.shallow_clone(), |times| times.add_noise(z_0, noise));
            z_t = z_t * (1.0 - mask) + frames * mask;
        }
        let prediction = network.forward(&times.scaled(z_t.shallow_clone()), times.embedded(), given);
        if self.learns_variance() {
            let schedule = path.discrete().expect("a learned variance is one of a schedule's steps");
            return HybridLoss::new(schedule, &prediction, z_0, &z_t, times, noise).mean();
        }
        let target = self.predict.target(z_0, noise, times);
        let target = match &mask {
            None => target,
            // on given frames: by the noise that was put on them
            Some(mask) => {
                let of_given = match (given_times, self.predict) {
                    (Some(times), _) => self.predict.target(z_0, noise, times),
                    (None, Predict::Noise | Predict::Velocity) => noise.zeros_like(),
                    (None, Predict::Z0) => z_0.shallow_clone(),
                    (None, Predict::Flow) => -z_0,
                    (None, Predict::Edm) => z_0.zeros_like(),
                };
                target * (1.0 - mask) + of_given * mask
            }
        };
        let prediction = if prediction.kind() == Kind::BFloat16 { prediction.to_kind(Kind::Float) } else { prediction };
        let compare = |reduction| match self.loss {
            Loss::L1 => prediction.l1_loss(&target, reduction),
            Loss::L2 | Loss::LearnedVariance => prediction.mse_loss(&target, reduction),
        };
        // from the mean over all elements to the mean over clips of a clip's sum
        let elements = (target.numel() as i64 / b) as f64;
        let scale = match (self.reduction, self.loss) {
            (Reduction::Mean, _) => None,
            (Reduction::Sum, Loss::L1) => Some(elements),
            (Reduction::Sum, Loss::L2 | Loss::LearnedVariance) => Some(0.5 * elements),
        };
        let weight = self.weight_at(times).map(|weight| weight.to_kind(z_0.kind()));
        let of_each = || match &weight {
            Some(weight) => compare(tch::Reduction::None) * weight,
            None => compare(tch::Reduction::None),
        };
        let mean = match mask {
            Some(mask) if made_only => {
                let made: Tensor = 1.0 - mask;
                let made = made.expand_as(&target);
                (of_each() * &made).sum(None) / made.sum(None)
            }
            _ if weight.is_some() => of_each().mean(None),
            _ => compare(tch::Reduction::Mean),
        };
        match scale {
            Some(scale) => mean * scale,
            None => mean,
        }
    }
}
