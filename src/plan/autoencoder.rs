//! The plan of an autoencoder's training.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::{Activations, Plan, PlanOptions, Variant};
use crate::{
    autoencoder_loss::{AutoencoderLossConfig, PatchDiscriminator, VIDEO_DISCRIMINATOR, VideoDiscriminator},
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
    let perceives = loss.perceptual_weight > 0.0;

    let of = format!("{:?}", (codec, loss, frames, side, trainer.precision));
    let known = options.counted.borrow().get(&of).map(|[whole, _]| *whole);
    let kept = match known {
        Some(kept) => kept,
        None => count_kept(experiment, latent, &discriminators, &lpips)?,
    };
    options.counted.borrow_mut().insert(of, [kept; 2]);

    let coded: i64 = codec.flops(frames, side, side).iter().sum();
    let perceived = if perceives { frames_seen(loss, frames) * flops::vgg16(side, side) } else { 0 };
    let adversary = if loss.adversarial_weight > 0.0 { discriminators.flops(loss, frames, side) } else { 0 };
    let with_adversary = (trainer.steps - loss.adversarial_start).clamp(0, trainer.steps) as f64 / trainer.steps as f64;
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
        frozen: if perceives { lpips.parameters() } else { 0 },
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
            codec.decode(&codec.encode(&x).sample(&noise)).to_kind(Kind::Float)
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
    if loss.perceptual_weight > 0.0 {
        let seen = of_clips(&|x| kept_for_backward(|| lpips.distance_to(&images(&x.detach()), &images(x)).mean(None)))?;
        // of every n-th frame
        losses = Activations { clip: seen.clip * frames_seen(loss, frames) / frames, ..seen };
    }
    if loss.adversarial_weight > 0.0 {
        let seen = of_clips(&|x| {
            kept_for_backward(|| {
                let _precision = Autocast::bfloat16(Device::Cpu, half);
                discriminators.judge(x)
            })
        })?;
        losses = losses.or(seen);
    }

    Ok(coding.and(losses))
}

/// Frames of a clip that LPIPS looks at in one step.
fn frames_seen(loss: &AutoencoderLossConfig, frames: i64) -> i64 {
    (frames / loss.perceptual_every.clamp(1, frames)).max(1)
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

/// Those of single frames and, where there is one, of whole clips.
struct Discriminators {
    parameters: Parameters,
    of_frames: PatchDiscriminator,
    of_clips: Option<VideoDiscriminator>,
}

impl Discriminators {
    fn new(loss: &AutoencoderLossConfig) -> Self {
        // they are small, and batch norm writes into its statistics
        let parameters = Parameters::new(Device::Cpu, 0);
        let root = parameters.root();
        let of_frames = PatchDiscriminator::new(&root, 3, &loss.discriminator);
        let video = loss.video_discriminator.as_ref();
        let of_clips = video.map(|config| VideoDiscriminator::new(&root.sub(VIDEO_DISCRIMINATOR), 3, config));
        Discriminators { parameters, of_frames, of_clips }
    }

    /// What they make of clips, as one number.
    fn judge(&self, clips: &Tensor) -> Tensor {
        let frames = self.of_frames.forward(&clips.transpose(1, 2).flatten(0, 1)).mean(None);
        match &self.of_clips {
            Some(video) => frames + video.judge(clips).logits.mean(None),
            None => frames,
        }
    }

    /// Operations over one clip.
    fn flops(&self, loss: &AutoencoderLossConfig, frames: i64, side: i64) -> i64 {
        let of_clips = loss.video_discriminator.as_ref().map_or(0, |config| config.flops(frames, side, side));
        frames * loss.discriminator.flops(side, side) + of_clips
    }
}
