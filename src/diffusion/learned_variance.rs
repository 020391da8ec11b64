//! A learned variance of the reverse steps (Nichol & Dhariwal 2021, arXiv 2102.09672), as DiT and Latte train and
//! sample with it: the network gives the noise ε̂ and, in as many channels more, v.

use std::f64::consts::{LN_2, PI};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    path::{NoisePath, Times},
    prediction::Prediction,
    sampler::{Sampler, SamplerRun},
    schedule::NoiseSchedule,
};
use crate::torch::takes_gpu_path;

/// [ln β̃_t, ln β_t]: between these lies the log variance of the reverse step (their equation 15). β̃_0 is 0, and β̃_1
/// takes its place; in a chain of one step, where there is none, β_0.
fn log_bounds(schedule: &NoiseSchedule, t: usize) -> [f64; 2] {
    let smallest = match t {
        0 if schedule.steps() == 1 => schedule.beta[0],
        t => schedule.posterior_variance(t.max(1)),
    };
    [smallest.ln(), schedule.beta[t].ln()]
}

/// λ = f·ln β_t + (1−f)·ln β̃_t with f = (v+1)/2; v is not squashed.
fn log_variance(v: &Tensor, smallest: &Tensor, largest: &Tensor) -> Tensor {
    let fraction = (v + 1.0) * 0.5;
    &fraction * largest + (1.0 - &fraction) * smallest
}

/// The two terms of the hybrid loss, of each sample: `[B]` each.
pub struct HybridLoss {
    /// The mean square of ε̂ − ε.
    pub mse: Tensor,
    /// The variational bound in bits, through which only v learns.
    pub vb: Tensor,
}

impl HybridLoss {
    /// The loss of a network's `output` `[B, 2C, F, h, w]` for z_t, the latent z_0 with `noise` at these times, one a clip. What
    /// the released training does: the bound is neither scaled to T steps nor down-weighted.
    pub fn new(
        schedule: &NoiseSchedule,
        output: &Tensor,
        z_0: &Tensor,
        z_t: &Tensor,
        times: &Times,
        noise: &Tensor,
    ) -> Self {
        let halves = output.to_kind(z_0.kind()).chunk(2, 1);
        let (predicted, v) = (&halves[0], &halves[1]);
        let mse = of_each((predicted - noise).square());

        let factors = factors(schedule, times).map(|factor| factor.to_kind(z_0.kind()));
        let factor = |i: usize| factors[i].shallow_clone();

        let z_0_predicted = z_t * factor(0) - predicted.detach() * factor(1);
        let mean = |z_0: &Tensor| z_0 * factor(2) + z_t * factor(3);
        let (true_mean, model_mean) = (mean(z_0), mean(&z_0_predicted));
        let (true_log, model_log) = (factor(4), log_variance(v, &factor(4), &factor(5)));

        // their equation 4 at t > 0: the divergence of two Gaussians
        let divergence =
            ((&true_log - &model_log).exp() + (true_mean - &model_mean).square() * (-&model_log).exp() + &model_log
                - &true_log
                - 1.0)
                * 0.5;
        // on a GPU all batches are computed alike, so that the step can be recorded
        let nats = match takes_gpu_path(z_0.device()) || times.on_host().contains(&0.0) {
            false => of_each(divergence),
            true => of_each(decoder_nats(z_0, &model_mean, &model_log))
                .where_self(&times.embedded().eq(0), &of_each(divergence)),
        };
        HybridLoss { mse, vb: nats / LN_2 }
    }

    /// Computes what it takes from the host at these times.
    pub(super) fn prepare(schedule: &NoiseSchedule, times: &Times) {
        let _ = factors(schedule, times);
    }

    /// The mean over samples of both terms together.
    pub fn mean(&self) -> Tensor {
        (&self.mse + &self.vb).mean(None)
    }
}

/// Of each time √(1/ᾱ), √(1/ᾱ − 1), the posterior mean's factors of z_0 and z_t, ln β̃, ln β.
fn factors(schedule: &NoiseSchedule, times: &Times) -> [Tensor; 6] {
    times.compute("learned variance", |t, _| {
        let t = t as usize;
        let inverse = 1.0 / schedule.alpha_bar[t];
        let ((of_z_0, of_z_t), [smallest, largest]) = (schedule.posterior_mean(t), log_bounds(schedule, t));
        [inverse.sqrt(), (inverse - 1.0).sqrt(), of_z_0, of_z_t, smallest, largest]
    })
}

/// The mean over all axes but the first.
fn of_each(x: Tensor) -> Tensor {
    x.flatten(1, -1).mean_dim([1i64].as_slice(), false, None)
}

/// −ln p(z_0 | z_1), z_0 taken for a pixel of 256 values in [−1, 1] (Ho et al. 2020, equation 13), as the released
/// training takes latents too. In float64: in float32 the difference of the two cumulative probabilities is rounding alone
/// a few deviations from the mean.
fn decoder_nats(z_0: &Tensor, mean: &Tensor, log_variance: &Tensor) -> Tensor {
    const LEAST: f64 = 1e-12;
    let [x, mean, log] = [z_0, mean, log_variance].map(|tensor| tensor.to_kind(Kind::Double));
    let inverse_deviation = (log * -0.5).exp();
    // the normal distribution's cumulative probability, approximately
    let cumulative = |x: Tensor| {
        let cubed: Tensor = &x * &x * &x;
        ((x + cubed * 0.044715) * (2.0 / PI).sqrt()).tanh() * 0.5 + 0.5
    };
    let centred = &x - mean;
    let above = cumulative((&centred + 1.0 / 255.0) * &inverse_deviation);
    let below = cumulative((&centred - 1.0 / 255.0) * &inverse_deviation);
    let lowest = above.clamp_min(LEAST).log();
    let highest = (&below * -1.0 + 1.0).clamp_min(LEAST).log();
    let between = (&above - &below).clamp_min(LEAST).log();
    let upper = highest.where_self(&x.gt(0.999), &between);
    -lowest.where_self(&x.lt(-0.999), &upper).to_kind(z_0.kind())
}

/// A chain of fewer steps: the kept times, rising, and a schedule whose β are made anew between kept neighbours (their
/// section 4). The network is given the original times.
struct Respaced {
    times: Vec<i64>,
    schedule: NoiseSchedule,
}

impl Respaced {
    /// S of T times: multiples of (T−1)/(S−1), rounded. The stride is added up, as released, which decides where it falls
    /// between two times.
    fn new(path: &dyn NoisePath, steps: i64) -> Result<Self> {
        let schedule = path.discrete().context("a respaced chain is one of a schedule of steps: take kind: ddim")?;
        let total = schedule.steps();
        ensure!((1..=total).contains(&steps), "steps must be between 1 and the schedule's {total}, not {steps}");
        let stride = if steps == 1 { 1.0 } else { (total - 1) as f64 / (steps - 1) as f64 };
        let mut place = 0.0f64;
        let times: Vec<i64> = (0..steps)
            .map(|_| {
                let time = place.round_ties_even() as i64;
                place += stride;
                time
            })
            .collect();
        let schedule = schedule.at(&times);
        Ok(Respaced { times, schedule })
    }

    fn walk(&self) -> Vec<f64> {
        self.times.iter().rev().map(|&t| t as f64).collect()
    }
}

/// Ancestral sampling on a chain of fewer steps, with the learned variance of a network that has one; else with that of
/// q(z_{t−1} | z_t, z_0). z_0 is not clipped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct RespacedDdpm {
    /// Network calls.
    pub steps: i64,
}

impl Default for RespacedDdpm {
    fn default() -> Self {
        RespacedDdpm { steps: 50 }
    }
}

struct RespacedDdpmRun {
    chain: Respaced,
    walk: Vec<f64>,
}

impl Sampler for RespacedDdpm {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        let chain = Respaced::new(path, self.steps)?;
        Ok(Box::new(RespacedDdpmRun { walk: chain.walk(), chain }))
    }

    fn describe(&self) -> String {
        format!("DDPM respaced to {} steps", self.steps)
    }
}

impl SamplerRun for RespacedDdpmRun {
    fn times(&self) -> &[f64] {
        &self.walk
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        let t = self.walk.len() - 1 - i;
        let schedule = &self.chain.schedule;
        let (of_z_0, of_z_t) = schedule.posterior_mean(t);
        let mean = &prediction.z_0 * of_z_0 + &prediction.z_t * of_z_t;
        if t == 0 {
            return mean;
        }
        let [smallest, largest] = log_bounds(schedule, t);
        match &prediction.variance {
            Some(v) => {
                // λ/2, linear in v
                let half = v * (0.25 * (largest - smallest)) + 0.25 * (largest + smallest);
                mean + half.exp() * noise()
            }
            None => mean + noise() * (0.5 * smallest).exp(),
        }
    }
}

/// DDIM (Song et al. 2021) on the times of [`RespacedDdpm`], down to ᾱ = 1: a learned variance is not read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct RespacedDdim {
    /// Network calls.
    pub steps: i64,
    /// 0 is deterministic, 1 as noisy as DDPM.
    pub eta: f64,
}

impl Default for RespacedDdim {
    fn default() -> Self {
        RespacedDdim { steps: 50, eta: 1.0 }
    }
}

struct RespacedDdimRun {
    chain: Respaced,
    walk: Vec<f64>,
    eta: f64,
}

impl Sampler for RespacedDdim {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        ensure!((0.0..=1.0).contains(&self.eta), "DDIM eta must be in [0, 1], not {}", self.eta);
        let chain = Respaced::new(path, self.steps)?;
        Ok(Box::new(RespacedDdimRun { walk: chain.walk(), chain, eta: self.eta }))
    }

    fn describe(&self) -> String {
        format!("DDIM respaced to {} steps, η = {}", self.steps, self.eta)
    }
}

impl SamplerRun for RespacedDdimRun {
    fn times(&self) -> &[f64] {
        &self.walk
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        let t = self.walk.len() - 1 - i;
        if t == 0 {
            return prediction.z_0.shallow_clone();
        }
        let (now, before) = (self.chain.schedule.alpha_bar[t], self.chain.schedule.alpha_bar[t - 1]);
        let sigma = self.eta * ((1.0 - before) / (1.0 - now) * (1.0 - now / before)).sqrt();
        let direction = (1.0 - before - sigma * sigma).max(0.0).sqrt();
        let z = &prediction.z_0 * before.sqrt() + &prediction.noise * direction;
        if sigma == 0.0 { z } else { z + noise() * sigma }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        diffusion::{Denoiser, ScheduleConfig, sample},
        random::{Purpose, normal},
    };

    fn schedule() -> NoiseSchedule {
        NoiseSchedule::new(&ScheduleConfig::default()).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        tensor.to_kind(Kind::Double).try_into().unwrap()
    }

    /// A network that knows the noise and says the smallest variance says exactly the posterior: there is no divergence
    /// but at t = 0. With twice the log variance's distance there is the divergence of two centred Gaussians.
    #[test]
    fn the_bound_of_a_perfect_answer_is_zero() {
        let (schedule, shape) = (schedule(), [3, 2, 2, 4, 4]);
        let noise = |step| normal(1, Purpose::Evaluation, 0, step, &shape).to_kind(Kind::Double);
        let (z_0, noise) = (noise(0), noise(1));
        let times = Times::of_clips(&schedule, &[999.0, 500.0, 0.0], Device::Cpu);
        let z_t = times.add_noise(&z_0, &noise);
        let of = |v: f64| {
            let output = Tensor::cat(&[&noise, &(noise.zeros_like() + v)], 1);
            HybridLoss::new(&schedule, &output, &z_0, &z_t, &times, &noise)
        };
        let exact = of(-1.0);
        assert!(values(&exact.mse).iter().all(|&mse| mse == 0.0));
        let vb = values(&exact.vb);
        assert!(vb[0].abs() < 1e-9 && vb[1].abs() < 1e-9 && vb[2] > 0.0, "{vb:?}");
        for (i, t) in [999usize, 500].into_iter().enumerate() {
            let [smallest, largest] = log_bounds(&schedule, t);
            let wider = largest - smallest;
            let wanted = 0.5 * ((-wider).exp() - 1.0 + wider) / LN_2;
            let found = values(&of(1.0).vb)[i];
            assert!((found - wanted).abs() < 1e-9 * wanted.abs().max(1.0), "t = {t}: {found}, not {wanted}");
        }
    }

    /// The 256 values that a pixel can have have probabilities that add up to one.
    #[test]
    fn the_decoder_is_a_distribution() {
        let pixels = Tensor::arange(256, (Kind::Double, Device::Cpu)) / 127.5 - 1.0;
        for (mean, log_variance) in [(0.1, -3.0), (-0.98, -7.0), (1.4, -1.0)] {
            let nats = decoder_nats(&pixels, &(pixels.zeros_like() + mean), &(pixels.zeros_like() + log_variance));
            let total = (-nats).exp().sum(None).double_value(&[]);
            assert!((total - 1.0).abs() < 1e-6, "mean {mean}: {total}");
        }
    }

    /// The bound teaches v alone, the mean square the noise alone.
    #[test]
    fn each_half_has_its_own_loss() {
        let (schedule, shape) = (schedule(), [1, 2, 1, 2, 2]);
        let noise = |step, shape: &[i64]| normal(1, Purpose::Evaluation, 0, step, shape);
        let (z_0, noise_in) = (noise(0, &shape), noise(1, &shape));
        let times = Times::of_clips(&schedule, &[300.0], Device::Cpu);
        let output = noise(2, &[1, 4, 1, 2, 2]).set_requires_grad(true);
        let z_t = times.add_noise(&z_0, &noise_in);
        let loss = HybridLoss::new(&schedule, &output, &z_0, &z_t, &times, &noise_in);
        for (loss, own) in [(&loss.mse, 0), (&loss.vb, 1)] {
            let gradient = Tensor::run_backward(&[loss.sum(None)], &[&output], true, false).remove(0).chunk(2, 1);
            let size = |half: usize| gradient[half].abs().max().double_value(&[]);
            assert!(size(own) > 0.0 && size(1 - own) == 0.0, "{} and {}", size(0), size(1));
        }
    }

    /// The exact mean and variance of each reverse step for data that are a Gaussian.
    struct Exact(Respaced);
    const MEAN: f64 = 0.7;
    const VARIANCE: f64 = 0.25;

    impl Denoiser for Exact {
        fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
            let Respaced { times, schedule } = &self.0;
            let i = times.iter().position(|&time| time as f64 == t).unwrap();
            let a = schedule.alpha_bar[i];
            let spread = a * VARIANCE + 1.0 - a;
            let z_0 = MEAN + (z_t - a.sqrt() * MEAN) * (a.sqrt() * VARIANCE / spread);
            let noise = (z_t - &z_0 * a.sqrt()) / (1.0 - a).sqrt();
            let [smallest, largest] = log_bounds(schedule, i);
            let of_z_0 = schedule.posterior_mean(i).0;
            let exact = (smallest.exp() + of_z_0.powi(2) * VARIANCE * (1.0 - a) / spread).ln();
            let v = 2.0 * (exact - smallest) / (largest - smallest) - 1.0;
            Prediction { z_t: z_t.shallow_clone(), z_0, noise, variance: Some(z_t.zeros_like() + v) }
        }
    }

    /// With the exact variance of its steps even a short chain ends at the Gaussian; with the fixed one it does not.
    #[test]
    fn ten_steps_of_the_right_variance_are_enough() {
        let (schedule, shape) = (schedule(), [1, 1, 1, 100, 200]);
        let deviation = |denoiser: &dyn Denoiser| {
            let start = normal(1, Purpose::SampleStart, 0, 0, &shape);
            let noise = |i: usize| normal(1, Purpose::SampleStep, 0, i as u64, &shape);
            let z = sample(denoiser, &RespacedDdpm { steps: 10 }, &schedule, &start, &noise, &mut |_, _| {}).unwrap();
            assert!((z.mean(None).double_value(&[]) - MEAN).abs() < 0.02);
            z.std(true).double_value(&[])
        };
        let exact = Exact(Respaced::new(&schedule, 10).unwrap());
        let learned = deviation(&exact);
        assert!((learned - VARIANCE.sqrt()).abs() < 0.01, "{learned}");
        struct Fixed(Exact);
        impl Denoiser for Fixed {
            fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
                Prediction { variance: None, ..self.0.predict(z_t, t) }
            }
        }
        let fixed = deviation(&Fixed(exact));
        assert!(fixed < 0.9 * VARIANCE.sqrt(), "{fixed}");
    }

    #[test]
    fn kept_times_begin_at_zero_and_end_at_the_last() {
        let schedule = schedule();
        let times = |steps| Respaced::new(&schedule, steps).unwrap().times;
        assert_eq!((times(1), times(2)), (vec![0], vec![0, 999]));
        assert_eq!(times(5), [0, 250, 500, 749, 999]);
        assert_eq!(times(1000), (0..1000).collect::<Vec<i64>>());
        let whole = Respaced::new(&schedule, 1000).unwrap().schedule;
        assert!(whole.beta.iter().zip(&schedule.beta).all(|(found, wanted)| (found - wanted).abs() < 1e-12));
        for steps in [0, 1001] {
            assert!(RespacedDdpm { steps }.start(&schedule).is_err());
        }
    }
}
