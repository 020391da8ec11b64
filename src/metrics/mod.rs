//! How far generated videos are from real ones, and reconstructions from their originals.
//!
//! A metric is a file here whose type is a [`VideoMetric`], and a line of the registry (`registry.rs`). With that an
//! experiment can ask for it (`evaluation: {metrics: [fvd, kvd, …]}`), it gets runs, an interval and where it is biased an
//! extrapolation, and it stands by its name in figures, tables and pages.

mod divisor;
mod estimate;
mod figure;
mod frame_distance;
mod frechet;
mod mmd;
mod motion_distance;
mod protocol;
mod real_vs_real;
mod reconstruction;
mod registry;
mod video_metric;

pub use divisor::Divisor;
pub use estimate::Interval;
pub use figure::{Estimate, Extrapolation, Figure};
pub use frame_distance::FrameDistance;
pub use frechet::{Fvd, frechet_distance, frechet_distance_by};
pub use mmd::{Kvd, kernel_distance};
pub use motion_distance::MotionDistance;
pub use protocol::{Protocol, ProtocolConfig, Redraw};
pub use real_vs_real::{RealPairs, RealVsReal};
pub use reconstruction::{psnr_db, ssim};
pub use registry::{Distances, Metric};
pub use video_metric::{ComparedFeatures, VideoMetric};
