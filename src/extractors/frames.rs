//! Features of single frames, blind to their order: what the frame distance compares.
//!
//! FID (Heusel et al. 2017, arXiv 1706.08500) compares images by what an ImageNet classifier has at its last
//! convolutions, averaged over the places of the image. This does the same with VGG16, whose weights are there already
//! for LPIPS: relu5_3, averaged over its 14×14 places, 512 numbers a frame. Another network has other features, so its
//! values are no FIDs and cannot be compared with any. Frames are resized as Parmar et al. 2022 (arXiv 2104.11222)
//! advise: bilinear with antialiasing, so that shrinking makes no patterns that a network would see.

use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    FeatureExtractor,
    feature_extractor::ensure_videos,
    vgg16::{Loaded, Vgg16},
};
use crate::torch::{Autocast, upload};

/// Frames are resized to this height and width, which VGG16 was trained at.
const SIDE: i64 = 224;

/// Frames that go through the network at once, which bounds its memory (40 MB a frame).
const FRAMES_AT_ONCE: i64 = 16;

/// Of a longer clip so many frames are looked at: neighbours show nearly the same picture, and features of every frame of
/// thousands of long clips would fill the memory.
const MOST_FRAMES: i64 = 16;

/// Which frames of so many are looked at, evenly from the first to the last; none where all are.
fn evenly(frames: i64) -> Option<Vec<i64>> {
    let place = |i: i64| (i * (frames - 1) + (MOST_FRAMES - 1) / 2) / (MOST_FRAMES - 1);
    (frames > MOST_FRAMES).then(|| (0..MOST_FRAMES).map(place).collect())
}

/// VGG16 on single frames, frozen, in float32.
pub struct Vgg16Frames {
    vgg: Vgg16,
    device: Device,
    sha256: String,
}

impl Vgg16Frames {
    /// Loads the released weights, or a user's own file of the same layout.
    ///
    /// # Errors
    /// The file is not there, is damaged, or belongs to another network.
    pub fn load(file: Option<&Path>, device: Device) -> Result<Self> {
        let Loaded { vgg, sha256, .. } = Vgg16::load(file, device, Kind::Float)?;
        Ok(Vgg16Frames { vgg, device, sha256 })
    }

    /// u8 frames `[N, H, W, 3]` → `[N, 512]`
    fn forward(&self, frames: &Tensor) -> Tensor {
        let x = upload(frames, self.device).to_kind(Kind::Float).permute([0, 3, 1, 2]).contiguous() / 127.5 - 1.0;
        let x = match x.size()[2..] {
            [SIDE, SIDE] => x,
            _ => x.internal_upsample_bilinear2d_aa([SIDE, SIDE], false, None, None),
        };
        self.vgg.last_group(&x).mean_dim([2i64, 3].as_slice(), false, Kind::Float)
    }
}

impl FeatureExtractor for Vgg16Frames {
    fn name(&self) -> &str {
        "VGG16 relu5_3 of single frames"
    }

    fn weights_sha256(&self) -> &str {
        &self.sha256
    }

    fn width(&self) -> i64 {
        Vgg16::WIDTH
    }

    fn least_frames(&self) -> i64 {
        1
    }

    fn preparation(&self) -> &str {
        "frames to 224x224 bilinear with antialias, of longer clips 16 of them evenly"
    }

    fn gives_rows(&self) -> bool {
        true
    }

    /// One row a frame, `[N, F, 512]`, for at most 16 of a clip's.
    fn features(&self, videos: &Tensor) -> Result<Tensor> {
        ensure_videos("VGG16", videos, self.least_frames())?;
        let videos = match evenly(videos.size()[1]) {
            None => videos.shallow_clone(),
            Some(places) => videos.index_select(1, &Tensor::from_slice(&places).to_device(videos.device())),
        };
        let (n, f) = (videos.size()[0], videos.size()[1]);
        let frames = videos.flatten(0, 1);
        let _precision = Autocast::bfloat16(self.device, false);
        let pieces = (0..n * f)
            .step_by(FRAMES_AT_ONCE as usize)
            .map(|from| no_grad(|| self.forward(&frames.narrow(0, from, FRAMES_AT_ONCE.min(n * f - from)))));
        let empty = Tensor::zeros([0, Vgg16::WIDTH], (Kind::Float, self.device));
        let pieces: Vec<Tensor> = std::iter::once(empty).chain(pieces).collect();
        Ok(Tensor::cat(&pieces, 0).view([n, f, Vgg16::WIDTH]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_long_clips_are_chosen_evenly() {
        assert_eq!((evenly(1), evenly(16)), (None, None));
        for frames in [17, 128, 1024] {
            let places = evenly(frames).unwrap();
            assert_eq!((places.len(), places[0], places[15]), (16, 0, frames - 1));
            let steps: Vec<i64> = places.windows(2).map(|pair| pair[1] - pair[0]).collect();
            assert!(steps.iter().max().unwrap() - steps.iter().min().unwrap() <= 1, "{frames}: {steps:?}");
        }
        assert_eq!(evenly(31).unwrap()[..4], [0, 2, 4, 6]);
    }
}
