//! What a frozen network must offer for its features to be compared.

use anyhow::Result;
use tch::Tensor;

/// A frozen network, or another fixed computation, whose features of videos a metric compares.
pub trait FeatureExtractor {
    /// What a protocol calls it.
    fn name(&self) -> &str;

    /// The SHA-256 of its weight file, empty where it has no weights: figures of other weights cannot be compared.
    fn weights_sha256(&self) -> &str;

    /// Numbers in one row of features.
    fn width(&self) -> i64;

    /// Frames that a video must have at least.
    fn least_frames(&self) -> i64;

    /// How videos are prepared before the network sees them, in a few words: size, filter.
    fn preparation(&self) -> &str;

    /// Features in float32 of u8 videos `[N, F, H, W, 3]`: one row a video, `[N, width]`, or several rows a video,
    /// such as one for each frame, `[N, rows, width]`. A video's features do not depend on the other videos.
    ///
    /// # Errors
    /// Another shape or type, too few frames.
    fn features(&self, videos: &Tensor) -> Result<Tensor>;
}
