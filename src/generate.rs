//! From a trained run to videos: noise → sampler × denoiser → z_0 → decoder → u8.

mod long_video;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use tch::{Device, Tensor, no_grad};

use crate::{
    checkpoint::{self, Checkpoint},
    data::to_u8,
    diffusion::{
        Denoiser, FrameConditioning, GivenLatents, GuidanceConfig, NoiseSchedule, Predict, SamplerConfig, UNetDenoiser,
        frame_conditioned, sample,
    },
    experiment::DiffusionExperiment,
    models::{
        AttentionKind, ImageAutoencoder, LatentMoments, LatentSpace, LatentSpaceConfig, UNet3d, UNetCondition,
        UNetPorts,
    },
    nn::Parameters,
    random::{Purpose, normal, normal_batch},
};

pub use long_video::{LongVideo, forget};

/// A denoiser with its schedule and latent space.
pub struct Generator {
    pub unet: UNet3d,
    pub schedule: NoiseSchedule,
    pub space: LatentSpace,
    /// The shape of what the network makes, `[C, F, h, w]`.
    pub latent: [i64; 4],
    /// Every n-th latent frame of a video is what the network makes.
    pub latent_stride: i64,
    /// Of a network with a mask channel.
    pub conditioning: Option<FrameConditioning>,
    predict: Predict,
}

/// One clip to sample: its noise is a function of the seed and these two numbers alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipId {
    pub sample: u64,
    /// The clip's number in a video of several.
    pub clip: u64,
}

/// Frames that all clips of a batch are given.
pub struct Given<'a> {
    /// Their places in the clip.
    pub indices: &'a [i64],
    /// Normalised latents `[N, C, k, h, w]`.
    pub frames: &'a Tensor,
    pub guidance: GuidanceConfig,
}

impl Generator {
    /// Declares the network of an experiment in `parameters`.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn new(experiment: &DiffusionExperiment, space: LatentSpace, parameters: &Parameters) -> Result<Self> {
        let data = &experiment.data;
        let latent = seen(space.config.latent_shape(data.frames, data.resolution, data.resolution)?, experiment);
        experiment.unet.validate()?;
        let schedule = NoiseSchedule::new(&experiment.schedule)?;
        if let Some(conditioning) = &experiment.conditioning {
            conditioning.validate(latent[1], schedule.steps()).context("conditioning")?;
        }
        Ok(Generator {
            unet: UNet3d::new(&parameters.root(), &experiment.unet, &ports(experiment, latent)),
            schedule,
            space,
            latent,
            latent_stride: experiment.latent_stride,
            conditioning: experiment.conditioning.clone(),
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
        ensure!(
            experiment.unet.attention != AttentionKind::Text,
            "{} is a text-to-video model: those cannot be sampled yet",
            path.display()
        );
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
        let clips: Vec<ClipId> = samples.iter().map(|&sample| ClipId { sample, clip: 0 }).collect();
        self.clips(&clips, self.latent[1], None, sampler, seed, on_step)
    }

    /// Normalised z_0 of one clip each, `[N, C, frames, h, w]`; a network with a mask channel can be given frames.
    /// What comes back in their places is the network's, not what was given.
    ///
    /// # Errors
    /// A sampler that does not fit the schedule; frames given to a network without a mask channel.
    pub fn clips(
        &self,
        clips: &[ClipId],
        frames: i64,
        given: Option<&Given>,
        sampler: SamplerConfig,
        seed: u64,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let [c, _, h, w] = self.latent;
        let draw = |purpose, frames, step: u64| {
            let one = |id: &ClipId| normal(seed, purpose, id.sample, (id.clip << 32) | step, &[c, frames, h, w]);
            Tensor::stack(&clips.iter().map(one).collect::<Vec<_>>(), 0).to_device(self.space.device())
        };
        let start = draw(Purpose::SampleStart, frames, 0);
        let denoiser: Box<dyn Denoiser> = if self.conditioning.is_some() {
            let noise = given.map(|given| draw(Purpose::Perturbation, given.indices.len() as i64, 0));
            let given = given.zip(noise.as_ref()).map(|(given, noise)| GivenLatents {
                indices: given.indices,
                frames: given.frames,
                noise,
                guidance: given.guidance,
            });
            frame_conditioned(&self.unet, &self.schedule, self.predict, &start, given.as_ref())?
        } else {
            ensure!(given.is_none(), "this network has no mask channel: it cannot be given frames");
            Box::new(UNetDenoiser {
                unet: &self.unet,
                schedule: &self.schedule,
                predict: self.predict,
                mask: None,
                given: UNetCondition::default(),
            })
        };
        let noise = |i: usize| draw(Purpose::SampleStep, frames, i as u64);
        sample(&*denoiser, &*sampler.build(), &self.schedule, &start, &noise, on_step)
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

    /// The shape `[3, F, H, W]` of the videos it makes.
    pub fn clip_size(&self) -> [i64; 4] {
        let [_, f, h, w] = self.latent;
        let [ft, fs] = self.space.factors();
        [3, f * ft, h * fs, w * fs]
    }

    /// Decoded Gaussian latents: what one gets without learning any diffusion.
    pub fn gaussian_videos(&self, samples: &[u64], seed: u64) -> Tensor {
        self.decode(
            &normal_batch(seed, Purpose::GaussianLatents, samples, 0, &self.latent).to_device(self.space.device()),
        )
    }
}

/// What an experiment's network sees of a clip's latent: every n-th frame, `[C, F, h, w]`.
pub fn seen(clip: [i64; 4], experiment: &DiffusionExperiment) -> [i64; 4] {
    let [c, f, h, w] = clip;
    [c, (f - 1) / experiment.latent_stride + 1, h, w]
}

/// What enters and leaves an experiment's network, for clips of the shape that it sees.
pub fn ports(experiment: &DiffusionExperiment, latent: [i64; 4]) -> UNetPorts {
    let conditioning = experiment.conditioning.as_ref();
    UNetPorts {
        inputs: latent[0] + i64::from(conditioning.is_some()),
        outputs: latent[0],
        temporal_length: latent[1],
        classes: conditioning.and_then(FrameConditioning::levels),
    }
}

/// The averaged weights of a diffusion run, fitted to another experiment's network: a short model's to a
/// prediction model's.
///
/// # Errors
/// A folder that is not such a run.
pub fn starting_weights(
    run: &Path,
    experiment: &DiffusionExperiment,
    latent: [i64; 4],
) -> Result<BTreeMap<String, Tensor>> {
    let (path, found) = checkpoint::open(run)?;
    let mut weights = weights(&found.expect("diffusion", &path)?);
    ports(experiment, latent).adopt(&mut weights, &experiment.unet);
    Ok(weights)
}

/// The autoencoder that a diffusion run carries with it.
pub const AUTOENCODER_FILE: &str = "autoencoder.safetensors";

/// The text encoder that an imported text-to-video run carries with it.
pub const TEXT_ENCODER_FILE: &str = "text_encoder.safetensors";

/// The run folder of a checkpoint file.
pub fn run_of(checkpoint: &Path) -> PathBuf {
    checkpoint.parent().and_then(Path::parent).unwrap_or(Path::new(".")).to_path_buf()
}

/// The averaged weights where there are any, else the last ones.
pub fn weights(checkpoint: &Checkpoint) -> BTreeMap<String, Tensor> {
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
    let clip = match &autoencoder {
        LatentSpaceConfig::Image { .. } => ImageAutoencoder::FRAMES_PER_PASS,
        LatentSpaceConfig::Video(video) => {
            let frames = checkpoint.experiment["data"]["frames"].as_i64().context("the stored data")?;
            frames / video.factors[0]
        }
    };
    LatentSpace::new(&autoencoder, &weights(checkpoint), moments, clip, device)
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
