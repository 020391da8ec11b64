//! An experiment that can be checked before anything is loaded.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::{load::read, user_error::UserError};
use crate::data::DataConfig;

/// An experiment that can be checked before anything is loaded.
pub trait Experiment: Serialize + serde::de::DeserializeOwned {
    /// # Errors
    /// Names the key and the rule.
    fn validate(&self) -> Result<()>;

    /// Reads, overrides and checks a file.
    ///
    /// # Errors
    /// [`UserError`], with the file's name.
    fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let experiment: Self = read(path, overrides)?;
        experiment.validate().map_err(|error| UserError(format!("{}: {error:#}", path.display())))?;
        Ok(experiment)
    }
}

pub(super) fn check_data(data: &DataConfig) -> Result<()> {
    data.clip()?;
    ensure!(data.workers >= 1, "data.workers must be at least 1");
    ensure!(data.workers <= 1024, "data.workers must be at most 1024, not {}", data.workers);
    data.dataset.check().context("data.dataset")
}
