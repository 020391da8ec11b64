//! The two ways to estimate a covariance.

use serde::{Deserialize, Serialize};

/// What a covariance of n samples is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Divisor {
    /// n − 1: the original implementation, and the released LVDM code.
    #[default]
    NMinusOne,
    /// n: StyleGAN-V.
    N,
}

impl Divisor {
    /// As formulas have it.
    pub fn words(self) -> &'static str {
        match self {
            Divisor::NMinusOne => "n - 1",
            Divisor::N => "n",
        }
    }
}
