//! From noise to latents: one loop, and what differs between samplers.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Tensor, no_grad};

use super::{Denoiser, NoiseSchedule, Prediction, RespacedDdim, RespacedDdpm};
use crate::torch::FixedWeights;

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
    let _weights = FixedWeights::new();
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
    /// Of each step.
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
    /// Network calls.
    pub steps: i64,
    /// 0 is deterministic, 1 as noisy as DDPM.
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

/// Nodes of a solver of the probability-flow ODE, in the order of the walk: S diffusion times from T − 1 to 0, as evenly
/// spaced as they can be in λ = log(√ᾱ/√(1−ᾱ)). What follows the last node is its z_0.
struct Nodes {
    times: Vec<i64>,
    /// √ᾱ
    alpha: Vec<f64>,
    /// √(1−ᾱ)
    sigma: Vec<f64>,
    lambda: Vec<f64>,
}

impl Nodes {
    fn new(schedule: &NoiseSchedule, steps: i64) -> Result<Self> {
        let total = schedule.steps();
        ensure!((2..=total).contains(&steps), "steps must be between 2 and the schedule's {total}, not {steps}");
        let lambda = |t: i64| {
            let alpha_bar = schedule.alpha_bar[t as usize];
            0.5 * (alpha_bar / (1.0 - alpha_bar)).ln()
        };
        let (first, last) = (lambda(total - 1), lambda(0));
        let mut times = Vec::new();
        let mut t = total;
        for i in 0..steps {
            let wanted = first + (last - first) * i as f64 / (steps - 1) as f64;
            // below the one before, and with room for those that follow
            let (least, most) = (steps - 1 - i, t - 1);
            let found = (least..=most).rev().find(|&t| lambda(t) >= wanted - 1e-12).unwrap_or(least);
            let nearer = found < most && (lambda(found) - wanted).abs() > (lambda(found + 1) - wanted).abs();
            t = if nearer { found + 1 } else { found };
            times.push(t);
        }
        let alpha_bar = |&t: &i64| schedule.alpha_bar[t as usize];
        Ok(Nodes {
            alpha: times.iter().map(|t| alpha_bar(t).sqrt()).collect(),
            sigma: times.iter().map(|t| (1.0 - alpha_bar(t)).sqrt()).collect(),
            lambda: times.iter().map(|&t| lambda(t)).collect(),
            times,
        })
    }

    /// λ from node i to the next.
    fn h(&self, i: usize) -> f64 {
        self.lambda[i + 1] - self.lambda[i]
    }

    /// z at node i + 1 if the prediction of z_0 stayed as at node i.
    fn first_order(&self, i: usize, z: &Tensor, z_0: &Tensor) -> Tensor {
        z * (self.sigma[i + 1] / self.sigma[i]) - z_0 * (self.alpha[i + 1] * (-self.h(i)).exp_m1())
    }

    /// z at node i + 1 with z_0 extrapolated linearly in λ from the nodes before (Lu et al. 2022, algorithm 2).
    fn second_order(&self, i: usize, z: &Tensor, z_0: &Tensor, before: Option<&Tensor>) -> Tensor {
        match before {
            None => self.first_order(i, z, z_0),
            Some(before) => {
                let half = 0.5 * self.h(i) / self.h(i - 1);
                self.first_order(i, z, &(z_0 * (1.0 + half) - before * half))
            }
        }
    }
}

/// DPM-Solver++(2M) (Lu et al. 2022b, arXiv 2211.01095): deterministic, of second order, one call of the network a step.
pub struct DpmSolver {
    /// Network calls.
    pub steps: i64,
}

struct DpmSolverRun {
    nodes: Nodes,
    before: Option<Tensor>,
}

impl Sampler for DpmSolver {
    fn start(&self, schedule: &NoiseSchedule) -> Result<Box<dyn SamplerRun>> {
        Ok(Box::new(DpmSolverRun { nodes: Nodes::new(schedule, self.steps)?, before: None }))
    }
}

impl SamplerRun for DpmSolverRun {
    fn timesteps(&self) -> &[i64] {
        &self.nodes.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, _noise: &dyn Fn() -> Tensor) -> Tensor {
        let z_0 = prediction.z_0.shallow_clone();
        if i + 1 == self.nodes.times.len() {
            return z_0;
        }
        let z = self.nodes.second_order(i, &prediction.z_t, &z_0, self.before.as_ref());
        self.before = Some(z_0);
        z
    }
}

/// UniPC of order 2 with B(h) = e^h − 1 (Zhao et al. 2023, arXiv 2302.04867): as DPM-Solver++, and what the network says
/// at a node also corrects how the walk came there.
pub struct UniPc {
    /// Network calls.
    pub steps: i64,
}

struct UniPcRun {
    nodes: Nodes,
    /// Corrected z and z_0 at the node before.
    last: Option<(Tensor, Tensor)>,
    /// z_0 at the one before that.
    before: Option<Tensor>,
}

impl Sampler for UniPc {
    fn start(&self, schedule: &NoiseSchedule) -> Result<Box<dyn SamplerRun>> {
        Ok(Box::new(UniPcRun { nodes: Nodes::new(schedule, self.steps)?, last: None, before: None }))
    }
}

impl UniPcRun {
    /// z at node i, where the network has just said z_0.
    fn corrected(&self, i: usize, z: &Tensor, z_0: &Tensor) -> Tensor {
        let Some((from, said)) = &self.last else { return z.shallow_clone() };
        let h = self.nodes.h(i - 1);
        let base = (-h).exp_m1();
        let change = z_0 - said;
        let change = match &self.before {
            None => change * 0.5,
            Some(before) => {
                let r = -self.nodes.h(i - 2) / h;
                let first = (base / -h - 1.0) / base;
                let second = 2.0 * ((base / -h - 1.0) / -h - 0.5) / base;
                let of_before = (first - second) / (1.0 - r);
                (before - said) * (of_before / r) + change * (first - of_before)
            }
        };
        self.nodes.first_order(i - 1, from, said) - change * (self.nodes.alpha[i] * base)
    }
}

impl SamplerRun for UniPcRun {
    fn timesteps(&self) -> &[i64] {
        &self.nodes.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, _noise: &dyn Fn() -> Tensor) -> Tensor {
        let z_0 = prediction.z_0.shallow_clone();
        if i + 1 == self.nodes.times.len() {
            return z_0;
        }
        let z = self.corrected(i, &prediction.z_t, &z_0);
        self.before = self.last.take().map(|(_, said)| said);
        let next = self.nodes.second_order(i, &z, &z_0, self.before.as_ref());
        self.last = Some((z, z_0));
        next
    }
}

/// Which sampler, as an experiment or the command line says it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs)] // its variants say what their fields are
pub enum SamplerConfig {
    /// Ancestral sampling over all steps (Ho et al. 2020).
    Ddpm { variance: Variance },
    /// Song et al. 2020, arXiv 2010.02502.
    Ddim { steps: i64, eta: f64 },
    /// DPM-Solver++(2M).
    DpmSolver { steps: i64 },
    /// UniPC of order 2.
    #[serde(rename = "unipc")]
    UniPc { steps: i64 },
    /// Ancestral sampling over evenly kept steps, with the learned variance where there is one.
    RespacedDdpm { steps: i64 },
    /// DDIM over evenly kept steps from T − 1 to 0.
    RespacedDdim { steps: i64, eta: f64 },
}

impl Default for SamplerConfig {
    /// The released script's: DDIM, 50 steps, η = 1.
    fn default() -> Self {
        SamplerConfig::Ddim { steps: 50, eta: 1.0 }
    }
}

impl SamplerConfig {
    /// The sampler itself.
    pub fn build(self) -> Box<dyn Sampler> {
        match self {
            SamplerConfig::Ddpm { variance } => Box::new(Ddpm { variance }),
            SamplerConfig::Ddim { steps, eta } => Box::new(Ddim { steps, eta }),
            SamplerConfig::DpmSolver { steps } => Box::new(DpmSolver { steps }),
            SamplerConfig::UniPc { steps } => Box::new(UniPc { steps }),
            SamplerConfig::RespacedDdpm { steps } => Box::new(RespacedDdpm { steps }),
            SamplerConfig::RespacedDdim { steps, eta } => Box::new(RespacedDdim { steps, eta }),
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

    /// The exact score of a Gaussian.
    struct Exact(NoiseSchedule);
    const VARIANCE: f64 = 0.25;
    const MEAN: f64 = 0.7;
    impl Denoiser for Exact {
        fn predict(&self, z_t: &Tensor, t: i64) -> Prediction {
            let a = self.0.alpha_bar[t as usize];
            let gain = a.sqrt() * VARIANCE / (a * VARIANCE + 1.0 - a);
            let z_0 = MEAN + (z_t - a.sqrt() * MEAN) * gain;
            let noise = (z_t - &z_0 * a.sqrt()) / (1.0 - a).sqrt();
            Prediction { z_t: z_t.shallow_clone(), z_0, noise, variance: None }
        }
    }

    /// The solvers' nodes go down from T − 1 to 0 without a repetition.
    #[test]
    fn nodes_fall_to_zero() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for steps in [2, 3, 5, 10, 20, 50, 100, 250, 999, 1000] {
            let nodes = Nodes::new(&schedule, steps).unwrap();
            assert_eq!((nodes.times.len() as i64, nodes.times[0]), (steps, 999));
            assert_eq!(nodes.times.last(), Some(&0), "{steps} steps");
            assert!(nodes.times.windows(2).all(|w| w[0] > w[1]), "{steps}: {:?}", nodes.times);
        }
        for steps in [0, 1, 1001] {
            assert!(DpmSolver { steps }.start(&schedule).is_err() && UniPc { steps }.start(&schedule).is_err());
        }
    }

    /// Along the exact score of a Gaussian, (z − √ᾱ·mean)/√(ᾱ·variance + 1 − ᾱ) is the same at all times, so the end of
    /// the ODE is known: twice the steps must divide a solver's error by four, DDIM's by two.
    #[test]
    fn solvers_are_of_second_order() {
        let config = ScheduleConfig { steps: 20_000, beta_start: 7.5e-5, beta_end: 7.75e-4, ..Default::default() };
        let schedule = NoiseSchedule::new(&config).unwrap();
        let start = Tensor::from_slice(&[-1.3, 0.4, 2.1]);
        let spread = |t: usize| (schedule.alpha_bar[t] * VARIANCE + 1.0 - schedule.alpha_bar[t]).sqrt();
        // the sampler's last step makes z_0 of z at time 0
        let last = schedule.steps() as usize - 1;
        let z = (&start - schedule.alpha_bar[last].sqrt() * MEAN) * (spread(0) / spread(last));
        let end = Exact(schedule.clone()).predict(&(z + schedule.alpha_bar[0].sqrt() * MEAN), 0).z_0;
        let error = |sampler: &dyn Sampler| {
            let none = |_: usize| -> Tensor { panic!("it draws noise") };
            let z = sample(&Exact(schedule.clone()), sampler, &schedule, &start, &none, &mut |_, _| {}).unwrap();
            (z - &end).abs().max().double_value(&[])
        };
        let order = |make: &dyn Fn(i64) -> Box<dyn Sampler>| (error(&*make(20)) / error(&*make(80))).log2() / 2.0;
        let (ddim, dpm, unipc) = (
            order(&|steps| Box::new(Ddim { steps, eta: 0.0 })),
            order(&|steps| Box::new(DpmSolver { steps })),
            order(&|steps| Box::new(UniPc { steps })),
        );
        assert!((0.5..1.4).contains(&ddim), "DDIM is of order {ddim}");
        assert!(dpm > 1.7, "DPM-Solver++ is of order {dpm}");
        assert!(unipc > 1.7, "UniPC is of order {unipc}");
        let at = |sampler: &dyn Sampler| error(sampler);
        let (ddim, dpm, unipc) =
            (at(&Ddim { steps: 20, eta: 0.0 }), at(&DpmSolver { steps: 20 }), at(&UniPc { steps: 20 }));
        assert!(unipc < dpm && dpm < ddim, "20 steps: DDIM {ddim}, DPM-Solver++ {dpm}, UniPC {unipc}");
    }

    /// With the exact score of a Gaussian the walk must arrive at that Gaussian.
    #[test]
    fn a_gaussian_is_sampled_exactly() {
        use crate::random::{Purpose, normal};
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let shape = [1, 1, 1, 100, 200];
        let samplers: [(&str, Box<dyn Sampler>); 9] = [
            ("respaced ddpm", Box::new(RespacedDdpm { steps: 1000 })),
            ("respaced ddim 0", Box::new(RespacedDdim { steps: 100, eta: 0.0 })),
            ("respaced ddim 1", Box::new(RespacedDdim { steps: 250, eta: 1.0 })),
            ("dpm-solver", Box::new(DpmSolver { steps: 20 })),
            ("unipc", Box::new(UniPc { steps: 20 })),
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
