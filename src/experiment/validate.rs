//! An experiment that can be checked before anything is loaded.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::{load::read, user_error::UserError};
use crate::data::DataConfig;

/// An experiment that can be checked before anything is loaded.
pub trait Experiment: Serialize + serde::de::DeserializeOwned {
    /// Also that what it names is there.
    ///
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

/// That clips can be cut, whether or not the videos are there.
pub(super) fn check_clip(data: &DataConfig) -> Result<()> {
    data.clip()?;
    ensure!(data.workers >= 1, "data.workers must be at least 1");
    ensure!(data.workers <= 1024, "data.workers must be at most 1024, not {}", data.workers);
    Ok(())
}

pub(super) fn check_data(data: &DataConfig) -> Result<()> {
    check_clip(data)?;
    data.dataset.check().context("data.dataset")
}
