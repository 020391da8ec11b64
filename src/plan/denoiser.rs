//! The plan of a denoiser's training.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{
    Activations, Plan, PlanOptions, Sampling, Variant,
    codec::codec,
    work::{Trained, of_encoding, without_gradients},
};
use crate::{
    checkpoint,
    codecs::{CodecSettings, Pixels, VideoCodec},
    experiment::{DiffusionExperiment, Precision},
    models::{ports, seen},
    networks::{Inputs, Network, NetworkConfig},
    nn::Parameters,
    run_files::TEXT_ENCODER_FILE,
    text::{ClipText, ClipTextConfig, TextEncoderConfig},
    torch::{Autocast, FixedWeights, kept_for_backward, without_memory},
};

/// `file` is where the experiment stands.
pub(super) fn plan(file: &Path, experiment: &DiffusionExperiment, options: &PlanOptions) -> Result<Plan> {
    let DiffusionExperiment { data, network, .. } = experiment;
    let trainer = experiment.trainer.clone();
    let (batch, precision) = (trainer.batch, trainer.precision);
    let mut notes = Vec::new();

    let planned = codec(file, &experiment.autoencoder, options)?;
    notes.extend(planned.note);
    let codec: &dyn CodecSettings = planned.settings.as_deref().unwrap_or(&Pixels);
    codec.validate().context("autoencoder")?;
    let latent = codec.latent_shape(data.frames, data.resolution, data.resolution).context("data")?;
    let latent = seen(latent, experiment)?;
    let multiple_of = network.multiple_of();
    ensure!(
        latent[1..].iter().zip(multiple_of).all(|(size, of)| size % of == 0),
        "frames, rows and columns of latents {latent:?} must be multiples of {multiple_of:?} for this network"
    );
    // single frames beside a clip count as frames of it
    let [c, f, h, w] = latent;
    let with_images = [c, f + experiment.images, h, w];
    if experiment.images > 0 {
        notes.push(format!("The {} single frames beside each clip (images) count as frames of it.", experiment.images));
    }
    if experiment.labels.as_ref().is_some_and(|labels| labels.classes.is_none()) {
        notes.push(
            "How many classes there are is known when the data are read: the table of classes is counted with none. Add \
             labels.classes=N to count it."
                .into(),
        );
    }
    let text = experiment.text.as_ref().map(|text| text_encoder(&text.encoder, network, &mut notes)).transpose()?;

    let frozen_codec = Parameters::unfilled(Device::Cpu);
    let built_codec = codec.build(&frozen_codec.root());
    let frozen_text = Parameters::unfilled(Device::Cpu);
    let text_encoder = text.as_ref().map(|config| ClipText::new(&frozen_text.root(), config));
    frozen_codec.forget_memory();
    frozen_text.forget_memory();
    let tokens = text.as_ref().map_or(0, |config| config.positions);

    let own = serde_json::to_value(network)?.get("recompute").cloned();
    let recomputes = !matches!(own, None | Some(Value::Bool(false)));
    // one that computes again says what both ways keep
    let counted = if own.is_some() && !recomputes { recomputing(network)? } else { network.clone() };
    let [whole, recomputed] = {
        let built = Bare::new(experiment, &counted, latent, tokens)?;
        Activations::of(&|batch| Ok(kept_for_backward(|| built.loss(batch))))?
    };
    let variant = |recompute: &str, kept| Variant { recompute: recompute.into(), kept };
    let activations = match &own {
        None => vec![variant("", whole)],
        Some(own) if recomputes => vec![variant(&own.to_string(), recomputed), variant("false", whole)],
        Some(_) => vec![variant("false", whole), variant("true", recomputed)],
    };

    let built = Bare::new(experiment, network, latent, tokens)?;
    let [parameters, trained] = [built.all, built.parameters.count()];
    let flops = network.flops(&ports(experiment, latent), latent, tokens);
    let of_step = network.flops(&ports(experiment, latent), with_images, tokens);
    // forward, backward to the activations, and to the weights that training moves
    let passes = if recomputes { 3 } else { 2 };
    let to_weights = (of_step as f64 * trained as f64 / parameters as f64) as i64;
    let encoding = match experiment.latents {
        Some(_) => 0,
        None => codec.flops(data.frames, data.resolution, data.resolution)[0],
    };
    notes.push(format!(
        "A clip in a training step counts as {} forward passes{}, one more for the share of parameters that training moves{}.",
        passes,
        if recomputes { " (what is recomputed as a whole one)" } else { "" },
        if encoding > 0 { ", and its encoding" } else { "" },
    ));
    let text_of_clips = without_gradients(precision, || {
        if let Some(encoder) = &text_encoder {
            drop(encoder.forward(&Tensor::zeros([batch, tokens], (Kind::Int64, Device::Cpu))));
        }
    });
    let of_clips = of_encoding(&*built_codec, data, &trainer, experiment.latents.is_some()).then(text_of_clips);
    let step =
        Trained { parameters: &built.parameters, trainer: &trainer, optimizer: &experiment.optimizer, averaged: true };
    let kernels = of_clips.times(trainer.accumulate).then(step.step(&|| built.loss(batch))?);
    Ok(Plan {
        title: format!("a denoiser ({}) of latents {latent:?} of the {}", word(network)?, codec.name()),
        parameters,
        trained,
        averaged: if trainer.ema_decay.is_some() { trained } else { 0 },
        frozen: frozen_codec.count() + frozen_text.count(),
        forward: flops,
        step: of_step * passes + to_weights + encoding,
        kernels,
        sampling: Some(built.sampling(&*built_codec)?),
        activations,
        trainer,
        notes,
    })
}

/// A network's kind.
fn word(network: &NetworkConfig) -> Result<String> {
    Ok(serde_json::to_value(network)?["kind"].as_str().unwrap_or_default().to_string())
}

/// The network with `recompute: true`.
fn recomputing(network: &NetworkConfig) -> Result<NetworkConfig> {
    let mut settings = serde_json::to_value(network)?;
    settings["recompute"] = true.into();
    Ok(serde_json::from_value(settings)?)
}

/// A network whose weights have no memory; those that training moves ask for gradients.
struct Bare<'a> {
    experiment: &'a DiffusionExperiment,
    network: Box<dyn Network>,
    parameters: Parameters,
    /// The number of all its parameters.
    all: i64,
    latent: [i64; 4],
    tokens: i64,
}

impl<'a> Bare<'a> {
    fn new(
        experiment: &'a DiffusionExperiment,
        network: &NetworkConfig,
        latent: [i64; 4],
        tokens: i64,
    ) -> Result<Self> {
        let parameters = Parameters::unfilled(Device::Cpu);
        let scope = parameters.root().with_adapters(experiment.trained.adapter());
        let built = network.build(&scope, &ports(experiment, latent)).context("network")?;
        let all = parameters.count();
        parameters.forget_memory();
        parameters.train_only(|name| experiment.moves(name));
        parameters.require_grad(true);
        Ok(Bare { experiment, network: built, parameters, all, latent, tokens })
    }

    /// What it makes of a batch of clips, or of single frames.
    fn forward(&self, batch: i64, stills: bool) -> Tensor {
        let ([channels, frames, height, width], ports) = (self.latent, self.network.ports());
        let frames = if stills { 1 } else { frames };
        let float = |shape: &[i64]| without_memory(shape, Kind::Float);
        let number = || without_memory(&[batch], Kind::Int64);
        let beside = |channels: i64| float(&[batch, channels, frames, height, width]);
        let around = ports.past + ports.future;
        let given = Inputs {
            concat: if ports.concat > 0 { vec![beside(ports.concat)] } else { Vec::new() },
            mask: ports.mask.then(|| beside(1)),
            around: (around > 0).then(|| float(&[batch, channels, around, height, width])),
            text: ports.text.map(|width| float(&[batch, self.tokens, width])),
            label: ports.classes.map(|_| number()),
            level: ports.levels.map(|_| number()),
            // of a network that drops none it is not read
            dropout: Some(number()),
            concat_time: ports.concat_time.then(|| float(&[batch])),
            stills,
        };
        let half = self.experiment.trainer.precision == Precision::Bf16;
        let _precision = Autocast::bfloat16(Device::Cpu, half);
        self.network.forward(&beside(channels), &float(&[batch]), &given).to_kind(Kind::Float)
    }

    /// A loss of a batch, with the single frames that stand beside its clips.
    fn loss(&self, batch: i64) -> Tensor {
        let stills = batch * self.experiment.images;
        let of = |made: Tensor| made.square().mean(None);
        let clips = of(self.forward(batch, false));
        if stills > 0 { clips + of(self.forward(stills, true)) } else { clips }
    }

    fn sampling(&self, codec: &dyn VideoCodec) -> Result<Sampling> {
        let DiffusionExperiment { trainer, text, labels, sampler, schedule, .. } = self.experiment;
        let guidance = match (text, labels) {
            (Some(text), _) => text.guidance,
            (None, Some(labels)) => labels.guidance,
            (None, None) => 1.0,
        };
        let clips = if guidance == 1.0 { trainer.batch } else { 2 * trainer.batch };
        let _weights = FixedWeights::new();
        let call = || without_gradients(trainer.precision, || drop(self.forward(clips, false)));
        // the first one casts the weights
        let [_, call] = [call(), call()];
        let decoding = without_gradients(trainer.precision, || {
            let z_0 = without_memory(&[&[trainer.batch], &self.latent[..]].concat(), Kind::Float);
            drop(codec.decode(&z_0));
        });
        let calls = sampler.start(&*schedule.build()?)?.times().len() as i64;
        Ok(Sampling { calls, call, decoding })
    }
}

/// The settings of the text encoder that a run carries, or of one as wide as the network's texts.
fn text_encoder(run: &Path, network: &NetworkConfig, notes: &mut Vec<String>) -> Result<ClipTextConfig> {
    if run.exists() {
        let inside = run.join(TEXT_ENCODER_FILE);
        let (path, found) = checkpoint::open_head(if inside.is_file() { &inside } else { run })?;
        let config: TextEncoderConfig = serde_json::from_value(found.experiment)
            .with_context(|| format!("the settings stored in {}", path.display()))?;
        return Ok(config.text_encoder);
    }
    let usual = ClipTextConfig::default();
    ensure!(
        network.takes().text == Some(usual.width),
        "text.encoder: there is no {}, and the usual text encoder is {} wide, which is not what the network attends to \
         (context_width)",
        run.display(),
        usual.width
    );
    notes.push(format!("{} is not there: its text encoder is taken to be Stable Diffusion 1.x's.", run.display()));
    Ok(usual)
}
