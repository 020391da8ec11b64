//! The Fréchet distance between Gaussians fitted to two sets of features (FVD, on I3D's).

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::{divisor::Divisor, video_metric::VideoMetric};
use crate::extractors::FeatureExtractor;

/// The Fréchet video distance (Unterthiner et al. 2018, arXiv 1812.01717): [`frechet_distance_by`] of the extractor's
/// features, one row a clip.
pub struct Fvd;

impl VideoMetric for Fvd {
    fn title(&self) -> &'static str {
        "FVD"
    }

    fn definition(&self, extractor: &dyn FeatureExtractor) -> String {
        format!("Fréchet distance of Gaussians, {}", extractor.preparation())
    }

    fn compute(&self, real: &Tensor, generated: &Tensor, divisor: Divisor) -> Result<f64> {
        frechet_distance_by(real, generated, divisor)
    }

    fn is_biased(&self) -> bool {
        true
    }
}

/// The squared Fréchet distance ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr √(Σ₁Σ₂) of Gaussians fitted to features
/// `[N, D]` and `[M, D]`, in float64 and with covariances over n − 1.
///
/// With A and B the centred features, tr √(Σ₁Σ₂) is the nuclear norm of A·Bᵀ / √((n−1)(m−1)): no root of a
/// matrix is taken, so fewer samples than dimensions, where the covariances are singular, need no care.
///
/// # Errors
/// Fewer than 2 samples, different widths, features that are not finite.
pub fn frechet_distance(real: &Tensor, fake: &Tensor) -> Result<f64> {
    frechet_distance_by(real, fake, Divisor::NMinusOne)
}

/// [`frechet_distance`] with covariances over n − 1 or over n.
///
/// # Errors
/// As [`frechet_distance`].
pub fn frechet_distance_by(real: &Tensor, fake: &Tensor, divisor: Divisor) -> Result<f64> {
    let (real, fake) = (checked("real", real)?, checked("generated", fake)?);
    same_width(&real, &fake)?;
    let centred = |x: &Tensor| {
        let mean = x.mean_dim(0, true, Kind::Double);
        (x - &mean, mean)
    };
    let ((a, mean_a), (b, mean_b)) = (centred(&real), centred(&fake));
    let less = i64::from(divisor == Divisor::NMinusOne);
    let (n, m) = ((a.size()[0] - less) as f64, (b.size()[0] - less) as f64);
    let square = |x: &Tensor| x.square().sum(Kind::Double).double_value(&[]);
    let (_, root, _) = triangle(a.shallow_clone()).matmul(&triangle(b.shallow_clone()).tr()).svd(true, false);
    let root = root.sum(Kind::Double).double_value(&[]) / (n * m).sqrt();
    Ok(square(&(mean_a - mean_b)) + square(&a) / n + square(&b) / m - 2.0 * root)
}

/// A matrix with at most D rows whose products with others have the same nuclear norm: the R of A = QR,
/// where A has more rows than columns.
fn triangle(a: Tensor) -> Tensor {
    let (rows, columns) = a.size2().expect("checked");
    if rows > columns { Tensor::linalg_qr(&a, "r").1 } else { a }
}

/// Features on the CPU in float64.
pub(super) fn checked(which: &str, features: &Tensor) -> Result<Tensor> {
    let Ok((n, _)) = features.size2() else {
        bail!("{which} features must have shape [N, D], these have {:?}", features.size());
    };
    if n < 2 {
        bail!("{n} {which} samples have no covariance: at least 2 are needed");
    }
    let features = features.detach().to_device(tch::Device::Cpu).to_kind(Kind::Double);
    let broken = features.isfinite().all_dim(1, false).logical_not().sum(Kind::Int64).int64_value(&[]);
    if broken > 0 {
        bail!("{broken} of {n} {which} samples have features that are not finite");
    }
    Ok(features)
}

pub(super) fn same_width(real: &Tensor, fake: &Tensor) -> Result<()> {
    let (r, f) = (real.size()[1], fake.size()[1]);
    if r != f {
        bail!("real features are {r} wide and generated ones {f}: they come from different networks");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::kernel_distance;
    use tch::Device;

    /// Numbers without pattern, the same at every run.
    fn numbers(rows: i64, columns: i64, seed: i64) -> Tensor {
        let x = Tensor::arange(rows * columns, (Kind::Double, Device::Cpu)) * 12.9898 + seed as f64;
        ((x.sin() * 43758.5453).frac() * 2.0).view([rows, columns])
    }

    /// Samples whose mean is 0 and whose covariance (over n − 1) is exactly diagonal with these variances:
    /// ±1 rows of a Hadamard matrix, scaled.
    fn diagonal(variances: &[f64]) -> Tensor {
        let mut hadamard = Tensor::ones([1, 1], (Kind::Double, Device::Cpu));
        for _ in 0..3 {
            let top = Tensor::cat(&[&hadamard, &hadamard], 1);
            let bottom = Tensor::cat(&[&hadamard, &(-&hadamard)], 1);
            hadamard = Tensor::cat(&[top, bottom], 0);
        }
        // the first column is constant, the others have mean 0 and are orthogonal
        let columns = hadamard.narrow(1, 1, variances.len() as i64);
        columns * (Tensor::from_slice(variances) * (7.0 / 8.0)).sqrt()
    }

    fn close(a: f64, b: f64, bound: f64) {
        assert!((a - b).abs() <= bound, "{a} is not {b}");
    }

    #[test]
    fn the_closed_form_of_known_gaussians() {
        let (v, w) = ([1.0f64, 4.0, 9.0, 0.25], [4.0f64, 1.0, 0.0, 0.25]);
        let shift = Tensor::from_slice(&[1.0, -2.0, 0.0, 0.5]);
        let roots = v.iter().zip(&w).map(|(v, w)| (v.sqrt() - w.sqrt()).powi(2));
        let expected = 1.0 + 4.0 + 0.25 + roots.sum::<f64>();
        close(frechet_distance(&diagonal(&v), &(diagonal(&w) + &shift)).unwrap(), expected, 1e-12);
        // rotating both changes nothing
        let (rotation, _) = Tensor::linalg_qr(&numbers(4, 4, 3), "complete");
        let rotate = |x: Tensor| x.matmul(&rotation);
        let rotated = frechet_distance(&rotate(diagonal(&v)), &rotate(diagonal(&w) + &shift)).unwrap();
        close(rotated, expected, 1e-12);
    }

    /// tr √(Σ₁Σ₂) from eigenvalues, for covariances of full rank.
    #[test]
    fn the_textbook_form() {
        let (a, b) = (numbers(60, 5, 1), numbers(40, 5, 2).exp());
        let covariance = |x: &Tensor| {
            let centred = x - x.mean_dim(0, true, Kind::Double);
            centred.tr().matmul(&centred) / (x.size()[0] - 1) as f64
        };
        let (s, t) = (covariance(&a), covariance(&b));
        let roots = s.matmul(&t).linalg_eigvals().real().sqrt().sum(Kind::Double);
        let means =
            (a.mean_dim(0, false, Kind::Double) - b.mean_dim(0, false, Kind::Double)).square().sum(Kind::Double);
        let expected = (means + s.trace() + t.trace() - roots * 2.0).double_value(&[]);
        close(frechet_distance(&a, &b).unwrap(), expected, 1e-9);
    }

    #[test]
    fn symmetric_and_zero_for_the_same_set() {
        for (n, m, d) in [(3, 5, 40), (2, 2, 400), (50, 30, 7), (9, 60, 20)] {
            let (a, b) = (numbers(n, d, 5), numbers(m, d, 6));
            let forth = frechet_distance(&a, &b).unwrap();
            close(forth, frechet_distance(&b, &a).unwrap(), 1e-9 * forth);
            assert!(forth > 0.0);
            close(frechet_distance(&a, &a).unwrap(), 0.0, 1e-9);
            // the order of samples does not matter
            close(frechet_distance(&a.flip([0]), &b).unwrap(), forth, 1e-9 * forth);
        }
    }

    /// Dividing by n shrinks both covariances, and with equal numbers all of the distance but that of the means.
    #[test]
    fn covariances_over_n() {
        let (a, b) = (numbers(20, 6, 1), numbers(20, 6, 2).exp());
        let over = |divisor| frechet_distance_by(&a, &b, divisor).unwrap();
        let means =
            (a.mean_dim(0, false, Kind::Double) - b.mean_dim(0, false, Kind::Double)).square().sum(Kind::Double);
        let means = means.double_value(&[]);
        close(over(Divisor::N) - means, (over(Divisor::NMinusOne) - means) * 19.0 / 20.0, 1e-9);
    }

    #[test]
    fn what_cannot_be_measured_is_an_error() {
        let good = numbers(4, 3, 1);
        let nan = &good + Tensor::from_slice(&[0.0, f64::NAN, 0.0]);
        for (bad, word) in [
            (good.narrow(0, 0, 1), "at least 2"),
            (good.narrow(0, 0, 0), "at least 2"),
            (nan, "4 of 4"),
            (&good / 0.0, "not finite"),
            (good.narrow(1, 0, 2), "different networks"),
            (good.view([2, 2, 3]), "shape"),
        ] {
            for result in [
                frechet_distance(&good, &bad),
                frechet_distance(&bad, &good),
                kernel_distance(&good, &bad),
                kernel_distance(&bad, &good),
            ] {
                let message = result.unwrap_err().to_string();
                assert!(message.contains(word), "{message}");
            }
        }
    }
}
