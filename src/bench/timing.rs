//! How long something takes, and the lines that say it.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use tch::{Cuda, Device};

use super::settings::BenchExperiment;
use crate::{
    experiment::Precision,
    torch::{Autocast, peak_memory},
};

/// Dense peak of a GPU in FLOP/s, as its data sheet gives it: bfloat16 on tensor cores, float32 without them.
fn peak(title: &str, precision: Precision) -> Option<f64> {
    const KNOWN: [(&str, f64, f64); 7] = [
        ("H200", 989e12, 67e12),
        ("H100 PCIe", 756e12, 51e12),
        ("H100", 989e12, 67e12),
        ("A100", 312e12, 19.5e12),
        ("L40S", 362e12, 91.6e12),
        ("A10", 125e12, 31.2e12),
        ("RTX 4090", 165e12, 82.6e12),
    ];
    let (_, bf16, f32) = KNOWN.iter().find(|(name, ..)| title.contains(name))?;
    Some(if precision == Precision::Bf16 { *bf16 } else { *f32 })
}

/// How something is timed.
pub(super) struct Clock {
    pub(super) device: Device,
    pub(super) warmup: usize,
    pub(super) repeats: usize,
}

/// What came out; seconds.
pub(super) struct Timing {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) repeats: usize,
    /// Of tensors, in bytes.
    pub(super) peak_memory: i64,
}

impl Clock {
    fn wait(&self) {
        if let Device::Cuda(index) = self.device {
            Cuda::synchronize(index as i64);
        }
    }

    /// Of calls that end when the device is done. One call more says how much memory one takes.
    pub(super) fn time(&self, call: impl FnMut() -> Result<()>) -> Result<Timing> {
        self.time_apart(call, || Ok(()))
    }

    /// As [`Self::time`]; `after` each call comes something that is not timed.
    pub(super) fn time_apart(
        &self,
        mut call: impl FnMut() -> Result<()>,
        mut after: impl FnMut() -> Result<()>,
    ) -> Result<Timing> {
        let (first, peak_memory) = peak_memory(self.device, &mut call);
        first.and_then(|()| after())?;
        for _ in 1..self.warmup {
            call().and_then(|()| after())?;
        }
        let mut seconds = Vec::new();
        for _ in 0..self.repeats {
            self.wait();
            let start = Instant::now();
            call()?;
            self.wait();
            seconds.push(start.elapsed().as_secs_f64());
            after()?;
        }
        seconds.sort_by(f64::total_cmp);
        let median = (seconds[(self.repeats - 1) / 2] + seconds[self.repeats / 2]) / 2.0;
        Ok(Timing { median, least: seconds[0], repeats: self.repeats, peak_memory })
    }
}

/// A line for each thing that was timed.
pub(super) struct BenchTable<'a> {
    /// Takes each line as soon as it is known.
    pub(super) say: &'a dyn Fn(String),
    pub(super) json: bool,
    pub(super) device: Device,
    pub(super) precision: Precision,
    pub(super) tf32: bool,
    pub(super) title: String,
}

impl BenchTable<'_> {
    pub(super) fn head(&self, experiment: &BenchExperiment) {
        if self.json {
            (self.say)(json!({"name": "experiment", "experiment": experiment}).to_string());
            return;
        }
        let precision = if self.precision == Precision::Bf16 { "bf16" } else { "f32" };
        let precision = format!("{precision}{}", if self.tf32 { ", float32 as TF32" } else { "" });
        (self.say)(format!("{}, LibTorch {}, {precision}", self.title, crate::torch::libtorch_version()));
        (self.say)(format!(
            "{:30} {:>10} {:>10} {:>10} {:>10} {:>6} {:>9}  ",
            "name", "median s", "least s", "GFLOP", "GFLOP/s", "peak", "memory"
        ));
    }

    /// One line; `more` are further values of the JSON, whose numbers also end the table's line.
    pub(super) fn line(&self, name: &str, timing: &Timing, flops: Option<i64>, full_precision: bool, more: Value) {
        let precision = if full_precision { Precision::F32 } else { self.precision };
        let rate = flops.map(|flops| flops as f64 / timing.median);
        let tf32 = self.tf32 && !full_precision;
        // of float32 without tensor cores
        let known = !(tf32 && precision == Precision::F32) && self.device.is_cuda();
        let known = if known { peak(&self.title, precision) } else { None };
        let share = rate.zip(known).map(|(rate, peak)| rate / peak);
        if self.json {
            let mut object = json!({
                "name": name, "seconds": timing.median, "least_seconds": timing.least, "repeats": timing.repeats,
                "flops": flops, "flops_per_second": rate, "share_of_peak": share,
                "peak_memory_bytes": timing.peak_memory, "device": self.title, "precision": precision, "tf32": tf32,
            });
            if let (Some(object), Some(more)) = (object.as_object_mut(), more.as_object()) {
                object.extend(more.clone());
            }
            (self.say)(object.to_string());
            return;
        }
        let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        let more = more.as_object().cloned().unwrap_or_default();
        let more: Vec<String> =
            more.iter().map(|(key, value)| format!("{key} {}", value.to_string().trim_matches('"'))).collect();
        (self.say)(format!(
            "{name:30} {:>10.4} {:>10.4} {:>10} {:>10} {:>6} {:>6} MB  {}",
            timing.median,
            timing.least,
            number(flops.map(|f| f as f64 / 1e9), 1),
            number(rate.map(|r| r / 1e9), 1),
            number(share.map(|s| s * 100.0), 1),
            timing.peak_memory / 1_000_000,
            more.join(", ")
        ));
    }

    pub(super) fn left_out(&self, name: &str, error: &anyhow::Error) {
        tracing::warn!("{name} is left out: {error:#}");
    }

    pub(super) fn autocast(&self) -> Autocast {
        Autocast::bfloat16(self.device, self.precision == Precision::Bf16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_known_by_the_drivers_names() {
        assert_eq!(peak("NVIDIA H200", Precision::Bf16), Some(989e12));
        assert_eq!(peak("NVIDIA H100 80GB HBM3", Precision::F32), Some(67e12));
        assert_eq!(peak("a GPU nobody knows", Precision::F32), None);
    }

    #[test]
    fn the_median_is_the_median() {
        let clock = Clock { device: Device::Cpu, warmup: 1, repeats: 3 };
        let mut calls = 0;
        let timing = clock
            .time(|| {
                calls += 1;
                // one slow call does not move it
                std::thread::sleep(std::time::Duration::from_millis(if calls == 3 { 80 } else { 4 }));
                Ok(())
            })
            .unwrap();
        assert_eq!(calls, 4);
        assert!((0.004..0.06).contains(&timing.median) && timing.least <= timing.median, "{}", timing.median);
    }
}
