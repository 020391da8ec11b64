//! From files to batches of clips.
//!
//! A dataset lists videos ([`VideoDataset`]); a [`Source`] gives their frames by number, out of a
//! video file, a folder of pictures or a packed file; a [`ClipSpec`] cuts a window out of them,
//! resized and cropped, as unsigned bytes `[3, F, H, W]`; the [`Loader`] decodes ahead and stacks
//! batches `[B, 3, F, H, W]` on the host. [`normalise`] and [`to_u8`] are the two ends of the networks:
//! bytes to [-1, 1] and back. Latents never enter here.

pub mod captioned;
pub mod clip;
pub mod dataset;
pub mod demo;
pub mod folder;
pub mod frame_folder;
pub mod frames;
pub mod index;
pub mod loader;
pub mod numpy;
pub mod pack;
pub mod packed;
pub mod pictures;
pub mod prepare;
pub mod reading;
pub mod stream;
mod table;
#[cfg(feature = "video")]
pub mod video_file;
#[cfg(not(feature = "video"))]
#[path = "video_file_absent.rs"]
pub mod video_file;
mod walk;

pub use clip::{ClipSpec, Filter, Fit, FrameSource, RgbFrame, normalise, to_u8};
pub use dataset::{DataConfig, DatasetConfig, Listing, Source, VideoDataset, VideoEntry, decode_workers};
pub use demo::DemoConfig;
pub use loader::{Batch, Loader, fixed_clips};
pub use pack::{PackedWriter, pack_clips};
pub use packed::PackedFile;
pub use reading::READING;
pub use stream::{ClipStream, Draw};
pub use video_file::{VideoReader, VideoWriter, write_video};
