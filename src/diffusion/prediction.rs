//! What a network is trained to predict, and how z_0 and noise follow from its output.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::path::{NoisePath, Rates, Times};

/// What the network was trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Predict {
    /// ε (the released setting)
    Noise,
    /// The clean latent z_0.
    Z0,
    /// v = α·ε − σ·z_0 where α² + σ² = 1 (Salimans & Ho 2022): z_0 where noise rules, noise where it does not, so that small
    /// networks keep the level of colours, which they lose when they predict noise.
    Velocity,
    /// ε − z_0: the velocity of rectified flow.
    Flow,
    /// What EDM's preconditioning leaves to the network (Karras et al. 2022, equation 7): F with
    /// z_0 = c_skip·z_t/α + c_out·F for the noise σ/α.
    Edm,
}

/// EDM's (c_skip, c_out) for data of deviation d, at the noise s = σ/α.
fn preconditioning(&Rates { alpha, sigma, deviation: d }: &Rates) -> (f64, f64) {
    let s = sigma / alpha;
    let total = s * s + d * d;
    (d * d / total, s * d / total.sqrt())
}

/// Of z_0 and of the noise in what the network predicts.
fn edm_factors(times: &Times) -> [Tensor; 2] {
    times.compute("edm", |_, rates| {
        let (_, out) = preconditioning(rates);
        [out / (rates.deviation * rates.deviation), out * rates.alpha / rates.sigma]
    })
}

impl Predict {
    /// z_0 and noise from a network's `output` for z_t, both `[B, C, F, h, w]`.
    pub fn read(self, z_t: Tensor, output: Tensor, rates: &Rates) -> Prediction {
        let Rates { alpha, sigma, .. } = *rates;
        match self {
            Predict::Noise => {
                let z_0 = (&z_t - &output * sigma) / alpha;
                Prediction { z_t, z_0, noise: output, variance: None }
            }
            Predict::Z0 => {
                let noise = (&z_t - &output * alpha) / sigma;
                Prediction { z_t, z_0: output, noise, variance: None }
            }
            Predict::Velocity => {
                let z_0 = &z_t * alpha - &output * sigma;
                let noise = &z_t * sigma + &output * alpha;
                Prediction { z_t, z_0, noise, variance: None }
            }
            Predict::Flow => {
                let z_0 = (&z_t - &output * sigma) / (alpha + sigma);
                let noise = (&z_t + &output * alpha) / (alpha + sigma);
                Prediction { z_t, z_0, noise, variance: None }
            }
            Predict::Edm => {
                let (skip, out) = preconditioning(rates);
                let z_0 = &z_t * (skip / alpha) + &output * out;
                let noise = (&z_t - &z_0 * alpha) / sigma;
                Prediction { z_t, z_0, noise, variance: None }
            }
        }
    }

    /// The target of the network's output for z_0 with this noise, of their shape.
    pub fn target(self, z_0: &Tensor, noise: &Tensor, times: &Times) -> Tensor {
        match self {
            Predict::Noise => noise.shallow_clone(),
            Predict::Z0 => z_0.shallow_clone(),
            Predict::Velocity => {
                let (alpha, sigma) = times.like(z_0);
                alpha * noise - sigma * z_0
            }
            Predict::Flow => noise - z_0,
            // (s·z_0/d − d·ε)/√(s² + d²)
            Predict::Edm => {
                let [of_z_0, of_noise] = edm_factors(times).map(|factor| factor.to_kind(z_0.kind()));
                of_z_0 * z_0 - of_noise * noise
            }
        }
    }

    /// Computes what [`Self::target`] takes from the host at these times.
    pub(super) fn prepare(self, times: &Times) {
        if self == Predict::Edm {
            let _ = edm_factors(times);
        }
    }

    /// Whether z_0 and noise can be read from such predictions at these times of a path.
    ///
    /// # Errors
    /// Names the time at which they cannot, and what to predict instead.
    pub fn check(self, path: &dyn NoisePath, times: &[f64]) -> Result<()> {
        for &t in times {
            let (alpha, sigma) = path.alpha_sigma(t);
            match self {
                Predict::Noise | Predict::Edm => ensure!(
                    alpha > 0.0,
                    "at time {t} there is noise alone, from which no prediction of noise tells z_0: predict velocity, flow \
                     or z0"
                ),
                Predict::Velocity => ensure!(
                    (alpha * alpha + sigma * sigma - 1.0).abs() < 1e-6,
                    "velocity is for paths whose α² + σ² is 1, and at time {t} that is {:.3}: predict flow or noise",
                    alpha * alpha + sigma * sigma
                ),
                Predict::Z0 | Predict::Flow => {}
            }
            ensure!(
                sigma > 0.0 || !matches!(self, Predict::Z0 | Predict::Edm),
                "the sampler asks the network at time {t}, where there is no noise, and its answer is z_0: take another \
                 sampler (euler), or predict flow"
            );
        }
        Ok(())
    }

    /// The factor by which an error of the network's output changes z_0.
    pub fn gain(self, rates: &Rates) -> f64 {
        let Rates { alpha, sigma, .. } = *rates;
        match self {
            Predict::Noise => sigma / alpha,
            Predict::Z0 => 1.0,
            Predict::Velocity => sigma,
            Predict::Flow => sigma / (alpha + sigma),
            Predict::Edm => preconditioning(rates).1,
        }
    }
}

/// What a denoiser predicts; all tensors are `[B, C, F, h, w]`.
pub struct Prediction {
    /// z_t as the network saw it: with the given frames written into it.
    pub z_t: Tensor,
    /// The clean latent, of the shape of z_t.
    pub z_0: Tensor,
    /// The noise ε, of the shape of z_t.
    pub noise: Tensor,
    /// The variance parameter v of a network that learned the variance of reverse steps (Nichol & Dhariwal 2021, equation
    /// 15); otherwise none.
    pub variance: Option<Tensor>,
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::diffusion::{Edm, NoisePath, NoiseSchedule, RectifiedFlow, ScheduleConfig};

    /// A network that answers exactly what it is trained on gives back z_0 and noise, on every path.
    #[test]
    fn a_perfect_answer_is_read_back() {
        let draw = || Tensor::randn([1, 2, 3, 4, 4], (Kind::Double, Device::Cpu));
        let (z_0, noise) = (draw(), draw());
        let steps = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let flow = RectifiedFlow::default();
        let edm = Edm { sigma_data: 0.5, ..Edm::default() };
        let all = [Predict::Noise, Predict::Z0, Predict::Velocity, Predict::Flow, Predict::Edm];
        let paths: [(&dyn NoisePath, [f64; 3], &[Predict]); 3] = [
            (&steps, [0.0, 300.0, 999.0], &all),
            (&flow, [0.01, 0.5, 0.98], &[Predict::Noise, Predict::Z0, Predict::Flow, Predict::Edm]),
            (&edm, [0.01, 1.0, 60.0], &[Predict::Noise, Predict::Z0, Predict::Flow, Predict::Edm]),
        ];
        for (path, times, predicts) in paths {
            for t in times {
                let at = Times::of_clips(path, &[t], Device::Cpu);
                let z_t = at.add_noise(&z_0, &noise);
                for predict in predicts {
                    let output = predict.target(&z_0, &noise, &at);
                    let found = predict.read(z_t.shallow_clone(), output.shallow_clone(), &path.rates(t));
                    for (found, wanted) in [(&found.z_0, &z_0), (&found.noise, &noise)] {
                        let error = (found - wanted).abs().max().double_value(&[]);
                        assert!(error < 1e-9, "{predict:?} at {t}: {error:e}");
                    }
                    let moved = predict.read(z_t.shallow_clone(), output + 0.1, &path.rates(t)).z_0;
                    let gain = (moved - &z_0).abs().max().double_value(&[]) / 0.1;
                    assert!((gain / predict.gain(&path.rates(t)) - 1.0).abs() < 1e-6, "{predict:?} at {t}: {gain}");
                }
            }
        }
    }
}
