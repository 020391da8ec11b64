//! The distance between the means of two sets of features.

use anyhow::{Result, ensure};
use lvdm::{
    extractors::FeatureExtractor,
    metrics::{Divisor, VideoMetric},
};
use tch::{Kind, Tensor};

/// ‖mean(real) − mean(generated)‖ of the features that the protocol names; `metrics: [mean_distance]`.
pub struct MeanDistance;

impl VideoMetric for MeanDistance {
    fn title(&self) -> &'static str {
        "mean distance"
    }

    fn definition(&self, _: &dyn FeatureExtractor) -> String {
        "Euclidean distance of mean features".into()
    }

    fn compute(&self, real: &Tensor, generated: &Tensor, _: Divisor) -> Result<f64> {
        let mean = |features: &Tensor| features.mean_dim([0].as_slice(), false, Kind::Double); // [D]
        let (real, generated) = (mean(real), mean(generated));
        ensure!(real.size() == generated.size(), "features of {:?} and {:?}", real.size(), generated.size());
        Ok((real - generated).norm().double_value(&[]))
    }

    fn is_biased(&self) -> bool {
        true
    }
}

// What follows is its test, which stands in the same file.

#[test]
fn its_value_is_known() {
    let real = Tensor::from_slice2(&[[0.0, 0.0], [2.0, 0.0]]);
    let generated = Tensor::from_slice2(&[[4.0, 4.0], [4.0, 4.0]]);
    let divisor = Divisor::default();
    assert_eq!(MeanDistance.compute(&real, &generated, divisor).unwrap(), 5.0);
    assert!(MeanDistance.compute(&real, &generated.narrow(1, 0, 1), divisor).is_err());
    // without its first video, the real set's mean is (2, 0); without its second, the origin
    let jackknife = MeanDistance.without_groups(&real, &generated, 2, divisor).unwrap();
    assert!(
        (jackknife[0] - 20f64.sqrt()).abs() < 1e-12 && (jackknife[1] - 32f64.sqrt()).abs() < 1e-12,
        "{jackknife:?}"
    );
}
