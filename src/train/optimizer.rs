use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor, no_grad};

use crate::{
    nn::Parameters,
    torch::{Adam, clear_gradients, clip_global_norm, upload_all},
};

/// Adam or AdamW over all trainable parameters of a network, with a state that can be stored.
pub struct Optimizer {
    adam: Adam,
    names: Vec<String>,
    parameters: Vec<Tensor>,
    first_moments: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl Optimizer {
    /// Over the trainable ones of `parameters`, with moments of zero.
    pub fn new(adam: Adam, parameters: &Parameters) -> Self {
        let (names, parameters): (Vec<_>, Vec<_>) = parameters.trainable().into_iter().unzip();
        let zeros = || parameters.iter().map(|p| p.detach().zeros_like()).collect();
        let steps = parameters.iter().map(|p| Tensor::zeros([], (Kind::Float, p.device()))).collect();
        Optimizer { adam, names, first_moments: zeros(), second_moments: zeros(), steps, parameters }
    }

    /// Forgets the gradients, which count as zero until the next backward pass.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn zero_grad(&mut self) -> Result<()> {
        clear_gradients(&self.parameters)
    }

    /// Of the steps to come.
    pub fn set_learning_rate(&mut self, learning_rate: f64) {
        self.adam.learning_rate = learning_rate;
    }

    fn gradients(&self) -> Vec<Tensor> {
        // a parameter that took no part has a gradient of zero; the kernels read both by memory order, not by strides
        let gradient = |p: &Tensor| {
            let g = p.grad();
            if g.defined() && lies_as(&g, p) {
                return g;
            }
            let mut laid = no_grad(|| p.detach().zeros_like());
            if g.defined() {
                laid.copy_(&g);
            }
            laid
        };
        self.parameters.iter().map(gradient).collect()
    }

    /// The L2 norm over all gradients, a scalar on their device; with `max_norm` they are scaled down to it.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn clip_gradients(&self, max_norm: Option<f64>) -> Result<Tensor> {
        clip_global_norm(&self.gradients(), max_norm)
    }

    /// Moves the parameters, but not where `left_out`, a float32 scalar on their device, is one: so the host need not
    /// wait to know whether the gradients are finite.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn step(&mut self, left_out: Option<&Tensor>) -> Result<()> {
        let moments = [self.first_moments.as_slice(), &self.second_moments];
        self.adam.step(&self.parameters, &self.gradients(), moments, &self.steps, left_out)
    }

    /// What a checkpoint stores: `exp_avg.…`, `exp_avg_sq.…` of each parameter, and `step`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::new();
        for (i, name) in self.names.iter().enumerate() {
            state.push((format!("exp_avg.{name}"), self.first_moments[i].shallow_clone()));
            state.push((format!("exp_avg_sq.{name}"), self.second_moments[i].shallow_clone()));
        }
        // all parameters step together
        if let Some(step) = self.steps.first() {
            state.push(("step".to_string(), step.shallow_clone()));
        }
        state
    }

    /// # Errors
    /// Names what is missing or of another shape.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let (mut own, mut values) = (Vec::new(), Vec::new());
        for (name, tensor) in self.state() {
            let value = state.get(&name).with_context(|| format!("the optimizer's state has no `{name}`"))?;
            ensure!(tensor.size() == value.size(), "`{name}`: shape {:?}, needed {:?}", value.size(), tensor.size());
            own.push(tensor);
            values.push(value.shallow_clone());
        }
        let (Some(parameter), Some(steps)) = (self.parameters.first(), state.get("step")) else { return Ok(()) };
        let values = upload_all(&values, parameter.device());
        no_grad(|| own.iter_mut().zip(values).for_each(|(own, value)| own.copy_(&value)));
        let steps = steps.double_value(&[]);
        for own in &mut self.steps {
            let _ = own.fill_(steps);
        }
        Ok(())
    }
}

/// Whether two tensors of one shape have their values in one order in memory. An axis of one value has no order.
fn lies_as(a: &Tensor, b: &Tensor) -> bool {
    let strides = a.stride().into_iter().zip(b.stride());
    a.size().into_iter().zip(strides).all(|(size, (a, b))| size == 1 || a == b)
}
