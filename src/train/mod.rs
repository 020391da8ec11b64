//! Training: one loop, two tasks.

mod autoencoder_loss;
mod ema;
pub mod logger;
mod optimizer;
pub mod progress;

pub use autoencoder_loss::{AutoencoderLoss, AutoencoderLossConfig, DiscriminatorTerms, GeneratorTerms, PixelLoss};
pub use ema::Ema;
pub use optimizer::Optimizer;
