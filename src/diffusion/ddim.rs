//! Sampling with noise: DDPM, and DDIM, which can do without.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    path::NoisePath,
    prediction::Prediction,
    sampler::{Sampler, SamplerRun},
    schedule::NoiseSchedule,
};

/// The variance of DDPM's reverse steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// That of q(z_{t−1} | z_t, z_0) (the released code).
    Posterior,
    /// β_t (the paper's text).
    Beta,
}

/// Ancestral sampling over all T steps (Ho et al. 2020), z_0 not clipped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct Ddpm {
    /// Of each step.
    pub variance: Variance,
}

impl Default for Ddpm {
    fn default() -> Self {
        Ddpm { variance: Variance::Posterior }
    }
}

struct DdpmRun {
    schedule: NoiseSchedule,
    times: Vec<f64>,
    variance: Variance,
}

impl Sampler for Ddpm {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        let Some(schedule) = path.discrete() else {
            bail!("ddpm walks all steps of a schedule, and this path has none: take kind: ddim with eta: 1")
        };
        let times = (0..schedule.steps()).rev().map(|t| t as f64).collect();
        Ok(Box::new(DdpmRun { schedule: schedule.clone(), times, variance: self.variance }))
    }

    fn describe(&self) -> String {
        match self.variance {
            Variance::Posterior => "DDPM, posterior variance".into(),
            Variance::Beta => "DDPM, variance β".into(),
        }
    }
}

impl SamplerRun for DdpmRun {
    fn times(&self) -> &[f64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        let t = self.times[i] as usize;
        let (of_z_0, of_z_t) = self.schedule.posterior_mean(t);
        let mean = &prediction.z_0 * of_z_0 + &prediction.z_t * of_z_t;
        if t == 0 {
            return mean;
        }
        let variance = match self.variance {
            Variance::Posterior => self.schedule.posterior_variance(t),
            Variance::Beta => self.schedule.beta[t],
        };
        mean + noise() * variance.sqrt()
    }
}

/// Song et al. 2021, arXiv 2010.02502. η = 0 is deterministic, η = 1 as noisy as DDPM.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct Ddim {
    /// Network calls.
    pub steps: i64,
    /// 0 is deterministic, 1 as noisy as DDPM.
    pub eta: f64,
}

impl Default for Ddim {
    /// The released script's.
    fn default() -> Self {
        Ddim { steps: 50, eta: 1.0 }
    }
}

/// The constants of a DDIM walk, in order of rising time, float64.
pub struct DdimPlan {
    pub timesteps: Vec<i64>,
    pub alpha_bar: Vec<f64>,
    pub alpha_bar_before: Vec<f64>,
    pub sigma: Vec<f64>,
}

impl Ddim {
    /// The released "uniform" steps: with c = T // S, 1 + j·c for all j·c < T. Where S does not divide T
    /// these are more than S; a last one that would be T itself is left out. On a schedule that ends in noise alone they
    /// are T·j/S − 1 instead, so that the walk begins at its last step, and it ends without noise.
    ///
    /// # Errors
    /// Where S is not between 1 and T, or η is not in [0, 1].
    pub fn plan(&self, schedule: &NoiseSchedule) -> Result<DdimPlan> {
        let total = schedule.steps();
        ensure!(
            (1..=total).contains(&self.steps),
            "DDIM steps must be between 1 and the schedule's {total}, not {}",
            self.steps
        );
        ensure!((0.0..=1.0).contains(&self.eta), "DDIM eta must be in [0, 1], not {}", self.eta);
        let to_the_end = schedule.ends_in_noise();
        let stride = total / self.steps;
        let mut timesteps: Vec<i64> = match to_the_end {
            false => (0..total).step_by(stride as usize).map(|t| t + 1).filter(|&t| t < total).collect(),
            true => {
                (1..=self.steps).map(|j| (total as f64 * j as f64 / self.steps as f64).round() as i64 - 1).collect()
            }
        };
        if timesteps.is_empty() {
            timesteps.push(0); // a schedule of one step
        }
        let alpha_bar: Vec<f64> = timesteps.iter().map(|&t| schedule.alpha_bar[t as usize]).collect();
        let first = if to_the_end { 1.0 } else { schedule.alpha_bar[0] };
        let alpha_bar_before: Vec<f64> = std::iter::once(first).chain(alpha_bar.iter().copied()).collect();
        let sigma = alpha_bar
            .iter()
            .zip(&alpha_bar_before)
            .map(|(now, before)| self.eta * ((1.0 - before) / (1.0 - now) * (1.0 - now / before)).sqrt())
            .collect();
        Ok(DdimPlan { alpha_bar_before: alpha_bar_before[..alpha_bar.len()].to_vec(), timesteps, alpha_bar, sigma })
    }
}

struct DdimRun {
    times: Vec<f64>,
    steps: Vec<DdimStep>,
}

/// z ← α·z_0 + direction·ε + σ·noise
struct DdimStep {
    alpha: f64,
    direction: f64,
    sigma: f64,
}

impl Ddim {
    fn run(&self, schedule: &NoiseSchedule) -> Result<DdimRun> {
        let plan = self.plan(schedule)?;
        let step = |(&before, &sigma): (&f64, &f64)| DdimStep {
            alpha: before.sqrt(),
            direction: (1.0 - before - sigma * sigma).max(0.0).sqrt(),
            sigma,
        };
        Ok(DdimRun {
            times: plan.timesteps.iter().rev().map(|&t| t as f64).collect(),
            steps: plan.alpha_bar_before.iter().zip(&plan.sigma).rev().map(step).collect(),
        })
    }

    /// On a path in continuous time, along its own nodes: σ is η times the deviation of q(z_next | z_t, z_0).
    fn run_along(&self, path: &dyn NoisePath) -> Result<DdimRun> {
        ensure!((0.0..=1.0).contains(&self.eta), "DDIM eta must be in [0, 1], not {}", self.eta);
        let times = path.nodes(self.steps)?;
        let rates: Vec<(f64, f64)> = times.iter().map(|&t| path.alpha_sigma(t)).chain([(1.0, 0.0)]).collect();
        let step = |pair: &[(f64, f64)]| {
            let ((alpha, sigma), (next, noise)) = (pair[0], pair[1]);
            let added = (sigma * sigma - (alpha / next * noise).powi(2)).max(0.0).sqrt();
            let fresh = self.eta * noise / sigma * added;
            DdimStep { alpha: next, direction: (noise * noise - fresh * fresh).max(0.0).sqrt(), sigma: fresh }
        };
        Ok(DdimRun { steps: rates.windows(2).map(step).collect(), times })
    }
}

impl Sampler for Ddim {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        Ok(Box::new(match path.discrete() {
            Some(schedule) => self.run(schedule)?,
            None => self.run_along(path)?,
        }))
    }

    fn describe(&self) -> String {
        format!("DDIM {} steps, η = {}", self.steps, self.eta)
    }
}

impl SamplerRun for DdimRun {
    fn times(&self) -> &[f64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        let DdimStep { alpha, direction, sigma } = self.steps[i];
        let z = &prediction.z_0 * alpha + &prediction.noise * direction;
        if sigma == 0.0 { z } else { z + noise() * sigma }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::ScheduleConfig;

    #[test]
    fn ddim_never_leaves_the_schedule() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for steps in 1..=1000 {
            let plan = Ddim { steps, eta: 1.0 }.plan(&schedule).unwrap();
            assert!(plan.timesteps.iter().all(|&t| (1..1000).contains(&t)), "{steps} steps");
            assert!(plan.timesteps.windows(2).all(|w| w[0] < w[1]));
            assert!(plan.sigma.iter().all(|s| s.is_finite()));
        }
        let count = |steps| Ddim { steps, eta: 0.0 }.plan(&schedule).unwrap().timesteps.len();
        assert_eq!((count(50), count(7), count(3), count(999), count(1000)), (50, 8, 3, 999, 999));
    }

    #[test]
    fn impossible_steps_are_refused() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for steps in [0, 1001] {
            assert!(Ddim { steps, eta: 0.0 }.plan(&schedule).is_err());
        }
    }

    #[test]
    fn on_a_schedule_that_ends_in_noise_it_begins_there() {
        let config = ScheduleConfig { zero_terminal_snr: true, ..Default::default() };
        let schedule = NoiseSchedule::new(&config).unwrap();
        for steps in [1, 7, 50, 1000] {
            let run = Ddim { steps, eta: 0.5 }.run(&schedule).unwrap();
            assert_eq!((run.times.len() as i64, run.times[0]), (steps, 999.0));
            let last = run.steps.last().unwrap();
            assert_eq!((last.alpha, last.direction, last.sigma), (1.0, 0.0, 0.0));
            assert!(run.steps.iter().all(|step| step.direction.is_finite() && step.sigma.is_finite()));
        }
    }
}
