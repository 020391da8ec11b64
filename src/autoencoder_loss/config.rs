//! The losses that a file can name.

use super::{AutoencoderLossConfig, CodecLossSettings, TatsLossConfig};
use crate::registry::registry;

registry! {
    /// The losses of an autoencoder's training, with the `kind` that tells them apart; those of LVDM may leave it out.
    pub enum CodecLossConfig: CodecLossSettings, default "lvdm" {
        /// Pixels, LPIPS, KL divergence and a discriminator whose weight adapts itself (LVDM).
        "lvdm" => Lvdm(AutoencoderLossConfig),
        /// Pixels, LPIPS, commitment, discriminators of frames and of clips, and feature matching, at fixed weights (TATS).
        "tats" => Tats(TatsLossConfig),
    }
}

impl Default for CodecLossConfig {
    fn default() -> Self {
        AutoencoderLossConfig::default().into()
    }
}
