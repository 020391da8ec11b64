//! Reconstruction, perceptual and adversarial losses of LVDM's autoencoder (paper, section 3.1).

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    CodecLoss, CodecLossSettings, DiscriminatorConfig, Judged, PatchDiscriminator, TatsDiscriminator, TrainPass,
    VideoDiscriminatorConfig,
};
use crate::{
    codecs::Encoded,
    distributed::Ranks,
    extractors::Lpips,
    nn::{Parameters, Scope},
    torch::{backward, gradient},
};

/// How pixels are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PixelLoss {
    /// |x − x̂| (the released code)
    L1,
    /// (x − x̂)² (the paper's text)
    L2,
}

/// The default is the released setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct AutoencoderLossConfig {
    /// How pixels are compared.
    pub pixel: PixelLoss,
    /// Weight of a frame's LPIPS, which is added to each of its pixels.
    pub perceptual_weight: f64,
    /// LPIPS looks at every n-th frame, beginning one frame later at each step; their mean stands for all.
    pub perceptual_every: i64,
    /// Weight of what keeps latents in bounds: the KL divergence of a Gaussian's.
    pub kl_weight: f64,
    /// Weight of the adversarial term, before the adaptive weight; 0 for no discriminator.
    pub adversarial_weight: f64,
    /// Step at which the discriminator comes in.
    pub adversarial_start: i64,
    /// Steps over which the generator's adversarial weight then grows from 0.
    pub adversarial_warmup: i64,
    /// Over several ranks: the discriminator's batch norm sees the batches of all ranks, and the adaptive weight comes
    /// from gradients that are reduced over them, so that ranks together equal one with the whole batch. As released,
    /// each rank has its own.
    pub sync_batch_norm: bool,
    /// The PatchGAN discriminator of single frames.
    pub discriminator: DiscriminatorConfig,
    /// A second PatchGAN discriminator, of whole clips. None in the released setting; TATS has one.
    pub video_discriminator: Option<VideoDiscriminatorConfig>,
    /// Weight of feature matching beside pixels and LPIPS: how far a reconstruction is from its clip in the
    /// discriminators' activations. It comes in and grows as the adversarial term does. 0 in the released setting;
    /// TATS gives it as much as pixels and LPIPS, which here is 1.
    pub feature_matching: f64,
}

impl Default for AutoencoderLossConfig {
    fn default() -> Self {
        AutoencoderLossConfig {
            pixel: PixelLoss::L1,
            perceptual_weight: 1.0,
            perceptual_every: 1,
            kl_weight: 0.0,
            adversarial_weight: 0.5,
            adversarial_start: 50_001,
            adversarial_warmup: 0,
            sync_batch_norm: false,
            discriminator: DiscriminatorConfig::default(),
            video_discriminator: None,
            feature_matching: 0.0,
        }
    }
}

impl CodecLossSettings for AutoencoderLossConfig {
    fn validate(&self) -> Result<()> {
        let weight = |key: &str, weight: f64| {
            ensure!(weight.is_finite() && weight >= 0.0, "{key} is a weight of 0 or more, not {weight}");
            ensure!(
                weight == 0.0 || self.adversarial_weight > 0.0,
                "{key} needs discriminators that are trained, and adversarial_weight is {}",
                self.adversarial_weight
            );
            Ok(())
        };
        weight("feature_matching", self.feature_matching)?;
        if let Some(VideoDiscriminatorConfig { channels, layers, weight: of_video }) = self.video_discriminator {
            weight("video_discriminator.weight", of_video)?;
            ensure!(channels >= 1, "video_discriminator.channels must be at least 1, not {channels}");
            ensure!(layers >= 1, "video_discriminator.layers must be at least 1, not {layers}");
        }
        Ok(())
    }

    fn build(&self, device: Device, kind: Kind, seed: u64, ranks: &Ranks) -> Result<Box<dyn CodecLoss>> {
        Ok(Box::new(AutoencoderLoss::new(self, device, kind, seed)?.over(ranks)))
    }

    fn is_regularized(&self) -> bool {
        self.kl_weight > 0.0
    }

    fn frames_perceived(&self, frames: i64) -> i64 {
        match self.perceptual_weight > 0.0 {
            true => (frames / self.perceptual_every.clamp(1, frames)).max(1),
            false => 0,
        }
    }

    fn adversarial_start(&self) -> Option<i64> {
        (self.adversarial_weight > 0.0).then_some(self.adversarial_start)
    }

    fn discriminators(&self, scope: &Scope) -> Box<dyn Fn(&Tensor) -> Tensor> {
        let (of_frames, of_clips) = self.declare(scope);
        Box::new(move |clips| {
            let seen = of_frames.forward(&frames(clips)).mean(None);
            match &of_clips {
                Some(of_clips) => seen + of_clips.judge(clips).logits.mean(None),
                None => seen,
            }
        })
    }

    fn discriminator_flops(&self, frames: i64, side: i64) -> i64 {
        let of_clips = self
            .video_discriminator
            .as_ref()
            .map_or(0, |own| TatsDiscriminator::flops(&[frames, side, side], own.channels, own.layers));
        frames * self.discriminator.flops(side, side) + of_clips
    }
}

impl AutoencoderLossConfig {
    /// Declares the discriminator of frames, and under [`VIDEO_DISCRIMINATOR`] that of clips, where there is one.
    fn declare(&self, scope: &Scope) -> (PatchDiscriminator, Option<TatsDiscriminator>) {
        let of_clips = |own: &VideoDiscriminatorConfig| {
            TatsDiscriminator::of_clips(&scope.sub(VIDEO_DISCRIMINATOR), 3, own.channels, own.layers)
        };
        (PatchDiscriminator::new(scope, 3, &self.discriminator), self.video_discriminator.as_ref().map(of_clips))
    }
}

/// The terms of the autoencoder's update: scalars on the device, out of the graph, or numbers.
pub struct GeneratorTerms<T = Tensor> {
    /// What is minimised.
    pub total: T,
    /// Summed over pixels, divided by B·F: pixels and LPIPS.
    pub reconstruction: T,
    /// Mean pixel difference.
    pub pixel: T,
    /// Mean LPIPS of the frames.
    pub perceptual: T,
    /// KL divergence, summed over a latent, mean over the batch.
    pub kl: T,
    /// −mean D(x̂), those of a video discriminator added with its weight; 0 before the discriminators come in.
    pub adversarial: T,
    /// What the adversarial term is multiplied by: adaptive weight, configured weight, warm-up.
    pub adversarial_factor: T,
    /// Mean differences of the discriminators' activations, added up over layers; 0 where it has no weight.
    pub feature_matching: T,
}

impl GeneratorTerms {
    /// As numbers; waits for the device.
    pub fn read(&self) -> GeneratorTerms<f64> {
        GeneratorTerms {
            total: value(&self.total),
            reconstruction: value(&self.reconstruction),
            pixel: value(&self.pixel),
            perceptual: value(&self.perceptual),
            kl: value(&self.kl),
            adversarial: value(&self.adversarial),
            adversarial_factor: value(&self.adversarial_factor),
            feature_matching: value(&self.feature_matching),
        }
    }
}

/// The terms of the discriminator's update: scalars on the device, out of the graph, or numbers.
pub struct DiscriminatorTerms<T = Tensor> {
    /// The hinge loss.
    pub loss: T,
    /// Mean logit of real frames.
    pub real: T,
    /// Mean logit of reconstructions.
    pub fake: T,
    /// The video discriminator's mean logits of real clips and of reconstructions, where there is one.
    pub video: Option<[T; 2]>,
}

impl DiscriminatorTerms {
    /// As numbers; waits for the device.
    pub fn read(&self) -> DiscriminatorTerms<f64> {
        let video = self.video.as_ref().map(|[real, fake]| [value(real), value(fake)]);
        DiscriminatorTerms { loss: value(&self.loss), real: value(&self.real), fake: value(&self.fake), video }
    }
}

/// Before the names of the video discriminator's parameters, beside those of the one of frames.
pub const VIDEO_DISCRIMINATOR: &str = "video";

/// The losses with the networks they need.
pub struct AutoencoderLoss {
    config: AutoencoderLossConfig,
    lpips: Option<Lpips>,
    discriminator: PatchDiscriminator,
    video_discriminator: Option<(TatsDiscriminator, f64)>,
    discriminator_parameters: Parameters,
    /// Those over which the adaptive weight's gradients are reduced.
    ranks: Ranks,
}

/// L_rec of a reconstruction.
struct Likelihood {
    value: Tensor,
    pixel: Tensor,
    perceptual: Tensor,
    by_output: Tensor,
}

/// What the discriminators add to the loss of a reconstruction, with the gradients by x̂.
struct Adversary {
    value: Tensor,
    by_output: Tensor,
    matching: Option<(Tensor, Tensor)>,
}

/// `[B, C, F, H, W]` → `[B·F, C, H, W]`
fn frames(video: &Tensor) -> Tensor {
    video.transpose(1, 2).flatten(0, 1)
}

/// C·H·W of clips `[B, C, F, H, W]`.
fn values_of_a_frame(clips: &Tensor) -> f64 {
    let (_, c, _, h, w) = clips.size5().expect("clips [B, 3, F, H, W]");
    (c * h * w) as f64
}

/// A term times its weight; at 1 it is the term itself.
fn weighted(term: Tensor, weight: f64) -> Tensor {
    if weight == 1.0 { term } else { term * weight }
}

fn value(x: &Tensor) -> f64 {
    x.to_device(Device::Cpu).double_value(&[])
}

impl AutoencoderLoss {
    /// Networks in `kind` precision on the device; the discriminator starts as a function of `seed`.
    ///
    /// # Errors
    /// Where LPIPS is asked for and its weights are not there.
    pub fn new(config: &AutoencoderLossConfig, device: Device, kind: Kind, seed: u64) -> Result<Self> {
        let lpips = if config.perceptual_weight > 0.0 { Some(Lpips::load(None, device, kind)?) } else { None };
        let discriminator_parameters = Parameters::new(device, seed);
        let (discriminator, of_clips) = config.declare(&discriminator_parameters.root());
        let weight = config.video_discriminator.as_ref().map(|own| own.weight);
        let video_discriminator = of_clips.zip(weight);
        discriminator_parameters.to_kind(kind);
        Ok(AutoencoderLoss {
            config: config.clone(),
            lpips,
            discriminator,
            video_discriminator,
            discriminator_parameters,
            ranks: Ranks::alone(),
        })
    }

    /// The loss of one of several ranks: with `sync_batch_norm` they act as one.
    pub fn over(mut self, ranks: &Ranks) -> Self {
        if self.config.sync_batch_norm {
            self.discriminator.synchronise(ranks);
            if let Some((discriminator, _)) = &mut self.video_discriminator {
                discriminator.synchronise(ranks);
            }
            self.ranks = ranks.clone();
        }
        self
    }

    /// The parameters of the discriminator, and under [`VIDEO_DISCRIMINATOR`] those of the one of whole clips.
    pub fn discriminator_parameters(&self) -> &Parameters {
        &self.discriminator_parameters
    }

    /// Whether the discriminator takes part at this step.
    pub fn is_adversarial(&self, step: i64) -> bool {
        self.config.adversarial_weight > 0.0 && step >= self.config.adversarial_start
    }

    fn warmup(&self, step: i64) -> f64 {
        let since = step - self.config.adversarial_start + 1;
        (since as f64 / self.config.adversarial_warmup.max(1) as f64).min(1.0)
    }

    /// Accumulates `scale` times the gradient of the autoencoder's loss.
    ///
    /// x `[B, 3, F, H, W]`; x̂ the same, with its graph; `last_kernel` the decoder's last kernel.
    ///
    /// LPIPS and the discriminator are differentiated once, by x̂; what the adaptive weight and the
    /// autoencoder's own gradient need of them goes on from there.
    pub fn generator_backward(
        &self,
        x: &Tensor,
        reconstruction: &Tensor,
        encoded: &Encoded,
        last_kernel: &Tensor,
        step: i64,
        scale: f64,
    ) -> GeneratorTerms {
        let precise = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let graph = reconstruction.to_kind(precise);
        let leaf = graph.detach().set_requires_grad(true);
        let Likelihood { value: reconstruction, pixel, perceptual, mut by_output } = self.likelihood(x, &leaf, step);
        let mut total = reconstruction.shallow_clone();

        let (mut adversarial, mut adversarial_factor) = (total.zeros_like(), total.zeros_like());
        let mut feature_matching = total.zeros_like();
        if self.is_adversarial(step) {
            let adversary = self.adversarial(x, &leaf);
            adversarial_factor =
                self.adaptive_weight(&graph, &by_output, &adversary.by_output, last_kernel) * self.warmup(step);
            by_output += adversary.by_output * &adversarial_factor;
            total = &total + &adversarial_factor * &adversary.value;
            adversarial = adversary.value;
            if let Some((term, by_matching)) = adversary.matching {
                // on the scale of pixels and LPIPS, whose means stand on each of a frame's C·H·W values
                let factor = self.config.feature_matching * self.warmup(step) * values_of_a_frame(x);
                by_output += by_matching * factor;
                total = &total + &term * factor;
                feature_matching = term;
            }
        }

        // a scalar whose gradient by the autoencoder's parameters is the loss's
        let mut surrogate = (&graph * by_output).sum(None);
        let kl = encoded.regularizer().mean(None);
        if self.config.kl_weight != 0.0 {
            surrogate += &kl * self.config.kl_weight;
        }
        backward(&(surrogate * scale));
        let kl = kl.detach();
        total = &total + &kl * self.config.kl_weight;
        GeneratorTerms {
            total,
            reconstruction,
            pixel,
            perceptual,
            kl,
            adversarial,
            adversarial_factor,
            feature_matching,
        }
    }

    /// Pixels and LPIPS, summed over a frame's pixels, mean over frames, with the gradient by x̂.
    fn likelihood(&self, x: &Tensor, leaf: &Tensor, step: i64) -> Likelihood {
        let f = x.size()[2];
        let difference: Tensor = x - leaf;
        let pixel = match self.config.pixel {
            PixelLoss::L1 => difference.abs(),
            PixelLoss::L2 => difference.square(),
        }
        .mean(None);
        // a frame's LPIPS stands on each of its C·H·W values
        let (mean, perceptual) = if let Some(lpips) = &self.lpips {
            let every = self.config.perceptual_every.clamp(1, f);
            let seen = |video: &Tensor| frames(&video.slice(2, step % every, f, every));
            let distance = lpips.distance_to(&seen(x), &seen(leaf)).mean(None);
            (&pixel + &distance * self.config.perceptual_weight, distance.detach())
        } else {
            (pixel.shallow_clone(), pixel.detach().zeros_like())
        };
        let sum = mean * values_of_a_frame(x);
        let by_output = gradient(&sum, leaf, false);
        Likelihood { value: sum.detach(), pixel: pixel.detach(), perceptual, by_output }
    }

    /// −mean D(x̂), and feature matching where it has a weight, with their gradients by x̂.
    fn adversarial(&self, x: &Tensor, leaf: &Tensor) -> Adversary {
        self.discriminator_parameters.require_grad(false);
        let fake = self.judge(leaf);
        let mean = |judged: &Judged| judged.logits.to_kind(leaf.kind()).mean(None);
        let term = fake.iter().map(|(judged, weight)| weighted(-mean(judged), *weight));
        let term = term.reduce(|sum, term| sum + term).expect("that of frames");
        let matches = self.config.feature_matching > 0.0;
        let by_output = gradient(&term, leaf, matches);
        let matching = matches.then(|| {
            let real = no_grad(|| self.judge(x));
            let layers = |judged: Vec<(Judged, f64)>| judged.into_iter().flat_map(|(judged, _)| judged.features);
            let distance = |(fake, real): (Tensor, Tensor)| (fake - real).to_kind(leaf.kind()).abs().mean(None);
            let term = layers(fake).zip(layers(real)).map(distance).reduce(|sum, term| sum + term).expect("layers");
            (term.detach(), gradient(&term, leaf, false))
        });
        self.discriminator_parameters.require_grad(true);
        Adversary { value: term.detach(), by_output, matching }
    }

    /// What the discriminators make of clips `[B, 3, F, H, W]`, each with its weight: first the one of frames.
    fn judge(&self, clips: &Tensor) -> Vec<(Judged, f64)> {
        let of_video = self.video_discriminator.iter().map(|(network, weight)| (network.judge(clips), *weight));
        std::iter::once((self.discriminator.judge(&frames(clips)), 1.0)).chain(of_video).collect()
    }

    /// λ = ‖∇_last L_rec‖ / (‖∇_last L_adv‖ + 1e-4), clamped to [0, 1e4], times the configured weight.
    fn adaptive_weight(
        &self,
        graph: &Tensor,
        by_output: &Tensor,
        by_adversary: &Tensor,
        last_kernel: &Tensor,
    ) -> Tensor {
        // the norm of the sum over ranks, whose factor cancels but for the 1e-4
        let ranks = self.ranks.size() as f64;
        let norm = |by: &Tensor| {
            let own = gradient(&(graph * by).sum(None), last_kernel, true);
            self.ranks.sum_with_gradient(&own).norm() / ranks
        };
        let (reconstruction, adversary) = (norm(by_output), norm(by_adversary));
        (reconstruction / (adversary + 1e-4)).clamp(0.0, 1e4) * self.config.adversarial_weight
    }

    /// What the adversarial term would be multiplied by, whatever the step: adaptive and configured weight. Clips and
    /// reconstruction are `[B, 3, F, H, W]`, the latter in the graph of `last_kernel` ([`VideoAutoencoder::last_kernel`]);
    /// a scalar on the device.
    ///
    /// [`VideoAutoencoder::last_kernel`]: crate::codecs::VideoAutoencoder::last_kernel
    pub fn adversarial_weight(&self, x: &Tensor, reconstruction: &Tensor, last_kernel: &Tensor, step: i64) -> Tensor {
        let leaf = reconstruction.detach().set_requires_grad(true);
        let by_output = self.likelihood(x, &leaf, step).by_output;
        let by_adversary = self.adversarial(x, &leaf).by_output;
        self.adaptive_weight(reconstruction, &by_output, &by_adversary, last_kernel)
    }

    /// Accumulates `scale` times the gradient of the discriminator's hinge loss,
    /// ½ (mean relu(1 − D(x)) + mean relu(1 + D(x̂))), of clips and reconstructions `[B, 3, F, H, W]`; that of a video
    /// discriminator is added with its weight.
    pub fn discriminator_backward(&self, x: &Tensor, reconstruction: &Tensor, scale: f64) -> DiscriminatorTerms {
        // the margins and their mean in full precision, as the generator's side
        let logits = |video: &Tensor| {
            let judged = self.judge(&video.detach().to_kind(x.kind())).into_iter();
            judged.map(|(judged, weight)| (judged.logits.to_kind(x.kind()), weight)).collect::<Vec<_>>()
        };
        let (real, fake) = (logits(x), logits(reconstruction));
        let hinge = |margin: Tensor| (margin + 1.0).relu().mean(None);
        let loss = real
            .iter()
            .zip(&fake)
            .map(|((real, weight), (fake, _))| weighted((hinge(-real) + hinge(fake.shallow_clone())) * 0.5, *weight));
        let loss = loss.reduce(|sum, term| sum + term).expect("that of frames");
        backward(&(&loss * scale));
        no_grad(|| {
            let means = |i: usize| [real[i].0.mean(None), fake[i].0.mean(None)];
            let [real, fake] = means(0);
            let video = self.video_discriminator.is_some().then(|| means(1));
            DiscriminatorTerms { loss: loss.detach(), real, fake, video }
        })
    }
}

impl CodecLoss for AutoencoderLoss {
    fn discriminator_parameters(&self) -> &Parameters {
        AutoencoderLoss::discriminator_parameters(self)
    }

    fn is_adversarial(&self, step: i64) -> bool {
        AutoencoderLoss::is_adversarial(self, step)
    }

    /// Before the discriminators come in, and once their warm-up is over; LPIPS looks at other frames at every step unless it
    /// looks at all.
    fn form(&self, step: i64) -> Option<i64> {
        let is_adversarial = self.is_adversarial(step);
        let repeats = self.config.perceptual_every <= 1 && !(is_adversarial && self.warmup(step) < 1.0);
        repeats.then_some(is_adversarial.into())
    }

    fn backward_autoencoder(&self, pass: &TrainPass) -> Vec<(&'static str, Tensor)> {
        let TrainPass { x, reconstruction, encoded, last_kernel, step, scale, .. } = *pass;
        let terms = self.generator_backward(x, reconstruction, encoded, last_kernel, step, scale);
        let mut named = vec![
            ("loss", terms.total),
            ("reconstruction", terms.reconstruction),
            ("pixel", terms.pixel),
            ("lpips", terms.perceptual),
            ("kl", terms.kl),
            ("adversarial", terms.adversarial),
            ("adversarial_factor", terms.adversarial_factor),
        ];
        if self.config.feature_matching > 0.0 {
            named.push(("feature_matching", terms.feature_matching));
        }
        named
    }

    fn backward_discriminators(&self, pass: &TrainPass) -> Vec<(&'static str, Tensor)> {
        let terms = self.discriminator_backward(pass.x, pass.reconstruction, pass.scale);
        let mut named =
            vec![("discriminator_loss", terms.loss), ("logits_real", terms.real), ("logits_fake", terms.fake)];
        if let Some([real, fake]) = terms.video {
            named.extend([("video_logits_real", real), ("video_logits_fake", fake)]);
        }
        named
    }
}
