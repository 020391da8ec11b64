//! What stands in for video files in a binary built without the feature `video`.
#![allow(missing_docs, clippy::missing_errors_doc)] // `video_file.rs` says what these are

use std::path::Path;

use anyhow::{Result, bail};
use tch::Tensor;

use super::clip::{FrameSource, RgbFrame};

fn absent<T>(path: &Path) -> Result<T> {
    bail!(
        "{}: this binary was built without the feature `video` and cannot read or write video files; \
         it can use packed data (`lvdm data pack`, written by a binary that has it)",
        path.display()
    )
}

/// Always an error to open: see `absent`.
pub enum VideoReader {}

impl VideoReader {
    pub fn open(path: &Path) -> Result<Self> {
        absent(path)
    }

    pub fn frames(&self) -> i64 {
        match *self {}
    }

    pub fn fps(&self) -> f64 {
        match *self {}
    }

    pub fn width(&self) -> usize {
        match *self {}
    }

    pub fn height(&self) -> usize {
        match *self {}
    }

    pub fn read(&mut self, _start: i64, _count: i64, _stride: i64) -> Result<Vec<RgbFrame>> {
        match *self {}
    }

    pub fn check(&mut self) -> Result<()> {
        match *self {}
    }
}

impl FrameSource for VideoReader {
    fn frames(&self) -> i64 {
        match *self {}
    }

    fn read(&mut self, _start: i64, _count: i64, _stride: i64) -> Result<Vec<RgbFrame>> {
        match *self {}
    }
}

/// Always an error to create: see `absent`.
pub enum VideoWriter {}

impl VideoWriter {
    pub fn create(path: &Path, _width: usize, _height: usize, _fps: f64) -> Result<Self> {
        absent(path)
    }

    pub fn write(&mut self, _frame: &RgbFrame) -> Result<()> {
        match *self {}
    }

    pub fn append(_writer: &mut Option<Self>, path: &Path, _piece: &Tensor, _fps: f64) -> Result<()> {
        absent(path)
    }

    pub fn finish(self) -> Result<()> {
        match self {}
    }
}

pub fn write_video(path: &Path, _clip: &Tensor, _fps: f64) -> Result<()> {
    absent(path)
}
