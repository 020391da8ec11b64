//! Batches of clips, decoded ahead of the step that uses them.
//!
//! Sample n is video `permutation(epoch)[n mod videos]`, epoch = n / videos, cut where the generator
//! of n says. So it depends on the seed and on n alone: not on batch size, threads, ranks or resume.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rand::seq::SliceRandom;
use rayon::{ThreadPool, ThreadPoolBuilder};
use tch::{Kind, Tensor};
use tracing::warn;

use super::{
    clip::{ClipSpec, Fit},
    dataset::DataConfig,
    video::{Listing, VideoEntry},
};
use crate::{
    distributed::Ranks,
    random::{Purpose, stream},
    torch::caught,
};

/// Batches that are decoded before they are asked for.
const AHEAD: usize = 3;

/// How long a folder of videos that is away, as a file server may be, is waited for.
const PATIENCE: Duration = if cfg!(test) { Duration::from_secs(2) } else { Duration::from_secs(600) };

/// Clips of consecutive samples.
#[derive(Debug)]
pub struct Batch {
    /// Unsigned bytes `[B, 3, F, H, W]` on the host.
    pub clips: Tensor,
    /// What each shows, where the dataset says so.
    pub captions: Vec<Option<String>>,
    /// The name of each one's class, where the dataset has classes.
    pub classes: Vec<Option<String>>,
    /// The number of each sample, counted over the whole training.
    pub samples: Vec<u64>,
    /// The `start` of a loader that goes on after this batch.
    pub position: u64,
    /// Videos that could not be used and were replaced.
    pub skipped: Vec<String>,
}

/// Endless batches of a dataset.
pub struct Loader {
    set: Arc<Set>,
    pool: ThreadPool,
    queue: VecDeque<(u64, Receiver<Result<Sample>>)>,
    batch: u64,
    /// Samples from one batch's beginning to the next one's: batch · ranks.
    advance: u64,
    /// The first sample of the next step, over all ranks.
    position: u64,
    /// The first sample of the next step to be scheduled.
    scheduled: u64,
    offset: u64,
    order: Option<(u64, Arc<Vec<u32>>)>,
    skipped: BTreeMap<u32, String>,
    left_out: usize,
    classes: Option<Vec<String>>,
    stop: Arc<AtomicBool>,
}

/// What the threads share.
struct Set {
    videos: Vec<VideoEntry>,
    clip: ClipSpec,
    flip: bool,
    seed: u64,
    /// The folder of the videos, where they are files.
    root: Option<PathBuf>,
    /// Whether it was said that the folder is away.
    away: AtomicBool,
}

/// What a thread hands back.
struct Sample {
    /// `[3, F, H, W]` and the number of its video; none if no video of the set can be used.
    clip: Option<(Vec<u8>, u32)>,
    /// The folder of the videos was away for too long.
    away: bool,
    /// Number and reason of the videos that were tried before.
    skipped: Vec<(u32, String)>,
}

impl Loader {
    /// Batches of `batch` samples, the first one being sample `start`.
    ///
    /// # Errors
    /// A dataset that is missing or empty, a number below 1.
    pub fn new(config: &DataConfig, batch: i64, seed: u64, start: u64) -> Result<Self> {
        Self::of_rank(config, batch, seed, start, 0, 1)
    }

    /// As `new`, for one of several processes: each step uses batch · ranks consecutive samples, of
    /// which this rank loads its `batch`. `position` is the same on all ranks.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_rank(config: &DataConfig, batch: i64, seed: u64, start: u64, rank: usize, ranks: usize) -> Result<Self> {
        Self::fitted(config, Fit::default(), batch, seed, start, [rank, ranks])
    }

    fn fitted(
        config: &DataConfig,
        fit: Fit,
        batch: i64,
        seed: u64,
        start: u64,
        [rank, ranks]: [usize; 2],
    ) -> Result<Self> {
        ensure!(batch >= 1, "a batch of {batch} clips; it must be at least 1");
        ensure!(rank < ranks, "rank {rank} of {ranks}");
        ensure!(config.workers >= 1, "data.workers is 0; it must be at least 1");
        let listing = config.videos()?;
        let classes = listing.classes();
        let Listing { videos, left_out } = listing;
        ensure!(!videos.is_empty(), "the dataset {} has no videos", config.dataset.line());
        ensure!(u32::try_from(videos.len()).is_ok(), "{} videos are more than a loader can number", videos.len());
        let pool = ThreadPoolBuilder::new()
            .num_threads(config.workers)
            .thread_name(|i| format!("decode-{i}"))
            .build()
            .context("cannot start the decoding threads")?;
        let root = config.dataset.root().map(Path::to_path_buf);
        let away = AtomicBool::new(false);
        let clip = ClipSpec { fit, ..config.clip()? };
        let set = Set { videos, clip, flip: config.flip, seed, root, away };
        let batch = batch as u64;
        let mut loader = Self {
            set: Arc::new(set),
            pool,
            queue: VecDeque::new(),
            batch,
            advance: batch * ranks as u64,
            position: start,
            scheduled: start,
            offset: rank as u64 * batch,
            order: None,
            skipped: BTreeMap::new(),
            left_out,
            classes,
            stop: Arc::new(AtomicBool::new(false)),
        };
        loader.schedule();
        Ok(loader)
    }

    /// The names of the dataset's classes, see [`Listing::classes`].
    pub fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    /// How many videos the dataset has, usable or not.
    pub fn videos(&self) -> usize {
        self.set.videos.len()
    }

    /// The videos that this loader could not use so far, by their number in the dataset, with the reason.
    pub fn skipped(&self) -> &BTreeMap<u32, String> {
        &self.skipped
    }

    /// How many videos the dataset lists that have no file, or no caption where it gives captions.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Set from another thread, it makes the loader give up what it is at.
    pub fn stop(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }

    /// The next batch. A video that is corrupt, cut off or too short is named in the log, once, and
    /// replaced by the next usable one of the epoch's order.
    ///
    /// While the folder of the videos is away, it waits; the sample stays the same.
    ///
    /// # Errors
    /// No video of the dataset can be used; a folder that does not come back.
    #[allow(clippy::should_implement_trait)] // it has errors, and no end
    pub fn next(&mut self) -> Result<Batch> {
        self.schedule();
        let (mut clips, mut samples, mut skipped, mut captions, mut classes) = (vec![], vec![], vec![], vec![], vec![]);
        for _ in 0..self.batch {
            let (number, receiver) = self.queue.pop_front().context("no sample is scheduled")?;
            let sample = receiver.recv().context("the thread died").and_then(|sample| sample);
            let sample = sample.with_context(|| format!("decoding sample {number}"))?;
            for (video, reason) in sample.skipped {
                let name = &self.set.videos[video as usize].name;
                skipped.push(name.clone());
                self.skipped.entry(video).or_insert_with(|| {
                    warn!("skipped {name}: {reason}");
                    reason
                });
            }
            if sample.away {
                bail!("the data is away for {} s: {}", PATIENCE.as_secs(), self.set.root_name());
            }
            let Some((clip, video)) = sample.clip else { bail!(self.nothing_usable()) };
            let VideoEntry { caption, class, .. } = &self.set.videos[video as usize];
            clips.extend_from_slice(&clip);
            captions.push(caption.clone());
            classes.push(class.clone());
            samples.push(number);
        }
        self.position += self.advance;
        let ClipSpec { frames, resolution, .. } = self.set.clip;
        let shape = [self.batch as i64, 3, frames, resolution, resolution];
        let clips = Tensor::f_from_data_size(&clips, &shape, Kind::Uint8)?;
        Ok(Batch { clips, captions, classes, samples, position: self.position, skipped })
    }

    /// Keeps the threads at work on this batch and the following ones.
    fn schedule(&mut self) {
        while self.queue.len() < (AHEAD + 1) * self.batch as usize {
            let first = self.scheduled + self.offset;
            self.scheduled += self.advance;
            for number in first..first + self.batch {
                let (sender, receiver) = sync_channel(1);
                let (set, order, stop) = (self.set.clone(), self.order(number), self.stop.clone());
                self.pool.spawn_fifo(move || {
                    if !stop.load(Ordering::Relaxed) {
                        let _ = sender.send(caught(|| Ok(set.sample(number, &order, &stop))));
                    }
                });
                self.queue.push_back((number, receiver));
            }
        }
    }

    /// The order of the videos in the epoch of a sample.
    fn order(&mut self, number: u64) -> Arc<Vec<u32>> {
        let epoch = number / self.set.videos.len() as u64;
        match &self.order {
            Some((known, order)) if *known == epoch => order.clone(),
            _ => {
                let order = Arc::new(permutation(self.set.videos.len(), self.set.seed, epoch));
                self.order = Some((epoch, order.clone()));
                order
            }
        }
    }

    fn nothing_usable(&self) -> String {
        let line = |(video, reason): (&u32, &String)| format!("{}: {reason}", self.set.videos[*video as usize].name);
        let first: Vec<String> = self.skipped.iter().take(3).map(line).collect();
        format!("none of the {} videos can be used; the first ones: {}", self.videos(), first.join("; "))
    }
}

impl Drop for Loader {
    /// Waits for the threads: none of them outlives the loader.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for (_, receiver) in self.queue.drain(..) {
            let _ = receiver.recv();
        }
    }
}

impl Set {
    fn sample(&self, number: u64, order: &[u32], stop: &AtomicBool) -> Sample {
        let mut skipped = Vec::new();
        let place = (number % order.len() as u64) as usize;
        for &at in order[place..].iter().chain(&order[..place]) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let video = &self.videos[at as usize];
            match self.cut(video, number, stop) {
                Ok(clip) => return Sample { clip: Some((clip, at)), skipped, away: false },
                Err(_) if self.is_away() => return Sample { clip: None, skipped, away: true },
                Err(error) => skipped.push((at, format!("{error:#}"))),
            }
        }
        Sample { clip: None, skipped, away: false }
    }

    /// The clip of a sample, once the folder of the videos is there.
    fn cut(&self, video: &VideoEntry, number: u64, stop: &AtomicBool) -> Result<Vec<u8>> {
        let began = Instant::now();
        loop {
            let mut generator = stream(self.seed, Purpose::Crop, number, 0);
            // a panic is of this video as an error is
            let cut = caught(|| self.clip.cut(&mut *video.source.open()?, &mut generator, self.flip));
            let patient = began.elapsed() < PATIENCE && !stop.load(Ordering::Relaxed);
            if cut.is_ok() || !patient || !self.is_away() {
                if cut.is_ok() && self.away.swap(false, Ordering::Relaxed) {
                    warn!("the data is there again: {}", self.root_name());
                }
                return cut;
            }
            if !self.away.swap(true, Ordering::Relaxed) {
                warn!("the data is away, and is waited for up to {} s: {}", PATIENCE.as_secs(), self.root_name());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Whether the folder of the videos cannot be read, or is empty, as where nothing is mounted on it any more.
    fn is_away(&self) -> bool {
        let Some(root) = &self.root else { return false };
        fs::read_dir(root).map_or(true, |mut entries| entries.next().is_none())
    }

    fn root_name(&self) -> String {
        self.root.as_ref().map_or_else(String::new, |root| root.display().to_string())
    }
}

/// The order of an epoch.
fn permutation(count: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    order.shuffle(&mut stream(seed, Purpose::Shuffle, epoch, 0));
    order
}

/// A clip and what the dataset says of its video.
pub(super) struct FixedClip {
    /// Unsigned bytes `[1, 3, F, H, W]`.
    pub clip: Tensor,
    /// What it shows.
    pub caption: Option<String>,
    /// The name of its class.
    pub class: Option<String>,
}

/// The first `count` samples of a seed, never mirrored, one by one: of different videos as long as
/// there are enough, since a sample whose video cannot be used is passed over, not replaced.
pub(super) struct FixedClips {
    loader: Loader,
}

impl FixedClips {
    pub fn new(config: &DataConfig, seed: u64) -> Result<Self> {
        Self::fitted(config, Fit::default(), seed)
    }

    /// As `new`, with squares made in another way.
    pub fn fitted(config: &DataConfig, fit: Fit, seed: u64) -> Result<Self> {
        Self::shared(config, fit, seed, [0, 1])
    }

    /// As `new`, shared by ranks: of each round of samples every rank has one, in their order.
    pub fn of_rank(config: &DataConfig, seed: u64, ranks: &Ranks) -> Result<Self> {
        Self::shared(config, Fit::default(), seed, [ranks.rank(), ranks.size()])
    }

    fn shared(config: &DataConfig, fit: Fit, seed: u64, rank_of: [usize; 2]) -> Result<Self> {
        let config = DataConfig { flip: false, ..config.clone() };
        Ok(Self { loader: Loader::fitted(&config, fit, 1, seed, 0, rank_of)? })
    }

    /// Videos of the dataset, usable or not.
    pub fn videos(&self) -> u64 {
        self.loader.videos() as u64
    }

    /// The first sample of the next round, the same on all ranks.
    pub fn position(&self) -> u64 {
        self.loader.position
    }

    /// The clip of this rank's sample of the next round: none where its number is not below `end` or its video cannot be
    /// used.
    pub fn sample(&mut self, end: u64) -> Result<Option<FixedClip>> {
        let mut batch = self.loader.next()?;
        let is_usable = batch.samples[0] < end && batch.skipped.is_empty();
        Ok(is_usable.then(|| FixedClip {
            clip: batch.clips,
            caption: batch.captions.remove(0),
            class: batch.classes.remove(0),
        }))
    }

    /// The clip of the next usable sample with a number below `end`.
    pub fn next(&mut self, end: u64) -> Result<Option<FixedClip>> {
        while self.position() < end {
            if let Some(found) = self.sample(end)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// The same `count` clips for each seed, to evaluate on: unsigned bytes `[count, 3, F, H, W]`, from
/// different videos as long as there are enough.
///
/// # Errors
/// No video of the dataset can be used.
pub fn fixed_clips(config: &DataConfig, count: i64, seed: u64) -> Result<Tensor> {
    ensure!(count >= 1, "{count} clips; it must be at least 1");
    let mut fixed = FixedClips::new(config, seed)?;
    let clips = (0..count).map(|_| Ok(fixed.next(u64::MAX)?.expect("samples have no end").clip));
    Ok(Tensor::cat(&clips.collect::<Result<Vec<_>>>()?, 0))
}

#[cfg(all(test, feature = "video"))]
mod tests {
    use super::*;
    use crate::data::{
        clip::FrameSource, dataset::DatasetConfig, folder::Folder, video::VideoSource,
        video_file::tests::write_test_video, video_path::VideoFile,
    };

    fn config(root: &Path) -> DataConfig {
        let dataset = DatasetConfig::Folder(Folder { root: root.to_path_buf() });
        DataConfig { dataset, frames: 4, frame_stride: 2, resolution: 16, flip: true, workers: 2 }
    }

    /// Five good videos among four bad ones.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for i in 0..5 {
            write_test_video(&path(&format!("good{i}.mp4")), 20 + i);
        }
        write_test_video(&path("short.mp4"), 6);
        write_test_video(&path("cut.mp4"), 60);
        let bytes = fs::read(path("cut.mp4")).unwrap();
        fs::write(path("cut.mp4"), &bytes[..bytes.len() / 2]).unwrap();
        fs::write(path("empty.mp4"), []).unwrap();
        fs::write(path("noise.avi"), vec![3; 4000]).unwrap();
        folder
    }

    fn samples(config: &DataConfig, batch: i64, start: u64, count: usize) -> Vec<(u64, Tensor)> {
        let mut loader = Loader::new(config, batch, 5, start).unwrap();
        let mut samples = Vec::new();
        while samples.len() < count {
            let batch = loader.next().unwrap();
            assert_eq!(batch.position, batch.samples.last().unwrap() + 1);
            samples.extend(batch.samples.iter().enumerate().map(|(i, &n)| (n, batch.clips.get(i as i64))));
        }
        samples.truncate(count);
        samples
    }

    /// A source whose decoder panics.
    #[derive(Debug)]
    struct Panicking;

    impl VideoSource for Panicking {
        fn open(&self) -> Result<Box<dyn FrameSource>> {
            panic!("attempt to divide by zero")
        }

        fn digest(&self, _blocks: u64) -> Result<Vec<u8>> {
            Ok(Vec::new())
        }
    }

    /// A panic while a video is decoded is of that video: named with its words, counted, passed over.
    #[test]
    fn a_panic_passes_over_one_video_and_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = |i: usize| folder.path().join(format!("{i}.mp4"));
        let mut videos: Vec<VideoEntry> = (0..3).map(|i| VideoEntry::new("video", VideoFile::new(path(i)))).collect();
        (0..3).for_each(|i| write_test_video(&path(i), 20));
        videos[1].source = Arc::new(Panicking);
        let clip = config(folder.path()).clip().unwrap();
        let set = Set { videos, clip, flip: false, seed: 1, root: None, away: AtomicBool::new(false) };
        let sample = set.sample(0, &[1, 0, 2], &AtomicBool::new(false));
        let [(1, reason)] = &sample.skipped[..] else { panic!("{:?}", sample.skipped) };
        assert!(sample.clip.is_some() && reason.contains("divide by zero"), "{reason}");
    }

    #[test]
    fn samples_do_not_depend_on_batch_size_workers_or_resume() {
        let folder = folder();
        let config = config(folder.path());
        let base = samples(&config, 1, 0, 24);
        assert!((0..24).all(|n| base[n].0 == n as u64 && base[n].1.size() == [3, 4, 16, 16]));
        assert!((1..24).any(|n| base[n].1 != base[0].1));
        let alone = DataConfig { workers: 1, ..config.clone() };
        assert_eq!(samples(&alone, 6, 0, 24), base);
        assert_eq!(samples(&config, 4, 0, 24), base);
        assert_eq!(samples(&config, 3, 11, 13)[..], base[11..]);
    }

    #[test]
    fn ranks_share_the_samples_of_a_step() {
        let folder = folder();
        let config = config(folder.path());
        let base = samples(&config, 1, 2, 12);
        for rank in 0..3 {
            let mut loader = Loader::of_rank(&config, 2, 5, 2, rank, 3).unwrap();
            for step in 0..2 {
                let batch = loader.next().unwrap();
                let first = step * 6 + rank * 2;
                assert_eq!(batch.samples, [base[first].0, base[first + 1].0]);
                assert_eq!(batch.clips.get(1), base[first + 1].1);
                assert_eq!(batch.position, 2 + 6 * (step as u64 + 1));
            }
        }
    }

    #[test]
    fn a_folder_that_is_away_is_waited_for() {
        let folder = folder();
        let (root, elsewhere) = (folder.path().join("videos"), folder.path().join("elsewhere"));
        fs::create_dir(&root).unwrap();
        for i in 0..3 {
            write_test_video(&root.join(format!("{i}.mp4")), 20);
        }
        let config = config(&root);
        let expected = samples(&config, 1, 0, 12);
        let mut loader = Loader::new(&config, 1, 5, 0).unwrap();
        for sample in &expected[..2] {
            assert_eq!(loader.next().unwrap().clips.get(0), sample.1);
        }
        fs::rename(&root, &elsewhere).unwrap();
        let back = std::thread::spawn({
            let (root, elsewhere) = (root.clone(), elsewhere.clone());
            move || {
                std::thread::sleep(PATIENCE / 4);
                fs::rename(elsewhere, root).unwrap();
            }
        });
        for sample in &expected[2..] {
            assert_eq!(loader.next().unwrap().clips.get(0), sample.1);
        }
        assert!(loader.skipped().is_empty());
        back.join().unwrap();
        // for good; and an empty place where it was mounted
        fs::rename(&root, &elsewhere).unwrap();
        fs::create_dir(&root).unwrap();
        let error = (0..9).find_map(|_| loader.next().err()).unwrap().to_string();
        assert!(error.contains("is away") && error.contains("videos"), "{error}");
    }

    #[test]
    fn unusable_videos_are_counted_with_their_reasons() {
        let folder = folder();
        let mut loader = Loader::new(&config(folder.path()), 3, 1, 0).unwrap();
        let named: Vec<String> = (0..3).flat_map(|_| loader.next().unwrap().skipped).collect();
        let by_name: BTreeMap<&str, &String> = loader
            .skipped()
            .iter()
            .map(|(&video, reason)| (loader.set.videos[video as usize].name.as_str(), reason))
            .collect();
        let reason = |name: &str| by_name[folder.path().join(name).to_str().unwrap()];
        assert_eq!(by_name.len(), 4, "{by_name:?}");
        assert!(by_name.keys().all(|name| named.iter().any(|other| other == name)));
        assert!(reason("short.mp4").contains("too short: 6 frames"), "{}", reason("short.mp4"));
        assert!(reason("empty.mp4").contains("empty"), "{}", reason("empty.mp4"));
        assert!(reason("cut.mp4").contains("cut.mp4") && reason("noise.avi").contains("noise.avi"));
    }

    #[test]
    fn a_panic_of_a_decoding_thread_is_an_error_of_its_sample() {
        let folder = folder();
        let mut loader = Loader::new(&config(folder.path()), 1, 1, 0).unwrap();
        // samples that are scheduled from here on are of a video that the data set does not have
        loader.order = Some((0, Arc::new(vec![99; 9])));
        let error = (0..9).find_map(|_| loader.next().err()).unwrap();
        let error = format!("{error:#}");
        assert!(error.starts_with(&format!("decoding sample {}: ", AHEAD + 1)), "{error}");
        assert!(error.contains("index is 99"), "{error}");
    }

    #[test]
    fn nothing_usable_is_an_error_that_names_files() {
        let folder = folder();
        let long = DataConfig { frames: 500, ..config(folder.path()) };
        let error = Loader::new(&long, 2, 0, 0).unwrap().next().unwrap_err().to_string();
        assert!(error.contains("none of the 9 videos") && error.contains("cut.mp4"), "{error}");
        assert!(Loader::new(&config(&folder.path().join("nowhere")), 2, 0, 0).is_err());
    }

    #[test]
    fn fixed_clips_come_from_different_videos() {
        let folder = folder();
        let config = DataConfig { flip: false, ..config(folder.path()) };
        let clips = fixed_clips(&config, 5, 3).unwrap();
        assert_eq!(clips.size(), [5, 3, 4, 16, 16]);
        let usable: Vec<Tensor> = {
            let mut loader = Loader::new(&config, 1, 3, 0).unwrap();
            let first: Vec<Batch> = (0..9).map(|_| loader.next().unwrap()).collect();
            first.into_iter().filter(|batch| batch.skipped.is_empty()).map(|batch| batch.clips).collect()
        };
        assert!(clips.equal(&Tensor::cat(&usable, 0)));
    }
}
