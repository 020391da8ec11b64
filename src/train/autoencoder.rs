//! Training of an autoencoder against its discriminator.

use std::cell::OnceCell;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor, no_grad};

use super::{Batch, Picture, Task, Terms, TrainedNetwork, ahead::ClipsAhead};
use crate::{
    autoencoder_loss::{CodecLoss, TrainPass},
    codecs::{Normalization, VideoCodec},
    data::{Loader, fixed_clips, normalise, to_u8},
    distributed::Ranks,
    experiment::AutoencoderExperiment,
    nn::Parameters,
    random::{Purpose, normal_batch},
    torch::{Readback, upload},
};

/// Clips on which the latents' scale and shift are measured, and clips to look at.
const MEASURED: i64 = 64;
const SHOWN: i64 = 4;

/// The autoencoder's update, then the discriminator's, on the same clips with fresh posterior noise.
pub struct AutoencoderTask {
    autoencoder: Box<dyn VideoCodec>,
    parameters: Parameters,
    loss: Box<dyn CodecLoss>,
    clips: ClipsAhead,
    experiment: AutoencoderExperiment,
    latent: [i64; 4],
    /// What scale and shift are measured on, decoded once.
    measured: OnceCell<Tensor>,
    device: Device,
}

impl AutoencoderTask {
    /// `position` is the first sample of the data; each rank has its share of those that follow.
    ///
    /// # Errors
    /// Data or LPIPS weights that are not there.
    pub fn new(experiment: &AutoencoderExperiment, device: Device, position: u64, ranks: &Ranks) -> Result<Self> {
        let data = &experiment.data;
        let loader =
            Loader::of_rank(data, experiment.trainer.batch, experiment.seed, position, ranks.rank(), ranks.size())?;
        let clips = ClipsAhead::new(loader, device)?;
        let parameters = Parameters::new(device, experiment.seed);
        let mut autoencoder = experiment.autoencoder.build(&parameters.root());
        autoencoder.begin_training(ranks, experiment.seed);
        let loss = experiment.loss.build(device, Kind::Float, experiment.seed, ranks)?;
        let latent = experiment.autoencoder.latent_shape(data.frames, data.resolution, data.resolution)?;
        Ok(AutoencoderTask {
            autoencoder,
            parameters,
            loss,
            clips,
            experiment: experiment.clone(),
            latent,
            measured: OnceCell::new(),
            device,
        })
    }

    fn noise(&self, purpose: Purpose, samples: &[u64]) -> Tensor {
        upload(&normal_batch(self.experiment.seed, purpose, samples, 0, &self.latent), self.device)
    }
}

impl Task for AutoencoderTask {
    /// The noise of the posterior.
    type Drawn = Tensor;

    fn name(&self) -> &'static str {
        "autoencoder"
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        vec![
            TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() },
            TrainedNetwork {
                name: "discriminator",
                gradient_norm: "discriminator_gradient_norm",
                parameters: self.loss.discriminator_parameters().clone(),
            },
        ]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        let batch = self.clips.next()?;
        let clips = upload(&batch.clips, self.device);
        Ok(Batch { data: clips, text: None, labels: None, samples: batch.samples, position: batch.position })
    }

    fn missing_videos(&self) -> usize {
        self.clips.left_out()
    }

    fn skipped_videos(&self) -> Vec<i64> {
        self.clips.skipped().iter().map(|&video| video.into()).collect()
    }

    fn draw(&self, network: usize, batch: &Batch) -> Result<Tensor> {
        let purpose = if network == 0 { Purpose::Posterior } else { Purpose::PosteriorDiscriminator };
        Ok(self.noise(purpose, &batch.samples))
    }

    fn gradients(&mut self, network: usize, (batch, noise): (&Batch, &Tensor), step: i64, scale: f64) -> Result<Terms> {
        if network == 1 && !self.loss.is_adversarial(step) {
            return Ok(vec![("discriminator_loss", Tensor::zeros([], (Kind::Float, self.device)))]);
        }
        let x = normalise(&batch.data);
        let is_own = network == 0;
        let (encoded, reconstruction) = match is_own {
            true => self.autoencoder.train_pass(&x, noise, true),
            false => no_grad(|| self.autoencoder.train_pass(&x, noise, false)),
        };
        let last_kernel = self.autoencoder.last_kernel().context("this codec has no decoder to train")?;
        let pass = TrainPass {
            x: &x,
            reconstruction: &reconstruction,
            encoded: &encoded,
            last_kernel,
            samples: &batch.samples,
            step,
            scale,
        };
        if !is_own {
            return Ok(self.loss.backward_discriminators(&pass));
        }
        let mut terms = self.loss.backward_autoencoder(&pass);
        terms.extend(no_grad(|| self.autoencoder.training_terms(&encoded)));
        Ok(terms)
    }

    fn form(&self, step: i64) -> Option<i64> {
        // the entries of a codebook that nobody takes are drawn anew
        self.loss.form(step).filter(|_| self.experiment.autoencoder.codebook().is_none())
    }

    fn after_passes(&mut self, network: usize, step: i64) {
        if network == 0 {
            self.autoencoder.after_passes(step);
        }
    }

    fn takes_part(&self, network: usize, step: i64) -> bool {
        network == 0 || self.loss.is_adversarial(step)
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        let clips = fixed_clips(&self.experiment.data, SHOWN, self.experiment.seed)?;
        let x = normalise(&upload(&clips, self.device));
        let reconstruction = no_grad(|| self.autoencoder.decode(self.autoencoder.encode(&x).mode()));
        let pairs = Tensor::stack(&[clips, Readback::of(&to_u8(&reconstruction))?.wait()?], 1).flatten(0, 1);
        Ok(vec![Picture { name: "reconstructions", clips: pairs }])
    }

    fn measure(&mut self) -> Result<Vec<(String, Tensor)>> {
        if self.measured.get().is_none() {
            let clips = fixed_clips(&self.experiment.data, MEASURED, self.experiment.seed)?;
            self.measured.set(clips).expect("it was empty");
        }
        let clips = self.measured.get().expect("it was filled");
        let batch = self.experiment.trainer.batch;
        let count = clips.size()[0];
        let latents: Vec<Readback> = (0..count)
            .step_by(batch as usize)
            .map(|i| {
                let x = normalise(&upload(&clips.narrow(0, i, batch.min(count - i)), self.device));
                let samples: Vec<u64> = (i..(i + batch).min(count)).map(|i| i as u64).collect();
                let noise = self.noise(Purpose::Evaluation, &samples);
                Readback::of(&no_grad(|| self.autoencoder.encode(&x).sample(&noise)))
            })
            .collect::<Result<_>>()?;
        let latents: Vec<Tensor> = latents.iter().map(Readback::wait).collect::<Result<_>>()?;
        let Normalization { scale, shift } = Normalization::measure(&Tensor::cat(&latents, 0));
        Ok(vec![("latent.scale".to_string(), Tensor::from(scale)), ("latent.shift".to_string(), Tensor::from(shift))])
    }
}
