//! The data sets that a configuration can name, and what is cut out of their videos.
//!
//! A new data set is one file beside this one, whose settings implement [`VideoDataset`], and a line in the list below.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    captioned::{Captioned, Webvid},
    clip::{ClipSpec, Fit},
    folder::Folder,
    frames::FrameFolders,
    index::{Indexed, read_index, splits},
    numpy::Numpy,
    packed::Packed,
    video::{Listing, VideoDataset},
    walk::has_extension,
};
use crate::registry::registry;

registry! {
    /// The datasets there are.
    pub enum DatasetConfig: VideoDataset {
        /// Every video file under a folder, at any depth.
        "folder" => Folder(Folder),
        /// Every folder under a folder, at any depth, that holds pictures: each is one video.
        "frames" => Frames(FrameFolders),
        /// A table (CSV) with the columns `videoid` and `name`, the caption, and a folder of its videos.
        "webvid" => Webvid(Webvid),
        /// Every video file under a folder that has its caption beside it.
        "captioned" => Captioned(Captioned),
        /// What `lvdm data prepare` found: an index, and one split of it or all.
        "indexed" => Indexed(Indexed),
        /// A numpy file (.npy, .npz) of unsigned bytes `[N, F, H, W, 3]`.
        "numpy" => Numpy(Numpy),
        /// A file written by `pack_clips`.
        "packed" => Packed(Packed),
    }
}

impl Eq for DatasetConfig {}

impl DatasetConfig {
    /// The dataset that a path is, by its name or by what lies in it: an index, a numpy array, a packed file, a
    /// folder of videos, a folder of folders of pictures. Pictures that move are videos where they outnumber the others.
    ///
    /// # Errors
    /// Nothing there, or nothing of these; says what was found.
    pub fn at(path: &Path) -> Result<Self> {
        ensure!(path.exists(), "there is no {}", path.display());
        if path.is_file() {
            let file = path.to_path_buf();
            if has_extension(path, &["jsonl"]) {
                return Ok(Self::Indexed(Indexed { file, split: None }));
            }
            if has_extension(path, &["npy", "npz"]) {
                return Ok(Self::Numpy(Numpy { file }));
            }
            ensure!(
                has_extension(path, &["safetensors"]),
                "{} is none of the files that hold videos here: an index (.jsonl), a numpy array (.npy, .npz), packed \
                 clips (.safetensors)",
                path.display()
            );
            return Ok(Self::Packed(Packed { file }));
        }
        let root = path.to_path_buf();
        let (folder, frames) = (Folder { root: root.clone() }, FrameFolders { root });
        match folder.found() {
            Ok(found) if found.is_of_pictures() => match frames.found() {
                Ok(of_frames) if of_frames.pictures > found.videos.len() => Ok(Self::Frames(frames)),
                _ => Ok(Self::Folder(folder)),
            },
            Ok(_) => Ok(Self::Folder(folder)),
            Err(no_videos) => match frames.found() {
                Ok(_) => Ok(Self::Frames(frames)),
                Err(no_frames) => bail!("{no_videos}; {no_frames}"),
            },
        }
    }

    /// The same, one split of it.
    ///
    /// # Errors
    /// A dataset without splits; an index without this one, with those that it has.
    pub fn of_split(self, wanted: &str) -> Result<Self> {
        let Self::Indexed(Indexed { file, .. }) = self else {
            bail!("--split {wanted}: {} has no splits; an index has (.jsonl, lvdm data prepare)", self.line())
        };
        let set = Indexed { file, split: Some(wanted.into()) };
        set.entries().context("--split")?;
        Ok(Self::Indexed(set))
    }

    /// The splits of an index that is taken whole, each with its number of videos; else none.
    ///
    /// # Errors
    /// A file that is missing or no index.
    pub fn splits_taken(&self) -> Result<Vec<String>> {
        match self {
            Self::Indexed(Indexed { file, split: None }) => Ok(splits(&read_index(file)?)),
            _ => Ok(Vec::new()),
        }
    }

    /// The dataset's videos, for such clips.
    ///
    /// # Errors
    /// A place that is missing or holds no video; a clip that makes no sense.
    pub fn videos(&self, clip: &ClipSpec) -> Result<Listing> {
        // what is made of videos says where they lie, in files that hold text alone
        if let Some(place) = self.paths().into_iter().find(|place| place.to_str().is_none()) {
            bail!("the name of {} is not UTF-8: rename it, or link to it by another name", place.display());
        }
        (**self).videos(clip)
    }

    /// How its videos were read for a file that gives this number: none of arrays, which are what they are.
    pub fn reading_of(&self, number: u32) -> Option<u32> {
        (!matches!(self, Self::Numpy(_))).then_some(number)
    }
}

/// Where clips come from and what they are like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
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
    #[serde(default = "decode_workers")]
    #[schemars(extend("default" = "one for each CPU, at most 16"))]
    pub workers: usize,
}

fn default_stride() -> i64 {
    1
}

/// As many threads decode as this process has CPUs, where nothing else is said: a GPU waits for two. At most 16, since
/// each holds clips in memory; ranks that `--nproc` or torchrun starts on one machine share its CPUs.
pub fn decode_workers() -> usize {
    (crate::torch::cpus() / crate::distributed::ranks_here()).clamp(1, 16)
}

impl DataConfig {
    /// What is cut out of each video.
    ///
    /// # Errors
    /// A count or a size below 1.
    pub fn clip(&self) -> Result<ClipSpec> {
        /// No clip is meant to be larger.
        const MOST: i64 = 1 << 20;
        let Self { frames, frame_stride, resolution, .. } = *self;
        for (name, value) in [("frames", frames), ("frame_stride", frame_stride), ("resolution", resolution)] {
            ensure!(value >= 1, "data.{name} is {value}; it must be at least 1");
            ensure!(value <= MOST, "data.{name} is {value}; it must be at most {MOST}");
        }
        Ok(ClipSpec { frames, frame_stride, resolution, fit: Fit::default() })
    }

    /// All videos of the dataset.
    ///
    /// # Errors
    /// A place that is missing or holds no video; a clip that makes no sense.
    pub fn videos(&self) -> Result<Listing> {
        self.dataset.videos(&self.clip()?)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::ffi::OsStrExt, path::PathBuf};

    use super::{super::packed::ARRAY, *};

    #[test]
    fn a_configuration_is_strict_and_has_defaults() {
        let text = "{dataset: {kind: folder, root: a/b}, frames: 16, resolution: 64}";
        let config: DataConfig = serde_yaml::from_str(text).unwrap();
        assert_eq!((config.frame_stride, config.flip, config.workers), (1, false, decode_workers()));
        assert_eq!(config.dataset, DatasetConfig::Folder(Folder { root: "a/b".into() }));
        let text = "{dataset: {kind: folder, rot: a/b}, frames: 16, resolution: 64}";
        assert!(serde_yaml::from_str::<DataConfig>(text).is_err());
        let text = "{dataset: {kind: packed, file: a, more: 1}, frames: 16, resolution: 64}";
        assert!(serde_yaml::from_str::<DataConfig>(text).unwrap_err().to_string().contains("more"));
        let array = DatasetConfig::Numpy(Numpy { file: "a.npy".into() });
        assert_eq!(serde_json::to_value(array).unwrap(), serde_json::json!({"kind": ARRAY, "file": "a.npy"}));
        assert!(DataConfig { frames: 0, ..config.clone() }.clip().is_err());
        let root = PathBuf::from(std::ffi::OsStr::from_bytes(b"caf\xe9"));
        let error =
            DataConfig { dataset: DatasetConfig::Folder(Folder { root }), ..config }.videos().unwrap_err().to_string();
        assert!(error.contains("caf\u{fffd} is not UTF-8"), "{error}");
    }

    #[test]
    fn a_preview_makes_no_folder_of_videos_of_folders_of_pictures() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().to_path_buf();
        let write = |name: &str| {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), b"").unwrap();
        };
        ["a/1.png", "a/1.gif"].into_iter().for_each(write);
        assert_eq!(DatasetConfig::at(&root).unwrap(), DatasetConfig::Folder(Folder { root: root.clone() }));
        write("a/2.png");
        assert_eq!(DatasetConfig::at(&root).unwrap(), DatasetConfig::Frames(FrameFolders { root: root.clone() }));
        write("b.mp4");
        assert_eq!(DatasetConfig::at(&root).unwrap(), DatasetConfig::Folder(Folder { root }));
    }
}
