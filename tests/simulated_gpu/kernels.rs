//! Which kernels a GPU may choose from, graphs, and checkpoints that come without waiting.

use std::fs;

use lvdm::{
    checkpoint,
    plan::{PlanOptions, Work},
};

use crate::{
    common::{Said, same_checkpoint, source, succeed_in},
    device::{Counts, Gpu},
    same_clips, workplace,
};

/// What a program started on the device, and how many gigabytes it moved there.
fn work(gpu: &Gpu, changes: &[&str]) -> (i64, f64) {
    let bench = source("experiments/bench/unet_c64.yaml");
    let arguments = [&["bench", bench.to_str().unwrap(), "device=cuda", "warmup=0"], changes].concat();
    let mut command = gpu.command(std::path::Path::new("/"), &arguments);
    command.env("SIMULATED_GPU_LOG", "1");
    let (said, counts) = gpu.finish(command);
    assert_eq!(said.status, 0, "{}", said.err);
    let all = said.err.lines().find_map(|line| line.strip_prefix("simulated GPU: in all ")).unwrap();
    let gigabytes = all.split_whitespace().nth(2).unwrap().parse().unwrap();
    (counts[0].launches, gigabytes)
}

/// What `lvdm plan` says of a forward pass and a step of that network at batch 2, counted as the simulated GPU does: a convolution
/// with its bias as one, and so its gradients; what a step of Adam reads and writes once.
fn planned(precision: &str) -> (i64, f64) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("diffusion.yaml");
    let text = "data: {dataset: {kind: folder, root: nowhere}, frames: 16, resolution: 256}\n\
                autoencoder: runs/mine\nlatents: nowhere\n\
                unet: {channels: 64, multipliers: [1, 2, 3, 4], blocks_per_level: 3, attention_factors: [2, 4, 8], heads: 4}\n\
                optimizer: {kind: adamw, learning_rate: 1.0e-5, weight_decay: 0.01}\ntrainer: {steps: 100, batch: 2}\n";
    fs::write(&file, text).unwrap();
    let codec = serde_yaml::from_str("{factors: [4, 8, 8], latent_channels: 4}").unwrap();
    let options = PlanOptions { codec: Some(codec) };
    let plan = lvdm::plan::of(&file, &[format!("trainer.{precision}")], &options).unwrap();
    let counted = |work: &Work| {
        let operations = work.operations();
        let of = |names: &[&str], what: fn(&Work) -> i64| -> i64 {
            names.iter().filter_map(|name| operations.get(name)).map(what).sum()
        };
        let apart = ["bias", "bias, gradient"];
        let starts = of(&[&apart[..], &["convolution, gradient of its input"]].concat(), Work::kernels);
        // parameters and two moments, of these and gradients
        let bytes = of(&apart, Work::bytes) + of(&["lvdm::adam_all_"], Work::bytes) * 3 / 7;
        (work.kernels() - starts, work.bytes() - bytes)
    };
    let [step, call] = [&plan.kernels, &plan.sampling.as_ref().unwrap().call].map(counted);
    (step.0 + call.0, (step.1 + call.1) as f64 / 1e9)
}

/// A GPU is bound by the host that starts its kernels, and by memory: of the U-Net in `experiments/bench/unet_c64.yaml` at batch
/// 2, a forward pass and a training step together keep to these bars, and so do a step that computes activations again and a forward
/// pass of sampling.
#[test]
fn a_step_starts_few_kernels_and_moves_few_bytes() {
    let Some(gpu) = Gpu::simulated() else { return };
    for (precision, most, most_gigabytes) in [("precision=bf16", 2100, 3.7), ("precision=f32", 2400, 5.5)] {
        let run = |repeats| work(gpu, &["unet.batch=2", precision, repeats]);
        let ((one, a), (two, b)) = (run("repeats=1"), run("repeats=2"));
        let (launches, gigabytes) = (two - one, b - a);
        println!("{precision}: forward and step are {launches} kernels and {gigabytes:.2} GB");
        assert!(launches > 500 && launches <= most, "{precision}: {launches} kernels");
        assert!(gigabytes > 1.0 && gigabytes <= most_gigabytes, "{precision}: {gigabytes} GB");
        let (planned, planned_gigabytes) = planned(precision);
        println!("{precision}: `lvdm plan` says {planned} and {planned_gigabytes:.2} GB");
        assert!(
            (planned - launches).abs() * 33 < launches,
            "{precision}: {planned} kernels planned, {launches} counted"
        );
        let ratio = planned_gigabytes / gigabytes;
        assert!((0.9..1.1).contains(&ratio), "{precision}: {planned_gigabytes} GB planned, {gigabytes} counted");
    }
    // weights that a block computes with again are cast together again
    let of_step = |recompute| {
        let run = |repeats| work(gpu, &["unet.batch=2", "precision=bf16", recompute, repeats]).0;
        run("repeats=2") - run("repeats=1")
    };
    let [kept, again] = ["unet.network.recompute=false", "unet.network.recompute=true"].map(of_step);
    println!("bf16: {kept} kernels, {again} where activations are computed again");
    assert!(again > kept && 2 * again < 3 * kept, "{kept} and {again} kernels");
    // twice, of which one warms up
    let walk = |steps: i64| {
        let samplers = format!("unet.samplers=[{{kind: ddim, steps: {steps}, eta: 0.0}}]");
        work(gpu, &["precision=bf16", "repeats=1", &samplers]).0
    };
    let forward = (walk(4) - walk(3)) / 2;
    println!("one step of sampling is {forward} kernels");
    assert!(forward > 200 && forward <= 500, "{forward} kernels");
}

/// What LibTorch's own operations do in their place is the same.
#[test]
fn without_the_kernels_networks_do_the_same() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion", "trainer.steps=1"]);
    let sample = |kernels: &str| {
        let out = format!("{kernels}.safetensors");
        let arguments =
            ["sample", "runs/diffusion", "--videos", "2", "--steps", "2", "--device", "cuda", "--out", &out];
        let mut command = gpu.command(at, &arguments);
        command.env("LVDM_GPU_KERNELS", kernels);
        let (said, counts) = gpu.finish(command);
        assert_eq!(said.status, 0, "{}", said.err);
        counts[0].launches
    };
    let (with, without) = (sample("1"), sample("0"));
    println!("{with} kernels, and {without} without our own");
    assert!(2 * with < without, "{with} and {without}");
    same_clips("kernels", &at.join("1.safetensors"), &at.join("0.safetensors"));
}

/// cuDNN may time its kernels in training, unless that is to repeat, and nowhere else; TF32 is taken where it is asked for.
#[test]
fn training_autotunes_and_what_is_measured_does_not() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion", "trainer.steps=1"]);
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.steps=1", "trainer.device=cuda"];
    let sample = ["sample", "runs/diffusion", "--videos", "1", "--steps", "2", "--device", "cuda"];
    let encode = ["encode", "runs/autoencoder", "--videos", "clips.safetensors", "--frames", "4", "--resolution", "32"];
    let encode = [&encode[..], &["--clips", "2", "--device", "cuda"]].concat();
    let repeats = ["trainer.deterministic=true", "loss.adversarial_weight=0"];
    for (arguments, autotunes, rounds) in [
        ([&train[..], &["--run", "a"]].concat(), true, false),
        ([&train[..], &["--run", "b", "trainer.tf32=true"]].concat(), true, true),
        ([&train[..], &["--run", "c"], &repeats].concat(), false, false),
        ([&sample[..], &["--out", "a.npz"]].concat(), false, false),
        ([&sample[..], &["--out", "b.npz", "--tf32"]].concat(), false, true),
        ([&encode[..], &["--out", "a.safetensors"]].concat(), false, false),
        ([&encode[..], &["--out", "b.safetensors", "--tf32"]].concat(), false, true),
    ] {
        let (said, Counts { autotuned, tf32, .. }) = gpu.succeed(at, &arguments);
        println!("{arguments:?}: {autotuned} convolutions autotuned, {tf32} in TF32");
        assert_eq!((autotuned > 0, tf32 > 0), (autotunes, rounds), "{arguments:?}");
        let devices: Vec<&str> = said.err.lines().filter(|line| line.contains("device: cuda:0 (")).collect();
        assert_eq!(devices.len(), 1, "{}", said.err);
    }
}

/// A graph cannot be recorded on this device: that is told once, for all batches, and the samples are the same.
#[test]
fn a_graph_that_cannot_be_recorded_is_done_without() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion", "trainer.steps=1"]);
    let sample = |graphs: &str| -> (Said, Vec<u8>) {
        let out = format!("{graphs}.npz");
        let arguments =
            ["sample", "runs/diffusion", "--videos", "4", "--batch", "2", "--steps", "3", "--device", "cuda"];
        let mut command = gpu.command(at, &[&arguments[..], &["--out", &out]].concat());
        command.env("LVDM_CUDA_GRAPHS", graphs);
        let (said, _) = gpu.finish(command);
        assert_eq!(said.status, 0, "{}", said.err);
        (said, fs::read(at.join(out)).unwrap())
    };
    let ((with, samples), (without, same)) = (sample("1"), sample("0"));
    let told = |said: &Said| said.err.matches("warning: a CUDA graph could not be recorded").count();
    assert_eq!((told(&with), told(&without)), (1, 0), "{}", with.err);
    assert!(samples == same, "other samples");
}

/// Its tensors come to the host on their own while training goes on.
#[test]
fn a_checkpoint_is_not_waited_for() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let train = |run: &str, every: &str| {
        let arguments =
            ["train", "diffusion", "diffusion.yaml", "trainer.steps=3", "trainer.device=cuda", "--run", run];
        gpu.succeed(at, &[&arguments[..], &[every]].concat()).1
    };
    let more = train("often", "trainer.checkpoint_every=1") - train("once", "trainer.checkpoint_every=1000");
    println!("two checkpoints more are {more:?}");
    assert!(more.down > 100, "{more:?}");
    assert_eq!((more.blocking_down, more.blocking_up, more.reads), (0, 0, 0), "{more:?}");
    // and what comes is what was there
    let file = |run: &str| checkpoint::path(&at.join(run), 3);
    same_checkpoint(&file("often"), &file("once"));
}
