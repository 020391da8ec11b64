//! The losses of TATS' autoencoder (Ge et al. 2022, arXiv 2204.03638, section 3.1 and appendix).
//!
//! Of each clip one frame, drawn at random, goes through LPIPS and the discriminator of frames. All weights are fixed. Pixels
//! lie in [−0.5, 0.5], also for LPIPS, which was made for [−1, 1]; the released weights belong to that.

use anyhow::{Result, ensure};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    CodecLoss, CodecLossSettings, DiscriminatorConfig, Judged, TrainPass, tats_discriminator::TatsDiscriminator,
};
use crate::{
    codecs::Encoded,
    distributed::Ranks,
    extractors::Lpips,
    nn::{Parameters, Scope, full_precision},
    random::{Purpose, stream},
    torch::{backward, upload},
};

/// The default is the released setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct TatsLossConfig {
    /// Weight of the mean absolute difference of pixels in [−0.5, 0.5].
    pub pixel_weight: f64,
    /// Weight of the LPIPS of one frame a clip.
    pub perceptual_weight: f64,
    /// Weight of the discriminator of one frame a clip.
    pub image_weight: f64,
    /// Weight of the discriminator of clips.
    pub video_weight: f64,
    /// Weight of feature matching: how far a reconstruction is from its clip in the activations of both discriminators.
    pub matching_weight: f64,
    /// Step at which the discriminators come in.
    pub adversarial_start: i64,
    /// Filters and layers of both discriminators.
    pub discriminator: DiscriminatorConfig,
}

impl Default for TatsLossConfig {
    fn default() -> Self {
        TatsLossConfig {
            pixel_weight: 4.0,
            perceptual_weight: 4.0,
            image_weight: 1.0,
            video_weight: 1.0,
            matching_weight: 4.0,
            adversarial_start: 10_000,
            discriminator: DiscriminatorConfig::default(),
        }
    }
}

impl TatsLossConfig {
    fn has_discriminators(&self) -> bool {
        self.image_weight > 0.0 || self.video_weight > 0.0
    }
}

impl CodecLossSettings for TatsLossConfig {
    fn validate(&self) -> Result<()> {
        let weights = [
            ("pixel_weight", self.pixel_weight),
            ("perceptual_weight", self.perceptual_weight),
            ("image_weight", self.image_weight),
            ("video_weight", self.video_weight),
            ("matching_weight", self.matching_weight),
        ];
        for (key, weight) in weights {
            ensure!(weight.is_finite() && weight >= 0.0, "{key} is a weight of 0 or more, not {weight}");
        }
        ensure!(
            self.matching_weight == 0.0 || self.has_discriminators(),
            "matching_weight needs discriminators that are trained, and image_weight and video_weight are 0"
        );
        let DiscriminatorConfig { channels, layers } = self.discriminator;
        ensure!(channels >= 1, "discriminator.channels must be at least 1, not {channels}");
        ensure!(layers >= 1, "discriminator.layers must be at least 1, not {layers}");
        Ok(())
    }

    fn build(&self, device: Device, kind: Kind, seed: u64, ranks: &Ranks) -> Result<Box<dyn CodecLoss>> {
        Ok(Box::new(TatsLoss::new(self, device, kind, seed, ranks)?))
    }

    fn is_regularized(&self) -> bool {
        true
    }

    fn frames_perceived(&self, _frames: i64) -> i64 {
        i64::from(self.perceptual_weight > 0.0)
    }

    fn adversarial_start(&self) -> Option<i64> {
        self.has_discriminators().then_some(self.adversarial_start)
    }

    fn discriminators(&self, scope: &Scope) -> Box<dyn Fn(&Tensor) -> Tensor> {
        let discriminators = Discriminators::new(scope, &self.discriminator);
        Box::new(move |clips| {
            let frames = clips.select(2, 0);
            [discriminators.of_frames.judge(&frames), discriminators.of_clips.judge(clips)].map(mean_logit).iter().sum()
        })
    }

    fn discriminator_flops(&self, frames: i64, side: i64) -> i64 {
        let DiscriminatorConfig { channels, layers } = self.discriminator;
        let of = |size: &[i64]| TatsDiscriminator::flops(size, channels, layers);
        of(&[side, side]) + of(&[frames, side, side])
    }
}

/// Never in half precision.
fn mean_logit(judged: Judged) -> Tensor {
    full_precision(&judged.logits).mean(None)
}

/// D₂ of frames and D₃ of clips.
struct Discriminators {
    of_frames: TatsDiscriminator,
    of_clips: TatsDiscriminator,
}

impl Discriminators {
    /// With the released names.
    fn new(scope: &Scope, config: &DiscriminatorConfig) -> Self {
        let DiscriminatorConfig { channels, layers } = *config;
        Discriminators {
            of_frames: TatsDiscriminator::of_frames(&scope.sub("image_discriminator"), 3, channels, layers),
            of_clips: TatsDiscriminator::of_clips(&scope.sub("video_discriminator"), 3, channels, layers),
        }
    }

    /// A clip's frame and the clip, each by its discriminator.
    fn judge(&self, seen: &Seen) -> [Judged; 2] {
        [self.of_frames.judge(&seen.frame), self.of_clips.judge(&seen.clip)]
    }
}

/// Clips as the losses see them: in [−0.5, 0.5], and a frame of each.
struct Seen {
    /// `[B, 3, F, H, W]`
    clip: Tensor,
    /// `[B, 3, H, W]`
    frame: Tensor,
}

impl Seen {
    /// Clips in [−1, 1], and the number of a frame of each, `[B]`.
    fn new(clips: &Tensor, frames: &Tensor) -> Self {
        let clip = full_precision(clips) * 0.5;
        let (b, c, _, h, w) = clip.size5().expect("clips [B, 3, F, H, W]");
        let index = frames.view([b, 1, 1, 1, 1]).expand([b, c, 1, h, w], false);
        let frame = clip.gather(2, &index, false).squeeze_dim(2);
        Seen { clip, frame }
    }
}

/// What the two discriminators make of a reconstruction, that of frames first; scalars in the graph of x̂.
pub struct Adversary {
    /// −mean D(x̂).
    pub generator: [Tensor; 2],
    /// Σ over all blocks but the last of mean |D_i(x̂) − D_i(x)|, where gradients do not go through x.
    pub matching: [Tensor; 2],
}

/// The losses with LPIPS and both discriminators.
pub struct TatsLoss {
    config: TatsLossConfig,
    lpips: Option<Lpips>,
    discriminators: Discriminators,
    parameters: Parameters,
    seed: u64,
    device: Device,
}

/// The terms of the autoencoder's update, scalars in its graph, each with its weight.
pub struct TatsTerms {
    /// What is minimised.
    pub total: Tensor,
    /// w · mean |x̂ − x|.
    pub reconstruction: Tensor,
    /// w · mean LPIPS.
    pub perceptual: Tensor,
    /// How far the encoder's output lies from the codebook.
    pub commitment: Tensor,
    /// Both discriminators' −mean D(x̂), and feature matching; none before the discriminators come in.
    pub adversarial: Option<[Tensor; 2]>,
}

impl TatsLoss {
    /// Batch norm's batch is that of all `ranks` together.
    ///
    /// # Errors
    /// As [`CodecLossSettings::build`].
    pub fn new(config: &TatsLossConfig, device: Device, kind: Kind, seed: u64, ranks: &Ranks) -> Result<Self> {
        let lpips = if config.perceptual_weight > 0.0 { Some(Lpips::load(None, device, kind)?) } else { None };
        let parameters = Parameters::new(device, seed);
        let mut discriminators = Discriminators::new(&parameters.root(), &config.discriminator);
        discriminators.of_frames.synchronise(ranks);
        discriminators.of_clips.synchronise(ranks);
        parameters.to_kind(kind);
        Ok(TatsLoss { config: config.clone(), lpips, discriminators, parameters, seed, device })
    }

    /// The frame of each sample that is judged, `[B]`.
    fn frames(&self, purpose: Purpose, pass: &TrainPass) -> Tensor {
        let count = pass.x.size()[2];
        let draw = |&sample: &u64| stream(self.seed, purpose, sample, 0).random_range(0..count);
        upload(&Tensor::from_slice(&pass.samples.iter().map(draw).collect::<Vec<i64>>()), self.device)
    }

    /// All terms, of clips and reconstruction `[B, 3, F, H, W]` in [−1, 1], and the number of the frame that is judged of each
    /// clip, int64 `[B]`. The discriminators' parameters get no gradient.
    pub fn generator(
        &self,
        x: &Tensor,
        reconstruction: &Tensor,
        encoded: &Encoded,
        frames: &Tensor,
        step: i64,
    ) -> TatsTerms {
        let (real, fake) = (Seen::new(x, frames), Seen::new(reconstruction, frames));
        let reconstruction = (&fake.clip - &real.clip).abs().mean(None) * self.config.pixel_weight;
        let perceptual = match &self.lpips {
            Some(lpips) => lpips.distance_to(&real.frame, &fake.frame).mean(None) * self.config.perceptual_weight,
            None => reconstruction.detach().zeros_like(),
        };
        let commitment = encoded.regularizer().mean(None);
        let mut total = &reconstruction + &perceptual + &commitment;
        let adversarial = self.is_adversarial(step).then(|| {
            let Adversary { generator: [image, video], matching } = self.adversary_of(&real, &fake);
            let generator = image * self.config.image_weight + video * self.config.video_weight;
            let matching = matching.iter().sum::<Tensor>() * self.config.matching_weight;
            total = &total + &generator + &matching;
            [generator, matching]
        });
        TatsTerms { total, reconstruction, perceptual, commitment, adversarial }
    }

    /// What the discriminators say, whatever the step.
    pub fn adversary(&self, x: &Tensor, reconstruction: &Tensor, frames: &Tensor) -> Adversary {
        self.adversary_of(&Seen::new(x, frames), &Seen::new(reconstruction, frames))
    }

    fn adversary_of(&self, real: &Seen, fake: &Seen) -> Adversary {
        self.parameters.require_grad(false);
        let fake = self.discriminators.judge(fake);
        let real = no_grad(|| self.discriminators.judge(real));
        self.parameters.require_grad(true);
        let distance = |(fake, real): (&Tensor, &Tensor)| full_precision(&(fake - real)).abs().mean(None);
        let weights = [self.config.image_weight, self.config.video_weight];
        let matching = std::array::from_fn(|i| {
            let layers = fake[i].features.iter().zip(&real[i].features);
            let sum: Tensor = layers.map(distance).sum();
            // a discriminator without a weight is not trained, and what it sees means nothing
            if weights[i] > 0.0 { sum } else { sum.detach().zeros_like() }
        });
        Adversary { generator: fake.map(|judged| -mean_logit(judged)), matching }
    }

    /// L(D) = ½ (mean relu(1 − D(x)) + mean relu(1 + D(x̂))) of both discriminators, in the graph of their parameters; and the
    /// mean logits of x and of x̂, out of it.
    pub fn hinge(&self, x: &Tensor, reconstruction: &Tensor, frames: &Tensor) -> [[Tensor; 3]; 2] {
        let judge = |clips: &Tensor| self.discriminators.judge(&Seen::new(&clips.detach(), frames));
        let (real, fake) = (judge(x), judge(reconstruction));
        let margin = |margin: Tensor| (margin + 1.0).relu().mean(None);
        std::array::from_fn(|i| {
            let [real, fake] = [&real[i], &fake[i]].map(|judged| full_precision(&judged.logits));
            let loss = (margin(-&real) + margin(fake.shallow_clone())) * 0.5;
            [loss, real.detach().mean(None), fake.detach().mean(None)]
        })
    }
}

impl CodecLoss for TatsLoss {
    fn discriminator_parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn is_adversarial(&self, step: i64) -> bool {
        self.config.has_discriminators() && step >= self.config.adversarial_start
    }

    fn backward_autoencoder(&self, pass: &TrainPass) -> Vec<(&'static str, Tensor)> {
        let frames = self.frames(Purpose::JudgedFrame, pass);
        let terms = self.generator(pass.x, pass.reconstruction, pass.encoded, &frames, pass.step);
        backward(&(&terms.total * pass.scale));
        let zero = || terms.total.detach().zeros_like();
        let [adversarial, matching] = terms.adversarial.unwrap_or_else(|| [zero(), zero()]);
        vec![
            ("loss", terms.total.detach()),
            ("reconstruction", terms.reconstruction.detach()),
            ("perceptual", terms.perceptual.detach()),
            ("commitment", terms.commitment.detach()),
            ("adversarial", adversarial.detach()),
            ("feature_matching", matching.detach()),
        ]
    }

    fn backward_discriminators(&self, pass: &TrainPass) -> Vec<(&'static str, Tensor)> {
        let frames = self.frames(Purpose::JudgedFrameDiscriminator, pass);
        let [[of_frames, real, fake], [of_clips, video_real, video_fake]] =
            self.hinge(pass.x, pass.reconstruction, &frames);
        let loss = of_frames * self.config.image_weight + of_clips * self.config.video_weight;
        backward(&(&loss * pass.scale));
        vec![
            ("discriminator_loss", loss.detach()),
            ("logits_real", real),
            ("logits_fake", fake),
            ("video_logits_real", video_real),
            ("video_logits_fake", video_fake),
        ]
    }
}
