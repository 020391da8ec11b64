//! How much of a clip an autoencoder loses.

use std::{io::Write, path::PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use super::extraction::Bar;
use crate::{
    atomic_file::write_atomically,
    checkpoint,
    data::{ClipStream, DataConfig, DatasetConfig, Draw, Fit, decode_workers, normalise, pictures, to_u8},
    distributed::Ranks,
    experiment::UserError,
    extractors::Lpips,
    metrics::{psnr_db, ssim},
    run::open_latent_space,
    run_files::{AUTOENCODER_FILE, RECONSTRUCTION_FILE},
    torch::{DeviceName, Readback, device_name, upload},
};

/// What an autoencoder is asked to reconstruct; what is not said is as in its training.
#[derive(Debug, Clone, Default)]
pub struct ReconstructionOptions {
    /// Run folder of an autoencoder, or of a diffusion model, which carries one.
    pub run: PathBuf,
    /// Videos: a folder, an index, a numpy array, a packed file.
    pub real: Option<PathBuf>,
    /// One split of an index.
    pub split: Option<String>,
    /// How many clips.
    pub clips: i64,
    /// Frames of a clip.
    pub frames: Option<i64>,
    /// Every n-th frame of a video.
    pub frame_stride: Option<i64>,
    /// Height and width, in pixels.
    pub resolution: Option<i64>,
    /// Which clips.
    pub seed: u64,
    /// Folder for the figures; a folder in the run without one.
    pub out: Option<PathBuf>,
}

/// Pictures are smaller than the window of SSIM or than what VGG16 halves four times.
const LEAST_SIDE: i64 = 16;

/// A mean over clips, and their standard deviation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Over clips.
    pub mean: f64,
    /// Over clips, divided by their number.
    pub std: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        Spread { mean, std: variance.sqrt() }
    }
}

/// What was found, with what it depends on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reconstruction {
    psnr_db: Spread,
    ssim: Spread,
    lpips: Spread,
    clips: i64,
    /// Whether the autoencoder was trained on these videos.
    trained_on: bool,
    data: DataConfig,
    seed: u64,
    checkpoint: PathBuf,
    lpips_sha256: String,
    device: String,
}

impl ReconstructionOptions {
    /// Reconstructs clips, and writes figures and pictures into a folder, which is returned too.
    ///
    /// # Errors
    /// [`UserError`] for options that do not fit; data or weights that are not there; a full disk.
    pub fn measure(self, device: DeviceName) -> Result<(Reconstruction, PathBuf)> {
        if !self.run.exists() {
            return Err(UserError(format!("there is no run {}", self.run.display())).into());
        }
        let carried = self.run.join(AUTOENCODER_FILE);
        let (path, found) = checkpoint::open(if carried.is_file() { &carried } else { &self.run })?;
        let trained: DataConfig =
            serde_json::from_value(found.experiment["data"].clone()).context("the stored data")?;
        let mut dataset = match &self.real {
            None => trained.dataset.clone(),
            Some(real) => DatasetConfig::at(real).map_err(|error| UserError(format!("{error:#}")))?,
        };
        if let Some(wanted) = &self.split {
            dataset = dataset.of_split(wanted).map_err(|error| UserError(format!("{error:#}")))?;
        }
        let data = DataConfig {
            frames: self.frames.unwrap_or(trained.frames),
            frame_stride: self.frame_stride.unwrap_or(trained.frame_stride),
            resolution: self.resolution.unwrap_or(trained.resolution),
            flip: false,
            workers: decode_workers(),
            dataset,
        };
        let device = device.open()?;
        let space = open_latent_space(&path, device)?;
        let shape = space.latent_shape(data.frames, data.resolution, data.resolution);
        shape.map_err(|error| UserError(format!("{error:#}")))?;
        if self.clips < 1 || data.resolution < LEAST_SIDE {
            let text = format!("--clips must be at least 1, and --resolution at least {LEAST_SIDE}");
            return Err(UserError(text).into());
        }
        let lpips = Lpips::load(None, device, Kind::Float)?;
        let mut clips = ClipStream::new(&data, Draw::Random, Fit::default(), self.seed)?;
        let mut bar = Bar::new("reconstruct", self.clips, &Ranks::alone());
        let [mut psnrs, mut ssims, mut distances] = [const { Vec::new() }; 3];
        let mut pairs = Vec::new();
        for _ in 0..self.clips {
            let clip = clips.next()?.context("the draw has an end")?;
            let x = normalise(&upload(&clip, device));
            // what is measured is what would be written: bytes
            let made = to_u8(&space.reconstruct(&x));
            let distance = Readback::of(&no_grad(|| frame_distances(&lpips, &x, &normalise(&made))))?;
            let back = Readback::of(&made)?.wait()?;
            psnrs.push(psnr_db(&clip, &back).double_value(&[0]));
            ssims.push(ssim(&clip, &back).double_value(&[0]));
            distances.push(distance.wait()?.double_value(&[]));
            if pairs.len() < 8 {
                pairs.extend([clip, back]);
            }
            bar.advance(1);
        }
        bar.finish();
        let figures = Reconstruction {
            psnr_db: Spread::of(&psnrs),
            ssim: Spread::of(&ssims),
            lpips: Spread::of(&distances),
            clips: self.clips,
            trained_on: data.dataset == trained.dataset,
            data,
            seed: self.seed,
            checkpoint: path,
            lpips_sha256: lpips.sha256().into(),
            device: device_name(device),
        };
        let out = self.out.unwrap_or_else(|| match self.run.is_dir() {
            true => self.run.join("reconstruction"),
            false => PathBuf::from("runs/reconstruction"),
        });
        let text = serde_json::to_string_pretty(&figures)?;
        write_atomically(&out.join(RECONSTRUCTION_FILE), |file| Ok(file.write_all(text.as_bytes())?))?;
        let every = (figures.data.frames / 8).max(1);
        pictures::write_png(&out.join("reconstructions.png"), &pictures::grid(&Tensor::cat(&pairs, 0), every)?)?;
        Ok((figures, out))
    }
}

/// Mean LPIPS of the frames of one clip `[1, 3, F, H, W]`, a few at a time; a scalar on their device.
fn frame_distances(lpips: &Lpips, a: &Tensor, b: &Tensor) -> Tensor {
    const AT_ONCE: i64 = 16;
    let frames = |x: &Tensor| x.permute([0, 2, 1, 3, 4]).flatten(0, 1); // [F, 3, H, W]
    let (a, b) = (frames(a), frames(b));
    let count = a.size()[0];
    let rows = (0..count).step_by(AT_ONCE as usize).map(|first| {
        let some = AT_ONCE.min(count - first);
        lpips.distance(&a.narrow(0, first, some), &b.narrow(0, first, some))
    });
    Tensor::cat(&rows.collect::<Vec<_>>(), 0).mean(Kind::Double)
}

impl Reconstruction {
    /// Each with its name and what it means.
    pub fn measures(&self) -> [(&'static str, Spread, &'static str); 3] {
        [
            ("PSNR", self.psnr_db, "dB, higher is better"),
            ("SSIM", self.ssim, "1 is equal"),
            ("LPIPS", self.lpips, "VGG16, 0 is equal"),
        ]
    }

    /// All that they depend on, in a line.
    pub fn conditions(&self) -> String {
        let DataConfig { frames, frame_stride, resolution, .. } = self.data;
        let trained = if self.trained_on { ", of the data set that was trained on" } else { "" };
        format!(
            "mean ± standard deviation over {} clips of {frames} frames at stride {frame_stride}, {resolution} px{trained} \
             (seed {}), as bytes; SSIM 11x11 Gaussian, each channel alone; LPIPS weights sha256 {}…; on {}",
            self.clips,
            self.seed,
            &self.lpips_sha256[..12.min(self.lpips_sha256.len())],
            self.device
        )
    }
}
