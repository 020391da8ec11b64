//! Where a U-Net computes activations again.

use serde::{Deserialize, Serialize};

/// Which activations are computed again in the backward pass instead of being kept: all, none, or those at some
/// downsampling factors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged, expecting = "true, false, or downsampling factors such as [1, 2]")]
pub enum Recompute {
    /// All, or none.
    Everywhere(bool),
    /// Those of the levels at these downsampling factors; the first hold most.
    At(Vec<i64>),
}

impl Recompute {
    /// Whether at this factor.
    pub(super) fn at(&self, factor: i64) -> bool {
        match self {
            Recompute::Everywhere(all) => *all,
            Recompute::At(factors) => factors.contains(&factor),
        }
    }
}
