use anyhow::Result;
use tch::Tensor;

use super::{
    divisor::Divisor,
    frechet::frechet_distance_by,
    video_metric::{ComparedFeatures, VideoMetric},
};
use crate::extractors::{ExtractorKind, FeatureExtractor};

/// The Fréchet distance of histograms of velocity and acceleration: how far motions are, whatever it is that moves.
pub struct MotionDistance;

impl VideoMetric for MotionDistance {
    fn title(&self) -> &'static str {
        "motion distance"
    }

    fn digits(&self) -> usize {
        3
    }

    fn compares(&self) -> ComparedFeatures {
        ComparedFeatures::Of(ExtractorKind::MOTION)
    }

    fn definition(&self, extractor: &dyn FeatureExtractor) -> String {
        format!("Fréchet distance of Gaussians, {}", extractor.preparation())
    }

    fn compute(&self, real: &Tensor, generated: &Tensor, divisor: Divisor) -> Result<f64> {
        frechet_distance_by(real, generated, divisor)
    }

    fn is_biased(&self) -> bool {
        true
    }
}
