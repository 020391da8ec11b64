//! Latent Video Diffusion Models (He et al. 2022, arXiv 2211.13221) on LibTorch.

pub mod atomic_file;
pub mod commands;
pub mod data;
pub mod diffusion;
pub mod experiment;
pub mod generate;
pub mod metrics;
pub mod models;
pub mod nn;
pub mod random;
pub mod safetensors;
pub mod torch;
pub mod train;
pub mod weights;
