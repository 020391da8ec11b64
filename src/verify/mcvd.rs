//! MCVD: its network, loss, schedule and sampling.

use anyhow::{Result, bail, ensure};
use serde::Deserialize;
use tch::{Kind, Tensor, no_grad};

use super::{
    case::Case,
    outputs::{Outputs, gradient_norm, numbers},
};
use crate::{
    diffusion::{
        BlockConditioning, GivenToClips, Loss, Method, NoisePathSettings, NoisyBatch, Objective, Predict, Reduction,
        ReversedLinear, Sampler, Strided, Times, conditioned, sample,
    },
    networks::{Inputs, McvdConfig, Network, NetworkSettings, Ports},
    nn::Parameters,
    torch::{Autocast, backward},
};

/// The released names of the network's settings.
#[derive(Deserialize)]
struct ReleasedMcvd {
    channels: i64,
    num_frames: i64,
    num_frames_cond: i64,
    #[serde(default)]
    num_frames_future: i64,
    image_size: i64,
    ngf: i64,
    ch_mult: Vec<i64>,
    num_res_blocks: i64,
    attn_resolutions: Vec<i64>,
    n_head_channels: i64,
    #[serde(default)]
    spade: bool,
    spade_dim: Option<i64>,
    #[serde(default = "thousand")]
    timesteps: i64,
    #[serde(default = "beta_begin")]
    beta_begin: f64,
    #[serde(default = "beta_end")]
    beta_end: f64,
}

fn thousand() -> i64 {
    1000
}

fn beta_begin() -> f64 {
    0.02
}

fn beta_end() -> f64 {
    1e-4
}

impl ReleasedMcvd {
    /// The network with the case's parameters. None are dropped, as the cases have it.
    fn build(&self, case: &Case) -> Result<(Box<dyn Network>, Parameters)> {
        let config = McvdConfig {
            channels: self.ngf,
            multipliers: self.ch_mult.clone(),
            blocks_per_level: self.num_res_blocks,
            attention_factors: self.attn_resolutions.iter().map(|size| self.image_size / size).collect(),
            head_width: self.n_head_channels,
            spatin: self.spade.then_some(self.spade_dim.unwrap_or(128)),
            dropout: 0.0,
            ..McvdConfig::default()
        };
        config.validate()?;
        let ports = Ports {
            past: self.num_frames_cond,
            future: self.num_frames_future,
            ..Ports::of([self.channels, self.num_frames, self.image_size, self.image_size])
        };
        let parameters = Parameters::new(case.device(), 0);
        let network = config.build(&parameters.root(), &ports)?;
        case.fill(&parameters, "module.unet.", false)?;
        Ok((network, parameters))
    }

    fn blocks(&self) -> BlockConditioning {
        let (past, future) = (self.num_frames_cond, self.num_frames_future);
        BlockConditioning { past, future, mask_past: 0.0, mask_future: 0.0, video_frames: None }
    }

    fn path(&self) -> ReversedLinear {
        ReversedLinear { steps: self.timesteps, beta_start: self.beta_end, beta_end: self.beta_begin }
    }

    /// `[B, F·C, H, W]` → `[B, C, F, H, W]`
    fn unstacked(&self, x: &Tensor) -> Result<Tensor> {
        let (b, fc, h, w) = x.size4()?;
        Ok(x.reshape([b, fc / self.channels, self.channels, h, w]).transpose(1, 2))
    }
}

pub fn network(case: &Case) -> Result<Outputs> {
    let config: ReleasedMcvd = case.config()?;
    let (network, _parameters) = config.build(case)?;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let (x, t) = (case.input("x")?, case.input("t")?);
    let given = Inputs { around: Some(config.unstacked(&case.input("cond")?)?), ..Inputs::default() };
    let eps = no_grad(|| network.forward(&config.unstacked(&x).expect("checked by the case"), &t, &given));
    Ok(vec![("eps", eps.transpose(1, 2).flatten(1, 2))])
}

#[derive(Deserialize)]
struct LossCase {
    #[serde(flatten)]
    network: ReleasedMcvd,
    loss: String,
}

pub fn loss(case: &Case) -> Result<Outputs> {
    let LossCase { network: config, loss } = case.config()?;
    let (network, parameters) = config.build(case)?;
    let path = config.path().build()?;
    let objective = Objective {
        loss: match loss.to_lowercase().as_str() {
            "l1" => Loss::L1,
            "l2" => Loss::L2,
            other => bail!("unknown loss `{other}`"),
        },
        reduction: Reduction::Sum,
        ..Objective::default()
    };
    let blocks = config.blocks();
    let (video, noise, labels) = (case.input("video")?, case.input("noise")?, numbers(&case.input("t")?)?);
    let given_of = |name: &str| -> Result<Vec<bool>> {
        let all = vec![true; labels.len()];
        case.optional(name).map_or(Ok(all), |mask| Ok(numbers(&mask)?.iter().map(|given| *given != 0.0).collect()))
    };
    let given: Vec<[bool; 2]> =
        given_of("mask_past")?.into_iter().zip(given_of("mask_future")?).map(|(past, future)| [past, future]).collect();
    ensure!(given.len() == labels.len(), "{} masks for {} labels", given.len(), labels.len());
    let t: Vec<f64> = labels.iter().map(|label| path.noisiest() - label).collect();
    let around = blocks.frames_around(&video, &blocks.mask(&given).to_device(case.device()));
    let z_0 = blocks.block(&video);
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let of = |first: usize, count: usize| {
        let part = |x: &Tensor| x.narrow(0, first as i64, count as i64);
        let batch = NoisyBatch {
            z_0: &part(&z_0),
            noise: &part(&noise),
            times: &Times::of_clips(&*path, &t[first..first + count], case.device()),
            given: &Inputs { around: Some(part(&around)), ..Inputs::default() },
            given_times: None,
            made_only: false,
        };
        objective.loss(&*network, &*path, &batch)
    };
    let per_sample: Vec<Tensor> = (0..t.len()).map(|i| no_grad(|| of(i, 1))).collect();
    let loss = of(0, t.len());
    backward(&loss);
    let per_sample = Tensor::stack(&per_sample, 0);
    Ok(vec![("loss", loss), ("loss_per_sample", per_sample), ("grad_norm", gradient_norm(&parameters))])
}

#[derive(Deserialize)]
struct ScheduleCase {
    timesteps: i64,
    beta_begin: f64,
    beta_end: f64,
    subsample: Option<i64>,
}

pub fn schedule(case: &Case) -> Result<Outputs> {
    let ScheduleCase { timesteps, beta_begin, beta_end, subsample } = case.config()?;
    let path = ReversedLinear { steps: timesteps, beta_start: beta_end, beta_end: beta_begin };
    let schedule = path.schedule()?;
    // from the most noise on, and what comes next
    let from_noise = |values: &[f64]| values.iter().rev().copied().collect::<Vec<f64>>();
    let next = |alphas: &[f64]| alphas[1..].iter().copied().chain([1.0]).collect::<Vec<f64>>();
    let alphas = from_noise(&schedule.alpha_bar);
    let steps = subsample.unwrap_or(timesteps);
    let walk = Strided { steps, ..Strided::default() }.start(&*path.build()?)?;
    let sub_alphas: Vec<f64> = walk.times().iter().map(|&t| schedule.alpha_bar[t as usize]).collect();
    let sub_next = next(&sub_alphas);
    let sub_betas: Vec<f64> = sub_alphas.iter().zip(&sub_next).map(|(now, next)| 1.0 - now / next).collect();
    let labels: Vec<f64> = walk.times().iter().map(|&t| (timesteps - 1) as f64 - t).collect();
    let named = [
        ("betas", from_noise(&schedule.beta)),
        ("alphas_prev", next(&alphas)),
        ("alphas", alphas),
        ("steps", labels),
        ("sub_alphas", sub_alphas),
        ("sub_alphas_prev", sub_next),
        ("sub_betas", sub_betas),
    ];
    Ok(named.into_iter().map(|(name, values)| (name, Tensor::from_slice(&values))).collect())
}

#[derive(Deserialize)]
struct SamplingCase {
    unet: ReleasedMcvd,
    sampler: String,
    subsample: Option<i64>,
    denoise: bool,
    clip: bool,
    blocks: i64,
}

pub fn sampling(case: &Case) -> Result<Outputs> {
    let config: SamplingCase = case.config()?;
    let (network, _parameters) = config.unet.build(case)?;
    let path = config.unet.path().build()?;
    let sampler = Strided {
        method: match config.sampler.as_str() {
            "ddpm" => Method::Ddpm,
            "ddim" => Method::Ddim,
            other => bail!("unknown sampler `{other}`"),
        },
        steps: config.subsample.unwrap_or(config.unet.timesteps),
        clip: config.clip,
        denoise: config.denoise,
    };
    let (start, noise) = (case.input("x_T")?, case.optional("noise"));
    let blocks = config.unet.blocks();
    let around = case.input("cond")?;
    let future = around.narrow(2, blocks.past, around.size()[2] - blocks.past);
    let mut past = around.narrow(2, 0, blocks.past);
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let mut made = Vec::new();
    for i in 0..config.blocks {
        let around = Some(Tensor::cat(&[&past, &future], 2));
        let given = GivenToClips { around, ..GivenToClips::default() };
        let start = start.get(i);
        let denoiser = conditioned(&*network, &*path, Predict::Noise, &start, given)?;
        let draw = |step: usize| noise.as_ref().expect("a case of ddpm has noise").get(i).get(step as i64);
        let block = sample(&*denoiser, &sampler, &*path, &start, &draw, &mut |_, _| {})?;
        past = blocks.next_past(&past, &block);
        made.push(block.to_kind(Kind::Float));
    }
    Ok(vec![("video", Tensor::cat(&made, 2))])
}
