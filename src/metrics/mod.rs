//! How far generated videos are from real ones.

mod features;
mod frechet;
mod mmd;
mod protocol;

pub use features::FeatureExtractor;
pub use frechet::frechet_distance;
pub use mmd::kernel_distance;
pub use protocol::{Distances, EvaluationConfig, Protocol, psnr_db};
