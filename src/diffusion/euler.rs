//! Solvers on straight pieces: between two times z moves by Δα·z_0 + Δσ·ε. On rectified flow and on EDM's path, where α
//! and σ change linearly in time, these are the rules of Euler and Heun in time itself.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    path::NoisePath,
    prediction::Prediction,
    sampler::{Sampler, SamplerRun},
};

/// Euler's rule: of first order, one call of the network a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct Euler {
    /// Steps of the walk from noise to data, each one call of the network.
    pub steps: i64,
}

impl Default for Euler {
    fn default() -> Self {
        Euler { steps: 50 }
    }
}

/// Heun's rule: of second order, a second call of the network where Euler's step arrives (Karras et al. 2022,
/// algorithm 1). The last step has one only on paths whose network can be asked at no noise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct Heun {
    /// Steps of the walk from noise to data: about half of the calls of the network.
    pub steps: i64,
}

impl Default for Heun {
    fn default() -> Self {
        Heun { steps: 50 }
    }
}

/// How z moves from each node to the next, the last to (1, 0): (Δα, Δσ).
fn moves(path: &dyn NoisePath, nodes: &[f64]) -> Vec<(f64, f64)> {
    let rates: Vec<(f64, f64)> = nodes.iter().map(|&t| path.alpha_sigma(t)).chain([(1.0, 0.0)]).collect();
    rates.windows(2).map(|pair| (pair[1].0 - pair[0].0, pair[1].1 - pair[0].1)).collect()
}

/// z after a piece along which z_0 and the noise are as predicted.
fn moved(z: &Tensor, (alpha, sigma): (f64, f64), prediction: &Prediction) -> Tensor {
    z + &prediction.z_0 * alpha + &prediction.noise * sigma
}

struct EulerRun {
    times: Vec<f64>,
    moves: Vec<(f64, f64)>,
}

impl Sampler for Euler {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        let times = path.nodes(self.steps)?;
        Ok(Box::new(EulerRun { moves: moves(path, &times), times }))
    }

    fn describe(&self) -> String {
        format!("Euler {} steps", self.steps)
    }
}

impl SamplerRun for EulerRun {
    fn times(&self) -> &[f64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, _noise: &dyn Fn() -> Tensor) -> Tensor {
        moved(&prediction.z_t, self.moves[i], prediction)
    }
}

struct HeunRun {
    /// t_0, t_1, t_1, t_2, t_2, …: where each step begins, then where it arrives.
    times: Vec<f64>,
    /// Of each step.
    moves: Vec<(f64, f64)>,
    /// z and the prediction where the step began.
    begun: Option<Prediction>,
}

impl Sampler for Heun {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        let nodes = path.nodes(self.steps)?;
        let mut times: Vec<f64> = nodes.windows(2).flatten().copied().collect();
        times.extend(nodes.last());
        times.extend(path.clean());
        Ok(Box::new(HeunRun { moves: moves(path, &nodes), times, begun: None }))
    }

    fn describe(&self) -> String {
        format!("Heun {} steps", self.steps)
    }
}

impl SamplerRun for HeunRun {
    fn times(&self) -> &[f64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, _noise: &dyn Fn() -> Tensor) -> Tensor {
        let piece = self.moves[i / 2];
        match self.begun.take() {
            None => {
                let Prediction { z_t, z_0, noise, .. } = prediction;
                let [z_t, z_0, noise] = [z_t, z_0, noise].map(Tensor::shallow_clone);
                let arrived = moved(&z_t, piece, prediction);
                self.begun = Some(Prediction { z_t, z_0, noise, variance: None });
                arrived
            }
            Some(begun) => {
                let half = (piece.0 / 2.0, piece.1 / 2.0);
                moved(&moved(&begun.z_t, half, &begun), half, prediction)
            }
        }
    }
}
