//! Group normalisation.

use tch::{Kind, Tensor};

use super::{
    FrameStack, Init, Scope,
    precision::{full_precision, rounds},
    prefers_channels_last,
};
use crate::torch::{GpuNorm, Keeps, composed_norm, fuses, gpu_norm, group_norm, has_gpu_kernels, takes_gpu_path};

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
    /// memory, on the CPU and on a GPU. What a GPU's kernels make is bfloat16 in mixed precision, and else of the kind of x.
    pub fn of_frames(&self, x: &FrameStack, over: Over, modulation: Option<&Tensor>, silu: bool) -> FrameStack {
        self.of_places(x, over, Extras { modulation, ..Extras::default() }, silu).0
    }

    /// The norm of x + added, `[B, C]` (not over tracks); with `silu`, SiLU follows.
    pub fn of_frames_plus(&self, x: &FrameStack, added: &Tensor, over: Over, silu: bool) -> FrameStack {
        if has_kernel(&x.x, x.x.size()[1], self.groups) {
            return self.of_places(x, over, Extras { added: Some(added), ..Extras::default() }, silu).0;
        }
        let added = added.repeat_interleave_self_int(x.frames, 0, None).unsqueeze(-1).unsqueeze(-1);
        self.of_frames(&x.with(&x.x + added), over, None, silu)
    }

    /// The norm of x + update, and what the other branch of a residual block takes: that sum, or, where a map is what takes
    /// it, in the kind that maps take. What comes back from there is added on a GPU by the kernel of the norm's way back.
    pub fn of_stream(
        &self,
        x: &FrameStack,
        update: Option<&FrameStack>,
        over: Over,
        silu: bool,
        keeps: Keeps,
    ) -> (FrameStack, FrameStack) {
        if has_kernel(&x.x, x.x.size()[1], self.groups) {
            let (y, kept) = self.of_places(x, over, Extras { update, keeps, ..Extras::default() }, silu);
            return (y, kept.expect("what is kept"));
        }
        let sum = update.map_or_else(|| x.with(x.x.shallow_clone()), |update| x + update);
        (self.of_frames(&sum, over, None, silu), sum)
    }

    /// The norm of x and another side by side along channels, and the two in one piece, as a map takes them.
    pub fn of_pair(&self, x: FrameStack, beside: FrameStack, over: Over, silu: bool) -> (FrameStack, FrameStack) {
        if has_kernel(&x.x, self.weight.size()[0], self.groups) && x.x.kind() == beside.x.kind() {
            let extras = Extras { beside: Some(&beside), keeps: Keeps::Narrow, ..Extras::default() };
            let (y, kept) = self.of_places(&x, over, extras, silu);
            return (y, kept.expect("what is kept"));
        }
        let joined = x.with(Tensor::cat(&[&x.x, &beside.x], 1));
        drop((x, beside));
        self.of_stream(&joined, None, over, silu, Keeps::Narrow)
    }

    fn of_places(&self, x: &FrameStack, over: Over, extras: Extras, silu: bool) -> (FrameStack, Option<FrameStack>) {
        let (bf, _, h, w) = x.x.size4().expect("frames [B·F, C, H, W]");
        let (b, f) = (bf / x.frames, x.frames);
        let places_of = |x: &FrameStack| {
            x.positions().reshape(match over {
                Over::Clip => [b, f * h * w, 1, -1],
                Over::Frame => [bf, h * w, 1, -1],
                Over::Track => [b, f, h * w, -1],
            })
        };
        let places = places_of(x);
        // rows of clips → rows of what is normalised
        let rows = |t: &Tensor| match over {
            Over::Frame if f > 1 => t.repeat_interleave_self_int(f, 0, None),
            _ => t.shallow_clone(),
        };
        let back = |y: Tensor| x.from_positions(&y.view([bf, h * w, -1]));
        let (weight, bias) = (self.weight.unsqueeze(0), self.bias.unsqueeze(0));
        let Extras { beside, update, added, modulation, keeps } = extras;
        if has_kernel(&places, self.weight.size()[0], self.groups) {
            let half = rounds(&places);
            let kind = if half { Kind::BFloat16 } else { places.kind() };
            let modulation = modulation.map(rows);
            let (beside, update) = (beside.map(places_of), update.map(|update| places_of(update).to_kind(kind)));
            let norm = GpuNorm::of(&places, &weight, &bias, self.groups, self.eps, silu);
            let (beside, modulation, update) = (beside.as_ref(), modulation.as_ref(), update.as_ref());
            let (y, kept) = gpu_norm(GpuNorm { beside, update, added, modulation, half, keeps, ..norm });
            return (back(y), kept.map(back));
        }
        let y = if let Some(modulation) = modulation {
            let parts = modulation.chunk(2, 1);
            let scale = &parts[0] + 1.0;
            let (scale, shift) = (weight * &scale, bias * &scale + &parts[1]);
            self.normalize_groups(&places, &rows(&scale), &rows(&shift), silu)
        } else {
            self.normalize_groups(&places, &weight, &bias, silu)
        };
        (back(y), None)
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

    /// The norm over T of tokens `[N, T, C]`, and the tokens, for the sum that they take part in besides.
    pub fn of_tokens(&self, tokens: &Tensor) -> (Tensor, Tensor) {
        let (weight, bias) = (self.weight.unsqueeze(0), self.bias.unsqueeze(0));
        let places = tokens.unsqueeze(2);
        if has_kernel(tokens, tokens.size()[2], self.groups) {
            let norm = GpuNorm::of(&places, &weight, &bias, self.groups, self.eps, false);
            let (y, kept) = gpu_norm(GpuNorm { half: rounds(tokens), keeps: Keeps::Stream, ..norm });
            return (y.squeeze_dim(2), kept.expect("what is kept").squeeze_dim(2));
        }
        let y = self.normalize_groups(&places, &weight, &bias, false);
        (y.squeeze_dim(2), tokens.shallow_clone())
    }

    fn normalize_groups(&self, x: &Tensor, scale: &Tensor, shift: &Tensor, silu: bool) -> Tensor {
        normalize_groups(x, scale, shift, self.groups, self.eps, silu, true)
    }
}

/// What a norm of frames takes in and gives besides.
struct Extras<'a> {
    beside: Option<&'a FrameStack>,
    update: Option<&'a FrameStack>,
    added: Option<&'a Tensor>,
    modulation: Option<&'a Tensor>,
    keeps: Keeps,
}

impl Default for Extras<'_> {
    fn default() -> Self {
        Extras { beside: None, update: None, added: None, modulation: None, keeps: Keeps::Nothing }
    }
}

/// Whether a GPU's kernel normalises this: a block takes whole groups.
fn has_kernel(x: &Tensor, channels: i64, groups: i64) -> bool {
    const WIDEST_GROUP: i64 = 256;
    has_gpu_kernels(x.device()) && channels / groups <= WIDEST_GROUP
}

/// Group normalisation of frames, of each alone, whose factors come from outside: x̂·scale + shift (`[B·F, C]` or `[1, C]`
/// each). With `silu`, SiLU follows. In mixed precision a GPU's kernel makes bfloat16 of it where it `may_round`, as what a
/// convolution takes may.
pub fn normalize_frames(
    x: &FrameStack,
    [scale, shift]: [&Tensor; 2],
    groups: i64,
    eps: f64,
    silu: bool,
    may_round: bool,
) -> FrameStack {
    let places = x.positions().unsqueeze(2);
    x.from_positions(&normalize_groups(&places, scale, shift, groups, eps, silu, may_round).squeeze_dim(2))
}

/// Normalises `[O, S, I, C]` over S and each group's channels, multiplies by `scale` and adds `shift` (`[O, C]` or
/// `[1, C]`); with `silu`, SiLU follows. Where our own kernel does not serve, these are LibTorch's operations on memory
/// in the order that it has: LibTorch's group norm would first bring the channels to the front on a GPU.
fn normalize_groups(
    x: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    groups: i64,
    eps: f64,
    silu: bool,
    may_round: bool,
) -> Tensor {
    if has_kernel(x, x.size()[3], groups) {
        let half = may_round && rounds(x);
        return gpu_norm(GpuNorm { half, ..GpuNorm::of(x, scale, shift, groups, eps, silu) }).0;
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
        // of a stream of a kind, and what is added to it and comes out of another
        let run = |steps: i64, [kind, small]: [Kind; 2], by_kernel: bool, far: f64| {
            let shape = [2, steps, 1, 64];
            let factors = if kind == Kind::Double { kind } else { Kind::Float };
            // the numbers that bfloat16 has, in every kind
            let leaf = |kind, step, shape: &[i64], far: f64| {
                let values = (noise(step, shape) + far).to_kind(Kind::BFloat16).to_kind(kind);
                values.set_requires_grad(true)
            };
            let (x, update) = (leaf(kind, 1, &shape, far), leaf(small, 2, &shape, 0.0));
            let [added, scale, shift] =
                [(3, 2), (4, 1), (5, 1)].map(|(step, rows)| leaf(factors, step, &[rows, 64], 0.0));
            let modulation = leaf(factors, 8, &[2, 128], 0.0);
            let (y, stream) = if by_kernel {
                let (update, added, modulation) = (Some(&update), Some(&added), Some(&modulation));
                let norm = GpuNorm::of(&x, &scale, &shift, groups, 1e-5, true);
                let (half, keeps) = (kind != small, Keeps::Stream);
                let (y, stream) = gpu_norm(GpuNorm { update, added, modulation, half, keeps, ..norm });
                (y, stream.unwrap())
            } else {
                let stream = &x + &update;
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
            assert_eq!((y.kind(), stream.kind()), (if by_kernel { small } else { Kind::Double }, kind));
            let gradients = [&x, &update, &added, &modulation, &scale, &shift].map(Tensor::grad);
            let [dx, dr, da, dm, ds, db] = gradients;
            [y.detach(), stream.detach(), dx, dr, da, dm, ds, db].map(|t| t.to_kind(Kind::Double))
        };
        // so many steps that they are in pieces
        const MANY: i64 = 17_000;
        let [double, single, half] = [Kind::Double, Kind::Float, Kind::BFloat16].map(|kind| [kind; 2]);
        for steps in [40, MANY] {
            compare(run(steps, double, true, 3.0), &run(steps, double, false, 3.0), 1e-11);
        }
        // LibTorch's operations see the stream as the kernel rounds it
        compare(run(40, single, true, 100.0), &run(40, single, false, 100.0), 2e-5);
        for kinds in [half, [Kind::Float, Kind::BFloat16]] {
            for steps in [40, MANY] {
                compare(run(steps, kinds, true, 3.0), &run(steps, kinds, false, 3.0), 4e-3);
            }
        }
    }

    /// What comes back to the sum and to a map of it besides is added to what comes back through the norm; and where only that
    /// was used, it is all.
    #[test]
    fn what_is_kept_beside_a_norm() {
        let noise = |step, shape: &[i64]| normal(1, Purpose::Evaluation, 0, step, shape).to_kind(Kind::Double);
        let shape = [2, 40, 1, 64];
        let run = |kind: Kind, half: bool, keeps: Keeps, weights: [f64; 2]| {
            let factors = if kind == Kind::Double { kind } else { Kind::Float };
            let x = noise(1, &shape).to_kind(Kind::BFloat16).to_kind(kind).set_requires_grad(true);
            let [scale, shift] = [2, 3].map(|step| noise(step, &[1, 64]).to_kind(factors));
            let norm = GpuNorm::of(&x, &scale, &shift, 32, 1e-5, true);
            let (y, kept) = gpu_norm(GpuNorm { half, keeps, ..norm });
            let kept = kept.unwrap();
            let small = if half { Kind::BFloat16 } else { kind };
            assert_eq!((y.kind(), kept.kind()), (small, if keeps == Keeps::Narrow { small } else { kind }));
            let parts = [(&y, 4, weights[0]), (&kept, 5, weights[1])]
                .map(|(t, step, weight)| (t.to_kind(Kind::Double) * noise(step, &shape)).sum(None) * weight);
            let [first, second] = parts;
            let loss = if weights[0] == 0.0 { second } else { first + second };
            loss.backward();
            [kept.detach(), x.grad()].map(|t| t.to_kind(Kind::Double))
        };
        for weights in [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]] {
            let wanted = run(Kind::Double, false, Keeps::Stream, weights);
            let kept = noise(1, &shape).to_kind(Kind::BFloat16).to_kind(Kind::Double);
            assert_eq!(wanted[0], kept, "what is kept is x");
            if weights[0] == 0.0 {
                compare([wanted[1].shallow_clone()], &[noise(5, &shape)], 1e-12);
            }
            for (kind, half, keeps, bound) in [
                (Kind::Double, false, Keeps::Narrow, 1e-12),
                (Kind::Float, false, Keeps::Narrow, 1e-6),
                (Kind::Float, true, Keeps::Stream, 4e-3),
                (Kind::Float, true, Keeps::Narrow, 4e-3),
                (Kind::BFloat16, false, Keeps::Stream, 4e-3),
            ] {
                compare(run(kind, half, keeps, weights), &wanted, bound);
            }
        }
    }

    /// Two stacks side by side are their concatenation, whose groups may lie in both; in whole packs and not, in pieces too.
    #[test]
    fn the_norm_of_a_pair() {
        let noise = |step, shape: &[i64]| normal(1, Purpose::Evaluation, 0, step, shape).to_kind(Kind::Double);
        for (steps, inner, [first, second], groups, rows) in
            [(40, 1, [40, 24], 4, 1), (7, 3, [13, 3], 2, 1), (30, 1, [8, 56], 32, 2), (17_000, 1, [32, 16], 4, 1)]
        {
            let c = first + second;
            let run = |kind: Kind, half: bool, by_pair: bool| {
                let factors = if kind == Kind::Double { kind } else { Kind::Float };
                let leaf = |kind, step, shape: &[i64]| {
                    noise(step, shape).to_kind(Kind::BFloat16).to_kind(kind).set_requires_grad(true)
                };
                let [x, beside] =
                    [(1, first), (2, second)].map(|(step, width)| leaf(kind, step, &[2, steps, inner, width]));
                let [scale, shift] = [3, 4].map(|step| leaf(factors, step, &[rows, c]));
                let joined = Tensor::cat(&[&x, &beside], 3);
                let (x_given, beside_given) = if by_pair { (&x, Some(&beside)) } else { (&joined, None) };
                let norm = GpuNorm::of(x_given, &scale, &shift, groups, 1e-5, true);
                let (y, kept) = gpu_norm(GpuNorm { beside: beside_given, half, keeps: Keeps::Narrow, ..norm });
                let kept = kept.unwrap();
                assert_eq!(kept.kind(), y.kind());
                let [dy, dkept] = [5, 6].map(|step| noise(step, &[2, steps, inner, c]));
                let loss = (y.to_kind(Kind::Double) * dy).sum(None) + (kept.to_kind(Kind::Double) * dkept).sum(None);
                loss.backward();
                let gradients = [&x, &beside, &scale, &shift].map(Tensor::grad);
                let [dx, dbeside, dscale, dshift] = gradients;
                [y.detach(), kept.detach(), dx, dbeside, dscale, dshift].map(|t| t.to_kind(Kind::Double))
            };
            let wanted = run(Kind::Double, false, false);
            for (kind, half, bound) in
                [(Kind::Double, false, 1e-12), (Kind::Float, false, 1e-5), (Kind::Float, true, 5e-3)]
            {
                compare(run(kind, half, true), &wanted, bound);
            }
        }
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
