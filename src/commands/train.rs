//! `lvdm train`: an experiment file → a run folder.

use std::path::{Component, Path, PathBuf};

use anyhow::Result;
use tch::Device;

use crate::{
    checkpoint::Progress,
    experiment::{AutoencoderExperiment, DiffusionExperiment, Experiment},
    generate::{
        AUTOENCODER_FILE, TEXT_ENCODER_FILE, carry_autoencoder, carry_text_encoder, open_latent_space,
        open_text_encoder,
    },
    torch::DeviceName,
    train::{AutoencoderTask, DiffusionTask, Trainer, resume_point},
};

/// Train a network; on a run folder that is there already, go on
#[derive(Debug, clap::Args)]
pub struct Train {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// The video autoencoder, with LPIPS and GAN losses
    Autoencoder(Options),
    /// The denoiser in an autoencoder's latent space
    Diffusion(Options),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Experiment file (YAML)
    file: PathBuf,
    /// Run folder (default: runs/ and the experiment's own path)
    #[arg(long)]
    run: Option<PathBuf>,
    /// Replaced settings, key.path=value
    overrides: Vec<String>,
}

impl Train {
    /// # Errors
    /// [`crate::experiment::Mistake`] for what the user wrote; else what went wrong.
    pub fn run(self) -> Result<()> {
        let (progress, run) = match self.what {
            What::Autoencoder(options) => {
                let run = options.run.unwrap_or_else(|| run_folder(&options.file));
                (autoencoder(&Experiment::load(&options.file, &options.overrides)?, &run)?, run)
            }
            What::Diffusion(options) => {
                let run = options.run.unwrap_or_else(|| run_folder(&options.file));
                (diffusion(&Experiment::load(&options.file, &options.overrides)?, &run)?, run)
            }
        };
        println!("trained to step {} in {:.0} s: {}", progress.step, progress.seconds, run.display());
        Ok(())
    }
}

/// `experiments/demo/diffusion.yaml` → `runs/demo/diffusion`
pub fn run_folder(file: &Path) -> PathBuf {
    let parts: Vec<Component> = file.components().collect();
    let start = parts.iter().rposition(|part| part.as_os_str() == "experiments").map_or(parts.len() - 1, |i| i + 1);
    parts[start..].iter().fold(PathBuf::from("runs"), |path, part| path.join(part)).with_extension("")
}

fn device(name: &str) -> Result<Device> {
    name.parse::<DeviceName>()?.open()
}

/// Trains an autoencoder, or goes on with it.
///
/// # Errors
/// Data or weights that are not there, a run of another architecture, a full disk.
pub fn autoencoder(experiment: &AutoencoderExperiment, run: &Path) -> Result<Progress> {
    let device = device(&experiment.trainer.device)?;
    let resume = resume_point(run, "autoencoder")?;
    let position = resume.as_ref().map_or(0, |found| found.progress.position);
    let task = AutoencoderTask::new(experiment, device, position)?;
    Trainer::new(task, run, &experiment.trainer, &experiment.optimizer, experiment, device, resume)?.train()
}

/// Trains a denoiser, or goes on with it.
///
/// # Errors
/// As [`autoencoder`].
pub fn diffusion(experiment: &DiffusionExperiment, run: &Path) -> Result<Progress> {
    let device = device(&experiment.trainer.device)?;
    let resume = resume_point(run, "diffusion")?;
    let position = resume.as_ref().map_or(0, |found| found.progress.position);
    let own = run.join(AUTOENCODER_FILE);
    if !own.exists() {
        carry_autoencoder(&experiment.autoencoder, run)?;
    }
    let text = match &experiment.text {
        None => None,
        Some(text) => {
            let own = run.join(TEXT_ENCODER_FILE);
            if !own.exists() {
                carry_text_encoder(&text.encoder, run)?;
            }
            Some(open_text_encoder(&own, device)?)
        }
    };
    let space = open_latent_space(&own, device)?;
    let task = DiffusionTask::new(experiment, space, text, device, position, resume.is_none())?;
    Trainer::new(task, run, &experiment.trainer, &experiment.optimizer, experiment, device, resume)?.train()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_lies_where_its_experiment_does() {
        assert_eq!(run_folder(Path::new("experiments/demo/diffusion.yaml")), Path::new("runs/demo/diffusion"));
        assert_eq!(run_folder(Path::new("/a/experiments/x.yaml")), Path::new("runs/x"));
        assert_eq!(run_folder(Path::new("/tmp/some.yaml")), Path::new("runs/some"));
    }
}
