//! When the frames of files are shown. A list costs one pass over a whole file, so the latest ones are kept.

use std::{
    collections::{HashMap, VecDeque},
    fs::Metadata,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Result;

/// When frames are shown, in units of the stream's time base.
#[derive(Debug, PartialEq)]
pub enum Timeline {
    /// Presentation times of all frames and of those that decoding can begin at.
    Timed { frames: Times, keys: Times },
    /// The container knows no presentation times, or the same ones twice: frames are counted from the beginning.
    Counted(usize),
}

/// Ascending times; most files have them at equal distances.
#[derive(Debug, PartialEq)]
pub enum Times {
    Even { first: i64, step: i64, count: usize },
    Listed(Vec<i64>),
}

impl Times {
    /// Of ascending times.
    pub fn of(times: Vec<i64>) -> Self {
        match times[..] {
            [first, second, ..]
                if times.windows(2).all(|pair| pair[1] - pair[0] == second - first) && second > first =>
            {
                Times::Even { first, step: second - first, count: times.len() }
            }
            _ => Times::Listed(times),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Times::Even { count, .. } => *count,
            Times::Listed(times) => times.len(),
        }
    }

    /// The i-th, counted from 0, of those that there are.
    pub fn at(&self, i: usize) -> i64 {
        match self {
            Times::Even { first, step, .. } => first + i as i64 * step,
            Times::Listed(times) => times[i],
        }
    }

    /// The last one that is not after `time`.
    pub fn last_until(&self, time: i64) -> Option<i64> {
        let before = match self {
            Times::Even { first, step, count } => {
                ((time - first).div_euclid(*step) + 1).clamp(0, *count as i64) as usize
            }
            Times::Listed(times) => times.partition_point(|&other| other <= time),
        };
        before.checked_sub(1).map(|i| self.at(i))
    }

    fn bytes(&self) -> usize {
        match self {
            Times::Even { .. } => 0,
            Times::Listed(times) => size_of_val(&times[..]),
        }
    }
}

impl Timeline {
    /// About what it takes in memory, with its place in [`Timelines`].
    fn bytes(&self) -> usize {
        let listed = match self {
            Timeline::Timed { frames, keys } => frames.bytes() + keys.bytes(),
            Timeline::Counted(_) => 0,
        };
        listed + 512
    }
}

/// What tells a file from another one that takes its place.
type Stamp = (u64, u64, i64, i64);

/// The timelines of the files that were listed last.
pub struct Timelines {
    most: usize,
    bytes: usize,
    known: HashMap<PathBuf, (Stamp, Arc<Timeline>)>,
    /// The longest known first.
    order: VecDeque<PathBuf>,
}

/// What the timelines that are kept take at most.
const MOST: usize = 128 << 20;

static KEPT: Mutex<Option<Timelines>> = Mutex::new(None);

/// The timeline of a file: the kept one where the file is the same, else what `list` finds.
///
/// # Errors
/// Those of `list`; they are not kept.
pub fn timeline_of(path: &Path, file: &Metadata, list: impl FnOnce() -> Result<Timeline>) -> Result<Arc<Timeline>> {
    let kept = || KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let stamp = (file.ino(), file.len(), file.mtime(), file.mtime_nsec());
    if let Some(known) = kept().get_or_insert_with(|| Timelines::new(MOST)).find(path, stamp) {
        return Ok(known);
    }
    // without the lock: other threads go on
    let timeline = Arc::new(list()?);
    kept().get_or_insert_with(|| Timelines::new(MOST)).keep(path, stamp, &timeline);
    Ok(timeline)
}

impl Timelines {
    fn new(most: usize) -> Self {
        Timelines { most, bytes: 0, known: HashMap::new(), order: VecDeque::new() }
    }

    fn find(&self, path: &Path, stamp: Stamp) -> Option<Arc<Timeline>> {
        self.known.get(path).filter(|(known, _)| *known == stamp).map(|(_, timeline)| timeline.clone())
    }

    fn keep(&mut self, path: &Path, stamp: Stamp, timeline: &Arc<Timeline>) {
        match self.known.insert(path.to_path_buf(), (stamp, timeline.clone())) {
            // in the place of the file that was there before
            Some((_, before)) => self.bytes -= before.bytes(),
            None => self.order.push_back(path.to_path_buf()),
        }
        self.bytes += timeline.bytes();
        while self.bytes > self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.known.remove(&oldest).map_or(0, |(_, timeline)| timeline.bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, fs};

    use super::*;

    #[test]
    fn times_answer_alike_listed_or_even() {
        let even = Times::of(vec![-3, 4, 11, 18]);
        assert_eq!(even, Times::Even { first: -3, step: 7, count: 4 });
        let listed = Times::Listed(vec![-3, 4, 11, 18]);
        assert!((0..4).all(|i| even.at(i) == listed.at(i)) && even.len() == listed.len());
        for time in -9..30 {
            assert_eq!(even.last_until(time), listed.last_until(time), "{time}");
        }
        assert_eq!(even.last_until(10), Some(4));
        for times in [vec![], vec![5], vec![1, 2, 4], vec![2, 2, 2]] {
            assert_eq!(Times::of(times.clone()), Times::Listed(times));
        }
    }

    /// A file is listed at its first opening and not again until it is another one; what cannot be listed is tried anew.
    #[test]
    fn a_file_is_listed_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let listed = Cell::new(0);
        let open = |frames: usize| {
            timeline_of(&path, &fs::metadata(&path).unwrap(), || {
                listed.set(listed.get() + 1);
                anyhow::ensure!(frames > 0, "it holds no frames");
                Ok(Timeline::Counted(frames))
            })
        };
        fs::write(&path, "one").unwrap();
        assert!(open(0).is_err());
        assert!((0..3).all(|i| *open(3 + i).unwrap() == Timeline::Counted(3)));
        assert_eq!(listed.get(), 2);
        fs::write(&path, "another one").unwrap();
        assert!(*open(5).unwrap() == Timeline::Counted(5) && listed.get() == 3);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let timeline = |count: i64| {
            Arc::new(Timeline::Timed {
                frames: Times::Listed((0..count).map(|i| i * i).collect()),
                keys: Times::Listed(vec![0]),
            })
        };
        let one = timeline(100);
        let mut kept = Timelines::new(3 * one.bytes());
        let path = |i: usize| PathBuf::from(format!("{i}"));
        let there =
            |kept: &Timelines| (0..6).filter(|&i| kept.find(&path(i), (1, 2, 3, 4)).is_some()).collect::<Vec<_>>();
        for i in 0..5 {
            kept.keep(&path(i), (1, 2, 3, 4), &one);
        }
        assert_eq!(there(&kept), [2, 3, 4]);
        kept.keep(&path(3), (1, 2, 3, 4), &one);
        assert_eq!((there(&kept), kept.bytes, kept.order.len()), (vec![2, 3, 4], 3 * one.bytes(), 3));
        kept.keep(&path(5), (1, 2, 3, 4), &one);
        assert_eq!((there(&kept), kept.bytes, kept.order.len()), (vec![3, 4, 5], 3 * one.bytes(), 3));
        // one that does not fit is not kept, nor anything beside it
        kept.keep(&path(0), (1, 2, 3, 4), &timeline(10_000));
        assert_eq!((there(&kept), kept.bytes), (vec![], 0));
    }
}
