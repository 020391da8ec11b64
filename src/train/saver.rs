use std::{
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
    time::Instant,
};

use anyhow::{Context, Result, anyhow};
use tch::{Device, Tensor, no_grad};

use crate::{
    checkpoint::{self, Checkpoint},
    torch::{PinnedMemory, Readback, caught},
};

/// Writes checkpoints in the background. Training waits for the one before where that is not yet on the disk, and on the CPU
/// for the copy; a GPU's tensors come on their own, into pinned memory that is used again.
///
/// If a checkpoint cannot be written, a warning says so, and training continues: earlier checkpoints stay, and the next one
/// is tried again. Dropping the saver waits for what is under way.
pub struct Saver {
    work: Option<SyncSender<(Checkpoint, Option<Readback>, PathBuf)>>,
    pinned: PinnedMemory,
    done: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
    under_way: bool,
    /// Why the last checkpoint is not on the disk.
    failure: Option<anyhow::Error>,
    /// Time that training has waited for copies and for the disk.
    pub waited: f64,
}

impl Saver {
    /// For the checkpoints of one run, of which the latest `keep` stay.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn new(run: &Path, keep: usize) -> Result<Self> {
        let run = run.to_path_buf();
        let (work, given) = sync_channel::<(Checkpoint, Option<Readback>, PathBuf)>(1);
        let (outcome, done) = sync_channel(1);
        let write = move || {
            checkpoint::sweep(&run);
            for (checkpoint, arrived, path) in given {
                let there = || arrived.map_or(Ok(()), |arrived: Readback| arrived.wait().map(drop));
                let write =
                    || there().and_then(|()| checkpoint.write(&path)).and_then(|()| checkpoint::prune(&run, keep));
                let written = caught(write).with_context(|| format!("writing the checkpoint {}", path.display()));
                if outcome.send(written).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write)?;
        Ok(Saver {
            work: Some(work),
            pinned: PinnedMemory::default(),
            done,
            thread: Some(thread),
            under_way: false,
            failure: None,
            waited: 0.0,
        })
    }

    /// Takes a copy of the checkpoint's tensors and sees to it that they reach the disk.
    ///
    /// # Errors
    /// A writing thread that died.
    pub fn save(&mut self, mut checkpoint: Checkpoint, path: PathBuf) -> Result<()> {
        let start = Instant::now();
        self.wait();
        let arrived = self.copy(&mut checkpoint)?;
        let work = self.work.as_ref().expect("it lives as long as the saver");
        work.send((checkpoint, arrived, path)).map_err(|_| anyhow!("the thread that writes checkpoints died"))?;
        self.under_way = true;
        self.waited += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Puts copies in the place of the tensors, and says when those of a GPU are there.
    fn copy(&mut self, checkpoint: &mut Checkpoint) -> Result<Option<Readback>> {
        no_grad(|| {
            let mut of_gpu = Vec::new();
            for tensor in checkpoint.tensors.values_mut() {
                *tensor = tensor.detach();
                if tensor.device() == Device::Cpu {
                    *tensor = tensor.copy();
                } else {
                    of_gpu.push(tensor);
                }
            }
            if of_gpu.is_empty() {
                return Ok(None);
            }
            let tensors: Vec<&Tensor> = of_gpu.iter().map(|tensor| &**tensor).collect();
            let (copies, arrived) = self.pinned.hold(&tensors).context("copying a checkpoint to the host")?;
            of_gpu.into_iter().zip(copies).for_each(|(tensor, copy)| *tensor = copy);
            Ok(Some(arrived))
        })
    }

    /// Waits for the checkpoint under way.
    fn wait(&mut self) {
        if !std::mem::take(&mut self.under_way) {
            return;
        }
        let written = self.done.recv().context("the thread that writes checkpoints died").and_then(|written| written);
        self.failure = written.err();
        if let Some(error) = &self.failure {
            tracing::warn!("{error:#}; training goes on, and tries again at the next checkpoint");
        }
    }

    /// Waits until the last checkpoint is on the disk.
    ///
    /// # Errors
    /// Why it is not.
    pub fn finish(&mut self) -> Result<()> {
        if std::mem::take(&mut self.under_way) {
            self.failure = self.done.recv().context("the thread that writes checkpoints died").and_then(|w| w).err();
        }
        self.failure.take().map_or(Ok(()), Err)
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.work = None;
        // takes the last answer, so that the thread need not wait to give it
        let _ = self.finish();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::checkpoint::Progress;

    /// The thread that trains reports what failed in the thread that writes; later checkpoints are written.
    #[test]
    fn a_panic_of_the_writing_thread_is_an_error_of_training() {
        let folder = tempfile::tempdir().unwrap();
        let path = |step| checkpoint::path(folder.path(), step);
        let of = |tensor: Tensor| Checkpoint {
            task: "test".into(),
            progress: Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 },
            experiment: serde_json::Value::Null,
            tensors: BTreeMap::from([("model.weight".into(), tensor)]),
        };
        let mut saver = Saver::new(folder.path(), 2).unwrap();
        // a sparse tensor has no bytes in a row, and LibTorch panics where they are asked for
        saver.save(of(Tensor::from_slice(&[0.0f32, 1.0]).to_sparse(None, None::<i64>, None)), path(1)).unwrap();
        let error = format!("{:#}", saver.finish().unwrap_err());
        assert!(error.starts_with("writing the checkpoint ") && error.contains("step-00000001"), "{error}");
        assert!(error.contains("memory format"), "{error}");
        saver.save(of(Tensor::from_slice(&[0.0f32, 1.0])), path(2)).unwrap();
        saver.finish().unwrap();
        assert!(path(2).exists() && !path(1).exists());
    }
}
