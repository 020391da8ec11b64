//! How far generated videos are from real ones.

mod features;
mod frechet;
mod mmd;

pub use features::FeatureExtractor;
pub use frechet::frechet_distance;
pub use mmd::kernel_distance;
