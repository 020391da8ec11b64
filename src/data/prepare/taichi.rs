//! Taichi-HD (Siarohin et al. 2019, arXiv 2003.00196): mp4 files cut out of videos of others.
//!
//! Flat, or below `train/` and `test/`; folders of frames serve too. Its loading script fetches the videos one by one,
//! and some of them are gone: there is no number that all must reach.

use std::{ops::RangeInclusive, path::Path};

use anyhow::{Result, ensure};

use super::survey::{Count, Found, KnownSet, Survey, Tree, count_splits};

/// From the fewest to the most that papers report.
const VIDEOS: RangeInclusive<u64> = 3_081..=3_103;

/// Taichi-HD.
#[derive(Debug)]
pub struct Taichi;

impl KnownSet for Taichi {
    fn name(&self) -> &'static str {
        "taichi"
    }

    fn about(&self) -> &'static str {
        "Taichi-HD: mp4 files"
    }

    fn frame_stride(&self) -> i64 {
        4
    }

    fn survey(&self, tree: &Tree, _lists: Option<&Path>) -> Result<Survey> {
        let videos = tree.videos.iter().map(|file| (file.clone(), file.clone()));
        let folders = tree.picture_folders.iter().filter(|folder| **folder != tree.root);
        let folders = folders.map(|folder| (folder.clone(), folder.join("0.png")));
        let found: Vec<Found> = videos
            .chain(folders)
            .map(|(path, inside)| Found { path, class: None, split: tree.split_of(&inside) })
            .collect();
        ensure!(
            !found.is_empty(),
            "this is no Taichi-HD: expected are mp4 files (or folders of frames), flat or below train/ and test/; found \
             were {}",
            tree.found()
        );
        let mut counts = vec![Count { what: "videos".into(), found: found.len() as u64, published: Some(VIDEOS) }];
        counts.extend(count_splits(&found, &[]));
        Ok(Survey { found, missing: Vec::new(), counts, notes: Vec::new() })
    }
}
