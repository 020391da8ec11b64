//! Denoisers: a network with its conditions, given frames, guidance. Samplers see nothing else.

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

/// Predicts signal and noise of noisy latents.
pub trait Denoiser {
    /// The prediction for z_t `[B, C, F, h, w]` at the diffusion time t of the path.
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction;
}

impl Denoiser for Box<dyn Denoiser + '_> {
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
        (**self).predict(z_t, t)
    }
}

/// A network with its conditions, and what it was trained to predict.
pub struct NetworkDenoiser<'a> {
    /// The network.
    pub network: &'a dyn Network,
    /// The noise path on which it was trained.
    pub path: &'a dyn NoisePath,
    /// What the network was trained to predict.
    pub predict: Predict,
    /// The conditions, one for each clip of the batch.
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

/// How the conditional and the unconditional prediction ε_c and ε_u are mixed by the weight w.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Guidance {
    /// ε_u + w (ε_c − ε_u)
    Interpolate,
    /// ε_c + w (ε_c − ε_u): the paper's (1 + w) ε_c − w ε_u (equation 8).
    CfgOriginal,
}

/// Classifier-free guidance (Ho & Salimans 2022; paper, equation 8). Both predictions are computed in one pass of the
/// network over twice the clips.
pub struct Guided<'a> {
    /// The network under all conditions.
    pub conditional: NetworkDenoiser<'a>,
    /// The same network without the condition that guidance strengthens.
    pub unconditional: NetworkDenoiser<'a>,
    /// The weight w.
    pub weight: f64,
    /// How the two are mixed.
    pub form: Guidance,
    /// To get z_0 back from the mixed noise of a network that predicts noise.
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
        let (z_t, noise) = (z_t.shallow_clone(), mixed(&both.noise));
        match self.conditional.predict {
            // as released
            Predict::Noise => Prediction { variance, ..Predict::Noise.read(z_t, noise, &self.path.rates(t)) },
            // the weights of the two sum to one, so z_0 of the mixed predictions is the mixed z_0; read from the mixed
            // noise instead, where there is little signal, it would be rounding errors over α
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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{diffusion::CosineSchedule, networks::Ports};

    /// Answers the label of each clip times a fixed random field.
    struct ByLabel {
        field: Tensor,
        ports: Ports,
    }

    impl Network for ByLabel {
        fn forward(&self, _: &Tensor, _: &Tensor, given: &Inputs) -> Tensor {
            let label = given.label.as_ref().expect("completed").to_kind(Kind::Float);
            &self.field * label.reshape([-1, 1, 1, 1, 1])
        }

        fn ports(&self) -> &Ports {
            &self.ports
        }
    }

    /// At the last step of a cosine schedule α is 5e-5: z_0 of guided velocities is that of the mixed velocity, to the
    /// precision of float32.
    #[test]
    fn guided_predictions_keep_their_precision_where_there_is_little_signal() {
        let path = CosineSchedule::default().schedule().unwrap();
        let normal = || Tensor::randn([1, 2, 3, 4, 4], (Kind::Float, Device::Cpu));
        let ports = Ports { classes: Some(3), ..Ports::of([2, 3, 4, 4]) };
        let (network, z_t) = (ByLabel { field: normal(), ports }, normal());
        let label = Some(Tensor::from_slice(&[1i64]));
        for predict in [Predict::Velocity, Predict::Z0, Predict::Flow] {
            let denoiser = |given| NetworkDenoiser { network: &network, path: &path, predict, given };
            let guided = Guided {
                conditional: denoiser(Inputs { label: label.as_ref().map(Tensor::shallow_clone), ..Inputs::default() }),
                unconditional: denoiser(Inputs::default()),
                weight: 4.0,
                form: Guidance::Interpolate,
                path: &path,
            };
            let found = guided.predict(&z_t, 999.0);
            // "no class" is 3, the class 1: 3 + 4·(1 − 3) = −5
            let mixed = network.field.to_kind(Kind::Double) * -5.0;
            let wanted = predict.read(z_t.to_kind(Kind::Double), mixed, &path.rates(999.0));
            for (found, wanted) in [(found.z_0, wanted.z_0), (found.noise, wanted.noise)] {
                let error = ((found - &wanted).abs().max() / wanted.abs().max()).double_value(&[]);
                assert!(error < 1e-5, "{predict:?}: {error:e}");
            }
        }
    }
}
