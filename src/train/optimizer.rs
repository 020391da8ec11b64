use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    nn::Parameters,
    torch::{Adam, clear_gradients, upload_all},
};

/// Adam or AdamW over all trainable parameters of a network, with a state that can be stored.
pub struct Optimizer {
    adam: Adam,
    names: Vec<String>,
    parameters: Vec<Tensor>,
    first_moments: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    /// How many steps there were: a float32 scalar on the device, of all parameters together.
    steps: Tensor,
    /// Which parameters the weight decay acts on; none where it acts on all.
    decays: Option<Vec<bool>>,
}

impl Optimizer {
    /// Over the trainable ones of `parameters`, with moments of zero.
    pub fn new(adam: Adam, parameters: &Parameters) -> Self {
        let (names, parameters): (Vec<_>, Vec<_>) = parameters.trainable().into_iter().unzip();
        let zeros = || parameters.iter().map(|p| p.detach().zeros_like()).collect();
        let device = parameters.first().map_or(Device::Cpu, Tensor::device);
        let steps = Tensor::zeros([], (Kind::Float, device));
        Optimizer { adam, names, first_moments: zeros(), second_moments: zeros(), steps, parameters, decays: None }
    }

    /// With a weight decay that acts on the parameters of these names alone.
    pub fn decaying(mut self, chosen: impl Fn(&str) -> bool) -> Self {
        let chosen: Vec<bool> = self.names.iter().map(|name| chosen(name)).collect();
        self.decays = chosen.contains(&false).then_some(chosen);
        self
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

    /// The gradients that [`Self::step`] moves the parameters by, one a parameter. Each is the parameter's own, or,
    /// where that is missing (the parameter took no part) or lies in memory in another order than the parameter does, a
    /// copy that does not: the kernels go by memory order, not by strides.
    pub fn gradients(&self) -> Vec<Tensor> {
        let gradient = |p: &Tensor| {
            let g = p.grad();
            if g.defined() && same_layout(&g, p) {
                return g;
            }
            let mut matched = no_grad(|| p.detach().zeros_like());
            if g.defined() {
                matched.copy_(&g);
            }
            matched
        };
        self.parameters.iter().map(gradient).collect()
    }

    /// Moves the parameters by [`Self::gradients`], clipped or not, but not where `left_out`, a float32 scalar on their
    /// device, is one: so the host need not wait to know whether the gradients are finite.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn step(&mut self, gradients: &[Tensor], left_out: Option<&Tensor>) -> Result<()> {
        let _ = no_grad(|| self.steps.g_add_scalar_(1.0));
        self.step_all(gradients, left_out)?;
        if let Some(left_out) = left_out {
            no_grad(|| self.steps -= left_out);
        }
        Ok(())
    }

    fn step_all(&self, gradients: &[Tensor], left_out: Option<&Tensor>) -> Result<()> {
        let moments = [self.first_moments.as_slice(), &self.second_moments];
        let Some(decays) = &self.decays else {
            return self.adam.step(&self.parameters, gradients, moments, &self.steps, left_out);
        };
        for with_decay in [true, false] {
            let part = |all: &[Tensor]| -> Vec<Tensor> {
                let chosen = all.iter().zip(decays).filter(|(_, decays)| **decays == with_decay);
                chosen.map(|(tensor, _)| tensor.shallow_clone()).collect()
            };
            let adam = Adam { weight_decay: if with_decay { self.adam.weight_decay } else { 0.0 }, ..self.adam };
            let [first, second] = moments.map(part);
            adam.step(&part(&self.parameters), &part(gradients), [&first, &second], &self.steps, left_out)?;
        }
        Ok(())
    }

    /// What a checkpoint stores: `exp_avg.…`, `exp_avg_sq.…` of each parameter, and `step`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::new();
        for (i, name) in self.names.iter().enumerate() {
            state.push((format!("exp_avg.{name}"), self.first_moments[i].shallow_clone()));
            state.push((format!("exp_avg_sq.{name}"), self.second_moments[i].shallow_clone()));
        }
        if !self.names.is_empty() {
            state.push(("step".to_string(), self.steps.shallow_clone()));
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
        let values = upload_all(&values, self.steps.device());
        no_grad(|| own.iter_mut().zip(values).for_each(|(own, value)| own.copy_(&value)));
        Ok(())
    }
}

/// Whether two tensors of one shape have their values in one order in memory. An axis of one value has no order.
fn same_layout(a: &Tensor, b: &Tensor) -> bool {
    let strides = a.stride().into_iter().zip(b.stride());
    a.size().into_iter().zip(strides).all(|(size, (a, b))| size == 1 || a == b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        nn::Init,
        random::{Purpose, normal},
        torch::clip_global_norm,
    };

    /// Without a gradient a parameter moves by its decay alone, and only where it is chosen.
    #[test]
    fn the_decay_acts_on_what_is_chosen() {
        let parameters = Parameters::new(Device::Cpu, 0);
        let [map, norm] = ["map", "norm"].map(|name| parameters.root().parameter(name, &[3], Init::ONES));
        let adam = Adam { learning_rate: 0.1, betas: (0.9, 0.95), weight_decay: 0.5, eps: 1e-8, decoupled: true };
        let mut optimizer = Optimizer::new(adam, &parameters).decaying(|name| name == "map");
        optimizer.zero_grad().unwrap();
        (&map * 0.0 + &norm * 0.0).sum(None).backward();
        let gradients = optimizer.gradients();
        optimizer.step(&gradients, None).unwrap();
        assert_eq!(Vec::<f32>::try_from(map.detach()).unwrap(), [0.95; 3]);
        assert_eq!(Vec::<f32>::try_from(norm.detach()).unwrap(), [1.0; 3]);
        // both count their steps and keep their moments
        (&map + &norm).sum(None).backward();
        optimizer.step(&optimizer.gradients(), None).unwrap();
        let state: BTreeMap<String, Tensor> = optimizer.state().into_iter().collect();
        assert_eq!(state["step"].double_value(&[]), 2.0);
        assert!(["map", "norm"].iter().all(|name| state[&format!("exp_avg.{name}")].double_value(&[0]) > 0.0));
    }

    /// A gradient may lie in memory in another order than its parameter, as one that came from other ranks does. It is
    /// clipped and stepped like any other: what is clipped is what is stepped.
    #[test]
    fn clipping_acts_on_the_gradients_that_are_stepped() {
        const SIZE: [i64; 4] = [2, 3, 4, 5];
        let values = |sample| normal(1, Purpose::Evaluation, sample, 0, &SIZE);
        let adam = Adam { learning_rate: 0.1, betas: (0.9, 0.999), weight_decay: 0.0, eps: 1e-8, decoupled: false };
        let train = |other_order: bool| {
            let parameters = Parameters::new(Device::Cpu, 0);
            let mut weight = parameters.root().parameter("weight", &SIZE, Init::ZEROS);
            no_grad(|| weight.copy_(&values(0)));
            let mut optimizer = Optimizer::new(adam, &parameters);
            let mut norms = Vec::new();
            // the first gradient is clipped to a hundredth, the second is not: Adam sees the ratio of the two
            for (sample, size) in [(1, 100.0), (2, 1.0)] {
                optimizer.zero_grad().unwrap();
                let direction = values(sample);
                let direction = &direction / direction.norm() * size;
                (&weight * &direction).sum(None).backward();
                if other_order {
                    let mut gradient = weight.grad();
                    no_grad(|| gradient.as_strided_(SIZE, [1, 2, 6, 24], 0).copy_(&direction));
                    assert!(!same_layout(&gradient, &weight) && weight.grad().stride() == [1, 2, 6, 24]);
                }
                let gradients = optimizer.gradients();
                norms.push(clip_global_norm(&gradients, Some(1.0)).unwrap().double_value(&[]));
                optimizer.step(&gradients, None).unwrap();
            }
            assert!((norms[0] - 100.0).abs() < 1e-3 && (norms[1] - 1.0).abs() < 1e-5, "{norms:?}");
            weight.detach()
        };
        let (other, usual) = (train(true), train(false));
        assert!((&other - &usual).abs().max().double_value(&[]) < 1e-6, "{}", (&other - &usual).abs().max());
    }
}
