//! The families of models, by the task that their checkpoints name.

use std::path::Path;

use anyhow::Result;
use tch::Device;

use super::{
    cascade::Cascade, code_transformer::CodeTransformer, latent_diffusion::LatentDiffusion, long_codes, long_diffusion,
    long_video::LongVideo, model::VideoModel,
};
use crate::{
    checkpoint,
    experiment::{LongVideoConfig, SUPERRESOLUTION, UserError},
};

/// A family of models.
struct Family {
    /// The task that its training writes into its checkpoints.
    task: &'static str,
    /// Opens such a run.
    open: fn(&Path, Device) -> Result<Box<dyn VideoModel>>,
    /// Plans long videos of such runs: with their weights on a device, or as an outline by which nothing can be made. None of a
    /// family whose runs continue no videos.
    long: Option<OpenLong>,
}

type OpenLong = fn(&LongVideoConfig, i64, Option<Device>) -> Result<LongVideo>;

/// One line a family.
const FAMILIES: [Family; 3] = [
    Family {
        task: "diffusion",
        open: |run, device| Ok(Box::new(LatentDiffusion::open(run, device)?.0)),
        long: Some(long_diffusion::open),
    },
    Family { task: SUPERRESOLUTION, open: |run, device| Ok(Box::new(Cascade::open(run, device, open)?)), long: None },
    Family {
        task: "transformer",
        open: |run, device| Ok(Box::new(CodeTransformer::open(run, device)?)),
        long: Some(long_codes::open),
    },
];

/// The family of a run folder, or of one of its checkpoints.
fn family(run: &Path, wanted: fn(&Family) -> bool, missing: &str) -> Result<&'static Family> {
    let (path, head) = checkpoint::open_head(run)?;
    let mut able = FAMILIES.iter().filter(|family| wanted(family));
    if let Some(family) = able.clone().find(|family| family.task == head.task) {
        return Ok(family);
    }
    let tasks: Vec<&str> = able.by_ref().map(|family| family.task).collect();
    Err(UserError(format!(
        "{} holds a training of the task {}, which {missing}; those that do are: {}",
        path.display(),
        head.task,
        tasks.join(", ")
    ))
    .into())
}

/// The model of a run folder, or of one of its checkpoints, with its averaged weights and the run's own sampling settings.
///
/// # Errors
/// A path that is no run; a run whose task makes no videos; damaged or foreign weights.
pub fn open(run: &Path, device: Device) -> Result<Box<dyn VideoModel>> {
    (family(run, |_| true, "makes no videos")?.open)(run, device)
}

/// Opens the runs of long videos of `frames` frames, and plans these. The family is that of the prediction run.
///
/// # Errors
/// [`UserError`] for a run that continues no videos, and for settings that do not fit the runs or each other; a path that is no
/// run; damaged or foreign weights.
pub fn open_long(config: &LongVideoConfig, frames: i64, device: Device) -> Result<LongVideo> {
    long(config, frames, Some(device))
}

/// As [`open_long`] without the weights of the models: a plan, by which nothing can be made.
///
/// # Errors
/// As [`open_long`].
pub fn outline_long(config: &LongVideoConfig, frames: i64) -> Result<LongVideo> {
    long(config, frames, None)
}

fn long(config: &LongVideoConfig, frames: i64, device: Option<Device>) -> Result<LongVideo> {
    let family = family(&config.prediction, |family| family.long.is_some(), "makes no long videos")?;
    let open = family.long.expect("the family was found by it");
    open(config, frames, device)
}
