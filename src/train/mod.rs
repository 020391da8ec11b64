//! Training: one loop, two tasks.

mod autoencoder_loss;
mod ema;
mod optimizer;

pub use autoencoder_loss::{AutoencoderLoss, AutoencoderLossConfig, DiscriminatorTerms, GeneratorTerms, PixelLoss};
pub use ema::Ema;
pub use optimizer::Optimizer;
