//! What a training will need, before anything of it is loaded: parameters, floating-point operations, memory, clips a
//! step, and which cards that fits. Nothing here was measured on a GPU; each number says how it comes about.

mod activations;
mod autoencoder;
mod cards;
mod codec;
mod denoiser;
mod needs;
mod transformer;
mod work;

use std::path::Path;

use anyhow::{Context, Result};
use serde_yaml::Value;

pub use self::{
    activations::Activations,
    cards::{CARDS, Card, Rates},
    needs::{Plan, PlanOptions, Sampling, Variant},
    work::{Roofline, Work},
};
use crate::{
    experiment::{AutoencoderExperiment, DiffusionExperiment, TransformerExperiment, UserError, read},
    torch::as_on_gpu,
};

/// The plan of an experiment file of `lvdm train`, after replacing what `overrides` (`key.path=value`) say. Videos,
/// weights and LPIPS need not be there; of an autoencoder run that is, the settings alone are read.
///
/// # Errors
/// A file with mistakes, or of another command; sizes that do not fit together; an autoencoder whose settings cannot
/// be found.
pub fn of(file: &Path, overrides: &[String], options: &PlanOptions) -> Result<Plan> {
    let wrong = |error: anyhow::Error| UserError(format!("{}: {error:#}", file.display()));
    match kind(file, overrides)? {
        Kind::Autoencoder => {
            let experiment: AutoencoderExperiment = read(file, overrides)?;
            experiment.check_settings().map_err(wrong)?;
            as_on_gpu(|| autoencoder::plan(&experiment)).with_context(|| file.display().to_string())
        }
        Kind::Diffusion => {
            let experiment: DiffusionExperiment = read(file, overrides)?;
            experiment.check_settings().map_err(wrong)?;
            as_on_gpu(|| denoiser::plan(file, &experiment, options)).with_context(|| file.display().to_string())
        }
        Kind::Transformer => {
            let experiment: TransformerExperiment = read(file, overrides)?;
            experiment.check_settings().map_err(wrong)?;
            as_on_gpu(|| transformer::plan(file, &experiment, options)).with_context(|| file.display().to_string())
        }
    }
}

enum Kind {
    Autoencoder,
    Diffusion,
    Transformer,
}

/// Which training a file is of: an autoencoder's has the settings of one or none, others name one; of these a denoiser's has
/// a network of some kind, and a transformer's nothing of noise.
fn kind(file: &Path, overrides: &[String]) -> Result<Kind, UserError> {
    let value: Value = read(file, overrides)?;
    let name = file.display();
    if value.get("trainer").is_none() {
        return Err(UserError(format!("{name}: there is no `trainer`: a plan is of a file for `lvdm train`")));
    }
    if !value.get("autoencoder").is_some_and(Value::is_string) {
        return Ok(Kind::Autoencoder);
    }
    let of_denoiser = ["unet", "schedule", "objective"].iter().any(|key| value.get(key).is_some())
        || value.get("network").is_some_and(|network| network.get("kind").is_some());
    Ok(if of_denoiser { Kind::Diffusion } else { Kind::Transformer })
}
