//! Which kernels a GPU may choose from, graphs, and checkpoints that come without waiting.

use std::fs;

use lvdm::checkpoint;

use crate::{
    common::{Said, same_checkpoint, succeed_in},
    device::{Counts, Gpu},
    workplace,
};

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
