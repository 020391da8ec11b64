//! Features of real clips are kept between evaluations: they are the same as long as protocol and data are.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Result;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::Tensor;

use crate::{
    distributed::Ranks,
    safetensors::{read_safetensors, write_safetensors_atomically},
};

/// Where features are kept, one file for each protocol, data and extractor; nothing is lost with them but time.
const FOLDER: &str = "runs/features";

/// Sets of features by name, each `[N, …]`: those that the cache holds under `key`, which says all that they depend on,
/// else those that `make` computes. All ranks use the same. Says whether the cache held them.
///
/// # Errors
/// Those of `make`; a full disk.
pub fn cached_features(
    key: &Value,
    ranks: &Ranks,
    make: impl FnOnce() -> Result<BTreeMap<String, Tensor>>,
) -> Result<(BTreeMap<String, Tensor>, bool)> {
    let hash = format!("{:x}", Sha256::digest(key.to_string()));
    let path = PathBuf::from(FOLDER).join(format!("{}.safetensors", &hash[..16]));
    let found = match path.exists().then(|| read_safetensors(&path)) {
        Some(Ok((tensors, Some(known)))) if known == *key => Some(tensors.into_iter().collect()),
        Some(Err(error)) => {
            tracing::warn!("{error:#}; it is made anew");
            None
        }
        _ => None,
    };
    // where one rank lacks the file, all make the features, which they share
    let everywhere = ranks.sum(&[f64::from(u8::from(found.is_some()))])?[0] as usize == ranks.size();
    if let Some(features) = found.filter(|_| everywhere) {
        return Ok((features, true));
    }
    let features = make()?;
    if ranks.is_first() {
        let named: Vec<(&str, &Tensor)> = features.iter().map(|(name, set)| (name.as_str(), set)).collect();
        write_safetensors_atomically(&path, &named, key)?;
    }
    Ok((features, false))
}
