//! A noise path on a quarter of a circle.

use anyhow::{Result, ensure};
use lvdm::diffusion::{NoisePath, NoisePathSettings};
use rand::{Rng, RngExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Noise replaces data at an even speed: α = cos(π·t/2), σ = sin(π·t/2); `schedule: {kind: quarter_circle}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuarterCircle {}

impl NoisePathSettings for QuarterCircle {
    fn build(&self) -> Result<Box<dyn NoisePath>> {
        Ok(Box::new(self.clone()))
    }
}

impl NoisePath for QuarterCircle {
    fn alpha_sigma(&self, t: f64) -> (f64, f64) {
        let angle = t * std::f64::consts::FRAC_PI_2;
        (angle.cos(), angle.sin())
    }

    fn draw(&self, random: &mut dyn Rng) -> f64 {
        random.random()
    }

    fn noisiest(&self) -> f64 {
        1.0
    }

    fn nodes(&self, steps: i64) -> Result<Vec<f64>> {
        ensure!(steps >= 1, "steps must be at least 1, not {steps}");
        Ok((0..steps).map(|i| 1.0 - i as f64 / steps as f64).collect())
    }

    fn embed(&self, t: f64) -> f64 {
        1000.0 * t
    }
}

// What follows is its test, which stands in the same file.

use lvdm::{
    diffusion::{Ddim, Objective, Predict, Sampler, Times, UniPc, sample},
    random::{Purpose, stream},
};

use super::{
    Knowing,
    common::{noise, relative_error},
};

/// Every sampler walks along the new path, and objectives fit it.
#[test]
fn samplers_and_objectives_work_on_it() {
    let path = super::settings::<QuarterCircle>("{}").build().unwrap();
    let (z_0, start) = (noise(0, &[1, 4, 2, 3, 3]), noise(1, &[1, 4, 2, 3, 3]));
    let fresh = |i: usize| noise(2 + i as u64, &[1, 4, 2, 3, 3]);
    let samplers: [&dyn Sampler; 3] =
        [&super::sampler::Renoise { steps: 4 }, &Ddim { steps: 4, eta: 1.0 }, &UniPc { steps: 4 }];
    for sampler in samplers {
        let found = sample(&Knowing(z_0.copy()), sampler, &*path, &start, &fresh, &mut |_, _| {}).unwrap();
        assert!(relative_error(&found, &z_0) < 1e-6, "{}", sampler.describe());
    }
    // half way there is as much of one as of the other
    let z_t = Times::of_clips(&*path, &[0.5], z_0.device()).add_noise(&z_0, &start);
    assert!(relative_error(&z_t, &((&z_0 + &start) * 0.5f64.sqrt())) < 1e-6);
    let drawn = path.draw(&mut stream(0, Purpose::DiffusionTime, 0, 0));
    assert!((0.0..1.0).contains(&drawn));
    Objective { predict: Predict::Velocity, ..Objective::default() }.validate(&*path).unwrap();
}
