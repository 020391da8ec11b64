//! Two GPUs and two ranks, whose gradients Gloo sums by way of the host.

use std::{fs, path::Path};

use lvdm::checkpoint::{self, Checkpoint};
use serde_json::{Value, json};

use crate::{
    common::{
        Said,
        processes::{ends_within, said, start},
        same_checkpoint, succeed_in,
    },
    device::{Counts, Gpu},
    distance, workplace,
};

const TWO: [&str; 4] = ["--nproc", "2", "--backend", "gloo"];

/// Runs `lvdm` on two GPUs and wants success; what each of its ranks counted, and not the launcher.
fn on_two(gpu: &Gpu, at: &Path, arguments: &[&str]) -> (Said, Vec<Counts>) {
    let mut command = gpu.command(at, arguments);
    command.env("SIMULATED_GPUS", "2");
    let (said, counts) = gpu.finish(command);
    assert_eq!(said.status, 0, "lvdm {arguments:?}\n{}\n{}", said.out, said.err);
    let ranks: Vec<Counts> = counts.into_iter().filter(|counts| counts.launches > 0).collect();
    assert_eq!(ranks.len(), 2, "{arguments:?}: both GPUs work");
    (said, ranks)
}

/// Two ranks on two GPUs train as two on the CPU do, and go on to the bit.
#[test]
fn two_gpus_train_as_two_ranks_of_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let sharded = "trainer.shard_optimizer=true";
    for (task, more) in [("autoencoder", "loss.sync_batch_norm=true"), ("diffusion", "unet.recompute=true")] {
        let file = format!("{task}.yaml");
        let train = |which: &str, device: &str, steps: &str| -> Vec<String> {
            let all = ["train", task, &file, more, "trainer.accumulate=2", device, steps, "--run", which];
            all.iter().chain(&TWO).map(ToString::to_string).collect()
        };
        let run = |which: &str| format!("runs/{task}-{which}");
        let last = |which: &str| checkpoint::path(&at.join(run(which)), 4);
        let as_strs =
            |list: &[String]| -> Vec<&'static str> { list.iter().map(|text| &*text.clone().leak()).collect() };
        succeed_in(at, &as_strs(&train(&run("cpu"), "trainer.device=cpu", "trainer.steps=4")));
        let on_gpus =
            |which: &str, steps: &str| on_two(gpu, at, &as_strs(&train(&run(which), "trainer.device=cuda", steps))).1;
        let (parts, whole) = (on_gpus("parts", "trainer.steps=2"), on_gpus("whole", "trainer.steps=4"));
        // gradients are waited for, in pinned memory; nothing else is
        let blocking =
            |counts: &[Counts]| counts.iter().map(|c| c.blocking_up + c.blocking_down + c.reads).sum::<i64>();
        assert_eq!(blocking(&whole), blocking(&parts), "{parts:?} {whole:?}");
        let (cpu, gpus) = (Checkpoint::read(&last("cpu")).unwrap(), Checkpoint::read(&last("whole")).unwrap());
        for part in ["model.", "ema.", "optimizer.model.exp_avg.", "optimizer.model.exp_avg_sq."] {
            let difference = distance(&gpus, &cpu, part);
            println!("{task} on two GPUs: {part}… differ by {difference:.1e}");
            assert!(difference < 1e-4, "{task}, {part}: {difference:e}");
        }
        on_gpus("parts", "trainer.steps=4");
        same_checkpoint(&last("parts"), &last("whole"));
        // each GPU holds the optimizer's state of its share
        let sharded =
            [&train(&run("sharded"), "trainer.device=cuda", "trainer.steps=4")[..], &[sharded.into()]].concat();
        on_two(gpu, at, &as_strs(&sharded));
        same_checkpoint(&last("sharded"), &last("whole"));
    }
}

/// The environment names the backend too; what it cannot name is said.
#[test]
fn the_environment_names_the_backend() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.device=cuda", "trainer.steps=1", "--nproc", "2"];
    let with = |backend: &str| {
        let mut command = gpu.command(at, &train);
        command.env("SIMULATED_GPUS", "2").env("LVDM_BACKEND", backend);
        gpu.finish(command).0
    };
    assert!(with("mpi").error(2).contains("'mpi'"));
    let said = with("gloo");
    assert_eq!(said.status, 0, "{}", said.err);
    assert!(said.out.contains("trained to step 1"), "{}", said.out);
}

/// Samples and figures are the same on one GPU and on two, to the last byte and digit.
#[test]
fn samples_and_figures_are_the_same_on_two_gpus() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(10);
    let at = folder.path();
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion", "trainer.steps=1"]);
    let sample =
        ["sample", "runs/diffusion", "--videos", "3", "--batch", "1", "--steps", "2", "--device", "cuda", "--out"];
    gpu.succeed(at, &[&sample[..], &["one.safetensors"]].concat());
    on_two(gpu, at, &[&sample[..], &["two.safetensors", "--nproc", "2"]].concat());
    assert!(fs::read(at.join("one.safetensors")).unwrap() == fs::read(at.join("two.safetensors")).unwrap());

    let experiment = "\
evaluation: {clips: 3}
real: {dataset: {kind: packed, file: clips.safetensors}, frames: 10, resolution: 32}
generated: {kind: run, run: runs/diffusion, sampler: {kind: ddim, steps: 2, eta: 0.0}, batch: 2}
out: evaluation
";
    fs::write(at.join("evaluate.yaml"), experiment).unwrap();
    let figures = || -> Value {
        let report: Value = serde_json::from_slice(&fs::read(at.join("evaluation/figures.json")).unwrap()).unwrap();
        json!([report["figures"], report["psnr_db"]])
    };
    let forget = || fs::remove_dir_all(at.join("runs/features")).unwrap();
    let three = gpu.succeed(at, &["evaluate", "evaluate.yaml", "--device", "cuda"]).1;
    let one = figures();
    assert!(one[0]["samples"]["fvd"].as_f64().unwrap() > 0.0);
    forget();
    let on_both = || on_two(gpu, at, &["evaluate", "evaluate.yaml", "--device", "cuda", "--nproc", "2"]).1;
    let kernels = |counts: Vec<Counts>| counts.iter().map(|counts| counts.launches).sum::<i64>();
    let first = kernels(on_both());
    assert_eq!(one, figures());
    // features of real clips are kept for both GPUs
    let again = kernels(on_both());
    println!("evaluation on two GPUs: {first} kernels, {again} with the features of real clips");
    assert_eq!(one, figures());
    assert!(first - again > 3 * 50, "features of 3 real clips were made again: {first} kernels, then {again}");
    forget();
    let four = gpu.succeed(at, &["evaluate", "evaluate.yaml", "--device", "cuda", "evaluation.clips=4"]).1;
    (four - three).wait_for_nothing("evaluate, a clip of each set", 1);
    forget();
    succeed_in(at, &["evaluate", "evaluate.yaml", "--device", "cpu"]);
    let (of_gpu, of_cpu) = (one, figures());
    let fvd = |figures: &Value| figures[0]["samples"]["fvd"].as_f64().unwrap();
    println!("FVD {} on the GPU, {} on the CPU", fvd(&of_gpu), fvd(&of_cpu));
    assert!((fvd(&of_gpu) - fvd(&of_cpu)).abs() < 1e-3 * fvd(&of_cpu), "{of_gpu} {of_cpu}");
}

/// One GPU is one rank's: two that come to the same one are refused, whoever started them, and so is one without a GPU
/// among others with one. All of them say so, and none waits.
#[test]
fn ranks_have_a_gpu_each() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.device=auto", "--backend", "gloo"];
    // what is shown to a rank: the GPU's number, and how many there are
    let refused = |shown: [(&str, &str); 2], words: &str| {
        let mut of = shown.into_iter();
        let ranks = start(|| {
            let (name, count) = of.next().unwrap();
            let mut command = gpu.command(at, &train);
            command.env("CUDA_VISIBLE_DEVICES", name).env("SIMULATED_GPUS", count);
            command
        });
        for rank in ranks {
            let (status, text) = ends_within(rank, 30);
            assert!(status == 1 && text.contains(words), "{text}");
        }
    };
    refused([("0", "1"), ("0", "1")], "ranks 0 and 1 are both on one GPU");
    refused([("0", "1"), ("", "0")], "has none that LibTorch sees");
    let two = gpu.finish(gpu.command(at, &[&train[..], &["--nproc", "2"]].concat())).0;
    let error = two.error(1);
    assert!(error.contains("rank 1 is number 1 on its machine") && error.contains("sees 1 GPUs"), "{error}");
    // what `srun --gpus-per-task 1` gives: the first GPU of each rank, and different ones
    let mut of = ["3", "5"].into_iter();
    let ranks = start(|| {
        let mut command = gpu.command(at, &[&train[..], &["trainer.steps=2", "--run", "runs/each"]].concat());
        command.env("CUDA_VISIBLE_DEVICES", of.next().unwrap());
        command
    });
    for said in ranks.map(said) {
        assert_eq!(said.status, 0, "{}", said.err);
    }
}

/// Where NCCL was not built, or is not there, the error names what does without it.
#[test]
fn without_nccl_the_other_backend_is_named() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.device=cuda", "trainer.steps=1", "--nproc", "2"];
    let mut command = gpu.command(folder.path(), &train);
    command.env("SIMULATED_GPUS", "2");
    let (said, _) = gpu.finish(command);
    assert_eq!(said.status, 1, "{}", said.out);
    assert!(said.err.contains("NCCL") && said.err.contains("--backend gloo"), "{}", said.err);
}
