//! Rectified flow and EDM with a network: their losses, and walks along the flow.

use anyhow::{Result, bail, ensure};
use serde::Deserialize;
use tch::{Kind, Tensor, no_grad};

use super::{
    case::Case,
    latte::ReleasedLatte,
    outputs::{Outputs, gradient_norm, numbers},
};
use crate::{
    diffusion::{
        Denoiser, Edm, EdmWeight, Euler, GivenLabels, GivenToClips, Heun, Loss, NetworkDenoiser, NoisePath, NoisyBatch,
        Objective, Predict, RectifiedFlow, Sampler, Times, conditioned, sample,
    },
    networks::{Inputs, Network},
    torch::{Autocast, backward},
};

/// The mean square, of what is predicted.
fn squared(predict: Predict) -> Objective {
    Objective { predict, loss: Loss::L2, ..Objective::default() }
}

/// Loss of a batch, of which the network is given the classes.
fn loss_of(
    objective: &Objective,
    network: &dyn Network,
    path: &dyn NoisePath,
    [z_0, noise]: [&Tensor; 2],
    times: &Times,
    given: &Inputs,
) -> Tensor {
    let batch = NoisyBatch { z_0, noise, times, given, given_times: None, made_only: false };
    objective.loss(network, path, &batch)
}

#[derive(Deserialize)]
struct FlowLossCase {
    latte: ReleasedLatte,
    time: String,
    time_scale: f64,
}

/// The network of a case is told 1000·t, as ours is.
fn check_time_scale(scale: f64) -> Result<RectifiedFlow> {
    let flow = RectifiedFlow::default();
    ensure!(scale == flow.embed(1.0), "time_scale is {scale}, and networks here are told {}·t", flow.embed(1.0));
    Ok(flow)
}

pub fn flow_loss(case: &Case) -> Result<Outputs> {
    let config: FlowLossCase = case.config()?;
    let flow = check_time_scale(config.time_scale)?;
    let (network, parameters) = config.latte.build(case)?;
    let (z_0, noise, t) = (case.input("x_0")?, case.input("noise")?, case.input("t")?);
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let times = |t: &Tensor| -> Result<Times> {
        Ok(match config.time.as_str() {
            "clip" => Times::of_clips(&flow, &numbers(t)?, case.device()),
            "frame" => Times::of_frames(&flow, &numbers(t)?, z_0.size()[2], case.device()),
            other => bail!("unknown time `{other}`"),
        })
    };
    let objective = squared(Predict::Flow);
    let given = |label: Option<Tensor>| Inputs { label, ..Inputs::default() };
    let label = case.optional("y");
    let each = |i: i64| {
        let of = |x: &Tensor| x.narrow(0, i, 1);
        let (given, times) = (given(label.as_ref().map(of)), times(&of(&t))?);
        Ok(no_grad(|| loss_of(&objective, &*network, &flow, [&of(&z_0), &of(&noise)], &times, &given)))
    };
    let per_sample = (0..z_0.size()[0]).map(each).collect::<Result<Vec<_>>>()?;
    let loss = loss_of(&objective, &*network, &flow, [&z_0, &noise], &times(&t)?, &given(label));
    backward(&loss);
    Ok(vec![("loss", loss), ("per_sample", Tensor::stack(&per_sample, 0)), ("grad_norm", gradient_norm(&parameters))])
}

#[derive(Deserialize)]
struct FlowSamplingCase {
    latte: ReleasedLatte,
    solver: String,
    steps: i64,
    shift: f64,
    guidance: Option<f64>,
    time_scale: f64,
}

pub fn flow_sampling(case: &Case) -> Result<Outputs> {
    let config: FlowSamplingCase = case.config()?;
    let flow = RectifiedFlow { shift: config.shift, ..check_time_scale(config.time_scale)? };
    let (network, _parameters) = config.latte.build(case)?;
    let steps = config.steps;
    let sampler: &dyn Sampler = match config.solver.as_str() {
        "euler" => &Euler { steps },
        "heun" => &Heun { steps },
        other => bail!("unknown solver `{other}`"),
    };
    let start = case.input("x_T")?;
    let labels = case.optional("y").map(|labels| GivenLabels { labels, guidance: config.guidance });
    ensure!(labels.is_some() || config.guidance.is_none(), "guidance without labels (in.y)");
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let given = GivenToClips { labels, ..GivenToClips::default() };
    let denoiser = conditioned(&*network, &flow, Predict::Flow, &start, given)?;
    let none = |_: usize| start.zeros_like();
    let x_0 = sample(&*denoiser, sampler, &flow, &start, &none, &mut |_, _| {})?;
    let mut times = flow.nodes(steps)?;
    times.extend(flow.clean());
    Ok(vec![("times", Tensor::from_slice(&times)), ("x_0", x_0)])
}

#[derive(Deserialize)]
struct EdmLossCase {
    latte: ReleasedLatte,
    sigma_data: f64,
}

pub fn edm_loss(case: &Case) -> Result<Outputs> {
    let config: EdmLossCase = case.config()?;
    let edm = Edm { sigma_data: config.sigma_data, ..Edm::default() };
    let (network, parameters) = config.latte.build(case)?;
    let (z_0, noise, sigma) = (case.input("x_0")?, case.input("noise")?, numbers(&case.input("sigma")?)?);
    let given = Inputs { label: case.optional("y"), ..Inputs::default() };
    let times = Times::of_clips(&edm, &sigma, case.device());
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let z_t = times.add_noise(&z_0, &noise);
    let each = |(i, &sigma): (i64, &f64)| {
        let given = Inputs { label: given.label.as_ref().map(|label| label.narrow(0, i, 1)), ..Inputs::default() };
        let denoiser = NetworkDenoiser { network: &*network, path: &edm, predict: Predict::Edm, given };
        no_grad(|| denoiser.predict(&z_t.narrow(0, i, 1), sigma).z_0)
    };
    let denoised: Vec<Tensor> = (0..).zip(&sigma).map(each).collect();
    let objective = Objective { weight: EdmWeight {}.into(), ..squared(Predict::Edm) };
    let loss = loss_of(&objective, &*network, &edm, [&z_0, &noise], &times, &given);
    backward(&loss);
    Ok(vec![
        ("denoised", Tensor::cat(&denoised, 0).to_kind(Kind::Float)),
        ("loss", loss),
        ("grad_norm", gradient_norm(&parameters)),
    ])
}
