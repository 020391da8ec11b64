//! Sky Time-lapse (Xiong et al. 2018, arXiv 1709.07592): folders of JPEG frames.
//!
//! `sky_train/<video>/<clip>/<frame>.jpg`, or one level of folders only; below `sky_train` and `sky_test`, below `train`
//! and `test`, or without a split. Each folder that holds pictures is one video.

use std::path::Path;

use anyhow::{Result, ensure};

use super::survey::{Count, Found, KnownSet, Survey, Tree, count_splits};

/// Time-lapse videos of skies.
#[derive(Debug)]
pub struct SkyTimelapse;

impl KnownSet for SkyTimelapse {
    fn name(&self) -> &'static str {
        "sky-timelapse"
    }

    fn about(&self) -> &'static str {
        "Sky Time-lapse: folders of frames"
    }

    fn survey(&self, tree: &Tree, _lists: Option<&Path>) -> Result<Survey> {
        let found: Vec<Found> = tree
            .picture_folders
            .iter()
            .filter(|folder| **folder != tree.root)
            .map(|folder| Found { path: folder.clone(), class: None, split: tree.split_of(&folder.join("0.jpg")) })
            .collect();
        ensure!(
            !found.is_empty(),
            "this is no Sky Time-lapse: expected are folders of pictures, one or two levels below sky_train/ and sky_test/ \
             (sky_train/<video>/<clip>/<frame>.jpg); found were {}",
            tree.found()
        );
        let mut notes = Vec::new();
        if tree.picture_folders.contains(&tree.root) {
            notes.push(format!("pictures that lie in {} itself belong to no video", tree.root.display()));
        }
        let mut counts = vec![Count { what: "videos".into(), found: found.len() as u64, published: None }];
        counts.extend(count_splits(&found, &[]));
        Ok(Survey { found, missing: Vec::new(), counts, notes })
    }
}
