//! The plan of an autoencoder's training.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::{Activations, Plan, PlanOptions, Variant};
use crate::{
    autoencoder_loss::CodecLossConfig,
    experiment::{AutoencoderExperiment, Precision},
    extractors::Lpips,
    flops,
    nn::Parameters,
    torch::{Autocast, Kept, kept_for_backward},
};

/// Height and width of the smallest clips that are counted, in latents and in pixels: LPIPS wants 16.
const LATENT: i64 = 4;
const PIXELS: i64 = 32;

pub(super) fn plan(experiment: &AutoencoderExperiment, options: &PlanOptions) -> Result<Plan> {
    let AutoencoderExperiment { data, autoencoder: codec, loss, .. } = experiment;
    let trainer = experiment.trainer.clone();
    let (frames, side) = (data.frames, data.resolution);
    let latent = codec.latent_shape(frames, side, side).context("data")?;

    let own = Parameters::unfilled(Device::Cpu);
    let _codec = codec.build(&own.root());
    let discriminators = Discriminators::new(loss);
    let judged = discriminators.parameters.count();
    let lpips = Lpips::unfilled();
    let frames_seen = loss.frames_perceived(frames);

    let of = format!("{:?}", (codec, loss, frames, side, trainer.precision));
    let known = options.counted.borrow().get(&of).map(|[whole, _]| *whole);
    let kept = match known {
        Some(kept) => kept,
        None => count_kept(experiment, latent, &discriminators, &lpips)?,
    };
    options.counted.borrow_mut().insert(of, [kept; 2]);

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
    notes.extend(kept.note());
    Ok(Plan {
        title: format!("a {} of clips {:?} with latents {latent:?}", codec.name(), [3, frames, side, side]),
        parameters: own.count() + judged,
        trained: own.count() + judged,
        averaged: if trainer.ema_decay.is_some() { own.count() } else { 0 },
        frozen: if frames_seen > 0 { lpips.parameters() } else { 0 },
        forward: coded,
        step,
        activations: vec![Variant { recompute: String::new(), kept }],
        trainer,
        notes,
    })
}

/// What a forward pass through codec and losses keeps.
fn count_kept(
    experiment: &AutoencoderExperiment,
    latent: [i64; 4],
    discriminators: &Discriminators,
    lpips: &Lpips,
) -> Result<Activations> {
    let AutoencoderExperiment { data, autoencoder: codec, loss, trainer, .. } = experiment;
    let (frames, side, half) = (data.frames, data.resolution, trainer.precision == Precision::Bf16);
    let units = [latent[1] as f64, latent[2] as f64 / LATENT as f64, latent[3] as f64 / LATENT as f64];
    let coding = Activations::of(units, &|batch, [f, h, w]| {
        let parameters = Parameters::unfilled(Device::Cpu);
        let codec = codec.build(&parameters.root());
        parameters.require_grad(true);
        let latent = [f, h * LATENT, w * LATENT];
        let [frames, height, width] = codec.settings().clip_shape(latent);
        let x = zeros(&[batch, 3, frames, height, width]);
        let noise = zeros(&[batch, codec.settings().latent_channels(), latent[0], latent[1], latent[2]]);
        Ok(kept_for_backward(|| {
            let _precision = Autocast::bfloat16(Device::Cpu, half);
            codec.train_pass(&x, &noise, false).1.to_kind(Kind::Float)
        }))
    })?[0];
    let units = [frames as f64, side as f64 / PIXELS as f64, side as f64 / PIXELS as f64];
    let of_clips = |body: &dyn Fn(&Tensor) -> Kept| {
        Activations::of(units, &|batch, [f, h, w]| {
            Ok(body(&zeros(&[batch, 3, f, h * PIXELS, w * PIXELS]).set_requires_grad(true)))
        })
        .map(|[whole, _]| whole)
    };
    let images = |clips: &Tensor| clips.transpose(1, 2).flatten(0, 1); // [B·F, 3, H, W]
    let mut losses = Activations::default();
    if loss.frames_perceived(frames) > 0 {
        let seen = of_clips(&|x| kept_for_backward(|| lpips.distance_to(&images(&x.detach()), &images(x)).mean(None)))?;
        // of every n-th frame
        losses = Activations { clip: seen.clip * loss.frames_perceived(frames) / frames, ..seen };
    }
    if loss.adversarial_start().is_some() {
        let seen = of_clips(&|x| {
            kept_for_backward(|| {
                let _precision = Autocast::bfloat16(Device::Cpu, half);
                (discriminators.judge)(x)
            })
        })?;
        losses = losses.or(seen);
    }

    Ok(coding.and(losses))
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

/// The discriminators of a loss.
struct Discriminators {
    parameters: Parameters,
    judge: Box<dyn Fn(&Tensor) -> Tensor>,
}

impl Discriminators {
    fn new(loss: &CodecLossConfig) -> Self {
        // they are small, and batch norm writes into its statistics
        let parameters = Parameters::new(Device::Cpu, 0);
        let judge = loss.discriminators(&parameters.root());
        Discriminators { parameters, judge }
    }
}
