//! Several ranks against one: the same gradients, losses, samples and figures; resume; ranks that die, hang or differ.

#[path = "../common/mod.rs"]
mod common;

mod faults;
mod gradients;
mod sharded;
mod whole_runs;

use std::{collections::BTreeMap, fs, path::Path};

use common::write_packed;

const AUTOENCODER: &str = "\
seed: 3
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, flip: true, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {pixel: l1, perceptual_weight: 0.0, adversarial_weight: 0.1, adversarial_start: 2, adversarial_warmup: 3, sync_batch_norm: true, discriminator: {channels: 4, layers: 1}}
optimizer: {kind: adam, learning_rate: 1.0e-4, eps: 1.0e-4}
trainer: {steps: 6, batch: 4, device: cpu, log_every: 1, checkpoint_every: 3, picture_every: 100, ema_decay: 0.99}
";

const DIFFUSION: &str = "\
seed: 4
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, workers: 1}
autoencoder: runs/autoencoder
unet: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-4, eps: 1.0e-4}
trainer: {steps: 6, batch: 4, device: cpu, log_every: 1, checkpoint_every: 3, picture_every: 100, ema_decay: 0.99}
sampler: {kind: ddim, steps: 2, eta: 1.0}
";

fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_packed(&folder.path().join("clips.safetensors"), 5, 6, 32);
    fs::write(folder.path().join("autoencoder.yaml"), AUTOENCODER).unwrap();
    fs::write(folder.path().join("diffusion.yaml"), DIFFUSION).unwrap();
    folder
}

fn metrics(run: &Path) -> Vec<BTreeMap<String, f64>> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let parse = |line| serde_json::from_str::<BTreeMap<String, f64>>(line).unwrap();
    let timeless = |(key, _): &(String, f64)| !key.contains("second") && !key.contains("memory");
    text.lines().map(|line| parse(line).into_iter().filter(timeless).collect()).collect()
}

/// The largest relative difference of two logs.
fn log_difference(a: &Path, b: &Path) -> f64 {
    let (a, b) = (metrics(a), metrics(b));
    assert_eq!(a.len(), b.len());
    let mut largest = 0.0f64;
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (key, value) in a {
            // means of logits have no scale of their own
            let scale = if key.contains("logits") || key == "adversarial" { 1.0 } else { b[key].abs() };
            largest = largest.max((value - b[key]).abs() / scale.max(1e-12));
        }
    }
    largest
}
