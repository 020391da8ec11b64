//! `lvdm import`: released checkpoints → runs.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::parts_table;
use crate::{
    exchange::{
        self, ImportOptions, Imported, ImportedNetwork, LatteOptions, McvdOptions, StableDiffusionOptions, TatsOptions,
    },
    run_files::NAMES_FILE,
};

/// Turn a released checkpoint into a run folder, to sample from or train on
#[derive(Debug, clap::Args)]
pub struct Import {
    #[command(subcommand)]
    from: From,
}

#[derive(Debug, clap::Subcommand)]
enum From {
    /// Import a released LVDM checkpoint: autoencoder, short video, prediction, interpolation or text to video
    ///
    /// The kind of network and its settings are inferred from the names and shapes of the tensors. Settings that leave no
    /// trace there are given as options; the message names those that are needed. A tensor that is missing or unknown is
    /// an error. The pickle in a PyTorch file is read as data: nothing in it is executed.
    Lvdm(Released<ImportOptions>),
    /// Import Stable Diffusion 1.x or 2.x as a text-to-video network
    ///
    /// PATH is a folder in the layout of diffusers (unet/, vae/, text_encoder/, tokenizer/; safetensors or .bin, whole or in
    /// shards; a model hub's cache will do) or one original file, in safetensors or PyTorch format. Convolutions gain a
    /// frame axis, and temporal layers are added that start as the identity: before training, each frame of a video is what
    /// the image network generates. A tensor that is missing or unknown is an error.
    StableDiffusion(StableDiffusion),
    /// Import a released Latte checkpoint, with Stable Diffusion's image autoencoder
    ///
    /// The transformer's settings are inferred from the names and shapes of the tensors. If the file has a moving average of
    /// the weights (`ema`), this is what samples. A tensor that is missing or unknown is an error, and so are position
    /// embeddings that differ from the formula. The pickle in a PyTorch file is read as data: nothing in it is executed.
    Latte(Released<LatteOptions>),
    /// Import a released TATS checkpoint: the autoencoder with its codebook and discriminators, or a transformer
    ///
    /// A transformer's file becomes a run of the transformer, which carries the autoencoder. The settings are inferred from the
    /// names and shapes of the tensors, except for the downsampling factors, the heads and the stride of sparse frames. A
    /// tensor that is missing or unknown is an error. The pickle in a PyTorch file is read as data: nothing in it is executed.
    Tats(Released<TatsOptions>),
    /// Import a released MCVD checkpoint, which works on pixels
    ///
    /// The network's settings and its schedule are inferred from the names, shapes and buffers. The file is a list of the
    /// weights, the optimizer and the moving average, which is what samples; the optimizer is left out. A tensor that is missing
    /// or unknown is an error. The pickle in a PyTorch file is read as data: nothing in it is executed.
    Mcvd(Released<McvdOptions>),
    /// Merge a LoRA of Stable Diffusion into the weights of a run
    ///
    /// The LoRA may have the names of kohya-ss, PEFT or diffusers, and change linear maps and convolutions of the U-Net and
    /// the text encoder. The new run has the weights with which RUN samples; each changed one is W + scale · α / rank · up ·
    /// down. RUN itself does not change. A tensor that is unknown is an error.
    Lora(Lora),
}

#[derive(Debug, clap::Args)]
struct Released<O: clap::Args> {
    /// Checkpoint: a PyTorch file of any version as the training saved it, one state dict, or safetensors with the same names
    file: PathBuf,
    /// Run folder to create
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    options: O,
}

impl<O: clap::Args> Released<O> {
    fn run(self, import: impl Fn(&Path, &O, &Path) -> Result<Imported>) -> Result<()> {
        let imported = import(&self.file, &self.options, &self.out)?;
        super::say::text(parts_table(&imported.parts));
        if !imported.ignored.is_empty() {
            let groups: Vec<String> =
                imported.ignored.iter().map(|group| format!("{} ({})", group.name, group.count)).collect();
            say!("known and ignored: {}", groups.join(", "));
        }
        say!("a run of the {} at step {}: {}", imported.task, imported.step, self.out.display());
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
struct Lora {
    /// The LoRA: a file (.safetensors, .bin or .pt), or a folder that PEFT or diffusers wrote
    path: PathBuf,
    /// Run folder, or a checkpoint in it, of `lvdm import stable-diffusion` or of a training that started from one
    #[arg(long, value_name = "RUN")]
    into: PathBuf,
    /// Run folder to create
    #[arg(long)]
    out: PathBuf,
    /// Factor by which the LoRA's change of the weights is multiplied
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
    /// Folder in the layout of diffusers, or one original file
    path: PathBuf,
    /// Run folder to create
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

impl Import {
    /// # Errors
    /// [`crate::experiment::UserError`] where something must be told; else what is wrong with the file.
    pub fn run(self) -> Result<()> {
        match self.from {
            From::Lvdm(released) => released.run(exchange::import),
            From::StableDiffusion(stable_diffusion) => stable_diffusion.run(),
            From::Latte(released) => released.run(exchange::import_latte),
            From::Tats(released) => released.run(exchange::import_tats),
            From::Mcvd(released) => released.run(exchange::import_mcvd),
            From::Lora(lora) => lora.run(),
        }
    }
}
