//! Videos that are known by their path.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{
    clip::FrameSource,
    frame_folder::PictureFolder,
    video::{VideoSource, digest_of_file},
    video_file::VideoReader,
};

/// A video file.
#[derive(Debug, Clone)]
pub struct VideoFile {
    path: PathBuf,
}

impl VideoFile {
    /// The file at a path, which is not looked at yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        VideoFile { path: path.into() }
    }
}

impl VideoSource for VideoFile {
    fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(Box::new(VideoReader::open(&self.path)?))
    }

    fn digest(&self, blocks: u64) -> Result<Vec<u8>> {
        digest_of_file(&self.path, blocks)
    }

    fn video_file(&self) -> Option<&Path> {
        Some(&self.path)
    }
}

/// A video file or a folder of pictures: which of the two shows when it is opened.
#[derive(Debug, Clone)]
pub struct FileOrFolder {
    path: PathBuf,
}

impl FileOrFolder {
    /// What lies at a path, which need not be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        FileOrFolder { path: path.into() }
    }

    fn found(&self) -> Box<dyn VideoSource> {
        match self.path.is_dir() {
            true => Box::new(PictureFolder::new(&self.path)),
            false => Box::new(VideoFile::new(&self.path)),
        }
    }
}

impl VideoSource for FileOrFolder {
    fn open(&self) -> Result<Box<dyn FrameSource>> {
        self.found().open()
    }

    fn digest(&self, blocks: u64) -> Result<Vec<u8>> {
        self.found().digest(blocks)
    }
}
