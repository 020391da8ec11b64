//! The frozen autoencoder with the shift and scale that were measured on its latents.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use super::{AutoencoderConfig, Chunks, VideoAutoencoder};
use crate::nn::Parameters;

/// Mean and spread of raw latents, as the affine map that normalises them: z ← scale·(z + shift).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentMoments {
    pub scale: f64,
    pub shift: f64,
}

impl LatentMoments {
    /// Of raw latents of any shape: shift is minus their mean, scale one over their standard deviation.
    pub fn measure(latents: &Tensor) -> Self {
        let z = latents.to_kind(Kind::Double);
        let (mean, std) = (z.mean(None).double_value(&[]), z.std(true).double_value(&[]));
        LatentMoments { scale: 1.0 / std.max(1e-12), shift: -mean }
    }

    /// Raw → normalised.
    pub fn normalise(&self, z: &Tensor) -> Tensor {
        (z + self.shift) * self.scale
    }

    fn restore(&self, z: &Tensor) -> Tensor {
        z / self.scale - self.shift
    }
}

/// Where diffusion happens: clips ↔ normalised latents, without gradients.
pub struct LatentSpace {
    autoencoder: VideoAutoencoder,
    pub config: AutoencoderConfig,
    pub moments: LatentMoments,
    /// Latent frames of the clips on which the autoencoder was trained.
    pub clip: i64,
    device: Device,
}

impl LatentSpace {
    /// # Errors
    /// Where the weights belong to another architecture.
    pub fn new(
        config: &AutoencoderConfig,
        weights: &BTreeMap<String, Tensor>,
        moments: LatentMoments,
        clip: i64,
        device: Device,
    ) -> Result<Self> {
        let parameters = Parameters::new(device, 0);
        let autoencoder = VideoAutoencoder::new(&parameters.root(), config);
        parameters.load(weights)?;
        parameters.freeze();
        Ok(LatentSpace { autoencoder, config: config.clone(), moments, clip, device })
    }

    /// Clips `[B, 3, F, H, W]` in [−1, 1] → the raw posterior's mean and logvar, stacked: `[B, 2C, F/ft, H/fs, W/fs]`.
    pub fn moments_of(&self, x: &Tensor) -> Tensor {
        no_grad(|| {
            let posterior = self.autoencoder.encode(&x.to_device(self.device));
            Tensor::cat(&[posterior.mean, posterior.logvar], 1)
        })
    }

    /// Stacked raw moments and the posterior's noise `[B, C, …]` → normalised z_0.
    pub fn sample(&self, moments: &Tensor, noise: &Tensor) -> Tensor {
        let halves = moments.to_device(self.device).chunk(2, 1);
        let std = (&halves[1] * 0.5).exp();
        self.moments.normalise(&(&halves[0] + std * noise.to_device(self.device)))
    }

    /// Normalised z_0 → clips `[B, 3, F, H, W]`, not clamped.
    pub fn decode(&self, z_0: &Tensor) -> Tensor {
        no_grad(|| self.autoencoder.decode(&self.moments.restore(&z_0.to_device(self.device))))
    }

    /// How a long latent is decoded: chunks of the length on which the autoencoder was trained, half of each shared.
    pub fn chunks(&self) -> Chunks {
        Chunks {
            length: self.clip,
            overlap: self.clip / 2,
            factor: self.config.factors[0],
            reach: self.config.decoder_reach(),
        }
    }

    /// Normalised z_0 `[1, C, F, h, w]` of any length → the video in pieces `[3, f, H, W]`, in order, not clamped.
    ///
    /// # Errors
    /// Those of `hand_on`.
    pub fn decode_long(&self, z_0: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        no_grad(|| self.chunks().decode(z_0, &|z| self.decode(z), hand_on))
    }

    /// Clips → their reconstruction through the posterior's mean.
    pub fn reconstruct(&self, x: &Tensor) -> Tensor {
        no_grad(|| self.autoencoder.decode(&self.autoencoder.encode(&x.to_device(self.device)).mean))
    }

    pub fn device(&self) -> Device {
        self.device
    }
}
