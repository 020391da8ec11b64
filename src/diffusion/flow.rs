//! Rectified flow (Liu et al. 2023, arXiv 2209.03003): a straight line from z_0 at time 0 to noise at time 1.

use anyhow::{Result, ensure};
use rand::{Rng, RngExt, distr::Open01};
use serde::{Deserialize, Serialize};

use super::path::{NoisePath, NoisePathSettings, at_least, normal_quantile};

/// z_t = (1−t)·z_0 + t·ε. The network is told 1000·t.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RectifiedFlow {
    /// Which times are trained on.
    pub times: FlowTimes,
    /// Moves times of training and sampling towards noise: s·t / (1 + (s−1)·t) (Esser et al. 2024, arXiv 2403.03206,
    /// equation 23). Large latents want more: √(tokens/tokens of the base). 1: none.
    pub shift: f64,
}

/// How training times are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum FlowTimes {
    /// All alike.
    Uniform,
    /// ln(t/(1−t)) is normal: the middle more often.
    LogitNormal {
        /// Above 0: more noise.
        mean: f64,
        /// Standard deviation.
        std: f64,
    },
}

impl Default for RectifiedFlow {
    fn default() -> Self {
        RectifiedFlow { times: FlowTimes::Uniform, shift: 1.0 }
    }
}

impl RectifiedFlow {
    /// The training time of a number that is uniform in (0, 1).
    pub fn time_of(&self, u: f64) -> f64 {
        self.shifted(match self.times {
            FlowTimes::Uniform => u,
            FlowTimes::LogitNormal { mean, std } => 1.0 / (1.0 + (-(mean + std * normal_quantile(u))).exp()),
        })
    }

    fn shifted(&self, t: f64) -> f64 {
        self.shift * t / (1.0 + (self.shift - 1.0) * t)
    }
}

impl NoisePathSettings for RectifiedFlow {
    fn build(&self) -> Result<Box<dyn NoisePath>> {
        ensure!(self.shift.is_finite() && self.shift > 0.0, "shift must be positive, not {}", self.shift);
        if let FlowTimes::LogitNormal { mean, std } = self.times {
            ensure!(
                mean.is_finite() && std.is_finite() && std > 0.0,
                "times: mean = {mean} and std = {std} must be finite, and std positive"
            );
        }
        Ok(Box::new(self.clone()))
    }
}

impl NoisePath for RectifiedFlow {
    fn alpha_sigma(&self, t: f64) -> (f64, f64) {
        (1.0 - t, t)
    }

    fn draw(&self, random: &mut dyn Rng) -> f64 {
        self.time_of(random.sample(Open01))
    }

    fn noisiest(&self) -> f64 {
        1.0
    }

    /// 1 − i/S, shifted.
    fn nodes(&self, steps: i64) -> Result<Vec<f64>> {
        at_least(1, steps)?;
        Ok((0..steps).map(|i| self.shifted(1.0 - i as f64 / steps as f64)).collect())
    }

    fn embed(&self, t: f64) -> f64 {
        1000.0 * t
    }

    fn clean(&self) -> Option<f64> {
        Some(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    #[test]
    fn times_are_drawn_as_they_are_asked_for() {
        let mean = |times, shift: f64| {
            let path = RectifiedFlow { times, shift };
            let drawn: Vec<f64> = (0..4000).map(|i| path.draw(&mut stream(1, Purpose::DiffusionTime, i, 0))).collect();
            assert!(drawn.iter().all(|t| 0.0 < *t && *t < 1.0));
            drawn.iter().sum::<f64>() / 4000.0
        };
        let normal = |mean| FlowTimes::LogitNormal { mean, std: 1.0 };
        // E[3t/(1+2t)] = 3/2 − 3/4·ln 3
        for (found, wanted) in [
            (mean(FlowTimes::Uniform, 1.0), 0.5),
            (mean(FlowTimes::Uniform, 3.0), 1.5 - 0.75 * 3f64.ln()),
            (mean(normal(0.0), 1.0), 0.5),
        ] {
            assert!((found - wanted).abs() < 0.02, "{found}, not {wanted}");
        }
        assert!(mean(normal(1.0), 1.0) > 0.6);
    }

    #[test]
    fn nonsense_is_refused() {
        for (path, word) in [
            (RectifiedFlow { shift: 0.0, ..Default::default() }, "shift"),
            (RectifiedFlow { times: FlowTimes::LogitNormal { mean: 0.0, std: 0.0 }, shift: 1.0 }, "std"),
        ] {
            let error = path.build().err().unwrap().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(RectifiedFlow::default().nodes(0).is_err());
        assert_eq!(RectifiedFlow::default().nodes(4).unwrap(), [1.0, 0.75, 0.5, 0.25]);
    }
}
