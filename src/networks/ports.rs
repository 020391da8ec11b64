//! What enters and leaves a network.

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
