//! `lvdm evaluate-long`: metrics along long videos, window by window, as curves of several methods.

use std::path::PathBuf;

use anyhow::Result;

use super::sample::PrecisionOptions;
use crate::{
    distributed::{self, Launch},
    evaluation::{LongEvaluation, MeasuredCurve, evaluate_long},
    experiment::{CurveSource, Experiment, LongEvaluationExperiment, Numerics, UserError},
    metrics::Metric,
    report::draw_curves,
    torch::DeviceName,
};

/// Measure long videos window by window, and draw the metrics as curves over time
///
/// Each window of consecutive frames is compared with real clips, so that the curves show whether quality falls along the
/// video. Interrupted, the same command continues. docs/long-video.md explains the curves.
#[derive(Debug, clap::Args)]
pub struct EvaluateLong {
    /// Experiment file (YAML), such as experiments/long/demo.yaml
    file: PathBuf,
    /// Settings in place of the file's, each as KEY=VALUE: videos=4
    overrides: Vec<String>,
    /// Where to compute: auto (the first GPU, or the CPU where there is none), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    precision: PrecisionOptions,
    #[command(flatten)]
    launch: Launch,
}

impl EvaluateLong {
    /// # Errors
    /// [`UserError`] for what the user wrote; runs, data or weights that are not there; a full disk.
    pub fn run(self) -> Result<()> {
        let mut experiment = LongEvaluationExperiment::load(&self.file, &self.overrides)?;
        let sampled = experiment.curves.iter().any(|curve| !matches!(curve.source, CurveSource::Videos { .. }));
        if self.precision.are_given() && !sampled {
            let text = "--precision and --tf32 are of runs that are sampled; videos from files are measured in float32";
            return Err(UserError(text.into()).into());
        }
        for curve in &mut experiment.curves {
            if let Some((precision, tf32)) = curve.source.numerics_mut() {
                let asked = self.precision.over(Numerics { precision: *precision, tf32: *tf32 });
                (*precision, *tf32) = (asked.precision, asked.tf32);
            }
        }
        distributed::run(&self.launch, self.device, |ranks, device| {
            let evaluation = evaluate_long(&experiment, device, ranks)?;
            if ranks.is_first() {
                draw_curves(&evaluation)?;
                print(&evaluation);
            }
            Ok(())
        })
    }
}

/// Decimals of a metric of one window, and the width of its column.
const DIGITS: usize = 2;
const COLUMN: usize = 9;

fn print(evaluation: &LongEvaluation) {
    let LongEvaluation { experiment, real_vs_real, curves, .. } = evaluation;
    let metrics: Vec<Metric> = evaluation.metrics().collect();
    let cells = |cell: &dyn Fn(Metric) -> String| {
        metrics.iter().map(|metric| format!("{:>COLUMN$}", cell(*metric))).collect::<Vec<_>>().join(" ")
    };
    let names = curves.iter().map(|curve| curve.name.chars().count());
    let width = names.fold(metrics.len() * (COLUMN + 1), usize::max);
    let row = |cell: &dyn Fn(&MeasuredCurve) -> String| {
        curves.iter().map(|curve| format!("  {:>width$}", cell(curve))).collect::<String>()
    };
    say!("{:11}{}", "", row(&|curve| curve.name.clone()));
    say!("{:>11}{}", "first frame", row(&|_| cells(&|metric| metric.title().into())));
    for window in 0..curves.iter().map(|curve| curve.windows.len()).max().unwrap_or(0) {
        let value = |curve: &MeasuredCurve, metric| curve.windows.get(window).and_then(|figure| figure.value(metric));
        let text = |curve: &MeasuredCurve, metric| value(curve, metric).map(|value| format!("{value:.DIGITS$}"));
        let line = row(&|curve| cells(&|metric| text(curve, metric).unwrap_or_default()));
        say!("{:>11}{line}", window as i64 * experiment.real.frames);
    }
    if let Some(real_vs_real) = real_vs_real {
        say!("{}", real_vs_real.line());
    }
    for curve in curves {
        let MeasuredCurve { name, motion, seam, .. } = curve;
        let seam = seam.map_or(String::new(), |seam| format!(", at seams {seam:.2} of the median elsewhere"));
        let widths = metrics
            .iter()
            .filter_map(|metric| Some(format!("{} ± {:.DIGITS$}", metric.title(), curve.half_width(*metric)?)));
        let widths: Vec<String> = widths.collect();
        if !widths.is_empty() {
            say!("{name}: 95 % interval of a window (jackknife, median): {}", widths.join(", "));
        }
        for metric in &metrics {
            if let Some(more) = curve.degradation(*metric) {
                say!("{name}: {} of the last quarter minus that of the first {more:+.DIGITS$}", metric.title());
            }
        }
        say!("{name}: neighbouring frames differ by {motion:.2} grey levels{seam}");
    }
    say!("{}", evaluation.line());
    let files: Vec<String> = metrics
        .iter()
        .map(|metric| experiment.out.join(metric.name()).with_extension("svg").display().to_string())
        .collect();
    say!("curves: {} and .png", files.join(", "));
}
