//! Training of the denoiser in the latent space of a frozen autoencoder.

use anyhow::{Result, ensure};
use rand::RngExt;
use tch::{Device, Tensor};

use super::{Batch, LatentFile, Phase, Picture, Task};
use crate::{
    data::{Loader, normalise},
    experiment::DiffusionExperiment,
    generate::Generator,
    models::LatentSpace,
    nn::Parameters,
    random::{Purpose, normal_batch, stream},
};

const SHOWN: u64 = 4;

enum Source {
    Clips(Loader),
    Latents(LatentFile),
}

/// One noisy latent a clip, one loss.
pub struct DiffusionTask {
    generator: Generator,
    parameters: Parameters,
    source: Source,
    experiment: DiffusionExperiment,
    device: Device,
}

impl DiffusionTask {
    /// `position` is the first sample of the data.
    ///
    /// # Errors
    /// Data that is not there or does not fit the networks.
    pub fn new(experiment: &DiffusionExperiment, space: LatentSpace, device: Device, position: u64) -> Result<Self> {
        let data = &experiment.data;
        let (batch, seed) = (experiment.trainer.batch, experiment.seed);
        let latent = space.config.latent_shape(data.frames, data.resolution, data.resolution)?;
        let source = match &experiment.latents {
            None => Source::Clips(Loader::new(data, batch, seed, position)?),
            Some(file) => {
                let latents = LatentFile::open(file, &space, batch, seed, position)?;
                ensure!(
                    latents.shape() == latent,
                    "{} holds latents {:?}, the experiment's data gives {latent:?}",
                    file.display(),
                    latents.shape()
                );
                Source::Latents(latents)
            }
        };
        let parameters = Parameters::new(device, seed);
        let generator = Generator::new(experiment, space, &parameters)?;
        Ok(DiffusionTask { generator, parameters, source, experiment: experiment.clone(), device })
    }
}

impl Task for DiffusionTask {
    fn name(&self) -> &'static str {
        "diffusion"
    }

    fn phases(&self) -> Vec<Phase> {
        vec![Phase { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() }]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        match &mut self.source {
            Source::Latents(file) => Ok(file.next_batch()),
            Source::Clips(loader) => {
                let batch = loader.next()?;
                let moments = self.generator.space.moments_of(&normalise(&batch.clips.to_device(self.device)));
                Ok(Batch { data: moments, samples: batch.samples, position: batch.position })
            }
        }
    }

    fn skipped_videos(&self) -> usize {
        match &self.source {
            Source::Clips(loader) => loader.skipped().len(),
            Source::Latents(_) => 0,
        }
    }

    fn gradients(&mut self, _phase: usize, batch: &Batch, _step: i64, scale: f64) -> Result<Vec<(&'static str, f64)>> {
        let seed = self.experiment.seed;
        let Generator { unet, schedule, space, latent, .. } = &self.generator;
        let draw = |purpose| normal_batch(seed, purpose, &batch.samples, 0, latent).to_device(self.device);
        let z_0 = space.sample(&batch.data, &draw(Purpose::Posterior));
        let t: Vec<i64> = batch
            .samples
            .iter()
            .map(|&sample| stream(seed, Purpose::DiffusionTime, sample, 0).random_range(0..schedule.steps()))
            .collect();
        let t = Tensor::from_slice(&t).to_device(self.device);
        let noise = draw(Purpose::DiffusionNoise);
        let loss = self.experiment.objective.loss(unet, schedule, &z_0, &t, &noise, None);
        (&loss * scale).backward();
        Ok(vec![("loss", loss.to_device(Device::Cpu).double_value(&[]))])
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        let samples: Vec<u64> = (0..SHOWN).collect();
        let clips = self.generator.videos(&samples, self.experiment.sampler, self.experiment.seed, &mut |_, _| {})?;
        Ok(vec![Picture { name: "samples", clips }])
    }
}
