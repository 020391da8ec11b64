//! What the denoiser is trained on (paper, equation 5; with given frames, equation 6).

use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

use super::{NoiseSchedule, Predict};
use crate::networks::{UNet3d, UNetCondition};

/// How a prediction is compared with its target, averaged over all elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// |x̂ − x|, mean over all.
    L1,
    /// The mean square.
    L2,
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

/// Frames that a training sample is given.
pub struct GivenFrames {
    /// `[B, 1, F, h, w]` or anything that expands to it: one where a frame is given.
    pub mask: Tensor,
    /// `[B]` int64: the noise level s that given frames carry, and the row of the class embedding; none for clean ones.
    pub level: Option<Tensor>,
    /// The noise at that level, `[B, C, F, h, w]`.
    pub noise: Tensor,
    /// The loss is the mean over frames that are not given.
    pub masked_loss: bool,
}

/// What a batch is given besides z_t and t; by default nothing.
#[derive(Default)]
pub struct Condition {
    /// Frames with their mask.
    pub frames: Option<GivenFrames>,
    /// Encoded texts `[B, S, context_width]`.
    pub text: Option<Tensor>,
}

impl Objective {
    /// The loss of one batch: z_0 and noise `[B, C, F, h, w]`, t `[B]` int64.
    pub fn loss(
        &self,
        unet: &UNet3d,
        schedule: &NoiseSchedule,
        z_0: &Tensor,
        t: &Tensor,
        noise: &Tensor,
        given: &Condition,
    ) -> Tensor {
        let z_t = schedule.add_noise(z_0, t, noise);
        let context = given.text.as_ref().map(Tensor::shallow_clone);
        let (prediction, given_frames) = match &given.frames {
            None => (unet.forward(&z_t, t, &UNetCondition { level: None, context }), None),
            Some(given) => {
                let (b, _, f, h, w) = z_0.size5().expect("latents [B, C, F, h, w]");
                let mask = given.mask.to_kind(z_0.kind()).expand([b, 1, f, h, w], false);
                let frames = match &given.level {
                    Some(s) => schedule.add_noise(z_0, s, &given.noise),
                    None => z_0.shallow_clone(),
                };
                let z = z_t * (1.0 - &mask) + frames * &mask;
                let condition = UNetCondition { level: given.level.as_ref().map(Tensor::shallow_clone), context };
                let output = unet.forward(&Tensor::cat(&[z, mask.shallow_clone()], 1), t, &condition);
                (output, Some((mask, given)))
            }
        };
        // of a frame that carries `noise` at the levels `t`
        let target_at = |t: Option<&Tensor>, noise: &Tensor| match self.predict {
            Predict::Z0 => z_0.shallow_clone(),
            Predict::Noise => noise.shallow_clone(),
            Predict::Velocity => t.map_or_else(|| noise.shallow_clone(), |t| schedule.velocity(z_0, t, noise)),
        };
        let target = match &given_frames {
            None => target_at(Some(t), noise),
            // on given frames: by the noise that was put on them
            Some((mask, given)) => {
                target_at(Some(t), noise) * (1.0 - mask) + target_at(given.level.as_ref(), &given.noise) * mask
            }
        };
        let prediction = if prediction.kind() == Kind::BFloat16 { prediction.to_kind(Kind::Float) } else { prediction };
        let compare = |reduction| match self.loss {
            Loss::L1 => prediction.l1_loss(&target, reduction),
            Loss::L2 => prediction.mse_loss(&target, reduction),
        };
        match given_frames {
            Some((mask, given)) if given.masked_loss => {
                let made: Tensor = 1.0 - mask;
                let made = made.expand_as(&target);
                (compare(Reduction::None) * &made).sum(None) / made.sum(None)
            }
            _ => compare(Reduction::Mean),
        }
    }
}
