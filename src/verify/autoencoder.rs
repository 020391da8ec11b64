//! The autoencoder, its discriminator, their losses and their training.

use anyhow::{Result, bail};
use serde::Deserialize;
use tch::{Kind, Tensor, no_grad};

use super::{
    case::Case,
    outputs::{Outputs, gradient_norm, moved, scalar},
};
use crate::{
    autoencoder_loss::{AutoencoderLoss, AutoencoderLossConfig, PixelLoss},
    autoencoder_loss::{DiscriminatorConfig, PatchDiscriminator, TatsDiscriminator},
    codecs::{AutoencoderConfig, CodecSettings, Encoded, VideoAutoencoder},
    nn::{Padding, Parameters},
    torch::{Adam, Autocast},
    train::{Optimizer, StepAround},
    weights::{
        lvdm_checkpoint::{DISCRIMINATOR, FIRST_STAGE},
        synthesize,
    },
};

/// The released names of the autoencoder's settings.
#[derive(Deserialize)]
struct ReleasedAutoencoder {
    n_hiddens: i64,
    downsample: [i64; 3],
    z_channels: i64,
    embed_dim: i64,
    padding: Padding,
    norm_groups: i64,
}

impl ReleasedAutoencoder {
    fn build(&self, case: &Case, kind: Kind) -> Result<(VideoAutoencoder, Parameters)> {
        let config = AutoencoderConfig {
            channels: self.n_hiddens,
            factors: self.downsample,
            z_channels: self.z_channels,
            latent_channels: self.embed_dim,
            norm_groups: self.norm_groups,
            padding: self.padding,
        };
        config.validate()?;
        let parameters = Parameters::new(case.device(), 0);
        let autoencoder = VideoAutoencoder::new(&parameters.root(), &config);
        case.fill(&parameters, FIRST_STAGE, false)?;
        parameters.to_kind(kind);
        Ok((autoencoder, parameters))
    }
}

pub fn autoencoder(case: &Case) -> Result<Outputs> {
    let (autoencoder, _parameters) = case.config::<ReleasedAutoencoder>()?.build(case, Kind::Float)?;
    let (video, noise) = (case.input("video")?, case.input("noise")?);
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(no_grad(|| {
        let posterior = autoencoder.encode(&video);
        let sample = posterior.sample(&noise);
        let reconstruction = autoencoder.decode(&sample);
        vec![
            ("mean", posterior.mean),
            ("logvar", posterior.logvar),
            ("sample", sample),
            ("reconstruction", reconstruction),
        ]
    }))
}

#[derive(Deserialize)]
struct ReleasedDiscriminator {
    input_channels: i64,
    ndf: i64,
    n_layers: i64,
}

impl ReleasedDiscriminator {
    fn config(&self) -> DiscriminatorConfig {
        DiscriminatorConfig { channels: self.ndf, layers: self.n_layers }
    }
}

pub fn patch_discriminator(case: &Case) -> Result<Outputs> {
    let config: ReleasedDiscriminator = case.config()?;
    let parameters = Parameters::new(case.device(), 0);
    let discriminator = PatchDiscriminator::new(&parameters.root(), config.input_channels, &config.config());
    parameters.load(&synthesize(&parameters.named(), ""))?;
    let x = case.input("x")?;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(vec![("logits", no_grad(|| discriminator.forward(&x)))])
}

#[derive(Deserialize)]
struct VideoDiscriminatorCase {
    disc_channels: i64,
    disc_layers: i64,
}

/// TATS' discriminator of whole clips, and feature matching by it.
pub fn video_discriminator(case: &Case) -> Result<Outputs> {
    let VideoDiscriminatorCase { disc_channels: channels, disc_layers: layers } = case.config()?;
    let parameters = Parameters::new(case.device(), 0);
    let discriminator = TatsDiscriminator::of_clips(&parameters.root(), 3, channels, layers);
    parameters.load(&synthesize(&parameters.named(), "video_discriminator."))?;
    let (real, fake) = (case.input("real")?, case.input("fake")?);
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(no_grad(|| {
        let [real, fake] = [real, fake].map(|clips| discriminator.judge(&clips));
        let float = |x: &Tensor| x.to_kind(Kind::Float);
        let hinge = |margin: Tensor| (margin + 1.0).relu().mean(None);
        let margins = hinge(-float(&real.logits)) + hinge(float(&fake.logits));
        let pairs = real.features.iter().zip(&fake.features);
        let matching: Tensor = pairs.map(|(real, fake)| (float(real) - float(fake)).abs().mean(None)).sum();
        vec![
            ("g_video_loss", -float(&fake.logits).mean(None)),
            ("d_video_loss", margins * 0.5),
            ("video_gan_feat_loss", matching),
        ]
    }))
}

#[derive(Deserialize)]
struct LossCase {
    autoencoder: ReleasedAutoencoder,
    pixel_loss: String,
    perceptual_weight: f64,
    discriminator: ReleasedDiscriminator,
    disc_weight: f64,
    disc_start: i64,
    #[serde(default)]
    step: i64,
    kl_weight: f64,
    gan_loss: String,
}

impl LossCase {
    fn criterion(&self, case: &Case, kind: Kind) -> Result<AutoencoderLoss> {
        if self.gan_loss != "hinge" {
            bail!("unknown GAN loss `{}`", self.gan_loss);
        }
        let pixel = match self.pixel_loss.as_str() {
            "l1" => PixelLoss::L1,
            "l2" | "mse" => PixelLoss::L2,
            other => bail!("unknown pixel loss `{other}`"),
        };
        let config = AutoencoderLossConfig {
            pixel,
            perceptual_weight: self.perceptual_weight,
            perceptual_every: 1,
            kl_weight: self.kl_weight,
            adversarial_weight: self.disc_weight,
            adversarial_start: self.disc_start,
            adversarial_warmup: 0,
            sync_batch_norm: false,
            discriminator: self.discriminator.config(),
            ..AutoencoderLossConfig::default()
        };
        let criterion = AutoencoderLoss::new(&config, case.device(), kind, 0)?;
        let parameters = criterion.discriminator_parameters();
        parameters.load(&synthesize(&parameters.named(), DISCRIMINATOR))?;
        Ok(criterion)
    }
}

pub fn loss(case: &Case) -> Result<Outputs> {
    let config: LossCase = case.config()?;
    let (autoencoder, parameters) = config.autoencoder.build(case, Kind::Float)?;
    let criterion = config.criterion(case, Kind::Float)?;
    let (video, noise) = (case.input("video")?, case.input("noise")?);
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let posterior = Encoded::from(autoencoder.encode(&video));
    let reconstruction = autoencoder.decode(&posterior.sample(&noise));
    let last = autoencoder.last_kernel();
    let weight = criterion.adversarial_weight(&video, &reconstruction, last, config.step);
    let terms = criterion.generator_backward(&video, &reconstruction, &posterior, last, config.step, 1.0).read();
    let adversary = criterion.discriminator_backward(&video, &reconstruction, 1.0).read();
    let started = if criterion.is_adversarial(config.step) { 1.0 } else { 0.0 };
    Ok(vec![
        ("total_loss", scalar(terms.total)),
        ("nll_loss", scalar(terms.reconstruction)),
        ("rec_loss", scalar(terms.pixel + config.perceptual_weight * terms.perceptual)),
        ("g_loss", scalar(-adversary.fake)),
        ("d_weight", weight),
        ("disc_loss", scalar(adversary.loss * started)),
        ("logits_real", scalar(adversary.real)),
        ("logits_fake", scalar(adversary.fake)),
        ("autoencoder_grad_norm", gradient_norm(&parameters)),
        ("discriminator_grad_norm", gradient_norm(criterion.discriminator_parameters()) * started),
    ])
}

#[derive(Deserialize)]
struct TraceCase {
    #[serde(flatten)]
    loss: LossCase,
    learning_rate: f64,
    betas: (f64, f64),
    parameters: Vec<String>,
}

/// Training with two optimizers, in float64.
pub fn trace(case: &Case) -> Result<Outputs> {
    let config: TraceCase = case.config()?;
    let (autoencoder, parameters) = config.loss.autoencoder.build(case, Kind::Double)?;
    let criterion = config.loss.criterion(case, Kind::Double)?;
    let adam = Adam {
        learning_rate: config.learning_rate,
        betas: config.betas,
        weight_decay: 0.0,
        eps: 1e-8,
        decoupled: false,
    };
    let mut generator = Optimizer::new(adam, &parameters);
    let mut discriminator = Optimizer::new(adam, criterion.discriminator_parameters());

    let named = || {
        let own = parameters.named();
        let adversary = criterion.discriminator_parameters().named().into_iter();
        own.into_iter().chain(adversary.map(|(n, t)| (format!("loss.discriminator.{n}"), t))).collect::<Vec<_>>()
    };
    let before: Vec<_> = named().into_iter().map(|(n, t)| (n, t.detach().copy())).collect();
    let (video, first, second) =
        (case.input("video")?, case.input("noise_generator")?, case.input("noise_discriminator")?);
    let (mut losses, mut adversary_losses, mut weights) = (vec![], vec![], vec![]);
    for step in 0..video.size()[0] {
        let at = |x: &Tensor| x.get(step).to_kind(Kind::Double);
        let x = at(&video);
        let posterior = Encoded::from(autoencoder.encode(&x));
        let reconstruction = autoencoder.decode(&posterior.sample(&at(&first)));
        let last = autoencoder.last_kernel();
        weights.push(criterion.adversarial_weight(&x, &reconstruction, last, step));
        generator.zero_grad()?;
        losses.push(criterion.generator_backward(&x, &reconstruction, &posterior, last, step, 1.0).total);
        generator.step(&generator.gradients(), StepAround::default())?;

        discriminator.zero_grad()?;
        let mut adversary_loss = losses[0].zeros_like();
        if criterion.is_adversarial(step) {
            let reconstruction = no_grad(|| autoencoder.decode(&autoencoder.encode(&x).sample(&at(&second))));
            adversary_loss = criterion.discriminator_backward(&x, &reconstruction, 1.0).loss;
        }
        discriminator.step(&discriminator.gradients(), StepAround::default())?;
        adversary_losses.push(adversary_loss);
    }
    Ok(vec![
        ("autoencoder_loss", Tensor::stack(&losses, 0)),
        ("discriminator_loss", Tensor::stack(&adversary_losses, 0)),
        ("d_weight", Tensor::stack(&weights, 0)),
        ("moved", moved(&parameters, &before, &named(), &config.parameters)?),
    ])
}
