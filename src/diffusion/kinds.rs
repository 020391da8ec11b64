//! What an experiment can name by `kind`: noise paths, samplers, loss weights. One line each.

use super::{
    ancestral::Ancestral,
    betas::{CosineSchedule, ScheduleConfig},
    cosine_log_snr::CosineLogSnr,
    ddim::{Ddim, Ddpm},
    edm::Edm,
    euler::{Euler, Heun},
    flow::RectifiedFlow,
    learned_variance::{RespacedDdim, RespacedDdpm},
    loss_weight::{Constant, EdmWeight, LossWeight, MinSnr},
    path::NoisePathSettings,
    reversed::ReversedLinear,
    sampler::Sampler,
    solvers::{DpmSolver, UniPc},
    strided::Strided,
};
use crate::registry::registry;

registry! {
    /// A noise path's settings, under `schedule:`; one that names no kind is the paper's.
    pub enum NoisePathConfig: NoisePathSettings, default "scaled_linear" {
        /// Steps, by β.
        "scaled_linear" | "linear" => Betas(ScheduleConfig),
        /// Steps, by a cosine of ᾱ.
        "cosine" => Cosine(CosineSchedule),
        /// Steps, by β, which the network counts from the noise.
        "reversed_linear" => ReversedLinear(ReversedLinear),
        /// A cosine in continuous time.
        "cosine_log_snr" => CosineLogSnr(CosineLogSnr),
        /// A straight line.
        "rectified_flow" => RectifiedFlow(RectifiedFlow),
        /// Noise is added, and z_0 stays as it is.
        "edm" => Edm(Edm),
    }
}

impl Default for NoisePathConfig {
    fn default() -> Self {
        ScheduleConfig::default().into()
    }
}

registry! {
    /// Which sampler, as an experiment or the command line says it.
    #[derive(Copy)]
    pub enum SamplerConfig: Sampler {
        /// All steps of a schedule, each with noise.
        "ddpm" => Ddpm(Ddpm),
        /// Fewer steps, with more or less noise.
        "ddim" => Ddim(Ddim),
        /// DPM-Solver++(2M).
        "dpm_solver" => DpmSolver(DpmSolver),
        /// UniPC of order 2.
        "unipc" => UniPc(UniPc),
        /// Of first order, on straight pieces.
        "euler" => Euler(Euler),
        /// Of second order, with two calls of the network a step.
        "heun" => Heun(Heun),
        /// Evenly kept steps, each with noise: of a learned variance where there is one.
        "respaced_ddpm" => RespacedDdpm(RespacedDdpm),
        /// DDIM on evenly kept steps from T − 1 to 0.
        "respaced_ddim" => RespacedDdim(RespacedDdim),
        /// Every n-th step from T − 1 on, with or without noise.
        "strided" => Strided(Strided),
        /// Between any two times, each step with noise of a variance between two bounds, and a corrector.
        "ancestral" => Ancestral(Ancestral),
    }
}

impl Default for SamplerConfig {
    /// DDIM, 50 steps, η = 1.
    fn default() -> Self {
        Ddim::default().into()
    }
}

registry! {
    /// How much the error at each time counts, under `objective.weight:`.
    pub enum LossWeightConfig: LossWeight, default "constant" {
        /// Alike.
        "constant" => Constant(Constant),
        /// By the signal-to-noise ratio, up to a bound.
        "min_snr" => MinSnr(MinSnr),
        /// As EDM weighs z_0.
        "edm" => Edm(EdmWeight),
    }
}

impl Default for LossWeightConfig {
    fn default() -> Self {
        Constant {}.into()
    }
}
