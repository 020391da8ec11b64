use tch::Tensor;

use super::{Adapter, Init, Scope};
use crate::torch::{Autocast, cast_weight, cast_weights, fixed_conv, fuses, has_gpu_kernels};

/// Floating-point operations of a linear map of so many rows, two a multiply-add.
pub fn linear_flops(rows: i64, inputs: i64, outputs: i64) -> i64 {
    2 * rows * inputs * outputs
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
        let y = product(x, &self.weight, self.bias.as_ref());
        match &self.adapter {
            None => y,
            Some((down, up, scale)) => y + x.linear(down, None::<&Tensor>).linear(up, None::<&Tensor>) * *scale,
        }
    }

    /// What several maps of the same inputs give, one after the other along the last axis: on a GPU by one product, whose way
    /// back is one too.
    pub fn side_by_side(maps: &[&Linear], x: &Tensor) -> Tensor {
        let is_plain = |map: &&Linear| map.adapter.is_none() && map.bias.is_none() && map.weight.dim() == 2;
        if !has_gpu_kernels(x.device()) || !maps.iter().all(is_plain) {
            return Tensor::cat(&maps.iter().map(|map| map.forward(x)).collect::<Vec<_>>(), -1);
        }
        let weights: Vec<&Tensor> = maps.iter().map(|map| &map.weight).collect();
        x.linear(&cast_weights(&weights), None::<Tensor>)
    }

    /// As [`Self::forward`], never in mixed precision: for the few rows that steer all others.
    pub fn forward_full(&self, x: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(x.device(), false);
        self.forward(x)
    }
}

/// x Wᵀ + b, W `[outputs, inputs]` or a kernel of as many values. On the CPU, where there are rows enough, as a convolution of
/// 1×1: its kernels (oneDNN) are about twice as fast as the matrix product's (BLAS) on processors that are not Intel's.
fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    const BATCH: i64 = 16; // from which on LibTorch asks oneDNN, whatever the number of threads
    let outputs = weight.size()[0];
    let inputs = weight.numel() as i64 / outputs;
    let rows = x.numel() as i64 / inputs;
    let by_blas = || {
        let weight = cast_weight(weight);
        let weight = if weight.dim() > 2 { weight.flatten(1, -1) } else { weight };
        x.linear(&weight, bias.map(cast_weight).as_ref())
    };
    if !fuses(x) || rows < BATCH || rows % BATCH != 0 {
        return by_blas();
    }
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let pixels = x.reshape([BATCH, rows / BATCH, 1, inputs]).permute([0, 3, 1, 2]); // channels last in memory
    let kernel = weight.reshape([outputs, inputs, 1, 1]);
    let y = match fixed_conv(&pixels, &kernel, bias, 1, 0) {
        Some(y) => y,
        None if rows < 256 => return by_blas(),
        None => pixels.conv2d(&kernel, bias, [1; 2], [0; 2], [1; 2], 1),
    };
    y.permute([0, 2, 3, 1]).reshape(shape)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, no_grad};

    use super::*;
    use crate::{
        nn::Parameters,
        random::{Purpose, normal},
        torch::{FixedWeights, RoundedWeights, as_on_gpu},
    };

    /// In mixed precision their weights are cast into one matrix, in a pass that is trained through and where they are fixed;
    /// gradients are those of the maps apart.
    #[test]
    fn maps_side_by_side_are_cast_together() {
        let run = |at_once: bool, passes: usize| -> Vec<Tensor> {
            let parameters = Parameters::new(Device::Cpu, 3);
            let scope = parameters.root();
            let map = |name: &str, outputs| Linear::without_bias(&scope.sub(name), 24, outputs);
            let maps = [map("q", 16), map("k", 16), map("v", 8)];
            drop(scope);
            let all = maps.each_ref();
            let x = normal(3, Purpose::Evaluation, 0, 0, &[2, 5, 24]).to_kind(Kind::BFloat16);
            let forward = || match at_once {
                true => Linear::side_by_side(&all, &x),
                false => Tensor::cat(&all.map(|map| map.forward(&x)), -1),
            };
            let _autocast = Autocast::bfloat16(Device::Cpu, true);
            as_on_gpu(|| {
                let mut found = Vec::new();
                let mut weights = RoundedWeights::new();
                for pass in 0..passes {
                    let _pass = weights.pass(Device::Cpu);
                    let y = forward();
                    let wanted = normal(3, Purpose::Evaluation, 1, pass as u64, &[2, 5, 40]);
                    (&y * wanted.to_kind(Kind::BFloat16)).sum(Kind::Float).backward();
                    found.push(y.detach());
                }
                found.extend(parameters.trainable().into_iter().map(|(_, weight)| weight.grad()));
                let _fixed = FixedWeights::new();
                found.extend([0, 1].map(|_| no_grad(forward)));
                found
            })
        };
        for (found, wanted) in run(true, 3).iter().zip(&run(false, 3)) {
            assert_eq!(found.kind(), wanted.kind());
            let error = ((found - wanted).norm() / wanted.norm()).double_value(&[]);
            assert!(error < 1e-3, "{error}");
        }
    }

    /// One product of three maps is the three products, and so is its way back; a map with a bias is taken by itself.
    #[test]
    fn maps_side_by_side_are_each_map() {
        for bias in [false, true] {
            let run = |at_once: bool| -> Vec<Tensor> {
                let parameters = Parameters::new(Device::Cpu, 3);
                let scope = parameters.root();
                let map =
                    |name: &str, outputs| Linear::with_init(&scope.sub(name), 24, outputs, Init::fan_in(24), bias);
                let maps = [map("q", 16), map("k", 16), map("v", 8)];
                drop(scope);
                let x = normal(3, Purpose::Evaluation, 0, 0, &[2, 5, 24]).set_requires_grad(true);
                let all = maps.each_ref();
                let y = if at_once {
                    as_on_gpu(|| Linear::side_by_side(&all, &x))
                } else {
                    Tensor::cat(&all.map(|map| map.forward(&x)), -1)
                };
                (&y * normal(3, Purpose::Evaluation, 1, 0, &[2, 5, 40])).sum(Kind::Float).backward();
                let gradients = parameters.trainable().into_iter().map(|(_, weight)| weight.grad());
                [y.detach(), x.grad()].into_iter().chain(gradients).collect()
            };
            for (found, wanted) in run(true).iter().zip(&run(false)) {
                let error = ((found - wanted).norm() / wanted.norm()).double_value(&[]);
                assert!(error < 1e-6, "{error}");
            }
        }
    }
}
