//! The curves of an evaluation of long videos, a figure a metric.

use anyhow::Result;

use super::{Plot, Series};
use crate::{evaluation::LongEvaluation, metrics::Figure};

/// Draws each metric's curves into the evaluation's folder, as `fvd.svg` and `fvd.png`.
///
/// # Errors
/// Nothing finite to draw; a full disk.
pub fn draw_curves(evaluation: &LongEvaluation) -> Result<()> {
    let LongEvaluation { experiment, real_vs_real, curves, .. } = evaluation;
    let window = experiment.real.frames;
    for metric in evaluation.metrics() {
        let name = metric.title();
        let point =
            |(i, figure): (usize, &Figure)| ((i as i64 * window) as f64, figure.value(metric).unwrap_or(f64::NAN));
        let series = curves.iter().map(|curve| Series {
            name: curve.name.clone(),
            points: curve.windows.iter().enumerate().map(point).collect(),
        });
        let plot = Plot {
            title: format!("{name} of {window}-frame windows along {}-frame videos", experiment.frames),
            subtitle: evaluation.line(),
            x_label: "first frame of the window".into(),
            y_label: format!("{name} (lower is better)"),
            series: series.collect(),
            level: real_vs_real.as_ref().and_then(|real| {
                Some((format!("real against real, {} clips", real.clips), real.distances.get(metric)?))
            }),
        };
        plot.write(&experiment.out.join(metric.name()))?;
    }
    Ok(())
}
