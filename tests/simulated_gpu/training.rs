//! Training: the CPU's numbers, steps that wait for nothing, a run that goes on to the bit.

use std::{collections::BTreeMap, fs, path::Path};

use lvdm::checkpoint::{self, Checkpoint};

use crate::{
    common::{
        same_checkpoint, succeed_in,
        text_runs::{BESIDE, experiment, import, write_diffusers, write_videos},
    },
    device::Gpu,
    distance, workplace, write_latte, write_mcvd, write_stages, write_transformer,
};

/// The last line of a run's log, without what depends on the clock and the machine.
pub fn last_log(run: &Path) -> BTreeMap<String, f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line: BTreeMap<String, f64> = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    line.into_iter().filter(|(key, _)| !key.contains("second") && !key.contains("memory")).collect()
}

/// Trains four steps on both devices; on the GPU also two, and on from there.
fn trains_as_on_the_cpu(gpu: &Gpu, at: &Path, name: &str, train: &[&str], bound: f64) {
    let run = |which: &str| format!("runs/{name}-{which}");
    let last = |which: &str| checkpoint::path(&at.join(run(which)), 4);
    let arguments = |which: &str, device: &str, steps: i64| -> Vec<String> {
        let more = ["--run".into(), run(which), format!("trainer.device={device}"), format!("trainer.steps={steps}")];
        train.iter().map(ToString::to_string).chain(more).collect()
    };
    let on_gpu = |which: &str, steps: i64| {
        let arguments = arguments(which, "cuda", steps);
        gpu.succeed(at, &arguments.iter().map(String::as_str).collect::<Vec<_>>()).1
    };
    let cpu = arguments("cpu", "cpu", 4);
    succeed_in(at, &cpu.iter().map(String::as_str).collect::<Vec<_>>());
    let (two, four) = (on_gpu("parts", 2), on_gpu("whole", 4));
    (four - two).wait_for_nothing(name, 2);
    assert_eq!(four.stalls, two.stalls, "{name}: a step waits for what it has just begun");

    let (cpu, whole) = (Checkpoint::read(&last("cpu")).unwrap(), Checkpoint::read(&last("whole")).unwrap());
    assert_eq!(cpu.tensors.keys().collect::<Vec<_>>(), whole.tensors.keys().collect::<Vec<_>>());
    let there = |part: &str| cpu.tensors.keys().any(|name| name.starts_with(part));
    let mut parts = vec!["model.", "optimizer.model.exp_avg.", "optimizer.model.exp_avg_sq."];
    if there("discriminator.") {
        parts.extend(["discriminator.", "optimizer.discriminator.exp_avg."]);
    }
    let averaged = !train.contains(&"trainer.ema_decay=null");
    assert_eq!(there("ema."), averaged, "{name}");
    parts.extend(averaged.then_some("ema."));
    let mut most = 0.0f64;
    for part in parts {
        let difference = distance(&whole, &cpu, part);
        println!("{name}: {part}… differ by {difference:.1e}");
        most = most.max(difference);
    }
    let (logged, wanted) = (last_log(&at.join(run("whole"))), last_log(&at.join(run("cpu"))));
    assert_eq!(logged.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    for (key, value) in &logged {
        // means of logits have no scale of their own
        let scale = if key.contains("logits") || key == "adversarial" { 1.0 } else { wanted[key].abs().max(1e-12) };
        let difference = (value - wanted[key]).abs() / scale;
        println!("{name}: {key} differs by {difference:.1e}");
        most = most.max(difference);
    }
    assert!(most < bound, "{name}: {most:e}");

    let resumed = on_gpu("parts", 4);
    // those of two steps, which all do
    let of_steps = (four - two).up;
    println!("{name}: besides steps {} copies go up at first, {} to go on", two.up - of_steps, resumed.up - of_steps);
    for counts in [two, resumed] {
        let few = counts.up - of_steps < 90;
        assert!(counts.blocking_up == 0 && few, "{name}: weights go up in few transfers: {counts:?}");
    }
    same_checkpoint(&last("parts"), &last("whole"));
}

const BF16: &str = "trainer.precision=bf16";
/// In bf16 the devices differ by what LibTorch takes into it: largest seen were 7.6e-3, of the gradients of an
/// autoencoder's discriminator, and 2.7e-4 of a denoiser's.
const BF16_BOUND: f64 = 2e-2;

#[test]
fn an_autoencoder_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let train = ["train", "autoencoder", "autoencoder.yaml"];
    let with = |more: &[&'static str]| [&train, more].concat();
    trains_as_on_the_cpu(gpu, folder.path(), "ae", &with(&["trainer.accumulate=2", "trainer.clip_gradient=0.5"]), 1e-4);
    trains_as_on_the_cpu(gpu, folder.path(), "ae-bf16", &with(&[BF16]), BF16_BOUND);
    let of_clips = ["loss.video_discriminator={channels: 4, layers: 2}", "loss.feature_matching=0.5"];
    trains_as_on_the_cpu(gpu, folder.path(), "ae-clips", &with(&of_clips), 1e-4);
}

/// A codebook that starts from the first batch and restarts unused entries, batch norm with running statistics, and frames
/// drawn at random. The losses are absolute values; with this seed none stands at its kink, where rounding decides about a
/// gradient.
#[test]
fn an_autoencoder_with_a_codebook_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let train = [
        "train",
        "autoencoder",
        "autoencoder.yaml",
        "autoencoder={kind: vqgan, channels: 4, factors: [2, 4, 4], latent_channels: 4, codebook: {codes: 24, restart: true}}",
        "loss={kind: tats, perceptual_weight: 0.0, adversarial_start: 1, discriminator: {channels: 4, layers: 1}}",
        "trainer.accumulate=2",
        "trainer.ema_decay=null",
        "seed=12",
    ];
    trains_as_on_the_cpu(gpu, folder.path(), "vqgan", &train, 1e-4);
}

/// Codes are integers, which the encoder must choose as on the CPU; a step reads none of them.
#[test]
fn a_transformer_over_codes_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(8);
    let at = folder.path();
    write_transformer(at);
    let train = ["train", "transformer", "transformer.yaml"];
    trains_as_on_the_cpu(gpu, at, "codes", &train, 1e-4);
    let gaps = ["interpolation=true", "network.recompute=true"];
    trains_as_on_the_cpu(gpu, at, "gaps", &[&train[..], &gaps].concat(), 1e-4);
}

/// LPIPS, whose network is large, in the loss.
#[test]
fn an_autoencoder_trains_with_lpips_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let train = ["train", "autoencoder", "autoencoder.yaml", "loss.perceptual_weight=1.0", "loss.perceptual_every=4"];
    trains_as_on_the_cpu(gpu, folder.path(), "lpips", &train, 1e-4);
}

#[test]
fn a_denoiser_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let train = ["train", "diffusion", "diffusion.yaml"];
    let with = |more: &[&'static str]| [&train, more].concat();
    trains_as_on_the_cpu(gpu, at, "plain", &train, 1e-4);
    trains_as_on_the_cpu(gpu, at, "bf16", &with(&[BF16]), BF16_BOUND);
    trains_as_on_the_cpu(gpu, at, "recompute", &with(&["unet.recompute=true"]), 1e-4);
    let frames = "conditioning={prediction: 0.8, prefixes: [1], perturbation: 4, masked_loss: true}";
    trains_as_on_the_cpu(gpu, at, "frames", &with(&[frames, "objective.predict=velocity"]), 1e-4);
}

/// Other paths than a schedule of steps: times and what follows from them go up as the integers did.
#[test]
fn other_noise_paths_train_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let train = ["train", "diffusion", "diffusion.yaml"];
    let with = |more: &[&'static str]| [&train, more].concat();
    let flow = "schedule={kind: rectified_flow, times: {kind: logit_normal, mean: 0.0, std: 1.0}}";
    trains_as_on_the_cpu(gpu, at, "flow", &with(&[flow, "objective.predict=flow"]), 1e-4);
    let weight = "objective={predict: edm, loss: l2, weight: {kind: min_snr, gamma: 5.0}}";
    trains_as_on_the_cpu(gpu, at, "edm", &with(&["schedule={kind: edm}", weight]), 1e-4);
}

/// Both stages of a cascade in pixels: single frames beside the clips; a given video with noise of a level.
#[test]
fn a_cascade_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    write_stages(at);
    trains_as_on_the_cpu(gpu, at, "base", &["train", "diffusion", "base.yaml"], 1e-4);
    succeed_in(at, &["train", "diffusion", "base.yaml", "--run", "runs/base", "trainer.steps=1"]);
    trains_as_on_the_cpu(gpu, at, "superresolution", &["train", "diffusion", "superresolution.yaml"], 1e-4);
}

/// A transformer with a learned variance and class labels.
#[test]
fn latte_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    write_latte(at);
    let train = ["train", "diffusion", "latte.yaml"];
    let with = |more: &[&'static str]| [&train, more].concat();
    trains_as_on_the_cpu(gpu, at, "latte", &train, 1e-4);
    trains_as_on_the_cpu(gpu, at, "latte-bf16", &with(&[BF16]), BF16_BOUND);
    trains_as_on_the_cpu(gpu, at, "latte-recompute", &with(&["network.recompute=true"]), 1e-4);
}

/// The frames around a clip, dropout, and the loss that is a sum, in pixels; SPATIN in latents, where activations are computed
/// again.
#[test]
fn mcvd_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(8);
    let at = folder.path();
    write_mcvd(at);
    let train = ["train", "diffusion", "mcvd.yaml"];
    let with = |more: &[&'static str]| [&train, more].concat();
    let pixels = ["autoencoder=pixels", "data.resolution=16"];
    trains_as_on_the_cpu(gpu, at, "mcvd", &with(&pixels), 1e-4);
    trains_as_on_the_cpu(gpu, at, "mcvd-bf16", &with(&[pixels[0], pixels[1], BF16]), BF16_BOUND);
    trains_as_on_the_cpu(gpu, at, "mcvd-spatin", &with(&["network.spatin=8", "network.recompute=true"]), 1e-4);
}

/// Captions, a text encoder, adapters; and the same out of a file of latents.
#[test]
fn a_text_network_trains_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let file = experiment(at, "text", BESIDE, "");
    let seldom = [
        "trainer.log_every=1000",
        "trainer.checkpoint_every=1000",
        "trainer.picture_every=1000",
        "optimizer.eps=1.0e-4",
    ];
    let with = |more: &[&'static str]| [&["train", "diffusion", &file], &seldom[..], more].concat();
    let adapters = "trained={kind: adapters, rank: 2, alpha: 4.0}";
    trains_as_on_the_cpu(gpu, at, "adapters", &with(&[adapters]), 1e-4);
    let clips =
        ["--videos", "videos", "--captions", "--frames", "4", "--resolution", "16", "--clips", "4", "--text", "sd-run"];
    succeed_in(at, &[&["encode", "sd-run"], &clips[..], &["--out", "latents.safetensors", "--device", "cpu"]].concat());
    trains_as_on_the_cpu(
        gpu,
        at,
        "temporal",
        &with(&["trained={kind: temporal}", "latents=latents.safetensors", "unet.recompute=true"]),
        1e-4,
    );
}
