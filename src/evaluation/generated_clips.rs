//! Generated clips as a protocol measures them: out of files, or as they come out of a run.

use anyhow::Result;
use tch::Tensor;

use super::extraction::{Bar, Extraction, ShardedExtractor, features_of};
use crate::{
    data::{ClipSpec, ClipStream, DataConfig, Draw, Fit, RgbFrame},
    experiment::UserError,
    metrics::ProtocolConfig,
};

/// Features of generated clips out of files: by extractor, then by draw.
///
/// # Errors
/// [`UserError`] where there are fewer videos than clips are asked for.
pub fn features_of_files(
    protocol: &ProtocolConfig,
    data: &DataConfig,
    extractors: &[ShardedExtractor],
    bar: &mut Bar,
) -> Result<Vec<Vec<Tensor>>> {
    let (draws, clips) = (protocol.generated_draws(), protocol.generated_clips());
    check_count(protocol, data.videos()?.videos.len() as i64)?;
    // what was made by another stride already lies frame by frame
    let data = DataConfig { frame_stride: data.frame_stride, ..protocol.applied_to(data) };
    let mut stream = ClipStream::new(&data, Draw::Beginnings, Fit::default(), 0)?;
    let mut sets: Vec<Vec<Tensor>> = extractors.iter().map(|_| Vec::new()).collect();
    for _ in 0..draws {
        for (sets, set) in sets.iter_mut().zip(features_of(&mut stream, clips, extractors, bar, &mut |_| Ok(()))?) {
            if set.size()[0] < clips {
                let usable = set.size()[0];
                return Err(UserError(format!(
                    "{usable} generated videos can be read, and {clips} clips are asked for: ask for fewer"
                ))
                .into());
            }
            sets.push(set);
        }
    }
    Ok(sets)
}

/// Features of clips that `make` makes of the numbers of samples, a batch at a time and each batch on one rank: by
/// extractor, then by draw. `observe` sees the clips of the first draw.
///
/// # Errors
/// Those of `make` and `observe`; clips with fewer frames than the protocol measures.
#[allow(clippy::too_many_arguments)] // what is made, how it is divided, who sees it
pub fn features_of_generator(
    protocol: &ProtocolConfig,
    extractors: &[ShardedExtractor],
    draws: i64,
    batch: i64,
    bar: &mut Bar,
    make: &mut dyn FnMut(&[u64]) -> Result<Tensor>,
    observe: &mut dyn FnMut(&Tensor) -> Result<()>,
) -> Result<Vec<Vec<Tensor>>> {
    let clips = protocol.generated_clips() as u64;
    let ranks = extractors[0].ranks;
    let mut sets: Vec<Vec<Tensor>> = extractors.iter().map(|_| Vec::new()).collect();
    for draw in 0..draws as u64 {
        let mut extractions: Vec<Extraction> = extractors.iter().copied().map(Extraction::new).collect();
        let end = (draw + 1) * clips;
        let firsts: Vec<u64> = (draw * clips..end).step_by(batch as usize).collect();
        for round in firsts.chunks(ranks.size()) {
            // each batch on one rank
            let made = ranks
                .share(round.len(), |i| make(&(round[i]..(round[i] + batch as u64).min(end)).collect::<Vec<u64>>()))?;
            for made in &made {
                if draw == 0 {
                    observe(made)?;
                }
                let clips = fit_to_protocol(made, protocol)?;
                extractions.iter_mut().try_for_each(|extraction| extraction.take(&clips))?;
                bar.advance(made.size()[0] as u64);
            }
        }
        for (sets, extraction) in sets.iter_mut().zip(extractions) {
            sets.push(extraction.finish()?);
        }
    }
    Ok(sets)
}

/// Generated clips u8 `[N, 3, F, H, W]` as the protocol measures them: their first frames, at its resolution.
fn fit_to_protocol(clips: &Tensor, protocol: &ProtocolConfig) -> Result<Tensor> {
    let (n, _, f, h, w) = clips.size5()?;
    let ProtocolConfig { frames, resolution, .. } = *protocol;
    anyhow::ensure!(f >= frames, "clips of {f} frames, and the protocol {} measures {frames}", protocol.name);
    let clips = clips.narrow(2, 0, frames);
    if (h, w) == (resolution, resolution) {
        return Ok(clips);
    }
    let spec = ClipSpec { frames, frame_stride: 1, resolution, fit: Fit::default() };
    let rows = (0..n).map(|i| {
        let pictures = (0..frames).map(|f| RgbFrame::from_tensor(&clips.get(i).select(1, f).permute([1, 2, 0])));
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::from_slice(&spec.fit(&pictures)).reshape([3, frames, resolution, resolution]))
    });
    Ok(Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0))
}

/// Whether there are as many generated videos as the protocol asks for.
///
/// # Errors
/// [`UserError`]: there are fewer.
pub fn check_count(protocol: &ProtocolConfig, found: i64) -> Result<()> {
    let asked = protocol.generated_draws() * protocol.generated_clips();
    if found < asked {
        return Err(UserError(format!(
            "{found} generated videos, and {asked} clips are asked for: the same clip twice would lower FVD; ask for {found}"
        ))
        .into());
    }
    Ok(())
}
