//! The noise path of MCVD (Voleti et al. 2022, arXiv 2205.09853), whose networks count time from the noise to the data.

use anyhow::Result;
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{
    betas::{ScheduleConfig, ScheduleKind},
    path::{NoisePath, NoisePathSettings},
    schedule::NoiseSchedule,
};

/// β grows linearly over T steps, as for `kind: linear`, and the network is told T − 1 − t: 0 at the most noise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReversedLinear {
    /// T, the number of steps of the noise path; those of sampling are the sampler's.
    pub steps: i64,
    /// β of the step with the least noise.
    pub beta_start: f64,
    /// β of the step with the most noise.
    pub beta_end: f64,
}

impl Default for ReversedLinear {
    fn default() -> Self {
        ReversedLinear { steps: 1000, beta_start: 1e-4, beta_end: 0.02 }
    }
}

impl ReversedLinear {
    /// β and ᾱ from the least noise to the most.
    ///
    /// # Errors
    /// Those of [`NoiseSchedule::new`].
    pub fn schedule(&self) -> Result<NoiseSchedule> {
        let ReversedLinear { steps, beta_start, beta_end } = *self;
        let kind = ScheduleKind::Linear;
        NoiseSchedule::new(&ScheduleConfig { kind, steps, beta_start, beta_end, zero_terminal_snr: false })
    }
}

impl NoisePathSettings for ReversedLinear {
    fn build(&self) -> Result<Box<dyn NoisePath>> {
        Ok(Box::new(Reversed(self.schedule()?)))
    }
}

/// A schedule of steps, which the network counts from the noisiest.
struct Reversed(NoiseSchedule);

impl NoisePath for Reversed {
    fn alpha_sigma(&self, t: f64) -> (f64, f64) {
        self.0.alpha_sigma(t)
    }

    fn draw(&self, random: &mut dyn Rng) -> f64 {
        self.0.draw(random)
    }

    fn noisiest(&self) -> f64 {
        self.0.noisiest()
    }

    fn nodes(&self, steps: i64) -> Result<Vec<f64>> {
        self.0.nodes(steps)
    }

    fn embed(&self, t: f64) -> f64 {
        self.0.noisiest() - t
    }

    fn lambda(&self, t: f64) -> f64 {
        self.0.lambda(t)
    }

    fn levels(&self) -> i64 {
        self.0.levels()
    }

    fn level_time(&self, level: i64) -> f64 {
        self.0.level_time(level)
    }

    fn discrete(&self) -> Option<&NoiseSchedule> {
        self.0.discrete()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_counts_from_the_noise() {
        let path = ReversedLinear { steps: 10, ..ReversedLinear::default() }.build().unwrap();
        assert_eq!([path.embed(path.noisiest()), path.embed(0.0)], [0.0, 9.0]);
        let (signal, noise) = (path.alpha_sigma(0.0), path.alpha_sigma(path.noisiest()));
        assert!((signal.0 * signal.0 - (1.0 - 1e-4)).abs() < 1e-12 && noise.0 < signal.0, "{signal:?}, {noise:?}");
        assert!(ReversedLinear { beta_end: 1.5, ..ReversedLinear::default() }.build().is_err());
    }
}
