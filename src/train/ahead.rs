//! Batches that are ready before the step that uses them.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    thread::JoinHandle,
};

use anyhow::{Context, Result};
use tch::Device;

use crate::{
    data::{self, Loader},
    torch::{caught, pinned},
};

/// Batches that lie ready.
const READY: usize = 3;

/// What a thread of its own puts together, one after the other, before it is asked for.
pub struct Ahead<T> {
    made: Option<Receiver<Result<T>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Ahead<T> {
    /// `next` makes one more, until it fails. It ends soon once `stop` is set.
    ///
    /// # Errors
    /// Where there is no room for one more thread.
    pub fn new(stop: Arc<AtomicBool>, mut next: impl FnMut() -> Result<T> + Send + 'static) -> Result<Self> {
        // one more is in the making
        let (sender, made) = sync_channel(READY - 1);
        let is_over = Arc::clone(&stop);
        let work = move || {
            while !is_over.load(Ordering::Relaxed) {
                let one = caught(&mut next);
                let failed = one.is_err();
                if sender.send(one).is_err() || failed {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("batches".into()).spawn(work);
        Ok(Ahead { made: Some(made), stop, thread: Some(thread.context("cannot start the thread of the batches")?) })
    }

    /// The next one. After an error there is none.
    ///
    /// # Errors
    /// What kept it from being made.
    pub fn next(&mut self) -> Result<T> {
        let made = self.made.as_ref().expect("it is there until it is dropped");
        made.recv().context("there are no batches after one that failed")?
    }
}

impl<T> Drop for Ahead<T> {
    /// The thread does not outlive it.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.made.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The batches of a loader, put together ahead and, for a GPU, in pinned memory.
pub struct ClipsAhead {
    ahead: Ahead<(data::Batch, Vec<u32>)>,
    skipped: BTreeSet<u32>,
    left_out: usize,
}

impl ClipsAhead {
    /// For a network on this device.
    ///
    /// # Errors
    /// As [`Ahead::new`].
    pub fn new(mut loader: Loader, device: Device) -> Result<Self> {
        let (left_out, stop) = (loader.left_out(), loader.stop());
        let ahead = Ahead::new(stop, move || {
            let batch = loader.next()?;
            let skipped = loader.skipped().keys().copied().collect();
            Ok((data::Batch { clips: pinned(batch.clips, device), ..batch }, skipped))
        })?;
        Ok(ClipsAhead { ahead, skipped: BTreeSet::new(), left_out })
    }

    /// As [`Loader::next`].
    ///
    /// # Errors
    /// Those of the loader.
    pub fn next(&mut self) -> Result<data::Batch> {
        let (batch, skipped) = self.ahead.next()?;
        self.skipped.extend(skipped);
        Ok(batch)
    }

    /// The videos that could not be used up to the last batch, by their number in the dataset.
    pub fn skipped(&self) -> &BTreeSet<u32> {
        &self.skipped
    }

    /// How many videos the dataset lists that have no file, or no caption where it gives captions.
    pub fn left_out(&self) -> usize {
        self.left_out
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicUsize,
        time::{Duration, Instant},
    };

    use anyhow::bail;

    use super::*;

    /// A step that takes as long as a batch does not wait for it.
    #[test]
    fn a_step_does_not_wait_for_a_batch_that_takes_no_longer() {
        const EACH: Duration = Duration::from_millis(40);
        let mut next = 0;
        let made = move || {
            std::thread::sleep(EACH);
            next += 1;
            Ok(next)
        };
        let mut ahead = Ahead::new(Arc::default(), made).unwrap();
        assert_eq!(ahead.next().unwrap(), 1);
        let mut waited = Duration::ZERO;
        for expected in 2..8 {
            std::thread::sleep(EACH * 3 / 2); // the step
            let start = Instant::now();
            assert_eq!(ahead.next().unwrap(), expected);
            waited += start.elapsed();
        }
        assert!(waited < EACH, "{waited:?} of six steps");
    }

    /// No more than three are made before they are asked for, an error is the last, and dropping it ends the thread.
    #[test]
    fn three_lie_ready_and_an_error_is_the_last() {
        let made = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&made);
        let mut ahead = Ahead::new(Arc::default(), move || match count.fetch_add(1, Ordering::Relaxed) {
            5 => bail!("the sixth"),
            n => Ok(n),
        })
        .unwrap();
        let begun = Instant::now();
        while made.load(Ordering::Relaxed) < READY && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(made.load(Ordering::Relaxed), READY);
        for n in 0..5 {
            assert_eq!(ahead.next().unwrap(), n);
        }
        assert_eq!(ahead.next().unwrap_err().to_string(), "the sixth");
        assert!(ahead.next().unwrap_err().to_string().contains("after one that failed"));
        drop(ahead);
        assert_eq!(Arc::strong_count(&made), 1, "the thread is there");
    }
}
