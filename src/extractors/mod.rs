//! Frozen networks that judge: features of videos (I3D), perceptual distance of pictures (LPIPS).

pub mod i3d;
pub mod lpips;

pub use i3d::I3d;
pub use lpips::Lpips;
