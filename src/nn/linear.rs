use tch::Tensor;

use super::{Init, Scope};
use crate::torch::{Autocast, fuses};

/// `x Wᵀ + b` over the last axis.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
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
        }
    }

    /// A linear layer that checkpoints store as a convolution of kernel size one: weight `[outputs, inputs, 1…]`.
    pub fn pointwise(scope: &Scope, inputs: i64, outputs: i64, kernel_axes: usize, init: Init) -> Self {
        let shape = [vec![outputs, inputs], vec![1; kernel_axes]].concat();
        Linear {
            weight: scope.parameter("weight", &shape, init),
            bias: Some(scope.parameter("bias", &[outputs], init)),
        }
    }

    /// `[…, inputs]` → `[…, outputs]`
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let weight = if self.weight.dim() > 2 { self.weight.flatten(1, -1) } else { self.weight.shallow_clone() };
        product(x, &weight, self.bias.as_ref())
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
    if !fuses(x) || rows < 256 || rows % BATCH != 0 {
        return x.linear(weight, bias);
    }
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let pixels = x.reshape([BATCH, rows / BATCH, 1, inputs]).permute([0, 3, 1, 2]); // channels last in memory
    let y = pixels.conv2d(&weight.reshape([outputs, inputs, 1, 1]), bias, [1; 2], [0; 2], [1; 2], 1);
    y.permute([0, 2, 3, 1]).reshape(shape)
}
