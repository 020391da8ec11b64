//! Sampling as released with MCVD (Voleti et al. 2022, arXiv 2205.09853): every n-th step of a schedule from its noisiest on.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    path::NoisePath,
    prediction::Prediction,
    sampler::{Sampler, SamplerRun},
};

/// How a step goes from one time to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Ho et al. 2020, with the variance of the posterior; the last step adds no noise.
    Ddpm,
    /// Song et al. 2021, without noise; the direction is the network's, clipped or not.
    Ddim,
}

/// The times T − 1, T − 1 − n, T − 1 − 2n, … of a schedule of T steps, n = T // steps; where `steps` does not divide T
/// these are more than `steps`. From the last of them the walk goes to z_0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Strided {
    /// With or without noise.
    pub method: Method,
    /// Network calls, one more with `denoise`.
    pub steps: i64,
    /// z_0 is kept in [−1, 1] at each step: for pixels, which lie there, and not for latents.
    pub clip: bool,
    /// The released code's last step, which its figures have: it takes noise off z_0, of which there is none left, and tells
    /// the network of a time that is far from the end where not all steps of the schedule are made. Leave it out for networks
    /// of your own.
    pub denoise: bool,
}

impl Default for Strided {
    fn default() -> Self {
        Strided { method: Method::Ddpm, steps: 100, clip: false, denoise: false }
    }
}

struct StridedRun {
    /// Those of `steps`, and that of the additional one.
    times: Vec<f64>,
    /// ᾱ at each time, and 1 at the end.
    alpha_bar: Vec<f64>,
    settings: Strided,
}

impl Sampler for Strided {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        let schedule = path.discrete().context(
            "strided keeps every n-th step of a schedule, and this path has no steps: take kind: ddim with eta: 1",
        )?;
        let total = schedule.steps();
        ensure!(
            (1..=total).contains(&self.steps),
            "strided: steps must be between 1 and the schedule's {total}, not {}",
            self.steps
        );
        let stride = total / self.steps;
        let mut times: Vec<f64> = (0..total).step_by(stride as usize).map(|label| (total - 1 - label) as f64).collect();
        let alpha_bar: Vec<f64> = times.iter().map(|&t| schedule.alpha_bar[t as usize]).chain([1.0]).collect();
        if self.denoise {
            times.push((total - times.len() as i64) as f64);
        }
        Ok(Box::new(StridedRun { times, alpha_bar, settings: *self }))
    }

    fn describe(&self) -> String {
        let Strided { method, steps, clip, denoise } = self;
        let name = match method {
            Method::Ddpm => "DDPM",
            Method::Ddim => "DDIM",
        };
        let clipped = if *clip { ", z_0 clipped" } else { "" };
        let denoised = if *denoise { ", with the released last step" } else { "" };
        format!("{name} {steps} strided steps{clipped}{denoised}")
    }
}

impl SamplerRun for StridedRun {
    fn times(&self) -> &[f64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        let Strided { method, clip, .. } = self.settings;
        let last = self.alpha_bar.len() - 2;
        if i > last {
            return &prediction.z_t - &prediction.noise * (1.0 - self.alpha_bar[last]).sqrt();
        }
        let z_0 = if clip { prediction.z_0.clamp(-1.0, 1.0) } else { prediction.z_0.shallow_clone() };
        let (now, next) = (self.alpha_bar[i], self.alpha_bar[i + 1]);
        match method {
            Method::Ddim => z_0 * next.sqrt() + &prediction.noise * (1.0 - next).sqrt(),
            Method::Ddpm => {
                let beta = 1.0 - now / next;
                let of_z_t = (1.0 - beta).sqrt() * (1.0 - next) / (1.0 - now);
                let mean = z_0 * (next.sqrt() * beta / (1.0 - now)) + &prediction.z_t * of_z_t;
                if i == last { mean } else { mean + noise() * ((1.0 - next) / (1.0 - now) * beta).sqrt() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{NoiseSchedule, ScheduleConfig};

    #[test]
    fn times_are_counted_from_the_noise() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let times = |steps, denoise| {
            let run = Strided { steps, denoise, ..Strided::default() }.start(&schedule).unwrap();
            run.times().to_vec()
        };
        let hundred = times(100, true);
        assert_eq!((hundred.len(), hundred[0], hundred[99]), (101, 999.0, 9.0));
        // the network is told label 99
        assert_eq!(hundred[100], 900.0);
        assert_eq!((times(1000, true)[999], times(1000, true)[1000]), (0.0, 0.0));
        assert_eq!(times(3, false), [999.0, 666.0, 333.0, 0.0]);
        assert!(Strided { steps: 0, ..Strided::default() }.start(&schedule).is_err());
    }

    /// What is known from the start is what comes out, in the box if that is asked for.
    #[test]
    fn it_ends_at_z_0() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for method in [Method::Ddpm, Method::Ddim] {
            for (clip, end) in [(false, [0.4, 1.5]), (true, [0.4, 1.0])] {
                let mut run = Strided { method, steps: 7, clip, denoise: false }.start(&schedule).unwrap();
                let mut z = Tensor::from_slice(&[2.0, -1.0]);
                for (i, t) in run.times().to_vec().into_iter().enumerate() {
                    let (alpha, sigma) = schedule.alpha_sigma(t);
                    let z_0 = Tensor::from_slice(&[0.4, 1.5]);
                    let noise = (&z - &z_0 * alpha) / sigma;
                    let prediction = Prediction { z_t: z, z_0, noise, variance: None };
                    z = run.step(i, &prediction, &|| Tensor::from_slice(&[0.3, -0.2]));
                }
                let off = (z - Tensor::from_slice(&end)).abs().max().double_value(&[]);
                assert!(off < 1e-12, "{method:?}, clip {clip}: off by {off}");
            }
        }
    }
}
