//! `lvdm sample`: a diffusion run → videos.

use std::path::PathBuf;

use anyhow::Result;
use tch::Tensor;

use crate::{
    data::{pack_generated, write_video},
    diffusion::{SamplerConfig, Variance},
    experiment::Mistake,
    generate::Generator,
    torch::DeviceName,
    train::progress::Progress,
};

/// Sample videos from a diffusion run
#[derive(Debug, clap::Args)]
pub struct Sample {
    /// Run folder of `lvdm train diffusion`, or one of its checkpoints
    run: PathBuf,
    /// How many
    #[arg(long, default_value_t = 16)]
    videos: u64,
    #[command(flatten)]
    sampler: SamplerOptions,
    /// Video i depends on the seed and i alone
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Videos in one pass of the network
    #[arg(long, default_value_t = 16)]
    batch: u64,
    /// Frames a second of the files
    #[arg(long, default_value_t = 8.0)]
    fps: f64,
    /// Folder of the files 00000.mp4, 00001.mp4, …, or one file NAME.safetensors for all (a packed data set)
    #[arg(long)]
    out: PathBuf,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
}

/// Which sampler, on the command line.
#[derive(Debug, clap::Args)]
pub struct SamplerOptions {
    /// ddim, ddpm, dpm-solver (DPM-Solver++ 2M) or unipc
    #[arg(long, value_enum, default_value = "ddim")]
    sampler: SamplerName,
    /// Steps of all but DDPM
    #[arg(long, default_value_t = 50)]
    steps: i64,
    /// Noise of DDIM: 0 is deterministic, 1 as noisy as DDPM
    #[arg(long, default_value_t = 1.0)]
    eta: f64,
    /// Variance of DDPM
    #[arg(long, value_enum, default_value = "posterior")]
    variance: VarianceName,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum SamplerName {
    Ddim,
    Ddpm,
    DpmSolver,
    Unipc,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum VarianceName {
    /// of q(z_{t-1} | z_t, z_0)
    Posterior,
    /// beta_t
    Beta,
}

impl SamplerOptions {
    pub fn config(&self) -> SamplerConfig {
        match (self.sampler, self.variance) {
            (SamplerName::Ddim, _) => SamplerConfig::Ddim { steps: self.steps, eta: self.eta },
            (SamplerName::DpmSolver, _) => SamplerConfig::DpmSolver { steps: self.steps },
            (SamplerName::Unipc, _) => SamplerConfig::UniPc { steps: self.steps },
            (SamplerName::Ddpm, VarianceName::Posterior) => SamplerConfig::Ddpm { variance: Variance::Posterior },
            (SamplerName::Ddpm, VarianceName::Beta) => SamplerConfig::Ddpm { variance: Variance::Beta },
        }
    }
}

impl Sample {
    /// # Errors
    /// A folder that is not a run, a sampler that does not fit its schedule, a full disk.
    pub fn run(self) -> Result<()> {
        if self.videos == 0 || self.batch == 0 {
            return Err(Mistake("--videos and --batch must be at least 1".into()).into());
        }
        let packed = self.out.extension().is_some_and(|extension| extension == "safetensors");
        if !packed && !cfg!(feature = "video") {
            let hint =
                "this binary was built without the feature `video` and cannot write mp4: give --out NAME.safetensors";
            return Err(Mistake(hint.into()).into());
        }
        if !self.run.exists() {
            return Err(Mistake(format!("there is no run {}", self.run.display())).into());
        }
        let sampler = self.sampler.config();
        let (generator, _) = Generator::open(&self.run, self.device.open()?)?;
        if let Err(error) = sampler.build().start(&generator.schedule) {
            return Err(Mistake(format!("{error:#}")).into());
        }
        let mut all = Vec::new();
        let mut bar = Progress::new("sample", self.videos, 0);
        for first in (0..self.videos).step_by(self.batch as usize) {
            let samples: Vec<u64> = (first..(first + self.batch).min(self.videos)).collect();
            let clips = generator.videos(&samples, sampler, self.seed, &mut |step, steps| {
                bar.step(first, &format!("step {step} of {steps}"));
            })?;
            if packed {
                all.push(clips);
            } else {
                for (i, &sample) in samples.iter().enumerate() {
                    let path = self.out.join(format!("{sample:05}.mp4"));
                    write_video(&path, &clips.get(i as i64), self.fps)?;
                }
            }
            bar.step(first + samples.len() as u64, "");
        }
        bar.finish();
        if packed {
            pack_generated(&Tensor::cat(&all, 0), self.seed, &self.out)?;
        }
        println!("{} videos in {}", self.videos, self.out.display());
        Ok(())
    }
}
