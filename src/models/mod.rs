//! Networks, one a file. Each reads bottom-up: configuration, blocks, network.

mod autoencoder;
mod discriminator;
pub mod i3d;
mod inferred;
mod latent_space;
pub mod lpips;
mod unet3d;

pub use autoencoder::{AutoencoderConfig, Posterior, VideoAutoencoder};
pub use discriminator::{DiscriminatorConfig, PatchDiscriminator};
pub use i3d::I3d;
pub use inferred::{InferredAutoencoder, InferredUNet, Shapes};
pub use latent_space::{LatentMoments, LatentSpace};
pub use lpips::Lpips;
pub use unet3d::{AttentionKind, JointAttention, SelfAttention, UNet3d, UNetCondition, UNetConfig, UNetPorts};
