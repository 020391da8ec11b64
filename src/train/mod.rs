//! Training: one loop, three tasks, and the recipes that go from an experiment to a finished run.

mod ahead;
mod autoencoder;
mod classes;
mod diffusion;
mod ema;
mod labels;
mod latents;
pub mod logger;
mod optimizer;
pub mod progress;
mod recipe;
mod record;
mod resume;
mod saver;
mod task;
mod trainer;
mod transformer;

pub use autoencoder::AutoencoderTask;
pub use classes::with_classes;
pub use diffusion::DiffusionTask;
pub use ema::Ema;
pub use latents::{LatentFile, pack_latents};
pub use optimizer::{Optimizer, StepAround};
pub use recipe::{train_autoencoder, train_diffusion, train_transformer};
pub use record::SECONDS_PER_STEP;
pub use resume::{SettingsChanges, resume_point};
pub use saver::Saver;
pub use task::{Batch, Drawn, Picture, Task, Terms, TrainedNetwork};
pub use trainer::Trainer;
pub use transformer::TransformerTask;
