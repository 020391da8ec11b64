//! What a network is to those who train it and sample from it.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::Tensor;

use super::{Inputs, Ports};
use crate::nn::Scope;

/// A network that is trained to tell noise from signal.
pub trait Network {
    /// z `[B, C, F, h, w]` at time t → `[B, outputs, F, h, w]`. t is `[B]`, or `[B, F]` for a network that takes a time a
    /// frame; real or integer. What it was not built for is not read.
    ///
    /// # Panics
    /// On shapes that do not fit, as `tch` does.
    fn forward(&self, z: &Tensor, t: &Tensor, given: &Inputs) -> Tensor;

    /// What it was built for.
    fn ports(&self) -> &Ports;
}

/// What can be given to a network besides z and one time a clip, and how freely; known before anything is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Takes {
    /// Width of the encoded texts that it attends to, without which it cannot be asked; none for a network that attends to
    /// none.
    pub text: Option<i64>,
    /// A class.
    pub labels: bool,
    /// The noise level of given frames; else they are given clean.
    pub levels: bool,
    /// A time for each frame of a clip, `[B, F]`.
    pub frame_times: bool,
    /// Clips of other lengths and sizes than those of its ports.
    pub other_clips: bool,
}

/// The settings of a network: what an experiment says under `network:`.
pub trait NetworkSettings {
    /// # Errors
    /// Names the number that does not fit and the rule.
    fn validate(&self) -> Result<()>;

    /// What frames, height and width of a latent must be multiples of.
    fn multiple_of(&self) -> [i64; 3];

    /// Declares the parameters under `scope`.
    ///
    /// # Errors
    /// Ports that such a network does not have: what was asked for, and what it takes.
    fn build(&self, scope: &Scope, ports: &Ports) -> Result<Box<dyn Network>>;

    /// What can be given to it.
    fn takes(&self) -> Takes;

    /// Fits the weights of such a network with other ports to these, so that it computes the same as long as what is new is
    /// not used.
    fn adopt(&self, weights: &mut BTreeMap<String, Tensor>, ports: &Ports) {
        let _ = (weights, ports);
    }

    /// The name of its table of classes, a row each and last one for "no class".
    fn class_table(&self) -> Option<&str> {
        None
    }

    /// Whether the parameter of this name acts over frames, which an image network does not have
    /// (`trained: {kind: temporal}`).
    fn is_temporal(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Whether the parameter of this name sees given frames: their mask, their noise level.
    fn sees_given_frames(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Floating-point operations of one forward pass over one latent `[C, F, h, w]`, two a multiply-add; a network that
    /// attends to a text is given so many tokens.
    fn flops(&self, ports: &Ports, latent: [i64; 4], tokens: i64) -> i64;
}
