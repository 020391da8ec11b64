use anyhow::{Result, ensure};
use tch::Tensor;

use super::{
    divisor::Divisor,
    frechet::frechet_distance_by,
    video_metric::{ComparedFeatures, VideoMetric},
};
use crate::extractors::{ExtractorKind, FeatureExtractor};

/// The Fréchet distance of single frames: how far pictures are, whatever their order and motion. Every frame of a clip that
/// the extractor looks at is a sample. Not FID, whose features are another network's.
pub struct FrameDistance;

impl VideoMetric for FrameDistance {
    fn title(&self) -> &'static str {
        "frame distance"
    }

    fn compares(&self) -> ComparedFeatures {
        ComparedFeatures::Of(ExtractorKind::VGG16_FRAMES)
    }

    fn compares_rows(&self) -> bool {
        true
    }

    fn definition(&self, extractor: &dyn FeatureExtractor) -> String {
        format!("Fréchet distance of Gaussians over single frames, {}", extractor.preparation())
    }

    /// Of features `[N, F, D]` and `[M, F', D]`.
    fn compute(&self, real: &Tensor, generated: &Tensor, divisor: Divisor) -> Result<f64> {
        let rows = |features: &Tensor| {
            ensure!(features.dim() == 3, "features of frames are [N, F, D], these are {:?}", features.size());
            Ok(features.flatten(0, 1))
        };
        frechet_distance_by(&rows(real)?, &rows(generated)?, divisor)
    }

    fn is_biased(&self) -> bool {
        true
    }
}
