//! Clips of any dataset packed into one file, for machines without the video libraries.

use std::{
    fs::File,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use ::safetensors::tensor::{Dtype, TensorInfo};
use anyhow::{Context, Result, ensure};
use tch::Tensor;

use super::{
    dataset::DataConfig,
    loader::{FixedClip, FixedClips},
    packed::{CAPTIONS, CLASSES, CLIPS, PackedSpec},
    reading::READING,
};
use crate::{
    atomic_file::{PendingFile, write_atomically},
    distributed::Ranks,
    safetensors::{DigestedWriter, header_bytes},
};

/// What room is left for in the header.
const MOST_TEXT_BYTES: usize = 1 << 40;

/// Writes the first `count` samples of the seed, or one of each usable video, as a tensor `clips`,
/// unsigned bytes `[N, 3, F, H, W]`, never mirrored; captions and names of classes, where every clip has one, as tensors
/// `captions` and `classes`, the bytes of a JSON list each.
/// Returns N. Ranks share the decoding; rank 0 writes the clips one by one.
///
/// With more frames than training uses, training cuts its clips at random places out of the packed
/// ones.
///
/// # Errors
/// No usable video; a full disk, which leaves what was there before.
pub fn pack_clips(config: &DataConfig, count: Option<u64>, seed: u64, out: &Path, ranks: &Ranks) -> Result<u64> {
    ensure!(count != Some(0), "0 clips to pack; it must be at least 1");
    let mut fixed = FixedClips::of_rank(config, seed, ranks)?;
    let clip = config.clip()?;
    let spec = PackedSpec {
        dataset: Some(serde_json::to_value(&config.dataset)?),
        frames: clip.frames,
        frame_stride: clip.frame_stride,
        resolution: clip.resolution,
        seed,
        reading: config.dataset.reading()?.unwrap_or(READING),
    };
    let metadata = serde_json::to_value(&spec)?;
    let [frames, side] = [clip.frames as usize, clip.resolution as usize];
    let header = |clips: u64, texts: [usize; 2], least: usize| {
        let mut start = 0;
        let mut tensor = |name: &str, shape: Vec<usize>| {
            let data_offsets = (start, start + shape.iter().product::<usize>());
            start = data_offsets.1;
            (name.to_string(), TensorInfo { dtype: Dtype::U8, shape, data_offsets })
        };
        let mut tensors = vec![tensor(CLIPS, vec![clips as usize, 3, frames, side, side])];
        for (name, bytes) in [CAPTIONS, CLASSES].into_iter().zip(texts) {
            if bytes > 0 {
                tensors.push(tensor(name, vec![bytes]));
            }
        }
        header_bytes(tensors, &metadata, least)
    };

    let (most, end) = match count {
        Some(count) => (count, u64::MAX),
        None => (fixed.videos(), fixed.videos()),
    };
    // which clips can be used rank 0 alone knows
    let is_over = |packed: u64, position: u64| -> Result<bool> {
        Ok(position >= end || ranks.of_first(i64::from(packed >= most))? > 0)
    };
    let mut packed = 0;
    if !ranks.is_first() {
        while !is_over(0, fixed.position())? {
            round(&mut fixed, end, ranks)?;
        }
        return Ok(ranks.of_first(0)? as u64);
    }
    write_atomically(out, |file| {
        // How many are usable shows at the end: the header is written again, no longer than before.
        let room = header(most, [MOST_TEXT_BYTES; 2], 0)?;
        file.write_all(&room)?;
        let (mut captions, mut classes) = (Vec::new(), Vec::new());
        while !is_over(packed, fixed.position())? {
            for FixedClip { clip, caption, class } in
                round(&mut fixed, end, ranks)?.into_iter().take((most - packed) as usize)
            {
                file.write_all(&bytes(&clip)?)?;
                captions.push(caption);
                classes.push(class);
                packed += 1;
            }
        }
        ensure!(packed > 0, "no usable video");
        let texts = [text_bytes(captions)?, text_bytes(classes)?];
        texts.iter().try_for_each(|bytes| file.write_all(bytes))?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header(packed, texts.map(|bytes| bytes.len()), room.len())?)?;
        Ok(())
    })?;
    Ok(ranks.of_first(packed as i64)? as u64)
}

/// One text a clip as the bytes of a JSON list; nothing where a clip has none.
fn text_bytes(texts: Vec<Option<String>>) -> Result<Vec<u8>> {
    let Some(texts) = texts.into_iter().collect::<Option<Vec<String>>>() else { return Ok(Vec::new()) };
    let bytes = serde_json::to_vec(&texts)?;
    ensure!(bytes.len() <= MOST_TEXT_BYTES, "texts of {} bytes", bytes.len());
    Ok(bytes)
}

/// The next samples, one of each rank, as far as they can be used: on rank 0, where the others send theirs.
fn round(fixed: &mut FixedClips, end: u64, ranks: &Ranks) -> Result<Vec<FixedClip>> {
    let own = match fixed.sample(end)? {
        None => Vec::new(),
        Some(FixedClip { clip, caption, class }) => {
            vec![clip, Tensor::from_slice(&serde_json::to_vec(&[caption, class])?)]
        }
    };
    let mut usable = Vec::new();
    for sent in ranks.gather(&own)? {
        let Ok([clip, texts]) = <[Tensor; 2]>::try_from(sent) else { continue };
        let [caption, class] = serde_json::from_slice(&Vec::<u8>::try_from(texts)?)?;
        usable.push(FixedClip { clip, caption, class });
    }
    Ok(usable)
}

/// Generated clips that go into such a file as they come.
pub struct PackedWriter {
    pending: PendingFile,
    path: PathBuf,
    file: DigestedWriter<BufWriter<File>>,
    /// `[3, F, S, S]`
    shape: [i64; 4],
    /// Clips that are still to come.
    left: i64,
}

impl PackedWriter {
    /// For exactly `count` clips of `frames` frames of `side`×`side`; the seed is the one they were drawn with.
    ///
    /// # Errors
    /// An unwritable place.
    pub fn create(path: &Path, count: i64, frames: i64, side: i64, seed: u64) -> Result<Self> {
        let spec = PackedSpec { dataset: None, frames, frame_stride: 1, resolution: side, seed, reading: READING };
        let shape: Vec<usize> = [count, 3, frames, side, side].map(|n| n as usize).to_vec();
        let data_offsets = (0, shape.iter().product());
        let tensors = vec![(CLIPS.into(), TensorInfo { dtype: Dtype::U8, shape, data_offsets })];
        let (pending, file) = PendingFile::create(path)?;
        let file = DigestedWriter::new(file, tensors, &serde_json::to_value(&spec)?)?;
        Ok(Self { pending, path: path.to_path_buf(), file, shape: [3, frames, side, side], left: count })
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
        let written = self.file.push(&bytes(&clips.contiguous())?);
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Brings the file to the disk under its name.
    ///
    /// # Errors
    /// Clips that did not come; a full disk.
    pub fn finish(self) -> Result<()> {
        let Self { pending, path, file, left, .. } = self;
        ensure!(left == 0, "{left} clips of {} did not come", path.display());
        let written = file.finish().and_then(|_| pending.publish());
        written.with_context(|| format!("cannot write {}", path.display()))
    }
}

fn bytes(clip: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; clip.numel()];
    clip.f_copy_data_u8(&mut bytes, clip.numel())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tch::{Device, Kind};

    use super::*;
    #[cfg(feature = "video")]
    use crate::data::video_file::tests::write_test_video;
    use crate::{
        data::{DatasetConfig, Loader, PackedFile, fixed_clips, folder::Folder, packed::Packed},
        safetensors::read_safetensors,
    };

    #[test]
    fn clips_that_come_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let pieces = folder.path().join("pieces.safetensors");
        let clips =
            Tensor::arange(5 * 3 * 2 * 4 * 4, (Kind::Int64, Device::Cpu)).to_kind(Kind::Uint8).view([5, 3, 2, 4, 4]);
        let mut writer = PackedWriter::create(&pieces, 5, 2, 4, 7).unwrap();
        writer.push(&clips.narrow(0, 0, 2)).unwrap();
        assert!(writer.push(&clips.narrow(2, 0, 1)).is_err() && !pieces.exists());
        writer.push(&clips.narrow(0, 2, 3)).unwrap();
        writer.finish().unwrap();
        assert!(read_safetensors(&pieces).unwrap().0["clips"].equal(&clips));
        let PackedSpec { dataset, frames, frame_stride, resolution, seed, .. } =
            PackedFile::open(&pieces).unwrap().spec;
        assert!(dataset.is_none() && [frames, frame_stride, resolution, seed as i64] == [2, 1, 4, 7]);
        let mut writer = PackedWriter::create(&pieces, 5, 2, 4, 8).unwrap();
        writer.push(&clips.narrow(0, 0, 2)).unwrap();
        assert!(writer.finish().is_err());
        assert_eq!(PackedFile::open(&pieces).unwrap().spec.seed, 7);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        // its digest finds damage
        let mut bytes = fs::read(&pieces).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&pieces, bytes).unwrap();
        assert!(read_safetensors(&pieces).unwrap_err().to_string().contains("SHA-256"));
    }

    /// A folder a class: each clip keeps the class of its video, in batches and in a packed file.
    #[cfg(feature = "video")]
    #[test]
    fn the_folder_of_a_video_is_its_class() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["train/Walk", "train/Run", "test/Walk"];
        for (i, name) in (0..).zip(names) {
            fs::create_dir_all(folder.path().join(name)).unwrap();
            write_test_video(&folder.path().join(name).join("v.mp4"), 6 + i);
        }
        let dataset = DatasetConfig::Folder(Folder { root: folder.path().to_path_buf() });
        let config = DataConfig { dataset, frames: 4, frame_stride: 1, resolution: 16, flip: false, workers: 1 };
        let listing = config.videos().unwrap();
        assert_eq!(listing.classes().unwrap(), ["Run", "Walk"]);
        let of_video = |name: &str| Some(if name.contains("Run") { "Run" } else { "Walk" }.to_string());
        assert!(listing.videos.iter().all(|video| video.class == of_video(&video.name)));

        let out = folder.path().join("packed.safetensors");
        assert_eq!(pack_clips(&config, None, 7, &out, &Ranks::alone()).unwrap(), 3);
        let packed = DataConfig { dataset: DatasetConfig::Packed(Packed { file: out }), ..config.clone() };
        let drawn = Loader::new(&config, 3, 7, 0).unwrap().next().unwrap();
        let kept: Vec<_> = packed.videos().unwrap().videos.into_iter().map(|video| video.class).collect();
        assert_eq!(kept, drawn.classes);
        assert_eq!(kept.iter().flatten().filter(|class| *class == "Run").count(), 1);
        fs::write(folder.path().join("no_class.mp4"), []).unwrap();
        assert!(config.videos().unwrap().classes().is_none());
    }

    #[cfg(feature = "video")]
    #[test]
    fn packed_clips_are_the_same_and_give_windows() {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..5 {
            write_test_video(&folder.path().join(format!("good{i}.mp4")), 20 + i);
        }
        write_test_video(&folder.path().join("short.mp4"), 6);
        fs::write(folder.path().join("empty.mp4"), []).unwrap();
        let dataset = DatasetConfig::Folder(Folder { root: folder.path().to_path_buf() });
        let config = DataConfig { dataset, frames: 8, frame_stride: 2, resolution: 16, flip: false, workers: 2 };
        let out = folder.path().join("packed.safetensors");
        assert_eq!(pack_clips(&config, None, 7, &out, &Ranks::alone()).unwrap(), 5);
        let clips = fixed_clips(&config, 5, 7).unwrap();
        let (tensors, _) = read_safetensors(&out).unwrap();
        assert!(tensors["clips"].equal(&clips));
        assert_eq!(PackedFile::open(&out).unwrap().spec.frame_stride, 2);

        let dataset = DatasetConfig::Packed(Packed { file: out.clone() });
        let packed = DataConfig { dataset, frames: 3, ..config.clone() };
        let windows = fixed_clips(&packed, 5, 1).unwrap();
        for i in 0..5 {
            let found = (0..5).any(|clip| (0..6).any(|f| clips.get(clip).narrow(1, f, 3).equal(&windows.get(i))));
            assert!(found, "clip {i} is no window of a packed clip");
        }
        let other = DataConfig { frame_stride: 3, ..packed.clone() };
        assert!(other.videos().unwrap_err().to_string().contains("multiple of 2"));
        assert_eq!(fixed_clips(&DataConfig { frame_stride: 4, ..packed }, 2, 1).unwrap().size(), [2, 3, 3, 16, 16]);

        assert_eq!(pack_clips(&config, Some(12), 7, &out, &Ranks::alone()).unwrap(), 12);
        let bytes = fs::read(&out).unwrap();
        fs::write(&out, &bytes[..bytes.len() - 9]).unwrap();
        assert!(format!("{:#}", PackedFile::open(&out).unwrap_err()).contains("truncated"));
    }
}
