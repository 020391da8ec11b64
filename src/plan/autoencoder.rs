//! The plan of an autoencoder's training.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor, no_grad};

use super::{Activations, Plan, Variant, Work, work::Trained};
use crate::{
    codecs::VideoCodec,
    experiment::{AutoencoderExperiment, Precision},
    extractors::Lpips,
    flops,
    nn::Parameters,
    torch::{Autocast, kept_for_backward, without_memory},
};

pub(super) fn plan(experiment: &AutoencoderExperiment) -> Result<Plan> {
    let AutoencoderExperiment { data, autoencoder: codec, loss, .. } = experiment;
    let trainer = experiment.trainer.clone();
    let (frames, side) = (data.frames, data.resolution);
    let latent = codec.latent_shape(frames, side, side).context("data")?;

    let built = Bare::new(experiment, latent);
    let [own, judged] = [&built.parameters, &built.discriminators].map(Parameters::count);
    let frames_seen = loss.frames_perceived(frames);
    let kept = built.kept()?;

    let coded: i64 = codec.flops(frames, side, side).iter().sum();
    let perceived = frames_seen * flops::vgg16(side, side);
    let start = loss.adversarial_start();
    let adversary = start.map_or(0, |_| loss.discriminator_flops(frames, side));
    let with_adversary = start.map_or(0, |start| (trainer.steps - start).clamp(0, trainer.steps)) as f64;
    let with_adversary = with_adversary / trainer.steps as f64;
    // clips and reconstructions, and the gradient by these; the discriminators' own update codes once more, and moves them
    let judging = if adversary > 0 { coded + 8 * adversary } else { 0 };
    let step = 3 * (coded + perceived) + (judging as f64 * with_adversary) as i64;
    let mut notes = vec![
        "A clip in a training step counts as three passes of encoding and decoding, three of LPIPS where it looks (the \
         clip, its reconstruction, and back), and, in the steps in which there are discriminators (loss.adversarial_start), \
         one more of encoding and decoding and eight of theirs; what is said is the mean of all steps."
            .to_string(),
    ];
    if start.is_some() {
        notes.push(
            "Kernels and hours are those of a step with discriminators, as if they were there from the start.".into(),
        );
    }
    Ok(Plan {
        title: format!("a {} of clips {:?} with latents {latent:?}", codec.name(), [3, frames, side, side]),
        parameters: own + judged,
        trained: own + judged,
        averaged: if trainer.ema_decay.is_some() { own } else { 0 },
        frozen: if frames_seen > 0 { built.lpips.parameters() } else { 0 },
        forward: coded,
        step,
        kernels: built.step()?,
        sampling: None,
        activations: vec![Variant { recompute: String::new(), kept }],
        trainer,
        notes,
    })
}

/// Codec and judges of a training, whose weights have no memory.
struct Bare<'a> {
    experiment: &'a AutoencoderExperiment,
    latent: [i64; 4],
    codec: Box<dyn VideoCodec>,
    parameters: Parameters,
    judge: Box<dyn Fn(&Tensor) -> Tensor>,
    discriminators: Parameters,
    lpips: Lpips,
}

impl<'a> Bare<'a> {
    fn new(experiment: &'a AutoencoderExperiment, latent: [i64; 4]) -> Self {
        let [parameters, discriminators] = [(); 2].map(|()| Parameters::unfilled(Device::Cpu));
        let codec = experiment.autoencoder.build(&parameters.root());
        let judge = experiment.loss.discriminators(&discriminators.root());
        let lpips = Lpips::unfilled();
        for parameters in [&parameters, &discriminators] {
            parameters.forget_memory();
            parameters.require_grad(true);
        }
        Bare { experiment, latent, codec, parameters, judge, discriminators, lpips }
    }

    fn half(&self) -> bool {
        self.experiment.trainer.precision == Precision::Bf16
    }

    fn clips(&self, batch: i64) -> Tensor {
        let data = &self.experiment.data;
        without_memory(&[batch, 3, data.frames, data.resolution, data.resolution], Kind::Float)
    }

    /// Reconstructions of a batch.
    fn coded(&self, batch: i64) -> Tensor {
        let noise = without_memory(&[&[batch], &self.latent[..]].concat(), Kind::Float);
        let _precision = Autocast::bfloat16(Device::Cpu, self.half());
        self.codec.train_pass(&self.clips(batch), &noise, false).1.to_kind(Kind::Float)
    }

    /// LPIPS between clips and their reconstructions, of the frames that it looks at; none where there is none.
    fn perceived(&self, reconstructions: &Tensor) -> Option<Tensor> {
        let [batch, _, frames, ..] = reconstructions.size()[..] else { unreachable!("clips") };
        let frames = Some(self.experiment.loss.frames_perceived(frames)).filter(|&frames| frames > 0)?;
        let images = |clips: &Tensor| clips.narrow(2, 0, frames).transpose(1, 2).flatten(0, 1); // [B·F, 3, H, W]
        Some(self.lpips.distance_to(&images(&self.clips(batch)), &images(reconstructions)).mean(None))
    }

    /// What the discriminators say of clips; none where there are none.
    fn judged(&self, clips: &Tensor) -> Option<Tensor> {
        self.experiment.loss.adversarial_start()?;
        let _precision = Autocast::bfloat16(Device::Cpu, self.half());
        Some((self.judge)(clips))
    }

    /// What a forward pass through codec and losses keeps. The losses go one after the other.
    fn kept(&self) -> Result<Activations> {
        let of = |body: &dyn Fn(i64) -> Option<Tensor>| -> Result<Activations> {
            let kept = |batch| {
                let one = || body(batch).unwrap_or_else(|| without_memory(&[1], Kind::Float));
                Ok(kept_for_backward(one))
            };
            Ok(Activations::of(&kept)?[0])
        };
        let coding = of(&|batch| Some(self.coded(batch)))?;
        let made = |batch| self.clips(batch).set_requires_grad(true);
        let perceived = of(&|batch| self.perceived(&made(batch)))?;
        let judged = of(&|batch| self.judged(&made(batch)))?;
        Ok(coding.and(perceived.or(judged)))
    }

    /// The kernels of a step in which the losses have set in.
    fn step(&self) -> Result<Work> {
        let AutoencoderExperiment { trainer, optimizer, .. } = self.experiment;
        let of = |parameters, averaged| Trained { parameters, trainer, optimizer, averaged };
        let own = of(&self.parameters, true).step(&|| {
            let made = self.coded(trainer.batch);
            let distance = (&made - self.clips(trainer.batch)).abs().mean(None);
            [self.perceived(&made), self.judged(&made)].into_iter().flatten().fold(distance, |sum, loss| sum + loss)
        })?;
        if self.experiment.loss.adversarial_start().is_none() {
            return Ok(own);
        }
        let of_judges = of(&self.discriminators, false).step(&|| {
            let made = no_grad(|| self.coded(trainer.batch));
            let [made, real] = [made, self.clips(trainer.batch)].map(|clips| self.judged(&clips).expect("judges"));
            made + real
        })?;
        Ok(own.then(of_judges))
    }
}
