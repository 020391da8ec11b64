//! Diffusion in latent space: noise paths, denoisers, samplers, training objective.
//! Pixels never enter here.

mod ancestral;
mod betas;
mod blocks;
mod conditioning;
mod cosine_log_snr;
mod ddim;
mod denoiser;
mod edm;
mod euler;
mod flow;
mod kinds;
mod learned_variance;
mod long_video;
mod loss_weight;
mod objective;
mod path;
mod prediction;
mod reconstruction;
mod reversed;
mod sampler;
mod sampler_choice;
mod schedule;
mod solvers;
mod strided;

pub use ancestral::Ancestral;
pub use betas::{CosineSchedule, ScheduleConfig, ScheduleKind};
pub use blocks::BlockConditioning;
pub use conditioning::{
    FrameConditioning, FrameMask, GivenLabels, GivenLatents, GivenTexts, GivenToClips, GuidanceConfig, conditioned,
};
pub use cosine_log_snr::{CosineLogSnr, ToldTime};
pub use ddim::{Ddim, Ddpm, Variance};
pub use denoiser::{Denoiser, FrameConditioned, Guidance, Guided, NetworkDenoiser};
pub use edm::Edm;
pub use euler::{Euler, Heun};
pub use flow::{FlowTimes, RectifiedFlow};
pub use kinds::{LossWeightConfig, NoisePathConfig, SamplerConfig};
pub use learned_variance::{HybridLoss, RespacedDdim, RespacedDdpm};
pub use long_video::{LongVideoPlan, PlanStep, Role};
pub use loss_weight::{Constant, EdmWeight, LossWeight, MinSnr};
pub use objective::{Loss, NoisyBatch, Objective, Reduction};
pub use path::{NoisePath, NoisePathSettings, Rates, Times};
pub use prediction::{Predict, Prediction};
pub use reconstruction::{Observed, Reconstruction, resized};
pub use reversed::ReversedLinear;
pub use sampler::{Sampler, SamplerRun, sample};
pub use sampler_choice::SamplerChoice;
pub use schedule::NoiseSchedule;
pub use solvers::{DpmSolver, UniPc};
pub use strided::{Method, Strided};
