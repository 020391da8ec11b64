//! What a frozen network must offer for its features to be compared.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

/// A frozen network, or another fixed computation, that turns videos into the features which a metric compares.
pub trait FeatureExtractor {
    /// Its name in protocols.
    fn name(&self) -> &str;

    /// The SHA-256 of its weight file; empty if it has no weights. It is part of the protocol, since figures measured with
    /// different weights cannot be compared.
    fn weights_sha256(&self) -> &str;

    /// The number of features in a row, D.
    fn width(&self) -> i64;

    /// The smallest number of frames that a video may have.
    fn least_frames(&self) -> i64;

    /// How videos are prepared before the network sees them, in a few words: size, filter.
    fn preparation(&self) -> &str;

    /// Whether it gives several rows of features a video, such as one for each frame; else one a video.
    fn gives_rows(&self) -> bool {
        false
    }

    /// The library that computes the features, where it is not LibTorch, and its version. Figures of two versions are
    /// compared; features that are kept for later are used with their own version only.
    fn library(&self) -> Option<String> {
        None
    }

    /// Features in float32 of u8 videos `[N, F, H, W, 3]`: one row a video, `[N, width]`, or several rows a video,
    /// such as one for each frame, `[N, rows, width]`. A video's features do not depend on the other videos.
    ///
    /// # Errors
    /// Another shape or type, too few frames.
    fn features(&self, videos: &Tensor) -> Result<Tensor>;
}

/// That videos are u8 `[N, F, H, W, 3]` and have frames enough for an extractor, which is called so in the error.
///
/// # Errors
/// Another shape or type, too few frames.
pub(super) fn ensure_videos(extractor: &str, videos: &Tensor, least_frames: i64) -> Result<()> {
    let (kind, size) = (videos.kind(), videos.size());
    ensure!(
        matches!(size[..], [_, _, h, w, 3] if kind == Kind::Uint8 && h > 0 && w > 0),
        "videos must be of type Uint8 and shape [N, F, H, W, 3], these are {kind:?} {size:?}"
    );
    ensure!(
        size[1] >= least_frames,
        "{extractor} needs videos of at least {least_frames} frames, these have {}",
        size[1]
    );
    Ok(())
}
