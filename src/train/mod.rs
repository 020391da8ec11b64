//! Training: one loop, two tasks.

mod autoencoder;
mod autoencoder_loss;
pub mod checkpoint;
mod config;
mod diffusion;
mod ema;
mod latents;
pub mod logger;
mod optimizer;
pub mod progress;
mod trainer;

pub use autoencoder::AutoencoderTask;
pub use autoencoder_loss::{AutoencoderLoss, AutoencoderLossConfig, DiscriminatorTerms, GeneratorTerms, PixelLoss};
pub use checkpoint::{Checkpoint, Progress};
pub use config::{Decay, OptimizerConfig, OptimizerKind, Precision, TrainerConfig};
pub use diffusion::DiffusionTask;
pub use ema::Ema;
pub use latents::{LatentFile, pack_latents};
pub use optimizer::Optimizer;
pub use trainer::{Batch, Phase, Picture, Task, Trainer, resume_point};
