//! What an evaluation of a run leaves to look at: its samples as videos, and pictures of clips of each set.

use std::{fs, io::Write, path::Path};

use anyhow::{Context, Result};
use tch::Tensor;

use crate::{
    atomic_file::write_atomically,
    data::{PackedWriter, pictures, write_video},
    metrics::psnr_db,
};

/// How many real clips at most go through the autoencoder and back.
pub const RECONSTRUCTED: i64 = 64;

/// Real clips through an autoencoder and back.
#[derive(Default)]
pub struct Reconstructions {
    pub psnr: Vec<f64>,
    /// The first clips, each before its reconstruction.
    pairs: Vec<Tensor>,
}

impl Reconstructions {
    /// One clip u8 `[1, 3, F, H, W]`, and what came back.
    pub fn take(&mut self, clip: &Tensor, back: Tensor) {
        self.psnr.push(psnr_db(clip, &back).double_value(&[0]));
        if self.pairs.len() < 2 * 4 {
            self.pairs.extend([clip.shallow_clone(), back]);
        }
    }

    pub fn psnr_db(&self) -> Option<f64> {
        (!self.psnr.is_empty()).then(|| self.psnr.iter().sum::<f64>() / self.psnr.len() as f64)
    }
}

/// Videos of all samples (packed, where this binary or their size allows no mp4), and pictures of the first of each set.
pub struct Previews<'a> {
    out: &'a Path,
    count: i64,
    first: Vec<Tensor>,
    packed: Option<PackedWriter>,
}

/// Frames a second of the videos that are kept.
const FPS: f64 = 8.0;

impl<'a> Previews<'a> {
    /// For `count` clips of the shape of `[3, F, S, S]`.
    pub fn new(out: &'a Path, count: i64, frames: i64, side: i64, seed: u64) -> Result<Self> {
        // mp4 needs even sides
        let packed = match cfg!(feature = "video") && side % 2 == 0 {
            true => None,
            false => Some(PackedWriter::create(&out.join("samples.safetensors"), count, frames, side, seed)?),
        };
        Ok(Previews { out, count: 0, first: Vec::new(), packed })
    }

    pub fn take(&mut self, clips: &Tensor) -> Result<()> {
        match &mut self.packed {
            Some(packed) => packed.push(clips)?,
            None => {
                for i in 0..clips.size()[0] {
                    let path = self.out.join(format!("samples/{:05}.mp4", self.count + i));
                    write_video(&path, &clips.get(i), FPS)?;
                }
            }
        }
        self.count += clips.size()[0];
        for i in 0..clips.size()[0].min(8 - self.first.len() as i64) {
            self.first.push(clips.narrow(0, i, 1).copy());
        }
        Ok(())
    }

    pub fn finish(self, reconstructions: &Reconstructions, gaussian: Option<&Tensor>) -> Result<()> {
        match self.packed {
            Some(packed) => packed.finish()?,
            None => forget_from(&self.out.join("samples"), self.count)?,
        }
        let mut sheets = vec![("samples", Tensor::cat(&self.first, 0))];
        if !reconstructions.pairs.is_empty() {
            sheets.push(("reconstructions", Tensor::cat(&reconstructions.pairs, 0)));
        }
        sheets.extend(gaussian.map(|clips| ("gaussian", clips.shallow_clone())));
        for (name, clips) in &sheets {
            let every = (clips.size()[2] / 8).max(1);
            pictures::write_png(&self.out.join(format!("{name}.png")), &pictures::grid(clips, every)?)?;
        }
        let gif = pictures::gif(&sheets[0].1, FPS)?;
        write_atomically(&self.out.join("samples.gif"), |file| Ok(file.write_all(&gif)?))
    }
}

/// Deletes the numbered videos that an evaluation of more clips left in a folder.
fn forget_from(folder: &Path, count: i64) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let stem = path.file_stem().map(|stem| stem.to_string_lossy()).filter(|stem| stem.len() == 5);
        let number = stem.and_then(|stem| stem.parse::<i64>().ok());
        if number.is_some_and(|number| number >= count) && path.extension().is_some_and(|end| end == "mp4") {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}
