//! The one source of randomness: counter-based and on the host.
//!
//! Every number is a function of (seed, purpose, sample, step) and of nothing else, so samples do
//! not depend on batch size, thread count, number of ranks or on having been resumed.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use tch::Tensor;

/// What a stream of numbers is for: streams of different purposes never meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Initial weights; the sample is a hash of the parameter's name.
    Weights = 1,
    /// The order of videos; the sample is the epoch.
    Shuffle = 2,
    /// Where a clip starts, and whether it is flipped.
    Crop = 3,
    /// Noise of the autoencoder's posterior in the generator's update.
    Posterior = 4,
    /// Noise of the autoencoder's posterior in the discriminator's update.
    PosteriorDiscriminator = 5,
    /// Diffusion time of a training sample.
    DiffusionTime = 6,
    /// Noise of a training sample.
    DiffusionNoise = 7,
    /// Where sampling starts, z_T.
    SampleStart = 9,
    /// Noise drawn at a sampling step.
    SampleStep = 10,
    /// Gaussian latents of the baseline without a diffusion model.
    GaussianLatents = 11,
    /// Scenes of the procedural demo videos.
    Scene = 12,
    /// Which frames are given in training.
    FrameMask = 13,
    /// Level (in training) and noise (in sampling) of the perturbation of given frames.
    Perturbation = 14,
    /// Subsets drawn by an evaluation.
    Evaluation = 15,
    /// Whether a training sample goes without its caption.
    Caption = 16,
    /// Whether a training sample goes without its class label.
    Label = 17,
    /// Which rows of a batch become entries of a codebook; the sample is 0 at its start, and then the step plus one.
    Codebook = 18,
    /// The frame of a training clip that is judged alone in the generator's update.
    JudgedFrame = 19,
    /// The frame of a training clip that is judged alone in the discriminators' update.
    JudgedFrameDiscriminator = 20,
    /// Noise of given frames that replace sampled ones; the step is the number of the network's call.
    Replacement = 21,
    /// The number by which activations of a training sample are dropped.
    Dropout = 24,
}

/// The generator for one (seed, purpose, sample, step): the four words are ChaCha8's key.
pub fn stream(seed: u64, purpose: Purpose, sample: u64, step: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, sample, step]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Standard normal noise of one sample: float32 on the host, of the given shape.
pub fn normal(seed: u64, purpose: Purpose, sample: u64, step: u64, shape: &[i64]) -> Tensor {
    let count = shape.iter().product::<i64>() as usize;
    let mut generator = stream(seed, purpose, sample, step);
    let values: Vec<f32> = (0..count).map(|_| StandardNormal.sample(&mut generator)).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// Noise of several samples, stacked: `[samples.len(), shape…]`. Row i is `normal` of `samples[i]`.
pub fn normal_batch(seed: u64, purpose: Purpose, samples: &[u64], step: u64, shape: &[i64]) -> Tensor {
    let rows: Vec<Tensor> = samples.par_iter().map(|&sample| normal(seed, purpose, sample, step, shape)).collect();
    Tensor::stack(&rows, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_does_not_depend_on_its_batch() {
        let together = normal_batch(7, Purpose::SampleStart, &[3, 4, 5], 0, &[2, 3]);
        let alone = normal(7, Purpose::SampleStart, 4, 0, &[2, 3]);
        assert_eq!(together.get(1), alone);
    }

    #[test]
    fn every_word_of_the_key_matters() {
        let base = normal(1, Purpose::Crop, 2, 3, &[8]);
        for other in [
            normal(2, Purpose::Crop, 2, 3, &[8]),
            normal(1, Purpose::Shuffle, 2, 3, &[8]),
            normal(1, Purpose::Crop, 3, 3, &[8]),
            normal(1, Purpose::Crop, 2, 4, &[8]),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn normal_has_its_moments() {
        let z = normal(0, Purpose::SampleStart, 0, 0, &[200_000]);
        let (mean, std) = (z.mean(None).double_value(&[]), z.std(true).double_value(&[]));
        assert!(mean.abs() < 0.01 && (std - 1.0).abs() < 0.01, "mean {mean}, std {std}");
    }
}
