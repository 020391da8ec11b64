//! Networks, one a file. Each reads bottom-up: configuration, blocks, network.

mod autoencoder;
mod captions;
mod chunks;
mod clip_text;
mod discriminator;
pub mod flops;
pub mod i3d;
mod image_autoencoder;
mod inferred;
mod latent_space;
pub mod lpips;
pub mod stable_diffusion;
mod text_encoder;
mod tokenizer;
mod unet3d;

pub use autoencoder::{AutoencoderConfig, Posterior, VideoAutoencoder};
pub use chunks::Chunks;
pub use clip_text::{ClipText, ClipTextConfig, TextActivation};
pub use discriminator::{DiscriminatorConfig, PatchDiscriminator};
pub use i3d::I3d;
pub use image_autoencoder::{ImageAutoencoder, ImageAutoencoderConfig};
pub use inferred::{InferredAutoencoder, InferredUNet, Shapes};
pub use latent_space::{LatentMoments, LatentSpace, LatentSpaceConfig};
pub use lpips::Lpips;
pub use text_encoder::{TextEncoder, TextEncoderConfig};
pub use tokenizer::{Tokenizer, TokenizerFiles};
pub use unet3d::{
    AttentionKind, JointAttention, Recompute, SelfAttention, UNet3d, UNetCondition, UNetConfig, UNetPorts,
};
