//! `lvdm export`: a run → a file with the released names.

use std::path::PathBuf;

use anyhow::Result;

use super::{out::check_ending, parts_table};
use crate::{exchange, experiment::Mistake};

/// Write a run's networks under the released names, as safetensors
///
/// Raw weights, averaged weights and the autoencoder, with the prefixes of released checkpoints; tensors that
/// those list under two names are written twice. `lvdm import lvdm` reads the file back.
#[derive(Debug, clap::Args)]
pub struct Export {
    /// Run folder, or one of its checkpoints
    run: PathBuf,
    /// File to write (.safetensors)
    #[arg(long)]
    out: PathBuf,
}

impl Export {
    /// # Errors
    /// A folder that is not a run; a full disk.
    pub fn run(self) -> Result<()> {
        if !self.run.exists() {
            return Err(Mistake(format!("there is no run {}", self.run.display())).into());
        }
        check_ending(&self.out, "safetensors")?;
        super::say::text(parts_table(&exchange::export(&self.run, &self.out)?));
        say!("{}", self.out.display());
        Ok(())
    }
}
