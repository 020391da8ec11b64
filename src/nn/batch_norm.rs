//! Batch normalisation.

use tch::{Tensor, no_grad};

use super::{Init, Scope, full_precision};
use crate::distributed::Ranks;

/// The mean and variance by which a batch norm normalises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistics {
    /// The batch's own, which the running ones follow: training.
    Followed,
    /// The batch's own, and the running ones stay: another pass over a batch in training.
    Batch,
    /// The running ones: evaluation.
    Running,
}

/// Batch normalisation of images or videos (eps 1e-5; the running statistics follow with momentum 0.1).
pub struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    ranks: Ranks,
}

impl BatchNorm {
    /// The bias starts at zero.
    pub fn new(scope: &Scope, channels: i64, weight: Init) -> Self {
        BatchNorm {
            weight: scope.parameter("weight", &[channels], weight),
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

    /// `[N, C, H, W]` or `[N, C, F, H, W]`, normalised by the batch's own statistics, which the running ones follow.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.by(Statistics::Followed, x)
    }

    /// `[N, C, H, W]` or `[N, C, F, H, W]`, normalised by these statistics.
    pub fn by(&self, statistics: Statistics, x: &Tensor) -> Tensor {
        const MOMENTUM: f64 = 0.1;
        const EPS: f64 = 1e-5;
        let follow = statistics == Statistics::Followed;
        if follow {
            let _ = self.num_batches_tracked.shallow_clone().g_add_scalar_(1);
        }
        let x = full_precision(x);
        let is_training = statistics != Statistics::Running;
        if self.ranks.size() == 1 || !is_training {
            let running = (follow || !is_training).then_some([&self.running_mean, &self.running_var]);
            return x.batch_norm(
                Some(&self.weight),
                Some(&self.bias),
                running.map(|[mean, _]| mean),
                running.map(|[_, variance]| variance),
                is_training,
                MOMENTUM,
                EPS,
                true,
            );
        }
        let size = x.size();
        let c = size[1];
        let count = (size.iter().product::<i64>() / c * self.ranks.size() as i64) as f64;
        let all_but_channels: Vec<i64> = (0..size.len() as i64).filter(|axis| *axis != 1).collect();
        let mean_over_all = |values: &Tensor| {
            let sum = values.sum_dim_intlist(all_but_channels.as_slice(), true, None); // [1, C, 1, 1] or [1, C, 1, 1, 1]
            self.ranks.sum_with_gradient(&sum) / count
        };
        let mean = mean_over_all(&x);
        let centred = &x - &mean;
        let variance = mean_over_all(&centred.square());
        if follow {
            no_grad(|| {
                let unbiased = &variance * (count / (count - 1.0));
                for (running, now) in [(&self.running_mean, &mean), (&self.running_var, &unbiased)] {
                    let _ = running.shallow_clone().lerp_(&now.detach().view([c]), MOMENTUM);
                }
            });
        }
        let a_channel = mean.size();
        let scale = (variance + EPS).rsqrt() * self.weight.view(a_channel.as_slice());
        centred * scale + self.bias.view(a_channel.as_slice())
    }
}
