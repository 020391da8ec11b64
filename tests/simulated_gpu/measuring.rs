//! Encoding, evaluation, reconstruction and timing: the CPU's numbers.

use std::{fs, path::Path};

use lvdm::safetensors::read_safetensors;
use serde_json::Value;

use crate::{
    common::{relative_error, succeed_in},
    device::Gpu,
    workplace,
};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The largest relative difference of the numbers in two values of one form.
fn difference(a: &Value, b: &Value) -> f64 {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() / b.abs().max(1e-6)
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).map(|(a, b)| difference(a, b)).fold(0.0, f64::max)
        }
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            a.iter().map(|(key, a)| difference(a, &b[key])).fold(0.0, f64::max)
        }
        (a, b) if a == b => 0.0,
        _ => f64::INFINITY,
    }
}

/// Latents of a second batch cost no waiting but for the batch itself.
#[test]
fn latents_are_the_cpus() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let encode = |clips: &'static str, device: &'static str, out: &'static str| {
        let data =
            ["encode", "runs/autoencoder", "--videos", "clips.safetensors", "--frames", "4", "--resolution", "32"];
        [&data[..], &["--clips", clips, "--device", device, "--out", out]].concat()
    };
    let one = gpu.succeed(at, &encode("8", "cuda", "one.safetensors")).1;
    let two = gpu.succeed(at, &encode("16", "cuda", "gpu.safetensors")).1;
    (two - one).wait_for_nothing("encode", 1);
    succeed_in(at, &encode("16", "cpu", "cpu.safetensors"));
    let moments = |file: &str| read_safetensors(&at.join(file)).unwrap().0.remove("moments").unwrap();
    let found = relative_error(&moments("gpu.safetensors"), &moments("cpu.safetensors"));
    println!("latents differ by {found:.1e}");
    assert!(found < 1e-4, "{found:e}");
}

#[test]
fn reconstructions_are_the_cpus() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let measure = |clips: &'static str, device: &'static str, out: &'static str| {
        let run = ["evaluate", "reconstruction", "runs/autoencoder", "--clips", clips];
        [&run[..], &["--device", device, "--out", out]].concat()
    };
    let one = gpu.succeed(at, &measure("1", "cuda", "one")).1;
    let three = gpu.succeed(at, &measure("3", "cuda", "gpu")).1;
    (three - one).wait_for_nothing("reconstruction", 2);
    succeed_in(at, &measure("3", "cpu", "cpu"));
    for figure in ["psnr_db", "ssim", "lpips"] {
        let mean = |out: &str| json(&at.join(out).join("reconstruction.json"))[figure]["mean"].clone();
        let found = difference(&mean("gpu"), &mean("cpu"));
        println!("{figure}: {} and {} differ by {found:.1e}", mean("gpu"), mean("cpu"));
        assert!(found < 1e-4, "{figure}: {found:e}");
    }
}

/// Everything that can be timed runs, in float32 and bf16, and `lvdm doctor` sees the device.
#[test]
fn everything_can_be_timed() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = tempfile::tempdir().unwrap();
    let small = "unet={network: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [1], heads: 2}, \
                 latent: [4, 2, 8, 8], checkpoint: true, samplers: [{kind: ddim, steps: 2, eta: 1.0}]}";
    let autoencoder = "autoencoder={network: {channels: 4, norm_groups: 4}, frames: 8, resolution: 64}";
    for precision in ["precision=f32", "precision=bf16"] {
        let more = ["warmup=1", "repeats=1", "i3d=null", "loader.batch=1", "device=cuda"];
        let (said, _) =
            gpu.succeed(folder.path(), &[&["bench", "--json", small, autoencoder, precision], &more[..]].concat());
        let names: Vec<String> = said
            .out
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["name"].as_str().unwrap().to_string())
            .collect();
        for name in [
            "encoder",
            "decoder",
            "autoencoder_forward_backward",
            "unet_forward",
            "unet_train_step",
            "checkpoint_stall",
            "sample",
        ] {
            assert!(names.iter().any(|found| found == name), "{name} is not in {names:?}\n{}", said.err);
        }
    }
    let (said, _) = gpu.succeed(folder.path(), &["doctor"]);
    assert!(said.out.contains("usable GPUs: 1"), "{}", said.out);
}
