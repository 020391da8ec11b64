//! Families of models: what a trained run becomes, so that it makes videos.

mod first_frame;
mod latent_diffusion;
mod long_video;

pub use latent_diffusion::{
    Classes, ClipId, FramesOfClip, LatentConditions, LatentDiffusion, TextPrompts, ports, seen, starting_weights,
};
pub use long_video::{LongVideo, forget};
