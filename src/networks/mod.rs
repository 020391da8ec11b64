//! Denoising networks, one a file. Each reads bottom-up: configuration, blocks, network.
//!
//! A new one implements [`Network`] and [`NetworkSettings`] and gets its line in [`NetworkConfig`].

mod inputs;
mod latte;
mod unet3d;

use std::collections::BTreeMap;

use anyhow::Result;
use tch::Tensor;

use crate::{nn::Scope, registry::registry};

pub use inputs::Inputs;
pub use latte::{Latte, LatteConfig};
pub use unet3d::{AttentionKind, JointAttention, Recompute, SelfAttention, UNet3d, UNetConfig};

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

/// What enters and leaves a network, which its own settings do not say: the experiment does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    /// Of z.
    pub channels: i64,
    /// Channels of the prediction: those of z, and as many more where a variance is learned.
    pub outputs: i64,
    /// Frames of a clip in training.
    pub frames: i64,
    /// Height of a latent in training.
    pub height: i64,
    /// Width of a latent in training.
    pub width: i64,
    /// Whether a mask of given frames comes as one more channel.
    pub mask: bool,
    /// Channels that lie beside z, all together.
    pub concat: i64,
    /// Width of the encoded text that is attended to.
    pub text: Option<i64>,
    /// Noise levels of given frames: rows of a table.
    pub levels: Option<i64>,
    /// Classes; "no class" is one more.
    pub classes: Option<i64>,
}

impl Ports {
    /// For latents `[C, F, h, w]` of which as many channels are predicted, and nothing else.
    pub const fn of(latent: [i64; 4]) -> Self {
        let [channels, frames, height, width] = latent;
        Ports {
            channels,
            outputs: channels,
            frames,
            height,
            width,
            mask: false,
            concat: 0,
            text: None,
            levels: None,
            classes: None,
        }
    }

    /// Channels of the first layer: z, the mask, and what lies beside them.
    pub fn inputs(&self) -> i64 {
        self.channels + i64::from(self.mask) + self.concat
    }
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

    /// Width of the encoded texts that it attends to; none for a network that attends to none.
    fn text_width(&self) -> Option<i64> {
        None
    }

    /// Whether it takes a time for each frame of a clip, `[B, F]`.
    fn takes_frame_times(&self) -> bool {
        false
    }

    /// Whether it takes clips of other lengths and sizes than those of its ports.
    fn takes_other_clips(&self) -> bool {
        true
    }

    /// Fits the weights of such a network with other ports to these, so that it computes the same as long as what is new is
    /// not used.
    fn adopt(&self, weights: &mut BTreeMap<String, Tensor>, ports: &Ports) {
        let _ = (weights, ports);
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

registry! {
    /// A network's settings by `kind`; without one it is the U-Net.
    pub enum NetworkConfig: NetworkSettings, default "unet3d" {
        /// The paper's U-Net.
        "unet3d" => UNet3d(UNetConfig),
        /// A transformer whose blocks attend over places and over frames by turns.
        "latte" => Latte(LatteConfig),
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        UNetConfig::default().into()
    }
}
