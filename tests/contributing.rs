//! The examples of CONTRIBUTING.md: they stand here word for word, compile and work.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use lvdm::{
    data::{ClipSpec, Fit, Listing, VideoDataset, VideoEntry, VideoFile},
    diffusion::{
        Ddim, Denoiser, NoisePath, NoiseSchedule, Objective, Predict, Prediction, Sampler, SamplerRun, ScheduleConfig,
        Times, UniPc, sample,
    },
};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The videos that a text file names, one a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    /// The text file.
    file: PathBuf,
}

impl VideoDataset for Listed {
    fn videos(&self, _: &ClipSpec) -> Result<Listing> {
        let text = fs::read_to_string(&self.file).with_context(|| format!("no list {}", self.file.display()))?;
        let entry = |line: &str| VideoEntry::new(line, VideoFile::new(line));
        Ok(text.lines().map(entry).collect::<Vec<_>>().into())
    }

    fn path(&self) -> &Path {
        &self.file
    }
}

/// Noise replaces data along a quarter of a circle, at an even speed: α = cos(π·t/2), σ = sin(π·t/2).
struct QuarterCircle;

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

    fn level_time(&self, level: i64) -> f64 {
        level as f64 / self.levels() as f64
    }
}

/// Each step takes the network's z_0 and puts fresh noise on it, as much as the next time has.
struct Renoise {
    steps: i64,
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

/// The distance of the means of features `[N, D]` and `[M, D]`.
///
/// # Errors
/// Different widths.
fn mean_distance(real: &Tensor, generated: &Tensor) -> Result<f64> {
    let mean = |features: &Tensor| features.mean_dim([0].as_slice(), false, Kind::Double);
    let (real, generated) = (mean(real), mean(generated));
    ensure!(real.size() == generated.size(), "features of {:?} and {:?}", real.size(), generated.size());
    Ok((real - generated).norm().double_value(&[]))
}

#[test]
fn every_example_stands_here() {
    let (text, here) = (include_str!("../CONTRIBUTING.md"), include_str!("contributing.rs"));
    let examples: Vec<&str> = text.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(examples.len(), 4);
    for example in examples {
        assert!(here.contains(example), "this example of CONTRIBUTING.md is not in tests/contributing.rs:\n{example}");
    }
}

#[test]
fn the_data_set_lists_its_videos() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("list.txt");
    let clip = ClipSpec { frames: 16, frame_stride: 1, resolution: 64, fit: Fit::default() };
    assert!(Listed { file: file.clone() }.videos(&clip).unwrap_err().to_string().contains("list.txt"));
    fs::write(&file, "a.mp4\nb/c.avi\n").unwrap();
    let videos = Listed { file }.videos(&clip).unwrap().videos;
    assert_eq!(videos.iter().map(|video| video.name.as_str()).collect::<Vec<_>>(), ["a.mp4", "b/c.avi"]);
}

/// Knows the one z_0 that there is.
struct Knowing(Tensor);

impl Denoiser for Knowing {
    fn predict(&self, z_t: &Tensor, _t: f64) -> Prediction {
        Prediction { z_t: z_t.shallow_clone(), z_0: self.0.shallow_clone(), noise: z_t.zeros_like(), variance: None }
    }
}

#[test]
fn the_sampler_arrives() {
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let z_0 = common::noise(0, &[1, 4, 2, 3, 3]);
    let start = common::noise(1, &[1, 4, 2, 3, 3]);
    let noise = |i: usize| common::noise(2 + i as u64, &[1, 4, 2, 3, 3]);
    let mut seen = Vec::new();
    let found =
        sample(&Knowing(z_0.copy()), &Renoise { steps: 5 }, &schedule, &start, &noise, &mut |i, n| seen.push((i, n)));
    assert!(found.unwrap().equal(&z_0) && seen.len() == 5);
    assert!(Renoise { steps: 1 }.start(&schedule).is_err());
    let run = Renoise { steps: 5 }.start(&schedule).unwrap();
    assert_eq!((run.times().len(), run.times()[0], run.times()[4]), (5, 999.0, 0.0));
}

/// Every sampler walks along the new path, and objectives fit it or are refused.
#[test]
fn the_noise_path_is_walked() {
    let z_0 = common::noise(0, &[1, 4, 2, 3, 3]);
    let start = common::noise(1, &[1, 4, 2, 3, 3]);
    let noise = |i: usize| common::noise(2 + i as u64, &[1, 4, 2, 3, 3]);
    let samplers: [&dyn Sampler; 3] = [&Renoise { steps: 4 }, &Ddim { steps: 4, eta: 1.0 }, &UniPc { steps: 4 }];
    for sampler in samplers {
        let found = sample(&Knowing(z_0.copy()), sampler, &QuarterCircle, &start, &noise, &mut |_, _| {}).unwrap();
        assert!(common::relative_error(&found, &z_0) < 1e-6, "{}", sampler.describe());
    }
    // half way there is as much of one as of the other
    let z_t = Times::of_clips(&QuarterCircle, &[0.5], z_0.device()).add_noise(&z_0, &start);
    assert!(common::relative_error(&z_t, &((&z_0 + &start) * 0.5f64.sqrt())) < 1e-6);
    let drawn = QuarterCircle.draw(&mut lvdm::random::stream(0, lvdm::random::Purpose::DiffusionTime, 0, 0));
    assert!((0.0..1.0).contains(&drawn));
    Objective { predict: Predict::Velocity, ..Objective::default() }.validate(&QuarterCircle).unwrap();
}

#[test]
fn the_metric_is_known() {
    let a = Tensor::from_slice2(&[[0.0, 0.0], [2.0, 0.0]]);
    let b = Tensor::from_slice2(&[[4.0, 4.0], [4.0, 4.0]]);
    assert_eq!(mean_distance(&a, &b).unwrap(), 5.0);
    assert!(mean_distance(&a, &b.narrow(1, 0, 1)).is_err());
}
