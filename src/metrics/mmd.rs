//! The kernel distance between two sets of features (KVD, on I3D's).

use anyhow::Result;
use tch::{Kind, Tensor};

use super::frechet::{checked, same_width};

/// The unbiased estimate of the squared maximum mean discrepancy between features `[N, D]` and `[M, D]`
/// under the kernel (x·y/D + 1)³, in float64. It can be negative.
///
/// # Errors
/// Fewer than 2 samples, different widths, features that are not finite.
pub fn kernel_distance(real: &Tensor, fake: &Tensor) -> Result<f64> {
    let (real, fake) = (checked("real", real)?, checked("generated", fake)?);
    same_width(&real, &fake)?;
    let width = real.size()[1] as f64;
    let kernel = |x: &Tensor, y: &Tensor| (x.matmul(&y.tr()) / width + 1.0).pow_tensor_scalar(3);
    let sum = |k: &Tensor| k.sum(Kind::Double).double_value(&[]);
    let among = |x: &Tensor| {
        let (n, k) = (x.size()[0] as f64, kernel(x, x));
        (sum(&k) - sum(&k.diagonal(0, 0, 1))) / (n * (n - 1.0))
    };
    let between = kernel(&real, &fake).mean(Kind::Double).double_value(&[]);
    Ok(among(&real) + among(&fake) - 2.0 * between)
}
