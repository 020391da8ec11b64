//! Training of the denoiser in the latent space of a frozen autoencoder.

use std::{collections::BTreeSet, iter::repeat_n};

use anyhow::{Context, Result, ensure};
use rand::RngExt;
use tch::{Device, Tensor, no_grad};

use super::{Batch, Drawn, LatentFile, Picture, Task, Terms, TrainedNetwork, ahead::ClipsAhead, labels::Labels};
use crate::{
    codecs::{Encoded, EncodedKind, LatentSpace},
    data::{DataConfig, Loader, normalise},
    diffusion::{BlockConditioning, NoisyBatch, Times, resized},
    distributed::Ranks,
    experiment::DiffusionExperiment,
    models::{Asked, Assignment, ClipId, LatentConditions, LatentDiffusion, Seeds, VideoModel, starting_weights},
    networks::Inputs,
    nn::{Adapter, Parameters},
    random::{Purpose, normal_batch, stream},
    text::TextEncoder,
    torch::{backward, upload},
};

const SHOWN: u64 = 4;

enum Source {
    Clips {
        clips: ClipsAhead,
        /// Single frames, so many for each clip.
        stills: Option<ClipsAhead>,
    },
    Latents(LatentFile),
}

/// One noisy latent a clip, one loss.
pub struct DiffusionTask {
    generator: LatentDiffusion,
    parameters: Parameters,
    source: Source,
    labels: Option<Labels>,
    /// What a batch's data are.
    encoded: EncodedKind,
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
        text: Option<TextEncoder>,
        device: Device,
        position: u64,
        fresh: bool,
        ranks: &Ranks,
    ) -> Result<Self> {
        let data = &experiment.data;
        let (batch, seed) = (experiment.trainer.batch, experiment.seed);
        let latent = space.latent_shape(data.frames, data.resolution, data.resolution)?;
        let mut encoded = space.settings().encodes_to();
        let source = match &experiment.latents {
            None => {
                let load = |data: &DataConfig, each: i64| {
                    let first = position * each as u64;
                    let loader = Loader::of_rank(data, batch * each, seed, first, ranks.rank(), ranks.size())?;
                    ClipsAhead::new(loader, device)
                };
                let of_stills = DataConfig { frames: 1, ..data.clone() };
                let stills = (experiment.images > 0).then(|| load(&of_stills, experiment.images)).transpose()?;
                if stills.is_some() {
                    let [_, frames, ..] = space.latent_shape(1, data.resolution, data.resolution).context("images")?;
                    ensure!(frames == 1, "images: the codec makes {frames} latent frames of a single one");
                }
                Source::Clips { clips: load(data, 1)?, stills }
            }
            Some(file) => {
                let latents = LatentFile::open(file, &space, text.as_ref(), batch, seed, position, ranks)?;
                ensure!(
                    latents.shape() == &latent[..],
                    "{} holds latents {:?}, the experiment's data gives {latent:?}",
                    file.display(),
                    latents.shape()
                );
                encoded = latents.kind();
                Source::Latents(latents)
            }
        };
        let parameters = Parameters::new(device, seed);
        let mut generator = LatentDiffusion::new(experiment, space, text, &parameters)?;
        generator.set_numerics(experiment.trainer.precision.into());
        if let Some(run) = experiment.start_from.as_ref().filter(|_| fresh) {
            let mut weights = starting_weights(run, experiment, generator.latent)?;
            weights.extend(parameters.named().into_iter().filter(|(name, _)| Adapter::owns(name)));
            parameters.load(&weights).with_context(|| format!("start_from: {}", run.display()))?;
        }
        parameters.train_only(|name| experiment.moves(name));
        ensure!(
            parameters.named().iter().any(|(name, _)| experiment.trained.moves(name, &*experiment.network)),
            "trained: this network names no parameters over frames; those that do are kind: latte, and kind: unet3d with \
             attention: text"
        );
        let labels = experiment.labels.as_ref().map(|labels| Labels::new(labels, seed, device)).transpose()?;
        Ok(DiffusionTask { generator, parameters, source, labels, encoded, experiment: experiment.clone(), device })
    }
}

/// What a pass of a denoiser takes besides its batch.
pub struct DenoisingDraw {
    /// Of z_0 where the codec has a posterior.
    posterior: Tensor,
    noise: Tensor,
    times: Times,
    /// What the network is given, but for what comes from z_0.
    given: Inputs,
    given_times: Option<Times>,
    /// Which of the frames around a block are given.
    around: Option<Tensor>,
    /// The noise that the low resolution carries, and its times.
    low: Option<(Tensor, Times)>,
    /// Posterior, noise and times of the single frames.
    stills: Option<(Tensor, Tensor, Times)>,
}

impl Drawn for DenoisingDraw {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        let DenoisingDraw { posterior, noise, times, given, given_times, around, low, stills } = self;
        let mut all = vec![posterior, noise];
        all.extend(times.tensors());
        all.extend(given.tensors_mut());
        all.extend(given_times.iter_mut().flat_map(Times::tensors));
        all.extend(around);
        if let Some((noise, times)) = low {
            all.push(noise);
            all.extend(times.tensors());
        }
        if let Some((posterior, noise, times)) = stills {
            all.extend([posterior, noise]);
            all.extend(times.tensors());
        }
        all
    }
}

impl DiffusionTask {
    /// The loss of the single frames that stand beside the clips of a batch, at the clips' times.
    fn loss_of_stills(&self, batch: &Batch, (posterior, noise, times): &(Tensor, Tensor, Times)) -> Tensor {
        let LatentDiffusion { network, path, space, .. } = &self.generator;
        let images = self.experiment.images;
        let stills = batch.data.narrow(2, batch.data.size()[2] - images, images);
        let stills = stills.transpose(1, 2).flatten(0, 1).unsqueeze(2);
        let z_0 = space.sample(&Encoded::of_stacked(self.encoded, &stills), posterior);
        let given = Inputs { stills: true, ..Inputs::default() }.completed(&z_0, network.ports());
        let noisy = NoisyBatch { z_0: &z_0, noise, times, given: &given, given_times: None, made_only: false };
        self.experiment.objective.loss(&**network, &**path, &noisy)
    }

    /// Clips of the data, made smaller and larger again.
    fn enlarged(&self, resolution: i64) -> Result<Tensor> {
        let seed = self.experiment.seed;
        let clips = Loader::new(&self.experiment.data, SHOWN as i64, seed, 0)?.next()?.clips;
        let low = no_grad(|| resized(&normalise(&upload(&clips, self.device)), [resolution; 2]));
        let ids: Vec<ClipId> = (0..SHOWN).map(|sample| ClipId { seed, sample, clip: 0 }).collect();
        let given = LatentConditions { low: Some(&low), ..LatentConditions::default() };
        let frames = self.generator.latent[1];
        let z_0 = self.generator.clips(&ids, frames, &given, self.experiment.sampler, &mut |_, _| {})?;
        self.generator.decode(&z_0)
    }
}

impl Task for DiffusionTask {
    type Drawn = DenoisingDraw;

    fn name(&self) -> &'static str {
        self.experiment.task()
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        vec![TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() }]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        let seed = self.experiment.seed;
        let drop = self.experiment.text.as_ref().map_or(0.0, |text| text.drop);
        let dropped = |sample: &u64| stream(seed, Purpose::Caption, *sample, 0).random_bool(drop);
        match &mut self.source {
            Source::Latents(file) => {
                let mut batch = file.next_batch()?;
                if let (Some(text), Some(encoder)) = (&batch.text, &self.generator.text) {
                    let rows: Vec<bool> = batch.samples.iter().map(dropped).collect();
                    let dropped = upload(&Tensor::from_slice(&rows).reshape([-1, 1, 1]), self.device);
                    batch.text = Some(encoder.empty()?.where_self(&dropped, &upload(text, self.device)));
                }
                batch.labels = match (&self.labels, batch.labels, file.classes()) {
                    (Some(labels), Some(numbers), Some(names)) => {
                        let numbers: Vec<i64> = (&numbers).try_into()?;
                        let names = numbers.iter().map(|&number| names.get(number as usize).map(String::as_str));
                        Some(labels.of(names, &batch.samples)?)
                    }
                    _ => None,
                };
                batch.data = match file.holds_codes() {
                    true => self.generator.space.vectors(&batch.data)?,
                    false => upload(&batch.data, self.device),
                };
                Ok(batch)
            }
            Source::Clips { clips, stills } => {
                let batch = clips.next()?;
                let encode =
                    |clips: &Tensor| self.generator.space.encode(&normalise(&upload(clips, self.device))).stacked();
                let mut latents = encode(&batch.clips);
                if let Some(stills) = stills {
                    let stills = encode(&stills.next()?.clips); // [B·N, C, 1, h, w]
                    let of_clips = stills.squeeze_dim(2).unflatten(0, [latents.size()[0], self.experiment.images]);
                    latents = Tensor::cat(&[latents, of_clips.transpose(1, 2)], 2);
                }
                let text = match &self.generator.text {
                    None => None,
                    Some(encoder) => {
                        let captions = batch.captions.into_iter().zip(&batch.samples).map(|(caption, sample)| {
                            let caption = caption.context("data.dataset: a clip has no caption")?;
                            Ok(if dropped(sample) { String::new() } else { caption })
                        });
                        Some(encoder.encode(&captions.collect::<Result<Vec<_>>>()?)?)
                    }
                };
                let classes = batch.classes.iter().map(Option::as_deref);
                let labels = self.labels.as_ref().map(|labels| labels.of(classes, &batch.samples)).transpose()?;
                Ok(Batch { data: latents, text, labels, samples: batch.samples, position: batch.position })
            }
        }
    }

    fn missing_videos(&self) -> usize {
        match &self.source {
            Source::Clips { clips, .. } => clips.left_out(),
            Source::Latents(_) => 0,
        }
    }

    fn skipped_videos(&self) -> Vec<i64> {
        match &self.source {
            Source::Clips { clips, stills } => {
                let loaders = [Some(clips), stills.as_ref()].into_iter().flatten();
                let skipped: BTreeSet<u32> = loaders.flat_map(|loader| loader.skipped().iter().copied()).collect();
                skipped.into_iter().map(i64::from).collect()
            }
            Source::Latents(_) => Vec::new(),
        }
    }

    fn draw(&self, _network: usize, batch: &Batch) -> Result<DenoisingDraw> {
        let seed = self.experiment.seed;
        let LatentDiffusion { path, latent, conditioning, blocks, .. } = &self.generator;
        let samples = &batch.samples;
        let normal = |purpose, shape: &[i64]| upload(&normal_batch(seed, purpose, samples, 0, shape), self.device);
        let drawn = |purpose| samples.iter().map(move |&sample| stream(seed, purpose, sample, 0));
        let [c, f, h, w] = *latent;
        let clip = [c, f + blocks.as_ref().map_or(0, BlockConditioning::around), h, w];
        let t: Vec<f64> = drawn(Purpose::DiffusionTime).map(|mut stream| path.draw(&mut stream)).collect();
        let mut given = Inputs {
            text: batch.text.as_ref().map(Tensor::shallow_clone),
            label: batch.labels.as_ref().map(Tensor::shallow_clone),
            ..Inputs::default()
        };
        let around = blocks.as_ref().map(|blocks| {
            let given: Vec<_> = drawn(Purpose::FrameMask).map(|mut stream| blocks.draw(&mut stream)).collect();
            upload(&blocks.mask(&given), self.device)
        });
        if self.experiment.network.takes().dropout {
            let keys: Vec<i64> = drawn(Purpose::Dropout).map(|mut stream| stream.random_range(0..1 << 31)).collect();
            given.dropout = Some(upload(&Tensor::from_slice(&keys), self.device));
        }
        let mut given_times = None;
        if let Some(conditioning) = conditioning {
            let masks: Vec<Tensor> =
                drawn(Purpose::FrameMask).map(|mut stream| conditioning.draw(&mut stream).tensor(f)).collect();
            given.mask = Some(upload(&Tensor::stack(&masks, 0), self.device));
            if let Some(most) = conditioning.perturbation {
                let levels: Vec<i64> =
                    drawn(Purpose::Perturbation).map(|mut stream| stream.random_range(0..most)).collect();
                given.level = Some(upload(&Tensor::from_slice(&levels), self.device));
                given_times = Some(Times::of_levels(&**path, &levels, self.device));
            }
        }
        let low = self.experiment.superresolution.as_ref().map(|settings| {
            let levels: Vec<i64> =
                drawn(Purpose::Perturbation).map(|mut stream| stream.random_range(0..settings.noise)).collect();
            let noise = upload(&normal_batch(seed, Purpose::Perturbation, samples, 1, latent), self.device);
            (noise, Times::of_levels(&**path, &levels, self.device))
        });
        let images = self.experiment.images;
        let stills = (images > 0).then(|| {
            let normal = |purpose| {
                let noise = normal_batch(seed, purpose, samples, 1, &[images, c, 1, h, w]);
                upload(&noise.flatten(0, 1), self.device) // [B·N, C, 1, h, w]
            };
            let t: Vec<f64> = t.iter().flat_map(|&t| repeat_n(t, images as usize)).collect();
            let times = Times::of_clips(&**path, &t, self.device);
            (normal(Purpose::Posterior), normal(Purpose::DiffusionNoise), times)
        });
        let times = Times::of_clips(&**path, &t, self.device);
        let of_stills = stills.as_ref().map(|(_, _, times)| times);
        for times in [Some(&times), given_times.as_ref(), of_stills].into_iter().flatten() {
            self.experiment.objective.prepare(&**path, times);
        }
        Ok(DenoisingDraw {
            posterior: normal(Purpose::Posterior, &clip),
            noise: normal(Purpose::DiffusionNoise, latent),
            times,
            given,
            given_times,
            around,
            low,
            stills,
        })
    }

    fn gradients(
        &mut self,
        _network: usize,
        (batch, drawn): (&Batch, &DenoisingDraw),
        _step: i64,
        scale: f64,
    ) -> Result<Terms> {
        let LatentDiffusion { network, path, space, latent, latent_stride, conditioning, blocks, .. } = &self.generator;
        let clips = batch.data.narrow(2, 0, batch.data.size()[2] - self.experiment.images);
        let seen = Encoded::of_stacked(self.encoded, &clips.slice(2, None, None, *latent_stride));
        let mut z_0 = space.sample(&seen, &drawn.posterior);
        let mut given = drawn.given.clone();
        if let (Some(blocks), Some(mask)) = (blocks, &drawn.around) {
            given.around = Some(blocks.frames_around(&z_0, mask));
            z_0 = blocks.block(&z_0);
        }
        if let (Some(settings), Some((noise, times))) = (&self.experiment.superresolution, &drawn.low) {
            let [_, _, h, w] = *latent;
            let low = resized(&resized(&z_0, [settings.resolution; 2]), [h, w]);
            given.concat = vec![times.add_noise(&low, noise)];
            given.concat_time = Some(times.embedded().shallow_clone());
        }
        let noisy = NoisyBatch {
            z_0: &z_0,
            noise: &drawn.noise,
            times: &drawn.times,
            given: &given,
            given_times: drawn.given_times.as_ref(),
            made_only: conditioning.as_ref().is_some_and(|conditioning| conditioning.masked_loss),
        };
        let mut loss = self.experiment.objective.loss(&**network, &**path, &noisy);
        if let Some(stills) = &drawn.stills {
            // as if they were frames of the clips
            let (frames, images) = (latent[1], self.experiment.images);
            loss = (loss * frames + self.loss_of_stills(batch, stills) * images) / (frames + images);
        }
        backward(&(&loss * scale));
        Ok(vec![("loss", loss.detach())])
    }

    fn form(&self, _step: i64) -> Option<i64> {
        Some(0)
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        if let Some(settings) = &self.experiment.superresolution {
            return Ok(vec![Picture { name: "samples", clips: self.enlarged(settings.resolution)? }]);
        }
        let asked = Asked {
            prompts: self.experiment.text.as_ref().map_or_else(Vec::new, |text| text.prompts.clone()),
            ..Asked::default()
        };
        let assignment = Assignment::within(&self.generator.accepts(), asked);
        let (shown, seeds) = ((0..SHOWN).collect::<Vec<u64>>(), Seeds::One(self.experiment.seed));
        let clips = assignment.videos(&self.generator, &shown, &seeds, &mut |_, _| {})?;
        Ok(vec![Picture { name: "samples", clips }])
    }
}
