//! Low-rank adapters of linear maps (LoRA).

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// A low-rank addition to a linear map (Hu et al. 2021): W + alpha / rank · up · down.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Inner width of the two maps.
    pub rank: i64,
    /// What they add is multiplied by α / rank.
    pub alpha: f64,
}

impl Adapter {
    pub(super) const DOWN: &'static str = "adapter_down";
    pub(super) const UP: &'static str = "adapter_up";

    /// # Errors
    /// Names the number that makes no sense.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.rank >= 1, "rank must be at least 1, not {}", self.rank);
        ensure!(self.alpha.is_finite() && self.alpha > 0.0, "alpha must be positive, not {}", self.alpha);
        Ok(())
    }

    /// Whether a parameter is an adapter's.
    pub fn owns(name: &str) -> bool {
        name.ends_with(Self::DOWN) || name.ends_with(Self::UP)
    }

    /// The map whose adapter a parameter belongs to, and which half of it that is, as PEFT calls it.
    pub fn half(name: &str) -> Option<(&str, &'static str)> {
        let (place, leaf) = name.rsplit_once('.')?;
        match leaf {
            Self::DOWN => Some((place, "lora_A")),
            Self::UP => Some((place, "lora_B")),
            _ => None,
        }
    }

    /// Adds all adapters to their maps: what is left computes the same without them.
    ///
    /// # Errors
    /// An adapter without its other half or its map.
    pub fn merge(&self, weights: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let places: Vec<String> =
            weights.keys().filter_map(|name| name.strip_suffix(Self::DOWN)).map(str::to_string).collect();
        for place in places {
            let mut take = |name: &str| weights.remove(&format!("{place}{name}"));
            let (Some(down), Some(up), Some(weight)) = (take(Self::DOWN), take(Self::UP), take("weight")) else {
                anyhow::bail!("the adapter of `{place}weight` is not whole");
            };
            weights.insert(format!("{place}weight"), weight + up.matmul(&down) * self.scale());
        }
        Ok(())
    }

    /// α / rank
    pub(super) fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}
