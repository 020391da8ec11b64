//! Solvers of the probability-flow ODE in λ = ln(α/σ): DPM-Solver++ and UniPC.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    path::NoisePath,
    prediction::Prediction,
    sampler::{Sampler, SamplerRun},
};

/// Nodes of a solver of the probability-flow ODE, in the order of the walk. What follows the last node is its z_0. At a first
/// node of nothing but noise λ is −∞, and the step from there is of first order.
struct Nodes {
    times: Vec<f64>,
    /// α
    alpha: Vec<f64>,
    /// σ
    sigma: Vec<f64>,
    /// ln(α/σ)
    lambda: Vec<f64>,
}

impl Nodes {
    fn new(path: &dyn NoisePath, steps: i64) -> Result<Self> {
        let times = path.nodes(steps)?;
        let (alpha, sigma): (Vec<f64>, Vec<f64>) = times.iter().map(|&t| path.alpha_sigma(t)).unzip();
        Ok(Nodes { alpha, sigma, lambda: times.iter().map(|&t| path.lambda(t)).collect(), times })
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
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct DpmSolver {
    /// Network calls.
    pub steps: i64,
}

impl Default for DpmSolver {
    fn default() -> Self {
        DpmSolver { steps: 50 }
    }
}

struct DpmSolverRun {
    nodes: Nodes,
    before: Option<Tensor>,
}

impl Sampler for DpmSolver {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        Ok(Box::new(DpmSolverRun { nodes: Nodes::new(path, self.steps)?, before: None }))
    }

    fn describe(&self) -> String {
        format!("DPM-Solver++ {} steps", self.steps)
    }
}

impl SamplerRun for DpmSolverRun {
    fn times(&self) -> &[f64] {
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
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[serde(default)]
pub struct UniPc {
    /// Network calls.
    pub steps: i64,
}

impl Default for UniPc {
    fn default() -> Self {
        UniPc { steps: 50 }
    }
}

struct UniPcRun {
    nodes: Nodes,
    /// Corrected z and z_0 at the node before.
    last: Option<(Tensor, Tensor)>,
    /// z_0 at the one before that.
    before: Option<Tensor>,
}

impl Sampler for UniPc {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        Ok(Box::new(UniPcRun { nodes: Nodes::new(path, self.steps)?, last: None, before: None }))
    }

    fn describe(&self) -> String {
        format!("UniPC {} steps", self.steps)
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
    fn times(&self) -> &[f64] {
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
