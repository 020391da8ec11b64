//! A schedule of steps: β_t and ᾱ_t (paper, equations 2 and 3), and the reverse steps that follow from them.

use anyhow::{Result, ensure};

/// β_t and ᾱ_t for t = 0 … T−1, in float64 on the host.
#[derive(Debug, Clone)]
pub struct NoiseSchedule {
    /// β_t, one a step.
    pub beta: Vec<f64>,
    /// ᾱ_t = Π (1 − β)
    pub alpha_bar: Vec<f64>,
}

impl NoiseSchedule {
    /// Of these β; `zero_terminal_snr` stretches it so that nothing of the data is left at the last step.
    ///
    /// # Errors
    /// One step alone, which cannot be stretched.
    pub fn of_betas(beta: Vec<f64>, zero_terminal_snr: bool) -> Result<Self> {
        let alpha_bar = beta
            .iter()
            .scan(1.0, |product, b| {
                *product *= 1.0 - b;
                Some(*product)
            })
            .collect();
        let schedule = NoiseSchedule { beta, alpha_bar };
        if zero_terminal_snr { schedule.stretched() } else { Ok(schedule) }
    }

    /// √ᾱ moved and stretched so that the last is 0 and the first stays (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    fn stretched(&self) -> Result<Self> {
        ensure!(self.steps() >= 2, "schedule.zero_terminal_snr: there is one step alone");
        let root: Vec<f64> = self.alpha_bar.iter().map(|a| a.sqrt()).collect();
        let (first, last) = (root[0], root[root.len() - 1]);
        let alpha_bar: Vec<f64> = root.iter().map(|r| ((r - last) * first / (first - last)).powi(2)).collect();
        let before = std::iter::once(1.0).chain(alpha_bar.iter().copied());
        let beta = alpha_bar.iter().zip(before).map(|(now, before)| 1.0 - now / before).collect();
        Ok(NoiseSchedule { beta, alpha_bar })
    }

    /// T
    pub fn steps(&self) -> i64 {
        self.beta.len() as i64
    }

    /// Whether nothing of the data is left at the last step.
    pub fn ends_in_noise(&self) -> bool {
        self.alpha_bar.last().is_some_and(|last| *last < 1e-12)
    }

    /// The chain of these times alone, which rise: ᾱ of each, and the β between neighbours.
    pub fn at(&self, times: &[i64]) -> Self {
        let alpha_bar: Vec<f64> = times.iter().map(|&t| self.alpha_bar[t as usize]).collect();
        let before = std::iter::once(1.0).chain(alpha_bar.iter().copied());
        let beta = alpha_bar.iter().zip(before).map(|(now, before)| 1.0 - now / before).collect();
        NoiseSchedule { beta, alpha_bar }
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
