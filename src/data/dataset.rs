//! What a dataset is: a list of videos. Decoding is the same for all of them.
//!
//! A new dataset is one file beside this one, with a variant of `DatasetConfig` and a match arm.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;

use super::{
    captioned::{Captioned, Webvid},
    clip::{ClipSpec, Fit, FrameSource},
    folder::Folder,
    frame_folder::{FrameFolder, pictures_in},
    frames::Frames,
    index::{Indexed, read_index, splits},
    numpy::{Numpy, NumpyFile, NumpyVideo},
    packed::{Packed, PackedFile, PackedVideo},
    reading::READING,
    video_file::VideoReader,
};

/// A list of videos, in an order that does not depend on the machine.
pub trait VideoDataset {
    /// # Errors
    /// A place that is missing or holds no videos.
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

/// Bytes of a block that a fingerprint looks at.
const BLOCK: u64 = 4096;

/// Blocks of a data set that a fingerprint looks at: 16 MiB. Of more files than this it looks at one block each.
const BLOCKS: usize = 4096;

impl Listing {
    /// What the data are, wherever they lie and whatever their files are called: SHA-256 over the videos in their order,
    /// each by its captions and by its file's size and some blocks of 4 KiB spread over it. A set of up to 16 MiB is
    /// read whole. Of a video that is a folder of pictures it is their number, and the first, middle and last one.
    ///
    /// # Errors
    /// A file that is no longer there.
    pub fn fingerprint(&self) -> Result<String> {
        let mut sources: Vec<&Source> = self.videos.iter().map(|video| &video.source).collect();
        sources.dedup_by(|one, other| one.array().is_some() && one.array() == other.array());
        let blocks = (BLOCKS / sources.len().max(1)).max(1) as u64;
        let digests = sources.par_iter().map(|source| source.digest(blocks)).collect::<Result<Vec<_>>>()?;
        let mut hash = Sha256::new();
        hash.update(format!("{} videos in {}\n", self.videos.len(), sources.len()));
        for video in &self.videos {
            hash.update(format!("{:?}\n", video.caption));
        }
        digests.iter().for_each(|digest| hash.update(digest));
        Ok(format!("{:x}", hash.finalize()))
    }

    /// Of how many pictures its videos are made.
    fn pictures(&self) -> usize {
        let of = |video: &VideoEntry| if let Source::Frames(pictures) = &video.source { pictures.len() } else { 0 };
        self.videos.iter().map(of).sum()
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
    /// One of the two, which shows when it is opened.
    FileOrFolder(PathBuf),
    /// A video of a numpy array.
    Numpy { file: Arc<NumpyFile>, index: i64 },
    /// A clip of a packed file, which holds every `step`-th frame of the original video.
    Packed { file: Arc<PackedFile>, index: i64, step: i64 },
}

impl Source {
    /// The file that this video shares with the others of an array.
    fn array(&self) -> Option<&Path> {
        match self {
            Self::Numpy { file, .. } => Some(file.path()),
            Self::Packed { file, .. } => Some(file.path()),
            Self::File(_) | Self::Frames(_) | Self::PictureFolder(_) | Self::FileOrFolder(_) => None,
        }
    }

    /// What lies at a path.
    fn at(path: &Path) -> Self {
        if path.is_dir() { Self::PictureFolder(path.to_path_buf()) } else { Self::File(path.to_path_buf()) }
    }

    /// Of the sizes of its files and of so many blocks of each.
    fn digest(&self, blocks: u64) -> Result<Vec<u8>> {
        let mut hash = Sha256::new();
        let of_pictures = |pictures: &[PathBuf], hash: &mut Sha256| -> Result<()> {
            hash.update(format!("{} pictures\n", pictures.len()));
            let mut places = vec![0, pictures.len() / 2, pictures.len().saturating_sub(1)];
            places.dedup();
            places.iter().filter_map(|&place| pictures.get(place)).try_for_each(|path| look_at(path, blocks, hash))
        };
        match self {
            Self::File(path) => look_at(path, blocks, &mut hash)?,
            Self::Frames(pictures) => of_pictures(pictures, &mut hash)?,
            Self::PictureFolder(folder) => of_pictures(&pictures_in(folder)?.frames, &mut hash)?,
            Self::FileOrFolder(path) => return Self::at(path).digest(blocks),
            Self::Numpy { file, .. } => look_at(file.path(), blocks, &mut hash)?,
            Self::Packed { file, .. } => look_at(file.path(), blocks, &mut hash)?,
        }
        Ok(hash.finalize().to_vec())
    }

    /// Opens the video for reading.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of another kind.
    pub fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(match self {
            Self::File(path) => Box::new(VideoReader::open(path)?),
            Self::Frames(pictures) => Box::new(FrameFolder::new(pictures.clone())),
            Self::PictureFolder(folder) => Box::new(FrameFolder::new(pictures_in(folder)?.frames)),
            Self::FileOrFolder(path) => return Self::at(path).open(),
            Self::Numpy { file, index } => Box::new(NumpyVideo::new(file.clone(), *index)),
            Self::Packed { file, index, step } => Box::new(PackedVideo::new(file.clone(), *index, *step)),
        })
    }
}

/// The size of a file, and so many blocks of it: the first, the last and others at equal distances; one is the middle.
fn look_at(path: &Path, blocks: u64, hash: &mut Sha256) -> Result<()> {
    let name = || format!("cannot look at {}", path.display());
    let file = fs::File::open(path).with_context(name)?;
    let size = file.metadata().with_context(name)?.len();
    hash.update(format!("{size} bytes\n"));
    let mut bytes = vec![0; BLOCK.min(size) as usize];
    let (last, blocks) = (size - bytes.len() as u64, blocks.min(size.div_ceil(BLOCK)));
    for block in 0..blocks {
        let start =
            if blocks == 1 { last / 2 } else { (u128::from(last) * u128::from(block) / u128::from(blocks - 1)) as u64 };
        file.read_exact_at(&mut bytes, start).with_context(name)?;
        hash.update(&bytes);
    }
    Ok(())
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
    /// folder of videos, a folder of folders of pictures. Pictures that move are videos where they outnumber the others.
    ///
    /// # Errors
    /// Nothing there, or nothing of these; says what was found.
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
        let frames = || (Frames { root: root.clone() }).listing_and_strays();
        match (Folder { root: root.clone() }).found() {
            Ok(found) if found.is_of_pictures() => match frames() {
                Ok((listing, _)) if listing.pictures() > found.videos.len() => Ok(Self::Frames { root }),
                _ => Ok(Self::Folder { root }),
            },
            Ok(_) => Ok(Self::Folder { root }),
            Err(no_videos) => match frames() {
                Ok(_) => Ok(Self::Frames { root }),
                Err(no_frames) => bail!("{no_videos}; {no_frames}"),
            },
        }
    }

    /// The same, one split of it.
    ///
    /// # Errors
    /// A dataset without splits; an index without this one, with those that it has.
    pub fn of_split(self, wanted: &str) -> Result<Self> {
        let Self::Indexed { file, .. } = self else {
            bail!("--split {wanted}: {} has no splits; an index has (.jsonl, lvdm data prepare)", self.line())
        };
        let set = Indexed { file: file.clone(), split: Some(wanted.into()), least_frames: 0 };
        set.videos().context("--split")?;
        Ok(Self::Indexed { file, split: set.split })
    }

    /// The splits of an index that is taken whole, each with its number of videos; else none.
    ///
    /// # Errors
    /// A file that is missing or no index.
    pub fn splits_taken(&self) -> Result<Vec<String>> {
        match self {
            Self::Indexed { file, split: None } => Ok(splits(&read_index(file)?)),
            _ => Ok(Vec::new()),
        }
    }

    /// Its file or folder.
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder { root } | Self::Frames { root } | Self::Captioned { root } | Self::Webvid { root, .. } => {
                root
            }
            Self::Indexed { file, .. } | Self::Numpy { file } | Self::Packed { file } => file,
        }
    }

    /// Where it is, and which split, for people.
    pub fn line(&self) -> String {
        match self {
            Self::Folder { root } | Self::Frames { root } | Self::Captioned { root } => root.display().to_string(),
            Self::Webvid { table, root } => format!("{} in {}", table.display(), root.display()),
            Self::Indexed { file, split: None } => format!("{}, all splits", file.display()),
            Self::Indexed { file, split: Some(split) } => format!("{}, split {split}", file.display()),
            Self::Numpy { file } | Self::Packed { file } => file.display().to_string(),
        }
    }

    /// The dataset's videos, for such clips.
    ///
    /// # Errors
    /// A place that is missing or holds no video; a clip that makes no sense.
    pub fn videos(&self, clip: &ClipSpec) -> Result<Listing> {
        self.ensure_nameable()?;
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

    /// What is made of videos says where they lie, in files that hold text alone.
    fn ensure_nameable(&self) -> Result<()> {
        let places = match self {
            Self::Folder { root } | Self::Frames { root } | Self::Captioned { root } => vec![root],
            Self::Webvid { table, root } => vec![table, root],
            Self::Indexed { file, .. } | Self::Numpy { file } | Self::Packed { file } => vec![file],
        };
        let odd = places.into_iter().find(|place| place.to_str().is_none());
        odd.map_or(Ok(()), |place| {
            bail!("the name of {} is not UTF-8: rename it, or link to it by another name", place.display())
        })
    }

    /// What can be seen without opening videos.
    ///
    /// # Errors
    /// A place that is missing, a table without its columns.
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

    /// How its videos are read: as this version reads them, or as the one did that packed them; none of arrays.
    ///
    /// # Errors
    /// A packed file that is missing or damaged.
    pub fn reading(&self) -> Result<Option<u32>> {
        match self {
            Self::Packed { file } => Ok(PackedFile::open(file)?.spec.reading()),
            _ => Ok(self.reading_of(READING)),
        }
    }

    /// How its videos were read for a file that gives this number: none of arrays, which are what they are.
    pub fn reading_of(&self, number: u32) -> Option<u32> {
        (!matches!(self, Self::Numpy { .. })).then_some(number)
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
    #[serde(default = "decode_workers")]
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

/// Whether a name ends as one of these does, in either case.
pub(super) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| extensions.contains(&extension.as_str()))
}

/// A warning that is given once in a process, since a dataset may be listed several times.
pub(super) fn warn_once(text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
        warn!("{text}");
    }
}

/// There must be some videos; else says what was looked for and what is there.
pub(super) fn ensure_some(videos: usize, root: &Path, wanted: &str, others: usize) -> Result<()> {
    ensure!(videos > 0, "no {wanted} in {} or below it, but {others} other files", root.display());
    Ok(())
}

/// Errors for a folder that is not there.
pub(super) fn ensure_folder(root: &Path, wanted: &str) -> Result<()> {
    ensure!(root.exists(), "there is no folder {}; {wanted} were looked for in it", root.display());
    ensure!(root.is_dir(), "{} is a file; a folder of {wanted} was looked for", root.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    /// The same data are the same anywhere under any name; other bytes in as many are not.
    #[test]
    fn a_fingerprint_is_of_what_the_data_are() {
        let folder = tempfile::tempdir().unwrap();
        let listing = |paths: &[&str]| -> Listing {
            let entry = |path: &&str| VideoEntry {
                name: path.to_string(),
                source: Source::File(folder.path().join(path)),
                caption: None,
            };
            paths.iter().map(entry).collect::<Vec<_>>().into()
        };
        let write = |path: &str, bytes: &[u8]| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        let mut bytes: Vec<u8> = (0..3 * BLOCK + 5).map(|i| (i % 251) as u8).collect();
        for path in ["a/x.mp4", "b/deep/renamed.mp4"] {
            write(path, &bytes);
        }
        for path in ["a/empty.mp4", "b/deep/y.mp4"] {
            write(path, b"");
        }
        let first = listing(&["a/x.mp4", "a/empty.mp4"]).fingerprint().unwrap();
        assert_eq!(listing(&["b/deep/renamed.mp4", "b/deep/y.mp4"]).fingerprint().unwrap(), first);
        assert_ne!(listing(&["a/empty.mp4", "a/x.mp4"]).fingerprint().unwrap(), first);
        assert_ne!(listing(&["a/x.mp4"]).fingerprint().unwrap(), first);
        for place in [0, BLOCK as usize + 7, bytes.len() - 1] {
            bytes[place] ^= 1;
            write("a/x.mp4", &bytes);
            assert_ne!(listing(&["a/x.mp4", "a/empty.mp4"]).fingerprint().unwrap(), first, "byte {place}");
            bytes[place] ^= 1;
        }
        write("a/x.mp4", &bytes);
        assert_eq!(listing(&["a/x.mp4", "a/empty.mp4"]).fingerprint().unwrap(), first);
        assert!(listing(&["a/none.mp4"]).fingerprint().is_err());
    }

    #[test]
    fn a_configuration_is_strict_and_has_defaults() {
        let text = "{dataset: {kind: folder, root: a/b}, frames: 16, resolution: 64}";
        let config: DataConfig = serde_yaml::from_str(text).unwrap();
        assert_eq!((config.frame_stride, config.flip, config.workers), (1, false, decode_workers()));
        assert_eq!(config.dataset, DatasetConfig::Folder { root: "a/b".into() });
        let text = "{dataset: {kind: folder, rot: a/b}, frames: 16, resolution: 64}";
        assert!(serde_yaml::from_str::<DataConfig>(text).is_err());
        let text = "{dataset: {kind: packed, file: a, more: 1}, frames: 16, resolution: 64}";
        assert!(serde_yaml::from_str::<DataConfig>(text).unwrap_err().to_string().contains("more"));
        assert!(DataConfig { frames: 0, ..config.clone() }.clip().is_err());
        let root = PathBuf::from(std::ffi::OsStr::from_bytes(b"caf\xe9"));
        let error = DataConfig { dataset: DatasetConfig::Folder { root }, ..config }.videos().unwrap_err().to_string();
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
        assert_eq!(DatasetConfig::at(&root).unwrap(), DatasetConfig::Folder { root: root.clone() });
        write("a/2.png");
        assert_eq!(DatasetConfig::at(&root).unwrap(), DatasetConfig::Frames { root: root.clone() });
        write("b.mp4");
        assert_eq!(DatasetConfig::at(&root).unwrap(), DatasetConfig::Folder { root });
    }
}
