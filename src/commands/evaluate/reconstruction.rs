//! `lvdm evaluate reconstruction`: how much of a clip an autoencoder loses.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    evaluation::{ReconstructionOptions, Spread},
    run_files::RECONSTRUCTION_FILE,
    torch::DeviceName,
};

/// Measure PSNR, SSIM and LPIPS of an autoencoder's reconstructions of real clips
#[derive(Debug, clap::Args)]
pub struct Reconstruct {
    /// Run folder of an autoencoder, or of a diffusion model, which contains its autoencoder
    run: PathBuf,
    /// Real videos: a folder, an index (.jsonl), a numpy array, or a file that `lvdm data pack` wrote [default: those that
    /// the autoencoder was trained on]
    #[arg(long)]
    real: Option<PathBuf>,
    /// Split of the index of real videos, such as test [default: all]
    #[arg(long, requires = "real")]
    split: Option<String>,
    /// Number of clips
    #[arg(long, default_value_t = 256)]
    clips: i64,
    /// Frames in a clip [default: as in training]
    #[arg(long)]
    frames: Option<i64>,
    /// Take every n-th frame of a video [default: as in training]
    #[arg(long)]
    frame_stride: Option<i64>,
    /// Height and width of a clip in pixels [default: as in training]
    #[arg(long)]
    resolution: Option<i64>,
    /// Seed of the random choice of clips
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for the figures [default: RUN/reconstruction]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where to compute: auto (the first GPU, or the CPU where there is none), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
}

impl Reconstruct {
    /// # Errors
    /// [`UserError`](crate::experiment::UserError) for what the user wrote; data or weights that are not there; a full disk.
    pub fn run(self) -> Result<()> {
        let Reconstruct { run, real, split, clips, frames, frame_stride, resolution, seed, out, device } = self;
        let options = ReconstructionOptions { run, real, split, clips, frames, frame_stride, resolution, seed, out };
        let (found, out) = options.measure(device)?;
        for (name, Spread { mean, std }, meaning) in found.measures() {
            say!("{name:6} {mean:8.4} ± {std:.4}  {meaning}");
        }
        say!("{}", found.conditions());
        say!("figures: {}", out.join(RECONSTRUCTION_FILE).display());
        say!("clips above their reconstructions: {}", out.join("reconstructions.png").display());
        Ok(())
    }
}
