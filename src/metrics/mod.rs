//! How far generated videos are from real ones, and reconstructions from their originals.

mod estimate;
mod features;
mod frechet;
mod mmd;
mod protocol;
mod reconstruction;

pub use estimate::{Distances, Figure, Floor, FloorSets, Interval, about, extrapolated_fvd, jackknife};
pub use features::FeatureExtractor;
pub use frechet::{Divisor, frechet_distance, frechet_distance_by};
pub use mmd::kernel_distance;
pub use protocol::{Protocol, ProtocolConfig, Redraw};
pub use reconstruction::{psnr_db, ssim};
