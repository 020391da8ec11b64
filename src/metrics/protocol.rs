//! What a figure depends on.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::{FeatureExtractor, frechet_distance, kernel_distance};
use crate::data::DataConfig;

/// How many clips, and which extractor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationConfig {
    /// Clips of each set.
    pub clips: i64,
    /// Another file of I3D weights in the packaged layout; its hash is part of the protocol.
    pub extractor: Option<PathBuf>,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        EvaluationConfig { clips: 2048, extractor: None }
    }
}

impl EvaluationConfig {
    /// # Errors
    /// Fewer clips than a covariance needs.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.clips >= 2, "clips must be at least 2, not {}", self.clips);
        Ok(())
    }
}

/// Everything that moves an FVD besides the videos: printed and stored with each figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Protocol {
    pub clips: i64,
    /// The real side: data set, frames, stride, resolution.
    pub real: DataConfig,
    /// Draws the real clips.
    pub seed: u64,
    pub resize: String,
    pub extractor: String,
    pub extractor_sha256: String,
    pub fvd: String,
    pub kvd: String,
}

impl Protocol {
    pub fn new(config: &EvaluationConfig, real: &DataConfig, seed: u64, extractor: &dyn FeatureExtractor) -> Self {
        Protocol {
            clips: config.clips,
            real: real.clone(),
            seed,
            resize: "short side to the resolution by an antialiased triangle filter, centre crop; then 224x224 bilinear without antialias".into(),
            extractor: extractor.name().into(),
            extractor_sha256: extractor.weights_sha256().into(),
            fvd: "Fréchet distance of Gaussians, covariance with n - 1, one draw".into(),
            kvd: "unbiased MMD², kernel (x·y/D + 1)³, one draw".into(),
        }
    }

    /// The first twelve digits of the SHA-256 of its text; equal protocols have equal hashes.
    pub fn hash(&self) -> String {
        let text = serde_json::to_string(self).expect("a protocol is plain data");
        Sha256::digest(text.as_bytes()).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "{} clips of {} frames at stride {}, {} px, real clips of seed {}, {} (sha256 {}…)",
            self.clips,
            self.real.frames,
            self.real.frame_stride,
            self.real.resolution,
            self.seed,
            self.extractor,
            &self.extractor_sha256[..12.min(self.extractor_sha256.len())]
        )
    }
}

/// The figures of one set of clips against the real ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Distances {
    pub fvd: f64,
    pub kvd: f64,
}

impl Distances {
    /// Of features `[N, D]` and `[M, D]`.
    ///
    /// # Errors
    /// Fewer than two samples, other widths, values that are not finite.
    pub fn between(real: &Tensor, generated: &Tensor) -> Result<Self> {
        Ok(Distances { fvd: frechet_distance(real, generated)?, kvd: kernel_distance(real, generated)? })
    }
}

/// Mean over clips of 10·log10(255²/MSE), for u8 clips `[N, …]`; equal clips count as 100 dB.
pub fn psnr_db(a: &Tensor, b: &Tensor) -> f64 {
    let difference: Tensor = a.to_kind(tch::Kind::Double) - b.to_kind(tch::Kind::Double);
    let mse = difference.square().flatten(1, -1).mean_dim([1i64].as_slice(), false, None);
    let psnr: Tensor = (mse.clamp_min(1e-30).reciprocal() * (255.0 * 255.0)).log10() * 10.0;
    psnr.clamp_max(100.0).mean(None).double_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psnr_is_a_mean_over_clips() {
        let a = Tensor::zeros([2, 3, 1, 2, 2], (tch::Kind::Uint8, tch::Device::Cpu));
        let b = a.copy();
        let _ = b.get(0).fill_(10); // mse 100, 28.13 dB
        let _ = b.get(1).fill_(255); // 0 dB
        assert!((psnr_db(&a, &b) - 28.1308 / 2.0).abs() < 1e-3);
    }
}
