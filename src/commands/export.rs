//! `lvdm export`: a run → files of other programs.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{out::check_ending, parts_table};
use crate::{exchange, experiment::UserError};

/// Write the networks of a run to files that other programs read
///
/// `lvdm export RUN --out FILE` writes one safetensors file with the parameter names of the released LVDM checkpoints:
/// the trained weights, their moving average, and the autoencoder. `lvdm import lvdm` reads the file back.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Export {
    /// Run folder, or a checkpoint in it
    #[arg(required = true)]
    run: Option<PathBuf>,
    /// File to write (.safetensors)
    #[arg(long, required = true)]
    out: Option<PathBuf>,
    #[command(subcommand)]
    to: Option<To>,
}

#[derive(Debug, clap::Subcommand)]
enum To {
    /// Write a text-to-video run's image networks as a folder that diffusers opens
    ///
    /// The folder is a StableDiffusionPipeline: U-Net, image autoencoder, text encoder, tokenizer and noise schedule. The
    /// layers over frames have no place in it and are left out, so it generates single pictures. `lvdm import
    /// stable-diffusion` reads the folder, too.
    StableDiffusion {
        /// Run folder, or a checkpoint in it
        run: PathBuf,
        /// Folder to create
        #[arg(long)]
        out: PathBuf,
    },
    /// Write the low-rank adapters that a run has trained, as a folder that PEFT reads
    ///
    /// The folder holds adapter_model.safetensors and adapter_config.json, with the layer names of diffusers. `lvdm import
    /// lora` reads the folder, too.
    Lora {
        /// Run folder of a training with `trained: {kind: adapters, …}`, or a checkpoint in it
        run: PathBuf,
        /// Folder to create
        #[arg(long)]
        out: PathBuf,
    },
}

impl Export {
    /// # Errors
    /// A folder that is not a run; a full disk.
    pub fn run(self) -> Result<()> {
        let there = |run: &Path| match run.exists() {
            true => Ok(()),
            false => Err(UserError(format!("there is no run {}", run.display()))),
        };
        let (parts, out) = match (self.to, self.run, self.out) {
            (Some(To::StableDiffusion { run, out }), ..) => {
                there(&run)?;
                (exchange::export_stable_diffusion(&run, &out)?, out)
            }
            (Some(To::Lora { run, out }), ..) => {
                there(&run)?;
                (exchange::export_lora(&run, &out)?, out)
            }
            (None, Some(run), Some(out)) => {
                there(&run)?;
                check_ending(&out, "safetensors")?;
                (exchange::export(&run, &out)?, out)
            }
            (None, ..) => return Err(UserError("export needs RUN and --out FILE".into()).into()),
        };
        super::say::text(parts_table(&parts));
        say!("{}", out.display());
        Ok(())
    }
}
