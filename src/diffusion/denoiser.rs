//! Everything that predicts noise: the network, the network given some frames, guidance.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::NoiseSchedule;
use crate::{
    networks::{Inputs, Network},
    torch::replayed,
};

/// What the network was trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Predict {
    /// ε (the released setting)
    Noise,
    /// The clean latent z_0.
    Z0,
    /// v = √ᾱ ε − √(1 − ᾱ) z_0 (Salimans & Ho 2022): z_0 where noise rules, noise where it does not, so that small
    /// networks keep the level of colours, which they lose when they predict noise.
    Velocity,
}

impl Predict {
    /// z_0 and noise from a network's output for z_t at ᾱ.
    fn read(self, z_t: Tensor, output: Tensor, alpha_bar: f64) -> Prediction {
        let (signal, sigma) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        match self {
            Predict::Noise => from_noise(z_t, output, alpha_bar),
            Predict::Z0 => {
                let noise = (&z_t - &output * signal) / sigma;
                Prediction { z_t, z_0: output, noise, variance: None }
            }
            Predict::Velocity => {
                let z_0 = &z_t * signal - &output * sigma;
                let noise = &z_t * sigma + &output * signal;
                Prediction { z_t, z_0, noise, variance: None }
            }
        }
    }
}

/// A denoiser's answer; all `[B, C, F, h, w]`.
pub struct Prediction {
    /// What the network saw: z_t with the given frames written into it.
    pub z_t: Tensor,
    /// The clean latent, of the shape of z_t.
    pub z_0: Tensor,
    /// The noise ε, of the shape of z_t.
    pub noise: Tensor,
    /// v of a network that learned the variance of reverse steps, of the shape of z_t.
    pub variance: Option<Tensor>,
}

/// Anything that tells signal from noise.
pub trait Denoiser {
    /// z_t `[B, C, F, h, w]` at diffusion time t.
    fn predict(&self, z_t: &Tensor, t: i64) -> Prediction;
}

/// A network and what it was trained to predict.
pub struct NetworkDenoiser<'a> {
    /// Predicts what `predict` says.
    pub network: &'a dyn Network,
    /// Of the training.
    pub schedule: &'a NoiseSchedule,
    /// What the network was trained to predict.
    pub predict: Predict,
    /// What it is given, one a clip.
    pub given: Inputs,
}

impl Denoiser for NetworkDenoiser<'_> {
    fn predict(&self, z_t: &Tensor, t: i64) -> Prediction {
        let time = Tensor::full([z_t.size()[0]], t, (Kind::Int64, z_t.device()));
        let output = self.output(z_t, &time);
        let (z_t, output) = (z_t.shallow_clone(), output.to_kind(z_t.kind()));
        let channels = self.network.ports().channels;
        let learned = self.network.ports().outputs - channels;
        let predicted = output.narrow(1, 0, channels);
        let variance = (learned > 0).then(|| output.narrow(1, channels, learned));
        Prediction { variance, ..self.predict.read(z_t, predicted, self.schedule.alpha_bar[t as usize]) }
    }
}

fn from_noise(z_t: Tensor, noise: Tensor, alpha_bar: f64) -> Prediction {
    let z_0 = (&z_t - &noise * (1.0 - alpha_bar).sqrt()) / alpha_bar.sqrt();
    Prediction { z_t, z_0, noise, variance: None }
}

/// Writes given frames into z_t before every call (paper, equation 6).
pub struct FrameConditioned<D> {
    /// The network that sees given frames.
    pub inner: D,
    /// `[B, C, F, h, w]`: the given frames, perturbed once; other frames are not read.
    pub frames: Tensor,
    /// `[B, 1, F, 1, 1]`: one where a frame is given.
    pub mask: Tensor,
}

impl<D: Denoiser> Denoiser for FrameConditioned<D> {
    fn predict(&self, z_t: &Tensor, t: i64) -> Prediction {
        let mask = self.mask.to_kind(z_t.kind());
        self.inner.predict(&(z_t * (1.0 - &mask) + &self.frames * &mask), t)
    }
}

/// How the conditional and the unconditional prediction are mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guidance {
    /// ε_u + w (ε_c − ε_u)
    Interpolate,
    /// ε_c + w (ε_c − ε_u): the paper's (1 + w) ε_c − w ε_u (equation 8).
    CfgOriginal,
}

/// Guidance by the unconditional prediction: both are made in one pass of the network over twice the clips.
pub struct Guided<'a> {
    /// The network, given all.
    pub conditional: NetworkDenoiser<'a>,
    /// The same network, given less.
    pub unconditional: NetworkDenoiser<'a>,
    /// w.
    pub weight: f64,
    /// How the two are mixed.
    pub form: Guidance,
    /// To get z_0 back from the mixed noise.
    pub schedule: &'a NoiseSchedule,
}

impl Denoiser for Guided<'_> {
    fn predict(&self, z_t: &Tensor, t: i64) -> Prediction {
        let both = self.conditional.beside(&self.unconditional, z_t).predict(&Tensor::cat(&[z_t, z_t], 0), t);
        let halves = both.noise.chunk(2, 0);
        let [conditional, unconditional] = [&halves[0], &halves[1]];
        let step = (conditional - unconditional) * self.weight;
        let noise = match self.form {
            Guidance::Interpolate => unconditional + step,
            Guidance::CfgOriginal => conditional + step,
        };
        // a learned variance is that of the network given all
        let variance = both.variance.map(|variance| variance.narrow(0, 0, z_t.size()[0]));
        Prediction { variance, ..from_noise(z_t.shallow_clone(), noise, self.schedule.alpha_bar[t as usize]) }
    }
}

impl<'a> NetworkDenoiser<'a> {
    /// What the network says.
    fn output(&self, z: &Tensor, time: &Tensor) -> Tensor {
        // the same parts in every call of one network, so that its address and their shapes tell recorded calls apart
        let given = self.given.completed(z, self.network.ports());
        let inputs: Vec<&Tensor> = [z, time].into_iter().chain(given.tensors()).collect();
        let address = std::ptr::from_ref(self.network).cast::<()>() as usize;
        replayed(address, &inputs, |inputs| {
            self.network.forward(&inputs[0], &inputs[1], &given.with_tensors(&inputs[2..]))
        })
    }

    /// The denoiser of a batch that holds the clips z_t twice, first as this one is given, then as the other.
    fn beside(&self, other: &NetworkDenoiser<'a>, z_t: &Tensor) -> NetworkDenoiser<'a> {
        NetworkDenoiser { given: self.given.stacked(&other.given, z_t, self.network.ports()), ..*self }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::diffusion::ScheduleConfig;

    /// A network that answers exactly what it is trained on gives back z_0 and noise.
    #[test]
    fn a_perfect_answer_is_read_back() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let draw = || Tensor::randn([1, 2, 3, 4, 4], (Kind::Double, Device::Cpu));
        let (z_0, noise) = (draw(), draw());
        for t in [0, 300, 999] {
            let times = Tensor::from_slice(&[t]);
            let z_t = schedule.add_noise(&z_0, &times, &noise);
            for (predict, output) in [
                (Predict::Noise, noise.shallow_clone()),
                (Predict::Z0, z_0.shallow_clone()),
                (Predict::Velocity, schedule.velocity(&z_0, &times, &noise)),
            ] {
                let found = predict.read(z_t.shallow_clone(), output, schedule.alpha_bar[t as usize]);
                for (found, wanted) in [(&found.z_0, &z_0), (&found.noise, &noise)] {
                    let error = (found - wanted).abs().max().double_value(&[]);
                    assert!(error < 1e-9, "{predict:?} at {t}: {error:e}");
                }
            }
        }
    }
}
