//! Diffusion in latent space: noise schedule, denoisers, samplers, training objective.
//! Pixels never enter here.

mod conditioning;
mod denoiser;
mod learned_variance;
mod long_video;
mod objective;
mod sampler;
mod schedule;

pub use conditioning::{
    FrameConditioning, FrameMask, GivenLabels, GivenLatents, GivenTexts, GivenToClips, GuidanceConfig, conditioned,
};
pub use denoiser::{Denoiser, FrameConditioned, Guidance, Guided, NetworkDenoiser, Predict, Prediction};
pub use learned_variance::{HybridLoss, RespacedDdim, RespacedDdpm};
pub use long_video::{LongVideoPlan, PlanStep, Role};
pub use objective::{Loss, Objective};
pub use sampler::{Ddim, Ddpm, DpmSolver, Sampler, SamplerConfig, SamplerRun, UniPc, Variance, sample};
pub use schedule::{NoiseSchedule, ScheduleConfig, ScheduleKind};
