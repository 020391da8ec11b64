//! Clips packed into one file by `pack_clips`: no video library is needed to read them.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ::safetensors::tensor::Dtype;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    clip::{ClipSpec, FrameSource, RgbFrame, window},
    reading::warn_of_former_reading,
    video::{Listing, VideoDataset, VideoEntry, VideoSource, digest_of_file},
};
use crate::safetensors::Header;

/// The name of the tensor of clips, unsigned bytes `[N, 3, F, H, W]`.
pub(super) const CLIPS: &str = "clips";

/// The name of the tensor of captions, the bytes of a JSON list of N texts.
pub(super) const CAPTIONS: &str = "captions";

/// The name of the tensor of classes, the bytes of a JSON list of N names.
pub(super) const CLASSES: &str = "classes";

/// The kind of the data sets whose videos are arrays.
pub(super) const ARRAY: &str = "numpy";

/// What a packed file says about its clips.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedSpec {
    /// The settings of the data set that the clips came from, as they were written; none of generated clips.
    pub dataset: Option<Value>,
    /// Frames of a clip.
    pub frames: i64,
    /// Every n-th frame of the videos was taken.
    pub frame_stride: i64,
    /// H and W of a clip, in pixels.
    pub resolution: i64,
    /// The seed that chose their order and places.
    pub seed: u64,
    /// How videos were read, see [`READING`](super::READING).
    #[serde(default)]
    pub reading: u32,
}

impl PackedSpec {
    /// How the videos were read that the clips came from; none of generated clips and of arrays, which are what they are.
    pub fn reading(&self) -> Option<u32> {
        let dataset = self.dataset.as_ref()?;
        (dataset["kind"] != ARRAY).then_some(self.reading)
    }
}

/// A packed file, open. Windows of clips are read when they are asked for.
#[derive(Debug)]
pub struct PackedFile {
    path: PathBuf,
    file: File,
    start: u64,
    /// N, F, H, W
    shape: [usize; 4],
    captions: Option<Vec<String>>,
    classes: Option<Vec<String>>,
    /// What the file says about its clips.
    pub spec: PackedSpec,
}

impl PackedFile {
    /// # Errors
    /// A file that is missing, truncated, or of another kind.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("cannot open the packed file {}", path.display()))?;
        let header = Header::read(&mut file, path)?;
        let foreign = || format!("{} holds no packed clips; `lvdm data pack` writes such files", path.display());
        let info = header.tensors.info(CLIPS).with_context(foreign)?;
        let spec = serde_json::from_value(header.metadata.with_context(foreign)?).with_context(foreign)?;
        let &[n, 3, f, h, w] = info.shape.as_slice() else {
            anyhow::bail!("{}: the shape is {:?}, not [N, 3, F, H, W]", foreign(), info.shape)
        };
        ensure!(info.dtype == Dtype::U8, "{}: their type is {:?}, not U8", foreign(), info.dtype);
        let start = header.data_start + info.data_offsets.0 as u64;
        let texts = |name: &str| -> Result<Option<Vec<String>>> {
            let Some(info) = header.tensors.info(name) else { return Ok(None) };
            let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
            file.read_exact_at(&mut bytes, header.data_start + info.data_offsets.0 as u64)?;
            let texts: Vec<String> =
                serde_json::from_slice(&bytes).with_context(|| format!("the {name} of {}", path.display()))?;
            ensure!(texts.len() == n, "{} has {n} clips and {} {name}", path.display(), texts.len());
            Ok(Some(texts))
        };
        let (captions, classes) = (texts(CAPTIONS)?, texts(CLASSES)?);
        Ok(Self { path: path.to_path_buf(), file, start, shape: [n, f, h, w], captions, classes, spec })
    }

    /// N, the number of clips.
    pub fn clips(&self) -> i64 {
        self.shape[0] as i64
    }

    /// F, the frames of each clip.
    pub fn frames(&self) -> i64 {
        self.shape[1] as i64
    }

    /// Frames `start`, `start + stride`, … of one clip.
    ///
    /// # Errors
    /// Frames beyond the clip; a file that is no longer whole.
    pub fn read(&self, clip: i64, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        let [clips, frames, height, width] = self.shape;
        ensure!((0..clips as i64).contains(&clip), "clip {clip} of {clips} in {}", self.path.display());
        let indices = window(frames as i64, start, count, stride)?;
        let plane = height * width;
        let (first, last) = (indices[0], indices[indices.len() - 1]);
        let mut planes = [(); 3].map(|()| vec![0; (last - first + 1) * plane]);
        for (c, bytes) in planes.iter_mut().enumerate() {
            let offset = ((clip as usize * 3 + c) * frames + first) * plane;
            self.file
                .read_exact_at(bytes, self.start + offset as u64)
                .with_context(|| format!("cannot read clip {clip} of {}", self.path.display()))?;
        }
        let frame = |index: usize| {
            let at = (index - first) * plane..(index - first + 1) * plane;
            let [red, green, blue] = [0, 1, 2].map(|c| &planes[c][at.clone()]);
            let mut pixels = vec![0; 3 * plane];
            for (pixel, ((red, green), blue)) in pixels.chunks_exact_mut(3).zip(red.iter().zip(green).zip(blue)) {
                pixel.copy_from_slice(&[*red, *green, *blue]);
            }
            RgbFrame { width, height, pixels }
        };
        Ok(indices.into_iter().map(frame).collect())
    }
}

/// One clip of a packed file, as a video of which every `step`-th frame is there.
#[derive(Debug, Clone)]
pub struct PackedVideo {
    file: Arc<PackedFile>,
    index: i64,
    step: i64,
}

impl PackedVideo {
    /// The clip with this number, from 0, of which every `step`-th original frame was kept.
    pub fn new(file: Arc<PackedFile>, index: i64, step: i64) -> Self {
        Self { file, index, step }
    }
}

impl VideoSource for PackedVideo {
    fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(Box::new(self.clone()))
    }

    fn digest(&self, blocks: u64) -> Result<Vec<u8>> {
        digest_of_file(&self.file.path, blocks)
    }

    fn array(&self) -> Option<&Path> {
        Some(&self.file.path)
    }
}

impl FrameSource for PackedVideo {
    /// Counted as the original video counts, from the first packed frame to the last.
    fn frames(&self) -> i64 {
        (self.file.frames() - 1) * self.step + 1
    }

    fn read(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        // A start between two packed frames falls on the one before.
        self.file.read(self.index, start / self.step, count, stride / self.step)
    }
}

/// The clips of a packed file, for training on every `frame_stride`-th frame of the original videos.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Packed {
    /// Unsigned bytes `[N, 3, F, H, W]` as safetensors.
    pub file: PathBuf,
}

impl VideoDataset for Packed {
    fn videos(&self, clip: &ClipSpec) -> Result<Listing> {
        let file = Arc::new(PackedFile::open(&self.file)?);
        ensure!(file.clips() > 0, "{} holds no clips", self.file.display());
        warn_of_former_reading(&self.file, file.spec.reading(), "lvdm data pack");
        let packed = file.spec.frame_stride;
        ensure!(
            packed >= 1 && clip.frame_stride % packed == 0,
            "{} holds every {packed}th frame of its videos: data.frame_stride is {}, it must be a multiple of {packed}",
            self.file.display(),
            clip.frame_stride
        );
        let name = self.file.display();
        let entry = |index| VideoEntry {
            caption: file.captions.as_ref().map(|captions| captions[index as usize].clone()),
            class: file.classes.as_ref().map(|classes| classes[index as usize].clone()),
            ..VideoEntry::new(format!("{name}#{index}"), PackedVideo::new(file.clone(), index, packed))
        };
        Ok((0..file.clips()).map(entry).collect::<Vec<_>>().into())
    }

    fn path(&self) -> &Path {
        &self.file
    }

    fn has_captions(&self) -> bool {
        true
    }

    /// As the videos were read that were packed.
    fn reading(&self) -> Result<Option<u32>> {
        Ok(PackedFile::open(&self.file)?.spec.reading())
    }
}
