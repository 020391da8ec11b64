use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
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
    average: Vec<(String, Tensor)>,
    /// The updates as the device counts them: a float64 scalar.
    counted: Tensor,
}

impl Ema {
    /// Starts at the present weights.
    pub fn new(decay: f64, parameters: &Parameters) -> Self {
        let average: Vec<(String, Tensor)> =
            parameters.trainable().into_iter().map(|(n, t)| (n, no_grad(|| t.detach().copy()))).collect();
        let device = average.first().map_or(Device::Cpu, |(_, t)| t.device());
        Ema { decay, warmup: true, updates: 0, average, counted: Tensor::zeros([], (Kind::Double, device)) }
    }

    /// The average that a training keeps, if it does.
    pub fn of(config: &TrainerConfig, parameters: &Parameters) -> Option<Self> {
        config.ema_decay.map(|decay| Ema { warmup: config.ema_warmup, ..Ema::new(decay, parameters) })
    }

    /// How kernels of a GPU update it.
    pub(super) fn on_gpu(&self) -> (AverageDecay<'_>, Vec<Tensor>) {
        let average = self.average.iter().map(|(_, t)| t.shallow_clone()).collect();
        (AverageDecay { updates: &self.counted, decay: self.decay, warmup: self.warmup }, average)
    }

    /// Takes in weights, those of the parameters in order, unless `left_out`, a float32 scalar on their device, is one.
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

    /// (name, average) of each trainable parameter.
    pub fn named(&self) -> &[(String, Tensor)] {
        &self.average
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
