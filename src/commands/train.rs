//! `lvdm train`: an experiment file → a run folder.

use std::{
    io::Write,
    path::{Component, Path, PathBuf},
};

use anyhow::Result;
use tch::Device;

use crate::{
    checkpoint::Progress,
    distributed::{self, Backend, Launch, OnSignal, Ranks, Stopped, catch_signals},
    experiment::{AutoencoderExperiment, DiffusionExperiment, Experiment, TrainerConfig, TransformerExperiment},
    train::{train_autoencoder, train_diffusion, train_transformer},
};

/// Train an autoencoder, a diffusion model or a transformer over codes; with the folder of an earlier run, continue it
///
/// Ctrl-C (SIGINT), SIGTERM, SIGHUP and SIGUSR1 save a checkpoint and end the program. If the training has not reached
/// its last step, the exit status is 75, so that a script does not go on to what needs the finished run. The same command
/// continues the training. A second Ctrl-C, SIGTERM or SIGHUP ends the program at once.
#[derive(Debug, clap::Args)]
pub struct Train {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Train the video autoencoder, with L1, LPIPS and adversarial losses
    Autoencoder(Options),
    /// Train the denoising network, on the latents of an autoencoder or on pixels
    Diffusion(Options),
    /// Train the transformer over the codes of an autoencoder that has a codebook
    Transformer(Options),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Experiment file (YAML), such as experiments/demo/diffusion.yaml
    file: PathBuf,
    /// Run folder, for checkpoints, log and settings [default: runs/ and the path of FILE below experiments/, without .yaml]
    #[arg(long)]
    run: Option<PathBuf>,
    /// Settings in place of the file's, each as KEY=VALUE: trainer.steps=100 data.dataset.root=my/videos
    overrides: Vec<String>,
    /// Continue a run although the seed, the data, the objective, the noise schedule or a network is not the one it was
    /// trained with. The optimizer, the number of steps, batches and logging may change without this option
    #[arg(long)]
    change_settings: bool,
    /// Library that sums gradients over several GPUs. Gradients on CPUs are always summed by Gloo
    #[arg(long, value_enum, env = "LVDM_BACKEND", default_value_t)]
    backend: Backend,
    #[command(flatten)]
    launch: Launch,
}

impl Train {
    /// # Errors
    /// [`crate::experiment::UserError`] for what the user wrote; [`Stopped`] for a training that was left before its
    /// end; else what went wrong.
    pub fn run(self) -> Result<()> {
        let _catching = catch_signals(OnSignal::Leave)?;
        match self.what {
            What::Autoencoder(options) => {
                options.train(|read: &AutoencoderExperiment| &read.trainer, train_autoencoder)
            }
            What::Diffusion(options) => options.train(|read: &DiffusionExperiment| &read.trainer, train_diffusion),
            What::Transformer(options) => {
                options.train(|read: &TransformerExperiment| &read.trainer, train_transformer)
            }
        }
    }
}

impl Options {
    fn train<E: Experiment>(
        self,
        trainer: fn(&E) -> &TrainerConfig,
        train: fn(&E, &Path, bool, &Ranks, Device) -> Result<Progress>,
    ) -> Result<()> {
        let experiment: E = Experiment::load(&self.file, &self.overrides)?;
        let trainer = trainer(&experiment);
        let run = self.run.unwrap_or_else(|| run_folder(&self.file));
        let mut ended = true;
        distributed::run(&self.launch, trainer.device.parse()?, |ranks, device| {
            ranks.train_on(device, self.backend)?;
            let Progress { step, seconds, .. } = train(&experiment, &run, self.change_settings, ranks, device)?;
            // by rank 0's clock
            ended = ranks.of_first(i64::from(trainer.has_ended(step, seconds)))? > 0;
            if ranks.is_first() {
                tell(trainer, step, seconds, &run);
            }
            Ok(())
        })?;
        if ended { Ok(()) } else { Err(Stopped.into()) }
    }
}

/// One line on how a training went. All is on the disk: a terminal that is gone does not matter any more.
pub fn tell(trainer: &TrainerConfig, step: i64, seconds: f64, run: &Path) {
    let (steps, run) = (trainer.steps, run.display());
    let mut out = std::io::stdout();
    let _ = if trainer.has_ended(step, seconds) {
        writeln!(out, "trained to step {step} in {seconds:.0} s: {run}")
    } else {
        writeln!(out, "stopped and saved at step {step} of {steps}; the same command continues: {run}")
    };
}

/// `experiments/demo/diffusion.yaml` → `runs/demo/diffusion`
pub fn run_folder(file: &Path) -> PathBuf {
    let parts: Vec<Component> = file.components().collect();
    let start = parts.iter().rposition(|part| part.as_os_str() == "experiments").map_or(parts.len() - 1, |i| i + 1);
    parts[start..].iter().fold(PathBuf::from("runs"), |path, part| path.join(part)).with_extension("")
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
