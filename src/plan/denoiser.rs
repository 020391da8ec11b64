//! The plan of a denoiser's training.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{Activations, Plan, PlanOptions, Variant, codec::codec};
use crate::{
    checkpoint,
    codecs::{CodecSettings, Pixels},
    experiment::{DiffusionExperiment, Precision},
    models::{ports, seen},
    networks::{Inputs, Network, NetworkConfig, Ports},
    nn::Parameters,
    run_files::TEXT_ENCODER_FILE,
    text::{ClipText, ClipTextConfig, TextEncoderConfig},
    torch::{Autocast, Kept, kept_for_backward},
};

/// `file` is where the experiment stands.
pub(super) fn plan(file: &Path, experiment: &DiffusionExperiment, options: &PlanOptions) -> Result<Plan> {
    let DiffusionExperiment { data, network, .. } = experiment;
    let trainer = experiment.trainer.clone();
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

    let [parameters, trained] = count(experiment, network, latent)?;
    let frozen_codec = Parameters::unfilled(Device::Cpu);
    let _codec = codec.build(&frozen_codec.root());
    let frozen_text = Parameters::unfilled(Device::Cpu);
    let _text = text.as_ref().map(|config| ClipText::new(&frozen_text.root(), config));
    let tokens = text.as_ref().map_or(0, |config| config.positions);

    let own = serde_json::to_value(network)?.get("recompute").cloned();
    let recomputes = !matches!(own, None | Some(Value::Bool(false)));
    // one that computes again says what both ways keep
    let counted = if own.is_some() && !recomputes { recomputing(network)? } else { network.clone() };
    let of = format!("{:?}", (&counted, ports(experiment, with_images), tokens, experiment.trained, trainer.precision));
    let known = options.counted.borrow().get(&of).copied();
    let [whole, recomputed] = match known {
        Some(known) => known,
        None => {
            // the lowest level has two rows and columns
            let unit = [multiple_of[0], 2 * multiple_of[1], 2 * multiple_of[2]];
            let units = [1, 2, 3].map(|axis| with_images[axis] as f64 / unit[axis - 1] as f64);
            Activations::of(units, &|batch, size| {
                let [frames, height, width] = [0, 1, 2].map(|axis| size[axis] * unit[axis]);
                forward(experiment, &counted, batch, [latent[0], frames, height, width], tokens)
            })?
        }
    };
    options.counted.borrow_mut().insert(of, [whole, recomputed]);
    let variant = |recompute: &str, kept| Variant { recompute: recompute.into(), kept };
    let activations = match &own {
        None => vec![variant("", whole)],
        Some(own) if recomputes => vec![variant(&own.to_string(), recomputed), variant("false", whole)],
        Some(_) => vec![variant("false", whole), variant("true", recomputed)],
    };
    notes.extend(activations.iter().find_map(|variant| variant.kept.note()));

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
    Ok(Plan {
        title: format!("a denoiser ({}) of latents {latent:?} of the {}", word(network)?, codec.name()),
        parameters,
        trained,
        averaged: if trainer.ema_decay.is_some() { trained } else { 0 },
        frozen: frozen_codec.count() + frozen_text.count(),
        forward: flops,
        step: of_step * passes + to_weights + encoding,
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

/// The network without memory for its weights, those that training moves asking for gradients.
fn declared(
    experiment: &DiffusionExperiment,
    network: &NetworkConfig,
    ports: &Ports,
) -> Result<(Box<dyn Network>, Parameters, i64)> {
    let parameters = Parameters::unfilled(Device::Cpu);
    let scope = parameters.root().with_adapters(experiment.trained.adapter());
    let built = network.build(&scope, ports).context("network")?;
    let all = parameters.count();
    parameters.train_only(|name| experiment.moves(name));
    parameters.require_grad(true);
    Ok((built, parameters, all))
}

/// All parameters, and those that training moves.
fn count(experiment: &DiffusionExperiment, network: &NetworkConfig, latent: [i64; 4]) -> Result<[i64; 2]> {
    let (_, parameters, all) = declared(experiment, network, &ports(experiment, latent))?;
    Ok([all, parameters.count()])
}

/// What a forward pass over latents of this shape keeps.
fn forward(
    experiment: &DiffusionExperiment,
    network: &NetworkConfig,
    batch: i64,
    latent: [i64; 4],
    tokens: i64,
) -> Result<Kept> {
    let ports = ports(experiment, latent);
    let (built, ..) = declared(experiment, network, &ports)?;
    let [channels, frames, height, width] = latent;
    let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let number = || Tensor::zeros([batch], (Kind::Int64, Device::Cpu));
    let given = Inputs {
        concat: if ports.concat > 0 { vec![float(&[batch, ports.concat, frames, height, width])] } else { Vec::new() },
        mask: ports.mask.then(|| float(&[batch, 1, frames, height, width])),
        around: (ports.past + ports.future > 0)
            .then(|| float(&[batch, channels, ports.past + ports.future, height, width])),
        text: ports.text.map(|width| float(&[batch, tokens, width])),
        label: ports.classes.map(|_| number()),
        level: ports.levels.map(|_| number()),
        // of a network that drops none it is not read
        dropout: Some(number()),
        concat_time: ports.concat_time.then(|| float(&[batch])),
        stills: false,
    };
    let z_t = float(&[batch, channels, frames, height, width]);
    let t = float(&[batch]);
    Ok(kept_for_backward(|| {
        let _precision = Autocast::bfloat16(Device::Cpu, experiment.trainer.precision == Precision::Bf16);
        built.forward(&z_t, &t, &given).to_kind(Kind::Float)
    }))
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
