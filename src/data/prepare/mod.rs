//! From a downloaded data set to an index: what is there, what is missing, what cannot be used.
//!
//! A data set is one file beside this one and a line in [`KNOWN_SETS`]: it says which of a tree's videos are its own, their
//! class and split, and what was published about their number. Looking into the videos is the same for all.

mod sky_timelapse;
mod survey;
mod taichi;
mod ucf101;

use std::{
    io::Write,
    path::{Path, PathBuf},
};

pub use survey::{Count, Found, KnownSet, Survey, Tree};

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::{sky_timelapse::SkyTimelapse, taichi::Taichi, ucf101::Ucf101};
use super::{
    VideoReader,
    frame_folder::{Pictures, gap, picture_size, pictures_in, read_picture},
    index::{IndexEntry, write_index},
};
use crate::{atomic_file::write_atomically, torch::caught};

/// The data sets that can be prepared.
pub static KNOWN_SETS: [&dyn KnownSet; 3] = [&Ucf101, &SkyTimelapse, &Taichi];

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
/// `least_frames`. `lists` is where the set's lists of splits lie, if not in their usual place. `done` is called after each
/// video with the number of all.
///
/// # Errors
/// A folder that is not laid out in any of the set's ways; says what was found and what was expected.
pub fn prepare(
    set: &dyn KnownSet,
    root: &Path,
    lists: Option<&Path>,
    least_frames: i64,
    depth: Depth,
    done: &(dyn Fn(usize) + Sync),
) -> Result<Prepared> {
    let tree = Tree::read(root)?;
    let Survey { found, missing, counts, notes } = set.survey(&tree, lists)?;
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
