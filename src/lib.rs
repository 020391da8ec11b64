//! Latent Video Diffusion Models (He et al. 2022, arXiv 2211.13221) on LibTorch.

pub mod metrics;
pub mod models;
pub mod nn;
pub mod random;
pub mod torch;
pub mod weights;
