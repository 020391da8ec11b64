//! The video transformer, its loss with a learned variance, and sampling on a respaced chain.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::no_grad;

use super::{Outputs, case::Case, gradient_norm};
use crate::{
    diffusion::{HybridLoss, NoiseSchedule, ScheduleConfig, ScheduleKind},
    networks::{Latte, LatteConfig, LattePorts},
    nn::Parameters,
    torch::{Autocast, backward},
    weights::{
        latte::{FIXED_EMBEDDINGS, LatteWeights},
        synthesize,
    },
};

/// The released names of the settings.
#[derive(Deserialize)]
struct ReleasedLatte {
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
    fn build(&self, case: &Case) -> Result<(Latte, Parameters)> {
        let config = LatteConfig {
            depth: self.depth,
            hidden_size: self.hidden_size,
            heads: self.num_heads,
            patch_size: self.patch_size,
            recompute: false,
        };
        config.validate()?;
        let ports = LattePorts {
            inputs: self.in_channels,
            outputs: self.in_channels * if self.learn_sigma { 2 } else { 1 },
            clip: [self.num_frames, self.input_size, self.input_size],
            classes: self.classes()?,
        };
        let parameters = Parameters::new(case.device(), 0);
        let latte = Latte::new(&parameters.root(), &config, &ports);
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
    let (x, t, label) = (case.input("x")?, case.input("t")?, case.optional("y"));
    match config.time.as_deref() {
        Some("clip") | None => ensure!(t.dim() == 1, "time: clip, and in.t is {:?}, not [B]", t.size()),
        Some("frame") => ensure!(t.dim() == 2, "time: frame, and in.t is {:?}, not [B, F]", t.size()),
        Some(other) => bail!("unknown time `{other}`"),
    }
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(vec![("output", no_grad(|| latte.forward(&x, &t, label.as_ref())))])
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
    let (z_0, noise, t, label) = (case.input("x_0")?, case.input("noise")?, case.input("t")?, case.optional("y"));
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let z_t = schedule.add_noise(&z_0, &t, &noise);
    let output = latte.forward(&z_t, &t, label.as_ref());
    let loss = HybridLoss::new(&schedule, &output, &z_0, &z_t, &t, &noise);
    backward(&loss.mean());
    Ok(vec![
        ("loss", loss.mean()),
        ("mse", loss.mse.detach()),
        ("vb", loss.vb.detach()),
        ("grad_norm", gradient_norm(&parameters)),
    ])
}
