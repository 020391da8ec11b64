//! Families of models: what a trained run becomes, so that it makes videos.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use lvdm::models::{self, SampleId, VideoModel};
//! use tch::Device;
//!
//! # fn main() -> anyhow::Result<()> {
//! let model = models::open(Path::new("runs/mine/diffusion"), Device::cuda_if_available())?;
//! let samples = [SampleId { seed: 0, sample: 0 }];
//! let videos = model.videos(&samples, &Default::default(), &mut |_, _| {})?; // u8 [1, 3, F, H, W]
//! # Ok(())
//! # }
//! ```
//!
//! [`VideoModel`] is what every family gives; [`open`] finds the family of a run by the task that its checkpoints name. A new
//! family is a file that implements the trait, and a line in `families.rs`. Whoever samples asks the trait alone: `lvdm sample`
//! by way of a [`SamplingJob`], `lvdm evaluate`, and a training for the pictures in its log. Long videos are made by two runs
//! together and in pieces, and stand beside it ([`LongVideo`]).

mod assignment;
mod families;
mod first_frame;
mod latent_diffusion;
mod long_video;
mod model;
mod sampling;

pub use assignment::{Asked, Assignment, Seeds};
pub use families::open;
pub use latent_diffusion::{ClipId, FramesOfClip, LatentConditions, LatentDiffusion, ports, seen, starting_weights};
pub use long_video::{LongVideo, forget};
pub use model::{Accepts, Classes, CodecBaselines, Given, KnownClasses, SampleId, TextPrompts, VideoModel};
pub use sampling::SamplingJob;
