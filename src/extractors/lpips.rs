//! LPIPS, the perceptual distance of images (Zhang et al. 2018, arXiv 1801.03924), on VGG16.

use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use super::vgg16::{Loaded, Vgg16};
use crate::torch::Autocast;

/// Keeps the division by a feature vector's length defined.
const EPSILON: f64 = 1e-10;

/// VGG16 and the heads, frozen: gradients reach the images and nothing else.
pub struct Lpips {
    vgg: Vgg16,
    /// One a group: how much a squared difference in each channel counts, `[C, 1, 1]`.
    heads: Vec<Tensor>,
    sha256: String,
}

impl Lpips {
    /// Loads the released weights, or a user's own file of the same layout, in this precision.
    ///
    /// # Errors
    /// The file is not there, is damaged, or belongs to another network.
    pub fn load(path: Option<&Path>, device: Device, kind: Kind) -> Result<Lpips> {
        let Loaded { vgg, heads, sha256 } = Vgg16::load(path, device, kind)?;
        Ok(Lpips { vgg, heads, sha256 })
    }

    /// How many numbers its weights are: VGG16's, and those of the heads.
    pub fn parameters(&self) -> i64 {
        self.vgg.parameters() + self.heads.iter().map(|head| head.numel() as i64).sum::<i64>()
    }

    /// With weights that have shapes and no memory, for [`by_shapes`](crate::torch::by_shapes).
    pub fn unfilled() -> Lpips {
        let (vgg, heads) = Vgg16::unfilled();
        Lpips { vgg, heads, sha256: String::new() }
    }

    /// The hash of the file that was loaded.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The distance `[N]` of images `[N, 3, H, W]` in [-1, 1], at least 16×16 large. Gradients flow to
    /// those of `a` and `b` that ask for them. Never in mixed precision: differences of like features drown in it.
    pub fn distance(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(a.device(), false);
        self.compare(self.features(a), self.features(b))
    }

    /// As [`Lpips::distance`], where the target is a constant: nothing of it is kept for a backward pass.
    pub fn distance_to(&self, target: &Tensor, b: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(b.device(), false);
        self.compare(no_grad(|| self.features(target)), self.features(b))
    }

    fn compare(&self, a: Vec<Tensor>, b: Vec<Tensor>) -> Tensor {
        let terms = self.heads.iter().zip(a.iter().zip(&b)).map(|(head, (a, b))| {
            let kind = a.kind();
            ((a - b).square() * head).sum_dim_intlist([1i64].as_slice(), false, kind).mean_dim(
                [1i64, 2].as_slice(),
                false,
                kind,
            )
        });
        terms.reduce(|sum, term| sum + term).expect("five groups")
    }

    /// The activations at the end of each group, every pixel's vector of length 1.
    fn features(&self, images: &Tensor) -> Vec<Tensor> {
        self.vgg.map_groups(images, unit_length)
    }
}

/// x / (‖x‖ + ε) over channels. Where a pixel's vector is 0 the root has no slope, and the result's
/// gradient must not become NaN for it: the square is kept above what a float can be the square of.
fn unit_length(x: &Tensor) -> Tensor {
    let square = x.square().sum_dim_intlist([1i64].as_slice(), true, x.kind());
    x / (square.clamp_min(1e-30).sqrt() + EPSILON)
}
