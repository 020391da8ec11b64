//! `lvdm import`: released checkpoints → runs.

use std::path::PathBuf;

use anyhow::Result;

use super::parts_table;
use crate::{
    exchange::{self, ImportOptions, ImportedNetwork, LatteOptions, StableDiffusionOptions},
    run_files::NAMES_FILE,
};

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
    /// A Stable Diffusion 1.x or 2.x, to be made a text-to-video network
    ///
    /// From a folder of diffusers (unet/, vae/, text_encoder/, tokenizer/; safetensors or .bin, whole or in shards; also a
    /// hub's cache) or one original file, safetensors or of PyTorch, whatever its name ends in. Kernels gain a frame axis; temporal layers are new and start as the identity, so that
    /// each frame is what the image network makes. Anything missing or unknown is an error.
    StableDiffusion(StableDiffusion),
    /// A checkpoint of the released Latte, with Stable Diffusion's image autoencoder
    ///
    /// The transformer's settings come from the names and shapes in the file, whose pickle is read as data: nothing in it is
    /// executed. The moving average (`ema`) samples where the file has one. Anything missing or unknown is an error, and so
    /// are fixed embeddings that are not those of the formula.
    Latte(Latte),
    /// A LoRA of Stable Diffusion, merged into the weights of a run
    ///
    /// In the names of kohya-ss, PEFT or diffusers; of linear maps and convolutions, of the U-Net and the text encoder. A
    /// new run is made of the weights with which RUN samples, each changed one W + scale · α / rank · up · down; the run
    /// itself stays. Anything unknown is an error.
    Lora(Lora),
}

#[derive(Debug, clap::Args)]
struct Latte {
    /// PyTorch checkpoint of any age, `{"model": …, "ema": …}` or one state dict, or a safetensors file with the same names
    file: PathBuf,
    /// Run folder to make
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    options: LatteOptions,
}

impl Latte {
    fn run(self) -> Result<()> {
        let parts = exchange::import_latte(&self.file, &self.options, &self.out)?;
        super::say::text(parts_table(&parts));
        say!("a run of the diffusion at step 0: {}", self.out.display());
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
struct Lora {
    /// File (.safetensors, .bin, .pt), or folder of PEFT or diffusers
    path: PathBuf,
    /// Run, or one of its checkpoints, whose weights are changed: of `lvdm import stable-diffusion`, or trained from one
    #[arg(long, value_name = "RUN")]
    into: PathBuf,
    /// Run folder to make
    #[arg(long)]
    out: PathBuf,
    /// How much of the change is added
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,
}

impl Lora {
    fn run(self) -> Result<()> {
        let Lora { path, into, out, scale } = self;
        let [unet, text_encoder] = exchange::import_lora(&path, &into, scale, &out)?;
        say!("merged into {unet} maps of the U-Net and {text_encoder} of the text encoder");
        say!("a run of the diffusion at step 0: {}", out.display());
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
struct StableDiffusion {
    /// Folder, or file
    path: PathBuf,
    /// Run folder to make
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    options: StableDiffusionOptions,
}

impl StableDiffusion {
    fn run(self) -> Result<()> {
        let imported = exchange::import_stable_diffusion(&self.path, &self.options, &self.out)?;
        let parts: Vec<_> = imported.iter().map(|network| network.part.clone()).collect();
        super::say::text(parts_table(&parts));
        say!("{:22} {:>8} {:>8} {:>8}", "names", "loaded", "new", "unused");
        for ImportedNetwork { part, names } in &imported {
            let [loaded, new, unused] = [names.loaded.len(), names.new.len(), names.ignored.len()];
            say!("{:22} {loaded:>8} {new:>8} {unused:>8}", part.name);
        }
        say!("all names: {}", self.out.join(NAMES_FILE).display());
        say!("a run of the diffusion at step 0: {}", self.out.display());
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
struct Lvdm {
    /// PyTorch checkpoint of any age, or a safetensors file with the same names (`lvdm export` writes them)
    file: PathBuf,
    /// Run folder to make
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    options: ImportOptions,
}

impl Import {
    /// # Errors
    /// [`crate::experiment::UserError`] where something must be told; else what is wrong with the file.
    pub fn run(self) -> Result<()> {
        match self.from {
            From::Lvdm(lvdm) => lvdm.run(),
            From::StableDiffusion(stable_diffusion) => stable_diffusion.run(),
            From::Latte(latte) => latte.run(),
            From::Lora(lora) => lora.run(),
        }
    }
}

impl Lvdm {
    fn run(self) -> Result<()> {
        let Lvdm { file, out, options } = self;
        let imported = exchange::import(&file, &options, &out)?;
        super::say::text(parts_table(&imported.parts));
        if !imported.ignored.is_empty() {
            let groups: Vec<String> =
                imported.ignored.iter().map(|group| format!("{} ({})", group.name, group.count)).collect();
            say!("known and ignored: {}", groups.join(", "));
        }
        say!("a run of the {} at step {}: {}", imported.task, imported.step, out.display());
        Ok(())
    }
}
