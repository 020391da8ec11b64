//! `scheduler_config.json` of diffusers: the noise schedule of the training, and what else it says.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::betas::schedule;
use crate::{
    diffusion::{NoiseSchedule, Predict, ScheduleConfig, ScheduleKind},
    file_format::read_json,
};

/// Samplers of networks that remove noise step by step. Which of them the folder names does not matter: a run has its
/// own sampler.
const SAMPLERS: [&str; 18] = [
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
];

/// Settings of those samplers alone.
const OF_SAMPLERS: [&str; 28] = [
    "skip_prk_steps",
    "clip_sample_range",
    "sample_max_value",
    "dynamic_thresholding_ratio",
    "eta",
    "variance_type",
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "euler_at_final",
    "lambda_min_clipped",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "final_sigmas_type",
    "interpolation_type",
    "sigma_min",
    "sigma_max",
    "predict_x0",
    "solver_p",
    "disable_corrector",
    "predictor_order",
    "corrector_order",
    "noise_sampler_seed",
    "tensor_format",
    "flow_shift",
];

/// Settings that a run samples by, whatever the folder says: (key, as a run has it).
fn of_runs() -> [(&'static str, Value); 4] {
    [
        ("timestep_spacing", json!("leading")),
        ("steps_offset", json!(1)),
        ("set_alpha_to_one", json!(false)),
        ("clip_sample", json!(false)),
    ]
}

/// What the classes of diffusers mean by keys that a file leaves out. What names no class is of the first releases, and
/// those have Stable Diffusion's schedule.
fn defaults(class: Option<&str>) -> Value {
    let Some(class) = class else {
        return json!({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012});
    };
    let [beta_start, beta_end] = match class {
        "HeunDiscreteScheduler"
        | "KDPM2DiscreteScheduler"
        | "KDPM2AncestralDiscreteScheduler"
        | "DPMSolverSDEScheduler" => [0.00085, 0.012],
        _ => [0.0001, 0.02],
    };
    let mut all = json!({"beta_schedule": "linear", "beta_start": beta_start, "beta_end": beta_end});
    if class.starts_with("DDIM") || class.starts_with("DDPM") {
        all["clip_sample"] = json!(true);
    }
    if class.starts_with("DDIM") {
        all["set_alpha_to_one"] = json!(true);
    }
    all
}

/// The noise schedule of the training and what the network predicts; those of Stable Diffusion 1.x where there is no such
/// file.
///
/// # Errors
/// Names the key of what runs have no counterpart for: another prediction or schedule, flow matching, a key that nobody
/// knows.
pub(super) fn scheduler(path: &Path) -> Result<(ScheduleConfig, Predict)> {
    if !path.exists() {
        return Ok((schedule(None, true)?, Predict::Noise));
    }
    let config = read_json(path)?;
    let context = || path.display().to_string();
    let keys = config.as_object().context("a configuration is a dictionary").with_context(context)?;
    read(keys).with_context(context)
}

fn read(keys: &Map<String, Value>) -> Result<(ScheduleConfig, Predict)> {
    let set = |key: &str| keys.get(key).filter(|value| !value.is_null());
    let number = |key: &str, default: f64| {
        set(key).map_or(Ok(default), |value| value.as_f64().with_context(|| format!("{key} = {value} is no number")))
    };
    let class = set("_class_name").map(|name| name.as_str().unwrap_or_default());
    match class {
        None => {}
        Some(name) if SAMPLERS.contains(&name) => {}
        Some(name) if name.starts_with("FlowMatch") => {
            bail!("_class_name = {name}: a network of flow matching is not supported, only one that removes noise")
        }
        Some(name @ ("LCMScheduler" | "TCDScheduler")) => bail!(
            "_class_name = {name}: the network is distilled for a few steps of that sampler, which there is none of here"
        ),
        Some(name) => bail!("_class_name = {name} is not known"),
    }
    let predict = match set("prediction_type").map(|prediction| prediction.as_str().unwrap_or_default()) {
        None | Some("epsilon") => Predict::Noise,
        Some("v_prediction") => Predict::Velocity,
        Some("sample") => Predict::Z0,
        Some(_) => bail!(
            "prediction_type = {} is not supported, only \"epsilon\", \"v_prediction\" and \"sample\"",
            keys["prediction_type"]
        ),
    };
    // these change what the network was trained on, or what sampling does with its output
    let only = [
        ("rescale_betas_zero_snr", json!(false)),
        ("thresholding", json!(false)),
        ("use_flow_sigmas", json!(false)),
        ("predict_epsilon", json!(true)),
        ("timestep_type", json!("discrete")),
    ];
    for (key, wanted) in &only {
        if let Some(value) = set(key).filter(|value| *value != wanted) {
            bail!("{key} = {value} is not supported, only {wanted}");
        }
    }
    let defaults = defaults(class);
    let meant = |key: &str| set(key).or(defaults.get(key));
    for (key, own) in of_runs() {
        if let Some(value) = meant(key).filter(|value| **value != own) {
            tracing::warn!("scheduler_config.json: {key} = {value} is not followed: runs sample with {own}");
        }
    }
    const READ: [&str; 6] =
        ["prediction_type", "trained_betas", "beta_schedule", "num_train_timesteps", "beta_start", "beta_end"];
    let of_runs = of_runs().map(|(key, _)| key);
    let only = only.map(|(key, _)| key);
    let known = |key: &str| [&READ[..], &OF_SAMPLERS, &of_runs, &only].iter().any(|keys| keys.contains(&key));
    let off = |value: &Value| value.is_null() || *value == json!(false);
    if let Some((key, value)) = keys.iter().find(|(key, value)| !key.starts_with('_') && !known(key) && !off(value)) {
        bail!("{key} = {value} is not known");
    }

    let mut schedule = schedule(None, true)?;
    let steps = number("num_train_timesteps", schedule.steps as f64)?;
    ensure!(steps.fract() == 0.0, "num_train_timesteps = {steps}: a whole number is wanted");
    schedule.steps = steps as i64;
    if let Some(betas) = set("trained_betas") {
        let values: Option<Vec<f64>> = betas.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        let values = values.context("trained_betas: a list of numbers is wanted")?;
        ensure!(
            values.len() as i64 == schedule.steps || !keys.contains_key("num_train_timesteps"),
            "trained_betas has {} numbers, num_train_timesteps is {}",
            values.len(),
            schedule.steps
        );
        return Ok((super::betas::schedule(Some(&values), true).context("trained_betas")?, predict));
    }
    schedule.kind = match meant("beta_schedule") {
        Some(kind) if *kind == "scaled_linear" => ScheduleKind::ScaledLinear,
        Some(kind) if *kind == "linear" => ScheduleKind::Linear,
        other => bail!(
            "beta_schedule = {} is not supported, only \"linear\" and \"scaled_linear\"",
            other.unwrap_or(&Value::Null)
        ),
    };
    schedule.beta_start = number("beta_start", defaults["beta_start"].as_f64().unwrap_or(schedule.beta_start))?;
    schedule.beta_end = number("beta_end", defaults["beta_end"].as_f64().unwrap_or(schedule.beta_end))?;
    NoiseSchedule::new(&schedule)?;
    Ok((schedule, predict))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(config: Value) -> Result<ScheduleConfig> {
        Ok(read(config.as_object().unwrap())?.0)
    }

    /// The folders' own files are read; whatever would change figures is refused by its key.
    #[test]
    fn what_a_scheduler_says_is_done_or_refused_by_its_key() {
        let own = json!({"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
            "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
            "clip_sample": false, "prediction_type": "epsilon", "timestep_spacing": "leading",
            "rescale_betas_zero_snr": false, "thresholding": false});
        let stable_diffusion = schedule(None, true).unwrap();
        assert_eq!(of(own.clone()).unwrap(), stable_diffusion);
        assert_eq!(of(json!({})).unwrap(), stable_diffusion);
        let with = |key: &str, value: Value| {
            let mut config = own.clone();
            config[key] = value;
            of(config)
        };
        assert!(with("num_train_timesteps", json!(999.7)).unwrap_err().to_string().contains("num_train_timesteps"));
        let linear = with("beta_schedule", json!("linear")).unwrap();
        assert_eq!((linear.kind, linear.beta_start), (ScheduleKind::Linear, 0.00085));
        // what a file leaves out is as its class has it
        for (class, start, end) in [("DDIMScheduler", 0.0001, 0.02), ("HeunDiscreteScheduler", 0.00085, 0.012)] {
            let left = of(json!({"_class_name": class})).unwrap();
            let wanted = ScheduleConfig {
                kind: ScheduleKind::Linear,
                steps: 1000,
                beta_start: start,
                beta_end: end,
                ..Default::default()
            };
            assert_eq!(left, wanted, "{class}");
        }
        let half = of(json!({"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012}));
        assert_eq!(half.unwrap(), ScheduleConfig { beta_start: 0.0001, ..stable_diffusion.clone() });
        assert_eq!(defaults(Some("DDIMScheduler"))["clip_sample"], true);
        assert_eq!(defaults(Some("DDIMScheduler"))["set_alpha_to_one"], true);
        assert_eq!(defaults(Some("PNDMScheduler"))["clip_sample"], Value::Null);
        // a list of β that is a known curve is that curve
        let curve = ScheduleConfig {
            kind: ScheduleKind::Linear,
            steps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            ..Default::default()
        };
        let betas = NoiseSchedule::new(&curve).unwrap().beta;
        assert_eq!(with("trained_betas", json!(betas)).unwrap(), curve);
        with("_class_name", json!("EulerAncestralDiscreteScheduler")).unwrap();
        with("use_karras_sigmas", json!(true)).unwrap();
        for (said, predict) in
            [("epsilon", Predict::Noise), ("v_prediction", Predict::Velocity), ("sample", Predict::Z0)]
        {
            assert_eq!(read(json!({"prediction_type": said}).as_object().unwrap()).unwrap().1, predict);
        }
        for (key, value) in [
            ("_class_name", json!("FlowMatchEulerDiscreteScheduler")),
            ("_class_name", json!("LCMScheduler")),
            ("_class_name", json!("EDMEulerScheduler")),
            ("prediction_type", json!("flow")),
            ("prediction_type", json!(1)),
            ("rescale_betas_zero_snr", json!(true)),
            ("thresholding", json!(true)),
            ("use_flow_sigmas", json!(true)),
            ("trained_betas", json!(vec![0.1, 0.3, 0.2])),
            ("trained_betas", json!("0.1")),
            ("trained_betas", json!((0..1000).map(|i| 0.001 + 1e-8 * f64::from(i * i)).collect::<Vec<_>>())),
            ("beta_schedule", json!("squaredcos_cap_v2")),
            ("beta_schedule", json!(1)),
            ("beta_start", json!("small")),
            ("shift", json!(3.0)),
            ("a_new_key", json!(true)),
        ] {
            let error = format!("{:#}", with(key, value.clone()).unwrap_err());
            assert!(error.contains(key), "{key} = {value}: {error}");
        }
    }
}
