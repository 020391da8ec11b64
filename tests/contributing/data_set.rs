//! The videos that a text file names.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use lvdm::data::{ClipSpec, Listing, VideoDataset, VideoEntry, VideoFile};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One video a line: `dataset: {kind: listed, file: PATH}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// The text file.
    pub file: PathBuf,
}

impl VideoDataset for Listed {
    fn videos(&self, _: &ClipSpec) -> Result<Listing> {
        let text = fs::read_to_string(&self.file).with_context(|| format!("no list {}", self.file.display()))?;
        let entry = |line: &str| VideoEntry::new(line, VideoFile::new(line));
        Ok(text.lines().map(entry).collect::<Vec<_>>().into())
    }

    fn path(&self) -> &Path {
        &self.file
    }
}

// What follows is its test, which stands in the same file.

#[test]
fn it_lists_its_videos() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("list.txt");
    let set: Listed = super::settings(&format!("{{file: {}}}", file.display()));
    let clip = ClipSpec { frames: 16, frame_stride: 1, resolution: 64, fit: lvdm::data::Fit::default() };
    assert!(set.videos(&clip).unwrap_err().to_string().contains("list.txt"));
    fs::write(&file, "a.mp4\nb/c.avi\n").unwrap();
    let videos = set.videos(&clip).unwrap().videos;
    assert_eq!(videos.iter().map(|video| video.name.as_str()).collect::<Vec<_>>(), ["a.mp4", "b/c.avi"]);
}
