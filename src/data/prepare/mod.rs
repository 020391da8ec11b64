//! From a downloaded data set to an index: what is there, what is missing, what cannot be used.
//!
//! A data set is one file beside this one: it says which of a tree's videos are its own, their class and split, and
//! what was published about their number. Looking into the videos is the same for all.

mod sky_timelapse;
mod taichi;
mod ucf101;

use std::{
    io::Write,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    VideoReader, folder,
    frame_folder::{self, Pictures, gap, picture_size, pictures_in, read_picture},
    index::{IndexEntry, write_index},
    walk::{ensure_folder, has_extension, walk},
};
use crate::{atomic_file::write_atomically, torch::caught};

/// The data sets that can be prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KnownSet {
    /// 101 classes of human actions, with split lists.
    Ucf101,
    /// Time-lapse videos of skies.
    SkyTimelapse,
    /// Taichi-HD.
    Taichi,
}

/// What can be told about a data set without opening a video.
#[derive(Debug, Default)]
pub struct Survey {
    /// The videos that the layout names.
    pub found: Vec<Found>,
    /// Names of videos that should be there.
    pub missing: Vec<String>,
    /// What was counted, beside what was published.
    pub counts: Vec<Count>,
    /// What else people should know.
    pub notes: Vec<String>,
}

/// A video that belongs to the data set.
#[derive(Debug, Clone)]
pub struct Found {
    /// The video file or folder of pictures.
    pub path: PathBuf,
    /// Where the layout tells it.
    pub class: Option<String>,
    /// Where the layout tells it.
    pub split: Option<String>,
}

/// A number beside the published one, where there is one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Count {
    /// What was counted, in words.
    pub what: String,
    /// How many are there.
    pub found: u64,
    /// How many there should be, from the fewest to the most that are published.
    pub published: Option<RangeInclusive<u64>>,
}

/// A video that cannot be used, or not by everyone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Path, as it was found.
    pub name: String,
    /// What kind of problem.
    pub kind: ProblemKind,
    /// What went wrong, in words.
    pub reason: String,
}

/// What can be wrong with a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// It should be there.
    Missing,
    /// It cannot be decoded, and is not in the index.
    Corrupt,
    /// Pictures with a gap in their numbers, of several sizes, or beside others that are no frames; it is in the index all
    /// the same.
    Uneven,
    /// Shorter than the clips that were asked about; it is in the index all the same.
    TooShort,
}

/// What was prepared.
#[derive(Debug)]
pub struct Prepared {
    /// The usable videos.
    pub entries: Vec<IndexEntry>,
    /// The others, with reasons.
    pub problems: Vec<Problem>,
    /// What was counted, beside what was published.
    pub counts: Vec<Count>,
    /// What else people should know.
    pub notes: Vec<String>,
}

impl Prepared {
    /// How many problems of a kind there are.
    pub fn count(&self, kind: ProblemKind) -> usize {
        self.problems.iter().filter(|problem| problem.kind == kind).count()
    }

    /// Writes the index, and beside it the problems (`….problems.jsonl`), of which there may be none.
    ///
    /// # Errors
    /// A full disk; no video that can be used.
    pub fn write(&self, index: &Path) -> Result<()> {
        let first = self.problems.iter().find(|problem| problem.kind == ProblemKind::Corrupt);
        ensure!(
            !self.entries.is_empty(),
            "no video can be used; the first: {}",
            first.map_or(String::new(), |problem| format!("{}: {}", problem.name, problem.reason))
        );
        write_index(index, &self.entries)?;
        write_atomically(&problems_file(index), |file| {
            for problem in &self.problems {
                writeln!(file, "{}", serde_json::to_string(problem)?)?;
            }
            Ok(())
        })
    }
}

/// Where the problems of an index are written.
pub fn problems_file(index: &Path) -> PathBuf {
    index.with_extension("problems.jsonl")
}

/// How far into a video is looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Every frame is decoded.
    Whole,
    /// The first and the last frame; of pictures in between the headers.
    Ends,
}

/// Finds the set's videos under `root`, looks into each of them on all cores, and says which are shorter than
/// `least_frames`. `lists` is where UCF-101's lists of splits lie, if not in their usual place. `done` is told after
/// each video how many there are.
///
/// # Errors
/// A folder that is not laid out in any of the set's ways; says what was found and what was expected.
pub fn prepare(
    set: KnownSet,
    root: &Path,
    lists: Option<&Path>,
    least_frames: i64,
    depth: Depth,
    done: &(dyn Fn(usize) + Sync),
) -> Result<Prepared> {
    let tree = Tree::read(root)?;
    let Survey { found, missing, counts, notes } = match set {
        KnownSet::Ucf101 => ucf101::survey(&tree, lists)?,
        KnownSet::SkyTimelapse => sky_timelapse::survey(&tree)?,
        KnownSet::Taichi => taichi::survey(&tree)?,
    };
    let total = found.len();
    let looked: Vec<Result<(IndexEntry, Option<String>), Problem>> = found
        .into_par_iter()
        .map(|found| {
            let looked = caught(|| look_into(&found, &tree.root, depth)).map_err(|error| Problem {
                name: found.path.display().to_string(),
                kind: ProblemKind::Corrupt,
                reason: format!("{error:#}"),
            });
            done(total);
            looked
        })
        .collect();
    let missing = missing.into_iter().map(|name| Problem {
        name,
        kind: ProblemKind::Missing,
        reason: "it is not in the folder".into(),
    });
    let mut problems: Vec<Problem> = missing.collect();
    let mut entries = Vec::new();
    for looked in looked {
        match looked {
            Err(problem) => problems.push(problem),
            Ok((entry, uneven)) => {
                problems.extend(uneven.map(|reason| Problem {
                    name: entry.path.display().to_string(),
                    kind: ProblemKind::Uneven,
                    reason,
                }));
                if entry.frames < least_frames {
                    problems.push(Problem {
                        name: entry.path.display().to_string(),
                        kind: ProblemKind::TooShort,
                        reason: format!("{} frames, a clip spans {least_frames}", entry.frames),
                    });
                }
                entries.push(entry);
            }
        }
    }
    problems.sort_by_key(|problem| problem.kind);
    Ok(Prepared { entries, problems, counts, notes })
}

/// Size, rate and number of frames; and what is uneven about them.
fn look_into(found: &Found, root: &Path, depth: Depth) -> Result<(IndexEntry, Option<String>)> {
    let Found { path, class, split } = found.clone();
    let name = path.strip_prefix(root).unwrap_or(&path);
    ensure!(name.to_str().is_some(), "its name is not UTF-8, which an index cannot hold: rename it");
    let entry =
        |frames, width, height, fps| IndexEntry { path: path.clone(), frames, width, height, fps, class, split };
    if !path.is_dir() {
        let mut reader = VideoReader::open(&path)?;
        let frames = reader.frames();
        let first = reader.read(0, 1, 1)?.remove(0);
        reader.read(frames - 1, 1, 1)?;
        if depth == Depth::Whole {
            reader.check()?;
        }
        return Ok((entry(frames, first.width, first.height, Some(reader.fps())), None));
    }
    let Pictures { frames: pictures, strays } = pictures_in(&path)?;
    let last = pictures.len() - 1;
    let mut sizes = Vec::new();
    for (i, picture) in pictures.iter().enumerate() {
        sizes.push(picture_size(picture)?);
        if depth == Depth::Whole || i == 0 || i == last {
            read_picture(picture)?;
        }
    }
    let (width, height) = sizes[0];
    let other = sizes.iter().position(|size| *size != sizes[0]).map(|i| {
        let (w, h) = sizes[i];
        format!("{} is {w}x{h}, the first picture {width}x{height}", pictures[i].display())
    });
    let strays = (!strays.is_empty()).then(|| {
        let first = Pictures::strays_line(&strays);
        format!("{} pictures are not taken for frames, since their names follow another pattern: {first}", strays.len())
    });
    Ok((entry(pictures.len() as i64, width, height, None), other.or(strays).or_else(|| gap(&pictures))))
}

/// What lies under a folder.
pub(super) struct Tree {
    root: PathBuf,
    videos: Vec<PathBuf>,
    /// Folders that directly hold pictures.
    picture_folders: Vec<PathBuf>,
    folders: Vec<PathBuf>,
    others: Vec<PathBuf>,
}

impl Tree {
    fn read(root: &Path) -> Result<Self> {
        ensure_folder(root, "a data set")?;
        let (mut videos, mut picture_folders) = (Vec::new(), Vec::new());
        let (mut folders, mut others) = (Vec::new(), Vec::new());
        walk(root, &mut |folder, files| {
            if folder != root {
                folders.push(folder.to_path_buf());
            }
            let mut pictures = false;
            for file in files {
                if has_extension(&file, &folder::EXTENSIONS) {
                    videos.push(file);
                } else if has_extension(&file, &frame_folder::EXTENSIONS) {
                    pictures = true;
                } else {
                    others.push(file);
                }
            }
            if pictures {
                picture_folders.push(folder.to_path_buf());
            }
        })?;
        let previews = folder::take_previews(&mut videos);
        folder::warn_of_previews(&previews, root);
        others.extend(previews);
        Ok(Tree { root: root.to_path_buf(), videos, picture_folders, folders, others })
    }

    /// The folders between the root and a path, in small letters.
    fn ancestors(&self, path: &Path) -> Vec<String> {
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        let names: Vec<String> =
            below.components().map(|part| part.as_os_str().to_string_lossy().to_lowercase()).collect();
        names[..names.len().saturating_sub(1)].to_vec()
    }

    /// `train` or `test`, as a folder above the path says it; `root` itself counts too.
    fn split_of(&self, path: &Path) -> Option<String> {
        let own = self.root.file_name().map(|name| name.to_string_lossy().to_lowercase());
        let names = own.into_iter().chain(self.ancestors(path)).collect::<Vec<_>>();
        names.iter().rev().find_map(|name| {
            let words: Vec<&str> = name.split(['_', '-']).collect();
            let says = |known: &[&str]| words.iter().any(|word| known.contains(word));
            if says(&["train", "training"]) {
                Some("train".to_string())
            } else if says(&["test", "testing", "val", "validation"]) {
                Some("test".to_string())
            } else {
                None
            }
        })
    }

    /// What a person who gave the wrong folder needs to see.
    fn found(&self) -> String {
        let show = |paths: &[PathBuf], what: &str| {
            let names: Vec<String> = paths
                .iter()
                .take(3)
                .map(|path| path.strip_prefix(&self.root).unwrap_or(path).display().to_string())
                .collect();
            let such = if names.is_empty() { String::new() } else { format!(" ({}…)", names.join(", ")) };
            format!("{} {what}{such}", paths.len())
        };
        format!(
            "{}, {}, {} and {} in {}",
            show(&self.folders, "folders"),
            show(&self.videos, "video files"),
            show(&self.picture_folders, "folders of pictures"),
            show(&self.others, "other files"),
            self.root.display()
        )
    }
}

/// Counts by split, beside published ones.
fn count_splits(found: &[Found], published: &[(&str, u64)]) -> Vec<Count> {
    let of = |split: &str| found.iter().filter(|video| video.split.as_deref() == Some(split)).count() as u64;
    ["train", "test"]
        .into_iter()
        .filter(|split| of(split) > 0)
        .map(|split| Count {
            what: format!("videos of the split `{split}`"),
            found: of(split),
            published: published.iter().find(|(name, _)| *name == split).map(|(_, count)| *count..=*count),
        })
        .collect()
}
