//! How near a reconstruction is to its original: PSNR and SSIM. (LPIPS is a network: `extractors::Lpips`.)

use tch::{Kind, Tensor};

/// PSNR of each clip in dB, 10·log10(255²/MSE), for u8 clips `[N, …]`: `[N]` in float64; equal clips count as 100 dB.
pub fn psnr_db(a: &Tensor, b: &Tensor) -> Tensor {
    let difference: Tensor = a.to_kind(Kind::Double) - b.to_kind(Kind::Double);
    let mse = difference.square().flatten(1, -1).mean_dim([1i64].as_slice(), false, None);
    let psnr: Tensor = (mse.clamp_min(1e-30).reciprocal() * (255.0 * 255.0)).log10() * 10.0;
    psnr.clamp_max(100.0)
}

/// The window of SSIM: 11×11 pixels, a Gaussian with a standard deviation of 1.5.
const WINDOW: i64 = 11;
const SIGMA: f64 = 1.5;

/// SSIM (Wang et al. 2004) of each clip, for u8 clips `[N, 3, F, H, W]` of at least 11×11 pixels: `[N]` in float64.
/// Each frame and each of red, green and blue alone, over the windows that lie inside, K₁ = 0.01, K₂ = 0.03, L = 255;
/// then the mean.
pub fn ssim(a: &Tensor, b: &Tensor) -> Tensor {
    let (n, c, f, h, w) = a.size5().expect("clips [N, 3, F, H, W]");
    assert!(h >= WINDOW && w >= WINDOW, "SSIM needs pictures of {WINDOW}×{WINDOW}, these are {w}×{h}");
    let planes = |x: &Tensor| x.to_kind(Kind::Double).reshape([n * c * f, 1, h, w]); // [N·3·F, 1, H, W]
    let (a, b) = (planes(a), planes(b));
    let offset = Tensor::arange(WINDOW, (Kind::Double, a.device())) - (WINDOW / 2) as f64;
    let line = (offset.square() / (-2.0 * SIGMA * SIGMA)).exp();
    let line = &line / line.sum(Kind::Double);
    let mean = |x: &Tensor| {
        let across = x.conv2d(&line.view([1, 1, 1, WINDOW]), None::<Tensor>, [1, 1], [0, 0], [1, 1], 1);
        across.conv2d(&line.view([1, 1, WINDOW, 1]), None::<Tensor>, [1, 1], [0, 0], [1, 1], 1)
    };
    let (mu_a, mu_b) = (mean(&a), mean(&b));
    let (aa, bb, ab) = (mu_a.square(), mu_b.square(), &mu_a * &mu_b);
    let (var_a, var_b, cov) = (mean(&a.square()) - &aa, mean(&b.square()) - &bb, mean(&(&a * &b)) - &ab);
    let [c1, c2] = [0.01, 0.03].map(|k: f64| (k * 255.0).powi(2));
    let map = (ab * 2.0 + c1) * (cov * 2.0 + c2) / ((aa + bb + c1) * (var_a + var_b + c2));
    map.reshape([n, -1]).mean_dim([1i64].as_slice(), false, Kind::Double)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clips(values: &[f64]) -> Tensor {
        let rows: Vec<Tensor> =
            values.iter().map(|value| Tensor::full([3, 2, 16, 20], *value, (Kind::Uint8, tch::Device::Cpu))).collect();
        Tensor::stack(&rows, 0)
    }

    fn noise(seed: i64) -> Tensor {
        let x = Tensor::arange(3 * 2 * 16 * 20, (Kind::Double, tch::Device::Cpu)) * 12.9898 + seed as f64;
        (((x.sin() * 43758.5453).frac().abs()) * 255.0).to_kind(Kind::Uint8).view([1, 3, 2, 16, 20])
    }

    #[test]
    fn psnr_of_each_clip() {
        let found = psnr_db(&clips(&[0.0, 0.0, 7.0]), &clips(&[10.0, 255.0, 7.0]));
        for (i, expected) in [28.1308, 0.0, 100.0].into_iter().enumerate() {
            assert!((found.double_value(&[i as i64]) - expected).abs() < 1e-3, "{i}");
        }
    }

    /// Of flat pictures only the first factor is left: (2ab + C₁) / (a² + b² + C₁).
    #[test]
    fn ssim_of_flat_pictures_is_known() {
        let found = ssim(&clips(&[100.0, 0.0, 50.0]), &clips(&[100.0, 255.0, 80.0]));
        let c1 = 2.55f64.powi(2);
        let of = |a: f64, b: f64| (2.0 * a * b + c1) / (a * a + b * b + c1);
        for (i, expected) in [1.0, of(0.0, 255.0), of(50.0, 80.0)].into_iter().enumerate() {
            assert!((found.double_value(&[i as i64]) - expected).abs() < 1e-9, "{i}: {expected}");
        }
    }

    /// One window, summed by hand over its 121 weights.
    #[test]
    fn ssim_of_one_window_by_hand() {
        let cut = |x: Tensor| x.narrow(1, 0, 1).narrow(2, 0, 1).narrow(3, 0, 11).narrow(4, 0, 11);
        let (a, b) = (cut(noise(1)), cut(noise(2)));
        let values = |x: &Tensor| Vec::<f64>::try_from(x.to_kind(Kind::Double).flatten(0, -1)).unwrap();
        let (x, y) = (values(&a), values(&b));
        let weight = |i: usize| {
            let [u, v] = [i / 11, i % 11].map(|at| at as f64 - 5.0);
            (-(u * u + v * v) / 4.5).exp()
        };
        let total: f64 = (0..121).map(weight).sum();
        let mean = |value: &dyn Fn(usize) -> f64| (0..121).map(|i| weight(i) * value(i)).sum::<f64>() / total;
        let (mx, my) = (mean(&|i| x[i]), mean(&|i| y[i]));
        let (vx, vy) = (mean(&|i| (x[i] - mx).powi(2)), mean(&|i| (y[i] - my).powi(2)));
        let cov = mean(&|i| (x[i] - mx) * (y[i] - my));
        let (c1, c2) = (6.5025, 58.5225);
        let expected = (2.0 * mx * my + c1) * (2.0 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2));
        assert!((ssim(&a, &b).double_value(&[0]) - expected).abs() < 1e-9);
        assert!((ssim(&noise(1), &noise(1)).double_value(&[0]) - 1.0).abs() < 1e-9);
        assert!(ssim(&noise(1), &noise(2)).double_value(&[0]) < 0.2);
    }
}
