//! The video transformer, its loss with a learned variance, and sampling on a respaced chain.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::{Tensor, no_grad};

use super::{
    case::Case,
    outputs::{Outputs, gradient_norm, numbers},
};
use crate::{
    diffusion::{
        GivenLabels, GivenToClips, HybridLoss, NoiseSchedule, Predict, RespacedDdim, RespacedDdpm, Sampler,
        ScheduleConfig, ScheduleKind, Times, conditioned, sample,
    },
    networks::{Inputs, LatteConfig, Network, NetworkSettings, Ports},
    nn::Parameters,
    torch::{Autocast, backward},
    weights::{
        latte::{FIXED_EMBEDDINGS, LatteWeights},
        synthesize,
    },
};

/// The released names of the settings.
#[derive(Deserialize)]
pub(super) struct ReleasedLatte {
    input_size: i64,
    patch_size: i64,
    in_channels: i64,
    hidden_size: i64,
    depth: i64,
    num_heads: i64,
    num_frames: i64,
    num_classes: Option<i64>,
    learn_sigma: bool,
    /// 1: no condition but time; 2: class labels.
    extras: i64,
    /// `clip`, or `frame` where each frame has a time of its own.
    time: Option<String>,
    /// The checkpoint's moving average is asked for.
    #[serde(default)]
    ema: bool,
}

impl ReleasedLatte {
    fn classes(&self) -> Result<Option<i64>> {
        Ok(match self.extras {
            1 => None,
            2 => Some(self.num_classes.context("extras 2 needs num_classes")?),
            other => bail!("extras = {other}: only 1 (no labels) and 2 (class labels) are known"),
        })
    }

    /// The network with the case's parameters: of its checkpoint, else synthetic; the fixed embeddings are their own.
    pub(super) fn build(&self, case: &Case) -> Result<(Box<dyn Network>, Parameters)> {
        let config = LatteConfig {
            depth: self.depth,
            hidden_size: self.hidden_size,
            heads: self.num_heads,
            patch_size: self.patch_size,
            recompute: false,
        };
        config.validate()?;
        let ports = Ports {
            outputs: self.in_channels * if self.learn_sigma { 2 } else { 1 },
            classes: self.classes()?,
            ..Ports::of([self.in_channels, self.num_frames, self.input_size, self.input_size])
        };
        let parameters = Parameters::new(case.device(), 0);
        let latte = config.build(&parameters.root(), &ports)?;
        match case.checkpoint() {
            None => {
                let fixed =
                    parameters.named().into_iter().filter(|(name, _)| FIXED_EMBEDDINGS.contains(&name.as_str()));
                let mut values = synthesize(&parameters.trainable(), "");
                values.extend(fixed);
                parameters.load(&values)?;
            }
            Some(path) => {
                let found = LatteWeights::read(path, self.ema)?;
                ensure!(
                    found.averaged == self.ema,
                    "{} has no moving average (`ema`), which the case asks for",
                    path.display()
                );
                found.check_embeddings(&parameters.named()).with_context(|| path.display().to_string())?;
                parameters.load(&found.tensors).with_context(|| path.display().to_string())?;
            }
        }
        Ok((latte, parameters))
    }
}

pub fn network(case: &Case) -> Result<Outputs> {
    let config: ReleasedLatte = case.config()?;
    let (latte, _parameters) = config.build(case)?;
    let (x, t) = (case.input("x")?, case.input("t")?);
    let given = Inputs { label: case.optional("y"), ..Inputs::default() };
    match config.time.as_deref() {
        Some("clip") | None => ensure!(t.dim() == 1, "time: clip, and in.t is {:?}, not [B]", t.size()),
        Some("frame") => ensure!(t.dim() == 2, "time: frame, and in.t is {:?}, not [B, F]", t.size()),
        Some(other) => bail!("unknown time `{other}`"),
    }
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(vec![("output", no_grad(|| latte.forward(&x, &t, &given)))])
}

/// The schedule of a case; its β are as they stand, whatever the number of steps.
#[derive(Deserialize)]
struct ReleasedSchedule {
    schedule: String,
    linear_start: f64,
    linear_end: f64,
    timesteps: i64,
}

impl ReleasedSchedule {
    fn build(&self) -> Result<NoiseSchedule> {
        let kind = match self.schedule.as_str() {
            "linear" => ScheduleKind::Linear,
            "scaled_linear" => ScheduleKind::ScaledLinear,
            other => bail!("unknown schedule `{other}`"),
        };
        NoiseSchedule::new(&ScheduleConfig {
            kind,
            steps: self.timesteps,
            beta_start: self.linear_start,
            beta_end: self.linear_end,
            ..ScheduleConfig::default()
        })
    }
}

#[derive(Deserialize)]
struct LossCase {
    latte: ReleasedLatte,
    #[serde(flatten)]
    schedule: ReleasedSchedule,
}

pub fn loss(case: &Case) -> Result<Outputs> {
    let config: LossCase = case.config()?;
    ensure!(config.latte.learn_sigma, "learn_sigma is false: without a learned variance there is no such loss");
    let schedule = config.schedule.build()?;
    let (latte, parameters) = config.latte.build(case)?;
    let (z_0, noise, t) = (case.input("x_0")?, case.input("noise")?, case.input("t")?);
    let given = Inputs { label: case.optional("y"), ..Inputs::default() };
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let times = Times::of_clips(&schedule, &numbers(&t)?, case.device());
    let z_t = times.add_noise(&z_0, &noise);
    let output = latte.forward(&z_t, times.embedded(), &given);
    let loss = HybridLoss::new(&schedule, &output, &z_0, &z_t, &times, &noise);
    backward(&loss.mean());
    Ok(vec![
        ("loss", loss.mean()),
        ("mse", loss.mse.detach()),
        ("vb", loss.vb.detach()),
        ("grad_norm", gradient_norm(&parameters)),
    ])
}

#[derive(Deserialize)]
struct SamplingCase {
    latte: ReleasedLatte,
    #[serde(flatten)]
    schedule: ReleasedSchedule,
    sampler: String,
    steps: i64,
    #[serde(default)]
    eta: f64,
    guidance: Option<f64>,
}

pub fn sampling(case: &Case) -> Result<Outputs> {
    let config: SamplingCase = case.config()?;
    let schedule = config.schedule.build()?;
    let (latte, _parameters) = config.latte.build(case)?;
    let sampler: Box<dyn Sampler> = match config.sampler.as_str() {
        "ddpm" => Box::new(RespacedDdpm { steps: config.steps }),
        "ddim" => Box::new(RespacedDdim { steps: config.steps, eta: config.eta }),
        other => bail!("unknown sampler `{other}`"),
    };
    let mut times = sampler.start(&schedule)?.times().to_vec();
    times.reverse();
    let (start, noise) = (case.input("x_T")?, case.input("noise")?);
    let labels = case.optional("y").map(|labels| GivenLabels { labels, guidance: config.guidance });
    ensure!(labels.is_some() || config.guidance.is_none(), "guidance without labels (in.y)");
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let given = GivenToClips { labels, ..GivenToClips::default() };
    let denoiser = conditioned(&*latte, &schedule, Predict::Noise, &start, given)?;
    let draw = |i: usize| noise.get(i as i64);
    let x_0 = sample(&*denoiser, &*sampler, &schedule, &start, &draw, &mut |_, _| {})?;
    Ok(vec![("timesteps", Tensor::from_slice(&times)), ("x_0", x_0)])
}
