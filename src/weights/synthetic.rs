//! Parameters that are a fixed function of their names, so that a parity case stores none.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::nn::fnv1a64;

const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// The i-th of a name's numbers, uniform in [−1, 1).
fn uniform(hash: u64, i: u64) -> f64 {
    let mut z = hash.wrapping_add((i + 1).wrapping_mul(GAMMA));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    2.0 * ((z >> 11) as f64 / (1u64 << 53) as f64) - 1.0
}

/// One parameter, float32 (a counter: int64).
fn parameter(name: &str, shape: &[i64]) -> Tensor {
    let leaf = name.rsplit('.').next().unwrap_or(name);
    if leaf == "num_batches_tracked" {
        return Tensor::zeros(shape, (Kind::Int64, tch::Device::Cpu));
    }
    let count = shape.iter().product::<i64>();
    let (offset, scale) = match leaf {
        "running_var" => (1.0, 0.2),
        "running_mean" => (0.0, 0.1),
        "weight" if shape.len() <= 1 => (1.0, 0.2),
        _ if shape.len() <= 1 => (0.0, 0.1),
        _ => (0.0, (3.0 / (count / shape[0]) as f64).sqrt()),
    };
    let hash = fnv1a64(name);
    let values: Vec<f32> = (0..count as u64).map(|i| (offset + scale * uniform(hash, i)) as f32).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// Values for the given names and shapes; `prefix` is hashed in front of each name.
pub fn synthesize(named: &[(String, Tensor)], prefix: &str) -> BTreeMap<String, Tensor> {
    named.iter().map(|(name, t)| (name.clone(), parameter(&format!("{prefix}{name}"), &t.size()))).collect()
}
