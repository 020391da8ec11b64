//! Clips of a dataset one by one, drawn in the ways in which evaluations draw them. Nothing is kept.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use tracing::warn;

use super::{
    clip::{ClipSpec, Fit, FrameSource},
    dataset::{DataConfig, Source, VideoEntry},
    loader::FixedClips,
};
use crate::random::{Purpose, stream};

/// How clips are drawn from a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Draw {
    /// From a random place of each video, videos in a random order; after the last begins another order.
    #[default]
    Random,
    /// From a random place of each video, once, in the order of the list.
    Listed,
    /// The first frames of each video, once, in the order of the list.
    Beginnings,
    /// Every window of every video, in the order of the list; `step` frames lie between the beginnings of two.
    Windows { step: i64 },
}

impl Draw {
    /// A few words for people.
    pub fn words(self) -> String {
        match self {
            Draw::Random => "at random".into(),
            Draw::Listed => "at random places of the videos in their order".into(),
            Draw::Beginnings => "at the beginnings of the videos in their order".into(),
            Draw::Windows { step } => format!("at every {step}th frame of the videos in their order"),
        }
    }

    /// Whether clips come without end.
    pub fn is_endless(self) -> bool {
        self == Draw::Random
    }
}

/// The clips of a dataset under a draw.
pub struct ClipStream {
    spec: ClipSpec,
    rest: Rest,
}

enum Rest {
    Random(Box<FixedClips>),
    InOrder(InOrder),
}

struct InOrder {
    videos: std::vec::IntoIter<VideoEntry>,
    draw: Draw,
    seed: u64,
    /// Videos that were opened.
    opened: u64,
    /// The video that is being cut into windows.
    open: Option<Open>,
}

struct Open {
    name: String,
    source: Box<dyn FrameSource>,
    /// The first frame of the next window.
    start: i64,
}

impl ClipStream {
    /// Errors: a dataset that is missing or empty, a number below 1.
    pub fn new(config: &DataConfig, draw: Draw, fit: Fit, seed: u64) -> Result<Self> {
        if let Draw::Windows { step } = draw {
            ensure!(step >= 1, "a step of {step} frames; it must be at least 1");
        }
        let spec = ClipSpec { fit, ..config.clip()? };
        let rest = match draw {
            Draw::Random => Rest::Random(Box::new(FixedClips::fitted(config, fit, seed)?)),
            _ => {
                let videos = config.videos()?.videos.into_iter();
                Rest::InOrder(InOrder { videos, draw, seed, opened: 0, open: None })
            }
        };
        Ok(Self { spec, rest })
    }

    /// The next clip, unsigned bytes `[1, 3, F, H, W]`; none when all were drawn. A video that is corrupt or too
    /// short is named in the log and passed over.
    ///
    /// Errors: no video of the dataset can be used.
    #[allow(clippy::should_implement_trait)] // it has errors
    pub fn next(&mut self) -> Result<Option<Tensor>> {
        match &mut self.rest {
            Rest::Random(clips) => Ok(clips.next(u64::MAX)?.map(|(clip, _)| clip)),
            Rest::InOrder(order) => order.next(&self.spec),
        }
    }

    /// The next `count` clips, or fewer at the end, `[n, 3, F, H, W]`.
    ///
    /// Errors: as `next`.
    pub fn several(&mut self, count: i64) -> Result<Option<Tensor>> {
        let mut clips = Vec::new();
        while (clips.len() as i64) < count
            && let Some(clip) = self.next()?
        {
            clips.push(clip);
        }
        Ok((!clips.is_empty()).then(|| Tensor::cat(&clips, 0)))
    }
}

impl InOrder {
    fn next(&mut self, spec: &ClipSpec) -> Result<Option<Tensor>> {
        loop {
            let mut open = match self.open.take() {
                Some(open) => open,
                None => {
                    let Some(VideoEntry { name, source, .. }) = self.videos.next() else { return Ok(None) };
                    let sample = self.opened;
                    self.opened += 1;
                    match self.begin(spec, &source, sample) {
                        Ok((source, start)) => Open { name, source, start },
                        Err(error) => {
                            warn!("skipped {name}: {error:#}");
                            continue;
                        }
                    }
                }
            };
            if open.start + spec.span() > open.source.frames() {
                continue;
            }
            match open.source.read(open.start, spec.frames, spec.frame_stride) {
                Ok(frames) => {
                    let size = [1, 3, spec.frames, spec.resolution, spec.resolution];
                    let clip = Tensor::f_from_data_size(&spec.fit(&frames), &size, Kind::Uint8)?;
                    if let Draw::Windows { step } = self.draw {
                        self.open = Some(Open { start: open.start + step, ..open });
                    }
                    return Ok(Some(clip));
                }
                Err(error) => warn!("skipped {}: {error:#}", open.name),
            }
        }
    }

    /// Opens a video, and says where its first clip begins.
    fn begin(&self, spec: &ClipSpec, source: &Source, sample: u64) -> Result<(Box<dyn FrameSource>, i64)> {
        let source = source.open()?;
        // a place is drawn in any case: that says what is too short
        let random = spec.start(source.frames(), &mut stream(self.seed, Purpose::Crop, sample, 0))?;
        Ok((source, if self.draw == Draw::Listed { random } else { 0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{data::DatasetConfig, safetensors::write_safetensors_atomically};

    /// Three videos of ten frames; video and frame show in the grey level.
    fn packed(folder: &std::path::Path) -> DataConfig {
        let level = Tensor::arange(30, (Kind::Uint8, tch::Device::Cpu)).reshape([3, 1, 10, 1, 1]) * 5;
        let clips = level.expand([3, 3, 10, 8, 8], false).contiguous();
        let file = folder.join("clips.safetensors");
        let spec = serde_json::json!({"dataset": null, "frames": 10, "frame_stride": 1, "resolution": 8, "seed": 0});
        write_safetensors_atomically(&file, &[("clips", clips)], &spec).unwrap();
        let dataset = DatasetConfig::Packed { file };
        DataConfig { dataset, frames: 4, frame_stride: 2, resolution: 8, flip: false, workers: 1 }
    }

    /// First frames of the clips, as numbers of all frames.
    fn firsts(config: &DataConfig, draw: Draw, most: usize) -> Vec<i64> {
        let mut stream = ClipStream::new(config, draw, Fit::default(), 3).unwrap();
        let mut found = Vec::new();
        while found.len() < most
            && let Some(clip) = stream.next().unwrap()
        {
            let level = |f: i64| clip.int64_value(&[0, 1, f, 4, 4]) / 5;
            assert!((1..4).all(|f| level(f) == level(0) + 2 * f));
            found.push(level(0));
        }
        found
    }

    #[test]
    fn each_draw_gives_its_windows() {
        let folder = tempfile::tempdir().unwrap();
        let config = packed(folder.path());
        // a clip spans 7 frames
        assert_eq!(firsts(&config, Draw::Windows { step: 3 }, 99), [0, 3, 10, 13, 20, 23]);
        assert_eq!(firsts(&config, Draw::Windows { step: 4 }, 99), [0, 10, 20]);
        assert_eq!(firsts(&config, Draw::Beginnings, 99), [0, 10, 20]);
        let listed = firsts(&config, Draw::Listed, 99);
        assert!(listed.len() == 3 && (0..3).all(|v| (10 * v..10 * v + 4).contains(&listed[v as usize])), "{listed:?}");
        let random = firsts(&config, Draw::Random, 30);
        for epoch in random.chunks(3) {
            let mut videos: Vec<i64> = epoch.iter().map(|first| first / 10).collect();
            videos.sort_unstable();
            assert_eq!(videos, [0, 1, 2]);
        }
        let fixed = crate::data::fixed_clips(&config, 5, 3).unwrap();
        let mut stream = ClipStream::new(&config, Draw::Random, Fit::default(), 3).unwrap();
        assert!(stream.several(5).unwrap().unwrap().equal(&fixed));
        let mut stream = ClipStream::new(&config, Draw::Beginnings, Fit::default(), 3).unwrap();
        assert_eq!(stream.several(2).unwrap().unwrap().size()[0], 2);
        assert_eq!(stream.several(2).unwrap().unwrap().size()[0], 1);
        assert!(stream.several(2).unwrap().is_none());
    }

    #[test]
    fn what_is_too_short_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let config = DataConfig { frames: 6, ..packed(folder.path()) };
        assert!(firsts(&config, Draw::Beginnings, 9).is_empty());
        assert!(ClipStream::new(&config, Draw::Windows { step: 0 }, Fit::default(), 3).is_err());
    }
}
