//! Sampling: the CPU's videos, and batches that cost no waiting; weights that go up in few transfers.

use std::path::Path;

use lvdm::data::VideoReader;

use crate::{
    common::{
        succeed_in,
        text_runs::{import, write_diffusers},
    },
    device::Gpu,
    same_clips, workplace, write_latte, write_mcvd, write_stages, write_transformer,
};

/// The videos of `sample` on both devices; on the GPU, twice as many cost no waiting beyond one stall a batch, for its videos.
fn samples_as_on_the_cpu(gpu: &Gpu, at: &Path, name: &str, sample: &[&str]) {
    samples_in_stages(gpu, at, name, sample, 1);
}

/// The same of a model of several stages, each of which hands on videos.
fn samples_in_stages(gpu: &Gpu, at: &Path, name: &str, sample: &[&str], stages: i64) {
    let file = |device: &str| format!("{name}-{device}.safetensors");
    let with = |videos: &'static str, device: &'static str, out: &str| -> Vec<String> {
        let more = ["--videos", videos, "--batch", "2", "--device", device, "--out", out].map(String::from);
        sample.iter().map(ToString::to_string).chain(more).collect()
    };
    let strings = |arguments: &[String]| -> Vec<&'static str> {
        arguments.iter().map(|argument| &*argument.clone().leak()).collect()
    };
    let one = gpu.succeed(at, &strings(&with("2", "cuda", "one.safetensors"))).1;
    let two = gpu.succeed(at, &strings(&with("4", "cuda", &file("cuda")))).1;
    succeed_in(at, &strings(&with("4", "cpu", &file("cpu"))));
    (two - one).wait_for_nothing(name, 2 * stages);
    assert_eq!(two.stalls - one.stalls, stages, "{name}: a stage of a batch of samples waits for its videos once");
    same_clips(name, &at.join(file("cuda")), &at.join(file("cpu")));
    println!("{name}: all that goes up before the second batch are {} copies, {} blocking", one.up, one.blocking_up);
    assert!(
        one.blocking_up == 0 && one.up < 20 * stages,
        "{name}: hundreds of weights go up in few transfers: {one:?}"
    );
}

#[test]
fn every_sampler_samples_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion", "trainer.steps=1"]);
    for (name, sampler) in [
        ("ddim", &["--sampler", "ddim", "--steps", "3", "--eta", "1"][..]),
        ("ddpm", &["--sampler", "ddpm"]),
        ("dpm-solver", &["--sampler", "dpm-solver", "--steps", "3"]),
        ("unipc", &["--sampler", "unipc", "--steps", "4"]),
        ("heun", &["--sampler", "heun", "--steps", "3"]),
    ] {
        samples_as_on_the_cpu(gpu, at, name, &[&["sample", "runs/diffusion"], sampler].concat());
    }
}

#[test]
fn latte_samples_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    write_latte(at);
    succeed_in(at, &["train", "diffusion", "latte.yaml", "--run", "runs/latte", "trainer.steps=4"]);
    for (name, sampler) in [("latte-ddpm", "respaced-ddpm"), ("latte-ddim", "respaced-ddim")] {
        samples_as_on_the_cpu(gpu, at, name, &["sample", "runs/latte", "--sampler", sampler, "--steps", "3"]);
    }
}

/// Several blocks, each given the one before, on the device.
#[test]
fn mcvd_samples_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(8);
    let at = folder.path();
    write_mcvd(at);
    let train = ["train", "diffusion", "mcvd.yaml", "trainer.steps=4"];
    succeed_in(at, &[&train[..], &["autoencoder=pixels", "data.resolution=16", "--run", "runs/mcvd"]].concat());
    samples_as_on_the_cpu(gpu, at, "mcvd", &["sample", "runs/mcvd", "--frames", "8"]);
    succeed_in(at, &[&train[..], &["network.spatin=8", "--run", "runs/spatin"]].concat());
    samples_as_on_the_cpu(gpu, at, "mcvd-spatin", &["sample", "runs/spatin"]);
}

/// No token waits for the one before it.
#[test]
fn codes_are_drawn_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(8);
    let at = folder.path();
    write_transformer(at);
    succeed_in(at, &["train", "transformer", "transformer.yaml", "--run", "runs/codes", "trainer.steps=2"]);
    samples_as_on_the_cpu(gpu, at, "codes", &["sample", "runs/codes", "--top-k", "12", "--top-p", "0.9"]);
}

#[test]
fn guided_text_samples_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let sample = ["sample", "sd-run", "--steps", "3", "--prompt", "a red cat", "--negative", "a dog"];
    samples_as_on_the_cpu(gpu, at, "guided", &[&sample[..], &["--guidance", "3"]].concat());
    samples_as_on_the_cpu(gpu, at, "unguided", &[&sample[..], &["--guidance", "1"]].concat());
}

/// Both stages, the second led to the first's video, whose gradient runs through the network.
#[test]
fn a_cascade_samples_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    write_stages(at);
    let train = |file: &str, run: &str, more: &[&str]| {
        succeed_in(at, &[&["train", "diffusion", file, "--run", run, "trainer.steps=1"], more].concat());
    };
    train("base.yaml", "runs/base", &[]);
    train("superresolution.yaml", "runs/plain", &[]);
    train("superresolution.yaml", "runs/guided", &["superresolution.reconstruction=2.0"]);
    for name in ["plain", "guided"] {
        let run = format!("runs/{name}");
        samples_in_stages(gpu, at, name, &["sample", &run, "--sampler", "ancestral", "--steps", "3"], 2);
    }
}

/// Hierarchical long videos. They come as compressed files, so that the rounding of their bytes is seen through the codec.
#[test]
fn long_videos_are_sampled_as_on_the_cpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(8);
    let at = folder.path();
    let train = |run: &str, conditioning: &str| {
        let one = ["train", "diffusion", "diffusion.yaml", "--run", run, "trainer.steps=1", conditioning];
        succeed_in(at, &one);
    };
    train("runs/prediction", "conditioning={prediction: 0.8, prefixes: [1], perturbation: 3}");
    train("runs/interpolation", "conditioning={interpolation: 0.9, perturbation: 3}");
    let sample = |videos: &'static str, device: &'static str, out: &'static str| {
        let long =
            ["sample-long", "runs/prediction", "--interpolation", "runs/interpolation", "--frames", "24", "--gap", "2"];
        let how =
            ["--steps", "2", "--level", "2", "--batch", "1", "--videos", videos, "--device", device, "--out", out];
        [&long[..], &how].concat()
    };
    let one = gpu.succeed(at, &sample("1", "cuda", "one")).1;
    let two = gpu.succeed(at, &sample("2", "cuda", "gpu")).1;
    (two - one).wait_for_nothing("long videos", 2);
    succeed_in(at, &sample("2", "cpu", "cpu"));
    // given frames that the network knows nothing of
    let guided = |videos: &'static str, device: &'static str, out: &'static str| {
        let long = ["sample-long", "runs/diffusion", "--frames", "24", "--reconstruction", "2", "--steps", "2"];
        [&long[..], &["--batch", "1", "--videos", videos, "--device", device, "--out", out]].concat()
    };
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion", "trainer.steps=1"]);
    let one = gpu.succeed(at, &guided("1", "cuda", "guided-one")).1;
    let two = gpu.succeed(at, &guided("2", "cuda", "guided-gpu")).1;
    (two - one).wait_for_nothing("guided long videos", 2);
    succeed_in(at, &guided("2", "cpu", "guided-cpu"));
    for (which, file) in [("", "00000.mp4"), ("", "00001.mp4"), ("guided-", "00000.mp4"), ("guided-", "00001.mp4")] {
        let video = |folder: &str| -> Vec<u8> {
            let mut reader = VideoReader::open(&at.join(format!("{which}{folder}")).join(file)).unwrap();
            reader.read(0, 24, 1).unwrap().into_iter().flat_map(|frame| frame.pixels).collect()
        };
        let (gpu, cpu) = (video("gpu"), video("cpu"));
        assert_eq!(gpu.len(), cpu.len());
        let sum: u64 = gpu.iter().zip(&cpu).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        let difference = sum as f64 / gpu.len() as f64 / 255.0;
        println!("{which}{file}: {difference:.1e} of the range in the mean");
        assert!(difference < 1e-3, "{file}: {difference:e}");
    }
}
