//! Trains a denoiser, or goes on with it: `cargo run --release --example train -- EXPERIMENT.yaml RUN`
use std::{env, path::Path};

use anyhow::{Result, anyhow};
use lvdm::experiment::{DiffusionExperiment, Experiment};
use lvdm::{distributed::Ranks, torch::DeviceName, train::train_diffusion};

fn main() -> Result<()> {
    lvdm::init();
    let [_, file, run] =
        <[_; 3]>::try_from(env::args().collect::<Vec<_>>()).map_err(|_| anyhow!("EXPERIMENT.yaml RUN"))?;
    let experiment = DiffusionExperiment::load(Path::new(&file), &[])?;
    let device = experiment.trainer.device.parse::<DeviceName>()?.open()?;
    train_diffusion(&experiment, Path::new(&run), false, &Ranks::alone(), device).map(drop)
}
