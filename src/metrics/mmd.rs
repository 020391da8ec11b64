//! The kernel distance between two sets of features (KVD, on I3D's).

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{
    divisor::Divisor,
    frechet::{checked, same_width},
    video_metric::VideoMetric,
};
use crate::extractors::FeatureExtractor;

/// The kernel video distance: [`kernel_distance`] of the extractor's features, one row a clip. It can be negative.
pub struct Kvd;

impl VideoMetric for Kvd {
    fn title(&self) -> &'static str {
        "KVD"
    }

    fn digits(&self) -> usize {
        3
    }

    fn definition(&self, _: &dyn FeatureExtractor) -> String {
        "unbiased MMD², kernel (x·y/D + 1)³".into()
    }

    fn compute(&self, real: &Tensor, generated: &Tensor, _: Divisor) -> Result<f64> {
        kernel_distance(real, generated)
    }

    fn without_groups(&self, real: &Tensor, generated: &Tensor, groups: i64, _: Divisor) -> Result<Vec<f64>> {
        kernel_distances_without_groups(real, generated, groups)
    }
}

/// The unbiased estimate of the squared maximum mean discrepancy between features `[N, D]` and `[M, D]`
/// under the kernel (x·y/D + 1)³, in float64. It can be negative.
///
/// # Errors
/// Fewer than 2 samples, different widths, features that are not finite.
pub fn kernel_distance(real: &Tensor, fake: &Tensor) -> Result<f64> {
    let all = |features: &Tensor| Tensor::ones([1, features.size()[0]], (Kind::Double, Device::Cpu));
    let (real, fake) = (checked("real", real)?, checked("generated", fake)?);
    let found = kernel_distances(&real, &fake, &all(&real), &all(&fake))?;
    Ok(found[0])
}

/// [`kernel_distance`] without each of so many groups of both sides in turn, i being of group i mod `groups`. The kernel
/// is computed once.
///
/// # Errors
/// As [`kernel_distance`].
fn kernel_distances_without_groups(real: &Tensor, fake: &Tensor, groups: i64) -> Result<Vec<f64>> {
    let rows_without_groups = |features: &Tensor| {
        let group = Tensor::arange(features.size()[0], (Kind::Int64, Device::Cpu)).remainder(groups);
        let left_out = Tensor::arange(groups, (Kind::Int64, Device::Cpu)).unsqueeze(1);
        group.unsqueeze(0).ne_tensor(&left_out).to_kind(Kind::Double)
    };
    kernel_distances(real, fake, &rows_without_groups(real), &rows_without_groups(fake))
}

/// One distance for each row of `of_real` `[G, N]` and `of_fake` `[G, M]`, which are 1 where a sample counts and else 0.
fn kernel_distances(real: &Tensor, fake: &Tensor, of_real: &Tensor, of_fake: &Tensor) -> Result<Vec<f64>> {
    let (real, fake) = (checked("real", real)?, checked("generated", fake)?);
    same_width(&real, &fake)?;
    let width = real.size()[1] as f64;
    let kernel = |x: &Tensor, y: &Tensor| (x.matmul(&y.tr()) / width + 1.0).pow_tensor_scalar(3); // [N, M]
    let rows = |x: &Tensor| x.sum_dim_intlist(1, false, Kind::Double); // [G]
    let sum = |k: &Tensor, a: &Tensor, b: &Tensor| rows(&(a.matmul(k) * b));
    let among = |x: &Tensor, of: &Tensor| {
        let (k, n) = (kernel(x, x), rows(of));
        (sum(&k, of, of) - of.mv(&k.diagonal(0, 0, 1))) / (&n * (&n - 1.0))
    };
    let between = sum(&kernel(&real, &fake), of_real, of_fake) / (rows(of_real) * rows(of_fake));
    Ok(Vec::try_from(among(&real, of_real) + among(&fake, of_fake) - between * 2.0)?)
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

    #[test]
    fn groups_are_left_out() {
        let [a, b] = [11, 8].map(|count| Tensor::randn([count, 5], (Kind::Double, Device::Cpu)));
        let found = kernel_distances_without_groups(&a, &b, 3).unwrap();
        for (group, found) in (0..3).zip(found) {
            let rest = |x: &Tensor| {
                let rows: Vec<i64> = (0..x.size()[0]).filter(|row| row % 3 != group).collect();
                x.index_select(0, &Tensor::from_slice(&rows))
            };
            let expected = kernel_distance(&rest(&a), &rest(&b)).unwrap();
            assert!((found - expected).abs() < 1e-10, "{found} is not {expected}");
        }
    }
}
