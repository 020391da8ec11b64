use tch::{Kind, Tensor};

use super::{Init, Scope};

/// Half precision becomes float32; float32 and float64 stay what they are.
pub(super) fn full_precision(x: &Tensor) -> Tensor {
    match x.kind() {
        Kind::Half | Kind::BFloat16 => x.to_kind(Kind::Float),
        _ => x.shallow_clone(),
    }
}

/// Group normalisation over everything behind the channel axis.
pub struct GroupNorm {
    groups: i64,
    eps: f64,
    weight: Tensor,
    bias: Tensor,
}

impl GroupNorm {
    pub fn new(scope: &Scope, groups: i64, channels: i64, eps: f64) -> Self {
        assert!(channels % groups == 0, "{channels} channels do not divide into {groups} groups");
        GroupNorm {
            groups,
            eps,
            weight: scope.parameter("weight", &[channels], Init::ONES),
            bias: scope.parameter("bias", &[channels], Init::ZEROS),
        }
    }

    /// `[N, C, …]` → the same shape and memory order.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        full_precision(x).group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

/// Layer normalisation over the last axis (eps 1e-5).
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    pub fn new(scope: &Scope, channels: i64) -> Self {
        LayerNorm {
            weight: scope.parameter("weight", &[channels], Init::ONES),
            bias: scope.parameter("bias", &[channels], Init::ZEROS),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let channels = self.weight.size();
        full_precision(x).layer_norm(&channels, Some(&self.weight), Some(&self.bias), 1e-5, true)
    }
}

/// Batch normalisation of images; training mode updates the running statistics (momentum 0.1).
pub struct BatchNorm2d {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
}

impl BatchNorm2d {
    /// Weight starts as N(1, 0.02), bias at zero (the PatchGAN's initialisation).
    pub fn new(scope: &Scope, channels: i64) -> Self {
        BatchNorm2d {
            weight: scope.parameter("weight", &[channels], Init::Normal(1.0, 0.02)),
            bias: scope.parameter("bias", &[channels], Init::ZEROS),
            running_mean: scope.buffer("running_mean", &[channels], Init::ZEROS),
            running_var: scope.buffer("running_var", &[channels], Init::ONES),
            num_batches_tracked: scope.counter("num_batches_tracked"),
        }
    }

    /// `[N, C, H, W]`, normalised by the batch's own statistics.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let _ = self.num_batches_tracked.shallow_clone().g_add_scalar_(1);
        full_precision(x).batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            true,
            0.1,
            1e-5,
            true,
        )
    }
}
