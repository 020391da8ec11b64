//! What autoencoders are trained against: reconstruction, perceptual and adversarial losses, one family a file.

mod config;
mod discriminator;
mod loss;
mod lvdm;
mod tats;
mod tats_discriminator;

pub use config::CodecLossConfig;
pub use discriminator::{DiscriminatorConfig, Judged, PatchDiscriminator};
pub use loss::{CodecLoss, CodecLossSettings, TrainPass};
pub use lvdm::{
    AutoencoderLoss, AutoencoderLossConfig, DiscriminatorTerms, GeneratorTerms, PixelLoss, VIDEO_DISCRIMINATOR,
};
pub use tats::{Adversary, TatsLoss, TatsLossConfig, TatsTerms};
pub use tats_discriminator::{TatsDiscriminator, VideoDiscriminatorConfig};
