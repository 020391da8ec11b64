//! The Fréchet distance between Gaussians fitted to two sets of features (FVD, on I3D's).

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

/// The squared Fréchet distance ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr √(Σ₁Σ₂) of Gaussians fitted to features
/// `[N, D]` and `[M, D]`, in float64 and with covariances over n − 1.
///
/// With A and B the centred features, tr √(Σ₁Σ₂) is the nuclear norm of A·Bᵀ / √((n−1)(m−1)): no root of a
/// matrix is taken, so fewer samples than dimensions, where the covariances are singular, need no care.
///
/// # Errors
/// Fewer than 2 samples, different widths, features that are not finite.
pub fn frechet_distance(real: &Tensor, fake: &Tensor) -> Result<f64> {
    let (real, fake) = (checked("real", real)?, checked("generated", fake)?);
    same_width(&real, &fake)?;
    let centred = |x: &Tensor| {
        let mean = x.mean_dim(0, true, Kind::Double);
        (x - &mean, mean)
    };
    let ((a, mean_a), (b, mean_b)) = (centred(&real), centred(&fake));
    let (n, m) = ((a.size()[0] - 1) as f64, (b.size()[0] - 1) as f64);
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
