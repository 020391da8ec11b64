//! Warnings about the inputs, before the figures come.

use anyhow::{Context, Result};

use super::{real_clips::RealClips, sampled::Sampled};
use crate::{
    data::{DataConfig, VideoEntry},
    experiment::Generated,
    metrics::ProtocolConfig,
};

/// Notes splits that are taken together, and warns of generated videos that are compressed.
///
/// # Errors
/// Data that are not there.
pub fn of_inputs(real: &DataConfig, generated: &Generated) -> Result<()> {
    let splits = real.dataset.splits_taken()?;
    if splits.len() > 1 {
        tracing::info!(
            "real videos are of all splits: {}; --split, or `split:` in a file, takes one",
            splits.join(", ")
        );
    }
    let Generated::Clips { data } = generated else { return Ok(()) };
    let videos = data.videos()?.videos;
    if let Some(file) = videos.first().and_then(|video| video.source.video_file()) {
        tracing::warn!(
            "generated videos are compressed ({}): out of lvdm's own mp4 files of 32 px FVD came out 16 % higher than out \
             of the frames, and noisier videos differ more; .npz, .npy, .safetensors and .png are exact",
            file.extension().unwrap_or_default().to_string_lossy()
        );
    }
    Ok(())
}

/// Warns of real clips that share videos, and of videos smaller than what is measured.
///
/// # Errors
/// A first video that cannot be opened.
pub fn of_protocol(
    config: &ProtocolConfig,
    real: &RealClips,
    generated: &Generated,
    sampled: Option<&Sampled>,
) -> Result<()> {
    let (videos, wanted) = (real.videos().len() as i64, config.clips);
    if videos < wanted && config.draw.is_endless() {
        let of = if videos == 1 {
            "1 video, which gives".to_string()
        } else {
            format!("{videos} videos, some of which give")
        };
        tracing::warn!("{wanted} real clips are taken from {of} several");
    }
    small("real videos", shorter_side(real.videos())?, config);
    match (generated, sampled) {
        (Generated::Clips { data }, _) => small("generated videos", shorter_side(&data.videos()?.videos)?, config),
        (_, Some(Sampled { model, .. })) => small("the run's videos", model.clip()[2], config),
        (Generated::Run { .. }, None) => {}
    }
    Ok(())
}

/// In pixels, of the first video.
fn shorter_side(videos: &[VideoEntry]) -> Result<i64> {
    let first = videos.first().context("no videos")?;
    let frames = first.source.open().and_then(|mut source| source.read(0, 1, 1)).with_context(|| first.name.clone())?;
    Ok(frames.first().map_or(0, |frame| frame.width.min(frame.height)) as i64)
}

fn small(which: &str, side: i64, config: &ProtocolConfig) {
    let ProtocolConfig { name, resolution, .. } = config;
    if side < *resolution {
        tracing::warn!(
            "{which} have {side} px and are scaled up to the {resolution} px of the protocol {name}; without a protocol \
             --resolution {side} (`resolution: {side}` in a file) measures them as they are"
        );
    }
}
