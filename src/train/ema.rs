use std::{collections::BTreeMap, rc::Rc};

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    distributed::{Ranks, Shards},
    experiment::TrainerConfig,
    nn::Parameters,
    torch::{AverageDecay, lerp_all, upload_all},
};

/// A moving average of the weights, with or without the warm-up min(decay, (1 + n)/(10 + n)) at the n-th update. A step of
/// the optimizer that it goes along with ([`StepAround`](super::StepAround)) updates it.
pub struct Ema {
    decay: f64,
    warmup: bool,
    updates: i64,
    shards: Rc<Shards>,
    /// Of the parameters that this rank owns.
    average: Vec<(String, Tensor)>,
    /// The updates as the device counts them: a float64 scalar.
    counted: Tensor,
}

impl Ema {
    /// Starts at the present weights, all of which this process averages.
    pub fn new(decay: f64, parameters: &Parameters) -> Self {
        let shards = Shards::new(&Ranks::alone(), &parameters.trainable());
        Self::begin(decay, true, parameters, &Rc::new(shards))
    }

    /// The average that a training keeps, if it does: this rank that of its share of the parameters.
    pub fn of(config: &TrainerConfig, parameters: &Parameters, shards: &Rc<Shards>) -> Option<Self> {
        config.ema_decay.map(|decay| Self::begin(decay, config.ema_warmup, parameters, shards))
    }

    fn begin(decay: f64, warmup: bool, parameters: &Parameters, shards: &Rc<Shards>) -> Self {
        let trainable = parameters.trainable();
        let now = |i: usize| (trainable[i].0.clone(), no_grad(|| trainable[i].1.detach().copy()));
        let average = shards.own().map(now).collect();
        let counted = Tensor::zeros([], (Kind::Double, parameters.device()));
        Ema { decay, warmup, updates: 0, shards: Rc::clone(shards), average, counted }
    }

    /// How kernels of a GPU update it.
    pub(super) fn on_gpu(&self) -> (AverageDecay<'_>, Vec<Tensor>) {
        let average = self.average.iter().map(|(_, t)| t.shallow_clone()).collect();
        (AverageDecay { updates: &self.counted, decay: self.decay, warmup: self.warmup }, average)
    }

    /// Takes in weights, those of the parameters that this rank averages, in order, unless `left_out`, a float32 scalar on their device, is one.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn take_in(&self, weights: &[Tensor], left_out: Option<&Tensor>) -> Result<()> {
        let average: Vec<Tensor> = self.average.iter().map(|(_, t)| t.shallow_clone()).collect();
        let now: Vec<Tensor> = weights.iter().map(Tensor::detach).collect();
        no_grad(|| {
            let mut counted = self.counted.shallow_clone();
            let taken = left_out.map(|left_out| 1.0 - left_out.to_kind(Kind::Double));
            let _ = match &taken {
                Some(taken) => counted.g_add_(taken),
                None => counted.g_add_scalar_(1.0),
            };
            let warm: Tensor = (&counted + 1.0) / (&counted + 10.0);
            let decay = if self.warmup { warm.clamp_max(self.decay) } else { counted.full_like(self.decay) };
            let weight: Tensor = 1.0 - decay;
            let weight = match taken {
                Some(taken) => weight * taken,
                None => weight,
            };
            if counted.device() == Device::Cpu {
                return lerp_all(&average, &now, weight.double_value(&[]));
            }
            // the host does not know what the device has counted
            let weight = weight.to_kind(now.first().map_or(Kind::Float, Tensor::kind));
            for (average, now) in average.iter().zip(&now) {
                let _ = average.shallow_clone().lerp_tensor_(now, &weight);
            }
            Ok(())
        })
    }

    /// One step of the optimizer is known to have updated it.
    pub(super) fn count(&mut self) {
        self.updates += 1;
    }

    /// (name, average) of each trainable parameter that this rank averages.
    pub fn named(&self) -> &[(String, Tensor)] {
        &self.average
    }

    /// (name, average) of all trainable parameters, on rank 0. All ranks must call it together.
    ///
    /// # Errors
    /// A rank that is gone or late.
    pub fn whole(&self) -> Result<Vec<(String, Tensor)>> {
        self.shards.gather(&self.average.iter().map(|(_, t)| t.shallow_clone()).collect::<Vec<_>>())
    }

    /// How often it was updated, as far as the host knows.
    pub fn updates(&self) -> i64 {
        self.updates
    }

    /// Goes on from a stored average.
    ///
    /// # Errors
    /// Names what is missing or of another shape.
    pub fn load_state(&mut self, updates: i64, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.updates = updates;
        no_grad(|| {
            let _ = self.counted.fill_(updates as f64);
        });
        let mut values = Vec::new();
        for (name, average) in &self.average {
            let value = state.get(name).with_context(|| format!("the stored average has no `{name}`"))?;
            ensure!(average.size() == value.size(), "`{name}`: shape {:?}, needed {:?}", value.size(), average.size());
            values.push(value.shallow_clone());
        }
        let Some((_, first)) = self.average.first() else { return Ok(()) };
        let values = upload_all(&values, first.device());
        no_grad(|| self.average.iter_mut().zip(values).for_each(|((_, average), value)| average.copy_(&value)));
        Ok(())
    }
}
