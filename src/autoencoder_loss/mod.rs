//! Reconstruction, perceptual and adversarial losses of the autoencoder (paper, section 3.1).

mod discriminator;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    codecs::Encoded,
    distributed::Ranks,
    extractors::Lpips,
    nn::Parameters,
    torch::{Autocast, backward},
};

pub use discriminator::{DiscriminatorConfig, PatchDiscriminator};

/// How pixels are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PixelLoss {
    /// |x − x̂| (the released code)
    L1,
    /// (x − x̂)² (the paper's text)
    L2,
}

/// The default is the released setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderLossConfig {
    /// Of pixels.
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
    /// Of the PatchGAN discriminator.
    pub discriminator: DiscriminatorConfig,
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
        }
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
    /// −mean D(x̂); 0 before the discriminator comes in.
    pub adversarial: T,
    /// What the adversarial term is multiplied by: adaptive weight, configured weight, warm-up.
    pub adversarial_factor: T,
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
}

impl DiscriminatorTerms {
    /// As numbers; waits for the device.
    pub fn read(&self) -> DiscriminatorTerms<f64> {
        DiscriminatorTerms { loss: value(&self.loss), real: value(&self.real), fake: value(&self.fake) }
    }
}

/// The losses with the networks they need.
pub struct AutoencoderLoss {
    config: AutoencoderLossConfig,
    lpips: Option<Lpips>,
    discriminator: PatchDiscriminator,
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

/// `[B, C, F, H, W]` → `[B·F, C, H, W]`
fn frames(video: &Tensor) -> Tensor {
    video.transpose(1, 2).flatten(0, 1)
}

/// Gradient of a scalar by one tensor.
fn gradient(of: &Tensor, by: &Tensor, keep_graph: bool) -> Tensor {
    let _precision = Autocast::bfloat16(of.device(), false); // as `backward` does
    Tensor::run_backward(&[of], &[by], keep_graph, false).remove(0)
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
        let discriminator = PatchDiscriminator::new(&discriminator_parameters.root(), 3, &config.discriminator);
        discriminator_parameters.to_kind(kind);
        Ok(AutoencoderLoss {
            config: config.clone(),
            lpips,
            discriminator,
            discriminator_parameters,
            ranks: Ranks::alone(),
        })
    }

    /// The loss of one of several ranks: with `sync_batch_norm` they act as one.
    pub fn over(mut self, ranks: &Ranks) -> Self {
        if self.config.sync_batch_norm {
            self.discriminator.synchronise(ranks);
            self.ranks = ranks.clone();
        }
        self
    }

    /// The discriminator's parameters.
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
        if self.is_adversarial(step) {
            let (term, by_adversary) = self.adversarial(&leaf);
            adversarial_factor =
                self.adaptive_weight(&graph, &by_output, &by_adversary, last_kernel) * self.warmup(step);
            by_output += by_adversary * &adversarial_factor;
            total = &total + &adversarial_factor * &term;
            adversarial = term;
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
        GeneratorTerms { total, reconstruction, pixel, perceptual, kl, adversarial, adversarial_factor }
    }

    /// Pixels and LPIPS, summed over a frame's pixels, mean over frames, with the gradient by x̂.
    fn likelihood(&self, x: &Tensor, leaf: &Tensor, step: i64) -> Likelihood {
        let (_, c, f, h, w) = x.size5().expect("clips [B, 3, F, H, W]");
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
        let sum = mean * (c * h * w) as f64;
        let by_output = gradient(&sum, leaf, false);
        Likelihood { value: sum.detach(), pixel: pixel.detach(), perceptual, by_output }
    }

    /// −mean D(x̂) and its gradient by x̂.
    fn adversarial(&self, leaf: &Tensor) -> (Tensor, Tensor) {
        self.discriminator_parameters.require_grad(false);
        let term = -self.discriminator.forward(&frames(leaf)).to_kind(leaf.kind()).mean(None);
        let gradient = gradient(&term, leaf, false);
        self.discriminator_parameters.require_grad(true);
        (term.detach(), gradient)
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
        let (_, by_adversary) = self.adversarial(&leaf);
        self.adaptive_weight(reconstruction, &by_output, &by_adversary, last_kernel)
    }

    /// Accumulates `scale` times the gradient of the discriminator's hinge loss,
    /// ½ (mean relu(1 − D(x)) + mean relu(1 + D(x̂))), of clips and reconstructions `[B, 3, F, H, W]`.
    pub fn discriminator_backward(&self, x: &Tensor, reconstruction: &Tensor, scale: f64) -> DiscriminatorTerms {
        // the margins and their mean in full precision, as the generator's side
        let logits =
            |video: &Tensor| self.discriminator.forward(&frames(&video.detach()).to_kind(x.kind())).to_kind(x.kind());
        let (real, fake) = (logits(x), logits(reconstruction));
        let hinge = |margin: Tensor| (margin + 1.0).relu().mean(None);
        let loss: Tensor = (hinge(-&real) + hinge(fake.shallow_clone())) * 0.5;
        backward(&(&loss * scale));
        no_grad(|| DiscriminatorTerms { loss: loss.detach(), real: real.mean(None), fake: fake.mean(None) })
    }
}
