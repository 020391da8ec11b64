//! Layer norms, and what the blocks of a transformer add up between them.

use tch::{Kind, Tensor};

use super::{Init, Scope, full_precision, full_sum, precision::rounded_sum, rounded};
use crate::torch::{Autocast, GpuLayerNorm, gpu_layer_norm, has_gpu_kernels};

/// Layer normalisation over the last axis.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    /// Added to the variance.
    pub const EPS: f64 = 1e-5;

    /// Declares weight and bias `[channels]`.
    pub fn new(scope: &Scope, channels: i64) -> Self {
        LayerNorm {
            weight: scope.parameter("weight", &[channels], Init::ONES),
            bias: scope.parameter("bias", &[channels], Init::ZEROS),
        }
    }

    /// `[…, channels]` → the same shape, normalised over the last axis.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if has_gpu_kernels(x.device()) {
            return ResidualStream::new(x).normed(self);
        }
        self.by_operations(x)
    }

    /// By LibTorch's own.
    fn by_operations(&self, x: &Tensor) -> Tensor {
        let channels = self.weight.size();
        full_precision(x).layer_norm(&channels, Some(&self.weight), Some(&self.bias), Self::EPS, true)
    }

    /// Weight and bias, `[channels]` each.
    pub fn factors(&self) -> [&Tensor; 2] {
        [&self.weight, &self.bias]
    }
}

/// A sum of tokens `[…, D]` with one part that is yet to be added: on a GPU the norm that comes next adds it.
pub struct ResidualStream {
    x: Tensor,
    update: Option<Update>,
}

struct Update {
    values: Tensor,
    /// What they are multiplied by, `[…, 1, D]` over the leading axes of x or those of size one.
    gate: Option<Tensor>,
}

impl ResidualStream {
    /// It starts as `x`. On a GPU it keeps its kind, but in mixed precision what is added makes it float32.
    pub fn new(x: &Tensor) -> Self {
        ResidualStream { x: x.shallow_clone(), update: None }
    }

    /// Adds values of its shape.
    pub fn add(&mut self, values: Tensor) {
        self.set(Update { values, gate: None });
    }

    /// Adds gate·values.
    pub fn add_gated(&mut self, gate: &Tensor, values: Tensor) {
        self.set(Update { values, gate: Some(gate.shallow_clone()) });
    }

    fn set(&mut self, update: Update) {
        let _ = self.sum();
        self.update = Some(update);
    }

    /// The sum so far.
    pub fn sum(&mut self) -> Tensor {
        if let Some(Update { values, gate }) = self.update.take() {
            let sum = match gate {
                Some(gate) => &self.x + gate * values,
                None if self.is_mixed() => full_sum(&self.x, &values),
                None => &self.x + values,
            };
            let keeps = has_gpu_kernels(sum.device()) && !self.is_mixed();
            self.x = if keeps { sum.to_kind(self.x.kind()) } else { sum };
        }
        self.x.shallow_clone()
    }

    /// The sum as a map takes it: in mixed precision, on a GPU, bfloat16.
    pub fn rounded_sum(&mut self) -> Tensor {
        match self.update.take() {
            Some(Update { values, gate: None }) => rounded_sum(&self.x, &values),
            update => {
                self.update = update;
                rounded(&self.sum())
            }
        }
    }

    /// Whether what comes and goes is bfloat16, beside a sum in float32.
    fn is_mixed(&self) -> bool {
        has_gpu_kernels(self.x.device()) && Autocast::is_on(self.x.device()) && self.x.kind() != Kind::Double
    }

    /// Its layer norm.
    pub fn normed(&mut self, norm: &LayerNorm) -> Tensor {
        let [weight, bias] = norm.factors();
        match self.by_kernel(&weight.unsqueeze(0), &bias.unsqueeze(0), false, LayerNorm::EPS) {
            Some(normed) => normed,
            None => norm.by_operations(&self.sum()),
        }
    }

    /// Layer norm without weights, eps 1e-6, then ·(1 + scale) + shift (`[…, 1, D]` each): what a condition says of each token
    /// (Peebles & Xie 2022, section 3.2, adaLN).
    pub fn modulated(&mut self, scale: &Tensor, shift: &Tensor) -> Tensor {
        const EPS: f64 = 1e-6;
        let rows = |t: &Tensor| t.flatten(0, -2);
        if let Some(modulated) = self.by_kernel(&rows(scale), &rows(shift), true, EPS) {
            return modulated;
        }
        let x = full_precision(&self.sum());
        let width = x.size()[x.dim() - 1];
        x.layer_norm([width], None::<&Tensor>, None::<&Tensor>, EPS, true) * (scale + 1.0) + shift
    }

    /// By `[O, D]` factors, each for as many tokens in turn.
    fn by_kernel(&mut self, scale: &Tensor, shift: &Tensor, plus_one: bool, eps: f64) -> Option<Tensor> {
        let shape = self.x.size();
        // what a block of the way back has room for
        let widest = if self.x.kind() == Kind::Double { 1850 } else { 3900 };
        if !has_gpu_kernels(self.x.device()) || shape[shape.len() - 1] > widest {
            return None;
        }
        let half = self.is_mixed();
        let rows = |t: &Tensor| t.reshape([-1, shape[shape.len() - 1]]);
        let gate_fits =
            |update: &Update| update.gate.as_ref().is_none_or(|gate| gate.flatten(0, -2).size() == scale.size());
        if !self.update.as_ref().is_none_or(gate_fits) {
            let _ = self.sum();
        }
        let update = self.update.take();
        let gate = update.as_ref().and_then(|update| Some(update.gate.as_ref()?.flatten(0, -2)));
        let kind = if half { Kind::BFloat16 } else { self.x.kind() };
        let values = update.map(|update| rows(&update.values.to_kind(kind)));
        let x = rows(&self.x);
        let norm =
            GpuLayerNorm { x: &x, update: values.as_ref(), gate: gate.as_ref(), scale, shift, plus_one, half, eps };
        let (y, stream) = gpu_layer_norm(norm);
        self.x = stream.view(shape.as_slice());
        Some(y.view(shape.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        nn::Parameters,
        random::{Purpose, normal},
        torch::{as_on_gpu, gpu_geglu},
    };

    fn noise(kind: Kind, step: u64, shape: &[i64]) -> Tensor {
        // the numbers that bfloat16 has, in every kind
        normal(4, Purpose::Evaluation, 0, step, shape).to_kind(Kind::BFloat16).to_kind(kind)
    }

    /// Gradients of a sum in which each value of each tensor has a weight.
    fn go_back(found: &[Tensor]) {
        let weigh =
            |(t, step): (&Tensor, u64)| (t.to_kind(Kind::Double) * noise(Kind::Double, step, &t.size())).sum(None);
        found.iter().zip(5..).map(weigh).reduce(|a, b| a + b).unwrap().backward();
    }

    fn compare(what: &str, found: &[Tensor], wanted: &[Tensor], bound: f64) {
        for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
            let difference = (found - wanted).norm().double_value(&[]) / wanted.norm().double_value(&[]);
            assert!(found.size() == wanted.size() && difference < bound, "{what}, tensor {i}: {difference}");
        }
    }

    /// In mixed precision the sum stays float32, and what comes and goes is bfloat16, in whole packs and not.
    #[test]
    fn the_sum_stays_exact_in_mixed_precision() {
        for width in [32, 13] {
            let run = |mixed: bool| {
                let kind = |small| if mixed { small } else { Kind::Double };
                let tokens = [2, 3, 5, width];
                let leaf = |kind, step, shape: &[i64]| noise(kind, step, shape).set_requires_grad(true);
                let x = leaf(kind(Kind::Float), 1, &tokens);
                let [first, second] = [2, 3].map(|step| leaf(kind(Kind::BFloat16), step, &tokens));
                let modulation = leaf(kind(Kind::Float), 4, &[2, 3, 1, 3 * width]);
                let parts = modulation.chunk(3, -1);
                let _autocast = Autocast::bfloat16(Device::Cpu, mixed);
                let body = || {
                    let mut stream = ResidualStream::new(&x);
                    stream.add(first.shallow_clone());
                    let a = stream.modulated(&parts[0], &parts[1]);
                    stream.add_gated(&parts[2], second.shallow_clone());
                    let b = stream.modulated(&parts[0], &parts[1]);
                    [stream.sum(), a, b]
                };
                let found = if mixed { as_on_gpu(body) } else { body() };
                if mixed {
                    assert_eq!(found.each_ref().map(Tensor::kind), [Kind::Float, Kind::BFloat16, Kind::BFloat16]);
                }
                go_back(&found);
                let gradients = [&x, &first, &second, &modulation].map(Tensor::grad);
                found.iter().chain(&gradients).map(|t| t.detach().to_kind(Kind::Double)).collect::<Vec<_>>()
            };
            let (found, wanted) = (run(true), run(false));
            compare("sum", &found[..1], &wanted[..1], 1e-6);
            compare("norms and gradients", &found[1..], &wanted[1..], 4e-3);
        }
    }

    /// Where it starts in bfloat16, the first thing that is added makes it float32, gated or not; and at its end a map takes it
    /// rounded once.
    #[test]
    fn a_sum_that_starts_and_ends_in_bfloat16() {
        for (width, gated) in [(32, false), (13, false), (32, true)] {
            let run = |mixed: bool| {
                let kind = |small| if mixed { small } else { Kind::Double };
                let tokens = [2, 3, 5, width];
                let leaf = |step| noise(kind(Kind::BFloat16), step, &tokens).set_requires_grad(true);
                let (x, first, second) = (leaf(1), leaf(2), leaf(3));
                let gate = noise(kind(Kind::Float), 4, &[1, 1, 1, width]).set_requires_grad(true);
                let parameters = Parameters::new(Device::Cpu, 0);
                let norm = LayerNorm::new(&parameters.root(), width);
                parameters.to_kind(kind(Kind::Float));
                let _autocast = Autocast::bfloat16(Device::Cpu, mixed);
                let body = || {
                    let mut stream = ResidualStream::new(&x);
                    let a = stream.normed(&norm);
                    if gated {
                        stream.add_gated(&gate, first.shallow_clone());
                        let _ = stream.modulated(&gate, &gate);
                    } else {
                        stream.add(first.shallow_clone());
                    }
                    let b = stream.normed(&norm);
                    let sum = stream.sum();
                    stream.add(second.shallow_clone());
                    [sum, stream.rounded_sum(), a, b]
                };
                let found = if mixed { as_on_gpu(body) } else { body() };
                if mixed {
                    let kinds = [Kind::Float, Kind::BFloat16, Kind::BFloat16, Kind::BFloat16];
                    assert_eq!(found.each_ref().map(Tensor::kind), kinds);
                }
                go_back(&found);
                let [weight, bias] = norm.factors();
                let mut all: Vec<Tensor> = [&x, &first, &second, weight, bias].map(Tensor::grad).into();
                if gated {
                    all.push(gate.grad());
                }
                found.iter().chain(&all).map(|t| t.detach().to_kind(Kind::Double)).collect::<Vec<_>>()
            };
            let (found, wanted) = (run(true), run(false));
            compare("sum", &found[..1], &wanted[..1], 1e-6);
            compare("norms and gradients", &found[1..], &wanted[1..], 5e-3);
        }
    }

    /// Two blocks that are modulated and gated, and a norm with weights: by the kernels of a GPU and by LibTorch's operations,
    /// forward and backward.
    #[test]
    fn the_next_norm_adds_what_is_gated() {
        // one row of factors a clip, and one a frame; widths in whole packs and not, and more than a block has threads for
        for (clips, frames, conditions, places, width) in
            [(2, 3, 1, 4, 32), (2, 3, 3, 5, 24), (1, 2, 1, 3, 13), (2, 1, 1, 90, 1200), (1, 1, 1, 2, 4000)]
        {
            let run = |kind: Kind, by_kernel: bool| {
                let factors = if kind == Kind::BFloat16 { Kind::Float } else { kind };
                let parameters = Parameters::new(Device::Cpu, 0);
                let norm = LayerNorm::new(&parameters.root(), width);
                parameters.to_kind(factors);
                let tokens = [clips, frames, places, width];
                let leaf = |kind, step, shape: &[i64]| noise(kind, step, shape).set_requires_grad(true);
                let (x, first, second) = (leaf(kind, 1, &tokens), leaf(kind, 2, &tokens), leaf(kind, 3, &tokens));
                let modulation = leaf(factors, 4, &[clips, conditions, 1, 4 * width]);
                let parts = modulation.chunk(4, -1);
                let body = || {
                    let mut stream = ResidualStream::new(&x);
                    stream.add_gated(&parts[0], first.shallow_clone());
                    let a = stream.modulated(&parts[1], &parts[2]);
                    stream.add_gated(&parts[3], &second * &a.to_kind(kind));
                    let b = stream.normed(&norm);
                    stream.add(second.shallow_clone());
                    [a, b, stream.sum()]
                };
                let found = if by_kernel { as_on_gpu(body) } else { body() };
                go_back(&found);
                let [weight, bias] = norm.factors();
                let gradients = [&x, &first, &second, &modulation, weight, bias].map(Tensor::grad);
                assert!(!by_kernel || width > 3900 || found.iter().all(|t| t.kind() == kind));
                found.iter().chain(&gradients).map(|t| t.detach().to_kind(Kind::Double)).collect::<Vec<_>>()
            };
            let wanted = run(Kind::Double, false);
            for (kind, bound) in [(Kind::Double, 1e-12), (Kind::Float, 3e-6), (Kind::BFloat16, 1e-2)] {
                compare(&format!("{width} wide, {kind:?}"), &run(kind, true), &wanted, bound);
            }
        }
    }

    #[test]
    fn half_of_a_map_gates_the_other() {
        for width in [16, 5] {
            let run = |kind: Kind, by_kernel: bool| {
                let x = noise(kind, 1, &[3, 7, 2 * width]).set_requires_grad(true);
                let y = if by_kernel {
                    gpu_geglu(&x)
                } else {
                    let halves = x.chunk(2, -1);
                    &halves[0] * halves[1].gelu("none")
                };
                (&y * noise(kind, 2, &y.size())).sum(None).backward();
                [y.detach(), x.grad()].map(|t| t.to_kind(Kind::Double))
            };
            let wanted = run(Kind::Double, false);
            for (kind, bound) in [(Kind::Double, 1e-12), (Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)] {
                compare(&format!("{kind:?}"), &run(kind, true), &wanted, bound);
            }
        }
    }
}
