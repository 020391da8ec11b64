use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::{Tensor, no_grad};

use crate::{
    experiment::TrainerConfig,
    nn::Parameters,
    torch::{lerp_all, upload_all},
};

/// A moving average of the weights, with or without the warm-up min(decay, (1 + n)/(10 + n)) at the n-th update.
pub struct Ema {
    decay: f64,
    warmup: bool,
    updates: i64,
    average: Vec<(String, Tensor)>,
}

impl Ema {
    /// Starts at the present weights.
    pub fn new(decay: f64, parameters: &Parameters) -> Self {
        let average = parameters.trainable().into_iter().map(|(n, t)| (n, no_grad(|| t.detach().copy()))).collect();
        Ema { decay, warmup: true, updates: 0, average }
    }

    /// The average that a training keeps, if it does.
    pub fn of(config: &TrainerConfig, parameters: &Parameters) -> Option<Self> {
        config.ema_decay.map(|decay| Ema { warmup: config.ema_warmup, ..Ema::new(decay, parameters) })
    }

    /// Takes in the present weights.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn update(&mut self, parameters: &Parameters) -> Result<()> {
        self.updates += 1;
        let n = self.updates as f64;
        let decay = if self.warmup { self.decay.min((1.0 + n) / (10.0 + n)) } else { self.decay };
        let now: Vec<Tensor> = parameters.trainable().into_iter().map(|(_, t)| t.detach()).collect();
        let average: Vec<Tensor> = self.average.iter().map(|(_, t)| t.shallow_clone()).collect();
        lerp_all(&average, &now, 1.0 - decay)
    }

    /// (name, average) of each trainable parameter.
    pub fn named(&self) -> &[(String, Tensor)] {
        &self.average
    }

    /// How often it was updated.
    pub fn updates(&self) -> i64 {
        self.updates
    }

    /// Goes on from a stored average.
    ///
    /// # Errors
    /// Names what is missing or of another shape.
    pub fn load_state(&mut self, updates: i64, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.updates = updates;
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
