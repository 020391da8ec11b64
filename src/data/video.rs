//! What a video and a data set are, whatever holds them. Formats import this file and implement its traits; it imports
//! none of them.

use std::{collections::BTreeSet, fmt::Debug, fs::File, os::unix::fs::FileExt, path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{
    clip::{ClipSpec, FrameSource},
    reading::READING,
};

/// What holds a video's frames: a video file, pictures, one clip of an array.
pub trait VideoSource: Debug + Send + Sync {
    /// Opens the video for reading.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of another kind.
    fn open(&self) -> Result<Box<dyn FrameSource>>;

    /// What the video is, without its name and place: a SHA-256 over the sizes of its files and over so many blocks of
    /// each, see [`hash_blocks`].
    ///
    /// # Errors
    /// A file that is no longer there.
    fn digest(&self, blocks: u64) -> Result<Vec<u8>>;

    /// The file that this video shares with the others of an array.
    fn array(&self) -> Option<&Path> {
        None
    }

    /// The file of a video that is known to be stored in one of its own, compressed as videos are.
    fn video_file(&self) -> Option<&Path> {
        None
    }
}

/// One video of a dataset.
#[derive(Debug, Clone)]
pub struct VideoEntry {
    /// For people: a path, as it was found.
    pub name: String,
    /// What holds its frames.
    pub source: Arc<dyn VideoSource>,
    /// What it shows, of datasets that say so.
    pub caption: Option<String>,
    /// The name of its class, of datasets that have classes.
    pub class: Option<String>,
}

impl VideoEntry {
    /// A video without caption and class.
    pub fn new(name: impl Into<String>, source: impl VideoSource + 'static) -> Self {
        VideoEntry { name: name.into(), source: Arc::new(source), caption: None, class: None }
    }
}

/// A list of videos, in an order that does not depend on the machine. Its settings are what implements this.
pub trait VideoDataset {
    /// The videos, for such clips: those that cannot give one may be left out, where that is known without opening them.
    ///
    /// # Errors
    /// A place that is missing or holds no videos.
    fn videos(&self, clip: &ClipSpec) -> Result<Listing>;

    /// Its file or folder.
    fn path(&self) -> &Path;

    /// Its file or folder, and whatever else it names.
    fn paths(&self) -> Vec<&Path> {
        vec![self.path()]
    }

    /// Where it is, for people.
    fn line(&self) -> String {
        self.path().display().to_string()
    }

    /// What can be seen without opening videos.
    ///
    /// # Errors
    /// A place that is missing.
    fn check(&self) -> Result<()> {
        ensure!(self.path().exists(), "there is no {}", self.path().display());
        Ok(())
    }

    /// The folder below which its videos are files: while it is away, as a file server may be, loading waits for it.
    fn root(&self) -> Option<&Path> {
        None
    }

    /// Whether its videos may have captions.
    fn has_captions(&self) -> bool {
        false
    }

    /// How its videos are read, see [`READING`]: none of arrays, which are what they are.
    ///
    /// # Errors
    /// A file that says so and is missing or damaged.
    fn reading(&self) -> Result<Option<u32>> {
        Ok(Some(READING))
    }
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
        let mut sources: Vec<&dyn VideoSource> = self.videos.iter().map(|video| &*video.source).collect();
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
}

impl Listing {
    /// The names of its classes, sorted; a class's number is its place among them. None where a video has no class.
    pub fn classes(&self) -> Option<Vec<String>> {
        let names: Option<BTreeSet<&String>> = self.videos.iter().map(|video| video.class.as_ref()).collect();
        Some(names?.into_iter().cloned().collect())
    }
}

impl From<Vec<VideoEntry>> for Listing {
    fn from(videos: Vec<VideoEntry>) -> Self {
        Listing { videos, left_out: 0 }
    }
}

/// The digest of a video that is one file.
///
/// # Errors
/// As [`hash_blocks`].
pub fn digest_of_file(path: &Path, blocks: u64) -> Result<Vec<u8>> {
    let mut hash = Sha256::new();
    hash_blocks(path, blocks, &mut hash)?;
    Ok(hash.finalize().to_vec())
}

/// The size of a file, and so many blocks of it: the first, the last and others at equal distances; one is the middle.
///
/// # Errors
/// A file that is missing or cannot be read.
pub fn hash_blocks(path: &Path, blocks: u64, hash: &mut Sha256) -> Result<()> {
    let name = || format!("cannot look at {}", path.display());
    let file = File::open(path).with_context(name)?;
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::video_path::VideoFile, *};

    /// The same data are the same anywhere under any name; other bytes in as many are not.
    #[test]
    fn a_fingerprint_is_of_what_the_data_are() {
        let folder = tempfile::tempdir().unwrap();
        let listing = |paths: &[&str]| -> Listing {
            let entry = |path: &&str| VideoEntry::new(*path, VideoFile::new(folder.path().join(path)));
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
}
