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
use crate::experiment::{AutoencoderExperiment, DiffusionExperiment, UserError, read};

/// The plan of an experiment file of `lvdm train`, after replacing what `overrides` (`key.path=value`) say. Videos,
/// weights and LPIPS need not be there; of an autoencoder run that is, the settings alone are read.
///
/// # Errors
/// A file with mistakes, or of another command; sizes that do not fit together; an autoencoder whose settings cannot
/// be found.
pub fn of(file: &Path, overrides: &[String], options: &PlanOptions) -> Result<Plan> {
    match kind(file, overrides)? {
        Kind::Autoencoder => autoencoder::plan(&read::<AutoencoderExperiment>(file, overrides)?, options),
        Kind::Diffusion => denoiser::plan(file, &read::<DiffusionExperiment>(file, overrides)?, options),
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
