//! What one training needs, and what follows from that for a card.

use super::{Activations, Card, Roofline, Work};
use crate::{
    codecs::CodecConfig,
    experiment::{Precision, ReduceDtype, TrainerConfig},
};

/// Bytes of a number of the weights, of their gradients, and of each of Adam's two moments.
const FLOAT: i64 = 4;

/// What one training will need.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which network is trained on what.
    pub title: String,
    /// Parameters of the networks that are trained.
    pub parameters: i64,
    /// Those of them that training moves.
    pub trained: i64,
    /// Those of which a moving average is held.
    pub averaged: i64,
    /// Parameters of networks that only compute: the codec of a denoiser, a text encoder, LPIPS.
    pub frozen: i64,
    /// Floating-point operations of a forward pass over one clip, two a multiply-add: of the denoiser, or of encoding and
    /// decoding.
    pub forward: i64,
    /// Those of one clip in a training step, with all that is computed for it.
    pub step: i64,
    /// What the forward pass keeps for the backward pass: with the experiment's own `network.recompute`, then with the
    /// other; a network without that setting has one.
    pub activations: Vec<Variant>,
    /// The kernels of a training step on one GPU.
    pub kernels: Work,
    /// Those of sampling a batch; none of what is not sampled from, or not by a walk from noise.
    pub sampling: Option<Sampling>,
    /// Steps, batch, passes a step, precision.
    pub trainer: TrainerConfig,
    /// What was assumed or left out, in whole sentences.
    pub notes: Vec<String>,
}

/// Sampling with the experiment's own sampler, of as many clips as a training's batch has.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// How often the network is called.
    pub calls: i64,
    /// The kernels of a call: with guidance, over twice the clips.
    pub call: Work,
    /// Those of the codec's decoder.
    pub decoding: Work,
}

impl Sampling {
    /// All of it.
    pub fn whole(&self) -> Work {
        self.call.clone().times(self.calls).then(self.decoding.clone())
    }
}

/// Activations under one setting of `network.recompute`.
#[derive(Debug, Clone)]
pub struct Variant {
    /// The setting as a file gives it; empty for a network without it.
    pub recompute: String,
    /// What is kept.
    pub kept: Activations,
}

/// What is said beside an experiment's file.
#[derive(Debug, Default)]
pub struct PlanOptions {
    /// The codec of a denoiser whose autoencoder run is not there, and has no experiment either.
    pub codec: Option<CodecConfig>,
}

impl Plan {
    /// Clips of one step on so many GPUs.
    pub fn clips(&self, ranks: i64) -> i64 {
        self.trainer.batch * self.trainer.accumulate * ranks
    }

    /// Bytes on each of so many GPUs that are there whatever the batch: of weights, gradients, Adam's moments, the moving average,
    /// frozen weights, and of gradients on their way to the other GPUs. With `trainer.shard_optimizer` each GPU holds its share of
    /// moments and average.
    pub fn state(&self, ranks: i64) -> [(&'static str, i64); 6] {
        let share = |count: i64| if self.trainer.shard_optimizer { (count + ranks - 1) / ranks } else { count };
        let travels = match self.trainer.reduce_dtype {
            _ if ranks == 1 => 0,
            ReduceDtype::F32 => FLOAT,
            ReduceDtype::Bf16 => FLOAT / 2,
        };
        [
            ("weights", self.parameters * FLOAT),
            ("gradients", self.trained * FLOAT),
            ("optimizer", 2 * share(self.trained) * FLOAT),
            ("average", share(self.averaged) * FLOAT),
            ("frozen networks", self.frozen * FLOAT),
            ("gradients on their way", self.trained * travels),
        ]
    }

    /// Bytes of [`Self::state`] together.
    pub fn state_bytes(&self, ranks: i64) -> i64 {
        self.state(ranks).iter().map(|(_, bytes)| bytes).sum()
    }

    /// The largest batch of a forward pass that fits each of so many cards, of whose memory [`Card::USABLE`] is counted on; 0
    /// where none does.
    pub fn fits(&self, card: &Card, ranks: i64, activations: &Activations) -> i64 {
        let left = (card.memory as f64 * Card::USABLE) as i64 - self.state_bytes(ranks) - activations.fixed;
        (left / activations.clip.max(1)).max(0)
    }

    /// Whether the batch that the training has fits each of so many cards.
    pub fn fits_itself(&self, card: &Card, ranks: i64) -> bool {
        self.fits(card, ranks, &self.activations[0].kept) >= self.trainer.batch
    }

    /// How long a training step takes on such a card by its roofline; none where its rates are not known.
    pub fn step_on(&self, card: &Card) -> Option<Roofline> {
        self.kernels.on(card, self.trainer.tf32)
    }

    /// Hours of the whole training at that rate, at most those of `trainer.minutes`; each card does its own batch at the same time.
    pub fn hours(&self, card: &Card) -> Option<f64> {
        let hours = self.step_on(card)?.seconds() * self.trainer.steps as f64 / 3600.0;
        Some(self.trainer.minutes.map_or(hours, |minutes| hours.min(minutes / 60.0)))
    }

    /// The precision of products and convolutions, for people.
    pub fn precision(&self) -> &'static str {
        match (self.trainer.precision, self.trainer.tf32) {
            (Precision::Bf16, _) => "bf16",
            (Precision::F32, true) => "f32 as TF32",
            (Precision::F32, false) => "f32",
        }
    }
}
