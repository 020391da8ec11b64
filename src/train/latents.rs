//! Latents that were encoded once: the raw posterior's moments of many clips in one file.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::Batch;
use crate::{
    data::{DataConfig, Loader, normalise},
    experiment::Mistake,
    models::LatentSpace,
    random::{Purpose, stream},
    safetensors::{read_safetensors, write_safetensors_atomically},
};

/// What a file of latents says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    data: DataConfig,
    scale: f64,
    shift: f64,
}

/// Encodes the first `count` samples of the data's order and writes `moments` `[N, 2C, F/ft, H/fs, W/fs]`.
/// With more samples than videos, a video gives several clips.
///
/// # Errors
/// Data that cannot be read; a full disk.
pub fn pack_latents(
    space: &LatentSpace,
    data: &DataConfig,
    count: u64,
    seed: u64,
    out: &Path,
    on_clip: &mut dyn FnMut(u64),
) -> Result<()> {
    let batch = 8.min(count.max(1)) as i64;
    let mut loader = Loader::new(data, batch, seed, 0)?;
    let mut moments = Vec::new();
    let mut done = 0;
    while done < count {
        let clips = loader.next()?.clips;
        let clips = clips.narrow(0, 0, (batch as u64).min(count - done) as i64);
        done += clips.size()[0] as u64;
        moments.push(space.moments_of(&normalise(&clips.to_device(space.device()))).to_device(tch::Device::Cpu));
        on_clip(done);
    }
    let origin = Origin { data: data.clone(), scale: space.moments.scale, shift: space.moments.shift };
    write_safetensors_atomically(out, &[("moments", Tensor::cat(&moments, 0))], &serde_json::to_value(origin)?)
}

/// A file of latents, drawn from in the order of a seed.
pub struct LatentFile {
    moments: Tensor,
    seed: u64,
    batch: u64,
    position: u64,
    rank: u64,
    ranks: u64,
    order: (u64, Vec<u64>),
}

impl LatentFile {
    /// # Errors
    /// A file that `lvdm data pack --latents` did not write, or wrote for another autoencoder.
    pub fn open(path: &Path, space: &LatentSpace, batch: i64, seed: u64, position: u64) -> Result<Self> {
        let (mut tensors, metadata) = read_safetensors(path)?;
        let not = || format!("{} does not hold latents of `lvdm data pack --latents`", path.display());
        let origin: Origin = serde_json::from_value(metadata.with_context(not)?).with_context(not)?;
        let moments = tensors.remove("moments").with_context(not)?;
        ensure!(moments.dim() == 5 && moments.size()[0] > 0, "{}: moments of shape {:?}", not(), moments.size());
        if (origin.scale, origin.shift) != (space.moments.scale, space.moments.shift) {
            return Err(Mistake(format!(
                "{} was encoded by another autoencoder (scale {}, shift {}) than the one given (scale {}, shift {}): pack it again",
                path.display(), origin.scale, origin.shift, space.moments.scale, space.moments.shift
            ))
            .into());
        }
        Ok(LatentFile {
            moments,
            seed,
            batch: batch as u64,
            position,
            rank: 0,
            ranks: 1,
            order: (u64::MAX, Vec::new()),
        })
    }

    /// One rank's share: of batch · ranks consecutive samples its own `batch`.
    pub fn of_rank(self, rank: usize, ranks: usize) -> Self {
        LatentFile { rank: rank as u64, ranks: ranks as u64, ..self }
    }

    /// `[C, F, h, w]` of a latent.
    pub fn shape(&self) -> Vec<i64> {
        let size = self.moments.size();
        vec![size[1] / 2, size[2], size[3], size[4]]
    }

    /// The next samples.
    pub fn next_batch(&mut self) -> Batch {
        let count = self.moments.size()[0] as u64;
        let first = self.position + self.rank * self.batch;
        let samples: Vec<u64> = (first..first + self.batch).collect();
        let rows: Vec<i64> = samples
            .iter()
            .map(|&n| {
                let epoch = n / count;
                if self.order.0 != epoch {
                    let mut order: Vec<u64> = (0..count).collect();
                    order.shuffle(&mut stream(self.seed, Purpose::Shuffle, epoch, 0));
                    self.order = (epoch, order);
                }
                self.order.1[(n % count) as usize] as i64
            })
            .collect();
        self.position += self.batch * self.ranks;
        Batch { data: self.moments.index_select(0, &Tensor::from_slice(&rows)), samples, position: self.position }
    }
}
