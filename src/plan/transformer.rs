//! The plan of the training of a transformer over codes.

use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::{Activations, Plan, PlanOptions, Variant, codec::codec};
use crate::{
    autoregression::loss,
    experiment::{DiffusionSpace, Precision, TransformerExperiment},
    models::sequences,
    networks::{Gpt, GptConfig, Sequences},
    nn::Parameters,
    torch::{Autocast, kept_for_backward},
};

/// Tokens of the smallest sequences that are counted.
const UNIT: i64 = 16;

/// `file` is where the experiment stands.
pub(super) fn plan(file: &Path, experiment: &TransformerExperiment, options: &PlanOptions) -> Result<Plan> {
    let TransformerExperiment { data, network, autoencoder, .. } = experiment;
    let trainer = experiment.trainer.clone();
    let planned = codec(file, &DiffusionSpace::Latents(autoencoder.clone()), options)?;
    let mut notes: Vec<String> = planned.note.into_iter().collect();
    let codec = planned.settings.context("a run of pixels")?;
    codec.validate().context("autoencoder")?;
    let (_, latent, sequences) = sequences(experiment, &*codec)?;
    if experiment.labels.as_ref().is_some_and(|labels| labels.classes.is_none()) {
        notes.push(
            "How many classes there are is known when the data are read: their tokens are not counted. Add labels.classes=N \
             to count them."
                .into(),
        );
    }
    let parameters = Parameters::unfilled(Device::Cpu);
    let _network = Gpt::new(&parameters.root(), network, sequences);
    let frozen = Parameters::unfilled(Device::Cpu);
    let _codec = codec.build(&frozen.root());

    let half = trainer.precision == Precision::Bf16;
    let [whole, recomputed] = kept(network, sequences, half)?;
    let variant = |recompute: bool, kept| Variant { recompute: recompute.to_string(), kept };
    let mut activations = vec![variant(false, whole), variant(true, recomputed)];
    if network.recompute {
        activations.reverse();
    }

    let flops = network.flops(sequences);
    let passes = if network.recompute { 4 } else { 3 };
    let encoding = match experiment.latents {
        Some(_) => 0,
        None => codec.flops(data.frames, data.resolution, data.resolution)[0],
    };
    notes.push(format!(
        "A clip in a training step counts as {passes} forward passes{}.",
        if encoding > 0 { ", and its encoding" } else { "" },
    ));
    let count = parameters.count();
    Ok(Plan {
        title: format!(
            "a transformer over {} tokens of latents {latent:?} of the {}, {} to choose from",
            sequences.length,
            codec.name(),
            sequences.vocabulary
        ),
        parameters: count,
        trained: count,
        averaged: if trainer.ema_decay.is_some() { count } else { 0 },
        frozen: frozen.count(),
        forward: flops,
        step: passes * flops + encoding,
        activations,
        trainer,
        notes,
    })
}

/// What a forward pass to the loss keeps of a sequence, and what where blocks are computed again.
fn kept(network: &GptConfig, sequences: Sequences, half: bool) -> Result<[Activations; 2]> {
    let network = GptConfig { recompute: true, ..network.clone() };
    // a sequence has one axis; which tokens see which changes nothing of what is kept
    let units = [sequences.length as f64 / UNIT as f64, 1.0, 1.0];
    Activations::of(units, &|batch, [length, rows, columns]| {
        let parameters = Parameters::unfilled(Device::Cpu);
        let tokens = length * rows * columns * UNIT;
        let gpt = Gpt::new(&parameters.root(), &network, Sequences { length: tokens, unmasked: 0, ..sequences });
        parameters.require_grad(true);
        let numbers = |shape: &[i64]| Tensor::zeros(shape, (Kind::Int64, Device::Cpu));
        let (start, tokens) = (numbers(&[batch]), numbers(&[batch, tokens]));
        Ok(kept_for_backward(|| {
            let _precision = Autocast::bfloat16(Device::Cpu, half);
            loss(&gpt, &start, &tokens).1
        }))
    })
}
