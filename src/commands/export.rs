//! `lvdm export`: a run → files of other programs.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{out::check_ending, parts_table};
use crate::{exchange, experiment::UserError};

/// Write a run's networks for other programs
///
/// `lvdm export RUN --out FILE` writes them under the released names, as safetensors: raw weights, averaged weights and
/// the autoencoder, with the prefixes of released checkpoints; tensors that those list under two names are written
/// twice. `lvdm import lvdm` reads the file back.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Export {
    /// Run folder, or one of its checkpoints
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
    /// A folder that diffusers opens: the image networks of a text-to-video run, as they are now
    ///
    /// U-Net, image autoencoder, text encoder, tokenizer and schedule, as a StableDiffusionPipeline. Layers over frames
    /// have no place there and are left out, so that it makes single pictures. `lvdm import stable-diffusion` reads the
    /// folder too.
    StableDiffusion {
        /// Run folder, or one of its checkpoints
        run: PathBuf,
        /// Folder to make
        #[arg(long)]
        out: PathBuf,
    },
    /// The adapters that a run has trained, on their own: a folder of PEFT
    ///
    /// adapter_model.safetensors and adapter_config.json, with the places spelled as in diffusers. `lvdm import lora`
    /// reads the folder too.
    Lora {
        /// Run folder of a training with `trained: {kind: adapters, …}`, or one of its checkpoints
        run: PathBuf,
        /// Folder to make
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
