//! Noise paths, what is predicted on them, and the weights of their losses: formulas without a network.

use anyhow::{Result, bail};
use serde::Deserialize;
use tch::{Kind, Tensor};

use super::{
    case::Case,
    outputs::{Outputs, numbers},
};
use crate::diffusion::{
    Edm, EdmWeight, FlowTimes, LossWeight, MinSnr, NoisePath, NoiseSchedule, Predict, RectifiedFlow, ScheduleConfig,
    ScheduleKind, Times,
};

/// A schedule of β, in the reference's words.
#[derive(Deserialize)]
struct Betas {
    kind: ScheduleKind,
    linear_start: f64,
    linear_end: f64,
    timesteps: i64,
    #[serde(default)]
    zero_terminal_snr: bool,
}

impl Betas {
    fn schedule(&self, zero_terminal_snr: bool) -> Result<NoiseSchedule> {
        NoiseSchedule::new(&ScheduleConfig {
            kind: self.kind,
            steps: self.timesteps,
            beta_start: self.linear_start,
            beta_end: self.linear_end,
            zero_terminal_snr,
        })
    }
}

/// A number for each time.
fn each(times: &[f64], of: impl Fn(f64) -> f64) -> Tensor {
    Tensor::from_slice(&times.iter().map(|&t| of(t)).collect::<Vec<f64>>())
}

#[derive(Deserialize)]
struct FlowTimesCase {
    logit_mean: f64,
    logit_std: f64,
    shift: f64,
}

/// Training times of uniform numbers.
pub fn flow_times(case: &Case) -> Result<Outputs> {
    let FlowTimesCase { logit_mean: mean, logit_std: std, shift } = case.config()?;
    let u = numbers(&case.input("u")?)?;
    let normal = FlowTimes::LogitNormal { mean, std };
    let of = |times, shift| each(&u, |u| RectifiedFlow { times, shift }.time_of(u));
    Ok(vec![
        ("uniform", of(FlowTimes::Uniform, 1.0)),
        ("uniform_shifted", of(FlowTimes::Uniform, shift)),
        ("logit_normal", of(normal, 1.0)),
        ("logit_normal_shifted", of(normal, shift)),
    ])
}

#[derive(Deserialize)]
struct EdmCase {
    sigma_data: f64,
    p_mean: f64,
    p_std: f64,
}

/// EDM's preconditioning, as it is used: by what is read from an answer.
pub fn edm_precondition(case: &Case) -> Result<Outputs> {
    let EdmCase { sigma_data, p_mean, p_std } = case.config()?;
    let edm = Edm { p_mean, p_std, sigma_data, ..Edm::default() };
    let (sigma, u) = (numbers(&case.input("sigma")?)?, numbers(&case.input("u")?)?);
    // z_0 of z_t = 1 and the answer 0, and of z_t = 0 and the answer 1
    let read = |sigma: f64, z_t: f64, answer: f64| {
        Predict::Edm.read(Tensor::from(z_t), Tensor::from(answer), &edm.rates(sigma)).z_0.double_value(&[])
    };
    Ok(vec![
        ("c_skip", each(&sigma, |sigma| read(sigma, 1.0, 0.0))),
        ("c_out", each(&sigma, |sigma| read(sigma, 0.0, 1.0))),
        ("c_in", each(&sigma, |sigma| edm.input_scale(sigma))),
        ("c_noise", each(&sigma, |sigma| edm.embed(sigma))),
        ("weight", each(&sigma, |sigma| EdmWeight {}.at(Predict::Z0, &edm.rates(sigma)))),
        ("training_sigma", each(&u, |u| edm.sigma_of(u))),
    ])
}

#[derive(Deserialize)]
struct MinSnrCase {
    #[serde(flatten)]
    betas: Betas,
    gamma: f64,
}

/// Weights of the squared error, by what is predicted.
pub fn min_snr_weight(case: &Case) -> Result<Outputs> {
    let MinSnrCase { betas, gamma } = case.config()?;
    let schedule = betas.schedule(betas.zero_terminal_snr)?;
    let t = numbers(&case.input("t")?)?;
    let of = |predict| each(&t, |t| MinSnr { gamma }.at(predict, &schedule.rates(t)));
    Ok(vec![
        ("snr", each(&t, |t| (2.0 * schedule.lambda(t)).exp())),
        ("noise", of(Predict::Noise)),
        ("z_0", of(Predict::Z0)),
        ("velocity", of(Predict::Velocity)),
    ])
}

/// z_t and the velocity; both must give z_0 and the noise back.
pub fn v_prediction(case: &Case) -> Result<Outputs> {
    let betas: Betas = case.config()?;
    let schedule = betas.schedule(betas.zero_terminal_snr)?;
    let (z_0, noise, t) = (case.input("x_0")?, case.input("noise")?, numbers(&case.input("t")?)?);
    let times = Times::of_clips(&schedule, &t, case.device());
    let (z_t, velocity) = (times.add_noise(&z_0, &noise), Predict::Velocity.target(&z_0, &noise, &times));
    let double = |x: &Tensor, i: i64| x.narrow(0, i, 1).to_kind(Kind::Double);
    for (i, &t) in (0..).zip(&t) {
        let found = Predict::Velocity.read(double(&z_t, i), double(&velocity, i), &schedule.rates(t));
        let away = (found.z_0 - double(&z_0, i)).abs().max().double_value(&[]);
        if away > 1e-4 {
            bail!("z_0 is not read back from the velocity at time {t}: {away:.2e}");
        }
    }
    Ok(vec![("z_t", z_t), ("velocity", velocity)])
}

/// The stretched schedule.
pub fn zero_terminal_snr(case: &Case) -> Result<Outputs> {
    let schedule = case.config::<Betas>()?.schedule(true)?;
    Ok(vec![("betas", Tensor::from_slice(&schedule.beta)), ("alphas_cumprod", Tensor::from_slice(&schedule.alpha_bar))])
}
