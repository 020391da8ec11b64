//! The whole job at toy size: videos → autoencoder → diffusion → samples → FVD.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use common::{Said, lvdm_in};
use lvdm::data::VideoReader;
use serde_json::Value;

const FILES: [(&str, &str); 4] = [
    (
        "data.yaml",
        "videos: {root: data/toy, train: 6, test: 4, frames: 12, size: 32, fps: 12, seed: 0}\nlatent_clips: 8\n",
    ),
    (
        "autoencoder.yaml",
        "\
data: {dataset: {kind: folder, root: data/toy/train}, frames: 10, resolution: 32, flip: true}
autoencoder: {channels: 8, factors: [2, 4, 4], norm_groups: 8}
loss: {perceptual_weight: 0.25, adversarial_weight: 0.1, adversarial_start: 2, adversarial_warmup: 2, discriminator: {channels: 8, layers: 2}}
optimizer: {kind: adam, learning_rate: 1.0e-3}
trainer: {steps: 4, batch: 1, log_every: 1, checkpoint_every: 2, picture_every: 4, ema_decay: 0.5}
",
    ),
    (
        "diffusion.yaml",
        "\
data: {dataset: {kind: folder, root: data/toy/train}, frames: 10, resolution: 32}
latents: runs/toy/latents.safetensors
autoencoder: runs/toy/autoencoder
unet: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-3}
trainer: {steps: 4, batch: 2, log_every: 1, checkpoint_every: 2, picture_every: 4, ema_decay: 0.5}
sampler: {kind: ddim, steps: 2, eta: 1.0}
",
    ),
    (
        "evaluate.yaml",
        "\
evaluation: {clips: 4}
real: {dataset: {kind: folder, root: data/toy/test}, frames: 10, resolution: 32}
train: {dataset: {kind: folder, root: data/toy/train}, frames: 10, resolution: 32}
generated: {kind: run, run: runs/toy/diffusion, sampler: {kind: ddim, steps: 4, eta: 1.0}, batch: 4}
out: runs/toy/evaluation
",
    ),
];

/// `lvdm demo`, with as many threads as it likes.
fn demo(folder: &Path) -> Said {
    let output =
        lvdm_in(folder, &["demo", "experiments/toy", "--device", "cpu"]).env_remove("OMP_NUM_THREADS").output();
    let said = Said::from(output.unwrap());
    assert_eq!(said.status, 0, "{}\n{}", said.out, said.err);
    said.names_its_device_once();
    said
}

fn summary(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join("runs/toy/summary.json")).unwrap()).unwrap()
}

fn experiments(at: &Path) {
    fs::create_dir_all(at.join("experiments/toy")).unwrap();
    for (name, text) in FILES {
        fs::write(at.join("experiments/toy").join(name), text).unwrap();
    }
}

/// What is trained when a signal comes is saved, and the demo says that it goes on from there.
#[test]
fn a_signal_to_the_demo_saves_what_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    experiments(at);
    let file = at.join("experiments/toy/autoencoder.yaml");
    let text = fs::read_to_string(&file).unwrap().replace("steps: 4,", "steps: 1000000,");
    fs::write(file, text.replace("_every: 2", "_every: 1000000").replace("_every: 4", "_every: 1000000")).unwrap();
    let run = at.join("runs/toy/autoencoder");
    let lines = || fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    for signal in ["INT", "TERM"] {
        let known = lines();
        let mut command = Command::new("env");
        command.arg("--default-signal=INT").arg(env!("CARGO_BIN_EXE_lvdm"));
        command.args(["demo", "experiments/toy", "--device", "cpu"]).current_dir(at).env_remove("LD_LIBRARY_PATH");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let start = Instant::now();
        while lines() < known + 2 {
            assert!(child.try_wait().unwrap().is_none() && start.elapsed().as_secs() < 60, "it does not train");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert!(
            Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap().success()
        );
        let said = Said::from(child.wait_with_output().unwrap());
        assert_eq!(said.status, 75, "{}\n{}", said.out, said.err);
        assert!(said.out.contains("stopped and saved at step"), "{}", said.out);
        let kept = lvdm::checkpoint::list(&run).unwrap();
        let step = lvdm::checkpoint::Checkpoint::read(kept.last().unwrap()).unwrap().progress.step;
        assert_eq!(step as usize, lines(), "every step that was logged is saved");
        assert!(!at.join("runs/toy/diffusion").exists(), "nothing is built on what is not trained to its end");
    }
}

/// A launcher would start several demos in one folder.
#[test]
fn the_demo_is_one_process() {
    let folder = tempfile::tempdir().unwrap();
    experiments(folder.path());
    let mut command = lvdm_in(folder.path(), &["demo", "experiments/toy"]);
    let said = Said::from(
        command
            .env("OMPI_COMM_WORLD_RANK", "1")
            .env("OMPI_COMM_WORLD_SIZE", "2")
            .env("OMPI_COMM_WORLD_LOCAL_RANK", "1")
            .env("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
            .output()
            .unwrap(),
    );
    assert!(said.error(2).contains("one process"), "{}", said.err);
    assert!(!folder.path().join("data").exists() && !folder.path().join("runs").exists());
}

/// From nothing to figures, videos, pictures and logs, in less than two minutes; a second start trains nothing again.
#[test]
fn from_videos_to_figures() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    experiments(at);
    let start = Instant::now();
    let said = demo(at);
    let seconds = start.elapsed().as_secs_f64();
    println!("{seconds:.0} s\n{}", said.out);
    assert!(seconds < 120.0, "{seconds} s");

    // figures
    let first = summary(at);
    assert!(first["psnr_db"].as_f64().unwrap() > 3.0, "{first}");
    for figure in ["fvd", "kvd"] {
        let sets: BTreeMap<String, f64> = serde_json::from_value(first[figure].clone()).unwrap();
        assert_eq!(sets.keys().collect::<Vec<_>>(), ["frozen", "gaussian", "samples", "train"], "{figure}");
        assert!(sets.values().all(|value| value.is_finite()), "{figure}: {sets:?}");
        assert!(figure == "kvd" || sets.values().all(|value| *value > 0.0), "{sets:?}");
        // real clips are nearer to real clips than noise is, after next to no training
        assert!(sets["train"] < sets["gaussian"], "{figure}: {sets:?}");
    }
    assert_eq!(first["clips"], 4);
    assert!(first["protocol"]["hash"].as_str().unwrap().len() >= 8, "{first}");
    assert!(first["protocol"]["text"].as_str().unwrap().contains("4 clips"), "{first}");
    let stages: BTreeMap<String, f64> = serde_json::from_value(first["seconds"].clone()).unwrap();
    for stage in ["videos", "autoencoder", "latents", "diffusion", "sample", "evaluate"] {
        assert!(stages[stage] > 0.0, "{stage}: {stages:?}");
    }
    assert!(stages.values().sum::<f64>() < seconds);
    for word in
        ["FVD", "KVD", "samples", "train", "frozen", "gaussian", "PSNR", "summary.json", "tensorboard", "report.html"]
    {
        assert!(said.out.contains(word), "`{word}` is not in\n{}", said.out);
    }

    // videos, pictures, logs
    let samples = at.join("runs/toy/evaluation/samples");
    for i in 0..4 {
        let mut video = VideoReader::open(&samples.join(format!("{i:05}.mp4"))).unwrap();
        assert_eq!((video.frames(), video.width(), video.height()), (10, 32, 32));
        assert_eq!(video.read(0, 10, 1).unwrap().len(), 10);
    }
    assert_eq!(fs::read_dir(&samples).unwrap().count(), 4);
    for name in ["samples.png", "reconstructions.png", "gaussian.png"] {
        let file = fs::File::open(at.join("runs/toy/evaluation").join(name)).unwrap();
        let reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().unwrap();
        assert!(reader.info().width >= 32 * 4 && reader.info().height >= 32 * 4, "{name}");
    }
    for run in ["autoencoder", "diffusion"] {
        let run = at.join("runs/toy").join(run);
        let events = fs::read_dir(run.join("tensorboard")).unwrap().count();
        assert_eq!(events, 1, "{}", run.display());
        assert!(run.join("experiment.yaml").exists() && run.join("metrics.jsonl").exists());
    }
    let page = fs::read_to_string(at.join("runs/toy/report.html")).unwrap();
    assert_eq!(page.matches("<video").count(), 4);
    for words in [
        "2 trainings, 1 evaluation, 4 videos",
        "toy, by stage",
        "learning_rate",
        first["protocol"]["hash"].as_str().unwrap(),
    ] {
        assert!(page.contains(words), "`{words}` is not in the report");
    }

    // a second start
    let trained = ["autoencoder", "diffusion"].map(|run| at.join("runs/toy").join(run));
    let state = || {
        let of = |run: &std::path::PathBuf| {
            let checkpoints = fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| {
                let entry = entry.unwrap();
                (entry.path(), entry.metadata().unwrap().modified().unwrap())
            });
            let checkpoints: BTreeMap<_, _> = checkpoints.collect();
            (checkpoints, fs::read(run.join("metrics.jsonl")).unwrap())
        };
        let modified = |path: &str| fs::metadata(at.join(path)).unwrap().modified().unwrap();
        let data = [modified("runs/toy/latents.safetensors"), modified("data/toy/train/00000.mp4")];
        (trained.each_ref().map(of), data)
    };
    let before = state();
    demo(at);
    assert!(state() == before, "a finished stage was done again");
    let second = summary(at);
    for figure in ["fvd", "kvd"] {
        let (a, b) = (first[figure]["samples"].as_f64().unwrap(), second[figure]["samples"].as_f64().unwrap());
        assert!((a - b).abs() <= 1e-3 * a.abs(), "{figure}: {a} and {b}");
    }
}
