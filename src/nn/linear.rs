use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Init, Scope};
use crate::torch::{Autocast, fixed_cast, fixed_conv, fuses};

/// Floating-point operations of a linear map of so many rows, two a multiply-add.
pub fn linear_flops(rows: i64, inputs: i64, outputs: i64) -> i64 {
    2 * rows * inputs * outputs
}

/// A low-rank addition to a linear map (Hu et al. 2021): W + alpha / rank · up · down.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Inner width of the two maps.
    pub rank: i64,
    /// What they add is multiplied by α / rank.
    pub alpha: f64,
}

impl Adapter {
    const DOWN: &'static str = "adapter_down";
    const UP: &'static str = "adapter_up";

    /// # Errors
    /// Names the number that makes no sense.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.rank >= 1, "rank must be at least 1, not {}", self.rank);
        ensure!(self.alpha.is_finite() && self.alpha > 0.0, "alpha must be positive, not {}", self.alpha);
        Ok(())
    }

    /// Whether a parameter is an adapter's.
    pub fn owns(name: &str) -> bool {
        name.ends_with(Self::DOWN) || name.ends_with(Self::UP)
    }

    /// The map whose adapter a parameter belongs to, and which half of it that is, as PEFT calls it.
    pub fn half(name: &str) -> Option<(&str, &'static str)> {
        let (place, leaf) = name.rsplit_once('.')?;
        match leaf {
            Self::DOWN => Some((place, "lora_A")),
            Self::UP => Some((place, "lora_B")),
            _ => None,
        }
    }

    /// Adds all adapters to their maps: what is left computes the same without them.
    ///
    /// # Errors
    /// An adapter without its other half or its map.
    pub fn merge(&self, weights: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let places: Vec<String> =
            weights.keys().filter_map(|name| name.strip_suffix(Self::DOWN)).map(str::to_string).collect();
        for place in places {
            let mut take = |name: &str| weights.remove(&format!("{place}{name}"));
            let (Some(down), Some(up), Some(weight)) = (take(Self::DOWN), take(Self::UP), take("weight")) else {
                anyhow::bail!("the adapter of `{place}weight` is not whole");
            };
            weights.insert(format!("{place}weight"), weight + up.matmul(&down) * self.scale());
        }
        Ok(())
    }

    fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// `x Wᵀ + b` over the last axis.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    /// down `[rank, inputs]`, up `[outputs, rank]`, scale
    adapter: Option<(Tensor, Tensor, f64)>,
}

impl Linear {
    /// Weight `[outputs, inputs]` and bias, PyTorch's default start.
    pub fn new(scope: &Scope, inputs: i64, outputs: i64) -> Self {
        Self::with_init(scope, inputs, outputs, Init::fan_in(inputs), true)
    }

    /// Without a bias.
    pub fn without_bias(scope: &Scope, inputs: i64, outputs: i64) -> Self {
        Self::with_init(scope, inputs, outputs, Init::fan_in(inputs), false)
    }

    /// Weight and bias start as `init` says.
    pub fn with_init(scope: &Scope, inputs: i64, outputs: i64, init: Init, bias: bool) -> Self {
        Linear {
            weight: scope.parameter("weight", &[outputs, inputs], init),
            bias: bias.then(|| scope.parameter("bias", &[outputs], init)),
            adapter: None,
        }
    }

    /// With an adapter if the scope asks for them; it starts as no change.
    pub fn adapted(mut self, scope: &Scope) -> Self {
        self.adapter = scope.adapter().map(|adapter| {
            let (outputs, inputs) = self.weight.size2().expect("a matrix");
            let down = scope.parameter(Adapter::DOWN, &[adapter.rank, inputs], Init::fan_in(inputs));
            (down, scope.parameter(Adapter::UP, &[outputs, adapter.rank], Init::ZEROS), adapter.scale())
        });
        self
    }

    /// A linear layer that checkpoints store as a convolution of kernel size one: weight `[outputs, inputs, 1…]`.
    pub fn pointwise(scope: &Scope, inputs: i64, outputs: i64, kernel_axes: usize, init: Init) -> Self {
        Self::of_kernel(scope, &[vec![outputs, inputs], vec![1; kernel_axes]].concat(), [init; 2])
    }

    /// Weight and bias start each as `init` says. A weight of more than two axes, `[outputs, …]`, is one that
    /// checkpoints store as the kernel of a convolution: a row of inputs is a whole window in the order of its axes.
    pub fn of_kernel(scope: &Scope, shape: &[i64], init: [Init; 2]) -> Self {
        Linear {
            weight: scope.parameter("weight", shape, init[0]),
            bias: Some(scope.parameter("bias", &shape[..1], init[1])),
            adapter: None,
        }
    }

    /// `[…, inputs]` → `[…, outputs]`
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let weight = if self.weight.dim() > 2 { self.weight.flatten(1, -1) } else { self.weight.shallow_clone() };
        let y = product(x, &weight, self.bias.as_ref());
        match &self.adapter {
            None => y,
            Some((down, up, scale)) => y + x.linear(down, None::<&Tensor>).linear(up, None::<&Tensor>) * *scale,
        }
    }

    /// As [`Self::forward`], never in mixed precision: for the few rows that steer all others.
    pub fn forward_full(&self, x: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(x.device(), false);
        self.forward(x)
    }
}

/// x Wᵀ + b. On the CPU, where there are rows enough, as a convolution of 1×1: its kernels (oneDNN) are about twice
/// as fast as the matrix product's (BLAS) on processors that are not Intel's.
fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    const BATCH: i64 = 16; // from which on LibTorch asks oneDNN, whatever the number of threads
    let (outputs, inputs) = weight.size2().expect("a weight [outputs, inputs]");
    let rows = x.numel() as i64 / inputs;
    if !fuses(x) || rows < BATCH || rows % BATCH != 0 {
        return x.linear(&fixed_cast(weight), bias);
    }
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let pixels = x.reshape([BATCH, rows / BATCH, 1, inputs]).permute([0, 3, 1, 2]); // channels last in memory
    let kernel = weight.reshape([outputs, inputs, 1, 1]);
    let y = match fixed_conv(&pixels, &kernel, bias, 1, 0) {
        Some(y) => y,
        None if rows < 256 => return x.linear(&fixed_cast(weight), bias),
        None => pixels.conv2d(&kernel, bias, [1; 2], [0; 2], [1; 2], 1),
    };
    y.permute([0, 2, 3, 1]).reshape(shape)
}
