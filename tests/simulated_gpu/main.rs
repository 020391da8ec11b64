//! `lvdm` on a GPU that is not there, which `simulated_gpu.cpp` puts in place of LibTorch's CUDA half. It computes what the
//! CPU computes, the host never touches its memory (that would be a segmentation fault), and no step of a training or of
//! sampling waits for it.
//!
//! What a step costs is counted by doing the same with more steps and taking the difference, so that what happens once,
//! at the start or at the end, does not hide it.

#[path = "../common/mod.rs"]
mod common;
mod device;
mod graphs;
mod kernels;
mod measuring;
mod parity;
mod ranks;
mod sampling;
mod training;

use std::{fs, path::Path};

use common::{relative_error, succeed_in, write_packed};
use lvdm::{
    checkpoint::Checkpoint,
    safetensors::{read_safetensors, write_safetensors_atomically},
};
use tch::{Kind, Tensor};

/// A small autoencoder on packed clips. Squares, for at the kink of an absolute value rounding decides about a gradient.
const AUTOENCODER: &str = "\
seed: 3
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {pixel: l2, perceptual_weight: 0.0, adversarial_weight: 0.1, adversarial_start: 0, discriminator: {channels: 4, layers: 1}}
optimizer: {kind: adam, learning_rate: 1.0e-4, eps: 1.0e-4}
trainer: {steps: 4, batch: 2, device: cpu, log_every: 1000, checkpoint_every: 1000, picture_every: 1000, ema_decay: 0.99}
";

/// A small denoiser in its latents, with few diffusion steps for samplers that take them all.
const DIFFUSION: &str = "\
seed: 4
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, workers: 1}
autoencoder: runs/autoencoder
schedule: {kind: scaled_linear, steps: 6, beta_start: 0.1, beta_end: 0.6}
unet: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [1, 2], heads: 2}
objective: {loss: l2}
optimizer: {kind: adamw, learning_rate: 1.0e-4, eps: 1.0e-4}
trainer: {steps: 4, batch: 2, device: cpu, log_every: 1000, checkpoint_every: 1000, picture_every: 1000, ema_decay: 0.99}
sampler: {kind: ddim, steps: 2, eta: 1.0}
";

/// A folder with clips of so many frames, both experiments and a trained autoencoder.
fn workplace(frames: i64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 4, frames + 2, 32);
    for (name, text) in [("autoencoder.yaml", AUTOENCODER), ("diffusion.yaml", DIFFUSION)] {
        fs::write(at.join(name), text.replace("frames: 4", &format!("frames: {frames}"))).unwrap();
    }
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "--run", "runs/autoencoder", "trainer.steps=1"]);
    folder
}

/// A small transformer over the codes of an autoencoder with a codebook.
const TRANSFORMER: &str = "\
seed: 4
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 8, resolution: 32, workers: 1}
autoencoder: runs/codebook
network: {layers: 2, heads: 2, width: 32}
optimizer: {kind: adamw, learning_rate: 1.0e-4, eps: 1.0e-4, weight_decay: 0.01}
trainer: {steps: 4, batch: 2, device: cpu, log_every: 1000, checkpoint_every: 1000, picture_every: 1000, ema_decay: 0.99}
";

/// `transformer.yaml`, and the autoencoder that it builds on.
fn write_transformer(at: &Path) {
    fs::write(at.join("transformer.yaml"), TRANSFORMER).unwrap();
    let codebook =
        "autoencoder={kind: vqgan, channels: 4, factors: [2, 8, 8], latent_channels: 4, codebook: {codes: 24}}";
    let loss =
        "loss={kind: tats, perceptual_weight: 0.0, adversarial_start: 9, discriminator: {channels: 4, layers: 1}}";
    let train = [
        "train",
        "autoencoder",
        "autoencoder.yaml",
        "--run",
        "runs/codebook",
        codebook,
        loss,
        "trainer.steps=2",
        "trainer.ema_decay=null",
    ];
    succeed_in(at, &train);
}

/// `latte.yaml`: a small Latte in the place of the denoiser, on clips of two classes.
fn write_latte(at: &Path) {
    let packed = at.join("clips.safetensors");
    let (mut tensors, notes) = read_safetensors(&packed).unwrap();
    let names = serde_json::to_vec(&["a", "b", "a", "b"]).unwrap();
    tensors.insert("classes".into(), Tensor::from_slice(&names));
    let tensors: Vec<(&String, &Tensor)> = tensors.iter().collect();
    write_safetensors_atomically(&packed, &tensors, &notes.unwrap()).unwrap();
    let network = "network: {kind: latte, depth: 4, hidden_size: 32, heads: 2, patch_size: 2}\nlabels: {drop: 0.3}";
    let lines: Vec<String> = DIFFUSION
        .lines()
        .map(|line| match line.split(':').next() {
            Some("unet") => network.into(),
            Some("objective") => "objective: {predict: noise, loss: learned_variance}".into(),
            _ => line.to_string(),
        })
        .collect();
    fs::write(at.join("latte.yaml"), lines.join("\n")).unwrap();
}

/// `mcvd.yaml`: a small MCVD in the place of the denoiser, which makes a half of each clip from the other.
fn write_mcvd(at: &Path) {
    let network = "network: {kind: mcvd, channels: 16, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], \
                   head_width: 16, dropout: 0.1}";
    let lines: Vec<String> = DIFFUSION
        .lines()
        .map(|line| match line.split(':').next() {
            Some("data") => format!("{}\nblocks: {{past: 2, mask_past: 0.5}}", line.replace("frames: 4", "frames: 8")),
            Some("schedule") => "schedule: {kind: reversed_linear, steps: 6, beta_start: 0.1, beta_end: 0.6}".into(),
            Some("unet") => network.into(),
            Some("objective") => "objective: {loss: l2, reduction: sum}".into(),
            Some("sampler") => "sampler: {kind: strided, steps: 3}".into(),
            _ => line.to_string(),
        })
        .collect();
    fs::write(at.join("mcvd.yaml"), lines.join("\n")).unwrap();
}

/// `base.yaml` and `superresolution.yaml`: both stages of a cascade, 16 pixels to 32.
fn write_stages(at: &Path) {
    write_packed(&at.join("low.safetensors"), 4, 6, 16);
    let base: Vec<String> = DIFFUSION
        .lines()
        .map(|line| match line.split(':').next() {
            Some("data") => line.replace("clips.safetensors", "low.safetensors").replace("32", "16"),
            Some("autoencoder") => "autoencoder: pixels\nimages: 2".into(),
            Some("schedule") => "schedule: {kind: cosine_log_snr, told: log_snr}".into(),
            Some("unet") => line.replace("[1, 2], heads", "[2], heads"),
            Some("objective") => "objective: {predict: velocity, loss: l2}".into(),
            Some("sampler") => "sampler: {kind: ancestral, steps: 2, corrector: 0.1, clip: 1.0}".into(),
            _ => line.to_string(),
        })
        .collect();
    let base = base.join("\n");
    let large = base.replace("images: 2", "superresolution: {base: runs/base, resolution: 16, overlap: 2}");
    let large = large
        .replace("low.safetensors", "clips.safetensors")
        .replace("frames: 4, resolution: 16", "frames: 4, resolution: 32");
    fs::write(at.join("base.yaml"), base).unwrap();
    fs::write(at.join("superresolution.yaml"), large).unwrap();
}

/// All tensors of a checkpoint under a prefix, one after the other, in float64.
fn flat(checkpoint: &Checkpoint, prefix: &str) -> Tensor {
    let under = checkpoint.tensors.iter().filter(|(name, t)| name.starts_with(prefix) && t.is_floating_point());
    let flat: Vec<Tensor> = under.map(|(_, t)| t.to_kind(Kind::Double).flatten(0, -1)).collect();
    assert!(!flat.is_empty(), "nothing is named {prefix}…");
    Tensor::cat(&flat, 0)
}

/// Clips that both devices made differ by no more than the rounding to bytes: no value by more than one, and few do.
fn same_clips(what: &str, a: &Path, b: &Path) {
    let clips = |path: &Path| {
        let tensors = lvdm::safetensors::read_safetensors(path).unwrap().0;
        tensors["clips"].to_kind(Kind::Double)
    };
    let difference = (clips(a) - clips(b)).abs();
    let (most, mean) = (difference.max().double_value(&[]), difference.mean(None).double_value(&[]) / 255.0);
    println!("{what}: bytes differ by {most} at most, and by {mean:.1e} of the range in the mean");
    assert!(most <= 1.0 && mean < 1e-4, "{what}: {most} at most, {mean:e} of the range in the mean");
    assert!(clips(a).std(true).double_value(&[]) > 1.0, "{what}: nothing to see");
}

/// ‖a − b‖ / ‖b‖ of what two checkpoints hold under a prefix.
fn distance(a: &Checkpoint, b: &Checkpoint, prefix: &str) -> f64 {
    relative_error(&flat(a, prefix), &flat(b, prefix))
}
