//! `lvdm bench`: how long the parts take on this machine.

use std::path::PathBuf;

use anyhow::Result;

use super::file_or_override;
use crate::{
    bench::{ALL, BenchExperiment, bench},
    experiment::{Experiment, parse},
};

/// Measure how fast networks, data loading and sampling are on this machine
#[derive(Debug, clap::Args)]
pub struct Bench {
    /// Experiment file that says what to time, such as experiments/bench/ucf101.yaml [default: every part, at sizes for a
    /// small machine]
    file: Option<PathBuf>,
    /// Settings in place of the file's, each as KEY=VALUE
    overrides: Vec<String>,
    /// Print JSON instead of a table: first the settings, then one object for each measurement, one on a line
    #[arg(long)]
    json: bool,
}

impl Bench {
    /// # Errors
    /// A file with mistakes, a device that is not there.
    pub fn run(self) -> Result<()> {
        let (file, overrides) = file_or_override(self.file, self.overrides);
        let experiment = match file {
            Some(path) => BenchExperiment::load(&path, &overrides)?,
            None => parse("bench", ALL, &overrides)?,
        };
        bench(&experiment, self.json, &|line| say!("{line}"))
    }
}
