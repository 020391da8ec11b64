//! Clips of a dataset one by one, drawn in the ways in which evaluations draw them. Threads decode ahead of what is
//! asked for; nothing is kept.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use anyhow::{Context, Result, ensure};
use rand::{RngExt, seq::SliceRandom};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use tracing::warn;

use super::{
    clip::{ClipSpec, Fit},
    dataset::DataConfig,
    loader::FixedClips,
    video::VideoEntry,
};
use crate::{
    random::{Purpose, stream},
    torch::caught,
};

/// How clips are drawn from a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
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
    Windows {
        /// Frames from the beginning of one window to that of the next.
        step: i64,
    },
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

    /// What a file calls it.
    pub fn key(self) -> &'static str {
        match self {
            Draw::Random => "random",
            Draw::Listed => "listed",
            Draw::Beginnings => "beginnings",
            Draw::Windows { .. } => "windows",
        }
    }

    /// Whether clips come without end.
    pub fn is_endless(self) -> bool {
        self == Draw::Random
    }
}

/// Steps of the generator of [`Purpose::Evaluation`]: the order of videos that are divided, and the place.
const PARTS_ORDER: u64 = 2;
const PARTS_PLACE: u64 = 3;

/// The clips of a dataset under a draw.
pub struct ClipStream {
    spec: ClipSpec,
    rest: Rest,
}

enum Rest {
    Random(Box<FixedClips>),
    InOrder(InOrder),
}

/// Videos one after the other, the next ones being decoded by threads.
struct InOrder {
    pool: ThreadPool,
    /// Each with a number of its own.
    videos: std::vec::IntoIter<(u64, VideoEntry)>,
    /// Of each video whose turn it is or comes soon.
    ahead: VecDeque<Receiver<Found>>,
    cut: Cut,
    stop: Arc<AtomicBool>,
}

/// What a thread finds in a video.
enum Found {
    Clip(Vec<u8>),
    /// There are no more.
    End,
    /// The video cannot be used, or not to its end: it is passed over.
    Unusable(anyhow::Error),
}

/// How clips are cut from a video.
#[derive(Clone, Copy)]
struct Cut {
    spec: ClipSpec,
    places: Places,
    seed: u64,
}

#[derive(Clone, Copy)]
enum Places {
    Drawn(Draw),
    /// One clip of either part of the video, out of so many videos.
    Parts(u64),
}

impl ClipStream {
    /// # Errors
    /// A dataset that is missing or empty, a number below 1.
    pub fn new(config: &DataConfig, draw: Draw, fit: Fit, seed: u64) -> Result<Self> {
        if let Draw::Windows { step } = draw {
            ensure!(step >= 1, "a step of {step} frames; it must be at least 1");
        }
        let spec = ClipSpec { fit, ..config.clip()? };
        let rest = match draw {
            Draw::Random => Rest::Random(Box::new(FixedClips::fitted(config, fit, seed)?)),
            _ => {
                let videos = (0..).zip(config.videos()?.videos).collect();
                Rest::InOrder(InOrder::new(config, videos, Cut { spec, places: Places::Drawn(draw), seed })?)
            }
        };
        Ok(Self { spec, rest })
    }

    /// Clips for two sets, which take turns, at most `pairs` and at least half as many where half of the videos are
    /// long enough. Each video is divided at a random place, the same one whenever its turn comes: one set has clips of
    /// the part before, the other of the part behind, so the sets may share videos and share no frame. Videos that do
    /// not hold two clips are passed over.
    ///
    /// # Errors
    /// As `new`.
    pub fn parts(config: &DataConfig, fit: Fit, seed: u64, pairs: i64) -> Result<Self> {
        let spec = ClipSpec { fit, ..config.clip()? };
        let all = config.videos()?.videos;
        let count = all.len() as u64;
        let mut visits = Vec::new();
        for epoch in 0..(2 * pairs as u64).div_ceil(count.max(1)) {
            let mut order: Vec<u64> = (0..count).collect();
            order.shuffle(&mut stream(seed, Purpose::Evaluation, epoch, PARTS_ORDER));
            visits.extend(order.iter().map(|&video| (epoch * count + video, all[video as usize].clone())));
        }
        Ok(Self {
            spec,
            rest: Rest::InOrder(InOrder::new(config, visits, Cut { spec, places: Places::Parts(count), seed })?),
        })
    }

    /// The next clip, unsigned bytes `[1, 3, F, H, W]`; none when all were drawn. A video that is corrupt or too
    /// short is named in the log and passed over.
    ///
    /// # Errors
    /// No video of the dataset can be used.
    #[allow(clippy::should_implement_trait)] // it has errors
    pub fn next(&mut self) -> Result<Option<Tensor>> {
        match &mut self.rest {
            Rest::Random(clips) => Ok(clips.next(u64::MAX)?.map(|found| found.clip)),
            Rest::InOrder(order) => {
                let ClipSpec { frames, resolution, .. } = self.spec;
                let size = [1, 3, frames, resolution, resolution];
                Ok(order.next()?.map(|clip| Tensor::f_from_data_size(&clip, &size, Kind::Uint8)).transpose()?)
            }
        }
    }

    /// The next `count` clips, or fewer at the end, `[n, 3, F, H, W]`.
    ///
    /// # Errors
    /// As `next`.
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
    fn new(config: &DataConfig, videos: Vec<(u64, VideoEntry)>, cut: Cut) -> Result<Self> {
        let pool = ThreadPoolBuilder::new().num_threads(config.workers.max(1)).build();
        let pool = pool.context("cannot start the decoding threads")?;
        Ok(InOrder { pool, videos: videos.into_iter(), ahead: VecDeque::new(), cut, stop: Arc::default() })
    }

    fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            while self.ahead.len() <= self.pool.current_num_threads()
                && let Some((number, video)) = self.videos.next()
            {
                // a thread that is ahead waits after two clips; the video whose turn it is was begun first
                let (sender, receiver) = sync_channel(2);
                let (cut, stop) = (self.cut, self.stop.clone());
                self.pool.spawn_fifo(move || {
                    let end = match caught(|| cut.clips_of(&video, number, &sender, &stop)) {
                        Ok(()) => Found::End,
                        Err(error) => Found::Unusable(error.context(format!("skipped {}", video.name))),
                    };
                    let _ = sender.send(end);
                });
                self.ahead.push_back(receiver);
            }
            let Some(clips) = self.ahead.front() else { return Ok(None) };
            match clips.recv().context("a thread that decoded a video died")? {
                Found::Clip(clip) => return Ok(Some(clip)),
                Found::End => {}
                Found::Unusable(error) => warn!("{error:#}"),
            }
            self.ahead.pop_front();
        }
    }
}

impl Drop for InOrder {
    /// Waits for the threads: none of them outlives the stream.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for clips in self.ahead.drain(..) {
            while clips.recv().is_ok() {}
        }
    }
}

impl Cut {
    /// Sends the clips of a video until it ends or `stop` is set.
    fn clips_of(self, video: &VideoEntry, number: u64, to: &SyncSender<Found>, stop: &AtomicBool) -> Result<()> {
        let Cut { spec, places, seed } = self;
        let mut source = video.source.open()?;
        let draw = match places {
            Places::Drawn(draw) => draw,
            Places::Parts(videos) => {
                let starts = self.starts_in_parts(source.frames(), number, videos);
                let read = |start| Ok(spec.fit(&source.read(start, spec.frames, spec.frame_stride)?));
                // both or none: the sets take turns
                for clip in starts.into_iter().flatten().map(read).collect::<Result<Vec<_>>>()? {
                    let _ = to.send(Found::Clip(clip));
                }
                return Ok(());
            }
        };
        // a place is drawn in any case: that says what is too short
        let random = spec.start(source.frames(), &mut stream(seed, Purpose::Crop, number, 0))?;
        let mut start = if draw == Draw::Listed { random } else { 0 };
        while start + spec.span() <= source.frames() && !stop.load(Ordering::Relaxed) {
            let clip = spec.fit(&source.read(start, spec.frames, spec.frame_stride)?);
            let _ = to.send(Found::Clip(clip));
            match draw {
                Draw::Windows { step } => start += step,
                _ => break,
            }
        }
        Ok(())
    }
}

impl Cut {
    /// First frames of a clip for either set, none where the video does not hold two. A video's number grows by `videos`
    /// from turn to turn.
    fn starts_in_parts(self, frames: i64, number: u64, videos: u64) -> Option<[i64; 2]> {
        let Cut { spec, seed, .. } = self;
        // a packed video rounds starts down to a frame that it has, by less than a stride
        let (span, gap) = (spec.span(), spec.frame_stride - 1);
        let last_border = frames - span - gap;
        if last_border < span {
            return None;
        }
        let mut divided = stream(seed, Purpose::Evaluation, number % videos, PARTS_PLACE);
        let border = divided.random_range(span..=last_border);
        let turned = divided.random_bool(0.5);
        let mut place = stream(seed, Purpose::Crop, number, 1);
        let before = place.random_range(0..=border - span);
        let behind = place.random_range(border + gap..=frames - span);
        Some(if turned { [behind, before] } else { [before, behind] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::{
            DatasetConfig, PackedFile,
            packed::{Packed, PackedVideo},
        },
        safetensors::write_safetensors_atomically,
    };

    /// A panic while a video is decoded is of that video: it is passed over, and the others are not.
    #[test]
    fn a_panic_passes_over_one_video() {
        let folder = tempfile::tempdir().unwrap();
        let config = DataConfig { frames: 1, ..packed(folder.path()) };
        let spec = config.clip().unwrap();
        let mut videos = config.videos().unwrap().videos;
        let file = Arc::new(PackedFile::open(config.dataset.path()).unwrap());
        videos[1].source = Arc::new(PackedVideo::new(file, 1, 0)); // the last number is what frames are divided by
        let cut = || spec.cut(&mut *videos[1].source.open()?, &mut stream(0, Purpose::Crop, 0, 0), false);
        let error = caught(cut).unwrap_err();
        assert!(error.to_string().contains("divide by zero"), "{error}");
        let cut = Cut { spec, places: Places::Drawn(Draw::Beginnings), seed: 0 };
        let mut stream = InOrder::new(&config, (0..).zip(videos).collect(), cut).unwrap();
        let firsts: Vec<u8> = std::iter::from_fn(|| stream.next().unwrap()).map(|clip| clip[0] / 5).collect();
        assert_eq!(firsts, [0, 20]);
    }

    /// Three videos of ten frames; video and frame show in the grey level.
    fn packed(folder: &std::path::Path) -> DataConfig {
        let level = Tensor::arange(30, (Kind::Uint8, tch::Device::Cpu)).reshape([3, 1, 10, 1, 1]) * 5;
        let clips = level.expand([3, 3, 10, 8, 8], false).contiguous();
        let file = folder.join("clips.safetensors");
        let spec = serde_json::json!({"dataset": null, "frames": 10, "frame_stride": 1, "resolution": 8, "seed": 0});
        write_safetensors_atomically(&file, &[("clips", clips)], &spec).unwrap();
        let dataset = DatasetConfig::Packed(Packed { file });
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

    /// Two sets of the same videos never share a frame, whichever epoch; a video too short for both gives to neither.
    #[test]
    fn parts_share_videos_and_no_frame() {
        let folder = tempfile::tempdir().unwrap();
        let config = DataConfig { frames: 2, ..packed(folder.path()) };
        let mut stream = ClipStream::parts(&config, Fit::default(), 3, 12).unwrap();
        let mut seen = [vec![], vec![]];
        for clip in 0..24 {
            let clips = stream.next().unwrap().unwrap();
            seen[clip % 2].extend([0, 1].map(|f| clips.int64_value(&[0, 1, f, 4, 4]) / 5));
        }
        assert!(seen[0].iter().all(|frame| !seen[1].contains(frame)), "{seen:?}");
        for side in &seen {
            assert!((0..3).all(|video| side.iter().any(|frame| frame / 10 == video)), "{seen:?}");
        }
        let short = DataConfig { frames: 4, ..config };
        assert!(ClipStream::parts(&short, Fit::default(), 3, 12).unwrap().next().unwrap().is_none());
    }

    #[test]
    fn what_is_too_short_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let config = DataConfig { frames: 6, ..packed(folder.path()) };
        assert!(firsts(&config, Draw::Beginnings, 9).is_empty());
        assert!(ClipStream::new(&config, Draw::Windows { step: 0 }, Fit::default(), 3).is_err());
    }
}
