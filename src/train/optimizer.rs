use std::{collections::BTreeMap, rc::Rc};

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor, no_grad};

use super::Ema;
use crate::{
    distributed::{Ranks, Shards},
    nn::Parameters,
    torch::{Adam, clear_gradients, clip_to_norm, has_gpu_kernels, upload, upload_all},
};

/// What a step does besides moving the parameters.
#[derive(Default, Clone, Copy)]
pub struct StepAround<'a> {
    /// Float64 numbers on the device, of which the last is the norm of the gradients. Where one is not finite nothing moves: the
    /// device itself decides, so that the host need not wait for them.
    pub checked: Option<&'a Tensor>,
    /// The gradients are scaled down to this norm; with `checked`.
    pub max_norm: Option<f64>,
    /// Takes in the weights as they are after the step: of the same share of the parameters as the optimizer's.
    pub average: Option<&'a Ema>,
}

/// Adam or AdamW over all trainable parameters of a network, with a state that can be stored. Where ranks share them out, each
/// moves its own and gets the others' from their owners.
pub struct Optimizer {
    adam: Adam,
    shards: Rc<Shards>,
    /// All of them.
    parameters: Vec<Tensor>,
    /// Of those that this rank owns, and so what follows.
    names: Vec<String>,
    first_moments: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    /// How many steps there were: a float32 scalar on the device, of all parameters together.
    steps: Tensor,
    /// The learning rate where kernels of a GPU make the step: a float64 scalar there.
    rate: Option<Tensor>,
    /// Which parameters the weight decay acts on; none where it acts on all.
    decays: Option<Vec<bool>>,
}

impl Optimizer {
    /// Over the trainable ones of `parameters`, all of which this process moves, with moments of zero.
    pub fn new(adam: Adam, parameters: &Parameters) -> Self {
        Self::over(adam, parameters, &Rc::new(Shards::new(&Ranks::alone(), &parameters.trainable())))
    }

    /// As [`Self::new`], where ranks have shared out the trainable parameters.
    pub fn over(adam: Adam, parameters: &Parameters, shards: &Rc<Shards>) -> Self {
        let device = parameters.device();
        let (names, parameters): (Vec<_>, Vec<_>) = parameters.trainable().into_iter().unzip();
        let zeros = || shards.own().map(|i| parameters[i].detach().zeros_like()).collect();
        let steps = Tensor::zeros([], (Kind::Float, device));
        let by_kernels = has_gpu_kernels(device) && parameters.iter().all(|p| p.kind() == Kind::Float);
        let rate = by_kernels.then(|| upload(&Tensor::from(adam.learning_rate), device));
        Optimizer {
            adam,
            shards: Rc::clone(shards),
            names: shards.own().map(|i| names[i].clone()).collect(),
            first_moments: zeros(),
            second_moments: zeros(),
            steps,
            rate,
            parameters,
            decays: None,
        }
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
        if let Some(rate) = self.rate.as_mut().filter(|_| self.adam.learning_rate != learning_rate) {
            rate.copy_(&upload(&Tensor::from(learning_rate), rate.device()));
        }
        self.adam.learning_rate = learning_rate;
    }

    /// Whether all that differs from one step to the next lies on the device, so that a step can be recorded.
    pub fn repeats(&self) -> bool {
        self.rate.is_some()
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

    /// Moves the parameters by [`Self::gradients`], which it may scale.
    ///
    /// # Errors
    /// LibTorch's own. Where ranks have shared the parameters out, a rank that is gone or late.
    pub fn step(&mut self, gradients: &[Tensor], around: StepAround) -> Result<()> {
        self.step_own(&self.shards.share(&self.parameters), &self.shards.share(gradients), around)?;
        self.shards.spread(&self.parameters)
    }

    /// Moves the parameters that this rank owns.
    fn step_own(&mut self, parameters: &[Tensor], gradients: &[Tensor], around: StepAround) -> Result<()> {
        let StepAround { checked, max_norm, average } = around;
        if let Some(rate) = &self.rate {
            let (decay, averages) = average.map(Ema::on_gpu).unzip();
            let numbers = self.adam.prepare_on_gpu(checked, rate, &self.steps, max_norm, decay)?;
            return self.of_each(|adam, chosen| {
                let average = averages.as_ref().map(|all| chosen(all));
                let [first, second] = [&self.first_moments, &self.second_moments].map(|all| chosen(all));
                let moments = [first.as_slice(), &second];
                adam.step_on_gpu(&chosen(parameters), &chosen(gradients), moments, average.as_deref(), &numbers)
            });
        }
        if let (Some(checked), Some(max_norm)) = (checked, max_norm) {
            let kind = gradients.first().map_or(Kind::Float, Tensor::kind);
            clip_to_norm(gradients, &checked.get(checked.size()[0] - 1).to_kind(kind), max_norm)?;
        }
        let left_out = checked.map(|checked| checked.isfinite().all().logical_not().to_kind(Kind::Float));
        no_grad(|| {
            let _ = self.steps.g_add_scalar_(1.0);
            self.of_each(|adam, chosen| {
                let [first, second] = [&self.first_moments, &self.second_moments].map(|all| chosen(all));
                let moments = [first.as_slice(), &second];
                adam.step(&chosen(parameters), &chosen(gradients), moments, &self.steps, left_out.as_ref())
            })?;
            if let Some(left_out) = &left_out {
                self.steps -= left_out;
            }
            average.map_or(Ok(()), |average| average.take_in(parameters, left_out.as_ref()))
        })
    }

    /// `step(constants, those of a list that they are for)` for the parameters with weight decay and for those without.
    fn of_each(&self, step: impl Fn(Adam, &dyn Fn(&[Tensor]) -> Vec<Tensor>) -> Result<()>) -> Result<()> {
        let Some(decays) = &self.decays else {
            return step(self.adam, &|all| all.iter().map(Tensor::shallow_clone).collect());
        };
        for with_decay in [true, false] {
            let adam = Adam { weight_decay: if with_decay { self.adam.weight_decay } else { 0.0 }, ..self.adam };
            step(adam, &|all| {
                let chosen = all.iter().zip(decays).filter(|(_, decays)| **decays == with_decay);
                chosen.map(|(tensor, _)| tensor.shallow_clone()).collect()
            })?;
        }
        Ok(())
    }

    /// What this rank holds: `exp_avg.…`, `exp_avg_sq.…` of each parameter that it owns, and `step`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let named = |moments: &[Tensor]| {
            self.names.iter().cloned().zip(moments.iter().map(Tensor::shallow_clone)).collect::<Vec<_>>()
        };
        self.stored([named(&self.first_moments), named(&self.second_moments)])
    }

    /// What a checkpoint stores: the state of all parameters, on rank 0. All ranks must call it together.
    ///
    /// # Errors
    /// A rank that is gone or late.
    pub fn whole_state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.stored([self.shards.gather(&self.first_moments)?, self.shards.gather(&self.second_moments)?]))
    }

    /// Named moments, and the number of steps, by their names in a checkpoint.
    fn stored(&self, moments: [Vec<(String, Tensor)>; 2]) -> Vec<(String, Tensor)> {
        let mut state = Vec::new();
        for (prefix, named) in ["exp_avg", "exp_avg_sq"].into_iter().zip(moments) {
            state.extend(named.into_iter().map(|(name, moment)| (format!("{prefix}.{name}"), moment)));
        }
        if !self.parameters.is_empty() {
            state.push(("step".to_string(), self.steps.shallow_clone()));
        }
        state
    }

    /// Goes on from a stored state, of which this rank takes what it holds.
    ///
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
    use tch::Device;

    use super::*;
    use crate::{
        nn::Init,
        random::{Purpose, normal},
        torch::{as_on_gpu, global_norm},
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
        optimizer.step(&gradients, StepAround::default()).unwrap();
        assert_eq!(Vec::<f32>::try_from(map.detach()).unwrap(), [0.95; 3]);
        assert_eq!(Vec::<f32>::try_from(norm.detach()).unwrap(), [1.0; 3]);
        // both count their steps and keep their moments
        (&map + &norm).sum(None).backward();
        optimizer.step(&optimizer.gradients(), StepAround::default()).unwrap();
        let state: BTreeMap<String, Tensor> = optimizer.state().into_iter().collect();
        assert_eq!(state["step"].double_value(&[]), 2.0);
        assert!(["map", "norm"].iter().all(|name| state[&format!("exp_avg.{name}")].double_value(&[0]) > 0.0));
    }

    /// Kernels of a GPU make the same steps as LibTorch's: with Adam and AdamW, with clipping, without weight decay of some
    /// parameters, with an average that warms up, and where a gradient is not finite.
    #[test]
    fn kernels_of_a_gpu_make_the_same_steps() {
        let values = |step, size: &[i64]| normal(1, Purpose::Evaluation, 0, step, size);
        let train = |decoupled: bool, warmup: bool| {
            let parameters = Parameters::new(Device::Cpu, 0);
            let sizes: [&[i64]; 4] = [&[3, 5], &[4096 + 7], &[1], &[2, 8, 3]];
            let weights: Vec<Tensor> = sizes
                .iter()
                .enumerate()
                .map(|(i, size)| parameters.root().parameter(format!("weight.{i}"), size, Init::ONES))
                .collect();
            let adam = Adam { learning_rate: 0.1, betas: (0.9, 0.99), weight_decay: 0.2, eps: 1e-8, decoupled };
            let mut optimizer = Optimizer::new(adam, &parameters).decaying(|name| name != "weight.1");
            let config = serde_json::json!({"steps": 1, "batch": 1, "ema_decay": 0.6, "ema_warmup": warmup});
            let shards = Rc::new(Shards::new(&Ranks::alone(), &parameters.trainable()));
            let ema = Ema::of(&serde_json::from_value(config).unwrap(), &parameters, &shards).unwrap();
            for step in 0..6 {
                optimizer.set_learning_rate(0.1 / (step + 1) as f64);
                optimizer.zero_grad().unwrap();
                let scale = if step == 3 { f64::NAN } else { 1.0 };
                let part =
                    |(i, weight): (usize, &Tensor)| (weight * values(10 * step + i as u64, sizes[i]) * scale).sum(None);
                Tensor::stack(&weights.iter().enumerate().map(part).collect::<Vec<_>>(), 0).sum(None).backward();
                let gradients = optimizer.gradients();
                let norm = global_norm(&gradients).unwrap().to_kind(Kind::Double).reshape([1]);
                let around = StepAround { checked: Some(&norm), max_norm: Some(20.0), average: Some(&ema) };
                optimizer.step(&gradients, around).unwrap();
            }
            let mut all: Vec<Tensor> = weights.iter().map(Tensor::detach).collect();
            all.extend(ema.named().iter().chain(&optimizer.state()).map(|(_, t)| t.shallow_clone()));
            all
        };
        for (decoupled, warmup) in [(true, true), (false, false)] {
            let usual = train(decoupled, warmup);
            let by_kernels = as_on_gpu(|| train(decoupled, warmup));
            for (i, (found, wanted)) in by_kernels.iter().zip(&usual).enumerate() {
                let apart = (found - wanted).norm().double_value(&[]) / wanted.norm().double_value(&[]);
                assert!(apart < 4e-6, "tensor {i}: {apart}");
            }
        }
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
                let norm = global_norm(&gradients).unwrap().to_kind(Kind::Double).reshape([1]);
                let around = StepAround { checked: Some(&norm), max_norm: Some(1.0), average: None };
                optimizer.step(&gradients, around).unwrap();
                norms.push(norm.double_value(&[0]));
            }
            assert!((norms[0] - 100.0).abs() < 1e-3 && (norms[1] - 1.0).abs() < 1e-5, "{norms:?}");
            weight.detach()
        };
        let (other, usual) = (train(true), train(false));
        assert!((&other - &usual).abs().max().double_value(&[]) < 1e-6, "{}", (&other - &usual).abs().max());
    }
}
