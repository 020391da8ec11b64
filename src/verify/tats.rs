//! TATS' autoencoder with a codebook, and its losses.

use anyhow::{Result, bail, ensure};
use serde::Deserialize;
use tch::{Kind, Tensor, no_grad};

use super::{
    case::Case,
    outputs::{Outputs, gradient_norm},
};
use crate::{
    autoencoder_loss::{Adversary, CodecLoss, DiscriminatorConfig, TatsLoss, TatsLossConfig},
    codecs::{Codebook, CodebookConfig, CodecSettings, Encoded, VideoCodec, Vqgan, VqganConfig, VqganNorm},
    distributed::Ranks,
    nn::{Parameters, Statistics},
    torch::{Autocast, backward},
    weights::synthesize,
};

/// The released names of the autoencoder's settings.
#[derive(Deserialize)]
struct Released {
    n_hiddens: i64,
    downsample: [i64; 3],
    embedding_dim: i64,
    n_codes: i64,
    norm_type: VqganNorm,
}

impl Released {
    /// Each average count is 1, and the averages are the entries themselves.
    fn build(&self, case: &Case) -> Result<(Vqgan, Parameters)> {
        let config = VqganConfig {
            channels: self.n_hiddens,
            factors: self.downsample,
            latent_channels: self.embedding_dim,
            norm: self.norm_type,
            codebook: CodebookConfig { codes: self.n_codes, ..CodebookConfig::default() },
        };
        config.validate()?;
        let parameters = Parameters::new(case.device(), 0);
        let autoencoder = Vqgan::new(&parameters.root(), &config);
        let mut values = synthesize(&parameters.named(), "");
        let entries = values["codebook.embeddings"].shallow_clone();
        values.insert("codebook.N".to_string(), Tensor::ones([self.n_codes], (Kind::Float, entries.device())));
        values.insert("codebook.z_avg".to_string(), entries);
        parameters.load(&values)?;
        Ok((autoencoder, parameters))
    }
}

pub fn vqgan(case: &Case) -> Result<Outputs> {
    let (autoencoder, _parameters) = case.config::<Released>()?.build(case)?;
    let x = case.input("video")? * 2.0;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    no_grad(|| {
        let vectors = autoencoder.encode_to_vectors(&x, Statistics::Running);
        let Encoded::Codes { indices, z, commitment } = autoencoder.codebook().quantize(&vectors, false) else {
            bail!("an autoencoder with a codebook encodes to codes");
        };
        let reconstruction = autoencoder.decode(&autoencoder.vectors(&indices)?) * 0.5;
        Ok(vec![
            ("z", vectors),
            ("perplexity", autoencoder.codebook().perplexity(&indices)),
            ("codes", indices),
            ("embeddings", z),
            ("reconstruction", reconstruction),
            ("commitment_loss", commitment.mean(None)),
        ])
    })
}

#[derive(Deserialize)]
struct CodebookCase {
    n_codes: i64,
    embedding_dim: i64,
    decay: f64,
    eps: f64,
    commitment: f64,
    #[serde(default)]
    random_restart: bool,
}

/// Training steps of the codebook alone.
pub fn codebook(case: &Case) -> Result<Outputs> {
    let CodebookCase { n_codes: codes, embedding_dim, decay, eps, commitment, random_restart: restart } =
        case.config()?;
    ensure!(eps == Codebook::EPS, "eps is {eps}, and here it is always {}", Codebook::EPS);
    let config = CodebookConfig { codes, decay, commitment, restart };
    let parameters = Parameters::new(case.device(), 0);
    let codebook = Codebook::new(&parameters.root(), embedding_dim, &config);
    let names = ["embeddings", "N", "z_avg"];
    parameters.load(&names.iter().map(|name| Ok((name.to_string(), case.input(name)?))).collect::<Result<_>>()?)?;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let mut steps: [Vec<Tensor>; 7] = Default::default();
    for step in 0..case.input("z")?.size()[0] {
        let encoded = codebook.quantize(&case.input("z")?.get(step), true);
        let Encoded::Codes { indices, z, commitment } = encoded else { bail!("a codebook gives codes") };
        codebook.update(step);
        let own = parameters.named().into_iter().map(|(_, tensor)| tensor.copy());
        let found = [commitment.mean(None), codebook.perplexity(&indices), indices, z].into_iter().chain(own);
        steps.iter_mut().zip(found).for_each(|(all, one)| all.push(one));
    }
    let named = ["commitment_loss", "perplexity", "codes", "quantized", "embeddings", "N", "z_avg"];
    Ok(named.into_iter().zip(steps.map(|steps| Tensor::stack(&steps, 0))).collect())
}

#[derive(Deserialize)]
struct LossCase {
    #[serde(flatten)]
    autoencoder: Released,
    disc_channels: i64,
    disc_layers: i64,
    l1_weight: f64,
    perceptual_weight: f64,
    image_gan_weight: f64,
    video_gan_weight: f64,
    gan_feat_weight: f64,
    discriminator_iter_start: i64,
    step: i64,
}

pub fn loss(case: &Case) -> Result<Outputs> {
    let config: LossCase = case.config()?;
    let (autoencoder, parameters) = config.autoencoder.build(case)?;
    let criterion = TatsLossConfig {
        pixel_weight: config.l1_weight,
        perceptual_weight: config.perceptual_weight,
        image_weight: config.image_gan_weight,
        video_weight: config.video_gan_weight,
        matching_weight: config.gan_feat_weight,
        adversarial_start: config.discriminator_iter_start,
        discriminator: DiscriminatorConfig { channels: config.disc_channels, layers: config.disc_layers },
    };
    let criterion = TatsLoss::new(&criterion, case.device(), Kind::Float, 0, &Ranks::alone())?;
    let discriminators = criterion.discriminator_parameters();
    discriminators.load(&synthesize(&discriminators.named(), ""))?;
    let (x, frames) = (case.input("video")? * 2.0, case.input("frame_index")?);
    let _autocast = Autocast::bfloat16(case.device(), case.half);

    let (encoded, reconstruction) = autoencoder.train_pass(&x, &x, true);
    let terms = criterion.generator(&x, &reconstruction, &encoded, &frames, config.step);
    let Adversary { generator: [image, video], matching: [image_matching, video_matching] } =
        no_grad(|| criterion.adversary(&x, &reconstruction, &frames));
    backward(&terms.total);
    let [[of_frames, ..], [of_clips, ..]] = criterion.hinge(&x, &reconstruction, &frames);
    let on = if criterion.is_adversarial(config.step) { 1.0 } else { 0.0 };
    let weighted =
        |image: &Tensor, video: &Tensor| (image * config.image_gan_weight + video * config.video_gan_weight) * on;
    let discriminator_loss = weighted(&of_frames, &of_clips);
    backward(&discriminator_loss);
    let codes = autoencoder.training_terms(&encoded);
    let (_, perplexity) = codes.into_iter().find(|(name, _)| *name == "perplexity").expect("that of its codes");
    Ok(vec![
        ("recon_loss", terms.reconstruction),
        ("perceptual_loss", terms.perceptual),
        ("commitment_loss", terms.commitment),
        ("perplexity", perplexity),
        ("aeloss", weighted(&image, &video)),
        ("g_image_loss", image),
        ("g_video_loss", video),
        ("image_gan_feat_loss", image_matching),
        ("video_gan_feat_loss", video_matching),
        ("d_image_loss", of_frames),
        ("d_video_loss", of_clips),
        ("total_loss", terms.total),
        ("discriminator_loss", discriminator_loss),
        ("autoencoder_grad_norm", gradient_norm(&parameters)),
        ("discriminator_grad_norm", gradient_norm(discriminators)),
    ])
}
