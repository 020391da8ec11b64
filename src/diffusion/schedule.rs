//! How much noise there is at each diffusion time (paper, equations 2 and 3).

use std::{cell::OnceCell, rc::Rc};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::torch::upload;

/// How β grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Linear in √β: what the released configurations call "linear".
    ScaledLinear,
    /// Linear in β (Ho et al. 2020).
    Linear,
}

/// The default is the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScheduleConfig {
    /// How β grows.
    pub kind: ScheduleKind,
    /// T
    pub steps: i64,
    /// β of the first step.
    pub beta_start: f64,
    /// β of the last step.
    pub beta_end: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        ScheduleConfig { kind: ScheduleKind::ScaledLinear, steps: 1000, beta_start: 0.0015, beta_end: 0.0155 }
    }
}

/// β_t and ᾱ_t for t = 0 … T−1, in float64 on the host.
#[derive(Debug, Clone)]
pub struct NoiseSchedule {
    /// β_t, one a step.
    pub beta: Vec<f64>,
    /// ᾱ_t = Π (1 − β)
    pub alpha_bar: Vec<f64>,
    /// ᾱ where networks compute, from the first time that it is asked for there.
    on_device: Rc<OnceCell<Tensor>>,
}

impl NoiseSchedule {
    /// # Errors
    /// Where β leaves (0, 1) or there is no step.
    pub fn new(config: &ScheduleConfig) -> Result<Self> {
        let ScheduleConfig { kind, steps, beta_start, beta_end } = *config;
        ensure!(
            (1..=1_000_000).contains(&steps),
            "schedule.steps must be at least 1 and at most 1,000,000, not {steps}"
        );
        ensure!(
            0.0 < beta_start && beta_start <= beta_end && beta_end < 1.0,
            "schedule: beta_start = {beta_start} and beta_end = {beta_end} must satisfy 0 < beta_start ≤ beta_end < 1"
        );
        let line = |from: f64, to: f64, i: i64| {
            if steps == 1 { from } else { from + (to - from) * i as f64 / (steps - 1) as f64 }
        };
        let beta: Vec<f64> = (0..steps)
            .map(|i| match kind {
                ScheduleKind::ScaledLinear => line(beta_start.sqrt(), beta_end.sqrt(), i).powi(2),
                ScheduleKind::Linear => line(beta_start, beta_end, i),
            })
            .collect();
        let alpha_bar = beta
            .iter()
            .scan(1.0, |product, b| {
                *product *= 1.0 - b;
                Some(*product)
            })
            .collect();
        Ok(NoiseSchedule { beta, alpha_bar, on_device: Rc::default() })
    }

    /// T
    pub fn steps(&self) -> i64 {
        self.beta.len() as i64
    }

    /// √ᾱ_t·z_0 + √(1−ᾱ_t)·noise, for t `[B]` int64 (equation 3).
    pub fn add_noise(&self, z_0: &Tensor, t: &Tensor, noise: &Tensor) -> Tensor {
        let (signal, sigma) = self.rates(t, z_0);
        signal * z_0 + sigma * noise
    }

    /// √ᾱ_t·noise − √(1−ᾱ_t)·z_0, for t `[B]` int64.
    pub fn velocity(&self, z_0: &Tensor, t: &Tensor, noise: &Tensor) -> Tensor {
        let (signal, sigma) = self.rates(t, z_0);
        signal * noise - sigma * z_0
    }

    /// (√ᾱ_t, √(1−ᾱ_t)) of each sample, shaped to multiply `like` `[B, …]`.
    pub fn rates(&self, t: &Tensor, like: &Tensor) -> (Tensor, Tensor) {
        let mut shape = vec![1; like.dim()];
        shape[0] = -1;
        let all = self.on_device.get_or_init(|| upload(&Tensor::from_slice(&self.alpha_bar), t.device()));
        let alpha_bar: Tensor = all.to_device(t.device()).index_select(0, t);
        let shaped = |x: Tensor| x.to_kind(like.kind()).to_device(like.device()).reshape(&shape);
        (shaped(alpha_bar.sqrt()), shaped((&alpha_bar * -1.0 + 1.0).sqrt()))
    }

    /// The chain of these times alone, which rise: ᾱ of each, and the β between neighbours.
    pub fn at(&self, times: &[i64]) -> Self {
        let alpha_bar: Vec<f64> = times.iter().map(|&t| self.alpha_bar[t as usize]).collect();
        let before = std::iter::once(1.0).chain(alpha_bar.iter().copied());
        let beta = alpha_bar.iter().zip(before).map(|(now, before)| 1.0 - now / before).collect();
        NoiseSchedule { beta, alpha_bar, on_device: Rc::default() }
    }

    /// ᾱ before t; 1 before the first.
    fn alpha_bar_before(&self, t: usize) -> f64 {
        if t == 0 { 1.0 } else { self.alpha_bar[t - 1] }
    }

    /// Variance of q(z_{t−1} | z_t, z_0).
    pub fn posterior_variance(&self, t: usize) -> f64 {
        self.beta[t] * (1.0 - self.alpha_bar_before(t)) / (1.0 - self.alpha_bar[t])
    }

    /// Mean of q(z_{t−1} | z_t, z_0): the coefficients of z_0 and z_t.
    pub fn posterior_mean(&self, t: usize) -> (f64, f64) {
        let (before, now) = (self.alpha_bar_before(t), self.alpha_bar[t]);
        (self.beta[t] * before.sqrt() / (1.0 - now), (1.0 - before) * (1.0 - self.beta[t]).sqrt() / (1.0 - now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_rates_keep_the_variance() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        assert!(schedule.alpha_bar.windows(2).all(|w| w[1] < w[0]));
        for t in [0, 10, 500, 999] {
            // posterior of a unit Gaussian: variance(mean) + variance = 1
            let (a, b) = schedule.posterior_mean(t);
            let (ab, before) = (schedule.alpha_bar[t], schedule.alpha_bar_before(t));
            let cov = ab.sqrt(); // cov(z_0, z_t) with var(z_0) = 1
            let total = a * a + b * b + 2.0 * a * b * cov + schedule.posterior_variance(t);
            assert!((total - 1.0).abs() < 1e-9, "t = {t}: {total} (before {before})");
        }
    }

    /// ᾱ goes to the device once, for a schedule and its clones, and is that of each t.
    #[test]
    fn alpha_bar_is_uploaded_once() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let t = [3i64, 999, 0];
        let like = Tensor::zeros([3, 1, 2], (tch::Kind::Double, tch::Device::Cpu));
        let mut places = Vec::new();
        for schedule in [&schedule, &schedule.clone(), &schedule] {
            let (signal, sigma) = schedule.rates(&Tensor::from_slice(&t), &like);
            assert_eq!(signal.size(), [3, 1, 1]);
            for (i, &t) in t.iter().enumerate() {
                let place = [i as i64, 0, 0];
                assert_eq!(signal.double_value(&place), schedule.alpha_bar[t as usize].sqrt());
                assert_eq!(sigma.double_value(&place), (1.0 - schedule.alpha_bar[t as usize]).sqrt());
            }
            places.push(schedule.on_device.get().unwrap().data_ptr());
        }
        assert!(places.iter().all(|place| *place == places[0]));
    }

    #[test]
    fn impossible_betas_are_refused() {
        let config = ScheduleConfig { beta_end: 1.5, ..Default::default() };
        assert!(NoiseSchedule::new(&config).unwrap_err().to_string().contains("beta_end = 1.5"));
    }
}
