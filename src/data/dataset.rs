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
use sha2::{Digest, Sha256};

use super::{
    captioned::{Captioned, Webvid},
    clip::{ClipSpec, Fit, FrameSource},
    folder::Folder,
    frame_folder::{FrameFolder, pictures_in},
    frames::Frames,
    index::Indexed,
    numpy::{Numpy, NumpyFile, NumpyVideo},
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
    /// Those that are there, in an order that does not depend on the machine.
    pub videos: Vec<VideoEntry>,
    /// How many more the dataset names that are not there, or lack their caption.
    pub left_out: usize,
}

impl Listing {
    /// SHA-256 over the names of the videos and over path, size and time of change of their files: equal as long as
    /// nobody touched the data.
    ///
    /// Errors: a file that is no longer there.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let mut last = None;
        for video in &self.videos {
            hash.update(format!("{}\n", video.name));
            for path in video.source.files() {
                // all videos of one file
                if last == Some(path) {
                    continue;
                }
                last = Some(path);
                let told = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
                hash.update(format!("{} {} {:?}\n", path.display(), told.len(), told.modified()?));
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }
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
    /// What holds its frames.
    pub source: Source,
    /// What it shows, of datasets that say so.
    pub caption: Option<String>,
}

/// What holds a video's frames.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // its variants say what their fields are
pub enum Source {
    /// A video file.
    File(PathBuf),
    /// Pictures, in the order in which they are shown.
    Frames(Vec<PathBuf>),
    /// A folder of pictures, which is listed when it is opened.
    PictureFolder(PathBuf),
    /// A video of a numpy array.
    Numpy { file: Arc<NumpyFile>, index: i64 },
    /// A clip of a packed file, which holds every `step`-th frame of the original video.
    Packed { file: Arc<PackedFile>, index: i64, step: i64 },
}

impl Source {
    /// Where the frames lie.
    fn files(&self) -> &[PathBuf] {
        match self {
            Self::File(path) | Self::PictureFolder(path) => std::slice::from_ref(path),
            Self::Frames(pictures) => pictures,
            Self::Numpy { file, .. } => std::slice::from_ref(file.path()),
            Self::Packed { file, .. } => std::slice::from_ref(file.path()),
        }
    }

    /// Opens the video for reading.
    pub fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(match self {
            Self::File(path) => Box::new(VideoReader::open(path)?),
            Self::Frames(pictures) => Box::new(FrameFolder::new(pictures.clone())),
            Self::PictureFolder(folder) => Box::new(FrameFolder::new(pictures_in(folder)?)),
            Self::Numpy { file, index } => Box::new(NumpyVideo::new(file.clone(), *index)),
            Self::Packed { file, index, step } => Box::new(PackedVideo::new(file.clone(), *index, *step)),
        })
    }
}

/// The datasets there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs)] // its variants say what their fields are
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
    /// What `lvdm data prepare` found: an index, and one split of it or all.
    Indexed {
        file: PathBuf,
        #[serde(default)]
        split: Option<String>,
    },
    /// A numpy file (.npy, .npz) of unsigned bytes `[N, F, H, W, 3]`.
    Numpy { file: PathBuf },
    /// A file written by `pack_clips`.
    Packed { file: PathBuf },
}

impl DatasetConfig {
    /// The dataset that a path is, by its name or by what lies in it: an index, a numpy array, a packed file, a
    /// folder of videos, a folder of folders of pictures.
    ///
    /// Errors: nothing there, or nothing of these; says what was found.
    pub fn at(path: &Path) -> Result<Self> {
        ensure!(path.exists(), "there is no {}", path.display());
        if path.is_file() {
            let file = path.to_path_buf();
            if has_extension(path, &["jsonl"]) {
                return Ok(Self::Indexed { file, split: None });
            }
            if has_extension(path, &["npy", "npz"]) {
                return Ok(Self::Numpy { file });
            }
            ensure!(
                has_extension(path, &["safetensors"]),
                "{} is none of the files that hold videos here: an index (.jsonl), a numpy array (.npy, .npz), packed \
                 clips (.safetensors)",
                path.display()
            );
            return Ok(Self::Packed { file });
        }
        let root = path.to_path_buf();
        if let Err(no_videos) = (Folder { root: root.clone() }).videos() {
            return match (Frames { root: root.clone() }).videos() {
                Ok(_) => Ok(Self::Frames { root }),
                Err(no_frames) => anyhow::bail!("{no_videos}; {no_frames}"),
            };
        }
        Ok(Self::Folder { root })
    }

    /// The dataset's videos, for such clips.
    pub fn videos(&self, clip: &ClipSpec) -> Result<Listing> {
        match self.clone() {
            Self::Folder { root } => Folder { root }.videos(),
            Self::Frames { root } => Frames { root }.videos(),
            Self::Webvid { table, root } => Webvid { table, root }.videos(),
            Self::Captioned { root } => Captioned { root }.videos(),
            Self::Indexed { file, split } => Indexed { file, split, least_frames: clip.span() }.videos(),
            Self::Numpy { file } => Numpy { file }.videos(),
            Self::Packed { file } => Packed { file, frame_stride: clip.frame_stride }.videos(),
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
            Self::Indexed { file, .. } => {
                ensure!(file.exists(), "there is no index {} (write it first: lvdm data prepare …)", file.display());
                file
            }
            Self::Numpy { file } | Self::Packed { file } => file,
        };
        ensure!(path.exists(), "there is no {}", path.display());
        Ok(())
    }

    /// Whether its videos may have captions.
    pub fn has_captions(&self) -> bool {
        match self {
            Self::Folder { .. } | Self::Frames { .. } | Self::Indexed { .. } | Self::Numpy { .. } => false,
            Self::Webvid { .. } | Self::Captioned { .. } | Self::Packed { .. } => true,
        }
    }
}

/// Where clips come from and what they are like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Where the videos are.
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
        Ok(ClipSpec { frames, frame_stride, resolution, fit: Fit::default() })
    }

    /// All videos of the dataset.
    pub fn videos(&self) -> Result<Listing> {
        self.dataset.videos(&self.clip()?)
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
