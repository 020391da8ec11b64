//! The noise path in steps, by how β grows.

use anyhow::{Result, ensure};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::{
    path::{NoisePath, NoisePathSettings},
    schedule::NoiseSchedule,
};

/// How β grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Linear in √β: what the released configurations call "linear".
    ScaledLinear,
    /// Linear in β (Ho et al. 2020).
    Linear,
}

/// β that grow from one value to another; the default is the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct ScheduleConfig {
    /// How β grows.
    pub kind: ScheduleKind,
    /// T, the number of steps of the noise path; those of sampling are the sampler's.
    pub steps: i64,
    /// β of the first step.
    pub beta_start: f64,
    /// β of the last step.
    pub beta_end: f64,
    /// Stretched so that nothing of the data is left at the last step.
    pub zero_terminal_snr: bool,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        ScheduleConfig {
            kind: ScheduleKind::ScaledLinear,
            steps: 1000,
            beta_start: 0.0015,
            beta_end: 0.0155,
            zero_terminal_snr: false,
        }
    }
}

impl NoisePathSettings for ScheduleConfig {
    fn build(&self) -> Result<Box<dyn NoisePath>> {
        Ok(Box::new(NoiseSchedule::new(self)?))
    }
}

/// ᾱ falls as a squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CosineSchedule {
    /// T, the number of steps of the noise path; those of sampling are the sampler's.
    pub steps: i64,
    /// No β is larger; 1 leaves nothing of the data at the last step.
    pub max_beta: f64,
    /// Stretched so that nothing of the data is left at the last step.
    pub zero_terminal_snr: bool,
}

impl Default for CosineSchedule {
    fn default() -> Self {
        CosineSchedule { steps: 1000, max_beta: 0.999, zero_terminal_snr: false }
    }
}

impl CosineSchedule {
    /// # Errors
    /// No step, or a `max_beta` that is no part of the signal.
    pub fn schedule(&self) -> Result<NoiseSchedule> {
        let CosineSchedule { steps, max_beta, zero_terminal_snr } = *self;
        check_steps(steps)?;
        ensure!(0.0 < max_beta && max_beta <= 1.0, "schedule.max_beta must be above 0 and at most 1, not {max_beta}");
        let alpha_bar =
            |i: i64| ((i as f64 / steps as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
        let beta = (0..steps).map(|t| (1.0 - alpha_bar(t + 1) / alpha_bar(t)).clamp(1e-9, max_beta)).collect();
        NoiseSchedule::of_betas(beta, zero_terminal_snr)
    }
}

impl NoisePathSettings for CosineSchedule {
    fn build(&self) -> Result<Box<dyn NoisePath>> {
        Ok(Box::new(self.schedule()?))
    }
}

fn check_steps(steps: i64) -> Result<()> {
    ensure!((1..=1_000_000).contains(&steps), "schedule.steps must be at least 1 and at most 1,000,000, not {steps}");
    Ok(())
}

impl NoiseSchedule {
    /// # Errors
    /// Where β leaves (0, 1) or there is no step.
    pub fn new(config: &ScheduleConfig) -> Result<Self> {
        let ScheduleConfig { kind, steps, beta_start, beta_end, zero_terminal_snr } = *config;
        check_steps(steps)?;
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
        NoiseSchedule::of_betas(beta, zero_terminal_snr)
    }
}

impl NoisePath for NoiseSchedule {
    fn alpha_sigma(&self, t: f64) -> (f64, f64) {
        let alpha_bar = self.alpha_bar[t as usize];
        (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt())
    }

    fn draw(&self, random: &mut dyn Rng) -> f64 {
        random.random_range(0..self.steps()) as f64
    }

    fn noisiest(&self) -> f64 {
        (self.steps() - 1) as f64
    }

    /// From T − 1 to 0, as evenly spaced as they can be in λ = log(√ᾱ/√(1−ᾱ)).
    fn nodes(&self, steps: i64) -> Result<Vec<f64>> {
        let total = self.steps();
        ensure!((2..=total).contains(&steps), "steps must be between 2 and the schedule's {total}, not {steps}");
        let lambda = |t: i64| self.lambda(t as f64);
        let mut times: Vec<f64> = Vec::new();
        let mut t = total;
        // at a last step of nothing but noise λ is −∞: the others are spaced without it
        let alone = i64::from(self.ends_in_noise());
        if alone == 1 {
            t = total - 1;
            times.push(t as f64);
        }
        let (first, last) = (lambda(t - 1), lambda(0));
        for i in alone..steps {
            let wanted = match steps - 1 - alone {
                0 => last,
                intervals => first + (last - first) * (i - alone) as f64 / intervals as f64,
            };
            // below the one before, and with room for those that follow
            let (least, most) = (steps - 1 - i, t - 1);
            let found = (least..=most).rev().find(|&t| lambda(t) >= wanted - 1e-12).unwrap_or(least);
            let nearer = found < most && (lambda(found) - wanted).abs() > (lambda(found + 1) - wanted).abs();
            t = if nearer { found + 1 } else { found };
            times.push(t as f64);
        }
        Ok(times)
    }

    fn embed(&self, t: f64) -> f64 {
        t
    }

    fn lambda(&self, t: f64) -> f64 {
        let alpha_bar = self.alpha_bar[t as usize];
        0.5 * (alpha_bar / (1.0 - alpha_bar)).ln()
    }

    fn levels(&self) -> i64 {
        self.steps()
    }

    fn level_time(&self, level: i64) -> f64 {
        level as f64
    }

    fn discrete(&self) -> Option<&NoiseSchedule> {
        Some(self)
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
            let ab = schedule.alpha_bar[t];
            let cov = ab.sqrt(); // cov(z_0, z_t) with var(z_0) = 1
            let total = a * a + b * b + 2.0 * a * b * cov + schedule.posterior_variance(t);
            assert!((total - 1.0).abs() < 1e-9, "t = {t}: {total}");
        }
    }

    /// The last step is noise alone, and the solvers begin there; the first stays as it was.
    #[test]
    fn a_stretched_schedule_ends_in_noise() {
        let plain = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let config = ScheduleConfig { zero_terminal_snr: true, ..Default::default() };
        let stretched = NoiseSchedule::new(&config).unwrap();
        assert!(stretched.ends_in_noise() && !plain.ends_in_noise());
        assert_eq!((stretched.alpha_bar[999], stretched.beta[999]), (0.0, 1.0));
        assert!((stretched.alpha_bar[0] - plain.alpha_bar[0]).abs() < 1e-12);
        assert!(stretched.alpha_bar.windows(2).all(|pair| pair[1] < pair[0]));
        for steps in [2, 3, 20, 1000] {
            let nodes = stretched.nodes(steps).unwrap();
            assert_eq!((nodes.len() as i64, nodes[0], nodes[nodes.len() - 1]), (steps, 999.0, 0.0), "{steps} steps");
            assert!(nodes.windows(2).all(|pair| pair[0] > pair[1]), "{nodes:?}");
        }
        let cosine = CosineSchedule { max_beta: 1.0, ..Default::default() }.schedule().unwrap();
        assert!(cosine.ends_in_noise());
        assert!(!CosineSchedule::default().schedule().unwrap().ends_in_noise());
        // half way g is cos²(π/4·(1 + 0.016/1.008 − …)): near a half
        assert!((cosine.alpha_bar[499] - 0.49).abs() < 0.02, "{}", cosine.alpha_bar[499]);
        assert!(CosineSchedule { max_beta: 1.5, ..Default::default() }.schedule().is_err());
    }

    #[test]
    fn impossible_betas_are_refused() {
        let config = ScheduleConfig { beta_end: 1.5, ..Default::default() };
        assert!(NoiseSchedule::new(&config).unwrap_err().to_string().contains("beta_end = 1.5"));
    }
}
