//! From a trained run to videos: noise → sampler × denoiser → z_0 → decoder → u8.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tch::{Device, Tensor, no_grad};

use crate::{
    checkpoint::{self, Checkpoint},
    data::to_u8,
    diffusion::{NoiseSchedule, SamplerConfig, UNetDenoiser, sample},
    experiment::DiffusionExperiment,
    models::{LatentMoments, LatentSpace, LatentSpaceConfig, UNet3d, UNetCondition, UNetPorts},
    nn::Parameters,
    random::{Purpose, normal_batch},
};

/// A denoiser with its schedule and latent space.
pub struct Generator {
    pub unet: UNet3d,
    pub schedule: NoiseSchedule,
    pub space: LatentSpace,
    /// A latent's shape, `[C, F, h, w]`.
    pub latent: [i64; 4],
    predict: crate::diffusion::Predict,
}

impl Generator {
    /// Declares the network of an experiment in `parameters`.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn new(experiment: &DiffusionExperiment, space: LatentSpace, parameters: &Parameters) -> Result<Self> {
        let data = &experiment.data;
        let latent = space.config.latent_shape(data.frames, data.resolution, data.resolution)?;
        experiment.unet.validate()?;
        let ports = UNetPorts { inputs: latent[0], outputs: latent[0], temporal_length: latent[1], classes: None };
        Ok(Generator {
            unet: UNet3d::new(&parameters.root(), &experiment.unet, &ports),
            schedule: NoiseSchedule::new(&experiment.schedule)?,
            space,
            latent,
            predict: experiment.objective.predict,
        })
    }

    /// A diffusion run with its averaged weights, and its experiment.
    ///
    /// # Errors
    /// A folder that is not such a run; damaged or foreign weights.
    pub fn open(run: &Path, device: Device) -> Result<(Self, DiffusionExperiment)> {
        let (path, found) = checkpoint::open(run)?;
        let found = found.expect("diffusion", &path)?;
        let experiment: DiffusionExperiment = serde_json::from_value(found.experiment.clone())
            .with_context(|| format!("the experiment stored in {}", path.display()))?;
        let folder = if run.is_dir() { run.to_path_buf() } else { run_of(&path) };
        let space = open_latent_space(&folder.join(AUTOENCODER_FILE), device)?;
        let parameters = Parameters::new(device, 0);
        let generator = Generator::new(&experiment, space, &parameters)?;
        parameters.load(&weights(&found)).with_context(|| path.display().to_string())?;
        parameters.freeze();
        Ok((generator, experiment))
    }

    /// Normalised z_0 of the numbered samples, `[N, C, F, h, w]`. Sample i depends on the seed and i alone.
    ///
    /// # Errors
    /// A sampler that does not fit the schedule.
    pub fn latents(
        &self,
        samples: &[u64],
        sampler: SamplerConfig,
        seed: u64,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let draw =
            |purpose, step| normal_batch(seed, purpose, samples, step, &self.latent).to_device(self.space.device());
        let denoiser = UNetDenoiser {
            unet: &self.unet,
            schedule: &self.schedule,
            predict: self.predict,
            mask: None,
            given: UNetCondition::default(),
        };
        let noise = |i: usize| draw(Purpose::SampleStep, i as u64);
        sample(&denoiser, &*sampler.build(), &self.schedule, &draw(Purpose::SampleStart, 0), &noise, on_step)
    }

    /// The numbered samples as u8 `[N, 3, F, H, W]` on the host.
    ///
    /// # Errors
    /// As [`Self::latents`].
    pub fn videos(
        &self,
        samples: &[u64],
        sampler: SamplerConfig,
        seed: u64,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let z_0 = self.latents(samples, sampler, seed, on_step)?;
        Ok(self.decode(&z_0))
    }

    /// Normalised latents → u8 `[N, 3, F, H, W]` on the host, one at a time in the decoder.
    pub fn decode(&self, z_0: &Tensor) -> Tensor {
        let clips: Vec<Tensor> = (0..z_0.size()[0])
            .map(|i| no_grad(|| to_u8(&self.space.decode(&z_0.narrow(0, i, 1)))).to_device(Device::Cpu))
            .collect();
        Tensor::cat(&clips, 0)
    }

    /// Decoded Gaussian latents: what one gets without learning any diffusion.
    pub fn gaussian_videos(&self, samples: &[u64], seed: u64) -> Tensor {
        self.decode(
            &normal_batch(seed, Purpose::GaussianLatents, samples, 0, &self.latent).to_device(self.space.device()),
        )
    }
}

/// The autoencoder that a diffusion run carries with it.
pub const AUTOENCODER_FILE: &str = "autoencoder.safetensors";

/// The run folder of a checkpoint file.
fn run_of(checkpoint: &Path) -> PathBuf {
    checkpoint.parent().and_then(Path::parent).unwrap_or(Path::new(".")).to_path_buf()
}

/// The averaged weights where there are any, else the last ones.
pub fn weights(checkpoint: &Checkpoint) -> std::collections::BTreeMap<String, Tensor> {
    let averaged = checkpoint.part("ema");
    if averaged.is_empty() { checkpoint.part("model") } else { averaged }
}

/// The latent space of an autoencoder run (or checkpoint file).
///
/// # Errors
/// A folder that is not such a run; damaged or foreign weights.
pub fn open_latent_space(run: &Path, device: Device) -> Result<LatentSpace> {
    let (path, found) = checkpoint::open(run)?;
    latent_space(&found.expect("autoencoder", &path)?, device).with_context(|| path.display().to_string())
}

/// The latent space of a checkpoint.
///
/// # Errors
/// Damaged settings; weights of another architecture.
pub fn latent_space(checkpoint: &Checkpoint, device: Device) -> Result<LatentSpace> {
    let autoencoder: LatentSpaceConfig =
        serde_json::from_value(checkpoint.experiment["autoencoder"].clone()).context("the stored autoencoder")?;
    let measured = checkpoint.part("latent");
    let value = |name: &str| {
        measured.get(name).map(|t| t.double_value(&[])).with_context(|| format!("there is no `latent.{name}`"))
    };
    let moments = LatentMoments { scale: value("scale")?, shift: value("shift")? };
    LatentSpace::new(&autoencoder, &weights(checkpoint), moments, device)
}

/// Copies what sampling needs of an autoencoder into a diffusion run.
///
/// # Errors
/// A folder that is not an autoencoder run; a full disk.
pub fn carry_autoencoder(autoencoder: &Path, run: &Path) -> Result<()> {
    let (path, mut found) = checkpoint::open(autoencoder)?;
    found = found.expect("autoencoder", &path)?;
    let weights = weights(&found);
    found.tensors.retain(|name, _| name.starts_with("latent."));
    found.tensors.extend(weights.into_iter().map(|(name, tensor)| (format!("model.{name}"), tensor)));
    found.write(&run.join(AUTOENCODER_FILE))
}
