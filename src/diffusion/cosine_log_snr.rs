//! The cosine schedule in continuous time, by its log-SNR (Kingma et al. 2021, arXiv 2107.00630; Hoogeboom et al. 2023,
//! arXiv 2301.11093).

use anyhow::{Result, ensure};
use rand::{Rng, RngExt, distr::Open01};
use serde::{Deserialize, Serialize};

use super::path::{NoisePath, NoisePathSettings, at_least};

/// ln(α²/σ²) = −2·ln tan(π·t'/2) + shift with α² + σ² = 1, where t' runs over the part of (0, 1) in which it lies between
/// the two ends. The network is told 1000·t.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CosineLogSnr {
    /// At time 1, without the shift.
    pub least: f64,
    /// At time 0, without the shift.
    pub most: f64,
    /// Added at all times; for larger latents 2·ln(side of the base / side), which is negative: more noise.
    pub shift: f64,
}

impl Default for CosineLogSnr {
    fn default() -> Self {
        CosineLogSnr { least: -20.0, most: 20.0, shift: 0.0 }
    }
}

impl CosineLogSnr {
    fn log_snr(&self, t: f64) -> f64 {
        let angle = |log_snr: f64| (-0.5 * log_snr).exp().atan();
        let (first, last) = (angle(self.most), angle(self.least));
        -2.0 * (first + t * (last - first)).tan().ln() + self.shift
    }
}

impl NoisePathSettings for CosineLogSnr {
    fn build(&self) -> Result<Box<dyn NoisePath>> {
        let CosineLogSnr { least, most, shift } = *self;
        ensure!(
            least < most && least >= -60.0 && most <= 60.0,
            "least = {least} and most = {most} must satisfy -60 ≤ least < most ≤ 60"
        );
        ensure!(
            least + shift >= -60.0 && most + shift <= 60.0,
            "shift = {shift} moves the logarithms of the signal-to-noise ratio to {} … {}, beyond -60 … 60",
            least + shift,
            most + shift
        );
        Ok(Box::new(self.clone()))
    }
}

impl NoisePath for CosineLogSnr {
    fn alpha_sigma(&self, t: f64) -> (f64, f64) {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let log_snr = self.log_snr(t);
        (sigmoid(log_snr).sqrt(), sigmoid(-log_snr).sqrt())
    }

    fn draw(&self, random: &mut dyn Rng) -> f64 {
        random.sample(Open01)
    }

    fn noisiest(&self) -> f64 {
        1.0
    }

    fn nodes(&self, steps: i64) -> Result<Vec<f64>> {
        at_least(1, steps)?;
        Ok((0..steps).map(|i| 1.0 - i as f64 / steps as f64).collect())
    }

    fn embed(&self, t: f64) -> f64 {
        1000.0 * t
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_snr_falls_from_one_end_to_the_other() {
        let path = CosineLogSnr { least: -15.0, most: 12.0, shift: -2.0 };
        assert!((path.log_snr(0.0) - 10.0).abs() < 1e-9 && (path.log_snr(1.0) + 17.0).abs() < 1e-9);
        let rates: Vec<(f64, f64)> = (0..=20).map(|i| path.alpha_sigma(i as f64 / 20.0)).collect();
        assert!(rates.windows(2).all(|pair| pair[0].0 > pair[1].0));
        assert!(rates.iter().all(|(alpha, sigma)| (alpha * alpha + sigma * sigma - 1.0).abs() < 1e-12));
        // wide and without a shift it is the cosine schedule: α = cos(π·t/2)
        let (alpha, _) = CosineLogSnr { least: -60.0, most: 60.0, shift: 0.0 }.alpha_sigma(0.3);
        assert!((alpha - (0.15 * std::f64::consts::PI).cos()).abs() < 1e-9, "{alpha}");
        assert!(CosineLogSnr { least: 1.0, most: 0.0, shift: 0.0 }.build().is_err());
        assert!(CosineLogSnr { least: -15.0, most: 12.0, shift: 50.0 }.build().is_err());
    }
}
