//! How well two ranks of one thread each do against one rank of one thread: `make bench-scaling`.
//!
//! Wants a quiet machine of two cores or more. Each rank has the same batch; the efficiency is the clips a second of two
//! ranks over twice those of one. One and two take turns, and the medians of their steps are compared.

use std::{fs, path::Path, process::Command};

use lvdm::{
    random::{Purpose, stream},
    safetensors::write_safetensors_atomically,
};
use rand::RngExt;
use serde_json::{Value, json};
use tch::Tensor;

const TURNS: usize = 3;
const STEPS: usize = 8;

const EXPERIMENT: &str = "\
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 8, resolution: 64, workers: 1}
autoencoder: {channels: 16, factors: [4, 8, 8]}
loss: {perceptual_weight: 0.0, adversarial_start: 0, discriminator: {channels: 32}}
optimizer: {kind: adam, learning_rate: 1.0e-4}
trainer: {steps: 8, batch: 2, device: cpu, log_every: 1, checkpoint_every: 1000, picture_every: 1000}
";

/// Clips a second of each step but the first two.
fn rates(at: &Path, ranks: usize, turn: usize) -> Vec<f64> {
    let run = at.join(format!("run-{ranks}-{turn}"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_lvdm"));
    command.args(["train", "autoencoder", "scaling.yaml", "--nproc", &ranks.to_string(), "--run"]).arg(&run);
    let output = command.current_dir(at).env("OMP_NUM_THREADS", "1").output().expect("lvdm starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let log = fs::read_to_string(run.join("metrics.jsonl")).expect("the run has a log");
    let rate = |line| serde_json::from_str::<Value>(line).expect("a line of JSON")["clips_per_second"].as_f64();
    let rates: Vec<f64> = log.lines().skip(2).map(|line| rate(line).expect("a rate")).collect();
    assert_eq!(rates.len(), STEPS - 2);
    rates
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = folder.path();
    let mut random = stream(1, Purpose::Scene, 0, 0);
    let bytes: Vec<u8> = (0..8 * 3 * 8 * 64 * 64).map(|_| random.random()).collect();
    let clips = Tensor::from_slice(&bytes).view([8, 3, 8, 64, 64]);
    let spec = json!({"dataset": {"kind": "folder", "root": "clips"}, "frames": 8, "frame_stride": 1, "resolution": 64, "seed": 0});
    write_safetensors_atomically(&at.join("clips.safetensors"), &[("clips", clips)], &spec).expect("clips are written");
    fs::write(at.join("scaling.yaml"), EXPERIMENT).expect("the experiment is written");

    let (mut one, mut two) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        one.extend(rates(at, 1, turn));
        two.extend(rates(at, 2, turn));
    }
    let (one, two) = (median(&mut one), median(&mut two));
    println!("one rank:  {:.2} clips/s, {:.2} s a step", one, 2.0 / one);
    println!("two ranks: {:.2} clips/s, {:.2} s a step", two, 4.0 / two);
    println!("efficiency {:.1} %", 50.0 * two / one);
}
