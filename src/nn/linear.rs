use tch::Tensor;

use super::{Init, Scope};
use crate::torch::Autocast;

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
        x.linear(&weight, self.bias.as_ref())
    }

    /// As [`Self::forward`], never in mixed precision: for the few rows that steer all others.
    pub fn forward_full(&self, x: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(x.device(), false);
        self.forward(x)
    }
}
