//! The path of EDM (Karras et al. 2022, arXiv 2206.00364): z_t = z_0 + σ·ε, and time is σ itself.

use anyhow::{Result, ensure};
use rand::{Rng, RngExt, distr::Open01};
use serde::{Deserialize, Serialize};

use super::path::{NoisePath, NoisePathSettings, at_least, normal_quantile};

/// The network sees z/√(σ² + σ_data²) and is told ln(σ)/4 (their table 1). It needs `objective.predict: edm`, with
/// `loss: l2` as published.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Edm {
    /// Mean of ln σ in training: −1.2, in EDM2 −0.4.
    pub p_mean: f64,
    /// Its standard deviation: 1.2, in EDM2 1.0.
    pub p_std: f64,
    /// Standard deviation of the latents. Those of an autoencoder are scaled to 1; EDM's pictures have 0.5.
    pub sigma_data: f64,
    /// Where sampling ends, before its last step to z_0.
    pub sigma_min: f64,
    /// Where sampling begins.
    pub sigma_max: f64,
}

impl Default for Edm {
    fn default() -> Self {
        Edm { p_mean: -1.2, p_std: 1.2, sigma_data: 1.0, sigma_min: 0.002, sigma_max: 80.0 }
    }
}

impl Edm {
    /// σ of a training sample, for a number that is uniform in (0, 1).
    pub fn sigma_of(&self, u: f64) -> f64 {
        (self.p_mean + self.p_std * normal_quantile(u)).exp()
    }
}

impl NoisePathSettings for Edm {
    fn build(&self) -> Result<Box<dyn NoisePath>> {
        let Edm { p_mean, p_std, sigma_data, sigma_min, sigma_max } = *self;
        ensure!(p_mean.is_finite() && p_std > 0.0, "p_mean = {p_mean}, p_std = {p_std}: p_std must be positive");
        ensure!(sigma_data > 0.0, "sigma_data must be positive, not {sigma_data}");
        ensure!(
            0.0 < sigma_min && sigma_min < sigma_max && sigma_max.is_finite(),
            "sigma_min = {sigma_min} and sigma_max = {sigma_max} must satisfy 0 < sigma_min < sigma_max"
        );
        Ok(Box::new(self.clone()))
    }
}

impl NoisePath for Edm {
    fn alpha_sigma(&self, t: f64) -> (f64, f64) {
        (1.0, t)
    }

    fn draw(&self, random: &mut dyn Rng) -> f64 {
        self.sigma_of(random.sample(Open01))
    }

    fn noisiest(&self) -> f64 {
        self.sigma_max
    }

    /// Evenly in the seventh root of σ (their equation 5).
    fn nodes(&self, steps: i64) -> Result<Vec<f64>> {
        const RHO: f64 = 7.0;
        at_least(2, steps)?;
        let (first, last) = (self.sigma_max.powf(1.0 / RHO), self.sigma_min.powf(1.0 / RHO));
        Ok((0..steps).map(|i| (first + i as f64 / (steps - 1) as f64 * (last - first)).powf(RHO)).collect())
    }

    fn embed(&self, t: f64) -> f64 {
        t.ln() / 4.0
    }

    fn input_scale(&self, t: f64) -> f64 {
        1.0 / (t * t + self.sigma_data * self.sigma_data).sqrt()
    }

    fn data_deviation(&self) -> f64 {
        self.sigma_data
    }

    fn start_deviation(&self) -> f64 {
        self.sigma_max
    }

    fn level_time(&self, level: i64) -> f64 {
        self.sigma_min * (self.sigma_max / self.sigma_min).powf(level as f64 / (self.levels() - 1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_run_from_the_noisiest_to_the_cleanest() {
        let edm = Edm::default();
        let nodes = edm.nodes(18).unwrap();
        assert!(nodes.windows(2).all(|pair| pair[0] > pair[1]) && nodes.len() == 18);
        assert!((nodes[0] - 80.0).abs() < 1e-9 && (nodes[17] - 0.002).abs() < 1e-12, "{nodes:?}");
        let error = Edm { sigma_min: 90.0, ..edm }.build().err().unwrap().to_string();
        assert!(error.contains("sigma_min = 90"), "{error}");
    }
}
