//! Normalisation layers.

use tch::{Kind, Tensor, no_grad};

use super::{FrameStack, Init, Scope, prefers_channels_last};
use crate::{
    distributed::Ranks,
    torch::{GpuNorm, composed_norm, fuses, gpu_norm, group_norm, has_gpu_kernels, takes_gpu_path},
};

/// Half precision becomes float32; float32 and float64 stay what they are.
pub fn full_precision(x: &Tensor) -> Tensor {
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
    /// Declares weight and bias `[channels]`.
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

/// The axes over which a group norm of frames takes its mean and variance, besides the channels of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// F, H and W.
    Clip,
    /// H and W of each frame.
    Frame,
    /// F at each position.
    Track,
}

impl GroupNorm {
    /// x̂·w + b. Where a `modulation` is given (`[B, 2·C]`; not over tracks), this is multiplied by 1 + its first half, and its
    /// second half is added, as a residual block takes in the time embedding. With `silu`, SiLU follows. It is one pass over
    /// memory, on the CPU and on a GPU, and the result has the kind of x where kernels of our own make it.
    pub fn of_frames(&self, x: &FrameStack, over: Over, modulation: Option<&Tensor>, silu: bool) -> FrameStack {
        self.of_places(x, over, None, modulation, silu)
    }

    /// The norm of x + added, `[B, C]` (not over tracks); with `silu`, SiLU follows.
    pub fn of_frames_plus(&self, x: &FrameStack, added: &Tensor, over: Over, silu: bool) -> FrameStack {
        if has_kernel(&x.x, x.x.size()[1], self.groups) {
            return self.of_places(x, over, Some(added), None, silu);
        }
        let added = added.repeat_interleave_self_int(x.frames, 0, None).unsqueeze(-1).unsqueeze(-1);
        self.of_frames(&x.with(&x.x + added), over, None, silu)
    }

    fn of_places(
        &self,
        x: &FrameStack,
        over: Over,
        added: Option<&Tensor>,
        modulation: Option<&Tensor>,
        silu: bool,
    ) -> FrameStack {
        let (bf, c, h, w) = x.x.size4().expect("frames [B·F, C, H, W]");
        let (b, f) = (bf / x.frames, x.frames);
        let places = x.positions().reshape(match over {
            Over::Clip => [b, f * h * w, 1, c],
            Over::Frame => [bf, h * w, 1, c],
            Over::Track => [b, f, h * w, c],
        });
        // rows of clips → rows of what is normalised
        let rows = |t: &Tensor| match over {
            Over::Frame if f > 1 => t.repeat_interleave_self_int(f, 0, None),
            _ => t.shallow_clone(),
        };
        let (weight, bias) = (self.weight.unsqueeze(0), self.bias.unsqueeze(0));
        let y = if has_kernel(&places, c, self.groups) {
            let modulation = modulation.map(rows);
            let norm = GpuNorm::of(&places, &weight, &bias, self.groups, self.eps, silu);
            gpu_norm(GpuNorm { added, modulation: modulation.as_ref(), ..norm }).0
        } else if let Some(modulation) = modulation {
            let parts = modulation.chunk(2, 1);
            let scale = &parts[0] + 1.0;
            let (scale, shift) = (weight * &scale, bias * &scale + &parts[1]);
            self.normalize_groups(&places, &rows(&scale), &rows(&shift), silu)
        } else {
            self.normalize_groups(&places, &weight, &bias, silu)
        };
        x.from_positions(&y.view([bf, h * w, c]))
    }

    /// Normalises `[B, C, F, H, W]` over F, H and W and applies SiLU. Videos with channels last in memory keep that order,
    /// and on the CPU our own kernel takes them in one pass.
    pub fn silu_of_video(&self, x: &Tensor) -> Tensor {
        let is_channels_last = takes_gpu_path(x.device()) && x.stride()[1] == 1;
        let fused = fuses(&full_precision(x)) && prefers_channels_last(x.device());
        if !(is_channels_last || fused) {
            return self.forward(x).silu();
        }
        let (b, c, f, h, w) = x.size5().expect("a video [B, C, F, H, W]");
        let places = x.permute([0, 2, 3, 4, 1]).reshape([b, f * h * w, 1, c]);
        let y = self.normalize_groups(&places, &self.weight.unsqueeze(0), &self.bias.unsqueeze(0), true);
        y.view([b, f, h, w, c]).permute([0, 4, 1, 2, 3])
    }

    /// `[N, T, C]`, over T.
    pub fn of_tokens(&self, tokens: &Tensor) -> Tensor {
        let (weight, bias) = (self.weight.unsqueeze(0), self.bias.unsqueeze(0));
        self.normalize_groups(&tokens.unsqueeze(2), &weight, &bias, false).squeeze_dim(2)
    }

    fn normalize_groups(&self, x: &Tensor, scale: &Tensor, shift: &Tensor, silu: bool) -> Tensor {
        normalize_groups(x, scale, shift, self.groups, self.eps, silu)
    }
}

/// Whether a GPU's kernel normalises this: a block takes whole groups.
fn has_kernel(x: &Tensor, channels: i64, groups: i64) -> bool {
    const WIDEST_GROUP: i64 = 256;
    has_gpu_kernels(x.device()) && channels / groups <= WIDEST_GROUP
}

/// Group normalisation of frames, of each alone, whose factors come from outside: x̂·scale + shift (`[B·F, C]` or `[1, C]`
/// each). With `silu`, SiLU follows.
pub fn normalize_frames(
    x: &FrameStack,
    scale: &Tensor,
    shift: &Tensor,
    groups: i64,
    eps: f64,
    silu: bool,
) -> FrameStack {
    x.from_positions(&normalize_groups(&x.positions().unsqueeze(2), scale, shift, groups, eps, silu).squeeze_dim(2))
}

/// Normalises `[O, S, I, C]` over S and each group's channels, multiplies by `scale` and adds `shift` (`[O, C]` or
/// `[1, C]`); with `silu`, SiLU follows. Where our own kernel does not serve, these are LibTorch's operations on memory
/// in the order that it has: LibTorch's group norm would first bring the channels to the front on a GPU.
fn normalize_groups(x: &Tensor, scale: &Tensor, shift: &Tensor, groups: i64, eps: f64, silu: bool) -> Tensor {
    if has_kernel(x, x.size()[3], groups) {
        return gpu_norm(GpuNorm::of(x, scale, shift, groups, eps, silu)).0;
    }
    if takes_gpu_path(x.device()) {
        return composed_norm(x, scale, shift, groups, eps, silu);
    }
    let x = full_precision(x);
    if fuses(&x) {
        return group_norm(&x, scale, shift, groups, eps, silu);
    }
    let (o, s, i, c) = x.size4().expect("[O, S, I, C]");
    let grouped = |t: &Tensor| t.reshape([t.size()[0], 1, 1, groups, c / groups]);
    let x = x.reshape([o, s, i, groups, c / groups]);
    let (variance, mean) = x.var_mean_correction([1, 4].as_slice(), 0, true);
    let gain = (variance + eps).rsqrt() * grouped(scale);
    let offset = grouped(shift) - mean * &gain;
    let y = offset.addcmul(&x, &gain).reshape([o, s, i, c]);
    if silu { y.silu() } else { y }
}

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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        nn::Parameters,
        random::{Purpose, normal},
    };

    /// y and the gradients of x, weight, bias, scale and shift.
    fn run(kind: Kind, over: Over, with_scale_shift: bool, silu: bool) -> Vec<Tensor> {
        let noise = |step, shape: &[i64]| normal(1, Purpose::Evaluation, 0, step, shape).to_kind(kind);
        let parameters = Parameters::new(Device::Cpu, 0);
        let norm = GroupNorm::new(&parameters.root(), 4, 8, 1e-5);
        parameters.to_kind(kind);
        tch::no_grad(|| {
            norm.weight.shallow_clone().copy_(&(noise(1, &[8]) + 1.0));
            norm.bias.shallow_clone().copy_(&noise(2, &[8]));
        });
        let leaf = |step, shape: &[i64]| noise(step, shape).set_requires_grad(true);
        // 130 positions: pieces of the kernel that are not full
        let (x, scale, shift) = (leaf(3, &[2, 8, 3, 13, 10]), leaf(4, &[2, 8]), leaf(5, &[2, 8]));
        let modulation = with_scale_shift.then(|| Tensor::cat(&[&scale, &shift], 1));
        let y = norm.of_frames(&FrameStack::fold(&(&x * 2.0 + 3.0)), over, modulation.as_ref(), silu).video();
        (&y * noise(6, &y.size())).sum(None).backward();
        let mut found = vec![y, x.grad(), norm.weight.grad(), norm.bias.grad()];
        if with_scale_shift {
            found.extend([scale.grad(), shift.grad()]);
        }
        found.iter().map(|t| t.detach().to_kind(Kind::Double)).collect()
    }

    /// float64, which has no kernel, against LibTorch's own norm.
    #[test]
    fn groups_of_frames_are_normalised_as_by_group_norm() {
        let parameters = Parameters::new(Device::Cpu, 0);
        let norm = GroupNorm::new(&parameters.root(), 4, 8, 1e-5);
        parameters.to_kind(Kind::Double);
        let x = normal(1, Purpose::Evaluation, 0, 3, &[2, 8, 3, 4, 5]).to_kind(Kind::Double) * 2.0 + 3.0;
        let error = |over, wanted: Tensor| {
            (norm.of_frames(&FrameStack::fold(&x), over, None, false).video() - wanted).abs().max().double_value(&[])
        };
        let each_frame = norm.forward(&x.transpose(1, 2).flatten(0, 1)).reshape([2, 3, 8, 4, 5]).transpose(1, 2);
        assert!(error(Over::Clip, norm.forward(&x)) < 1e-12);
        assert!(error(Over::Frame, each_frame) < 1e-12);
    }

    /// float32 runs through the kernel, float64 through LibTorch's own operations.
    #[test]
    fn one_pass_is_norm_scale_shift_and_silu() {
        for over in [Over::Clip, Over::Frame, Over::Track] {
            for (scale_shift, silu) in [(false, false), (false, true), (true, true), (true, false)] {
                if scale_shift && over == Over::Track {
                    continue;
                }
                let pairs = run(Kind::Float, over, scale_shift, silu).into_iter().zip(run(
                    Kind::Double,
                    over,
                    scale_shift,
                    silu,
                ));
                for (i, (found, wanted)) in pairs.enumerate() {
                    let difference = (&found - &wanted).norm().double_value(&[]) / wanted.norm().double_value(&[]);
                    assert!(
                        difference < 2e-6,
                        "{over:?}, scale and shift {scale_shift}, SiLU {silu}, tensor {i}: {difference}"
                    );
                }
            }
        }
    }

    type Norm<'a> = &'a dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor;

    /// A GPU's norms, which any device can compute, against LibTorch's operations and their own gradients, in float64.
    #[test]
    fn the_norm_of_a_gpu_and_its_gradients() {
        for (shape, groups, rows, silu) in [
            ([2, 5, 3, 8], 4, 2, true),
            ([3, 4, 1, 8], 4, 1, true),
            ([2, 6, 2, 8], 4, 1, false),
            ([2, 100, 1, 160], 32, 1, true),
            ([3, 70, 1, 6], 2, 3, false),
            ([2, 3, 41, 48], 16, 1, true),
            ([2, 20_000, 1, 8], 4, 1, true), // steps in pieces
        ] {
            let c = shape[3];
            let noise = |step, shape: &[i64]| normal(1, Purpose::Evaluation, 0, step, shape).to_kind(Kind::Double);
            let run = |norm: Norm| {
                let leaf = |step, shape: &[i64]| noise(step, shape).set_requires_grad(true);
                let (x, scale, shift) = (leaf(1, &shape), leaf(2, &[rows, c]), leaf(3, &[rows, c]));
                let y = norm(&(&x * 2.0 + 3.0), &scale, &shift);
                (&y * noise(4, &shape)).sum(None).backward();
                [y.detach(), x.grad(), scale.grad(), shift.grad()]
            };
            let parameters = Parameters::new(Device::Cpu, 0);
            let parts = GroupNorm::new(&parameters.root(), groups, c, 1e-5);
            let wanted = run(&|x, scale, shift| parts.normalize_groups(x, scale, shift, silu));
            let by_kernel = |x: &Tensor, scale: &Tensor, shift: &Tensor| {
                gpu_norm(GpuNorm::of(x, scale, shift, groups, 1e-5, silu)).0
            };
            if rows == 1 || shape[2] == 1 {
                compare(run(&by_kernel), &wanted, 1e-12);
            }
            compare(run(&|x, scale, shift| composed_norm(x, scale, shift, groups, 1e-5, silu)), &wanted, 1e-12);
        }
    }

    fn compare<const N: usize>(found: [Tensor; N], wanted: &[Tensor; N], bound: f64) {
        for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
            let difference = (found.to_kind(Kind::Double) - wanted).norm().double_value(&[]);
            let relative = difference / wanted.norm().double_value(&[]);
            assert!(found.size() == wanted.size() && relative < bound, "tensor {i}: {relative}");
        }
    }

    /// The kernel with all that it takes in, against the same in pieces: in float64, and in the kinds that networks use, where
    /// what is far from zero keeps its digits.
    #[test]
    fn the_kernel_adds_before_it_normalises() {
        let groups = 32;
        let noise = |step, shape: &[i64]| normal(1, Purpose::Evaluation, 0, step, shape).to_kind(Kind::Double);
        let run = |steps: i64, kind: Kind, by_kernel: bool, far: f64| {
            let shape = [2, steps, 1, 64];
            let factors = if kind == Kind::Double { kind } else { Kind::Float };
            // the numbers that bfloat16 has, in every kind
            let leaf = |kind, step, shape: &[i64], far: f64| {
                let values = (noise(step, shape) + far).to_kind(Kind::BFloat16).to_kind(kind);
                values.set_requires_grad(true)
            };
            let [x, residual] = [(1, far), (2, 0.0)].map(|(step, far)| leaf(kind, step, &shape, far));
            let [added, scale, shift] =
                [(3, 2), (4, 1), (5, 1)].map(|(step, rows)| leaf(factors, step, &[rows, 64], 0.0));
            let modulation = leaf(factors, 8, &[2, 128], 0.0);
            let (y, stream) = if by_kernel {
                let (residual, added, modulation) = (Some(&residual), Some(&added), Some(&modulation));
                let norm = GpuNorm::of(&x, &scale, &shift, groups, 1e-5, true);
                let (y, stream) = gpu_norm(GpuNorm { residual, added, modulation, ..norm });
                (y, stream.unwrap())
            } else {
                let stream = &x + &residual;
                let rounded = stream.to_kind(Kind::Double);
                let parts = modulation.chunk(2, 1);
                let (scale, shift) = (&scale * (&parts[0] + 1.0), &shift * (&parts[0] + 1.0) + &parts[1]);
                let grouped = |t: &Tensor| t.reshape([-1, 1, 1, groups, 64 / groups]);
                let values = (rounded + added.reshape([2, 1, 1, 64])).reshape([2, steps, 1, groups, 64 / groups]);
                let (variance, mean) = values.var_mean_correction([1, 4].as_slice(), 0, true);
                let u = (values - mean) * (variance + 1e-5).rsqrt() * grouped(&scale) + grouped(&shift);
                (u.reshape(shape).silu(), stream)
            };
            let loss = (&y.to_kind(Kind::Double) * noise(6, &shape)).sum(None)
                + (stream.to_kind(Kind::Double) * noise(7, &shape)).sum(None);
            loss.backward();
            assert_eq!((y.kind(), stream.kind()), (if by_kernel { kind } else { Kind::Double }, kind));
            let gradients = [&x, &residual, &added, &modulation, &scale, &shift].map(Tensor::grad);
            let [dx, dr, da, dm, ds, db] = gradients;
            [y.detach(), stream.detach(), dx, dr, da, dm, ds, db].map(|t| t.to_kind(Kind::Double))
        };
        // so many steps that they are in pieces
        const MANY: i64 = 17_000;
        for steps in [40, MANY] {
            compare(run(steps, Kind::Double, true, 3.0), &run(steps, Kind::Double, false, 3.0), 1e-11);
        }
        // LibTorch's operations see the stream as the kernel rounds it
        compare(run(40, Kind::Float, true, 100.0), &run(40, Kind::Float, false, 100.0), 2e-5);
        compare(run(40, Kind::BFloat16, true, 3.0), &run(40, Kind::BFloat16, false, 3.0), 4e-3);
        compare(run(MANY, Kind::BFloat16, true, 3.0), &run(MANY, Kind::BFloat16, false, 3.0), 4e-3);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let parameters = Parameters::new(Device::Cpu, 0);
        let norm = GroupNorm::new(&parameters.root(), 4, 8, 1e-5);
        let x = Tensor::ones([1, 8, 2, 4, 4], (Kind::Float, Device::Cpu));
        let _ = x.narrow(1, 0, 1).fill_(f64::NAN);
        let y = norm.of_frames(&FrameStack::fold(&x), Over::Clip, None, true).video();
        assert!(y.narrow(1, 0, 2).isnan().all().int64_value(&[]) == 1);
        assert!(y.narrow(1, 2, 6).isfinite().all().int64_value(&[]) == 1);
    }
}
