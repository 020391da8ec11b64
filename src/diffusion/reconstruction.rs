//! Reconstruction guidance (Ho et al. 2022, arXiv 2204.03458, section 3.1): a network that was never given anything is led
//! to what agrees with given frames, or with a given video of lower resolution.

use std::cell::Cell;

use tch::{Tensor, no_grad, with_grad};

use super::{denoiser::Denoiser, path::NoisePath, prediction::Prediction};
use crate::torch::gradient;

/// What is known of the clips.
pub enum Observed<'a> {
    /// Some of their frames. In every call these are replaced by a noisy version of what is given.
    Frames {
        /// `[B, C, F, h, w]`, clean; other frames are not read.
        frames: Tensor,
        /// `[B, 1, F, 1, 1]`, or a shape that expands to it: one where a frame is given.
        mask: Tensor,
        /// Standard normal noise of the shape of the clips, for the call of this number.
        noise: Box<dyn Fn(u64) -> Tensor + 'a>,
    },
    /// The clips at a lower resolution, `[B, C, F, h', w']`.
    LowResolution(Tensor),
}

impl Observed<'_> {
    /// How far z_0 is from what is known, in the shape of the clips or of the video of lower resolution.
    fn residual(&self, z_0: &Tensor) -> Tensor {
        match self {
            Observed::Frames { frames, mask, .. } => (frames - z_0) * mask.to_kind(z_0.kind()),
            Observed::LowResolution(low) => {
                let (_, _, _, h, w) = low.size5().expect("a video [B, C, F, h, w]");
                low - resized(z_0, [h, w])
            }
        }
    }
}

/// Replaces given frames by noisy ones before every call and, with a weight, moves z_0 of all else against the gradient of
/// what z_0 misses of them:
///
/// z̃_0 = z_0 − (w α_t / 2) ∇_z ‖given − what z_0 has in its place‖².
///
/// The gradient runs through the network, so that a call takes the memory and the time of a training step. With a weight of
/// zero it is plain replacement.
pub struct Reconstruction<'a, D> {
    inner: D,
    path: &'a dyn NoisePath,
    observed: Observed<'a>,
    weight: f64,
    calls: Cell<u64>,
}

impl<'a, D: Denoiser> Reconstruction<'a, D> {
    /// Around a denoiser on this path, with the weight w.
    pub fn new(inner: D, path: &'a dyn NoisePath, observed: Observed<'a>, weight: f64) -> Self {
        Reconstruction { inner, path, observed, weight, calls: Cell::new(0) }
    }

    /// z_t with the given frames, as noisy as the others, in their places.
    fn replaced(&self, z_t: &Tensor, t: f64) -> Tensor {
        let Observed::Frames { frames, mask, noise } = &self.observed else { return z_t.shallow_clone() };
        let (alpha, sigma) = self.path.alpha_sigma(t);
        let noisy = frames * alpha + noise(self.calls.replace(self.calls.get() + 1)) * sigma;
        let mask = mask.to_kind(z_t.kind());
        z_t * (1.0 - &mask) + noisy * mask
    }
}

impl<D: Denoiser> Denoiser for Reconstruction<'_, D> {
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
        let z_t = no_grad(|| self.replaced(z_t, t));
        if self.weight == 0.0 {
            return self.inner.predict(&z_t, t);
        }
        let (prediction, gradient) = with_grad(|| {
            let z_t = z_t.detach().set_requires_grad(true);
            let prediction = self.inner.predict(&z_t, t);
            let missed = self.observed.residual(&prediction.z_0).square().sum(z_t.kind());
            (prediction, gradient(&missed, &z_t, false))
        });
        let (alpha, sigma) = self.path.alpha_sigma(t);
        let gradient = match &self.observed {
            Observed::Frames { mask, .. } => gradient * (1.0 - mask.to_kind(z_t.kind())),
            Observed::LowResolution(_) => gradient,
        };
        let z_0 = prediction.z_0.detach() - gradient * (0.5 * self.weight * alpha);
        let noise = (&z_t - &z_0 * alpha) / sigma;
        Prediction { z_t, z_0, noise, variance: prediction.variance.map(|variance| variance.detach()) }
    }
}

/// Videos `[B, C, F, h, w]` with frames of another height and width: bilinear, averaging where they become smaller.
pub fn resized(video: &Tensor, [height, width]: [i64; 2]) -> Tensor {
    let (b, c, f, h, w) = video.size5().expect("a video [B, C, F, h, w]");
    let frames = video.transpose(1, 2).reshape([b * f, c, h, w]);
    let frames = frames.internal_upsample_bilinear2d_aa([height, width], false, None, None);
    frames.reshape([b, f, c, height, width]).transpose(1, 2)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::diffusion::CosineLogSnr;

    /// z_0 is a fixed matrix over the frames, applied to z_t.
    struct Linear<'a>(Tensor, &'a dyn NoisePath);

    impl Denoiser for Linear<'_> {
        fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
            let (alpha, sigma) = self.1.alpha_sigma(t);
            let z_0 = Tensor::einsum("fg,bcghw->bcfhw", &[&self.0, z_t], None::<i64>);
            let noise = (z_t - &z_0 * alpha) / sigma;
            Prediction { z_t: z_t.shallow_clone(), z_0, noise, variance: None }
        }
    }

    fn normal(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Double, Device::Cpu))
    }

    fn far(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    /// For z_0 = A z the gradient of ‖x − (A z)_given‖² in the other frames is −2 A_given,otherᵀ (x − (A z)_given); without a
    /// weight nothing but the given frames' z changes.
    #[test]
    fn guidance_of_a_linear_denoiser_is_its_closed_form() {
        let path = CosineLogSnr::default();
        let (matrix, given, z, noise) =
            (normal(&[4, 4]), normal(&[2, 3, 4, 2, 2]), normal(&[2, 3, 4, 2, 2]), normal(&[2, 3, 4, 2, 2]));
        let mask = Tensor::from_slice(&[1.0, 0.0, 0.0, 1.0]).reshape([1, 1, 4, 1, 1]);
        let guided = |weight: f64| {
            let noise: Box<dyn Fn(u64) -> Tensor> = Box::new(|call| &noise + call as f64);
            let observed = Observed::Frames { frames: given.shallow_clone(), mask: mask.shallow_clone(), noise };
            Reconstruction::new(Linear(matrix.shallow_clone(), &path), &path, observed, weight)
        };
        let (t, w) = (0.4, 3.0);
        let (alpha, sigma) = path.alpha_sigma(t);
        let replaced = &z * (1.0 - &mask) + (&given * alpha + &noise * sigma) * &mask;
        let plain = Linear(matrix.shallow_clone(), &path).predict(&replaced, t);
        let without = guided(0.0).predict(&z, t);
        for (found, wanted) in [(&without.z_t, &replaced), (&without.z_0, &plain.z_0), (&without.noise, &plain.noise)] {
            assert_eq!(found, wanted);
        }
        let missed = (&given - &plain.z_0) * &mask;
        let pulled = Tensor::einsum("gf,bcghw->bcfhw", &[&matrix, &missed], None::<i64>) * (1.0 - &mask);
        let wanted = &plain.z_0 + pulled * (w * alpha);
        let with = guided(w);
        let found = with.predict(&z, t);
        assert!(far(&found.z_0, &wanted) < 1e-10 && far(&plain.z_0, &wanted) > 0.1);
        assert!(far(&(&found.z_0 * alpha + &found.noise * sigma), &replaced) < 1e-10);
        // the given frames are drawn anew in every call
        let again = with.predict(&z, t).z_t;
        assert!(far(&again, &(&replaced + &mask * sigma)) < 1e-10);
    }

    /// The same where the video is known at half its resolution: D z_0 = (D A) z, and the gradient moves all frames.
    #[test]
    fn guidance_by_a_lower_resolution_is_its_closed_form() {
        let path = CosineLogSnr::default();
        let (matrix, low, z) = (normal(&[2, 2]), normal(&[1, 1, 2, 2, 2]), normal(&[1, 1, 2, 4, 4]));
        let observed = Observed::LowResolution(low.shallow_clone());
        let (t, w) = (0.6, 2.0);
        let found = Reconstruction::new(Linear(matrix.shallow_clone(), &path), &path, observed, w).predict(&z, t).z_0;
        let plain = Linear(matrix.shallow_clone(), &path).predict(&z, t).z_0;
        // the resizing as a matrix [4, 16], from its answers to the sixteen pictures of one white pixel
        let white = Tensor::eye(16, (Kind::Double, Device::Cpu)).reshape([16, 1, 1, 4, 4]);
        let down = resized(&white, [2, 2]).reshape([16, 4]).transpose(0, 1);
        let missed = low.reshape([2, 4]) - plain.reshape([2, 16]).matmul(&down.transpose(0, 1)); // [F, 4]
        let pulled = matrix.transpose(0, 1).matmul(&missed.matmul(&down)).reshape([1, 1, 2, 4, 4]);
        let wanted = &plain + pulled * (w * path.alpha_sigma(t).0);
        assert!(far(&found, &wanted) < 1e-10 && far(&plain, &wanted) > 0.1);
    }
}
