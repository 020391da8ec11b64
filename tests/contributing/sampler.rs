//! A sampler that puts fresh noise on each prediction.

use anyhow::Result;
use lvdm::diffusion::{NoisePath, Prediction, Sampler, SamplerRun};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Each step takes the network's z_0 and adds noise to it, as much as the next time has; `{kind: renoise, steps: 50}`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Renoise {
    /// Calls of the network.
    pub steps: i64,
}

struct RenoiseRun {
    times: Vec<f64>,
    /// (α, σ) of each time.
    rates: Vec<(f64, f64)>,
}

impl Sampler for Renoise {
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>> {
        let times = path.nodes(self.steps)?;
        let rates = times.iter().map(|&t| path.alpha_sigma(t)).collect();
        Ok(Box::new(RenoiseRun { times, rates }))
    }

    fn describe(&self) -> String {
        format!("renoising in {} steps", self.steps)
    }
}

impl SamplerRun for RenoiseRun {
    fn times(&self) -> &[f64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        match self.rates.get(i + 1) {
            None => prediction.z_0.shallow_clone(),
            Some((alpha, sigma)) => &prediction.z_0 * *alpha + noise() * *sigma,
        }
    }
}

// What follows is its test, which stands in the same file.

use lvdm::diffusion::{NoiseSchedule, ScheduleConfig, sample};

use super::{Knowing, common::noise};

#[test]
fn it_arrives_at_z_0() {
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let (z_0, start) = (noise(0, &[1, 4, 2, 3, 3]), noise(1, &[1, 4, 2, 3, 3]));
    let fresh = |i: usize| noise(2 + i as u64, &[1, 4, 2, 3, 3]);
    let renoise: Renoise = super::settings("{steps: 5}");
    let mut seen = Vec::new();
    let found = sample(&Knowing(z_0.copy()), &renoise, &schedule, &start, &fresh, &mut |i, n| seen.push((i, n)));
    assert!(found.unwrap().equal(&z_0) && seen.len() == 5);
    assert!(Renoise { steps: 1 }.start(&schedule).is_err());
    let run = renoise.start(&schedule).unwrap();
    assert_eq!((run.times().len(), run.times()[0], run.times()[4]), (5, 999.0, 0.0));
}
