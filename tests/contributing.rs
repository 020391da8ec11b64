//! The examples of CONTRIBUTING.md: they stand here word for word, compile and work.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use lvdm::{
    data::{ClipSpec, Fit, Listing, VideoDataset, VideoEntry, VideoFile},
    diffusion::{Denoiser, NoiseSchedule, Prediction, Sampler, SamplerRun, ScheduleConfig, sample},
};
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

/// Each step takes the network's z_0 and puts fresh noise on it, as much as the next time has.
struct Renoise {
    steps: i64,
}

struct RenoiseRun {
    schedule: NoiseSchedule,
    times: Vec<i64>,
}

impl Sampler for Renoise {
    fn start(&self, schedule: &NoiseSchedule) -> Result<Box<dyn SamplerRun>> {
        let last = schedule.steps() - 1;
        ensure!((2..=last).contains(&self.steps), "steps must be between 2 and {last}, not {}", self.steps);
        let times = (0..self.steps).rev().map(|i| i * last / (self.steps - 1)).collect();
        Ok(Box::new(RenoiseRun { schedule: schedule.clone(), times }))
    }
}

impl SamplerRun for RenoiseRun {
    fn timesteps(&self) -> &[i64] {
        &self.times
    }

    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor {
        match self.times.get(i + 1) {
            None => prediction.z_0.shallow_clone(),
            Some(&next) => {
                let alpha_bar = self.schedule.alpha_bar[next as usize];
                &prediction.z_0 * alpha_bar.sqrt() + noise() * (1.0 - alpha_bar).sqrt()
            }
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
    assert_eq!(examples.len(), 3);
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
    fn predict(&self, z_t: &Tensor, _t: i64) -> Prediction {
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
    assert_eq!(run.timesteps(), [999, 749, 499, 249, 0]);
}

#[test]
fn the_metric_is_known() {
    let a = Tensor::from_slice2(&[[0.0, 0.0], [2.0, 0.0]]);
    let b = Tensor::from_slice2(&[[4.0, 4.0], [4.0, 4.0]]);
    assert_eq!(mean_distance(&a, &b).unwrap(), 5.0);
    assert!(mean_distance(&a, &b.narrow(1, 0, 1)).is_err());
}
