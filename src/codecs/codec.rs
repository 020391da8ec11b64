//! The interface of codecs, which turn clips into latents and back.

use std::fmt::Debug;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    distributed::Ranks,
    nn::{Scope, full_precision},
};

/// A codec with its weights: it encodes clips to latents and decodes latents to clips.
pub trait VideoCodec {
    /// Encodes clips x `[B, 3, F, H, W]` in [−1, 1].
    fn encode(&self, x: &Tensor) -> Encoded;

    /// Decodes raw latents `[B, C, F', h, w]` to clips `[B, 3, F, H, W]`, nominally in [−1, 1] and not clamped.
    fn decode(&self, z: &Tensor) -> Tensor;

    /// The settings of which it was built.
    fn settings(&self) -> &dyn CodecSettings;

    /// The vectors `[B, C, F', h, w]` of entries of the codebook, by their numbers, integers `[B, F', h, w]`: what
    /// [`decode`](Self::decode) takes.
    ///
    /// # Errors
    /// A codec without a codebook.
    fn vectors(&self, _codes: &Tensor) -> Result<Tensor> {
        bail!("a {} has no codebook, so that there are no codes to decode", self.settings().name())
    }

    /// Called before training; `ranks` are those that train together.
    fn begin_training(&mut self, _ranks: &Ranks, _seed: u64) {}

    /// A forward pass in training: what clips x `[B, 3, F, H, W]` are encoded to, and their reconstruction. What moves
    /// without a gradient (running statistics, a codebook) follows the batch where it `learns`, and stays in another pass
    /// over the same batch. Noise `[B, C, F', h, w]` is that of a Gaussian.
    fn train_pass(&self, x: &Tensor, noise: &Tensor, _learns: bool) -> (Encoded, Tensor) {
        let encoded = self.encode(x);
        let reconstruction = self.decode(&encoded.sample(noise));
        (encoded, reconstruction)
    }

    /// Called once a step, after all passes that learn: a codebook takes in what they have gathered.
    fn after_passes(&self, _step: i64) {}

    /// What the log of a training says of a pass beside the losses: scalars on the device.
    fn training_terms(&self, _encoded: &Encoded) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    /// The kernel of the decoder's last convolution, at which the adaptive weight of the adversarial loss is measured (Esser
    /// et al. 2021, arXiv 2012.09841, equation 7); none for a codec that is not trained.
    fn last_kernel(&self) -> Option<&Tensor> {
        None
    }
}

/// The settings of a codec, and the arithmetic of shapes that follows from them before any tensor exists.
pub trait CodecSettings: Debug + Send + Sync {
    /// Its name in messages and reports.
    fn name(&self) -> &'static str;

    /// Checks the settings, without building anything.
    ///
    /// # Errors
    /// Names the number that does not fit, and the rule.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// The number of channels C of a latent.
    fn latent_channels(&self) -> i64;

    /// How many entries its codebook has; none where it has no codebook.
    fn codebook(&self) -> Option<i64> {
        None
    }

    /// The shape `[C, F', h, w]` of the latent of a clip.
    ///
    /// # Errors
    /// If clips of this size have no latent; says which clips have one.
    fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]>;

    /// The shape `[F, H, W]` of the clip that a latent of the shape `[F', h, w]` decodes to.
    fn clip_shape(&self, latent: [i64; 3]) -> [i64; 3];

    /// The number of latent frames F' of a clip of so many frames; none if such clips have no latent.
    fn latent_frames(&self, frames: i64) -> Option<i64> {
        let [_, height, width] = self.clip_shape([1; 3]);
        self.latent_shape(frames, height, width).ok().map(|[_, latent, ..]| latent)
    }

    /// How latents are decoded that are longer than the clips on which the decoder was trained, or than what fits into
    /// memory.
    fn long_decoding(&self) -> LongDecoding;

    /// Whether decoding gives back every clip exactly, so that reconstructions need not be measured.
    fn is_exact(&self) -> bool {
        false
    }

    /// Whether it encodes to a Gaussian or to the latent itself.
    fn encodes_to(&self) -> EncodedKind {
        EncodedKind::Gaussian
    }

    /// Floating-point operations of encoding and of decoding one clip of such a length and size, two a multiply-add:
    /// convolutions, linear maps and the products of attention.
    fn flops(&self, frames: i64, height: i64, width: i64) -> [i64; 2];

    /// Builds the codec and declares its parameters under `scope`.
    fn build(&self, scope: &Scope) -> Box<dyn VideoCodec>;
}

/// How a long latent is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongDecoding {
    /// Each latent frame is decoded independently of the others, `at_once` of them at a time.
    FrameByFrame {
        /// Latent frames that are decoded at a time.
        at_once: i64,
    },
    /// Latents are decoded in chunks of the length of the training clips. Neighbouring chunks share half of their frames,
    /// which are cross-faded.
    Overlapping {
        /// The number of frames at each end of a decoded chunk that depend on where the chunk was cut.
        reach: i64,
    },
}

/// What a codec makes of clips.
#[derive(Debug)]
pub enum Encoded {
    /// A Gaussian over latents.
    Gaussian(Posterior),
    /// Entries of a codebook.
    Codes {
        /// Their numbers, integers `[B, F', h, w]`.
        indices: Tensor,
        /// Their vectors `[B, C, F', h, w]`; in training the gradient by them is that by the encoder's output.
        z: Tensor,
        /// How far the encoder's output lies from them, with its weight, `[B]`: what training adds to the loss.
        commitment: Tensor,
    },
    /// The latent itself, `[B, C, F', h, w]`.
    Exact(Tensor),
}

/// The Gaussian that an encoder makes of a clip; both tensors `[B, C, F', h, w]`.
#[derive(Debug)]
pub struct Posterior {
    /// Of each value of the latent.
    pub mean: Tensor,
    /// The logarithm of the variance.
    pub logvar: Tensor,
}

impl Posterior {
    /// The mean and logvar that an encoder gives as channels of one tensor, `[B, 2C, F', h, w]`; logvar is clamped to
    /// [−30, 20].
    pub fn from_moments(moments: &Tensor) -> Self {
        let halves = moments.chunk(2, 1);
        Posterior { mean: halves[0].shallow_clone(), logvar: halves[1].clamp(-30.0, 20.0) }
    }

    /// mean + exp(logvar/2)·noise, all `[B, C, F', h, w]`.
    pub fn sample(&self, noise: &Tensor) -> Tensor {
        &self.mean + (&self.logvar * 0.5).exp() * noise
    }

    /// KL divergence from N(0, I), summed over a latent: `[B]`, never in half precision.
    pub fn kl(&self) -> Tensor {
        let (mean, logvar) = (full_precision(&self.mean), full_precision(&self.logvar));
        let terms: Tensor = (mean.square() + logvar.exp() - 1.0 - &logvar) * 0.5;
        terms.flatten(1, -1).sum_dim_intlist([-1i64].as_slice(), false, None)
    }
}

/// In which form latents are stored and handed on as one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EncodedKind {
    /// Mean and logvar, stacked: `[B, 2C, F', h, w]`.
    #[default]
    Gaussian,
    /// The latent, or the vectors of its codes: `[B, C, F', h, w]`.
    Exact,
}

impl EncodedKind {
    /// Channels of the tensor for each of the latent's.
    pub fn tensors(self) -> i64 {
        match self {
            EncodedKind::Gaussian => 2,
            EncodedKind::Exact => 1,
        }
    }
}

impl Encoded {
    /// The likeliest latent, `[B, C, F', h, w]`.
    pub fn mode(&self) -> &Tensor {
        match self {
            Encoded::Gaussian(posterior) => &posterior.mean,
            Encoded::Codes { z, .. } | Encoded::Exact(z) => z,
        }
    }

    /// The numbers of entries of the codebook, integers `[B, F', h, w]`, of what a codec with a codebook made.
    pub fn codes(&self) -> Option<&Tensor> {
        match self {
            Encoded::Codes { indices, .. } => Some(indices),
            Encoded::Gaussian(_) | Encoded::Exact(_) => None,
        }
    }

    /// A latent, `[B, C, F', h, w]`; noise of its shape is used by a Gaussian alone.
    pub fn sample(&self, noise: &Tensor) -> Tensor {
        match self {
            Encoded::Gaussian(posterior) => posterior.sample(noise),
            Encoded::Codes { z, .. } | Encoded::Exact(z) => z.shallow_clone(),
        }
    }

    /// What keeps latents in bounds in training, `[B]`: the KL divergence of a Gaussian, the commitment of codes.
    pub fn regularizer(&self) -> Tensor {
        match self {
            Encoded::Gaussian(posterior) => posterior.kl(),
            Encoded::Codes { commitment, .. } => full_precision(commitment),
            Encoded::Exact(z) => Tensor::zeros([z.size()[0]], (full_precision(z).kind(), z.device())),
        }
    }

    /// Half precision is left, whatever the codec computed in.
    pub fn in_full_precision(self) -> Self {
        match self {
            Encoded::Gaussian(Posterior { mean, logvar }) => {
                Encoded::Gaussian(Posterior { mean: full_precision(&mean), logvar: full_precision(&logvar) })
            }
            Encoded::Codes { indices, z, commitment } => {
                Encoded::Codes { indices, z: full_precision(&z), commitment: full_precision(&commitment) }
            }
            Encoded::Exact(z) => Encoded::Exact(full_precision(&z)),
        }
    }

    /// As one tensor: that of its kind.
    pub fn stacked(&self) -> Tensor {
        match self {
            Encoded::Gaussian(Posterior { mean, logvar }) => Tensor::cat(&[mean, logvar], 1),
            Encoded::Codes { z, .. } | Encoded::Exact(z) => z.shallow_clone(),
        }
    }

    /// What [`Self::stacked`] made a tensor of.
    pub fn of_stacked(kind: EncodedKind, stacked: &Tensor) -> Self {
        match kind {
            EncodedKind::Gaussian => {
                let halves = stacked.chunk(2, 1);
                Encoded::Gaussian(Posterior { mean: halves[0].shallow_clone(), logvar: halves[1].shallow_clone() })
            }
            EncodedKind::Exact => Encoded::Exact(stacked.shallow_clone()),
        }
    }
}

impl From<Posterior> for Encoded {
    fn from(posterior: Posterior) -> Self {
        Encoded::Gaussian(posterior)
    }
}
