//! Training: one loop, two tasks.

mod autoencoder;
mod classes;
mod diffusion;
mod ema;
mod labels;
mod latents;
pub mod logger;
mod optimizer;
pub mod progress;
mod record;
mod resume;
mod saver;
mod trainer;

pub use autoencoder::AutoencoderTask;
pub use classes::with_classes;
pub use diffusion::DiffusionTask;
pub use ema::Ema;
pub use latents::{LatentFile, pack_latents};
pub use optimizer::Optimizer;
pub use record::SECONDS_PER_STEP;
pub use resume::{SettingsChanges, resume_point};
pub use saver::Saver;
pub use trainer::{Batch, Phase, Picture, Task, Terms, Trainer};
