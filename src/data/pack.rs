//! Clips of any dataset packed into one file, for machines without the video libraries.

use std::{
    fs::{self, File},
    io::{BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use ::safetensors::tensor::{Dtype, TensorInfo};
use anyhow::{Context, Result, ensure};
use tch::Tensor;

use super::{
    dataset::DataConfig,
    loader::FixedClips,
    packed::{CAPTIONS, CLIPS, PackedSpec},
};
use crate::{
    atomic_file::{publish, temporary_path, write_atomically},
    safetensors::{header_bytes, write_safetensors_atomically},
};

/// What room is left for in the header.
const MOST_CAPTION_BYTES: usize = 1 << 40;

/// Writes the first `count` samples of the seed, or one of each usable video, as a tensor `clips`,
/// unsigned bytes `[N, 3, F, H, W]`, never mirrored; captions as a tensor `captions`, the bytes of a JSON list.
/// Returns N. Clips go to the disk one by one.
///
/// With more frames than training uses, training cuts its clips at random places out of the packed
/// ones.
///
/// # Errors
/// No usable video; a full disk, which leaves what was there before.
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

/// Generated clips that go into such a file as they come.
pub struct PackedWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    /// `[3, F, S, S]`
    shape: [i64; 4],
    /// Clips that are still to come.
    left: i64,
    done: bool,
}

impl PackedWriter {
    /// For exactly `count` clips of `frames` frames of `side`×`side`; the seed is the one they were drawn with.
    ///
    /// # Errors
    /// An unwritable place.
    pub fn create(path: &Path, count: i64, frames: i64, side: i64, seed: u64) -> Result<Self> {
        let spec = PackedSpec { dataset: None, frames, frame_stride: 1, resolution: side, seed };
        let shape: Vec<usize> = [count, 3, frames, side, side].map(|n| n as usize).to_vec();
        let data_offsets = (0, shape.iter().product());
        let tensors = vec![(CLIPS.into(), TensorInfo { dtype: Dtype::U8, shape, data_offsets })];
        let header = header_bytes(tensors, &serde_json::to_value(&spec)?, 0)?;
        let temporary = temporary_path(path)?;
        let file = File::create(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
        let mut writer = Self {
            path: path.to_path_buf(),
            temporary,
            file: BufWriter::with_capacity(1 << 20, file),
            shape: [3, frames, side, side],
            left: count,
            done: false,
        };
        writer.file.write_all(&header)?;
        Ok(writer)
    }

    /// Adds clips, unsigned bytes `[n, 3, F, S, S]`.
    ///
    /// # Errors
    /// Another shape, more clips than were announced, a full disk.
    pub fn push(&mut self, clips: &Tensor) -> Result<()> {
        let size = clips.size();
        ensure!(size.len() == 5 && size[1..] == self.shape, "clips are [n, {:?}]; these are {size:?}", self.shape);
        ensure!(size[0] <= self.left, "{} clips too many for {}", size[0] - self.left, self.path.display());
        self.left -= size[0];
        let written = self.file.write_all(&bytes(&clips.contiguous())?);
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Brings the file to the disk under its name.
    ///
    /// # Errors
    /// Clips that did not come; a full disk.
    pub fn finish(mut self) -> Result<()> {
        ensure!(self.left == 0, "{} clips of {} did not come", self.left, self.path.display());
        self.file.flush()?;
        publish(&self.temporary, &self.path).with_context(|| format!("cannot write {}", self.path.display()))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for PackedWriter {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes generated clips, unsigned bytes `[N, 3, F, S, S]`, as such a file; the seed is the one they were drawn with.
///
/// # Errors
/// Clips that are not square; a full disk, which leaves what was there before.
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{data::PackedFile, safetensors::read_safetensors};

    #[test]
    fn clips_that_come_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, pieces) = (folder.path().join("whole.safetensors"), folder.path().join("pieces.safetensors"));
        let clips =
            Tensor::arange(5 * 3 * 2 * 4 * 4, (Kind::Int64, Device::Cpu)).to_kind(Kind::Uint8).view([5, 3, 2, 4, 4]);
        pack_generated(&clips, 7, &whole).unwrap();
        let mut writer = PackedWriter::create(&pieces, 5, 2, 4, 7).unwrap();
        writer.push(&clips.narrow(0, 0, 2)).unwrap();
        assert!(writer.push(&clips.narrow(2, 0, 1)).is_err() && !pieces.exists());
        writer.push(&clips.narrow(0, 2, 3)).unwrap();
        writer.finish().unwrap();
        assert!(read_safetensors(&pieces).unwrap().0["clips"].equal(&clips));
        assert_eq!(PackedFile::open(&pieces).unwrap().spec, PackedFile::open(&whole).unwrap().spec);
        let mut writer = PackedWriter::create(&pieces, 5, 2, 4, 8).unwrap();
        writer.push(&clips.narrow(0, 0, 2)).unwrap();
        assert!(writer.finish().is_err());
        assert_eq!(PackedFile::open(&pieces).unwrap().spec.seed, 7);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
