use tch::{Kind, Tensor, no_grad};

use super::{Init, Scope};
use crate::distributed::Ranks;

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
    ranks: Ranks,
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
            ranks: Ranks::alone(),
        }
    }

    /// From now on the batch is that of all ranks together, which must be equally large.
    pub fn synchronise(&mut self, ranks: &Ranks) {
        self.ranks = ranks.clone();
    }

    /// `[N, C, H, W]`, normalised by the batch's own statistics.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let _ = self.num_batches_tracked.shallow_clone().g_add_scalar_(1);
        const MOMENTUM: f64 = 0.1;
        const EPS: f64 = 1e-5;
        let x = full_precision(x);
        if self.ranks.size() == 1 {
            return x.batch_norm(
                Some(&self.weight),
                Some(&self.bias),
                Some(&self.running_mean),
                Some(&self.running_var),
                true,
                MOMENTUM,
                EPS,
                true,
            );
        }
        let (n, c, h, w) = x.size4().expect("images [N, C, H, W]");
        let count = (n * h * w * self.ranks.size() as i64) as f64;
        let mean_over_all = |values: &Tensor| {
            let sum = values.sum_dim_intlist([0i64, 2, 3].as_slice(), true, None); // [1, C, 1, 1]
            self.ranks.sum_with_gradient(&sum) / count
        };
        let mean = mean_over_all(&x);
        let centred = &x - &mean;
        let variance = mean_over_all(&centred.square());
        no_grad(|| {
            let unbiased = &variance * (count / (count - 1.0));
            for (running, now) in [(&self.running_mean, &mean), (&self.running_var, &unbiased)] {
                let _ = running.shallow_clone().lerp_(&now.detach().view([c]), MOMENTUM);
            }
        });
        let scale = (variance + EPS).rsqrt() * self.weight.view([1, -1, 1, 1]);
        centred * scale + self.bias.view([1, -1, 1, 1])
    }
}
