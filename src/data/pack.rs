//! Clips of any dataset packed into one file, for machines without the video libraries.

use std::{
    io::{Seek, SeekFrom, Write},
    path::Path,
};

use ::safetensors::tensor::{Dtype, TensorInfo};
use anyhow::{Result, ensure};
use tch::Tensor;

use super::{
    dataset::DataConfig,
    loader::FixedClips,
    packed::{CAPTIONS, CLIPS, PackedSpec},
};
use crate::{
    atomic_file::write_atomically,
    safetensors::{header_bytes, write_safetensors_atomically},
};

/// What room is left for in the header.
const MOST_CAPTION_BYTES: usize = 1 << 40;

/// Writes the first `count` samples of the seed, or one of each usable video, as a tensor `clips`,
/// unsigned bytes `[N, 3, F, H, W]`, never mirrored; captions as a tensor `captions`, the bytes of a JSON list.
/// Returns N. Clips go to the disk one by one.
///
/// With more frames than training uses, training cuts its clips at random places out of the packed
/// ones. Errors: no usable video; a full disk, which leaves what was there before.
pub fn pack_clips(config: &DataConfig, count: Option<u64>, seed: u64, out: &Path) -> Result<u64> {
    ensure!(count != Some(0), "0 clips to pack; it must be at least 1");
    let mut fixed = FixedClips::new(config, seed)?;
    let clip = config.clip()?;
    let spec = PackedSpec {
        dataset: Some(config.dataset.clone()),
        frames: clip.frames,
        frame_stride: clip.frame_stride,
        resolution: clip.resolution,
        seed,
    };
    let metadata = serde_json::to_value(&spec)?;
    let [frames, side] = [clip.frames as usize, clip.resolution as usize];
    let header = |clips: u64, captions: usize, least: usize| {
        let mut start = 0;
        let mut tensor = |name: &str, shape: Vec<usize>| {
            let data_offsets = (start, start + shape.iter().product::<usize>());
            start = data_offsets.1;
            (name.to_string(), TensorInfo { dtype: Dtype::U8, shape, data_offsets })
        };
        let mut tensors = vec![tensor(CLIPS, vec![clips as usize, 3, frames, side, side])];
        if captions > 0 {
            tensors.push(tensor(CAPTIONS, vec![captions]));
        }
        header_bytes(tensors, &metadata, least)
    };

    let (most, end) = match count {
        Some(count) => (count, u64::MAX),
        None => (fixed.videos(), fixed.videos()),
    };
    let mut packed = 0;
    write_atomically(out, |file| {
        // How many are usable shows at the end: the header is written again, no longer than before.
        let room = header(most, MOST_CAPTION_BYTES, 0)?;
        file.write_all(&room)?;
        let mut captions = Vec::new();
        while packed < most
            && let Some((clip, caption)) = fixed.next(end)?
        {
            file.write_all(&bytes(&clip)?)?;
            captions.extend(caption);
            packed += 1;
        }
        ensure!(packed > 0, "no usable video");
        // all have one, or the dataset has none
        let captions = if captions.is_empty() { Vec::new() } else { serde_json::to_vec(&captions)? };
        ensure!(captions.len() <= MOST_CAPTION_BYTES, "captions of {} bytes", captions.len());
        file.write_all(&captions)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header(packed, captions.len(), room.len())?)?;
        Ok(())
    })?;
    Ok(packed)
}

/// Writes generated clips, unsigned bytes `[N, 3, F, S, S]`, as such a file; the seed is the one they were drawn with.
///
/// Errors: clips that are not square; a full disk, which leaves what was there before.
pub fn pack_generated(clips: &Tensor, seed: u64, out: &Path) -> Result<()> {
    let size = clips.size();
    ensure!(size.len() == 5 && size[1] == 3 && size[3] == size[4], "clips are [N, 3, F, S, S]; these are {size:?}");
    let spec = PackedSpec { dataset: None, frames: size[2], frame_stride: 1, resolution: size[3], seed };
    write_safetensors_atomically(out, &[(CLIPS, clips)], &serde_json::to_value(&spec)?)
}

fn bytes(clip: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; clip.numel()];
    clip.f_copy_data_u8(&mut bytes, clip.numel())?;
    Ok(bytes)
}
