//! Long videos window by window: what `lvdm evaluate-long` measures.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use super::{
    extraction::Bar,
    measurement::{Measurement, RealWork},
    metric_group::MetricGroup,
    real_clips::{Baselines, RealClips},
    windows::Windows,
};
use crate::{
    atomic_file::write_atomically,
    distributed::Ranks,
    experiment::LongEvaluationExperiment,
    metrics::{Figure, Metric, Protocol, RealVsReal},
    run_files::{CURVES_FILE, FIGURES_FILE},
    torch::device_name,
    train::logger::RunLogger,
};

/// What was measured of one curve.
#[derive(Debug, Serialize)]
pub struct MeasuredCurve {
    /// In the legend.
    pub name: String,
    /// Each window against the same real clips.
    pub windows: Vec<Figure>,
    /// Mean absolute difference of neighbouring frames, in grey levels.
    pub motion: f64,
    /// The same where decoded chunks meet, over its median elsewhere; only of sampled videos.
    pub seam: Option<f64>,
    /// All that the videos depend on.
    pub settings: Value,
}

impl MeasuredCurve {
    /// Half the width of the interval of a window, which half of the windows exceed.
    pub fn half_width(&self, metric: Metric) -> Option<f64> {
        let interval = |window: &Figure| window.estimates.get(&metric)?.interval;
        let mut widths: Vec<f64> =
            self.windows.iter().filter_map(interval).map(|[low, high]| (high - low) / 2.0).collect();
        widths.sort_by(f64::total_cmp);
        widths.get(widths.len() / 2).copied()
    }

    /// How much worse the last quarter of the windows is than the first by a metric, where it was measured.
    pub fn degradation(&self, metric: Metric) -> Option<f64> {
        let quarter = self.windows.len().div_ceil(4);
        let mean = |windows: &[Figure]| -> Option<f64> {
            let values: Vec<f64> = windows.iter().map(|window| window.value(metric)).collect::<Option<_>>()?;
            Some(values.iter().sum::<f64>() / windows.len() as f64)
        };
        Some(mean(&self.windows[self.windows.len() - quarter..])? - mean(&self.windows[..quarter])?)
    }
}

/// What an evaluation of long videos found: what its `figures.json` holds.
#[derive(Debug, Serialize)]
pub struct LongEvaluation {
    /// What was asked for.
    pub experiment: LongEvaluationExperiment,
    /// What the figures depend on besides the videos.
    pub protocol: Protocol,
    /// Equal for protocols whose figures compare.
    pub protocol_hash: String,
    /// The real-vs-real baseline.
    #[serde(rename = "floor")]
    pub real_vs_real: Option<RealVsReal>,
    /// In the order of the experiment.
    pub curves: Vec<MeasuredCurve>,
    /// Where it was measured.
    pub device: String,
}

impl LongEvaluation {
    /// What was measured, in a line.
    pub fn line(&self) -> String {
        let LongEvaluationExperiment { videos, frames, .. } = self.experiment;
        let (protocol, hash) = (self.protocol.line(), &self.protocol_hash);
        format!("{videos} videos of {frames} frames a curve, against {protocol}; protocol {hash}")
    }

    /// The metrics of its windows.
    pub fn metrics(&self) -> impl Iterator<Item = Metric> {
        self.curves.iter().flat_map(|curve| &curve.windows).take(1).flat_map(|w| w.estimates.keys().copied())
    }

    /// `figures.json`, `curves.jsonl`, and the curves for TensorBoard.
    fn write(&self) -> Result<()> {
        let LongEvaluationExperiment { out, real, curves, .. } = &self.experiment;
        let mut lines = String::new();
        for (curve, found) in curves.iter().zip(&self.curves) {
            let mut log = RunLogger::open(&out.join(curve.folder()), None)?;
            for (i, window) in found.windows.iter().enumerate() {
                let frame = i as i64 * real.frames;
                let mut line = json!({"curve": found.name, "first_frame": frame});
                let mut scalars = Vec::new();
                for (metric, estimate) in &window.estimates {
                    line[metric.name()] = json!(estimate.value);
                    line[format!("{}_interval", metric.name())] = json!(estimate.interval);
                    scalars.push((format!("window_{}", metric.name()), estimate.value));
                }
                lines.push_str(&format!("{line}\n"));
                let scalars: Vec<(&str, f64)> = scalars.iter().map(|(name, value)| (name.as_str(), *value)).collect();
                log.scalars(frame, &scalars);
            }
            log.finish();
        }
        write_atomically(&out.join(CURVES_FILE), |file| Ok(file.write_all(lines.as_bytes())?))?;
        let text = serde_json::to_string_pretty(self)?;
        write_atomically(&out.join(FIGURES_FILE), |file| Ok(file.write_all(text.as_bytes())?))
    }
}

/// Measures the windows of all curves, and writes them into the experiment's folder. Ranks share sampling and real clips;
/// rank 0 writes.
///
/// # Errors
/// Runs, data or weights that are not there; a full disk.
pub fn evaluate_long(experiment: &LongEvaluationExperiment, device: Device, ranks: &Ranks) -> Result<LongEvaluation> {
    let LongEvaluationExperiment { seed, real, train, curves, .. } = experiment;
    let config = &experiment.protocol()?;
    let groups = MetricGroup::open(config, &experiment.evaluation.metrics(), device)?;
    let measurement = Measurement { protocol: config, groups: &groups, device, ranks, seed: *seed };
    let real_clips = RealClips::new(real, config, *seed)?;
    let work = RealWork { baselines: Baselines::default(), train: train.as_ref() };
    let mut bar = Bar::new("real clips", measurement.real_work(&real_clips, work), ranks);
    let real_sets = measurement.real_sets(&real_clips, work, &mut bar)?;
    bar.finish();

    let mut measured = Vec::new();
    for curve in curves {
        let found = Windows { experiment, curve, groups: &groups, ranks, device }.measure()?;
        let windows = (0..found.features[0].size()[1]).map(|i| {
            let window: Vec<Tensor> = found.features.iter().map(|features| features.select(1, i)).collect();
            real_sets.figure_of_window(&window)
        });
        measured.push(MeasuredCurve {
            name: curve.name.clone(),
            windows: windows.collect::<Result<_>>()?,
            motion: found.motion,
            seam: found.seam,
            settings: found.settings,
        });
    }
    let protocol = real_clips.protocol(&groups);
    let evaluation = LongEvaluation {
        experiment: experiment.clone(),
        protocol_hash: protocol.hash(),
        protocol,
        real_vs_real: real_sets.real_vs_real()?,
        curves: measured,
        device: device_name(device),
    };
    if ranks.is_first() {
        evaluation.write()?;
    }
    Ok(evaluation)
}
