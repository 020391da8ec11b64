//! Networks that come from elsewhere than the rest of a Stable Diffusion: `--unet`, `--vae`, `--text-encoder`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{mistake, part_weights};
use crate::{
    file_format::read_json,
    weights::{
        TensorShapes, WeightsFile, WeightsKind, is_second,
        lvdm_checkpoint::Tensors,
        open_clip,
        stable_diffusion::{Network, split},
    },
};

/// Where the networks come from that are not the base's.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Replacements {
    /// Take the U-Net from here instead of from PATH: a file, or a folder of diffusers
    #[arg(long, value_name = "PATH")]
    pub unet: Option<PathBuf>,
    /// Take the image autoencoder from here instead of from PATH, which then needs none: a file, or a folder of diffusers
    #[arg(long, value_name = "PATH")]
    pub vae: Option<PathBuf>,
    /// Take the text encoder from here instead of from PATH, which then needs none: a file, or a folder of diffusers
    #[arg(long, value_name = "PATH")]
    pub text_encoder: Option<PathBuf>,
}

/// A network with what its configuration file says, where there is one.
pub(super) struct Replacement {
    pub config: Option<Value>,
    /// Of a U-Net in a folder of diffusers: the file beside it that says what it was trained on.
    pub scheduler: Option<PathBuf>,
    /// Whether it is of a Stable Diffusion 2.x.
    pub is_second: bool,
    pub tensors: Tensors,
}

impl Replacement {
    /// The network that an option names: a file of it alone or of a whole Stable Diffusion, a folder of diffusers of it alone
    /// or of a whole one. In `variant` of the weights where a folder has it.
    ///
    /// # Errors
    /// [`crate::experiment::UserError`]: nothing there; else what it is, where it is something else.
    pub fn read(option: &str, path: &Path, network: Network, variant: Option<&str>) -> Result<Self> {
        if !path.exists() {
            return mistake(format!("{option}: there is no {}", path.display()));
        }
        let (part, name) = match network {
            Network::UNet { .. } => ("unet", "U-Net"),
            Network::Autoencoder { .. } => ("vae", "image autoencoder"),
            Network::TextEncoder => ("text_encoder", "text encoder"),
        };
        use {Network as N, WeightsKind as K};
        let fits = |kind: &K| match network {
            _ if matches!(kind, K::StableDiffusion1(_) | K::StableDiffusion2(_) | K::Unknown) => true,
            N::UNet { .. } => matches!(kind, K::UNet(_)),
            N::Autoencoder { .. } => matches!(kind, K::Autoencoder(_)),
            N::TextEncoder => *kind == K::TextEncoder,
        };
        let folder =
            [path.join(part), path.to_path_buf()].into_iter().find(|folder| folder.join("config.json").is_file());
        let context = || format!("{option} {}", path.display());
        let scheduler = |folder: &Path| {
            let beside = match folder.file_name() {
                Some(_) => folder.with_file_name("scheduler"),
                None => folder.join("../scheduler"),
            };
            let file = beside.join("scheduler_config.json");
            (part == "unet" && file.is_file()).then_some(file)
        };
        if let Some(folder) = folder {
            let kind = WeightsKind::of_folder(&folder)?;
            ensure!(fits(&kind), "{option}: {} is {kind}, not the {name} of a Stable Diffusion", folder.display());
            let tensors = part_weights::read(&folder, variant).with_context(context)?;
            return Ok(Replacement {
                config: Some(read_json(&folder.join("config.json"))?),
                scheduler: scheduler(&folder),
                is_second: is_second(&shapes_of(&tensors)),
                tensors,
            });
        }
        if path.is_dir() {
            return mistake(format!("{option}: {} holds neither config.json nor {part}/config.json", path.display()));
        }
        let file = WeightsFile::open(path).with_context(context)?;
        let kind = WeightsKind::of_shapes(file.shapes());
        ensure!(fits(&kind), "{option}: {} is {kind}, not the {name} of a Stable Diffusion", path.display());
        let beside = path.with_file_name("config.json");
        let config = beside.is_file().then(|| read_json(&beside)).transpose()?;
        let scheduler = config.as_ref().and_then(|_| scheduler(&path.with_file_name("")));
        let mut tensors = file.read().with_context(context)?;
        if network == Network::TextEncoder {
            tensors = open_clip::in_place(tensors);
        }
        let is_second = is_second(&shapes_of(&tensors));
        if network == Network::TextEncoder && open_clip::is_open_clip(&tensors) {
            let [_, _, text] = split(tensors);
            tensors = open_clip::as_clip(text).with_context(context)?;
        }
        Ok(Replacement { config, scheduler, is_second, tensors })
    }

    /// The tensors under our names, where the file has the original ones.
    pub fn under_our_names(&self, network: Network) -> Tensors {
        let own = network.own(&self.tensors);
        if !own.is_empty() {
            return own;
        }
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }
}

fn shapes_of(tensors: &Tensors) -> TensorShapes {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect()
}
