//! How a network is trained: optimizer and loop.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use tch::{Device, Kind};

use crate::torch::{Adam, Autocast, Tf32};

/// Which optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Kingma and Ba 2015.
    Adam,
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019).
    Adamw,
}

/// How the learning rate goes on after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// The paper's.
    #[default]
    Constant,
    /// Half a cosine from the last step of the warm-up down to zero, which the step after the last one would have.
    Cosine,
}

/// The optimizer of an experiment; each of a task's networks gets its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct OptimizerConfig {
    /// Which optimizer.
    pub kind: OptimizerKind,
    /// The learning rate after the warm-up.
    pub learning_rate: f64,
    /// Decay of the running means of the gradient and of its square (β1, β2 of Adam).
    #[serde(default = "betas")]
    pub betas: (f64, f64),
    /// Weight decay: decoupled from the gradient with `adamw`, added to it with `adam`. PyTorch's default for AdamW is 0.01.
    #[serde(default)]
    pub weight_decay: f64,
    /// ε of Adam, which is added to the root of the mean square before the gradient is divided by it.
    #[serde(default = "eps")]
    pub eps: f64,
    /// Steps over which the learning rate grows from zero to `learning_rate`.
    #[serde(default)]
    pub warmup: i64,
    /// The first step of the warm-up has a learning rate of zero and so changes nothing (as released by MCVD), where it
    /// else has one part of `warmup`.
    #[serde(default, skip_serializing_if = "is_false")]
    #[schemars(extend("default" = false))]
    pub warmup_from_zero: bool,
    /// What becomes of the learning rate after the warm-up.
    #[serde(default)]
    pub decay: Decay,
}

fn betas() -> (f64, f64) {
    (0.9, 0.999)
}

fn eps() -> f64 {
    1e-8
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_true(value: &bool) -> bool {
    *value
}

fn yes() -> bool {
    true
}

impl OptimizerConfig {
    /// # Errors
    /// Names the number that makes no sense.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.learning_rate > 0.0, "learning_rate must be positive, not {}", self.learning_rate);
        let (a, b) = self.betas;
        ensure!((0.0..1.0).contains(&a) && (0.0..1.0).contains(&b), "betas must lie in [0, 1), not {a} and {b}");
        ensure!(
            self.weight_decay >= 0.0 && self.eps > 0.0,
            "weight_decay must not be negative and eps must be positive"
        );
        ensure!(self.warmup >= 0, "warmup must not be negative");
        Ok(())
    }

    /// What the optimizer's step needs.
    pub fn adam(&self) -> Adam {
        Adam {
            learning_rate: self.learning_rate,
            betas: self.betas,
            weight_decay: self.weight_decay,
            eps: self.eps,
            decoupled: self.kind == OptimizerKind::Adamw,
        }
    }

    /// The learning rate of a step, counted from 0, of `steps`.
    pub fn learning_rate_at(&self, step: i64, steps: i64) -> f64 {
        let done = step + i64::from(!self.warmup_from_zero);
        let warm = if step < self.warmup { done as f64 / self.warmup as f64 } else { 1.0 };
        let decay = match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine => {
                let done = (step - self.warmup).max(0) as f64 / (steps - self.warmup).max(1) as f64;
                0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
            }
        };
        self.learning_rate * warm * decay
    }
}

/// Precision of products and convolutions; weights and norms are float32 in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, clap::ValueEnum, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// float32 throughout.
    #[default]
    F32,
    /// Products and convolutions in bfloat16.
    Bf16,
}

impl Precision {
    /// As files and options spell it.
    pub fn key(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// The type in which gradients are summed over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReduceDtype {
    /// float32.
    #[default]
    F32,
    /// bfloat16: half of the bytes; each rank's part of the mean, and each sum of parts, is rounded to 8 significant bits.
    Bf16,
}

impl ReduceDtype {
    /// As LibTorch calls it.
    pub fn kind(self) -> Kind {
        match self {
            ReduceDtype::F32 => Kind::Float,
            ReduceDtype::Bf16 => Kind::BFloat16,
        }
    }

    fn is_default(&self) -> bool {
        *self == ReduceDtype::default()
    }
}

/// How exactly the networks compute when they sample, decode or encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Numerics {
    /// Of products and convolutions.
    #[serde(default)]
    pub precision: Precision,
    /// On a GPU, those in float32 are rounded to TF32.
    #[serde(default)]
    pub tf32: bool,
}

impl Numerics {
    /// While the answer lives, this thread's calls compute so.
    pub fn begin(self, device: Device) -> (Autocast, Tf32) {
        (Autocast::bfloat16(device, self.precision == Precision::Bf16), Tf32::begin(self.tf32))
    }

    /// For people.
    pub fn words(self) -> String {
        format!("{}{}", self.precision.key(), if self.tf32 { ", float32 as TF32" } else { "" })
    }
}

impl From<Precision> for Numerics {
    fn from(precision: Precision) -> Self {
        Numerics { precision, tf32: false }
    }
}

/// The loop's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct TrainerConfig {
    /// Optimizer steps of the whole training.
    pub steps: i64,
    /// Training ends after so many minutes too, over all starts. Where it then ends depends on the machine, and a
    /// learning rate that decays does so over `steps`.
    #[serde(default)]
    pub minutes: Option<f64>,
    /// Clips of one forward pass, on each GPU.
    pub batch: i64,
    /// Forward passes whose gradients are averaged before one optimizer step: a step sees batch × accumulate × ranks clips.
    #[serde(default = "one")]
    pub accumulate: i64,
    /// Precision of forward and backward passes; weights, gradients and the optimizer stay in float32.
    #[serde(default)]
    pub precision: Precision,
    /// Type in which gradients are summed where several ranks train together. Before and after it they are float32.
    #[serde(default, skip_serializing_if = "ReduceDtype::is_default")]
    #[schemars(extend("default" = "f32"))]
    pub reduce_dtype: ReduceDtype,
    /// Each rank keeps the optimizer's moments and the moving average of its share of the parameters alone (ZeRO stage 1,
    /// Rajbhandari et al. 2020): less memory, one more exchange a step, the same results to the bit. One rank keeps all.
    #[serde(default, skip_serializing_if = "is_false")]
    #[schemars(extend("default" = false))]
    pub shard_optimizer: bool,
    /// Where to compute: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// On a GPU, products and convolutions in float32 are rounded to TF32 (10 bits of mantissa), which its tensor cores
    /// take; PyTorch does so with convolutions unless told otherwise.
    #[serde(default)]
    pub tf32: bool,
    /// On a GPU, only kernels whose results repeat to the bit, as they always do on the CPU; slower.
    #[serde(default)]
    pub deterministic: bool,
    /// Decay of the moving average of the weights, which samples are drawn with; `null` for no average.
    #[serde(default)]
    pub ema_decay: Option<f64>,
    /// The average follows the weights more closely at first: at its n-th update its decay is at most (1 + n)/(10 + n).
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    #[schemars(extend("default" = true))]
    pub ema_warmup: bool,
    /// Largest norm of the gradient over all parameters; a larger gradient is scaled down to it. `null` for no limit.
    #[serde(default)]
    pub clip_gradient: Option<f64>,
    /// Steps between checkpoints; the last step has one in any case.
    #[serde(default = "thousand")]
    pub checkpoint_every: i64,
    /// How many of the latest checkpoints stay.
    #[serde(default = "three")]
    pub keep_checkpoints: usize,
    /// Steps from one line of the log to the next; its values are means over them.
    #[serde(default = "fifty")]
    pub log_every: i64,
    /// Steps between pictures in the log.
    #[serde(default = "thousand")]
    pub picture_every: i64,
    /// After so many steps in a row whose loss or gradient is not finite, training stops.
    #[serde(default = "ten")]
    pub max_bad_steps: i64,
}

fn one() -> i64 {
    1
}
fn three() -> usize {
    3
}
fn ten() -> i64 {
    10
}
fn fifty() -> i64 {
    50
}
fn thousand() -> i64 {
    1000
}
fn auto() -> String {
    "auto".to_string()
}

impl TrainerConfig {
    /// Whether a training of so many seconds has had its time.
    pub fn is_out_of_time(&self, seconds: f64) -> bool {
        self.minutes.is_some_and(|minutes| seconds >= 60.0 * minutes)
    }

    /// Whether a training that did so many steps in so many seconds has come to its end.
    pub fn has_ended(&self, step: i64, seconds: f64) -> bool {
        step >= self.steps || self.is_out_of_time(seconds)
    }

    /// # Errors
    /// Names the number that makes no sense.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("steps", self.steps),
            ("batch", self.batch),
            ("accumulate", self.accumulate),
            ("checkpoint_every", self.checkpoint_every),
            ("keep_checkpoints", self.keep_checkpoints as i64),
            ("log_every", self.log_every),
            ("picture_every", self.picture_every),
            ("max_bad_steps", self.max_bad_steps),
        ] {
            ensure!(value >= 1, "{name} must be at least 1, not {value}");
        }
        ensure!(self.batch <= 1 << 20, "batch must be at most {}, not {}", 1 << 20, self.batch);
        if let Some(minutes) = self.minutes {
            ensure!(minutes > 0.0, "minutes must be positive, not {minutes}");
        }
        if let Some(decay) = self.ema_decay {
            ensure!((0.0..1.0).contains(&decay), "ema_decay must lie in [0, 1), not {decay}");
        }
        if let Some(norm) = self.clip_gradient {
            ensure!(norm > 0.0, "clip_gradient must be positive, not {norm}");
        }
        self.device.parse::<crate::torch::DeviceName>().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Over a warm-up of four steps the rate grows by quarters to its full value; then it stays, or falls by half a
    /// cosine over the remaining eight: from the whole, by way of the half in their middle, to zero.
    #[test]
    fn the_learning_rate_warms_up_and_decays() {
        let rates = |warmup: i64, decay: &str| -> Vec<f64> {
            let config = serde_json::json!({"kind": "adam", "learning_rate": 8.0, "warmup": warmup, "decay": decay});
            let config: OptimizerConfig = serde_json::from_value(config).unwrap();
            (0..14).map(|step| config.learning_rate_at(step, 12)).collect()
        };
        let same = |found: Vec<f64>, expected: [f64; 14]| {
            let close = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-12);
            assert!(close, "{found:?}, not {expected:?}");
        };
        same(rates(0, "constant"), [8.0; 14]);
        same(rates(4, "constant"), [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]);
        // 4·(1 + cos(kπ/8)): cos π/4 = √2/2, cos π/8 = √(2 + √2)/2
        let (a, b) = (2.0 * (2.0 + 2f64.sqrt()).sqrt(), 2.0 * 2f64.sqrt());
        let c = 2.0 * (2.0 - 2f64.sqrt()).sqrt();
        let fall = [8.0, 4.0 + a, 4.0 + b, 4.0 + c, 4.0, 4.0 - c, 4.0 - b, 4.0 - a, 0.0, 0.0];
        same(rates(4, "cosine"), [&[2.0, 4.0, 6.0, 8.0][..], &fall].concat().try_into().unwrap());
        // without a warm-up the fall takes all twelve steps
        let whole = rates(0, "cosine");
        assert!(whole[0] == 8.0 && (whole[6] - 4.0).abs() < 1e-12 && whole[12] == 0.0, "{whole:?}");
        assert!(whole[..12].is_sorted_by(|a, b| a > b) && whole[11] > 0.0, "{whole:?}");
    }
}
