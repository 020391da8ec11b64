//! Reading an experiment, with what its evaluation protocol fills in.

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use super::{file, protocols::complete, user_error::UserError};

/// Reads `path` as a `T`, after replacing what `overrides` (`key.path=value`) say.
///
/// # Errors
/// [`UserError`]: an unreadable file, bad YAML, an unknown key, a wrong type, a number that is not finite, an override of a
/// key that does not exist.
pub fn read<T: Serialize + DeserializeOwned>(path: &Path, overrides: &[String]) -> Result<T, UserError> {
    file::read(path, overrides, complete)
}

/// [`read`] for a text; `name` stands in errors.
///
/// # Errors
/// As [`read`].
pub fn parse<T: Serialize + DeserializeOwned>(name: &str, text: &str, overrides: &[String]) -> Result<T, UserError> {
    file::parse(name, text, overrides, complete)
}
