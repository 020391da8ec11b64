//! The plan of the training of a transformer over codes.

use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::{
    Activations, Plan, PlanOptions, Variant,
    codec::codec,
    work::{Trained, of_encoding},
};
use crate::{
    autoregression::loss,
    experiment::{DiffusionSpace, Precision, TransformerExperiment},
    models::sequences,
    networks::{Gpt, GptConfig, Sequences},
    nn::Parameters,
    torch::{Autocast, kept_for_backward, without_memory},
};

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
    let frozen = Parameters::unfilled(Device::Cpu);
    let built_codec = codec.build(&frozen.root());
    frozen.forget_memory();

    let (batch, precision) = (trainer.batch, trainer.precision);
    let [whole, recomputed] = {
        // which tokens see which changes nothing of what is kept
        let again = Bare::new(&GptConfig { recompute: true, ..network.clone() }, sequences);
        Activations::of(&|batch| Ok(kept_for_backward(|| again.loss(batch, precision))))?
    };
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
    let built = Bare::new(network, sequences);
    let count = built.parameters.count();
    let step =
        Trained { parameters: &built.parameters, trainer: &trainer, optimizer: &experiment.optimizer, averaged: true };
    let encoded = of_encoding(&*built_codec, data, &trainer, experiment.latents.is_some());
    let kernels = encoded.times(trainer.accumulate).then(step.step(&|| built.loss(batch, precision))?);
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
        kernels,
        sampling: None,
        activations,
        trainer,
        notes,
    })
}

/// A network whose weights have no memory, and sequences of so many tokens.
struct Bare {
    gpt: Gpt,
    parameters: Parameters,
    length: i64,
}

impl Bare {
    fn new(network: &GptConfig, sequences: Sequences) -> Self {
        let parameters = Parameters::unfilled(Device::Cpu);
        let gpt = Gpt::new(&parameters.root(), network, sequences);
        parameters.forget_memory();
        parameters.require_grad(true);
        Bare { gpt, parameters, length: sequences.length }
    }

    /// The loss of a batch.
    fn loss(&self, batch: i64, precision: Precision) -> Tensor {
        let numbers = |shape: &[i64]| without_memory(shape, Kind::Int64);
        let (start, tokens) = (numbers(&[batch]), numbers(&[batch, self.length]));
        let _precision = Autocast::bfloat16(Device::Cpu, precision == Precision::Bf16);
        loss(&self.gpt, &start, &tokens).1
    }
}
