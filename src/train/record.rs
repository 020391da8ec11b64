//! The record of a training: numbers on their way from the device to the log, their means, and what rank 0 writes.

use std::collections::BTreeMap;

use tch::Tensor;

use super::{logger::RunLogger, progress::Progress, saver::Saver};
use crate::torch::Readback;

/// A network's terms and the norm of its gradient, on their way to the host while the next step is queued.
pub struct Pending {
    pub network: usize,
    pub step: i64,
    pub names: Vec<&'static str>,
    pub values: Readback,
}

/// What rank 0 writes.
pub struct Record {
    pub log: RunLogger,
    pub bar: Progress,
    pub saver: Saver,
    /// Steps whose pictures could not be made.
    pub missing_pictures: u64,
}

/// What the time of a step is called in the log.
pub const SECONDS_PER_STEP: &str = "seconds_per_step";

/// Means over the steps since the last line of the log.
#[derive(Default)]
pub struct Window {
    sums: Vec<(String, f64, i64)>,
    pub steps: i64,
    pub seconds: f64,
    pub waited: f64,
    pub rate: f64,
}

impl Window {
    pub fn add(&mut self, name: &'static str, value: f64) {
        match self.sums.iter_mut().find(|(n, _, _)| *n == name) {
            Some((_, sum, count)) => {
                *sum += value;
                *count += 1;
            }
            None => self.sums.push((name.to_string(), value, 1)),
        }
    }

    /// What a checkpoint keeps of it, so that the log of a run that goes on has the same means: `[sum, count]` each.
    pub fn stored(&self) -> Vec<(String, Tensor)> {
        let one = |(i, (name, sum, count)): (usize, &(String, f64, i64))| {
            (format!("window.{i:02}.{name}"), Tensor::from_slice(&[*sum, *count as f64]))
        };
        self.sums.iter().enumerate().map(one).collect()
    }

    pub fn restore(&mut self, stored: &BTreeMap<String, Tensor>) {
        for (name, pair) in stored {
            let name = name.split_once('.').map_or(name.as_str(), |(_, name)| name);
            self.sums.push((name.to_string(), pair.double_value(&[0]), pair.double_value(&[1]) as i64));
        }
    }

    /// The means, with `clips` of a step over all ranks; the next ones begin anew.
    pub fn take(&mut self, clips: i64, skipped: i64) -> Vec<(String, f64)> {
        let window = std::mem::take(self);
        let mut values: Vec<(String, f64)> =
            window.sums.into_iter().map(|(name, sum, count)| (name, sum / count as f64)).collect();
        let clips = (window.steps * clips) as f64;
        values.push(("learning_rate".into(), window.rate));
        values.push(("clips_per_second".into(), clips / window.seconds));
        values.push((SECONDS_PER_STEP.into(), window.seconds / window.steps.max(1) as f64));
        values.push(("seconds_waiting_for_data".into(), window.waited / window.steps.max(1) as f64));
        values.push(("skipped_steps".into(), skipped as f64));
        values
    }
}
