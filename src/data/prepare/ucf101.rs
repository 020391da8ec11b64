//! UCF-101 (Soomro et al. 2012, arXiv 1212.0402): 13,320 videos of 101 actions.
//!
//! A video is known by its name, `v_ApplyEyeMakeup_g01_c01`, wherever it lies: as a file flat in one folder, in a
//! folder of its class, below `train/` and `test/`, or as a folder of frames of that name.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::survey::{Count, Found, KnownSet, Survey, Tree, count_splits};
use crate::text_file::read_text;

const VIDEOS: u64 = 13_320;
const CLASSES: u64 = 101;
/// Videos of the first of the three published splits.
const SPLIT_1: [(&str, u64); 2] = [("train", 9_537), ("test", 3_783)];

/// Where the lists of splits are, in or beside the root.
const LISTS: [&str; 4] = [
    "ucfTrainTestlist",
    "../ucfTrainTestlist",
    "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist",
    "../UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist",
];

/// The list of the videos to train on.
const LIST: &str = "trainlist01.txt";

/// The parts of a video's name.
#[derive(Debug, PartialEq)]
struct Name {
    class: String,
    group: u64,
    clip: u64,
}

/// `v_ApplyEyeMakeup_g01_c01`
fn parse(stem: &str) -> Option<Name> {
    let parts: Vec<&str> = stem.split('_').collect();
    let number = |part: &str, letter: char| part.strip_prefix(letter)?.parse().ok();
    match parts[..] {
        ["v", class, group, clip] if !class.is_empty() => {
            Some(Name { class: class.into(), group: number(group, 'g')?, clip: number(clip, 'c')? })
        }
        _ => None,
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// 101 classes of human actions, with lists of splits.
#[derive(Debug)]
pub struct Ucf101;

impl KnownSet for Ucf101 {
    fn name(&self) -> &'static str {
        "ucf101"
    }

    fn about(&self) -> &'static str {
        "UCF-101, human actions of 101 classes: video files, in one folder or a folder a class, or folders of frames"
    }

    fn list(&self) -> Option<&'static str> {
        Some(LIST)
    }

    fn survey(&self, tree: &Tree, lists: Option<&Path>) -> Result<Survey> {
        let lists = match lists {
            Some(folder) => Some(Lists::read(folder)?),
            None => LISTS
                .iter()
                .map(|place| tree.root.join(place))
                .find(|folder| folder.join(LIST).is_file())
                .map(|folder| Lists::read(&folder))
                .transpose()?,
        };
        // a folder of frames has no ending, or that of the video that they were taken from
        let named = |path: &PathBuf| Some((stem(path), path.clone(), parse(&stem(path))?));
        let mut notes = Vec::new();
        let (mut found, mut seen, mut classes) = (Vec::new(), BTreeMap::new(), BTreeSet::new());
        let (mut twice, mut elsewhere) = (0, 0);
        for (name, path, parts) in tree.videos.iter().chain(&tree.picture_folders).filter_map(named) {
            // the same class is written HandStandPushups in names and HandstandPushups in the list of classes
            if seen.insert(name.to_lowercase(), parts.class.to_lowercase()).is_some() {
                twice += 1;
                continue;
            }
            let placed = tree.split_of(&path);
            let listed = lists.as_ref().and_then(|lists| lists.split.get(&name.to_lowercase()).cloned());
            elsewhere += usize::from(placed.is_some() && listed.is_some() && placed != listed);
            let class = lists.as_ref().and_then(|lists| lists.classes.get(&parts.class.to_lowercase()).cloned());
            classes.insert(parts.class.to_lowercase());
            found.push(Found { path, class: Some(class.unwrap_or(parts.class)), split: listed.or(placed) });
        }
        ensure!(
            !found.is_empty(),
            "this is no UCF-101: expected are videos named like v_ApplyEyeMakeup_g01_c01.avi (all in one folder, or in a \
             folder for each class, perhaps below train/ and test/), or folders of frames of such names; found were {}",
            tree.found()
        );
        if twice > 0 {
            notes.push(format!("{twice} videos are there twice; the first of each is used"));
        }
        if elsewhere > 0 {
            notes
                .push(format!("{elsewhere} videos lie in another folder than split list 1 says; the list is followed"));
        }
        let missing = match &lists {
            Some(lists) => {
                lists.names.iter().filter(|name| !seen.contains_key(&name.to_lowercase())).cloned().collect()
            }
            None => {
                notes.push(
                    "no lists of splits (ucfTrainTestlist/) were found: missing videos are gaps in the numbers".into(),
                );
                gaps(&found)
            }
        };
        let mut counts = vec![
            Count { what: "videos".into(), found: found.len() as u64, published: Some(VIDEOS..=VIDEOS) },
            Count { what: "classes".into(), found: classes.len() as u64, published: Some(CLASSES..=CLASSES) },
        ];
        counts.extend(count_splits(&found, &SPLIT_1));
        Ok(Survey { found, missing, counts, notes })
    }
}

/// Clips are numbered from 1 in each group of a class: numbers that are left out up to the highest one.
fn gaps(found: &[Found]) -> Vec<String> {
    let mut groups: BTreeMap<(String, u64), BTreeSet<u64>> = BTreeMap::new();
    for video in found {
        let name = parse(&stem(&video.path)).expect("parsed before");
        groups.entry((name.class, name.group)).or_default().insert(name.clip);
    }
    let mut missing = Vec::new();
    for ((class, group), clips) in groups {
        let last = clips.last().copied().unwrap_or(0);
        let left_out = (1..last).filter(|clip| !clips.contains(clip));
        missing.extend(left_out.map(|clip| format!("v_{class}_g{group:02}_c{clip:02}")));
    }
    missing
}

/// The published lists of the first split.
struct Lists {
    /// As they are written, without folder and ending.
    names: Vec<String>,
    /// Name in small letters → train or test.
    split: BTreeMap<String, String>,
    /// Class in small letters → as it is written.
    classes: BTreeMap<String, String>,
}

impl Lists {
    fn read(folder: &Path) -> Result<Self> {
        let text = |file: &str| {
            let path = folder.join(file);
            read_text(&path).with_context(|| format!("cannot read UCF-101's list {}", path.display()))
        };
        let (mut names, mut split) = (Vec::new(), BTreeMap::new());
        for (file, which) in [(LIST, "train"), ("testlist01.txt", "test")] {
            for line in text(file)?.lines() {
                // ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
                let Some(path) = line.split_whitespace().next() else { continue };
                let name = stem(Path::new(path));
                ensure!(
                    parse(&name).is_some(),
                    "{}: `{line}` is no line of UCF-101's lists",
                    folder.join(file).display()
                );
                split.insert(name.to_lowercase(), which.to_string());
                names.push(name);
            }
        }
        let classes = text("classInd.txt").unwrap_or_default();
        let classes = classes.lines().filter_map(|line| line.split_whitespace().nth(1));
        Ok(Lists { names, split, classes: classes.map(|class| (class.to_lowercase(), class.to_string())).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        assert_eq!(parse("v_YoYo_g25_c04"), Some(Name { class: "YoYo".into(), group: 25, clip: 4 }));
        for wrong in ["YoYo_g25_c04", "v_YoYo_25_c04", "v_YoYo_g25", "v__g01_c01", "v_YoYo_g25_c04_x", "v_YoYo_gx_c04"]
        {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
