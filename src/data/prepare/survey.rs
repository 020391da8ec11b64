//! What the names in a folder show about a data set, without opening a video.

use std::{
    fmt::Debug,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use anyhow::Result;
use serde::Serialize;

use crate::data::{
    folder, frame_folder,
    walk::{ensure_folder, has_extension, walk},
};

/// What names alone show about a data set.
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
    /// Its class, where the layout shows it.
    pub class: Option<String>,
    /// Its split, where the layout shows it.
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

/// A published data set whose layout is known.
pub trait KnownSet: Debug + Sync {
    /// Its name on the command line: `lvdm data prepare NAME`.
    fn name(&self) -> &'static str;

    /// What the videos show, and which layouts are accepted, in a few words for help texts.
    fn about(&self) -> &'static str;

    /// The distance between the frames of a clip that is usual for this set.
    fn frame_stride(&self) -> i64 {
        1
    }

    /// A file in the folder of its lists of splits; none of a set that has no such lists.
    fn list(&self) -> Option<&'static str> {
        None
    }

    /// Finds its videos in a tree. `lists` is the folder of its lists of splits, if they do not lie in their usual place.
    ///
    /// # Errors
    /// A tree that is not laid out in any of the set's ways; says what was found and what was expected.
    fn survey(&self, tree: &Tree, lists: Option<&Path>) -> Result<Survey>;
}

/// What lies under a folder.
pub struct Tree {
    pub(super) root: PathBuf,
    pub(super) videos: Vec<PathBuf>,
    /// Folders that directly hold pictures.
    pub(super) picture_folders: Vec<PathBuf>,
    pub(super) folders: Vec<PathBuf>,
    pub(super) others: Vec<PathBuf>,
}

impl Tree {
    pub(super) fn read(root: &Path) -> Result<Self> {
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
    pub(super) fn ancestors(&self, path: &Path) -> Vec<String> {
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        let names: Vec<String> =
            below.components().map(|part| part.as_os_str().to_string_lossy().to_lowercase()).collect();
        names[..names.len().saturating_sub(1)].to_vec()
    }

    /// `train` or `test`, as a folder above the path says it; `root` itself counts too.
    pub(super) fn split_of(&self, path: &Path) -> Option<String> {
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
    pub(super) fn found(&self) -> String {
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
pub(super) fn count_splits(found: &[Found], published: &[(&str, u64)]) -> Vec<Count> {
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
