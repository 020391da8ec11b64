//! What a run's folder holds besides its log: whose weights are averaged, the autoencoder and the text encoder that a diffusion
//! run carries, and the latent space they make.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tch::{Device, Tensor};

use crate::{
    atomic_file::write_atomically,
    checkpoint::{self, Checkpoint, Progress},
    codecs::{CodecConfig, LatentSpace, LongDecoding, Normalization},
    distributed::rank,
    experiment::{DiffusionExperiment, DiffusionSpace, Trained, TrainerConfig},
    nn::Adapter,
    run_files::{AUTOENCODER_FILE, BASE_FOLDER, TEXT_ENCODER_FILE},
    text::{TextEncoder, TextEncoderConfig},
};

/// The task that a checkpoint of a text encoder names.
pub const TEXT_ENCODER_TASK: &str = "text_encoder";

/// The run folder of a checkpoint file.
pub fn run_of(checkpoint: &Path) -> PathBuf {
    checkpoint.parent().and_then(Path::parent).unwrap_or(Path::new(".")).to_path_buf()
}

/// The checkpoint of which a run's weights are, or the file itself; none where the run has no checkpoint.
///
/// # Errors
/// A run that has gone.
pub fn weights_of(run: &Path) -> Result<Option<String>> {
    let file = if run.is_file() { Some(run.to_path_buf()) } else { checkpoint::list(run)?.pop() };
    Ok(file.map(|file| file.display().to_string()))
}

/// A network's last weights and, where there are any, its averaged ones, which are whole: what was not trained is as
/// in the last. Adapters are merged into both.
///
/// # Errors
/// An adapter that is not whole.
pub fn last_and_averaged(checkpoint: &Checkpoint) -> Result<[BTreeMap<String, Tensor>; 2]> {
    let (mut last, average) = (checkpoint.part("model"), checkpoint.part("ema"));
    let mut averaged = BTreeMap::new();
    if !average.is_empty() {
        averaged = checkpoint.part("model");
        averaged.extend(average);
    }
    if let Some(adapter) = adapter(checkpoint)? {
        adapter.merge(&mut last)?;
        adapter.merge(&mut averaged)?;
    }
    Ok([last, averaged])
}

/// The adapters that a checkpoint's training moves, if it does.
fn adapter(checkpoint: &Checkpoint) -> Result<Option<Adapter>> {
    let trained = checkpoint.experiment.get("trained").cloned().map(serde_json::from_value::<Trained>).transpose()?;
    Ok(trained.and_then(Trained::adapter))
}

/// The averaged weights where there are any, else the last ones; they are taken out of the checkpoint, and adapters are
/// merged.
///
/// # Errors
/// As [`last_and_averaged`].
pub fn weights(checkpoint: &mut Checkpoint) -> Result<BTreeMap<String, Tensor>> {
    let mut weights = checkpoint.take_part("model");
    weights.extend(checkpoint.take_part("ema"));
    if let Some(adapter) = adapter(checkpoint)? {
        adapter.merge(&mut weights)?;
    }
    Ok(weights)
}

/// The checkpoint that a path names: a file, what a run carries under this name, or the run's own.
fn open_part(path: &Path, carried: &str, task: &str) -> Result<(PathBuf, Checkpoint)> {
    let inside = path.join(carried);
    let (path, found) = checkpoint::open_averaged(if inside.is_file() { &inside } else { path })?;
    let found = found.expect(task, &path)?;
    Ok((path, found))
}

/// The text encoder that a run carries, or of its file.
///
/// # Errors
/// A folder that carries none; damaged or foreign weights; no tokenizer.
pub fn open_text_encoder(run: &Path, device: Device) -> Result<TextEncoder> {
    let (path, mut found) = open_part(run, TEXT_ENCODER_FILE, TEXT_ENCODER_TASK)?;
    let config: TextEncoderConfig = serde_json::from_value(found.experiment.clone())
        .with_context(|| format!("the settings stored in {}", path.display()))?;
    TextEncoder::new(&config, found.take_part("model"), device).with_context(|| path.display().to_string())
}

/// Copies a text encoder into a diffusion run.
///
/// # Errors
/// A folder that carries none; a full disk.
pub fn carry_text_encoder(from: &Path, run: &Path) -> Result<()> {
    let (_, found) = open_part(from, TEXT_ENCODER_FILE, TEXT_ENCODER_TASK)?;
    found.write(&run.join(TEXT_ENCODER_FILE))
}

/// The space of an experiment's run: pixels, or the latents of the autoencoder that the run carries.
///
/// # Errors
/// As [`open_latent_space`].
pub fn space_of(experiment: &DiffusionExperiment, run: &Path, device: Device) -> Result<LatentSpace> {
    match &experiment.autoencoder {
        DiffusionSpace::Pixels => Ok(LatentSpace::pixels(device)),
        DiffusionSpace::Latents(_) => open_latent_space(&run.join(AUTOENCODER_FILE), device),
    }
}

/// The latent space of an autoencoder run (or checkpoint file), or of a run that carries an autoencoder.
///
/// # Errors
/// A folder that is not such a run; damaged or foreign weights.
pub fn open_latent_space(run: &Path, device: Device) -> Result<LatentSpace> {
    let (path, mut found) = open_part(run, AUTOENCODER_FILE, "autoencoder")?;
    latent_space(&mut found, device).with_context(|| path.display().to_string())
}

/// As [`open_latent_space`], for latents on which another training builds: of an autoencoder whose training has not
/// come to its end it warns.
///
/// # Errors
/// As [`open_latent_space`].
pub fn latent_space_to_build_on(run: &Path, device: Device) -> Result<LatentSpace> {
    let (path, mut found) = open_part(run, AUTOENCODER_FILE, "autoencoder")?;
    warn_if_unfinished("autoencoder", run, &found);
    latent_space(&mut found, device).with_context(|| path.display().to_string())
}

/// The latent space of a checkpoint, out of which its weights are taken.
///
/// # Errors
/// Damaged settings; weights of another architecture.
pub fn latent_space(checkpoint: &mut Checkpoint, device: Device) -> Result<LatentSpace> {
    let codec = CodecConfig::stored(checkpoint.experiment["autoencoder"].clone()).context("the stored autoencoder")?;
    let measured = checkpoint.part("latent");
    let value = |name: &str| {
        measured.get(name).map(|t| t.double_value(&[])).with_context(|| format!("there is no `latent.{name}`"))
    };
    let normalization = Normalization { scale: value("scale")?, shift: value("shift")? };
    let clip = match codec.long_decoding() {
        LongDecoding::FrameByFrame { at_once } => at_once,
        LongDecoding::Overlapping { .. } => {
            let frames = checkpoint.experiment["data"]["frames"].as_i64().context("the stored data")?;
            codec.latent_frames(frames).with_context(|| format!("no latent is of clips of {frames} frames"))?
        }
    };
    LatentSpace::new(&*codec, weights(checkpoint)?, normalization, clip, device)
}

/// Copies what sampling needs of an autoencoder into a diffusion run. Of one whose training has not come to its end it
/// warns.
///
/// # Errors
/// A folder that is not an autoencoder run; a full disk.
pub fn carry_autoencoder(autoencoder: &Path, run: &Path) -> Result<()> {
    let carried = carried(autoencoder)?;
    warn_if_unfinished("autoencoder", autoencoder, &carried);
    carried.write(&run.join(AUTOENCODER_FILE))
}

/// Copies into a folder what a run samples with: its averaged weights, and what it carries itself. The weights come last, so
/// that a folder that has them is whole.
///
/// # Errors
/// A folder that is no run; a full disk.
pub fn carry_run(from: &Path, to: &Path) -> Result<()> {
    let (path, found) = checkpoint::open_averaged(from)?;
    warn_if_unfinished("superresolution.base", from, &found);
    let folder = if from.is_dir() { from.to_path_buf() } else { run_of(&path) };
    for name in [AUTOENCODER_FILE, TEXT_ENCODER_FILE] {
        let carried = folder.join(name);
        if carried.is_file() {
            let bytes = fs::read(&carried).with_context(|| format!("cannot read {}", carried.display()))?;
            write_atomically(&to.join(name), |file| Ok(file.write_all(&bytes)?))?;
        }
    }
    if folder.join(BASE_FOLDER).is_dir() {
        carry_run(&folder.join(BASE_FOLDER), &to.join(BASE_FOLDER))?;
    }
    found.write(&checkpoint::path(to, found.progress.step))
}

/// Warns where the run that a cascade carries a copy of has been trained on since, or is another: the copy stays.
pub fn warn_of_another_base(from: &Path, carried: &Path) {
    let progress = |run: &Path| checkpoint::open_head(run).map(|(_, head)| head.progress);
    match (progress(carried), progress(from)) {
        (Ok(own), Ok(now)) if own != now => tracing::warn!(
            "{} now stands at step {}, and {} keeps the copy of it (step {}) with which it began; for a cascade of the new one \
             give another --run, or delete {}",
            from.display(),
            now.step,
            carried.parent().unwrap_or(carried).display(),
            own.step,
            carried.display()
        ),
        (Ok(_), Ok(_)) => {}
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!("cannot compare {} with {}: {error:#}", carried.display(), from.display());
        }
    }
}

/// Warns where a run carries another autoencoder than the one that now lies where it came from: the run keeps its own.
pub fn warn_of_another_autoencoder(autoencoder: &Path, run: &Path) {
    let own = run.join(AUTOENCODER_FILE);
    match (carried(&own), carried(autoencoder)) {
        (Ok(own), Ok(now)) if own.tensors != now.tensors => tracing::warn!(
            "{} now holds another autoencoder (step {}) than the one that {} began with (step {}), and which it keeps; \
             to train on the new one give another --run, or delete this one",
            autoencoder.display(),
            now.progress.step,
            run.display(),
            own.progress.step
        ),
        (Ok(_), Ok(_)) => {}
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!("cannot compare {} with {}: {error:#}", own.display(), autoencoder.display());
        }
    }
}

/// What sampling needs of an autoencoder: its averaged weights and the measured scale and shift.
fn carried(autoencoder: &Path) -> Result<Checkpoint> {
    let (_, mut found) = open_part(autoencoder, AUTOENCODER_FILE, "autoencoder")?;
    let weights = weights(&mut found)?;
    found.tensors.retain(|name, _| name.starts_with("latent."));
    found.tensors.extend(weights.into_iter().map(|(name, tensor)| (format!("model.{name}"), tensor)));
    Ok(found)
}

/// Warns of a run that another training builds on, and whose own has not come to its end. Of several ranks one does.
pub fn warn_if_unfinished(key: &str, run: &Path, found: &Checkpoint) {
    let Progress { step, seconds, .. } = found.progress;
    let trainer = found.experiment.get("trainer").cloned().and_then(|trainer| serde_json::from_value(trainer).ok());
    let Some(trainer): Option<TrainerConfig> = trainer else { return };
    // an import has spent no time here, and its experiment leaves room to go on
    if seconds > 0.0 && !trainer.has_ended(step, seconds) && rank().is_none_or(|rank| rank == 0) {
        let minutes = trainer.minutes.map_or(String::new(), |minutes| format!(" (or {minutes} minutes)"));
        tracing::warn!(
            "{key}: the training of {} was left at step {step} of {}{minutes}; what is trained now is built on that",
            run.display(),
            trainer.steps
        );
    }
}
