//! Checkpoints of the released LVDM: which of their names belongs to what, and the way back.
//!
//! Inside a network the released names are ours. Foreign are the prefixes, the names of averaged weights
//! (all dots removed) and what a checkpoint holds besides networks.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use super::{WeightsFile, WeightsKind, clip_names::is_unused_of_clip, pickle::Value};

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Where the denoising U-Net stands.
pub const UNET: &str = "model.diffusion_model.";
/// Where a diffusion checkpoint keeps its frozen autoencoder; an autoencoder's own has no prefix.
pub const FIRST_STAGE: &str = "first_stage_model.";
/// Where an autoencoder's checkpoint keeps its discriminator.
pub const DISCRIMINATOR: &str = "loss.discriminator.";
/// The text encoder of a text-to-video checkpoint.
pub const TEXT_ENCODER: &str = "cond_stage_model.transformer.text_model.";
/// The same, as newer versions of the library that makes it call it.
const NEW_TEXT_ENCODER: &str = "cond_stage_model.transformer.";
/// The prefix of the U-Net inside the average, whose names begin below `model.`.
pub const AVERAGED_UNET: &str = "diffusion_model.";
const AVERAGED: &str = "model_ema.";

/// What an autoencoder's own checkpoint has at its top.
const AUTOENCODER: [&str; 4] = ["encoder.", "decoder.", "quant_conv.", "post_quant_conv."];

/// Buffers that follow from the noise schedule; `betas` is looked at.
const SCHEDULE: [&str; 13] = [
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
];

/// What trainings write beside the weights: PyTorch Lightning, DeepSpeed, and what is usual.
const BESIDE: [&str; 49] = [
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "loops",
    "callbacks",
    "checkpoint_callback_best_model_path",
    "checkpoint_callback_best_model_score",
    "early_stop_callback",
    "optimizer_states",
    "lr_schedulers",
    "native_amp_scaling_state",
    "amp_scaling_state",
    "MixedPrecisionPlugin",
    "NativeMixedPrecisionPlugin",
    "MixedPrecision",
    "hparams_name",
    "hparams_type",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hparams_type",
    "datamodule_hyper_parameters",
    "__version__",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "csr_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
    "optimizer_state_dict",
    "opt",
    "scheduler",
    "scheduler_state_dict",
    "scaler",
    "step",
    "iteration",
    "loss",
    "args",
];

/// Something of a checkpoint that is known and not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// As in the file.
    pub name: String,
    /// Tensors or entries.
    pub count: usize,
}

/// A checkpoint taken apart; in each part names are without its prefix.
#[derive(Default)]
pub struct LvdmCheckpoint {
    /// The denoiser, names without prefix.
    pub unet: Tensors,
    /// The video autoencoder, names without prefix.
    pub autoencoder: Tensors,
    /// The discriminator of its loss, names without prefix.
    pub discriminator: Tensors,
    /// CLIP, names without prefix.
    pub text_encoder: Tensors,
    /// Under their released names: see [`Self::averaged`].
    averaged: Tensors,
    /// Decay of the average, and how often it was updated.
    pub decay: Option<f64>,
    /// Updates of the average.
    pub updates: Option<i64>,
    /// Latents are scale·(z + shift).
    pub scale: Option<f64>,
    /// The other number of it.
    pub shift: Option<f64>,
    /// Of the noise schedule.
    pub betas: Option<Vec<f64>>,
    /// Optimizer steps.
    pub global_step: Option<i64>,
    /// What is known and not needed.
    pub ignored: Vec<Ignored>,
    /// What `lvdm export` wrote beside the weights.
    pub exported: Option<Json>,
}

impl LvdmCheckpoint {
    /// Reads a PyTorch checkpoint, or a safetensors file with the same names.
    ///
    /// # Errors
    /// A file that is something else, truncated or damaged; names that are not known.
    pub fn read(file: WeightsFile) -> Result<Self> {
        let path = file.path().to_path_buf();
        let kind = WeightsKind::of_shapes(file.shapes());
        ensure!(may_be_lvdm(&kind), "{} is {kind}; a checkpoint of LVDM is wanted", path.display());
        // LVDM's kernels have an axis of frames
        let kernel = file.shapes().get("model.diffusion_model.input_blocks.0.0.weight");
        ensure!(
            kernel.is_none_or(|shape| shape.len() != 4),
            "{} is a network for images, without frames: a Stable Diffusion is read by `lvdm import stable-diffusion`",
            path.display()
        );
        let (exported, beside) = (file.metadata()?, file.beside().to_vec());
        let sorted = Self::sort(file.read()?).and_then(|found| found.with_beside(&beside));
        Ok(Self { exported, ..sorted.with_context(|| path.display().to_string())? })
    }

    /// Gives each tensor to its part.
    ///
    /// # Errors
    /// Names the first few that belong nowhere.
    pub fn sort(tensors: Tensors) -> Result<Self> {
        let mut found = LvdmCheckpoint::default();
        let mut unknown = Vec::new();
        for (name, tensor) in tensors {
            if let Some(rest) = name.strip_prefix(UNET) {
                found.unet.insert(rest.to_string(), tensor);
            } else if let Some(rest) = name.strip_prefix(AVERAGED) {
                match rest {
                    "decay" => found.decay = Some(as_written(scalar(&name, &tensor)?)),
                    "num_updates" => found.updates = Some(scalar(&name, &tensor)? as i64),
                    _ => {
                        found.averaged.insert(rest.to_string(), tensor);
                    }
                }
            } else if let Some(rest) = name.strip_prefix(DISCRIMINATOR) {
                found.discriminator.insert(rest.to_string(), tensor);
            } else if name.starts_with("loss.") || name.starts_with("first_stage_model.loss.") {
                found.ignore("loss.*");
            } else if let Some(rest) = name.strip_prefix(FIRST_STAGE) {
                found.autoencoder.insert(rest.to_string(), tensor);
            } else if name.starts_with(NEW_TEXT_ENCODER) && name.ends_with("position_ids") {
                found.ignore("position_ids of the text encoder");
            } else if is_unused_of_clip(&name) {
                found.ignore("other tensors of CLIP");
            } else if let Some(rest) = name.strip_prefix(TEXT_ENCODER).or(name.strip_prefix(NEW_TEXT_ENCODER)) {
                found.text_encoder.insert(rest.to_string(), tensor);
            } else if AUTOENCODER.iter().any(|top| name.starts_with(top)) {
                found.autoencoder.insert(name, tensor);
            } else if SCHEDULE.contains(&name.as_str()) {
                found.ignore("buffers of the noise schedule");
                if name == "betas" {
                    let values = Vec::<f64>::try_from(tensor.to_kind(Kind::Double).flatten(0, -1))?;
                    found.betas = Some(values.into_iter().map(as_written).collect());
                }
            } else {
                match name.as_str() {
                    "logvar" => found.ignore("logvar"),
                    "scale_factor" => found.scale = Some(as_written(scalar(&name, &tensor)?)),
                    "shift_factor" => found.shift = Some(as_written(scalar(&name, &tensor)?)),
                    _ => unknown.push(name),
                }
            }
        }
        refuse_unknown("tensors", &unknown)?;
        Ok(found)
    }

    /// Takes in what stands beside the weights.
    fn with_beside(mut self, beside: &[(String, Value)]) -> Result<Self> {
        let unknown: Vec<String> =
            beside.iter().filter(|(name, _)| !BESIDE.contains(&name.as_str())).map(|(name, _)| name.clone()).collect();
        refuse_unknown("entries beside the weights", &unknown)?;
        for (name, value) in beside {
            if name == "global_step" || name == "global_steps" {
                self.global_step = value.as_int().filter(|&step| step >= 0);
            }
            let entries = value.entries().map(<[_]>::len).or(value.as_sequence().map(<[_]>::len));
            self.ignored.push(Ignored { name: name.clone(), count: entries.unwrap_or(1) });
        }
        Ok(self)
    }

    fn ignore(&mut self, name: &str) {
        match self.ignored.iter_mut().find(|group| group.name == name) {
            Some(group) => group.count += 1,
            None => self.ignored.push(Ignored { name: name.to_string(), count: 1 }),
        }
    }

    /// Whether there are averaged weights.
    pub fn has_average(&self) -> bool {
        !self.averaged.is_empty()
    }

    /// Takes out the averaged weights of a network's trainable parameters `(name, alias)`.
    ///
    /// # Errors
    /// Names that are missing, or that are left over.
    pub fn averaged(&mut self, prefix: &str, names: &[(String, Option<String>)]) -> Result<Tensors> {
        let mut found = Tensors::new();
        let mut missing = Vec::new();
        for (name, alias) in names {
            let flat = |name: &String| flattened(prefix, name);
            // both names of one tensor may be listed
            let own = self.averaged.remove(&flat(name));
            let other = alias.as_ref().and_then(|alias| self.averaged.remove(&flat(alias)));
            match own.or(other) {
                Some(tensor) => {
                    found.insert(name.clone(), tensor);
                }
                None => missing.push(format!("{AVERAGED}{}", flat(name))),
            }
        }
        if !missing.is_empty() {
            bail!("{} averaged weights are missing: {}", missing.len(), first_few(&missing));
        }
        let left: Vec<String> = self.averaged.keys().map(|name| format!("{AVERAGED}{name}")).collect();
        refuse_unknown("averaged weights", &left)?;
        Ok(found)
    }
}

/// The parameters of one network on their way out, under released names.
pub struct Export {
    /// In no order; two names may share a tensor.
    pub tensors: Vec<(String, Tensor)>,
}

impl Export {
    /// A network's tensors under their prefix; what released checkpoints list twice, twice.
    ///
    /// # Errors
    /// An alias of a tensor that is not there.
    pub fn network(&mut self, prefix: &str, tensors: &Tensors, aliases: &[(String, String)]) -> Result<()> {
        for (name, tensor) in tensors {
            self.tensors.push((format!("{prefix}{name}"), tensor.shallow_clone()));
        }
        for (alias, name) in aliases {
            let tensor = tensors.get(name).with_context(|| format!("the run has no `{name}`"))?;
            self.tensors.push((format!("{prefix}{alias}"), tensor.shallow_clone()));
        }
        Ok(())
    }

    /// Averaged weights, each once, under the name that PyTorch lists first: the alias.
    ///
    /// # Errors
    /// Two names that are one without their dots.
    pub fn average(
        &mut self,
        prefix: &str,
        tensors: &Tensors,
        aliases: &[(String, String)],
        decay: f64,
        updates: i64,
    ) -> Result<()> {
        let mut names = BTreeMap::new();
        for (name, tensor) in tensors {
            let listed = aliases.iter().find(|(_, own)| own == name).map_or(name, |(alias, _)| alias);
            let flat = flattened(prefix, listed);
            ensure!(names.insert(flat.clone(), name).is_none(), "two parameters are called `{flat}` without dots");
            self.tensors.push((format!("{AVERAGED}{flat}"), tensor.shallow_clone()));
        }
        self.tensors.push((format!("{AVERAGED}decay"), Tensor::from(decay as f32)));
        self.tensors.push((format!("{AVERAGED}num_updates"), Tensor::from(i32::try_from(updates)?)));
        Ok(())
    }
}

/// Whether a file that looks like this may be a checkpoint of LVDM: its U-Net over an image or a video autoencoder, or
/// an autoencoder alone.
fn may_be_lvdm(kind: &WeightsKind) -> bool {
    use WeightsKind as Kind;
    !matches!(
        kind,
        Kind::StableDiffusion2(_)
            | Kind::StableDiffusionXl
            | Kind::StableDiffusion3
            | Kind::Transformer
            | Kind::Inpainting
            | Kind::InstructPix2Pix
            | Kind::Lora(_)
            | Kind::UnfusedLora
            | Kind::TextualInversion
            | Kind::ControlNet
            | Kind::MotionModule
    )
}

/// Below `model_ema.`.
fn flattened(prefix: &str, name: &str) -> String {
    format!("{prefix}{name}").replace('.', "")
}

/// The released name of an averaged weight.
pub fn averaged_name(prefix: &str, name: &str) -> String {
    format!("{AVERAGED}{}", flattened(prefix, name))
}

/// The one number that a tensor holds, whatever its shape and type.
///
/// # Errors
/// It holds none, or several.
pub fn scalar(name: &str, tensor: &Tensor) -> Result<f64> {
    ensure!(tensor.numel() == 1, "`{name}` has shape {:?}, one number is wanted", tensor.size());
    Ok(tensor.to_kind(Kind::Double).reshape([1]).double_value(&[0]))
}

/// A number that was rounded to float32, as it was written down before: 0.9999, not 0.99989998….
fn as_written(value: f64) -> f64 {
    let single = value as f32;
    if f64::from(single) == value { single.to_string().parse().unwrap_or(value) } else { value }
}

/// The first three of some names, and how many more there are.
pub(super) fn first_few(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    let more = if names.len() > 3 { format!(" and {} more", names.len() - 3) } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

fn refuse_unknown(what: &str, unknown: &[String]) -> Result<()> {
    if unknown.is_empty() {
        return Ok(());
    }
    bail!("{} {what} are unknown: {}", unknown.len(), first_few(unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(names: &[&str]) -> Tensors {
        names.iter().map(|name| (name.to_string(), Tensor::from(0.9999f32))).collect()
    }

    #[test]
    fn each_tensor_goes_to_its_part() {
        let found = LvdmCheckpoint::sort(tensors(&[
            "model.diffusion_model.out.2.weight",
            "model_ema.diffusion_modelout2weight",
            "model_ema.decay",
            "first_stage_model.encoder.conv_first.conv.bias",
            "first_stage_model.loss.logvar",
            "loss.discriminator.main.0.bias",
            "loss.perceptual_loss.lin0.model.1.weight",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "betas",
            "lvlb_weights",
            "logvar",
            "scale_factor",
        ]))
        .unwrap();
        let keys = |tensors: &Tensors| tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&found.unet), ["out.2.weight"]);
        assert_eq!(keys(&found.autoencoder), ["encoder.conv_first.conv.bias"]);
        assert_eq!(keys(&found.discriminator), ["main.0.bias"]);
        assert_eq!(keys(&found.text_encoder), ["final_layer_norm.bias"]);
        assert_eq!((found.decay, found.scale, found.shift), (Some(0.9999), Some(0.9999), None));
        let ignored: Vec<(&str, usize)> =
            found.ignored.iter().map(|group| (group.name.as_str(), group.count)).collect();
        assert_eq!(
            ignored,
            [
                ("buffers of the noise schedule", 2),
                ("position_ids of the text encoder", 1),
                ("loss.*", 2),
                ("logvar", 1)
            ]
        );
    }

    #[test]
    fn an_unknown_name_is_refused() {
        let error = LvdmCheckpoint::sort(tensors(&["model.other", "a", "b", "c"])).err().unwrap().to_string();
        assert_eq!(error, "4 tensors are unknown: `a`, `b`, `c` and 1 more");
    }

    #[test]
    fn averages_are_found_by_either_name() {
        let names = [("down.conv.weight".to_string(), Some("down.weight".to_string())), ("down.bias".into(), None)];
        let mut found = LvdmCheckpoint::sort(tensors(&["model_ema.downweight", "model_ema.downbias"])).unwrap();
        assert_eq!(found.averaged("", &names).unwrap().len(), 2);
        let mut found = LvdmCheckpoint::sort(tensors(&["model_ema.downweight"])).unwrap();
        let error = found.averaged("", &names).unwrap_err().to_string();
        assert!(error.contains("`model_ema.downbias`"), "{error}");
        let mut found =
            LvdmCheckpoint::sort(tensors(&["model_ema.downweight", "model_ema.downbias", "model_ema.x"])).unwrap();
        let error = found.averaged("", &names).unwrap_err().to_string();
        assert!(error.contains("`model_ema.x`") && error.contains("unknown"), "{error}");
    }
}
