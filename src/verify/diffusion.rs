//! The denoising U-Net, schedules, samplers, and diffusion training.

use anyhow::{Result, bail};
use serde::Deserialize;
use tch::{Kind, Tensor, no_grad};

use super::{
    case::Case,
    outputs::{Outputs, gradient_norm, moved, numbers},
};
use crate::{
    diffusion::{
        Ddim, Ddpm, Denoiser, GivenLatents, GivenToClips, Guidance, GuidanceConfig, Loss, NetworkDenoiser,
        NoiseSchedule, NoisyBatch, Objective, Predict, Sampler, ScheduleConfig, ScheduleKind, Times, Variance,
        conditioned, sample,
    },
    networks::{AttentionKind, Inputs, Network, Ports, UNet3d, UNetConfig},
    nn::Parameters,
    torch::{Adam, Autocast, backward},
    train::{Ema, Optimizer, StepAround},
    weights::lvdm_checkpoint::UNET,
};

/// The released names of a U-Net's settings.
#[derive(Deserialize)]
#[serde(default)]
struct ReleasedUNet {
    in_channels: i64,
    out_channels: i64,
    model_channels: i64,
    num_res_blocks: i64,
    attention_resolutions: Vec<i64>,
    channel_mult: Vec<i64>,
    num_heads: i64,
    temporal_length: i64,
    use_relative_position: bool,
    use_scale_shift_norm: bool,
    num_classes: Option<i64>,
    use_temporal_transformer: bool,
    context_dim: Option<i64>,
    /// The checkpoint's moving average is asked for.
    ema: bool,
}

impl Default for ReleasedUNet {
    fn default() -> Self {
        ReleasedUNet {
            in_channels: 4,
            out_channels: 4,
            model_channels: 256,
            num_res_blocks: 3,
            attention_resolutions: vec![2, 4, 8],
            channel_mult: vec![1, 2, 3, 4],
            num_heads: 4,
            temporal_length: 4,
            use_relative_position: true,
            use_scale_shift_norm: true,
            num_classes: None,
            use_temporal_transformer: false,
            context_dim: None,
            ema: false,
        }
    }
}

impl ReleasedUNet {
    /// The network with synthetic parameters; where it has a mask, that is the last of its channels.
    fn build(&self, case: &Case, has_mask: bool) -> Result<(UNet3d, Parameters)> {
        let config = UNetConfig {
            channels: self.model_channels,
            multipliers: self.channel_mult.clone(),
            blocks_per_level: self.num_res_blocks,
            attention_factors: self.attention_resolutions.clone(),
            heads: self.num_heads,
            attention: if self.use_temporal_transformer { AttentionKind::Text } else { AttentionKind::Factorized },
            relative_position: self.use_relative_position,
            adaptive_norm: self.use_scale_shift_norm,
            context_width: self.context_dim.unwrap_or(768),
            ..Default::default()
        };
        config.validate()?;
        let ports = Ports {
            outputs: self.out_channels,
            mask: has_mask,
            text: config.text_width(),
            levels: self.num_classes,
            ..Ports::of([self.in_channels - i64::from(has_mask), self.temporal_length, 1, 1])
        };
        let parameters = Parameters::new(case.device(), 0);
        let unet = UNet3d::new(&parameters.root(), &config, &ports);
        case.fill(&parameters, UNET, self.ema)?;
        Ok((unet, parameters))
    }
}

fn noise_schedule(timesteps: i64, linear_start: f64, linear_end: f64) -> Result<NoiseSchedule> {
    NoiseSchedule::new(&ScheduleConfig {
        kind: ScheduleKind::ScaledLinear,
        steps: timesteps,
        beta_start: linear_start,
        beta_end: linear_end,
        ..ScheduleConfig::default()
    })
}

pub fn unet(case: &Case) -> Result<Outputs> {
    // the case's x holds all channels
    let (unet, _parameters) = case.config::<ReleasedUNet>()?.build(case, false)?;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let given = Inputs { level: case.optional("y"), text: case.optional("context"), ..Inputs::default() };
    let (x, t) = (case.input("x")?, case.input("t")?);
    Ok(vec![("eps", no_grad(|| unet.forward(&x, &t, &given)))])
}

#[derive(Deserialize)]
struct ScheduleCase {
    kind: String,
    linear_start: f64,
    linear_end: f64,
    timesteps: i64,
    ddim_steps: i64,
    eta: f64,
}

pub fn schedule(case: &Case) -> Result<Outputs> {
    let config: ScheduleCase = case.config()?;
    if config.kind != "linear" {
        bail!("unknown schedule kind `{}`", config.kind);
    }
    let schedule = noise_schedule(config.timesteps, config.linear_start, config.linear_end)?;
    let ddim = Ddim { steps: config.ddim_steps, eta: config.eta }.plan(&schedule)?;
    let each =
        |f: &dyn Fn(usize) -> f64| Tensor::from_slice(&(0..schedule.steps() as usize).map(f).collect::<Vec<f64>>());
    Ok(vec![
        ("betas", Tensor::from_slice(&schedule.beta)),
        ("alphas_cumprod", Tensor::from_slice(&schedule.alpha_bar)),
        ("posterior_variance", each(&|t| schedule.posterior_variance(t))),
        ("posterior_mean_coef1", each(&|t| schedule.posterior_mean(t).0)),
        ("posterior_mean_coef2", each(&|t| schedule.posterior_mean(t).1)),
        ("ddim_timesteps", Tensor::from_slice(&ddim.timesteps)),
        ("ddim_alphas", Tensor::from_slice(&ddim.alpha_bar)),
        ("ddim_alphas_prev", Tensor::from_slice(&ddim.alpha_bar_before)),
        ("ddim_sigmas", Tensor::from_slice(&ddim.sigma)),
    ])
}

#[derive(Deserialize)]
struct SamplerCase {
    sampler: String,
    steps: i64,
    eta: f64,
    timesteps: i64,
    linear_start: f64,
    linear_end: f64,
    mode: String,
    guidance: Option<f64>,
    #[serde(default)]
    guidance_form: Option<String>,
    cond_noise_level: Option<i64>,
    #[serde(default)]
    given_frames: i64,
    unet: ReleasedUNet,
}

pub fn sampler(case: &Case) -> Result<Outputs> {
    let config: SamplerCase = case.config()?;
    let schedule = noise_schedule(config.timesteps, config.linear_start, config.linear_end)?;
    let (unet, _parameters) = config.unet.build(case, config.mode != "unconditional")?;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let (start, noise) = (case.input("x_T")?, case.input("noise")?);
    let frames = start.size()[2];
    let indices: Vec<i64> = match config.mode.as_str() {
        "unconditional" | "empty" => vec![],
        "pred" => (0..config.given_frames).collect(),
        "interp" => vec![0, frames - 1],
        other => bail!("unknown mode `{other}`"),
    };
    let denoiser: Box<dyn Denoiser> = match config.mode.as_str() {
        "unconditional" | "empty" => Box::new(NetworkDenoiser {
            network: &unet,
            path: &schedule,
            predict: Predict::Noise,
            given: Inputs::default(),
        }),
        _ => {
            let form = match config.guidance_form.as_deref() {
                Some("interpolate") | None => Guidance::Interpolate,
                Some("cfg_original") => Guidance::CfgOriginal,
                Some(other) => bail!("unknown guidance form `{other}`"),
            };
            let level = config.cond_noise_level;
            let guidance = match config.guidance {
                Some(weight) => GuidanceConfig { weight, form, level, ..GuidanceConfig::default() },
                None => GuidanceConfig { weight: 1.0, form: Guidance::Interpolate, level, ..GuidanceConfig::default() },
            };
            let frames = case.input("cond_frames")?;
            let noise = if guidance.level.is_some() { case.input("cond_noise")? } else { frames.zeros_like() };
            let given = GivenLatents { indices: &indices, frames: &frames, noise: &noise, guidance };
            let given = GivenToClips { frames: Some(given), ..GivenToClips::default() };
            conditioned(&unet, &schedule, Predict::Noise, &start, given)?
        }
    };
    let sampler: Box<dyn Sampler> = match config.sampler.as_str() {
        "ddim" => Box::new(Ddim { steps: config.steps, eta: config.eta }),
        "ddpm" => Box::new(Ddpm { variance: Variance::Posterior }),
        other => bail!("unknown sampler `{other}`"),
    };
    let draw = |i: usize| noise.get(i as i64);
    Ok(vec![("x_0", sample(&*denoiser, &*sampler, &schedule, &start, &draw, &mut |_, _| {})?)])
}

fn objective(loss: &str, parameterization: &str) -> Result<Objective> {
    Ok(Objective {
        loss: match loss {
            "l1" => Loss::L1,
            "l2" => Loss::L2,
            other => bail!("unknown loss `{other}`"),
        },
        predict: match parameterization {
            "eps" => Predict::Noise,
            "x0" => Predict::Z0,
            other => bail!("unknown parameterization `{other}`"),
        },
        ..Objective::default()
    })
}

#[derive(Deserialize)]
struct LossCase {
    loss: String,
    parameterization: String,
    linear_start: f64,
    linear_end: f64,
    timesteps: i64,
    unet: ReleasedUNet,
}

pub fn loss(case: &Case) -> Result<Outputs> {
    let config: LossCase = case.config()?;
    let schedule = noise_schedule(config.timesteps, config.linear_start, config.linear_end)?;
    let mask = case.optional("mask");
    let (unet, parameters) = config.unet.build(case, mask.is_some())?;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let (z_0, noise, t) = (case.input("x_0")?, case.input("noise")?, case.input("t")?);
    // given frames carry the same noise, at level s
    let given = Inputs { level: mask.as_ref().and_then(|_| case.optional("s")), mask, ..Inputs::default() };
    let objective = objective(&config.loss, &config.parameterization)?;
    let at = |t: &Tensor| -> Result<Times> { Ok(Times::of_clips(&schedule, &numbers(t)?, case.device())) };
    let given_times = given.level.as_ref().map(at).transpose()?;
    let batch = NoisyBatch {
        z_0: &z_0,
        noise: &noise,
        times: &at(&t)?,
        given: &given,
        given_times: given_times.as_ref(),
        made_only: false,
    };
    let loss = objective.loss(&unet, &schedule, &batch);
    backward(&loss);
    Ok(vec![("loss", loss), ("grad_norm", gradient_norm(&parameters))])
}

#[derive(Deserialize)]
struct TraceCase {
    unet: ReleasedUNet,
    loss: String,
    timesteps: i64,
    linear_start: f64,
    linear_end: f64,
    learning_rate: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    ema_decay: f64,
    parameters: Vec<String>,
}

/// Training, in float64.
pub fn trace(case: &Case) -> Result<Outputs> {
    let config: TraceCase = case.config()?;
    let schedule = noise_schedule(config.timesteps, config.linear_start, config.linear_end)?;
    let (unet, parameters) = config.unet.build(case, false)?;
    parameters.to_kind(Kind::Double);
    let objective = objective(&config.loss, "eps")?;
    let before: Vec<_> = parameters.named().into_iter().map(|(n, t)| (n, t.detach().copy())).collect();
    let adam = Adam {
        learning_rate: config.learning_rate,
        betas: config.betas,
        weight_decay: config.weight_decay,
        eps: config.eps,
        decoupled: true,
    };
    let mut optimizer = Optimizer::new(adam, &parameters);
    let ema = Ema::new(config.ema_decay, &parameters);
    let (z_0, noise, t) = (case.input("x_0")?, case.input("noise")?, case.input("t")?);
    let mut losses = Vec::new();
    for step in 0..t.size()[0] {
        let at = |x: &Tensor| x.get(step).to_kind(Kind::Double);
        let batch = NoisyBatch {
            z_0: &at(&z_0),
            noise: &at(&noise),
            times: &Times::of_clips(&schedule, &numbers(&t.get(step))?, case.device()),
            given: &Inputs::default(),
            given_times: None,
            made_only: false,
        };
        let loss = objective.loss(&unet, &schedule, &batch);
        optimizer.zero_grad()?;
        backward(&loss);
        optimizer.step(&optimizer.gradients(), StepAround { average: Some(&ema), ..StepAround::default() })?;
        losses.push(loss.double_value(&[]));
    }
    Ok(vec![
        ("loss", Tensor::from_slice(&losses)),
        ("moved", moved(&parameters, &before, &parameters.named(), &config.parameters)?),
        ("ema_moved", moved(&parameters, &before, ema.named(), &config.parameters)?),
    ])
}
