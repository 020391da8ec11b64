//! An index of videos: what `lvdm data prepare` found, so that training starts at once and walks no tree.
//!
//! One JSON object a line. Paths are relative to the index's folder, or absolute.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    clip::ClipSpec,
    folder,
    frame_folder::PictureFolder,
    video::{Listing, VideoDataset, VideoEntry, VideoSource},
    video_path::{FileOrFolder, VideoFile},
    walk::has_extension,
};
use crate::{atomic_file::write_atomically, text_file::trim};

/// One video of an index.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexEntry {
    /// A video file, or a folder of pictures.
    pub path: PathBuf,
    /// How many there are.
    pub frames: i64,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Frames a second; pictures have no rate.
    pub fps: Option<f64>,
    /// Of data sets that have classes.
    pub class: Option<String>,
    /// Of data sets that have splits.
    pub split: Option<String>,
}

impl IndexEntry {
    /// What holds its frames.
    pub fn source(&self) -> Arc<dyn VideoSource> {
        // A folder may end like a file. Where the name and the rate say the same, the disk is not asked; else it is when
        // the video is opened, since the disk may not be there yet.
        match (self.fps.is_some(), has_extension(&self.path, &folder::EXTENSIONS)) {
            (true, true) => Arc::new(VideoFile::new(&self.path)),
            (false, false) => Arc::new(PictureFolder::new(&self.path)),
            _ => Arc::new(FileOrFolder::new(&self.path)),
        }
    }
}

/// Reads an index; paths come back as they can be opened.
///
/// # Errors
/// A file that is missing or no index, with the line.
pub fn read_index(path: &Path) -> Result<Vec<IndexEntry>> {
    let file = File::open(path)
        .with_context(|| format!("cannot open the index {} (`lvdm data prepare` writes one)", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut entries = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let place = || format!("line {} of {} is none of an index of videos", number + 1, path.display());
        let mut entry: IndexEntry = serde_json::from_str(trim(&line.with_context(place)?)).with_context(place)?;
        entry.path = folder.join(entry.path);
        entries.push(entry);
    }
    Ok(entries)
}

/// Writes an index, with paths below its folder made relative to it.
///
/// # Errors
/// A full disk, which leaves what was there before.
pub fn write_index(path: &Path, entries: &[IndexEntry]) -> Result<()> {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    write_atomically(path, |file| {
        let folder = folder.canonicalize()?;
        for entry in entries {
            let whole = entry.path.canonicalize().with_context(|| entry.path.display().to_string())?;
            let path = whole.strip_prefix(&folder).map(Path::to_path_buf).unwrap_or(whole.clone());
            writeln!(file, "{}", serde_json::to_string(&IndexEntry { path, ..entry.clone() })?)?;
        }
        Ok(())
    })
}

/// Each split, with its number of videos: "`train` (9537)".
pub(super) fn splits(entries: &[IndexEntry]) -> Vec<String> {
    let mut splits: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in entries {
        *splits.entry(entry.split.as_deref().unwrap_or("none")).or_default() += 1;
    }
    splits.iter().map(|(split, count)| format!("`{split}` ({count})")).collect()
}

/// The videos of an index, in its order. Those shorter than a clip are left out without being opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Indexed {
    /// The index, JSON lines.
    pub file: PathBuf,
    /// Those of one split only.
    #[serde(default)]
    pub split: Option<String>,
}

impl Indexed {
    /// The entries of the split, or all, of any length.
    pub(super) fn entries(&self) -> Result<Vec<IndexEntry>> {
        let all = read_index(&self.file)?;
        let name = self.file.display();
        ensure!(!all.is_empty(), "the index {name} is empty");
        let wanted = |entry: &&IndexEntry| self.split.is_none() || entry.split == self.split;
        let chosen: Vec<IndexEntry> = all.iter().filter(wanted).cloned().collect();
        ensure!(
            !chosen.is_empty(),
            "{name} has no videos of the split `{}`; it has {}",
            self.split.as_deref().unwrap_or_default(),
            splits(&all).join(", ")
        );
        Ok(chosen)
    }
}

impl VideoDataset for Indexed {
    fn videos(&self, clip: &ClipSpec) -> Result<Listing> {
        let least_frames = clip.span();
        let chosen = self.entries()?;
        let name = self.file.display();
        let long: Vec<VideoEntry> = chosen
            .iter()
            .filter(|entry| entry.frames >= least_frames)
            .map(|entry| VideoEntry {
                name: entry.path.display().to_string(),
                source: entry.source(),
                caption: None,
                class: entry.class.clone(),
            })
            .collect();
        let short = chosen.len() - long.len();
        ensure!(!long.is_empty(), "all {short} videos of {name} are shorter than a clip's {least_frames} frames");
        if short > 0 {
            warn!("{short} of {} videos of {name} are shorter than a clip's {least_frames} frames", chosen.len());
        }
        Ok(Listing { videos: long, left_out: short })
    }

    fn path(&self) -> &Path {
        &self.file
    }

    fn line(&self) -> String {
        match &self.split {
            None => format!("{}, all splits", self.file.display()),
            Some(split) => format!("{}, split {split}", self.file.display()),
        }
    }

    fn check(&self) -> Result<()> {
        let file = self.file.display();
        ensure!(self.file.exists(), "there is no index {file} (write it first: lvdm data prepare …)");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::clip::SHORT, *};

    fn entry(path: PathBuf, frames: i64, split: &str) -> IndexEntry {
        IndexEntry {
            path,
            frames,
            width: 8,
            height: 6,
            fps: None,
            class: Some(split.to_uppercase()),
            split: Some(split.into()),
        }
    }

    #[test]
    fn what_was_written_is_read_wherever_the_folder_goes() {
        let place = tempfile::tempdir().unwrap();
        let (root, other) = (place.path().join("a"), place.path().join("elsewhere"));
        for folder in [root.join("v1"), root.join("v2"), other.clone()] {
            fs::create_dir_all(folder).unwrap();
        }
        let entries =
            [entry(root.join("v1"), 20, "train"), entry(root.join("v2"), 5, "train"), entry(other.clone(), 9, "test")];
        write_index(&root.join("index.jsonl"), &entries).unwrap();
        let moved = place.path().join("b");
        fs::rename(&root, &moved).unwrap();
        let found = read_index(&moved.join("index.jsonl")).unwrap();
        assert_eq!(found[0], IndexEntry { path: moved.join("v1"), ..entries[0].clone() });
        assert_eq!(found[2].path, other.canonicalize().unwrap());

        let videos = |split: Option<&str>, least_frames| {
            let file = moved.join("index.jsonl");
            Indexed { file, split: split.map(String::from) }.videos(&ClipSpec { frames: least_frames, ..SHORT })
        };
        let classes: Vec<_> = videos(None, 1).unwrap().videos.into_iter().map(|video| video.class.unwrap()).collect();
        assert_eq!(classes, ["TRAIN", "TRAIN", "TEST"]);
        assert_eq!(videos(Some("train"), 16).unwrap().videos.len(), 1);
        assert_eq!(videos(Some("train"), 16).unwrap().left_out, 1);
        let error = videos(Some("validation"), 1).unwrap_err().to_string();
        assert!(error.contains("`validation`") && error.contains("`train` (2)"), "{error}");
        assert!(videos(None, 99).unwrap_err().to_string().contains("shorter"));
        fs::write(moved.join("index.jsonl"), "{\"path\": 3}\n").unwrap();
        assert!(format!("{:#}", videos(None, 1).unwrap_err()).contains("line 1"));
    }

    #[test]
    fn a_disk_that_comes_later_is_asked_later() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("v.mp4");
        let of = |path: &Path, fps| IndexEntry { fps, ..entry(path.to_path_buf(), 2, "train") }.source();
        let source = of(&folder, None);
        let kind = |source: &Arc<dyn VideoSource>| format!("{source:?}").split(' ').next().unwrap().to_string();
        assert_eq!(kind(&of(&folder, Some(25.0))), "VideoFile");
        assert_eq!(kind(&of(&place.path().join("v"), None)), "PictureFolder");
        assert!(source.open().is_err());
        // as a network's disk is mounted after the index was read
        fs::create_dir(&folder).unwrap();
        for frame in 0..2 {
            let pixels = tch::Tensor::zeros([4, 4, 3], (tch::Kind::Uint8, tch::Device::Cpu));
            super::super::pictures::write_png(&folder.join(format!("{frame}.png")), &pixels).unwrap();
        }
        assert_eq!(source.open().unwrap().frames(), 2);
        let entry = |source| VideoEntry { source, ..VideoEntry::new("", VideoFile::new("")) };
        let listing = |source| Listing::from(vec![entry(source)]);
        let pictures = listing(Arc::new(PictureFolder::new(folder)));
        assert_eq!(listing(source).fingerprint().unwrap(), pictures.fingerprint().unwrap());
    }
}
