//! What a training will need, before anything of it is loaded: parameters, floating-point operations, memory, clips a
//! step, and which cards that fits. Nothing here was measured on a GPU; each number says how it comes about.

mod activations;
mod autoencoder;
mod cards;
mod codec;
mod denoiser;
mod needs;

use std::path::Path;

use anyhow::Result;
use serde_yaml::Value;

pub use self::{
    activations::Activations,
    cards::{CARDS, Card},
    needs::{Plan, PlanOptions, Variant},
};
use crate::{
    experiment::{AutoencoderExperiment, DiffusionExperiment, UserError, read},
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
            as_on_gpu(|| autoencoder::plan(&experiment, options))
        }
        Kind::Diffusion => {
            let experiment: DiffusionExperiment = read(file, overrides)?;
            experiment.check_settings().map_err(wrong)?;
            as_on_gpu(|| denoiser::plan(file, &experiment, options))
        }
    }
}

enum Kind {
    Autoencoder,
    Diffusion,
}

/// Which training a file is of: a denoiser's names its autoencoder, an autoencoder's has the settings of one or none.
fn kind(file: &Path, overrides: &[String]) -> Result<Kind, UserError> {
    let value: Value = read(file, overrides)?;
    let name = file.display();
    if value.get("trainer").is_none() {
        return Err(UserError(format!("{name}: there is no `trainer`: a plan is of a file for `lvdm train`")));
    }
    Ok(if value.get("autoencoder").is_some_and(Value::is_string) { Kind::Diffusion } else { Kind::Autoencoder })
}
