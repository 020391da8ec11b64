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
//! by way of a [`SamplingJob`], `lvdm evaluate`, and a training for the pictures in its log. A [`LongVideo`] is made clip by clip
//! after a plan, by one run or by two together: a family whose models can be given frames implements [`LongVideoModel`], and
//! its line says how its runs are opened and planned ([`open_long`]). Any other makes a long video in one piece
//! ([`open_whole`]).

mod assignment;
mod blocks;
mod cascade;
mod code_transformer;
mod families;
mod first_frame;
mod latent_diffusion;
mod long_codes;
mod long_diffusion;
mod long_video;
mod model;
mod sampling;
mod whole_video;

pub use assignment::{Asked, Assignment, Seeds};
pub use cascade::{Cascade, check_base};
pub use code_transformer::{CodeTransformer, sequences};
pub use families::{open, open_long, outline_long};
pub use latent_diffusion::{FramesOfClip, LatentConditions, LatentDiffusion, ports, seen, starting_weights};
pub use long_video::{FittedClips, LongVideo, LongVideoModel, forget};
pub use model::{Accepts, Classes, ClipId, CodecBaselines, Given, KnownClasses, SampleId, TextPrompts, VideoModel};
pub use sampling::SamplingJob;
pub use whole_video::open_whole;
