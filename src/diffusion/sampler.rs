//! From noise to latents: one loop, and what differs between samplers.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Tensor, no_grad};

use super::{Denoiser, NoiseSchedule, Prediction};

/// A way of walking from noise to z_0. It knows nothing of masks, guidance or text.
pub trait Sampler {
    /// # Errors
    /// Where its settings do not fit the schedule.
    fn start(&self, schedule: &NoiseSchedule) -> Result<Box<dyn SamplerRun>>;
}

/// One walk; it may remember earlier predictions.
pub trait SamplerRun {
    /// Diffusion times in the order in which they are visited.
    fn timesteps(&self) -> &[i64];

    /// The next z after the i-th step. `noise()` draws a standard normal of z's shape.
    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor;
}

/// Walks from z_T to z_0 without gradients. `noise(i)` draws the noise of step i; `on_step(i, steps)` is told of progress.
///
/// # Errors
/// Where the sampler's settings do not fit the schedule.
pub fn sample(
    denoiser: &dyn Denoiser,
    sampler: &dyn Sampler,
    schedule: &NoiseSchedule,
    z_t: &Tensor,
    noise: &dyn Fn(usize) -> Tensor,
    on_step: &mut dyn FnMut(usize, usize),
) -> Result<Tensor> {
    let mut run = sampler.start(schedule)?;
    let times = run.timesteps().to_vec();
    let mut z = z_t.shallow_clone();
    for (i, &t) in times.iter().enumerate() {
        z = no_grad(|| {
            let prediction = denoiser.predict(&z, t);
            run.step(i, &prediction, &|| noise(i))
        });
        on_step(i + 1, times.len());
    }
    Ok(z)
}

/// The variance of DDPM's reverse steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// That of q(z_{t−1} | z_t, z_0) (the released code).
    Posterior,
    /// β_t (the paper's text).
    Beta,
}

/// Ancestral sampling over all T steps (Ho et al. 2020), z_0 not clipped.
pub struct Ddpm {
    pub variance: Variance,
}

struct DdpmRun {
    schedule: NoiseSchedule,
    times: Vec<i64>,
    variance: Variance,
}

impl Sampler for Ddpm {
    fn start(&self, schedule: &NoiseSchedule) -> Result<Box<dyn SamplerRun>> {
        let times = (0..schedule.steps()).rev().collect();
        Ok(Box::new(DdpmRun { schedule: schedule.clone(), times, variance: self.variance }))
    }
}

impl SamplerRun for DdpmRun {
    fn timesteps(&self) -> &[i64] {
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

/// Song et al. 2021. η = 0 is deterministic, η = 1 as noisy as DDPM.
pub struct Ddim {
    pub steps: i64,
    pub eta: f64,
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
    /// these are more than S; a last one that would be T itself is left out.
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
        let stride = total / self.steps;
        let mut timesteps: Vec<i64> =
            (0..total).step_by(stride as usize).map(|t| t + 1).filter(|&t| t < total).collect();
        if timesteps.is_empty() {
            timesteps.push(0); // a schedule of one step
        }
        let alpha_bar: Vec<f64> = timesteps.iter().map(|&t| schedule.alpha_bar[t as usize]).collect();
        let alpha_bar_before: Vec<f64> =
            std::iter::once(schedule.alpha_bar[0]).chain(alpha_bar.iter().copied()).collect();
        let sigma = alpha_bar
            .iter()
            .zip(&alpha_bar_before)
            .map(|(now, before)| self.eta * ((1.0 - before) / (1.0 - now) * (1.0 - now / before)).sqrt())
            .collect();
        Ok(DdimPlan { alpha_bar_before: alpha_bar_before[..alpha_bar.len()].to_vec(), timesteps, alpha_bar, sigma })
    }
}

struct DdimRun {
    plan: DdimPlan,
    times: Vec<i64>,
}

impl Sampler for Ddim {
    fn start(&self, schedule: &NoiseSchedule) -> Result<Box<dyn SamplerRun>> {
        let plan = self.plan(schedule)?;
        let times = plan.timesteps.iter().rev().copied().collect();
        Ok(Box::new(DdimRun { plan, times }))
    }
}

impl SamplerRun for DdimRun {
    fn timesteps(&self) -> &[i64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        let at = self.times.len() - 1 - i;
        let (before, sigma) = (self.plan.alpha_bar_before[at], self.plan.sigma[at]);
        let direction = (1.0 - before - sigma * sigma).max(0.0).sqrt();
        let z = &prediction.z_0 * before.sqrt() + &prediction.noise * direction;
        if sigma == 0.0 { z } else { z + noise() * sigma }
    }
}

/// Which sampler, as an experiment or the command line says it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SamplerConfig {
    Ddpm { variance: Variance },
    Ddim { steps: i64, eta: f64 },
}

impl Default for SamplerConfig {
    /// The released script's: DDIM, 50 steps, η = 1.
    fn default() -> Self {
        SamplerConfig::Ddim { steps: 50, eta: 1.0 }
    }
}

impl SamplerConfig {
    pub fn build(self) -> Box<dyn Sampler> {
        match self {
            SamplerConfig::Ddpm { variance } => Box::new(Ddpm { variance }),
            SamplerConfig::Ddim { steps, eta } => Box::new(Ddim { steps, eta }),
        }
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

    /// With the exact score of a Gaussian the walk must arrive at that Gaussian.
    #[test]
    fn a_gaussian_is_sampled_exactly() {
        struct Exact(NoiseSchedule);
        const VARIANCE: f64 = 0.25;
        const MEAN: f64 = 0.7;
        impl Denoiser for Exact {
            fn predict(&self, z_t: &Tensor, t: i64) -> Prediction {
                let a = self.0.alpha_bar[t as usize];
                let gain = a.sqrt() * VARIANCE / (a * VARIANCE + 1.0 - a);
                let z_0 = MEAN + (z_t - a.sqrt() * MEAN) * gain;
                let noise = (z_t - &z_0 * a.sqrt()) / (1.0 - a).sqrt();
                Prediction { z_t: z_t.shallow_clone(), z_0, noise }
            }
        }
        use crate::random::{Purpose, normal};
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let shape = [1, 1, 1, 100, 200];
        let samplers: [(&str, Box<dyn Sampler>); 4] = [
            ("ddpm", Box::new(Ddpm { variance: Variance::Posterior })),
            ("ddpm beta", Box::new(Ddpm { variance: Variance::Beta })),
            ("ddim 0", Box::new(Ddim { steps: 100, eta: 0.0 })),
            ("ddim 1", Box::new(Ddim { steps: 250, eta: 1.0 })),
        ];
        for (name, sampler) in samplers {
            let z = sample(
                &Exact(schedule.clone()),
                &*sampler,
                &schedule,
                &normal(1, Purpose::SampleStart, 0, 0, &shape),
                &|i| normal(1, Purpose::SampleStep, 0, i as u64, &shape),
                &mut |_, _| {},
            )
            .unwrap();
            let (mean, std) = (z.mean(None).double_value(&[]), z.std(true).double_value(&[]));
            assert!((mean - MEAN).abs() < 0.02 && (std - VARIANCE.sqrt()).abs() < 0.02, "{name}: {mean} ± {std}");
        }
    }
}
