//! Codecs: a clip ↔ its latent, one a file; and the normalised latent space in which diffusion happens.

mod chunks;
mod codebook;
mod codec;
mod config;
mod image_autoencoder;
mod latent_space;
mod pixels;
mod video_autoencoder;
mod vqgan;

pub use chunks::Chunks;
pub use codebook::{Codebook, CodebookConfig};
pub use codec::{CodecSettings, Encoded, EncodedKind, LongDecoding, Posterior, VideoCodec};
pub use config::CodecConfig;
pub use image_autoencoder::{ImageAutoencoder, ImageAutoencoderConfig};
pub use latent_space::{LatentSpace, Normalization};
pub use pixels::Pixels;
pub use video_autoencoder::{AutoencoderConfig, VideoAutoencoder};
pub use vqgan::{Vqgan, VqganConfig, VqganNorm};
