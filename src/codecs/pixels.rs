//! No codec: pixels are the latents (`autoencoder: pixels`). What latent diffusion is compared with. It has nothing to train,
//! so that no experiment names it as a codec.

use anyhow::Result;
use tch::Tensor;

use super::{CodecSettings, Encoded, EncodedKind, LongDecoding, VideoCodec};
use crate::nn::Scope;

/// Clips as they are, `[3, F, H, W]` in [−1, 1].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pixels;

impl Pixels {
    /// Frames that are handed on at a time, so that memory does not grow with a video's length.
    pub(super) const AT_ONCE: i64 = 8;
}

impl CodecSettings for Pixels {
    fn name(&self) -> &'static str {
        "pixels"
    }

    fn latent_channels(&self) -> i64 {
        3
    }

    fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        Ok([3, frames, height, width])
    }

    fn clip_shape(&self, latent: [i64; 3]) -> [i64; 3] {
        latent
    }

    fn long_decoding(&self) -> LongDecoding {
        LongDecoding::FrameByFrame { at_once: Self::AT_ONCE }
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn encodes_to(&self) -> EncodedKind {
        EncodedKind::Exact
    }

    fn flops(&self, _frames: i64, _height: i64, _width: i64) -> [i64; 2] {
        [0; 2]
    }

    fn build(&self, _: &Scope) -> Box<dyn VideoCodec> {
        Box::new(*self)
    }
}

impl VideoCodec for Pixels {
    fn encode(&self, x: &Tensor) -> Encoded {
        Encoded::Exact(x.shallow_clone())
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        z.shallow_clone()
    }

    fn settings(&self) -> &dyn CodecSettings {
        self
    }
}
