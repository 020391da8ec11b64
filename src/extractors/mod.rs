//! Frozen networks that judge: features of videos (I3D), perceptual distance of pictures (LPIPS).
//!
//! A feature extractor is a file here whose type is a [`FeatureExtractor`], and a line of the registry
//! (`registry.rs`) under the `kind` by which an experiment names it: `extractor: {kind: i3d, file: …}`.

mod brought;
mod feature_extractor;
pub mod frames;
pub mod i3d;
pub mod lpips;
pub mod motion;
mod registry;
pub mod v_jepa;
mod vgg16;
pub mod video_mae;
mod video_transformer;

pub use brought::{Brought, BroughtFile};
pub use feature_extractor::FeatureExtractor;
pub use i3d::I3d;
pub use lpips::Lpips;
pub use registry::{ExtractorConfig, ExtractorKind, brought};
