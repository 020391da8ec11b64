//! The cosine schedule in continuous time, by its log-SNR (Kingma et al. 2021, arXiv 2107.00630; Hoogeboom et al. 2023,
//! arXiv 2301.11093).

use anyhow::{Result, ensure};
use rand::{Rng, RngExt, distr::Open01};
use serde::{Deserialize, Serialize};

use super::path::{NoisePath, NoisePathSettings, at_least};

/// ln(α²/σ²) = −2·ln tan(π·t'/2) + shift with α² + σ² = 1, where t' runs over the part of (0, 1) in which it lies between
/// the two ends. Its angle is a·t + b with b = atan e^{−most/2} and a = atan e^{−least/2} − b: with the default ends, ±20, the
/// schedule of video diffusion models (Ho et al. 2022, arXiv 2204.03458).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CosineLogSnr {
    /// At time 1, without the shift.
    pub least: f64,
    /// At time 0, without the shift.
    pub most: f64,
    /// Added at all times; for larger latents 2·ln(side of the base / side), which is negative: more noise.
    pub shift: f64,
    /// What the network is told of a time.
    pub told: ToldTime,
}

/// By which number a network is given a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToldTime {
    /// 1000·t, as on a schedule of 1000 steps.
    #[default]
    Thousandths,
    /// ln(α²/σ²) itself.
    LogSnr,
}

impl Default for CosineLogSnr {
    fn default() -> Self {
        CosineLogSnr { least: -20.0, most: 20.0, shift: 0.0, told: ToldTime::default() }
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
        let CosineLogSnr { least, most, shift, .. } = *self;
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
        match self.told {
            ToldTime::Thousandths => 1000.0 * t,
            ToldTime::LogSnr => self.log_snr(t),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_snr_falls_from_one_end_to_the_other() {
        let path = CosineLogSnr { least: -15.0, most: 12.0, shift: -2.0, ..CosineLogSnr::default() };
        assert!((path.log_snr(0.0) - 10.0).abs() < 1e-9 && (path.log_snr(1.0) + 17.0).abs() < 1e-9);
        let rates: Vec<(f64, f64)> = (0..=20).map(|i| path.alpha_sigma(i as f64 / 20.0)).collect();
        assert!(rates.windows(2).all(|pair| pair[0].0 > pair[1].0));
        assert!(rates.iter().all(|(alpha, sigma)| (alpha * alpha + sigma * sigma - 1.0).abs() < 1e-12));
        // wide and without a shift it is the cosine schedule: α = cos(π·t/2)
        let (alpha, _) = CosineLogSnr { least: -60.0, most: 60.0, ..CosineLogSnr::default() }.alpha_sigma(0.3);
        assert!((alpha - (0.15 * std::f64::consts::PI).cos()).abs() < 1e-9, "{alpha}");
        assert!(CosineLogSnr { least: 1.0, most: 0.0, ..CosineLogSnr::default() }.build().is_err());
        assert!(CosineLogSnr { least: -15.0, most: 12.0, shift: 50.0, ..CosineLogSnr::default() }.build().is_err());
    }

    /// The published schedule: λ(u) = −2 ln tan(a·u + b) falls from 20 to −20, and is what the network is told.
    #[test]
    fn the_default_is_that_of_video_diffusion_models() {
        let path = CosineLogSnr { told: ToldTime::LogSnr, ..CosineLogSnr::default() };
        let b = (-10.0f64).exp().atan();
        let a = 10.0f64.exp().atan() - b;
        let mut before = f64::INFINITY;
        for i in 0..=1000 {
            let u = f64::from(i) / 1000.0;
            let (alpha, sigma) = path.alpha_sigma(u);
            assert!((alpha * alpha + sigma * sigma - 1.0).abs() < 1e-12, "{u}");
            let log_snr = 2.0 * path.lambda(u);
            assert!((log_snr + 2.0 * (a * u + b).tan().ln()).abs() < 1e-6, "{u}: {log_snr}");
            assert!((path.embed(u) - log_snr).abs() < 1e-6 && log_snr < before, "{u}: {log_snr}");
            before = log_snr;
        }
        assert!((path.embed(0.0) - 20.0).abs() < 1e-9 && (path.embed(1.0) + 20.0).abs() < 1e-9);
        assert_eq!(CosineLogSnr::default().embed(0.25), 250.0);
    }
}
