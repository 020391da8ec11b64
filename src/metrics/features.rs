//! Networks that turn a video into a vector.

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use crate::extractors::i3d::I3d;

/// A frozen network whose features a metric compares.
pub trait FeatureExtractor {
    /// What a protocol calls it.
    fn name(&self) -> &'static str;

    /// The hash of its weight file: figures of other weights cannot be compared.
    fn weights_sha256(&self) -> &str;

    /// Numbers in one video's features.
    fn width(&self) -> i64;

    /// Features `[N, width]` in float32 of u8 videos `[N, F, H, W, 3]`.
    ///
    /// # Errors
    /// Another shape or type, too few frames.
    fn features(&self, videos: &Tensor) -> Result<Tensor>;
}

impl FeatureExtractor for I3d {
    fn name(&self) -> &'static str {
        "I3D (Kinetics-400) logits"
    }

    fn weights_sha256(&self) -> &str {
        self.sha256()
    }

    fn width(&self) -> i64 {
        I3d::CLASSES
    }

    fn features(&self, videos: &Tensor) -> Result<Tensor> {
        match videos.size()[..] {
            [_, f, h, w, 3] if videos.kind() == Kind::Uint8 && h > 0 && w > 0 => {
                if f < I3d::MIN_FRAMES {
                    bail!("I3D needs videos of at least {} frames, these have {f}", I3d::MIN_FRAMES);
                }
                Ok(self.logits(videos))
            }
            _ => bail!(
                "videos must be of type Uint8 and shape [N, F, H, W, 3], these are {:?} {:?}",
                videos.kind(),
                videos.size()
            ),
        }
    }
}
