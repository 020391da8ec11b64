//! The second stage of a cascade: a denoiser that is given a video of lower resolution.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// A denoiser in pixels that sees, beside the noisy clip, the same clip at a lower resolution, enlarged and with noise of a
/// level that it is told (noise augmentation; Ho et al. 2021, arXiv 2106.15282). With the run that makes the videos of lower
/// resolution it is one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuperResolution {
    /// A run that makes videos of the lower resolution: of `lvdm train diffusion`, or of any other family. The run that is
    /// trained carries a copy of it.
    pub base: PathBuf,
    /// Height and width of its videos.
    pub resolution: i64,
    /// In training the given video carries noise of a level drawn uniformly below this one. A path in continuous time has a
    /// thousand levels, which divide its time evenly.
    #[serde(default = "noise")]
    pub noise: i64,
    /// The level when sampling.
    #[serde(default = "level")]
    pub level: i64,
    /// Weight w_r of reconstruction guidance when sampling: how strongly what is made is led to agree with the given video
    /// when it is made smaller again. It takes the memory of a training step; 0 is without.
    #[serde(default)]
    pub reconstruction: f64,
    /// Frames that neighbouring windows share where a video is longer than the clips of the training; they are cross-faded.
    #[serde(default = "overlap")]
    pub overlap: i64,
}

impl SuperResolution {
    /// For clips of so many frames and such a height and width, on a path of so many levels.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn validate(&self, frames: i64, resolution: i64, levels: i64) -> Result<()> {
        let SuperResolution { resolution: low, noise, level, reconstruction, overlap, .. } = *self;
        ensure!(
            (1..resolution).contains(&low),
            "resolution is {low}; it must be less than that of the clips, {resolution}"
        );
        ensure!((1..=levels).contains(&noise), "noise must lie in 1 … {levels}, not {noise}");
        ensure!((0..noise).contains(&level), "level {level}: the network is trained below {noise} (noise)");
        ensure!(
            reconstruction >= 0.0 && reconstruction.is_finite(),
            "reconstruction: the weight is {reconstruction}; it must be at least 0"
        );
        ensure!((0..frames).contains(&overlap), "overlap: {overlap} frames of clips of {frames}");
        Ok(())
    }
}

fn noise() -> i64 {
    400
}

fn level() -> i64 {
    100
}

fn overlap() -> i64 {
    4
}
