//! `lvdm bench`: how long the parts take on this machine.

use std::path::PathBuf;

use anyhow::Result;

use super::file_or_override;
use crate::{
    bench::{ALL, BenchExperiment, bench},
    experiment::{Experiment, parse},
};

/// Time the networks, the loader and sampling on this machine
#[derive(Debug, clap::Args)]
pub struct Bench {
    /// What to time (experiments/bench/*.yaml); without a file, everything at sizes for a small machine
    file: Option<PathBuf>,
    /// key.path=value in place of what the file says
    overrides: Vec<String>,
    /// One JSON object a line instead of a table, first what is timed
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
