//! Kinds of numbers in mixed precision: what is added up is float32, what convolutions and products take is bfloat16.

use tch::{Kind, Tensor};

use crate::torch::{Autocast, gpu_mixed_sum, has_gpu_kernels};

/// x of any shape: half precision becomes float32; float32 and float64 stay what they are.
pub fn full_precision(x: &Tensor) -> Tensor {
    match x.kind() {
        Kind::Half | Kind::BFloat16 => x.to_kind(Kind::Float),
        _ => x.shallow_clone(),
    }
}

/// Whether what is made of x for convolutions and products is bfloat16, which they take in mixed precision.
pub(super) fn rounds(x: &Tensor) -> bool {
    x.kind() == Kind::Float && Autocast::is_on(x.device())
}

/// What convolutions and products take in mixed precision, rounded at once where a GPU has kernels that add up in float32
/// beside it; else x.
pub fn rounded(x: &Tensor) -> Tensor {
    if has_gpu_kernels(x.device()) && rounds(x) { x.to_kind(Kind::BFloat16) } else { x.shallow_clone() }
}

/// Whether a GPU's kernel adds b, of bfloat16, to a of another kind than the sum: both lie alike, one value after another.
fn mixes(a: &Tensor, b: &Tensor) -> bool {
    let (size, stride) = (a.size(), a.stride());
    let reach: i64 = size.iter().zip(&stride).map(|(size, stride)| (size - 1) * stride).sum();
    let is_dense = reach + 1 == a.numel() as i64;
    has_gpu_kernels(a.device()) && b.kind() == Kind::BFloat16 && is_dense && size == b.size() && stride == b.stride()
}

/// a + b, of one shape, in float32 where they are bfloat16.
pub fn full_sum(a: &Tensor, b: &Tensor) -> Tensor {
    if a.kind() == Kind::BFloat16 && mixes(a, b) { gpu_mixed_sum(a, b) } else { full_precision(a) + b }
}

/// [`rounded`] a + b, of one shape.
pub fn rounded_sum(a: &Tensor, b: &Tensor) -> Tensor {
    if rounds(a) && mixes(a, b) { gpu_mixed_sum(a, b) } else { rounded(&(a + b)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, normal};

    /// A residual block's sums, rounded once, in whole packs and not; and their gradients.
    #[test]
    fn sums_in_another_kind_than_their_parts() {
        for shape in [[2, 8, 3, 4], [1, 5, 3, 1]] {
            let leaf = |step, kind| {
                let noise = normal(1, Purpose::Evaluation, 0, step, &shape).to_kind(kind);
                noise.set_requires_grad(true)
            };
            for (from, to) in [(Kind::BFloat16, Kind::Float), (Kind::Float, Kind::BFloat16)] {
                let (a, b) = (leaf(1, from), leaf(2, Kind::BFloat16));
                let y = gpu_mixed_sum(&a, &b);
                let exact = a.detach().to_kind(Kind::Float) + b.detach().to_kind(Kind::Float);
                assert_eq!((y.kind(), y.detach()), (to, exact.to_kind(to)), "{from:?} to {to:?}");
                let dy = normal(1, Purpose::Evaluation, 0, 3, &shape).to_kind(to);
                (&y * &dy).sum(Kind::Double).backward();
                assert_eq!(a.grad(), dy.to_kind(from));
                assert_eq!(b.grad(), dy.to_kind(Kind::BFloat16));
            }
        }
    }
}
