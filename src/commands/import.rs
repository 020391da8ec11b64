//! `lvdm import`: released checkpoints → runs.

use std::path::PathBuf;

use anyhow::Result;

use super::parts_table;
use crate::exchange::{self, Told};

/// Turn a released checkpoint into a run
#[derive(Debug, clap::Args)]
pub struct Import {
    #[command(subcommand)]
    from: From,
}

#[derive(Debug, clap::Subcommand)]
enum From {
    /// A checkpoint of the released LVDM: autoencoder, short video, prediction, interpolation, text to video
    ///
    /// Networks and their settings come from the names and shapes in the file, whose pickle is read as data:
    /// nothing in it is executed. What the file does not tell is asked for. Anything missing or unknown is an error.
    Lvdm(Lvdm),
}

#[derive(Debug, clap::Args)]
struct Lvdm {
    /// PyTorch checkpoint (.ckpt), or a safetensors file with the same names (`lvdm export` writes them)
    file: PathBuf,
    /// Run folder to make
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    told: Told,
}

impl Import {
    /// # Errors
    /// [`crate::experiment::Mistake`] where something must be told; else what is wrong with the file.
    pub fn run(self) -> Result<()> {
        let From::Lvdm(Lvdm { file, out, told }) = self.from;
        let imported = exchange::import(&file, &told, &out)?;
        print!("{}", parts_table(&imported.parts));
        if !imported.ignored.is_empty() {
            let groups: Vec<String> =
                imported.ignored.iter().map(|group| format!("{} ({})", group.name, group.count)).collect();
            println!("known and ignored: {}", groups.join(", "));
        }
        println!("a run of the {} at step {}: {}", imported.task, imported.step, out.display());
        Ok(())
    }
}
