//! The interface of the losses that train an autoencoder.

use std::fmt::Debug;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::{
    codecs::Encoded,
    distributed::Ranks,
    nn::{Parameters, Scope},
};

/// The settings of a loss, and what can be said of it before anything is built.
pub trait CodecLossSettings: Debug + Send + Sync {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the key and what it may be.
    fn validate(&self) -> Result<()>;

    /// The loss with its networks, in `kind` precision on the device. Discriminators start as a function of `seed`; `ranks` are
    /// those that train together.
    ///
    /// # Errors
    /// Where LPIPS is asked for and its weights are not there.
    fn build(&self, device: Device, kind: Kind, seed: u64, ranks: &Ranks) -> Result<Box<dyn CodecLoss>>;

    /// Whether it weighs what keeps latents in bounds ([`Encoded::regularizer`]), without which a codebook loses its encoder.
    fn is_regularized(&self) -> bool;

    /// Frames of a clip of so many that LPIPS looks at in one step; 0 without LPIPS.
    fn frames_perceived(&self, frames: i64) -> i64;

    /// The step at which discriminators come in; none without any.
    fn adversarial_start(&self) -> Option<i64>;

    /// Declares the discriminators under `scope`. What is returned gives all that they make of clips `[B, 3, F, H, W]` as one
    /// scalar, so that what a step keeps of them can be counted.
    fn discriminators(&self, scope: &Scope) -> Box<dyn Fn(&Tensor) -> Tensor>;

    /// Floating-point operations of the discriminators over one clip, two a multiply-add.
    fn discriminator_flops(&self, frames: i64, side: i64) -> i64;
}

/// One forward pass of an autoencoder in training.
pub struct TrainPass<'a> {
    /// The clips `[B, 3, F, H, W]` in [−1, 1].
    pub x: &'a Tensor,
    /// What the autoencoder made of them, of the same shape; in the autoencoder's update with its graph.
    pub reconstruction: &'a Tensor,
    /// What they were encoded to.
    pub encoded: &'a Encoded,
    /// The kernel of the decoder's last convolution.
    pub last_kernel: &'a Tensor,
    /// The number of each sample over the whole training: random choices are a function of it.
    pub samples: &'a [u64],
    /// The training's step.
    pub step: i64,
    /// What gradients are multiplied by.
    pub scale: f64,
}

/// A loss with the networks it needs. Its terms are scalars on the device, out of the graph, by the names of the log; the
/// first is the loss. No call waits for the device.
pub trait CodecLoss {
    /// The parameters of all discriminators.
    fn discriminator_parameters(&self) -> &Parameters;

    /// Whether the discriminators take part at this step.
    fn is_adversarial(&self, step: i64) -> bool;

    /// At steps of one form the losses are computed in the same way, whatever the step and the numbers of the samples. None where
    /// a step is like no other.
    fn form(&self, _step: i64) -> Option<i64> {
        None
    }

    /// Accumulates the gradient of the autoencoder's loss.
    fn backward_autoencoder(&self, pass: &TrainPass) -> Vec<(&'static str, Tensor)>;

    /// Accumulates the gradient of the discriminators' loss.
    fn backward_discriminators(&self, pass: &TrainPass) -> Vec<(&'static str, Tensor)>;
}
