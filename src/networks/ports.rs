//! What enters and leaves a network.

/// The shapes and conditions for which a network is built. They follow from the experiment, not from the network's own
/// settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    /// Channels C of a latent z.
    pub channels: i64,
    /// Channels of the prediction: C, or 2C where the variance of reverse steps is learned, too.
    pub outputs: i64,
    /// Latent frames of a clip in training.
    pub frames: i64,
    /// Height of a latent in training.
    pub height: i64,
    /// Width of a latent in training.
    pub width: i64,
    /// Whether a mask of given frames is one more input channel.
    pub mask: bool,
    /// Latent frames right before a clip that the network is given, [`Inputs::around`](super::Inputs::around).
    pub past: i64,
    /// Latent frames right after it.
    pub future: i64,
    /// Number of further input channels, [`Inputs::concat`](super::Inputs::concat).
    pub concat: i64,
    /// Whether these carry noise, and the network is told its time.
    pub concat_time: bool,
    /// Width of the encoded text that the network attends to; none without text.
    pub text: Option<i64>,
    /// Number of noise levels of given frames, each a row of a table; none where given frames are clean.
    pub levels: Option<i64>,
    /// Number of classes, without "no class"; none without class labels.
    pub classes: Option<i64>,
}

impl Ports {
    /// For latents `[C, F, h, w]`, a prediction with as many channels, and no conditions.
    pub const fn of(latent: [i64; 4]) -> Self {
        let [channels, frames, height, width] = latent;
        Ports {
            channels,
            outputs: channels,
            frames,
            height,
            width,
            mask: false,
            past: 0,
            future: 0,
            concat: 0,
            concat_time: false,
            text: None,
            levels: None,
            classes: None,
        }
    }

    /// Channels of the network's input: those of z, the mask, and the further ones.
    pub fn inputs(&self) -> i64 {
        self.channels + i64::from(self.mask) + self.concat
    }
}
