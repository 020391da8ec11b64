//! From files to batches of clips.
//!
//! A dataset lists videos ([`VideoDataset`]); a [`VideoSource`] gives their frames by number, out of a
//! video file, a folder of pictures or a packed file; a [`ClipSpec`] cuts a window out of them,
//! resized and cropped, as unsigned bytes `[3, F, H, W]`; the [`Loader`] decodes ahead and stacks
//! batches `[B, 3, F, H, W]` on the host. [`normalise`] and [`to_u8`] are the two ends of the networks:
//! bytes to [-1, 1] and back. Latents never enter here.
//!
//! # Floors
//! A file imports from lower floors only; `tests/architecture` reads this list and holds the code to it.
//!
//! ```text
//! pack | stream                                clips into one file; clips for encoding and evaluation
//! loader                                       batches for training
//! dataset | demo | inspect | prepare           the registry of data sets; procedural videos; a look at an index; indexes of published ones
//! captioned | frames | index                   data sets made of files and folders
//! folder                                       a folder of videos
//! video_path                                   one video, by its path
//! frame_folder | numpy | packed                formats of videos
//! video                                        what a video and a data set are
//! pictures | reading | video_file              pictures; which reader decoded a file; video files
//! clip | table | walk                          windows of frames; CSV tables; folders below folders
//! ```

pub mod captioned;
pub mod clip;
pub mod dataset;
pub mod demo;
pub mod folder;
pub mod frame_folder;
pub mod frames;
pub mod index;
pub mod inspect;
pub mod loader;
pub mod numpy;
pub mod pack;
pub mod packed;
pub mod pictures;
pub mod prepare;
pub mod reading;
pub mod stream;
mod table;
pub mod video;
#[cfg(feature = "video")]
pub mod video_file;
#[cfg(not(feature = "video"))]
#[path = "video_file_absent.rs"]
pub mod video_file;
pub mod video_path;
mod walk;

pub use captioned::{Captioned, Webvid};
pub use clip::{ClipSpec, Filter, Fit, FrameSource, RgbFrame, normalise, to_u8};
pub use dataset::{DataConfig, DatasetConfig, decode_workers};
pub use demo::DemoConfig;
pub use folder::Folder;
pub use frames::FrameFolders;
pub use index::Indexed;
pub use loader::{Batch, Loader, fixed_clips};
pub use numpy::Numpy;
pub use pack::{PackedWriter, pack_clips};
pub use packed::{Packed, PackedFile};
pub use reading::READING;
pub use stream::{ClipStream, Draw};
pub use video::{Listing, VideoDataset, VideoEntry, VideoSource};
pub use video_file::{VideoReader, VideoWriter, write_video};
pub use video_path::VideoFile;
