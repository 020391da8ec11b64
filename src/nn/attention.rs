use tch::{Kind, Tensor};

use super::{Init, Scope, full_precision};
use crate::torch::{Autocast, PositionTerms, frame_attention, fuses, gpu_frame_attention, has_gpu_kernels};

/// Multi-head attention without positions: q `[N, T, C]`, k and v `[N, S, C]` → `[N, T, C]`, scaled by d^(−1/2).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64) -> Tensor {
    let (q, k, v) = (split_heads(q, heads), split_heads(k, heads), split_heads(v, heads));
    if q.kind() == Kind::Double {
        let scores = q.matmul(&k.transpose(2, 3)) * (q.size()[3] as f64).powf(-0.5);
        return join_heads(&softmax(&scores).matmul(&v));
    }
    join_heads(&attend(&q, &k, &v, false, at_once(&q)))
}

/// As [`attention`] over one sequence, `[N, T, C]` each, in which a token sees none that comes after it.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64) -> Tensor {
    let (q, k, v) = (split_heads(q, heads), split_heads(k, heads), split_heads(v, heads));
    join_heads(&attend(&q, &k, &v, true, at_once(&q)))
}

/// As [`attention`], where the token of a row sees that of a column only where `mask` is true: `[T, S]` bool.
pub fn masked_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, mask: &Tensor) -> Tensor {
    let (q, k, v) = (split_heads(q, heads), split_heads(k, heads), split_heads(v, heads));
    join_heads(&Tensor::scaled_dot_product_attention(&q, &k, &v, Some(mask), 0.0, false, None, false))
}

/// How many sequences go through LibTorch's attention in one call: on a GPU they lie on an axis of the kernel's grid that has
/// 65,535 places (pytorch/pytorch#142228), and attention over frames has a sequence for each place of each clip.
fn at_once(q: &Tensor) -> i64 {
    if q.device().is_cuda() { 65_535 } else { i64::MAX }
}

/// Attention of `[N, heads, T, d]` and `[N, heads, S, d]`, at most so many of N at once.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool, at_once: i64) -> Tensor {
    let sequences = q.size()[0];
    if sequences <= at_once {
        return Tensor::scaled_dot_product_attention(q, k, v, None::<Tensor>, 0.0, causal, None, false);
    }
    let pieces = (0..sequences).step_by(at_once as usize).map(|first| {
        let [q, k, v] = [q, k, v].map(|x| x.narrow(0, first, at_once.min(sequences - first)));
        attend(&q, &k, &v, causal, at_once)
    });
    Tensor::cat(&pieces.collect::<Vec<_>>(), 0)
}

/// Attention weights are rounded to float32, whatever the precision around them: in float64 the
/// released code does so too, and a training run depends on it (Adam makes 1e-9 of a gradient visible).
fn softmax(scores: &Tensor) -> Tensor {
    scores.to_kind(Kind::Float).softmax(-1, None).to_kind(scores.kind())
}

/// `[N, T, C]` → `[N, heads, T, d]`
fn split_heads(x: &Tensor, heads: i64) -> Tensor {
    let (n, t, c) = x.size3().expect("tokens [N, T, C]");
    x.reshape([n, t, heads, c / heads]).transpose(1, 2)
}

/// `[N, heads, T, d]` → `[N, T, C]`
fn join_heads(x: &Tensor) -> Tensor {
    x.transpose(1, 2).flatten(2, 3)
}

/// Learned relative positions of frames (Shaw et al. 2018): one table for keys and one for values,
/// 2L+1 rows for distances clamped to ±L, shared by the heads.
pub struct RelativePosition {
    keys: Tensor,
    values: Tensor,
    max_distance: i64,
}

impl RelativePosition {
    /// Tables `[2L+1, d]` under `relative_position_k` and `relative_position_v`, Xavier uniform.
    pub fn new(scope: &Scope, max_distance: i64, head_width: i64) -> Self {
        let rows = 2 * max_distance + 1;
        let xavier = Init::Uniform((6.0 / (rows + head_width) as f64).sqrt());
        let table = |name: &str| scope.sub(name).parameter("embeddings_table", &[rows, head_width], xavier);
        RelativePosition { keys: table("relative_position_k"), values: table("relative_position_v"), max_distance }
    }

    /// `[T, T, d]`: row (t, s) is the table's row of the distance s − t.
    fn rows(&self, table: &Tensor, length: i64) -> Tensor {
        let i = Tensor::arange(length, (Kind::Int64, table.device()));
        let distance = i.unsqueeze(0) - i.unsqueeze(1);
        let index = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance;
        table.index_select(0, &index.flatten(0, 1)).reshape([length, length, -1])
    }

    /// Attention over all positions of all frames, `[B, F·P, C]` each; the score of two positions gains
    /// the key term q·R of their frames' distance (no value term).
    pub fn joint_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, frames: i64) -> Tensor {
        let (b, tokens, _) = q.size3().expect("tokens [B, F·P, C]");
        let places = tokens / frames;
        let (q, k, v) = (split_heads(q, heads), split_heads(k, heads), split_heads(v, heads));
        let width = q.size()[3];
        let by_frame = q.reshape([b, heads, frames, places, width]) * (width as f64).powf(-0.5);
        let key_rows = self.rows(&self.keys, frames);
        let bias = Tensor::einsum("bhtpd,tsd->bhtps", &[&by_frame, &key_rows], None::<i64>)
            .reshape([b, heads, tokens, frames])
            .repeat_interleave_self_int(places, 3, None); // [B, heads, F·P, F·P]
        join_heads(&Tensor::scaled_dot_product_attention(&q, &k, &v, Some(bias), 0.0, false, None, false))
    }

    /// Attention over frames, `[N, F, C]` each → `[N, F, C]`.
    ///
    /// The released unconditional network adds the key term *transposed* and without the second
    /// d^(−1/4) (`KeyTerm::Transposed`), its text network as Shaw et al. do (`KeyTerm::Scaled`).
    ///
    /// Never in mixed precision: there are few frames, and little to gain.
    pub fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, key_term: KeyTerm) -> Tensor {
        let _precision = Autocast::bfloat16(q.device(), false);
        let length = q.size()[1];
        let split = |x: &Tensor| split_heads(&full_precision(x), heads);
        let (q, k, v) = (split(q), split(k), split(v));
        let width = q.size()[3] as f64;
        let key_rows = self.rows(&self.keys, length);
        let scores = match key_term {
            KeyTerm::Transposed => {
                let scale = width.powf(-0.25);
                let q = q * scale;
                // weight[query t, key s] receives q_s · R[s, t]
                let positions = Tensor::einsum("nhsd,std->nhts", &[&q, &key_rows], None::<i64>);
                q.matmul(&(k * scale).transpose(2, 3)) + positions
            }
            KeyTerm::Scaled => {
                let positions = Tensor::einsum("nhtd,tsd->nhts", &[&q, &key_rows], None::<i64>);
                (q.matmul(&k.transpose(2, 3)) + positions) * width.powf(-0.5)
            }
        };
        let weights = softmax(&scores);
        let value_rows = self.rows(&self.values, length);
        let positions = Tensor::einsum("nhts,tsd->nhtd", &[&weights, &value_rows], None::<i64>);
        join_heads(&(weights.matmul(&v) + positions))
    }
}

impl RelativePosition {
    /// As [`Self::attention`], of q, k and v in one, `[B, F, P, 3·C]` → `[B, F, P, C]`: no frame is moved in memory.
    /// None where there is no kernel for it.
    pub fn in_place(&self, qkv: &Tensor, heads: i64, key_term: KeyTerm) -> Option<Tensor> {
        let (_, frames, _, channels) = qkv.size4().expect("[B, F, P, 3·C]");
        let width = (channels / 3 / heads) as f64;
        let terms = match key_term {
            KeyTerm::Transposed => PositionTerms { alpha: width.powf(-0.5), beta: width.powf(-0.25), transposed: true },
            KeyTerm::Scaled => PositionTerms { alpha: width.powf(-0.5), beta: width.powf(-0.5), transposed: false },
        };
        if has_gpu_kernels(qkv.device()) {
            return gpu_frame_attention(qkv, Some([&self.keys, &self.values]), heads, terms);
        }
        let qkv = full_precision(qkv);
        if !fuses(&qkv) || frames > 32 {
            return None;
        }
        let (keys, values) = (self.rows(&self.keys, frames), self.rows(&self.values, frames));
        Some(frame_attention(&qkv, &keys, &values, heads, terms))
    }
}

/// Attention over frames without positions, of q, k and v in one, `[B, F, P, 3·C]` → `[B, F, P, C]`: no frame is moved in
/// memory. None where there is no kernel for it, or one that is faster: a GPU's general kernel fills its tiles where sequences
/// are long.
pub fn frames_in_place(qkv: &Tensor, heads: i64) -> Option<Tensor> {
    const MOST_FRAMES: i64 = 16;
    let (_, frames, _, channels) = qkv.size4().expect("[B, F, P, 3·C]");
    if !has_gpu_kernels(qkv.device()) || frames > MOST_FRAMES || qkv.kind() == Kind::Double {
        return None;
    }
    let alpha = ((channels / 3 / heads) as f64).powf(-0.5);
    gpu_frame_attention(qkv, None, heads, PositionTerms { alpha, beta: 0.0, transposed: false })
}

/// Whether [`RelativePosition::in_place`] has a kernel on this device, for clips that are not too long.
pub fn attends_in_place(x: &Tensor) -> bool {
    fuses(x) || has_gpu_kernels(x.device())
}

/// Where the keys' relative positions enter the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyTerm {
    /// score[t, s] = d^(−1/2) q_t·k_s + d^(−1/4) q_s·R[s, t]
    Transposed,
    /// score[t, s] = d^(−1/2) (q_t·k_s + q_t·R[t, s])
    Scaled,
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        nn::Parameters,
        random::{Purpose, normal},
        torch::as_on_gpu,
    };

    #[test]
    fn more_sequences_than_a_gpu_takes_at_once_go_in_pieces() {
        let [q, k, v] = [0, 1, 2].map(|step| normal(2, Purpose::Evaluation, 0, step, &[7, 2, 4, 8]));
        for causal in [false, true] {
            let whole = attend(&q, &k, &v, causal, i64::MAX);
            for at_once in [7, 3, 1] {
                let difference = (attend(&q, &k, &v, causal, at_once) - &whole).abs().max().double_value(&[]);
                assert!(difference < 1e-6, "{at_once} at once: {difference}");
            }
        }
    }

    /// The kernel of GPUs without tables against LibTorch's attention, forward and backward.
    #[test]
    fn frames_in_place_are_attention() {
        let (b, p, c, heads) = (2, 9, 24, 3);
        for f in [1, 4, 16] {
            let noise = |step, shape: &[i64]| normal(2, Purpose::Evaluation, 0, step, shape).to_kind(Kind::BFloat16);
            let run = |kind: Kind, in_place: bool| {
                let qkv = noise(0, &[b, f, p, 3 * c]).to_kind(kind).set_requires_grad(true);
                let y = if in_place {
                    as_on_gpu(|| frames_in_place(&qkv, heads)).expect("a kernel")
                } else {
                    let tracks = qkv.transpose(1, 2).reshape([b * p, f, 3 * c]).chunk(3, -1);
                    attention(&tracks[0], &tracks[1], &tracks[2], heads).reshape([b, p, f, c]).transpose(1, 2)
                };
                assert_eq!((y.kind(), y.size()), (kind, vec![b, f, p, c]));
                (&y * noise(1, &[b, f, p, c]).to_kind(kind)).sum(Kind::Float).backward();
                [y, qkv.grad()].map(|t| t.detach().to_kind(Kind::Double))
            };
            let wanted = run(Kind::Double, false);
            for (kind, bound) in [(Kind::Float, 2e-6), (Kind::BFloat16, 4e-3)] {
                for (found, wanted) in run(kind, true).iter().zip(&wanted) {
                    let error = ((found - wanted).norm() / wanted.norm()).double_value(&[]);
                    assert!(error < bound, "{f} frames, {kind:?}: {error}");
                }
            }
        }
        let long = Tensor::zeros([1, 17, 2, 72], (Kind::Float, Device::Cpu));
        assert!(as_on_gpu(|| frames_in_place(&long, heads)).is_none() && frames_in_place(&long, heads).is_none());
    }

    /// The kernels of the CPU and of GPUs against the explicit products in float64, forward and backward, also for clips that
    /// are longer than the tables.
    #[test]
    fn attention_in_place_is_attention() {
        let (b, p, c, heads) = (2, 21, 24, 3);
        for (f, key_term) in [
            (4, KeyTerm::Transposed),
            (4, KeyTerm::Scaled),
            (7, KeyTerm::Transposed),
            (7, KeyTerm::Scaled),
            (1, KeyTerm::Scaled),
        ] {
            let run = |kind: Kind, of_gpu: bool| -> Vec<Tensor> {
                let tables = if kind == Kind::BFloat16 { Kind::Float } else { kind };
                // the numbers that bfloat16 has, in every kind
                let noise = |step, shape: &[i64]| {
                    normal(2, Purpose::Evaluation, 0, step, shape).to_kind(Kind::BFloat16).to_kind(kind)
                };
                let parameters = Parameters::new(Device::Cpu, 0);
                let relative = RelativePosition::new(&parameters.root(), 4, c / heads);
                parameters.to_kind(tables);
                let qkv = noise(0, &[b, f, p, 3 * c]).set_requires_grad(true);
                let by_kernel = || relative.in_place(&qkv, heads, key_term);
                let y = if of_gpu { as_on_gpu(by_kernel) } else { by_kernel() };
                assert!(!of_gpu || y.is_some());
                let y = y.unwrap_or_else(|| {
                    let tracks = qkv.transpose(1, 2).reshape([b * p, f, 3 * c]).chunk(3, -1);
                    let y = relative.attention(&tracks[0], &tracks[1], &tracks[2], heads, key_term);
                    y.reshape([b, p, f, c]).transpose(1, 2)
                });
                assert!(!of_gpu || y.kind() == kind);
                (&y * noise(1, &[b, f, p, c])).sum(None).backward();
                let gradients = [qkv.grad(), relative.keys.grad(), relative.values.grad()];
                std::iter::once(y).chain(gradients).map(|t| t.detach().to_kind(Kind::Double)).collect()
            };
            let wanted = run(Kind::Double, false);
            // the explicit products round their weights to float32
            for (kind, of_gpu, bound) in [
                (Kind::Float, false, 2e-6),
                (Kind::Double, true, 1e-6),
                (Kind::Float, true, 2e-6),
                (Kind::BFloat16, true, 4e-3),
            ] {
                for (i, (found, wanted)) in run(kind, of_gpu).iter().zip(&wanted).enumerate() {
                    let difference = (found - wanted).norm().double_value(&[]);
                    let relative = difference / wanted.norm().double_value(&[]).max(1e-6);
                    assert!(relative < bound, "{f} frames, {key_term:?}, {kind:?}, tensor {i}: {relative}");
                }
            }
        }
    }
}
