//! The families of models, by the task that their checkpoints name.

use std::path::Path;

use anyhow::Result;
use tch::Device;

use super::{latent_diffusion::LatentDiffusion, model::VideoModel};
use crate::{checkpoint, experiment::UserError};

type Open = fn(&Path, Device) -> Result<Box<dyn VideoModel>>;

/// The task that a training of the family writes into its checkpoints, and how such a run is opened. One line a family.
const FAMILIES: [(&str, Open); 1] = [("diffusion", |run, device| Ok(Box::new(LatentDiffusion::open(run, device)?.0)))];

/// The model of a run folder, or of one of its checkpoints, with its averaged weights and the run's own sampling settings.
///
/// # Errors
/// A path that is no run; a run whose task makes no videos; damaged or foreign weights.
pub fn open(run: &Path, device: Device) -> Result<Box<dyn VideoModel>> {
    let (path, head) = checkpoint::open_head(run)?;
    match FAMILIES.iter().find(|(task, _)| *task == head.task) {
        Some((_, open)) => open(run, device),
        None => Err(UserError(format!(
            "{} holds a training of the task {}, which makes no videos; those that do are: {}",
            path.display(),
            head.task,
            FAMILIES.map(|(task, _)| task).join(", ")
        ))
        .into()),
    }
}
