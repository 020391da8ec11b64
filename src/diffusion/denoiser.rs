//! Everything that predicts noise: the network, the network given some frames, guidance.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    path::NoisePath,
    prediction::{Predict, Prediction},
};
use crate::{
    networks::{Inputs, Network},
    torch::replayed,
};

/// Anything that tells signal from noise.
pub trait Denoiser {
    /// z_t `[B, C, F, h, w]` at diffusion time t.
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction;
}

/// A network and what it was trained to predict.
pub struct NetworkDenoiser<'a> {
    /// Predicts what `predict` says.
    pub network: &'a dyn Network,
    /// Of the training.
    pub path: &'a dyn NoisePath,
    /// What the network was trained to predict.
    pub predict: Predict,
    /// What it is given, one a clip.
    pub given: Inputs,
}

impl Denoiser for NetworkDenoiser<'_> {
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
        let time = Tensor::full([z_t.size()[0]], self.path.embed(t), (Kind::Double, z_t.device()));
        let output = match self.path.input_scale(t) {
            1.0 => self.output(z_t, &time),
            scale => self.output(&(z_t * scale), &time),
        };
        let (z_t, output) = (z_t.shallow_clone(), output.to_kind(z_t.kind()));
        let channels = self.network.ports().channels;
        let learned = self.network.ports().outputs - channels;
        let predicted = output.narrow(1, 0, channels);
        let variance = (learned > 0).then(|| output.narrow(1, channels, learned));
        Prediction { variance, ..self.predict.read(z_t, predicted, &self.path.rates(t)) }
    }
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
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
        let mask = self.mask.to_kind(z_t.kind());
        self.inner.predict(&(z_t * (1.0 - &mask) + &self.frames * &mask), t)
    }
}

/// How the conditional and the unconditional prediction are mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
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
    pub path: &'a dyn NoisePath,
}

impl Denoiser for Guided<'_> {
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
        let both = self.conditional.beside(&self.unconditional, z_t).predict(&Tensor::cat(&[z_t, z_t], 0), t);
        let mixed = |of_both: &Tensor| {
            let halves = of_both.chunk(2, 0);
            let [conditional, unconditional] = [&halves[0], &halves[1]];
            let step = (conditional - unconditional) * self.weight;
            match self.form {
                Guidance::Interpolate => unconditional + step,
                Guidance::CfgOriginal => conditional + step,
            }
        };
        // a learned variance is that of the network given all
        let variance = both.variance.as_ref().map(|variance| variance.narrow(0, 0, z_t.size()[0]));
        let (z_t, noise, rates) = (z_t.shallow_clone(), mixed(&both.noise), self.path.rates(t));
        match self.path.discrete() {
            // as released; where a path ends in noise alone, z_0 does not follow from the noise
            Some(_) if rates.alpha > 0.0 => Prediction { variance, ..Predict::Noise.read(z_t, noise, &rates) },
            _ => Prediction { z_t, z_0: mixed(&both.z_0), noise, variance },
        }
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
