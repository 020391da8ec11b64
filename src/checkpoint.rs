//! Checkpoints: one safetensors file a step, written whole or not at all.

mod lock;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

pub use lock::RunLock;

use crate::run_files::CHECKPOINTS_FOLDER;
use crate::safetensors::{read_checked, read_metadata, read_shapes, write_safetensors_atomically};

/// What a checkpoint says besides its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: i64,
    /// Sample with which the loader goes on.
    pub position: u64,
    /// Updates of the moving average.
    pub ema_updates: i64,
    /// Steps that were left out because something was not finite.
    pub skipped_steps: i64,
    /// Time spent in training, over all starts.
    pub seconds: f64,
}

/// The contents of a checkpoint file.
pub struct Checkpoint {
    /// `autoencoder`, `diffusion` or `transformer`.
    pub task: String,
    /// How far the training is.
    pub progress: Progress,
    /// The experiment as resolved.
    pub experiment: Value,
    /// Prefixed by what they are: `model.`, `ema.`, `discriminator.`, `optimizer.…`, `latent.`.
    pub tensors: BTreeMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
struct Metadata {
    format: u32,
    task: String,
    progress: Progress,
    experiment: Value,
}

impl Metadata {
    fn of(stored: Option<Value>, path: &Path) -> Result<Self> {
        let foreign = || format!("{} is not a checkpoint of lvdm", path.display());
        let metadata: Self = serde_json::from_value(stored.with_context(foreign)?).with_context(foreign)?;
        ensure!(
            (1..=FORMAT).contains(&metadata.format),
            "{} has format {}, this program reads those up to {FORMAT}",
            path.display(),
            metadata.format
        );
        Ok(metadata)
    }

    fn with(self, tensors: BTreeMap<String, Tensor>) -> Checkpoint {
        let Metadata { task, progress, experiment, .. } = self;
        Checkpoint { task, progress, experiment, tensors }
    }
}

/// Since 2 a checkpoint carries its digest.
const FORMAT: u32 = 2;

impl Checkpoint {
    /// # Errors
    /// A full or unwritable disk; what was there before stays.
    pub fn write(&self, path: &Path) -> Result<()> {
        let metadata = Metadata {
            format: FORMAT,
            task: self.task.clone(),
            progress: self.progress.clone(),
            experiment: self.experiment.clone(),
        };
        let tensors: Vec<(&String, &Tensor)> = self.tensors.iter().collect();
        write_safetensors_atomically(path, &tensors, &serde_json::to_value(metadata)?)
    }

    /// # Errors
    /// A file that is cut off or damaged, by a single bit even, or is not a checkpoint of this program.
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_some(path, &|_| true)
    }

    /// As [`Self::read`], without what only training needs: the optimizer's state, twice as large as the weights.
    ///
    /// # Errors
    /// The same.
    pub fn read_weights(path: &Path) -> Result<Self> {
        Self::read_some(path, &|name| !name.starts_with("optimizer."))
    }

    /// As [`Self::read`], only what a network samples with: of a tensor that has a moving average that alone.
    ///
    /// # Errors
    /// The same.
    pub fn read_averaged(path: &Path) -> Result<Self> {
        let shapes = read_shapes(path)?;
        let averaged =
            |name: &str| name.strip_prefix("model.").is_some_and(|name| shapes.contains_key(&format!("ema.{name}")));
        let training = |name: &str| name.starts_with("optimizer.") || name.starts_with("discriminator.");
        Self::read_some(path, &|name| !training(name) && !averaged(name))
    }

    /// As [`Self::read`], without any tensor; only the header is read.
    ///
    /// # Errors
    /// The same, but damaged tensors are not found.
    pub fn read_head(path: &Path) -> Result<Self> {
        let metadata = Metadata::of(read_metadata(path)?, path)?;
        Ok(metadata.with(BTreeMap::new()))
    }

    fn read_some(path: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Self> {
        let (tensors, metadata, known_whole) = read_checked(path, wanted)?;
        let metadata = Metadata::of(metadata, path)?;
        ensure!(
            known_whole || metadata.format == 1,
            "{} is damaged: its digest is not where it was written",
            path.display()
        );
        Ok(metadata.with(tensors))
    }

    /// The tensors under a prefix, without it.
    pub fn part(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let strip = |(name, tensor): (&String, &Tensor)| {
            Some((name.strip_prefix(prefix)?.strip_prefix('.')?.to_string(), tensor.shallow_clone()))
        };
        self.tensors.iter().filter_map(strip).collect()
    }

    /// As [`Self::part`], and the checkpoint no longer has them.
    pub fn take_part(&mut self, prefix: &str) -> BTreeMap<String, Tensor> {
        let part = self.part(prefix);
        self.tensors.retain(|name, _| name.strip_prefix(prefix).is_none_or(|rest| !rest.starts_with('.')));
        part
    }

    /// # Errors
    /// Where the checkpoint belongs to another kind of training.
    pub fn expect(self, task: &str, path: &Path) -> Result<Self> {
        ensure!(self.task == task, "{} holds a training of the {}, not of the {task}", path.display(), self.task);
        Ok(self)
    }
}

/// A run folder's checkpoints, oldest first.
///
/// # Errors
/// A folder that cannot be read.
pub fn list(run: &Path) -> Result<Vec<PathBuf>> {
    let folder = folder(run);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("step-") && name.ends_with(".safetensors") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn folder(run: &Path) -> PathBuf {
    run.join(CHECKPOINTS_FOLDER)
}

/// Where the checkpoint of a step lies.
pub fn path(run: &Path, step: i64) -> PathBuf {
    folder(run).join(format!("step-{step:08}.safetensors"))
}

/// Deletes what a run that was killed has left half written. Only who holds the [`RunLock`] may.
pub fn sweep(run: &Path) {
    let Ok(entries) = fs::read_dir(folder(run)) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(".step-") && name.ends_with(".partial") {
            let _ = fs::remove_file(path);
        }
    }
}

/// Deletes all but the latest `keep`. Only who holds the [`RunLock`] may.
///
/// # Errors
/// The disk's.
pub fn prune(run: &Path, keep: usize) -> Result<()> {
    let mut found = list(run)?;
    found.truncate(found.len().saturating_sub(keep));
    for path in found {
        fs::remove_file(&path).with_context(|| format!("cannot delete {}", path.display()))?;
    }
    Ok(())
}

/// The latest readable checkpoint of a run; damaged ones are named in a warning and passed over.
///
/// # Errors
/// Where there are checkpoints and none can be read.
pub fn latest(run: &Path) -> Result<Option<(PathBuf, Checkpoint)>> {
    latest_by(run, Checkpoint::read)
}

fn latest_by(run: &Path, read: fn(&Path) -> Result<Checkpoint>) -> Result<Option<(PathBuf, Checkpoint)>> {
    let found = list(run)?;
    let mut first_error = None;
    for path in found.iter().rev() {
        match read(path) {
            Ok(checkpoint) => return Ok(Some((path.clone(), checkpoint))),
            Err(error) => {
                tracing::warn!("a damaged checkpoint is passed over: {error:#}");
                first_error.get_or_insert(error);
            }
        }
    }
    match first_error {
        Some(error) => Err(error.context(format!("no checkpoint in {} can be read", folder(run).display()))),
        None => Ok(None),
    }
}

/// The checkpoint of a run folder, or the file itself, without what only training needs.
///
/// # Errors
/// Where there is none, or none can be read.
pub fn open(run_or_file: &Path) -> Result<(PathBuf, Checkpoint)> {
    open_by(run_or_file, Checkpoint::read_weights)
}

/// As [`open`], only what a network samples with ([`Checkpoint::read_averaged`]).
///
/// # Errors
/// As [`open`].
pub fn open_averaged(run_or_file: &Path) -> Result<(PathBuf, Checkpoint)> {
    open_by(run_or_file, Checkpoint::read_averaged)
}

/// As [`open`], without any tensor.
///
/// # Errors
/// As [`open`]; damaged tensors are not found.
pub fn open_head(run_or_file: &Path) -> Result<(PathBuf, Checkpoint)> {
    open_by(run_or_file, Checkpoint::read_head)
}

/// How many parameters the network of a checkpoint has, of which only the header is read.
///
/// # Errors
/// A file that is not a tensor file.
pub fn parameters(path: &Path) -> Result<i64> {
    let of_network =
        |(name, shape): (String, Vec<i64>)| name.starts_with("model.").then(|| shape.iter().product::<i64>());
    Ok(read_shapes(path)?.into_iter().filter_map(of_network).sum())
}

fn open_by(run_or_file: &Path, read: fn(&Path) -> Result<Checkpoint>) -> Result<(PathBuf, Checkpoint)> {
    if run_or_file.is_file() {
        return Ok((run_or_file.to_path_buf(), read(run_or_file)?));
    }
    match latest_by(run_or_file, read)? {
        Some(found) => Ok(found),
        None => bail!("{} holds no checkpoint: is it a run of `lvdm train`?", run_or_file.display()),
    }
}
