//! Stable Diffusion's weights → our names.
//!
//! Our names are those of the original checkpoints without the network's prefix; the text encoder's are those of
//! transformers. diffusers has names of its own. For every parameter of ours this file says under which names a
//! file may carry it; what no image model has (temporal layers) keeps its start.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use anyhow::{Context, Result, bail};
use tch::Tensor;

use super::{
    clip_names::{TEXT_ENCODER, is_unused_of_clip},
    lvdm_checkpoint::{AVERAGED_UNET, averaged_name},
};
use crate::nn::Parameters;

/// A network of Stable Diffusion, with what its names in diffusers depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// The denoiser, of which ours is the inflated one.
    UNet {
        /// Residual blocks a level.
        blocks_per_level: usize,
    },
    /// The image autoencoder.
    Autoencoder {
        /// Resolutions of the encoder.
        levels: usize,
    },
    /// CLIP's text encoder.
    TextEncoder,
}

/// What an import did with the names of both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// Our parameters that were loaded, each with its name in the file.
    pub loaded: Vec<(String, String)>,
    /// Our parameters that image models do not have: they kept their start.
    pub new: Vec<String>,
    /// The file's tensors that were left, known to be of no use to this network.
    pub ignored: Vec<String>,
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Import { loaded, new, ignored } = self;
        write!(f, "{} loaded, {} new, {} ignored", loaded.len(), new.len(), ignored.len())
    }
}

/// Where the networks stand in an original checkpoint, which holds all three.
const UNET: &str = "model.diffusion_model.";
const AUTOENCODER: &str = "first_stage_model.";

/// Beginnings of names that files carry besides the networks: averages and losses.
const IGNORED_PREFIXES: [&str; 3] = ["model_ema.", "loss.", "first_stage_model.loss."];

/// Whole names of the kind: the schedule's buffers and lone numbers.
const IGNORED: [&str; 15] = [
    "logvar",
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "scale_factor",
];

impl Network {
    /// Where the network stands in an original checkpoint.
    fn place(self) -> &'static str {
        match self {
            Network::UNet { .. } => UNET,
            Network::Autoencoder { .. } => AUTOENCODER,
            Network::TextEncoder => TEXT_ENCODER,
        }
    }

    /// How our names begin there, and in files of transformers 4.
    fn prefixes(self) -> &'static [&'static str] {
        match self {
            Network::UNet { .. } => &[UNET],
            Network::Autoencoder { .. } => &[AUTOENCODER],
            Network::TextEncoder => {
                &["cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model."]
            }
        }
    }

    /// The network's own tensors of an original checkpoint, under our names.
    pub fn own(self, tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
        let strip = |name: &str| self.prefixes().iter().find_map(|prefix| Some(name.strip_prefix(prefix)?.to_string()));
        tensors.iter().filter_map(|(name, tensor)| Some((strip(name)?, tensor.shallow_clone()))).collect()
    }

    /// What diffusers (for the text encoder, transformers 5) calls one of our parameters;
    /// none if the image model does not have it.
    pub fn diffusers_name(self, name: &str) -> Option<String> {
        if is_temporal(name) { None } else { self.spelled(name) }
    }

    /// As [`Self::diffusers_name`], of a module (`….attn1.to_q`); layers over frames are spelled as if diffusers had them.
    pub fn module_in_diffusers(self, place: &str) -> Option<String> {
        Some(self.spelled(&format!("{place}.weight"))?.strip_suffix(".weight")?.to_string())
    }

    fn spelled(self, name: &str) -> Option<String> {
        match self {
            Network::UNet { blocks_per_level } => unet_name(name, blocks_per_level),
            Network::Autoencoder { levels } => autoencoder_name(name, levels),
            Network::TextEncoder => Some(name.to_string()),
        }
    }

    /// The names under which a file may carry one of our parameters; none for a temporal layer's.
    fn sources(self, name: &str) -> Vec<String> {
        if is_temporal(name) {
            return Vec::new();
        }
        let mut names: Vec<String> = self.prefixes().iter().map(|prefix| format!("{prefix}{name}")).collect();
        let diffusers = self.diffusers_name(name);
        names.extend(diffusers.as_deref().and_then(old_attention_name));
        names.extend(diffusers);
        names.push(name.to_string());
        names
    }

    /// Whether a tensor of a file is known to be of no use to this network.
    fn ignores(self, name: &str) -> bool {
        let others = [UNET, AUTOENCODER, TEXT_ENCODER].into_iter().filter(|place| *place != self.place());
        let leaf = name.rsplit('.').next().unwrap_or(name);
        // a buffer of the text encoder stands behind its path, those of the schedule at the top
        let buffer = IGNORED.contains(&name) || leaf == "position_ids";
        let of_clip = self == Network::TextEncoder && is_unused_of_clip(name);
        buffer || of_clip || others.chain(IGNORED_PREFIXES).any(|prefix| name.starts_with(prefix))
    }

    /// The image model's share of our parameters, with diffusers' names and shapes (those of Stable Diffusion 1.x).
    pub fn in_diffusers(self, parameters: &Parameters) -> BTreeMap<String, Tensor> {
        let entries = parameters.named().into_iter();
        entries
            .filter_map(|(name, tensor)| Some((self.diffusers_name(&name)?, self.deflated(&name, &tensor))))
            .collect()
    }

    /// Without the axes that [`inflated`] adds.
    fn deflated(self, name: &str, tensor: &Tensor) -> Tensor {
        match (self, tensor.dim()) {
            (Network::UNet { .. }, 5) => tensor.squeeze_dim(2),
            (Network::Autoencoder { .. }, 4) if name.contains(".attn_1.") => tensor.flatten(1, -1),
            _ => tensor.shallow_clone(),
        }
    }

    /// Loads a network from the tensors of a file: diffusers', an original checkpoint's (whole, or this network's
    /// alone), or what [`Self::in_diffusers`] gives. Kernels of images gain an axis of one frame.
    ///
    /// # Errors
    /// Names what is missing, what has another shape and what nobody knows; then nothing is loaded.
    pub fn import(self, tensors: &BTreeMap<String, Tensor>, parameters: &Parameters) -> Result<Import> {
        let shared = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        self.import_all(shared, parameters)
    }

    /// As [`Self::import`], of tensors that nobody else holds: into a set that is unfilled they go one by one, and are held
    /// once.
    ///
    /// # Errors
    /// As [`Self::import`].
    pub fn import_all(self, tensors: BTreeMap<String, Tensor>, parameters: &Parameters) -> Result<Import> {
        let mut import = Import { loaded: Vec::new(), new: Vec::new(), ignored: Vec::new() };
        let mut values = BTreeMap::new();
        let mut wrong = Vec::new();
        for (name, own) in parameters.named() {
            let sources = self.sources(&name);
            if sources.is_empty() {
                values.extend(parameters.value(&name).map(|value| (name.clone(), value)));
                import.new.push(name);
                continue;
            }
            let Some((source, tensor)) = sources.iter().find_map(|source| tensors.get_key_value(source)) else {
                wrong.push(format!("`{name}` is missing (sought as {})", sources.join(", ")));
                continue;
            };
            match inflated(tensor, &own.size()) {
                Some(value) => values.insert(name.clone(), value),
                None => {
                    let (found, needed) = (tensor.size(), own.size());
                    wrong.push(format!("`{source}` has shape {found:?}, `{name}` needs {needed:?}"));
                    None
                }
            };
            import.loaded.push((name, source.clone()));
        }
        let used: BTreeSet<&String> = import.loaded.iter().map(|(_, source)| source).collect();
        for name in tensors.keys().filter(|name| !used.contains(name)) {
            if self.ignores(name) {
                import.ignored.push(name.clone());
            } else {
                wrong.push(format!("`{name}` is unknown"));
            }
        }
        if !wrong.is_empty() {
            let more = if wrong.len() > 3 { format!("; and {} more", wrong.len() - 3) } else { String::new() };
            wrong.truncate(3);
            bail!("these weights are not this network's: {}{more}", wrong.join("; "));
        }
        drop(tensors);
        parameters.fill(values)?;
        Ok(import)
    }
}

/// An original checkpoint's tensors: those of the denoiser with all that belongs to no network, of the image
/// autoencoder, of the text encoder.
pub fn split(tensors: BTreeMap<String, Tensor>) -> [BTreeMap<String, Tensor>; 3] {
    let mut parts = [BTreeMap::new(), BTreeMap::new(), BTreeMap::new()];
    for (name, tensor) in tensors {
        let place = [AUTOENCODER, TEXT_ENCODER].into_iter().position(|prefix| name.starts_with(prefix));
        parts[place.map_or(0, |place| place + 1)].insert(name, tensor);
    }
    parts
}

/// The tensors of a U-Net alone where an original checkpoint has them, which a file may hold without their prefix.
pub fn unet_in_place(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    if tensors.keys().any(|name| name.starts_with(UNET)) {
        return tensors;
    }
    tensors.into_iter().map(|(name, tensor)| (format!("{UNET}{name}"), tensor)).collect()
}

/// Whether there are averaged weights of the denoiser beside the raw ones.
pub fn has_average(unet: &BTreeMap<String, Tensor>) -> bool {
    unet.keys().any(|name| name.starts_with("model_ema.diffusion_model"))
}

/// Puts the averaged weights in the place of the denoiser's raw ones; how many there were.
///
/// # Errors
/// Some have no average.
pub fn take_average(unet: &mut BTreeMap<String, Tensor>) -> Result<usize> {
    if !has_average(unet) {
        return Ok(0);
    }
    let names: Vec<String> = unet.keys().filter_map(|name| Some(name.strip_prefix(UNET)?.to_string())).collect();
    for name in &names {
        let stored = averaged_name(AVERAGED_UNET, name);
        let average = unet.remove(&stored).with_context(|| format!("the averaged weight `{stored}` is missing"))?;
        unet.insert(format!("{UNET}{name}"), average);
    }
    Ok(names.len())
}

/// `[o, i, …]` → `[o, i, 1…, …]`, as many unit axes as the shape needs: kernels of images become kernels of
/// one frame, linear maps become kernels of one position. None if that does not give the shape.
fn inflated(tensor: &Tensor, shape: &[i64]) -> Option<Tensor> {
    let own = tensor.size();
    let units = shape.len().checked_sub(own.len())?;
    if units > 0 && own.len() < 2 {
        return None;
    }
    let (front, back) = own.split_at(own.len().min(2));
    ([front, &vec![1; units], back].concat() == shape).then(|| tensor.reshape(shape))
}

/// Whether a parameter of the denoiser belongs to the layers over frames, which no image model has.
pub fn is_temporal(name: &str) -> bool {
    name.contains(".transformer_blocks.")
        && name.split('.').any(|part| matches!(part, "attn1_tmp" | "attn2_tmp" | "norm4" | "norm5"))
}

/// The denoiser's name in diffusers: levels instead of a count of blocks.
fn unet_name(name: &str, blocks_per_level: usize) -> Option<String> {
    let per_level = blocks_per_level + 1; // on the way down the last is the downsampling
    let at = |n: usize| (n / per_level, n % per_level);
    let parts: Vec<&str> = name.split('.').collect();
    let (place, rest) = match parts.as_slice() {
        ["time_embed", "0", rest @ ..] => ("time_embedding.linear_1".to_string(), rest),
        ["time_embed", "2", rest @ ..] => ("time_embedding.linear_2".to_string(), rest),
        ["input_blocks", "0", "0", rest @ ..] => ("conv_in".to_string(), rest),
        ["input_blocks", n, "0", "op", rest @ ..] => {
            let (level, _) = at(n.parse::<usize>().ok()?.checked_sub(1)?);
            (format!("down_blocks.{level}.downsamplers.0.conv"), rest)
        }
        ["input_blocks", n, layer, rest @ ..] => {
            let (level, i) = at(n.parse::<usize>().ok()?.checked_sub(1)?);
            (format!("down_blocks.{level}.{}.{i}", residual_or_attention(layer)?), rest)
        }
        ["middle_block", "0", rest @ ..] => ("mid_block.resnets.0".to_string(), rest),
        ["middle_block", "1", rest @ ..] => ("mid_block.attentions.0".to_string(), rest),
        ["middle_block", "2", rest @ ..] => ("mid_block.resnets.1".to_string(), rest),
        ["output_blocks", n, _, "conv", rest @ ..] => {
            let (level, _) = at(n.parse().ok()?);
            (format!("up_blocks.{level}.upsamplers.0.conv"), rest)
        }
        ["output_blocks", n, layer, rest @ ..] => {
            let (level, i) = at(n.parse().ok()?);
            (format!("up_blocks.{level}.{}.{i}", residual_or_attention(layer)?), rest)
        }
        ["out", "0", rest @ ..] => ("conv_norm_out".to_string(), rest),
        ["out", "2", rest @ ..] => ("conv_out".to_string(), rest),
        _ => return None,
    };
    let layer = match rest {
        ["in_layers", "0", leaf] => format!("norm1.{leaf}"),
        ["in_layers", "2", leaf] => format!("conv1.{leaf}"),
        ["emb_layers", "1", leaf] => format!("time_emb_proj.{leaf}"),
        ["out_layers", "0", leaf] => format!("norm2.{leaf}"),
        ["out_layers", "3", leaf] => format!("conv2.{leaf}"),
        ["skip_connection", leaf] => format!("conv_shortcut.{leaf}"),
        same => same.join("."),
    };
    Some(format!("{place}.{layer}"))
}

/// In a block of the denoiser the residual block comes first, then the attention.
fn residual_or_attention(layer: &str) -> Option<&'static str> {
    match layer {
        "0" => Some("resnets"),
        "1" => Some("attentions"),
        _ => None,
    }
}

/// The image autoencoder's name in diffusers, which counts the decoder's levels from the deepest.
fn autoencoder_name(name: &str, levels: usize) -> Option<String> {
    let up = |level: &str| Some(levels.checked_sub(1)?.checked_sub(level.parse::<usize>().ok()?)?.to_string());
    let parts: Vec<&str> = name.split('.').collect();
    let renamed = match parts.as_slice() {
        [side, "down", level, "block", i, rest @ ..] => {
            format!("{side}.down_blocks.{level}.resnets.{i}.{}", residual_name(rest))
        }
        [side, "up", level, "block", i, rest @ ..] => {
            format!("{side}.up_blocks.{}.resnets.{i}.{}", up(level)?, residual_name(rest))
        }
        [side, "down", level, "downsample", rest @ ..] => {
            format!("{side}.down_blocks.{level}.downsamplers.0.{}", rest.join("."))
        }
        [side, "up", level, "upsample", rest @ ..] => {
            format!("{side}.up_blocks.{}.upsamplers.0.{}", up(level)?, rest.join("."))
        }
        [side, "mid", "block_1", rest @ ..] => format!("{side}.mid_block.resnets.0.{}", residual_name(rest)),
        [side, "mid", "block_2", rest @ ..] => format!("{side}.mid_block.resnets.1.{}", residual_name(rest)),
        [side, "mid", "attn_1", layer, leaf] => {
            let layer = match *layer {
                "norm" => "group_norm",
                "q" => "to_q",
                "k" => "to_k",
                "v" => "to_v",
                "proj_out" => "to_out.0",
                _ => return None,
            };
            format!("{side}.mid_block.attentions.0.{layer}.{leaf}")
        }
        [side, "norm_out", leaf] => format!("{side}.conv_norm_out.{leaf}"),
        _ => name.to_string(),
    };
    Some(renamed)
}

fn residual_name(rest: &[&str]) -> String {
    rest.join(".").replace("nin_shortcut", "conv_shortcut")
}

/// What diffusers called the maps of the autoencoder's attention before 2023.
fn old_attention_name(name: &str) -> Option<String> {
    let (place, layer) = name.split_once(".mid_block.attentions.0.")?;
    let (new, leaf) = layer.rsplit_once('.')?;
    let old = match new {
        "to_q" => "query",
        "to_k" => "key",
        "to_v" => "value",
        "to_out.0" => "proj_attn",
        _ => return None,
    };
    Some(format!("{place}.mid_block.attentions.0.{old}.{leaf}"))
}
