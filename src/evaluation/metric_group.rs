//! The metrics of an evaluation, with the extractors that they need.

use anyhow::Result;
use tch::Device;

use crate::{
    experiment::UserError,
    extractors::{ExtractorConfig, FeatureExtractor},
    metrics::{ComparedFeatures, Metric, ProtocolConfig},
};

/// Metrics that compare features of the same extractor.
pub struct MetricGroup {
    /// In the order of tables.
    pub metrics: Vec<Metric>,
    /// What computes the features.
    pub extractor: Box<dyn FeatureExtractor>,
}

impl MetricGroup {
    /// Opens the extractor of each metric, once where several share one.
    ///
    /// # Errors
    /// Weights that are not there; [`UserError`]: clips with fewer frames than an extractor needs, features that a metric
    /// does not compare.
    pub fn open(protocol: &ProtocolConfig, metrics: &[Metric], device: Device) -> Result<Vec<Self>> {
        let mut groups: Vec<(ExtractorConfig, MetricGroup)> = Vec::new();
        for &metric in metrics {
            let wanted = match metric.compares() {
                ComparedFeatures::OfProtocol => protocol.extractor.clone().unwrap_or_default(),
                ComparedFeatures::Of(kind) => kind.into(),
            };
            match groups.iter_mut().find(|(config, _)| *config == wanted) {
                Some((_, group)) => {
                    check(metric, &wanted, &*group.extractor)?;
                    group.metrics.push(metric);
                }
                None => {
                    let extractor = wanted.open(device)?;
                    check(metric, &wanted, &*extractor)?;
                    let (least, frames) = (extractor.least_frames(), protocol.frames);
                    if frames < least {
                        let name = extractor.name();
                        let text = format!(
                            "{name} needs videos of at least {least} frames, and clips of {frames} are measured"
                        );
                        return Err(UserError(text).into());
                    }
                    groups.push((wanted, MetricGroup { metrics: vec![metric], extractor }));
                }
            }
        }
        Ok(groups.into_iter().map(|(_, group)| group).collect())
    }

    /// Each metric with the extractor whose features it compares.
    pub fn compared(groups: &[Self]) -> impl Iterator<Item = (Metric, &dyn FeatureExtractor)> {
        groups.iter().flat_map(|group| group.metrics.iter().map(|metric| (*metric, &*group.extractor)))
    }
}

/// # Errors
/// [`UserError`]: a metric that does not compare such features.
fn check(metric: Metric, config: &ExtractorConfig, extractor: &dyn FeatureExtractor) -> Result<()> {
    let rows = |several| if several { "several rows of features a video" } else { "one row of features a video" };
    if extractor.gives_rows() == metric.compares_rows() {
        return Ok(());
    }
    let fitting: Vec<&str> =
        Metric::all().filter(|metric| metric.compares_rows() == extractor.gives_rows()).map(Metric::name).collect();
    Err(UserError(format!(
        "{} ({}) compares {}, and the extractor {} gives {}: take another extractor, or of the metrics {}",
        metric.title(),
        metric.name(),
        rows(metric.compares_rows()),
        config.kind,
        rows(extractor.gives_rows()),
        fitting.join(", ")
    ))
    .into())
}
