//! The interface of metrics.

use anyhow::Result;
use tch::Tensor;

use super::divisor::Divisor;
use crate::extractors::{ExtractorKind, FeatureExtractor};

/// A distance between two sets of videos.
///
/// It compares features, so that videos need not be kept: those of the extractor that the protocol names, or those of an
/// extractor of its own. A metric that compares the videos themselves brings an extractor that computes from each video
/// what is compared, such as histograms of its motion.
pub trait VideoMetric: Sync {
    /// Its name in tables: `FVD`.
    fn title(&self) -> &'static str;

    /// The number of decimals in tables.
    fn digits(&self) -> usize {
        2
    }

    /// The extractor whose features it compares.
    fn compares(&self) -> ComparedFeatures {
        ComparedFeatures::OfProtocol
    }

    /// Whether it compares several rows of features for each video, such as one for each frame, instead of one row.
    fn compares_rows(&self) -> bool {
        false
    }

    /// How it is computed from these features, in a line, which is part of the protocol: figures with different
    /// definitions are not compared.
    fn definition(&self, extractor: &dyn FeatureExtractor) -> String;

    /// The distance between features of N real and of M generated videos: `[N, D]` and `[M, D]`, or `[N, rows, D]` and
    /// `[M, rows, D]` of a metric that compares rows. Lower is better.
    ///
    /// # Errors
    /// Too few videos, different widths, features that are not finite.
    fn compute(&self, real: &Tensor, generated: &Tensor, divisor: Divisor) -> Result<f64>;

    /// The distance without each of so many groups of both sets in turn, video i being of group i mod `groups`: what the
    /// jackknife asks for. A metric that can do it faster than by computing each one replaces this.
    ///
    /// # Errors
    /// As [`Self::compute`].
    fn without_groups(&self, real: &Tensor, generated: &Tensor, groups: i64, divisor: Divisor) -> Result<Vec<f64>> {
        let without = |features: &Tensor, group: i64| {
            let rows: Vec<i64> = (0..features.size()[0]).filter(|row| row % groups != group).collect();
            features.index_select(0, &Tensor::from_slice(&rows).to_device(features.device()))
        };
        (0..groups).map(|group| self.compute(&without(real, group), &without(generated, group), divisor)).collect()
    }

    /// Whether it is larger for fewer videos, so that a straight line over 1/N finds its limit of infinitely many.
    fn is_biased(&self) -> bool {
        false
    }
}

/// Which features a metric compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComparedFeatures {
    /// Those of the extractor that the protocol names; I3D's where it names none.
    OfProtocol,
    /// Those of an extractor of its own.
    Of(ExtractorKind),
}
