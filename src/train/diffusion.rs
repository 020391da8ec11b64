//! Training of the denoiser in the latent space of a frozen autoencoder.

use anyhow::{Context, Result, ensure};
use rand::RngExt;
use tch::{Device, Tensor};

use super::{Batch, LatentFile, Phase, Picture, Task};
use crate::{
    data::{Loader, normalise},
    diffusion::GivenFrames,
    distributed::Ranks,
    experiment::DiffusionExperiment,
    generate::{Generator, starting_weights},
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
    /// `position` is the first sample of the data, of which each rank has its share; `fresh` is false where a checkpoint's weights come next.
    ///
    /// # Errors
    /// Data that is not there or does not fit the networks.
    pub fn new(
        experiment: &DiffusionExperiment,
        space: LatentSpace,
        device: Device,
        position: u64,
        fresh: bool,
        ranks: &Ranks,
    ) -> Result<Self> {
        let data = &experiment.data;
        let (batch, seed) = (experiment.trainer.batch, experiment.seed);
        let latent = space.config.latent_shape(data.frames, data.resolution, data.resolution)?;
        let source = match &experiment.latents {
            None => Source::Clips(Loader::of_rank(data, batch, seed, position, ranks.rank(), ranks.size())?),
            Some(file) => {
                let latents =
                    LatentFile::open(file, &space, batch, seed, position)?.of_rank(ranks.rank(), ranks.size());
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
        if let Some(run) = experiment.start_from.as_ref().filter(|_| fresh) {
            let weights = starting_weights(run, experiment, generator.latent)?;
            parameters.load(&weights).with_context(|| format!("start_from: {}", run.display()))?;
        }
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
        let Generator { unet, schedule, space, latent, latent_stride, conditioning, .. } = &self.generator;
        let draw = |purpose| normal_batch(seed, purpose, &batch.samples, 0, latent).to_device(self.device);
        let seen = batch.data.slice(2, None, None, *latent_stride);
        let z_0 = space.sample(&seen, &draw(Purpose::Posterior));
        let below = |purpose, most: i64| {
            let one = |&sample: &u64| stream(seed, purpose, sample, 0).random_range(0..most);
            Tensor::from_slice(&batch.samples.iter().map(one).collect::<Vec<i64>>()).to_device(self.device)
        };
        let t = below(Purpose::DiffusionTime, schedule.steps());
        let noise = draw(Purpose::DiffusionNoise);
        let given = conditioning.as_ref().map(|conditioning| {
            let mask =
                |&sample: &u64| conditioning.draw(&mut stream(seed, Purpose::FrameMask, sample, 0)).tensor(latent[1]);
            let level = conditioning.perturbation.map(|most| below(Purpose::Perturbation, most));
            GivenFrames {
                mask: Tensor::stack(&batch.samples.iter().map(mask).collect::<Vec<_>>(), 0).to_device(self.device),
                // one noise for both levels, as released; clean frames carry none
                noise: if level.is_some() { noise.shallow_clone() } else { noise.zeros_like() },
                level,
                masked_loss: conditioning.masked_loss,
            }
        });
        let loss = self.experiment.objective.loss(unet, schedule, &z_0, &t, &noise, given.as_ref());
        (&loss * scale).backward();
        Ok(vec![("loss", loss.to_device(Device::Cpu).double_value(&[]))])
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        let samples: Vec<u64> = (0..SHOWN).collect();
        let clips = self.generator.videos(&samples, self.experiment.sampler, self.experiment.seed, &mut |_, _| {})?;
        Ok(vec![Picture { name: "samples", clips }])
    }
}
