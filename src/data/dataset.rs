//! What a dataset is: a list of videos. Decoding is the same for all of them.
//!
//! A new dataset is one file beside this one, with a variant of `DatasetConfig` and a match arm.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    captioned::{Captioned, Webvid},
    clip::{ClipSpec, FrameSource},
    folder::Folder,
    frame_folder::FrameFolder,
    frames::Frames,
    packed::{Packed, PackedFile, PackedVideo},
    video_file::VideoReader,
};

/// A list of videos, in an order that does not depend on the machine.
pub trait VideoDataset {
    /// Errors: a place that is missing or holds no videos.
    fn videos(&self) -> Result<Listing>;
}

/// The videos of a dataset.
#[derive(Debug)]
pub struct Listing {
    pub videos: Vec<VideoEntry>,
    /// How many more the dataset names that are not there, or lack their caption.
    pub left_out: usize,
}

impl From<Vec<VideoEntry>> for Listing {
    fn from(videos: Vec<VideoEntry>) -> Self {
        Listing { videos, left_out: 0 }
    }
}

/// One video of a dataset.
#[derive(Debug, Clone)]
pub struct VideoEntry {
    /// For people: a path, as it was found.
    pub name: String,
    pub source: Source,
    /// What it shows, of datasets that say so.
    pub caption: Option<String>,
}

/// What holds a video's frames.
#[derive(Debug, Clone)]
pub enum Source {
    /// A video file.
    File(PathBuf),
    /// Pictures, in the order in which they are shown.
    Frames(Vec<PathBuf>),
    /// A clip of a packed file, which holds every `step`-th frame of the original video.
    Packed { file: Arc<PackedFile>, index: i64, step: i64 },
}

impl Source {
    /// Opens the video for reading.
    pub fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(match self {
            Self::File(path) => Box::new(VideoReader::open(path)?),
            Self::Frames(pictures) => Box::new(FrameFolder::new(pictures.clone())),
            Self::Packed { file, index, step } => Box::new(PackedVideo::new(file.clone(), *index, *step)),
        })
    }
}

/// The datasets there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DatasetConfig {
    /// Every video file under a folder, at any depth.
    Folder { root: PathBuf },
    /// Every folder under a folder, at any depth, that holds pictures: each is one video.
    Frames { root: PathBuf },
    /// A table (CSV) with the columns `videoid` and `name`, the caption, and a folder of its videos:
    /// `page_dir/videoid.mp4`, or without the first.
    Webvid { table: PathBuf, root: PathBuf },
    /// Every video file under a folder that has its caption beside it: `x.mp4`, `x.txt`.
    Captioned { root: PathBuf },
    /// A file written by `pack_clips`.
    Packed { file: PathBuf },
}

impl DatasetConfig {
    /// The dataset's videos, for clips that take every `frame_stride`-th frame.
    pub fn videos(&self, frame_stride: i64) -> Result<Listing> {
        match self.clone() {
            Self::Folder { root } => Folder { root }.videos(),
            Self::Frames { root } => Frames { root }.videos(),
            Self::Webvid { table, root } => Webvid { table, root }.videos(),
            Self::Captioned { root } => Captioned { root }.videos(),
            Self::Packed { file } => Packed { file, frame_stride }.videos(),
        }
    }

    /// What can be seen without opening videos. Errors: a place that is missing, a table without its columns.
    pub fn check(&self) -> Result<()> {
        let path = match self {
            Self::Folder { root } | Self::Frames { root } | Self::Captioned { root } => root,
            Self::Webvid { table, root } => {
                if table.exists() {
                    Webvid { table: table.clone(), root: root.clone() }.check()?;
                    root
                } else {
                    table
                }
            }
            Self::Packed { file } => file,
        };
        ensure!(path.exists(), "there is no {}", path.display());
        Ok(())
    }

    /// Whether its videos may have captions.
    pub fn has_captions(&self) -> bool {
        match self {
            Self::Folder { .. } | Self::Frames { .. } => false,
            Self::Webvid { .. } | Self::Captioned { .. } | Self::Packed { .. } => true,
        }
    }
}

/// Where clips come from and what they are like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    pub dataset: DatasetConfig,
    /// F, frames of a clip.
    pub frames: i64,
    /// Every n-th frame of the video.
    #[serde(default = "default_stride")]
    pub frame_stride: i64,
    /// H and W of a clip, in pixels.
    pub resolution: i64,
    /// Whether every second clip, at random, is mirrored. Only in training.
    #[serde(default)]
    pub flip: bool,
    /// Threads that decode ahead of the training step.
    #[serde(default = "default_workers")]
    pub workers: usize,
}

fn default_stride() -> i64 {
    1
}

fn default_workers() -> usize {
    2
}

impl DataConfig {
    /// What is cut out of each video.
    ///
    /// Errors: a count or a size below 1.
    pub fn clip(&self) -> Result<ClipSpec> {
        let Self { frames, frame_stride, resolution, .. } = *self;
        for (name, value) in [("frames", frames), ("frame_stride", frame_stride), ("resolution", resolution)] {
            ensure!(value >= 1, "data.{name} is {value}; it must be at least 1");
        }
        Ok(ClipSpec { frames, frame_stride, resolution })
    }

    /// All videos of the dataset.
    pub fn videos(&self) -> Result<Listing> {
        self.dataset.videos(self.frame_stride)
    }
}

/// Whether a name ends as one of these does, in either case.
pub(super) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| extensions.contains(&extension.as_str()))
}

/// The videos that were found, of which there must be some; else says what was looked for and what is there.
pub(super) fn some(videos: Vec<VideoEntry>, root: &Path, wanted: &str, others: usize) -> Result<Listing> {
    ensure!(!videos.is_empty(), "no {wanted} in {} or below it, but {others} other files", root.display());
    Ok(videos.into())
}

/// Calls `visit` with each folder at and under `root` and the files directly in it. Hidden names
/// are passed over.
pub(super) fn walk(root: &Path, visit: &mut impl FnMut(&Path, Vec<PathBuf>)) -> Result<()> {
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(root).with_context(|| format!("cannot read the folder {}", root.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() { folders.push(path) } else { files.push(path) }
    }
    files.sort();
    folders.sort();
    visit(root, files);
    folders.iter().try_for_each(|folder| walk(folder, visit))
}

/// Errors for a folder that is not there.
pub(super) fn ensure_folder(root: &Path, wanted: &str) -> Result<()> {
    ensure!(root.exists(), "there is no folder {}; {wanted} were looked for in it", root.display());
    ensure!(root.is_dir(), "{} is a file; a folder of {wanted} was looked for", root.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_strict_and_has_defaults() {
        let text = "{dataset: {kind: folder, root: a/b}, frames: 16, resolution: 64}";
        let config: DataConfig = serde_yaml::from_str(text).unwrap();
        assert_eq!((config.frame_stride, config.flip, config.workers), (1, false, 2));
        assert_eq!(config.dataset, DatasetConfig::Folder { root: "a/b".into() });
        let text = "{dataset: {kind: folder, rot: a/b}, frames: 16, resolution: 64}";
        assert!(serde_yaml::from_str::<DataConfig>(text).is_err());
        let text = "{dataset: {kind: packed, file: a, more: 1}, frames: 16, resolution: 64}";
        assert!(serde_yaml::from_str::<DataConfig>(text).unwrap_err().to_string().contains("more"));
        assert!(DataConfig { frames: 0, ..config }.clip().is_err());
    }
}
