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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_by_hand() {
        let real = [[1.0, 2.0, 0.5], [0.0, -1.0, 2.0], [3.0, 0.25, 1.0], [-0.5, 1.0, 1.0]];
        let fake = [[0.5, 0.5, 0.5], [2.0, -2.0, 1.0], [1.0, 1.0, -3.0]];
        let k = |x: &[f64; 3], y: &[f64; 3]| (x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>() / 3.0 + 1.0).powi(3);
        let among = |set: &[[f64; 3]]| {
            let n = set.len();
            let pairs = (0..n).flat_map(|i| (0..n).filter(move |j| *j != i).map(move |j| (i, j)));
            pairs.map(|(i, j)| k(&set[i], &set[j])).sum::<f64>() / (n * (n - 1)) as f64
        };
        let between = real.iter().flat_map(|x| fake.iter().map(move |y| k(x, y))).sum::<f64>() / 12.0;
        let expected = among(&real) + among(&fake) - 2.0 * between;
        let found = kernel_distance(&Tensor::from_slice2(&real), &Tensor::from_slice2(&fake)).unwrap();
        assert!((found - expected).abs() < 1e-12 * expected.abs(), "{found} is not {expected}");
    }
}
