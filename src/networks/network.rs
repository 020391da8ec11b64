//! The interface between a denoising network and everything that trains it or samples from it.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::Tensor;

use super::{Inputs, Ports};
use crate::nn::Scope;

/// A denoising network: from a noisy latent and its diffusion time it predicts what an [objective](crate::diffusion::Predict)
/// asks for, such as the noise.
pub trait Network {
    /// The prediction `[B, outputs, F, h, w]` for noisy latents z `[B, C, F, h, w]`.
    ///
    /// The time t is what [`NoisePath::embed`](crate::diffusion::NoisePath::embed) makes of a diffusion time: real or integer,
    /// `[B]`, or `[B, F]` for a network that takes a time for each frame. Parts of `given` for which the network was not
    /// built are ignored.
    ///
    /// # Panics
    /// On shapes that do not fit, as `tch` does.
    fn forward(&self, z: &Tensor, t: &Tensor, given: &Inputs) -> Tensor;

    /// The shapes and conditions for which it was built.
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
    /// The frames before and after a clip.
    pub around: bool,
    /// A number for each clip by which activations are dropped in training.
    pub dropout: bool,
    /// The time of the noise that further channels carry.
    pub concat_time: bool,
    /// A time for each frame of a clip, `[B, F]`.
    pub frame_times: bool,
    /// Single pictures, for which layers over frames are the identity.
    pub stills: bool,
    /// Clips of other lengths and sizes than those of its ports.
    pub other_clips: bool,
}

/// The settings of a network: what an experiment says under `network:`.
pub trait NetworkSettings {
    /// Checks the settings, without building anything.
    ///
    /// # Errors
    /// Names the number that does not fit, and the rule.
    fn validate(&self) -> Result<()>;

    /// The numbers of which frames, height and width of a latent must be multiples.
    fn multiple_of(&self) -> [i64; 3];

    /// Builds the network and declares its parameters under `scope`: the path of a parameter there is its name in
    /// checkpoints.
    ///
    /// # Errors
    /// Ports for which such a network cannot be built: says what was asked for, and what is possible.
    fn build(&self, scope: &Scope, ports: &Ports) -> Result<Box<dyn Network>>;

    /// Which conditions and clips it can be given.
    fn takes(&self) -> Takes;

    /// Changes the weights of a network with the same settings and other ports, so that they fit these ports (`start_from`).
    /// What is new must start so that the network computes the same as before.
    fn adopt(&self, weights: &mut BTreeMap<String, Tensor>, ports: &Ports) {
        let _ = (weights, ports);
    }

    /// The name of the parameter that embeds classes: one row for each class, and a last one for "no class".
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

    /// The number of floating-point operations of one forward pass over one latent `[C, F, h, w]`; a multiplication and
    /// an addition count as two. `tokens` is the length of the text, for networks that attend to one.
    fn flops(&self, ports: &Ports, latent: [i64; 4], tokens: i64) -> i64;
}
