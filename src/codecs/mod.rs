//! Codecs: a clip ↔ its latent, one a file; and the normalised latent space in which diffusion happens.

mod chunks;
mod image_autoencoder;
mod latent_space;
mod video_autoencoder;

pub use chunks::Chunks;
pub use image_autoencoder::{ImageAutoencoder, ImageAutoencoderConfig};
pub use latent_space::{LatentMoments, LatentSpace, LatentSpaceConfig};
pub use video_autoencoder::{AutoencoderConfig, Posterior, VideoAutoencoder};
