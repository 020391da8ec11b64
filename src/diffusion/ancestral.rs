//! Ancestral sampling between any two times of a path, with a variance between its two bounds and a Langevin corrector
//! (Ho et al. 2022, arXiv 2204.03458, section 2, "video diffusion models").

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    path::NoisePath,
    prediction::Prediction,
    sampler::{Sampler, SamplerRun},
};

/// From time t to the cleaner time s, z_s is drawn around the mean of q(z_s | z_t, z_0), with a variance whose logarithm lies
/// between the two that are sensible.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ancestral {
    /// Steps of the walk from noise to data.
    pub steps: i64,
    /// γ: 0 is the variance of q(z_s | z_t, z_0), 1 that of q(z_t | z_s).
    pub gamma: f64,
    /// δ, the size of one Langevin step after each step but the last, for which the network is called once more; 0 is
    /// without.
    pub corrector: f64,
    /// z_0 is clipped to ± this number: 1 for pixels. `null` for latents, which have no bounds.
    pub clip: Option<f64>,
}

impl Default for Ancestral {
    /// 256 steps with γ = 0.1, as published, without a corrector.
    fn default() -> Self {
        Ancestral { steps: 256, gamma: 0.1, corrector: 0.0, clip: None }
    }
}

/// q(z_s | z_t, z_0) between two times, and the interpolated deviation.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Step {
    of_z_t: f64,
    of_z_0: f64,
    deviation: f64,
}

impl Step {
    /// From (α_t, σ_t) to (α_s, σ_s). With r = e^{λ_t − λ_s} = (α_t σ_s)²/(σ_t α_s)² the mean is
    /// r (α_s/α_t) z_t + (1 − r) α_s z_0, and the variance lies between (1 − r) σ_s² and (1 − r) σ_t².
    fn between((alpha_t, sigma_t): (f64, f64), (alpha_s, sigma_s): (f64, f64), gamma: f64) -> Self {
        let r = (alpha_t * sigma_s / (sigma_t * alpha_s)).powi(2);
        Step {
            // r α_s/α_t, also where there is no signal and α_t is 0
            of_z_t: alpha_t / alpha_s * (sigma_s / sigma_t).powi(2),
            of_z_0: (1.0 - r) * alpha_s,
            deviation: (1.0 - r).sqrt() * sigma_s.powf(1.0 - gamma) * sigma_t.powf(gamma),
        }
    }
}

struct AncestralRun {
    /// t_0, then for each further node its time, and before it once more where there is a corrector.
    times: Vec<f64>,
    /// (α, σ) of each of these times.
    rates: Vec<(f64, f64)>,
    /// From each node to the next, the last to data.
    steps: Vec<Step>,
    settings: Ancestral,
}

impl Sampler for Ancestral {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        let Ancestral { steps, gamma, corrector, clip } = *self;
        ensure!((0.0..=1.0).contains(&gamma), "gamma must be in [0, 1], not {gamma}");
        ensure!((0.0..=1.0).contains(&corrector), "corrector must be in [0, 1], not {corrector}");
        ensure!(clip.is_none_or(|bound| bound > 0.0), "clip must be positive, or null, not {}", clip.unwrap_or(0.0));
        let nodes = path.nodes(steps)?;
        let mut rates: Vec<(f64, f64)> = nodes.iter().map(|&t| path.alpha_sigma(t)).collect();
        rates.push((1.0, 0.0));
        let steps = rates
            .windows(2)
            .map(|pair| match pair[1] {
                // the end is z_0 itself
                (_, 0.0) => Step { of_z_t: 0.0, of_z_0: pair[1].0, deviation: 0.0 },
                next => Step::between(pair[0], next, gamma),
            })
            .collect();
        let calls = if corrector > 0.0 { 2 } else { 1 };
        let times: Vec<f64> = nodes.iter().flat_map(|&t| vec![t; calls]).skip(calls - 1).collect();
        Ok(Box::new(AncestralRun {
            rates: times.iter().map(|&t| path.alpha_sigma(t)).collect(),
            times,
            steps,
            settings: *self,
        }))
    }

    fn describe(&self) -> String {
        let Ancestral { steps, gamma, corrector, clip } = *self;
        let corrected = if corrector > 0.0 { format!(", corrector {corrector}") } else { String::new() };
        let clipped = clip.map_or(String::new(), |bound| format!(", z_0 clipped to ±{bound}"));
        format!("ancestral {steps} steps, γ = {gamma}{corrected}{clipped}")
    }
}

impl SamplerRun for AncestralRun {
    fn times(&self) -> &[f64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        let Prediction { z_t, z_0, noise: epsilon, .. } = prediction;
        let Ancestral { corrector: delta, clip, .. } = self.settings;
        let clipped = clip.map(|bound| z_0.clamp(-bound, bound));
        if delta > 0.0 && i % 2 == 1 {
            let (alpha, sigma) = self.rates[i];
            let of_clipped = clipped.map(|z_0| (z_t - z_0 * alpha) / sigma);
            let epsilon = of_clipped.as_ref().unwrap_or(epsilon);
            return z_t - epsilon * (0.5 * delta * sigma) + noise() * (delta.sqrt() * sigma);
        }
        let Step { of_z_t, of_z_0, deviation } = self.steps[if delta > 0.0 { i / 2 } else { i }];
        let mean = z_t * of_z_t + clipped.as_ref().unwrap_or(z_0) * of_z_0;
        if deviation == 0.0 { mean } else { mean + noise() * deviation }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::diffusion::{CosineLogSnr, sample};

    /// Drawn from z_t that is noised data, z_s of γ = 0 has the rates of its own time, whatever the two times are; γ = 1 has
    /// the variance of q(z_t | z_s), and what lies between them its geometric mean.
    #[test]
    fn a_step_keeps_the_marginals() {
        let path = CosineLogSnr::default();
        for (t, s) in [(1.0, 0.99), (0.7, 0.3), (0.5, 0.499), (0.2, 0.0)] {
            let ((alpha_t, sigma_t), (alpha_s, sigma_s)) = (path.alpha_sigma(t), path.alpha_sigma(s));
            let step = |gamma| Step::between((alpha_t, sigma_t), (alpha_s, sigma_s), gamma);
            let Step { of_z_t, of_z_0, deviation } = step(0.0);
            assert!((of_z_t * alpha_t + of_z_0 - alpha_s).abs() < 1e-12, "{t} → {s}");
            assert!(((of_z_t * sigma_t).powi(2) + deviation.powi(2) - sigma_s.powi(2)).abs() < 1e-12, "{t} → {s}");
            let forwards = sigma_t.powi(2) - (alpha_t / alpha_s * sigma_s).powi(2);
            assert!((step(1.0).deviation.powi(2) - forwards).abs() < 1e-12, "{t} → {s}");
            let between = (deviation * step(1.0).deviation).sqrt();
            assert!((step(0.5).deviation - between).abs() < 1e-12, "{t} → {s}");
        }
    }

    /// A denoiser whose z_0 is out of bounds: the walk ends at the bound, and a corrector doubles its calls.
    #[test]
    fn the_end_is_clipped_and_the_corrector_calls_again() {
        struct Loud;
        impl crate::diffusion::Denoiser for Loud {
            fn predict(&self, z_t: &Tensor, _t: f64) -> Prediction {
                let z_0 = z_t.ones_like() * 3.0;
                Prediction { z_t: z_t.shallow_clone(), z_0, noise: z_t.zeros_like(), variance: None }
            }
        }
        let path = CosineLogSnr::default();
        for (corrector, calls) in [(0.0, 4), (0.1, 7)] {
            let sampler = Ancestral { steps: 4, corrector, clip: Some(1.0), ..Ancestral::default() };
            let run = sampler.start(&path).unwrap();
            assert_eq!(run.times().len(), calls);
            assert_eq!((run.times()[0], *run.times().last().unwrap()), (1.0, 0.25));
            let noise = |_: usize| Tensor::randn([1, 1, 1, 2, 2], (Kind::Float, Device::Cpu));
            let z = sample(&Loud, &sampler, &path, &noise(0), &noise, &mut |_, _| {}).unwrap();
            assert_eq!((z.min().double_value(&[]), z.max().double_value(&[])), (1.0, 1.0));
        }
        for wrong in
            [Ancestral { gamma: 1.5, ..Ancestral::default() }, Ancestral { clip: Some(0.0), ..Ancestral::default() }]
        {
            assert!(wrong.start(&path).is_err());
        }
    }
}
