//! Graphs: a step of a training, or of sampling, that is recorded once and then launched as a whole.

use std::{fs, path::Path, process::Command};

use lvdm::checkpoint;

use crate::{
    common::{Said, same_checkpoint, succeed_in},
    device::{Counts, Gpu},
    training::last_log,
    workplace, write_latte, write_mcvd, write_transformer,
};

/// `lvdm` that finds graphs beside it, with variables of the environment.
fn run(gpu: &Gpu, at: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> (Said, Counts) {
    let program = at.join("lvdm");
    if !program.exists() {
        gpu.with_graphs(at);
    }
    let usual = gpu.command(at, arguments);
    let mut command = Command::new(program);
    command.args(usual.get_args()).current_dir(at);
    for (key, value) in usual.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command.envs(variables.iter().copied());
    let (said, counts) = gpu.finish(command);
    assert_eq!(said.status, 0, "lvdm {arguments:?}\n{}\n{}", said.out, said.err);
    (said, counts[0])
}

/// With graphs, or without.
fn graphs(are_on: bool) -> [(&'static str, &'static str); 1] {
    [("LVDM_CUDA_GRAPHS", if are_on { "1" } else { "0" })]
}

const EDM: &str = "objective={predict: edm, loss: l2, weight: {kind: min_snr, gamma: 5.0}}";
const REFUSED: &str = "could not be recorded as a CUDA graph";

/// Trains with graphs and without: the same to the bit. Gives what a step more counts with graphs, and what was said.
fn trains_the_same(gpu: &Gpu, at: &Path, name: &str, train: &[&str]) -> (Counts, Said) {
    let train = |which: &str, with_graphs: bool, steps: i64| {
        let more = [
            "--run".to_string(),
            format!("runs/{name}-{which}"),
            "trainer.device=cuda".to_string(),
            format!("trainer.steps={steps}"),
        ];
        let arguments: Vec<&str> = train.iter().copied().chain(more.iter().map(String::as_str)).collect();
        run(gpu, at, &arguments, &graphs(with_graphs))
    };
    let ((said, six), (_, seven), (_, without)) =
        (train("six", true, 6), train("seven", true, 7), train("without", false, 7));
    let run = |which: &str| at.join(format!("runs/{name}-{which}"));
    same_checkpoint(&checkpoint::path(&run("seven"), 7), &checkpoint::path(&run("without"), 7));
    assert_eq!(last_log(&run("seven")), last_log(&run("without")), "{name}");
    // a run that is recorded anew after it went on
    let (_, resumed) = train("six", true, 11);
    let (_, whole) = train("without", true, 11);
    same_checkpoint(&checkpoint::path(&run("six"), 11), &checkpoint::path(&run("without"), 11));
    println!("{name}: {} launches with graphs, {} without", seven.launches, without.launches);
    for counts in [six, seven, resumed, whole] {
        assert_eq!((counts.blocking_up, counts.blocking_down, counts.reads), (0, 0, 0), "{name}: {counts:?}");
    }
    (seven - six, said)
}

/// From the third step on a step is one launch besides what brings its batch up: nothing is allocated for it, nothing is read.
#[test]
fn a_recorded_step_is_the_same_step() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    // pixels: nothing is encoded beside the steps
    let pixels = ["train", "diffusion", "diffusion.yaml", "autoencoder=pixels", "data.resolution=16"];
    let frames = "conditioning={prediction: 0.8, prefixes: [1], perturbation: 4, masked_loss: true}";
    for (name, more) in [
        ("plain", &[][..]),
        ("bf16", &["trainer.precision=bf16", "trainer.clip_gradient=0.1"]),
        ("frames", &[frames, "trainer.accumulate=2", "optimizer.warmup=9"]),
        ("recompute", &["unet.recompute=true", "trainer.ema_decay=null"]),
    ] {
        let (step, said) = trains_the_same(gpu, at, name, &[&pixels, more].concat());
        println!("{name}: a step more is {step:?}");
        assert!(!said.err.contains(REFUSED), "{}", said.err);
        // what makes latents of the clips, and brings all that is new to where the graph reads it
        let few = step.launches <= 40 + 3 * step.up && step.allocations <= 12 + 3 * step.up;
        assert!(step.graphs == 1 && step.up <= 20 && few, "{name}: {step:?}");
    }
}

/// Encoded clips, and other networks than the U-Net.
#[test]
fn steps_of_other_networks_are_recorded() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(8);
    let at = folder.path();
    write_mcvd(at);
    write_transformer(at);
    write_latte(at);
    for (name, train) in [
        ("latents", &["train", "diffusion", "diffusion.yaml"][..]),
        ("mcvd", &["train", "diffusion", "mcvd.yaml", "autoencoder=pixels", "data.resolution=16"]),
        ("codes", &["train", "transformer", "transformer.yaml"]),
        ("latte", &["train", "diffusion", "latte.yaml"]),
        ("edm", &["train", "diffusion", "diffusion.yaml", "schedule={kind: edm}", EDM]),
    ] {
        let (step, said) = trains_the_same(gpu, at, name, train);
        assert!(step.graphs == 1 && !said.err.contains(REFUSED), "{name}: {step:?}\n{}", said.err);
    }
}

/// Of an autoencoder both networks' steps are recorded: while there are no discriminators, and anew when they have come in; not
/// while what they count grows.
#[test]
fn steps_of_autoencoders_are_recorded() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let train = ["train", "autoencoder", "autoencoder.yaml"];
    for (name, more) in [
        ("judged", &[][..]),
        ("bf16", &["trainer.precision=bf16", "trainer.clip_gradient=0.1", "trainer.accumulate=2"]),
        ("both", &["loss.adversarial_start=3", "loss.adversarial_warmup=2", "loss.kl_weight=1.0e-6"]),
        ("matched", &["loss.feature_matching=1.0", "loss.video_discriminator={channels: 4, layers: 2}"]),
    ] {
        let (step, said) = trains_the_same(gpu, folder.path(), name, &[&train, more].concat());
        assert!(step.graphs == 2 && !said.err.contains(REFUSED), "{name}: {step:?}\n{}", said.err);
    }
}

/// A training that is not the same at every step goes on step by step: a codebook draws entries anew.
#[test]
fn steps_that_differ_are_not_recorded() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(8);
    let at = folder.path();
    let vqgan = "autoencoder={kind: vqgan, channels: 4, factors: [2, 8, 8], latent_channels: 4, codebook: {codes: 24}}";
    let tats =
        "loss={kind: tats, perceptual_weight: 0.0, adversarial_start: 0, discriminator: {channels: 4, layers: 1}}";
    for (name, more) in
        [("growing", &["loss.adversarial_warmup=90"][..]), ("codes", &[vqgan, tats, "trainer.ema_decay=null"])]
    {
        let (step, said) =
            trains_the_same(gpu, at, name, &[&["train", "autoencoder", "autoencoder.yaml"], more].concat());
        assert!(step.graphs == 0 && !said.err.contains(REFUSED), "{name}: {step:?}\n{}", said.err);
    }
}

/// Without our own kernels the learning rate of a step comes from the host: it is not recorded.
#[test]
fn without_own_kernels_no_step_is_recorded() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let train = |steps: &str| {
        let train = ["train", "diffusion", "diffusion.yaml", "--run", steps, "trainer.device=cuda", steps];
        run(gpu, folder.path(), &train, &[("LVDM_CUDA_GRAPHS", "1"), ("LVDM_GPU_KERNELS", "0")]).1
    };
    let step = train("trainer.steps=7") - train("trainer.steps=6");
    assert!(step.graphs == 0 && step.launches > 100, "{step:?}");
}

/// The calls of a network in sampling, of more batches than one.
#[test]
fn recorded_samples_are_the_same() {
    let Some(gpu) = Gpu::simulated() else { return };
    let folder = workplace(4);
    let at = folder.path();
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion", "trainer.steps=1"]);
    let sample = |with_graphs: bool| {
        let out = format!("{with_graphs}.npz");
        let arguments =
            ["sample", "runs/diffusion", "--videos", "4", "--batch", "2", "--steps", "3", "--device", "cuda"];
        let (_, counts) = run(gpu, at, &[&arguments[..], &["--out", &out]].concat(), &graphs(with_graphs));
        (counts.graphs, fs::read(at.join(out)).unwrap())
    };
    let ((some, with), (none, without)) = (sample(true), sample(false));
    // all calls but the first
    assert_eq!((some, none), (5, 0));
    assert!(with == without, "other samples");
}
