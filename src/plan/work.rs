//! The kernels of a training step and of sampling, and how long a card takes for them by its roofline (Williams et al. 2009):
//! each kernel lasts as long as its products need at the card's peak or its bytes at the card's bandwidth, whichever is more, and
//! no kernel less than it takes to start one.

use std::{collections::BTreeMap, rc::Rc};

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use super::Card;
use crate::{
    codecs::VideoCodec,
    data::DataConfig,
    distributed::{Ranks, Shards},
    experiment::{OptimizerConfig, Precision, TrainerConfig},
    nn::Parameters,
    torch::{Autocast, Kernel, RoundedWeights, backward, by_shapes, global_norm, without_memory},
    train::{Ema, Optimizer, StepAround},
};

/// Kernels, each so many times.
#[derive(Debug, Clone, Default)]
pub struct Work(Vec<(Kernel, i64)>);

/// How long kernels take on a card at the least, in seconds, by what bounds each of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Roofline {
    /// Those whose products take longer than their bytes.
    pub products: f64,
    /// Those whose bytes take longer.
    pub memory: f64,
    /// Those that are over before the next could start.
    pub starts: f64,
}

impl Roofline {
    /// All of it.
    pub fn seconds(&self) -> f64 {
        self.products + self.memory + self.starts
    }
}

impl Work {
    /// What runs once.
    pub(super) fn once(kernels: Vec<Kernel>) -> Self {
        Work(kernels.into_iter().map(|kernel| (kernel, 1)).collect())
    }

    /// All of it so many times.
    pub(super) fn times(mut self, count: i64) -> Self {
        self.0.iter_mut().for_each(|(_, times)| *times *= count);
        self
    }

    /// With what comes behind it.
    pub(super) fn then(mut self, next: Work) -> Self {
        self.0.extend(next.0);
        self
    }

    /// How many kernels are started.
    pub fn kernels(&self) -> i64 {
        self.0.iter().map(|(_, times)| times).sum()
    }

    /// Bytes that they read and write.
    pub fn bytes(&self) -> i64 {
        self.0.iter().map(|(kernel, times)| kernel.bytes * times).sum()
    }

    /// Operations of their products, two a multiply-add.
    pub fn flops(&self) -> i64 {
        self.0.iter().map(|(kernel, times)| kernel.flops * times).sum()
    }

    /// The kernels of each operation, by its name.
    pub fn operations(&self) -> BTreeMap<&str, Work> {
        let mut found: BTreeMap<&str, Work> = BTreeMap::new();
        for entry in &self.0 {
            found.entry(&entry.0.operation).or_default().0.push(entry.clone());
        }
        found
    }

    /// How long a card takes, at the shares of its rates that [`Card`] states; none where its rates are not known.
    pub fn on(&self, card: &Card, tf32: bool) -> Option<Roofline> {
        let rates = card.rates?;
        let mut found = Roofline::default();
        for (kernel, times) in &self.0 {
            let precision = if kernel.half { Precision::Bf16 } else { Precision::F32 };
            let products = kernel.flops as f64 / (rates.peak(precision, tf32) * Card::PEAK_REACHED);
            let memory = kernel.bytes as f64 / (rates.bandwidth * Card::BANDWIDTH_REACHED);
            let bound = match products.max(memory) {
                least if least < Card::KERNEL => &mut found.starts,
                _ if products > memory => &mut found.products,
                _ => &mut found.memory,
            };
            *bound += products.max(memory).max(Card::KERNEL) * *times as f64;
        }
        Some(found)
    }
}

/// The kernels of `body`, without gradients, in a precision.
pub(super) fn without_gradients(precision: Precision, body: impl FnOnce()) -> Work {
    let pass = || {
        let _precision = Autocast::bfloat16(Device::Cpu, precision == Precision::Bf16);
        no_grad(body);
    };
    Work::once(by_shapes(pass).1.kernels)
}

/// The kernels of encoding the clips of a pass; none where a training reads latents.
pub(super) fn of_encoding(
    codec: &dyn VideoCodec,
    data: &DataConfig,
    trainer: &TrainerConfig,
    reads_latents: bool,
) -> Work {
    if reads_latents {
        return Work::default();
    }
    let clips = without_memory(&[trainer.batch, 3, data.frames, data.resolution, data.resolution], Kind::Float);
    without_gradients(trainer.precision, || drop(codec.encode(&clips)))
}

/// A network that is trained, of parameters without memory.
pub(super) struct Trained<'a> {
    pub parameters: &'a Parameters,
    pub trainer: &'a TrainerConfig,
    pub optimizer: &'a OptimizerConfig,
    /// Whether it is the network of which a training may keep a moving average.
    pub averaged: bool,
}

impl Trained<'_> {
    /// The kernels of a step in which `pass` gives the loss of a batch.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn step(&self, pass: &dyn Fn() -> Tensor) -> Result<Work> {
        let Trained { parameters, trainer, optimizer, averaged } = *self;
        let (made, _) = by_shapes(|| {
            let alone = Rc::new(Shards::new(&Ranks::alone(), &parameters.trainable()));
            let average = Ema::of(trainer, parameters, &alone).filter(|_| averaged);
            (Optimizer::over(optimizer.adam(), parameters, &alone), average, RoundedWeights::new())
        });
        let (mut optimizer, average, mut weights) = made;
        let mut run = || {
            let _precision = Autocast::bfloat16(Device::Cpu, trainer.precision == Precision::Bf16);
            let _weights = weights.pass(Device::Cpu);
            backward(&pass());
        };
        // the first pass finds out which weights are cast, and has no gradients to add to
        let (_, first) = by_shapes(&mut run);
        optimizer.zero_grad()?;
        let (_, pass) = by_shapes(&mut run);
        let (_, further) = if trainer.accumulate > 1 { by_shapes(&mut run) } else { ((), first) };
        let (moved, update) = by_shapes(|| {
            let gradients = optimizer.gradients();
            let norm = global_norm(&gradients)?.to_kind(Kind::Double).reshape([1]);
            let around =
                StepAround { checked: Some(&norm), max_norm: trainer.clip_gradient, average: average.as_ref() };
            optimizer.step(&gradients, around)
        });
        moved?;
        let further = Work::once(further.kernels).times(trainer.accumulate - 1);
        Ok(Work::once(pass.kernels).then(further).then(Work::once(update.kernels)))
    }
}
