//! A whole training, from an experiment to a run: what it goes on from, what it needs beside its data, and the loop.

use std::path::Path;

use anyhow::{Context, Result};
use tch::Device;

use super::{
    AutoencoderTask, DiffusionTask, SettingsChanges, Trainer, TransformerTask, classes, resume_point, with_classes,
};
use crate::{
    checkpoint::{self, Progress, RunLock},
    distributed::Ranks,
    experiment::{AutoencoderExperiment, DiffusionExperiment, DiffusionSpace, TrainerConfig, TransformerExperiment},
    models::{self, check_base},
    run::{
        carry_autoencoder, carry_run, carry_text_encoder, open_latent_space, open_text_encoder, space_of,
        warn_of_another_autoencoder, warn_of_another_base,
    },
    run_files::{AUTOENCODER_FILE, BASE_FOLDER, TEXT_ENCODER_FILE},
    torch::{allow_tf32, be_deterministic},
};

/// How exactly, and how repeatably, this process computes from here on.
fn compute_as(trainer: &TrainerConfig) {
    if trainer.deterministic {
        be_deterministic();
    }
    allow_tf32(trainer.tf32);
}

/// Trains an autoencoder into the folder `run`, or goes on with the training that is there. With `change_settings` it may go
/// on with settings other than those it was begun with.
///
/// # Errors
/// Data or weights that are not there, a run of another architecture or one that another process trains, a full disk.
pub fn train_autoencoder(
    experiment: &AutoencoderExperiment,
    run: &Path,
    change_settings: bool,
    ranks: &Ranks,
    device: Device,
) -> Result<Progress> {
    let _lock = if ranks.is_first() { Some(RunLock::take(run)?) } else { None };
    compute_as(&experiment.trainer);
    let resume = resume_point(run, "autoencoder", ranks)?;
    let position = resume.as_ref().map_or(0, |found| found.progress.position);
    SettingsChanges::since(resume.as_ref(), experiment)?.check(run, change_settings, ranks)?;
    let task = AutoencoderTask::new(experiment, device, position, ranks)?;
    Trainer::new(task, run, &experiment.trainer, &experiment.optimizer, experiment, ranks, resume)?.train()
}

/// Trains a denoiser, or goes on with it. A new run first gets a copy of the autoencoder and of the text encoder that it works
/// with.
///
/// # Errors
/// As [`train_autoencoder`].
pub fn train_diffusion(
    experiment: &DiffusionExperiment,
    run: &Path,
    change_settings: bool,
    ranks: &Ranks,
    device: Device,
) -> Result<Progress> {
    let _lock = if ranks.is_first() { Some(RunLock::take(run)?) } else { None };
    compute_as(&experiment.trainer);
    let experiment = &with_classes(experiment)?;
    let resume = resume_point(run, experiment.task(), ranks)?;
    let position = resume.as_ref().map_or(0, |found| found.progress.position);
    SettingsChanges::since(resume.as_ref(), experiment)?.check(run, change_settings, ranks)?;
    let text_file = run.join(TEXT_ENCODER_FILE);
    ranks.on_first(|| {
        match &experiment.autoencoder {
            DiffusionSpace::Latents(autoencoder) if run.join(AUTOENCODER_FILE).exists() => {
                warn_of_another_autoencoder(autoencoder, run);
            }
            DiffusionSpace::Latents(autoencoder) => carry_autoencoder(autoencoder, run)?,
            DiffusionSpace::Pixels => {}
        }
        if let Some(settings) = &experiment.superresolution {
            let base = run.join(BASE_FOLDER);
            if checkpoint::latest(&base)?.is_some() {
                warn_of_another_base(&settings.base, &base);
            } else {
                let model = models::open(&settings.base, Device::Cpu).context("superresolution.base")?;
                check_base(&*model, settings, experiment.labels.as_ref().and_then(|labels| labels.classes.as_ref()))?;
                carry_run(&settings.base, &base)?;
            }
        }
        match &experiment.text {
            Some(text) if !text_file.exists() => carry_text_encoder(&text.encoder, run),
            _ => Ok(()),
        }
    })?;
    let text = experiment.text.as_ref().map(|_| open_text_encoder(&text_file, device)).transpose()?;
    let space = space_of(experiment, run, device)?;
    let task = DiffusionTask::new(experiment, space, text, device, position, resume.is_none(), ranks)?;
    Trainer::new(task, run, &experiment.trainer, &experiment.optimizer, experiment, ranks, resume)?.train()
}

/// Trains a transformer over codes, or goes on with it. A new run first gets a copy of the autoencoder whose codes they are.
///
/// # Errors
/// As [`train_autoencoder`].
pub fn train_transformer(
    experiment: &TransformerExperiment,
    run: &Path,
    change_settings: bool,
    ranks: &Ranks,
    device: Device,
) -> Result<Progress> {
    let _lock = if ranks.is_first() { Some(RunLock::take(run)?) } else { None };
    compute_as(&experiment.trainer);
    let mut experiment = experiment.clone();
    if let Some(labels) = &mut experiment.labels {
        classes::complete(&mut labels.classes, experiment.latents.as_deref(), &experiment.data)?;
    }
    let experiment = &experiment;
    let resume = resume_point(run, "transformer", ranks)?;
    let position = resume.as_ref().map_or(0, |found| found.progress.position);
    SettingsChanges::since(resume.as_ref(), experiment)?.check(run, change_settings, ranks)?;
    let own = run.join(AUTOENCODER_FILE);
    ranks.on_first(|| match own.exists() {
        true => {
            warn_of_another_autoencoder(&experiment.autoencoder, run);
            Ok(())
        }
        false => carry_autoencoder(&experiment.autoencoder, run),
    })?;
    let task = TransformerTask::new(experiment, open_latent_space(&own, device)?, device, position, ranks)?;
    Trainer::new(task, run, &experiment.trainer, &experiment.optimizer, experiment, ranks, resume)?.train()
}
