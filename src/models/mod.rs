//! One network, one file.

pub mod i3d;
pub mod lpips;
