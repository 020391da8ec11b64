//! How much the error at each time counts.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::{path::Rates, prediction::Predict};

/// A weight of the squared error that depends on the time.
pub trait LossWeight {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the number that makes no sense.
    fn validate(&self) -> Result<()>;

    /// The weight of the squared error of the network's prediction at a time with these rates.
    fn at(&self, predict: Predict, rates: &Rates) -> f64;

    /// Whether the weight is the same at all times.
    fn is_constant(&self) -> bool {
        false
    }
}

/// The error of the prediction counts alike at all times.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Constant {}

impl LossWeight for Constant {
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn at(&self, _predict: Predict, _rates: &Rates) -> f64 {
        1.0
    }

    fn is_constant(&self) -> bool {
        true
    }
}

/// The error of z_0 counts as much as its signal-to-noise ratio, but no more than γ (Hang et al. 2023, arXiv 2303.09556).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MinSnr {
    /// γ.
    pub gamma: f64,
}

impl Default for MinSnr {
    fn default() -> Self {
        MinSnr { gamma: 5.0 }
    }
}

impl LossWeight for MinSnr {
    fn validate(&self) -> Result<()> {
        ensure!(self.gamma > 0.0, "gamma must be positive, not {}", self.gamma);
        Ok(())
    }

    fn at(&self, predict: Predict, rates: &Rates) -> f64 {
        let snr = (rates.alpha / rates.sigma).powi(2);
        snr.min(self.gamma) * predict.gain(rates).powi(2)
    }
}

/// The error of z_0 counts (σ² + d²)/(σ·d)² for data of deviation d and noise σ/α (Karras et al. 2022, table 1): for
/// `predict: edm` that is 1 at all times.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EdmWeight {}

impl LossWeight for EdmWeight {
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn at(&self, predict: Predict, rates: &Rates) -> f64 {
        let (snr, d) = ((rates.alpha / rates.sigma).powi(2), rates.deviation);
        // 1/s² + 1/d² for the noise s = σ/α, which may be without end
        (snr + 1.0 / (d * d)) * predict.gain(rates).powi(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Edm, NoisePath};

    #[test]
    fn edm_weighs_its_own_prediction_alike() {
        let path = Edm { sigma_data: 0.5, ..Edm::default() };
        for sigma in [0.002, 0.3, 80.0] {
            let weight = EdmWeight {}.at(Predict::Edm, &path.rates(sigma));
            assert!((weight - 1.0).abs() < 1e-12, "σ = {sigma}: {weight}");
        }
    }

    #[test]
    fn noise_alone_has_a_finite_weight() {
        let rates = Rates { alpha: 0.0, sigma: 1.0, deviation: 0.5 };
        for predict in [Predict::Velocity, Predict::Z0, Predict::Flow] {
            assert_eq!(EdmWeight {}.at(predict, &rates), 4.0, "{predict:?}");
            assert_eq!(MinSnr::default().at(predict, &rates), 0.0, "{predict:?}");
        }
    }
}
