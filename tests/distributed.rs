//! Several ranks against one: the same gradients, losses, samples and figures; resume; ranks that die, hang or differ.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Result;
use common::{
    Said, lvdm_in, noise, plain_loss,
    processes::{ends_within, free_port, said, signal, start},
    relative_error, run_in, same_checkpoint, succeed_in, wake, write_packed,
};
use lvdm::{
    autoencoder_loss::{AutoencoderLoss, AutoencoderLossConfig},
    autoencoder_loss::{DiscriminatorConfig, VideoDiscriminatorConfig},
    checkpoint::{self, Checkpoint},
    codecs::{AutoencoderConfig, Encoded, VideoAutoencoder},
    diffusion::{NoiseSchedule, Objective, ScheduleConfig},
    distributed::{self, Launch, Ranks},
    networks::{Ports, UNet3d, UNetConfig},
    nn::{Init, Parameters},
    safetensors::{read_safetensors, write_safetensors_atomically},
    torch::{DeviceName, device_name},
    train::{Batch, Picture, Task, Terms, TrainedNetwork, Trainer},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

// ---- gradients: two ranks in two processes of this test, against one with the whole batch ----------------------------

/// What a worker process is to do, and where it leaves what it found.
const JOB: &str = "LVDM_TEST_JOB";
const OUT: &str = "LVDM_TEST_OUT";

/// This rank's rows of a batch.
fn share(ranks: &Ranks, batch: &Tensor) -> Tensor {
    let rows = batch.size()[0] / ranks.size() as i64;
    batch.narrow(0, ranks.rank() as i64 * rows, rows)
}

/// Reduced gradients by name, with the ranks' mean of each loss under `loss.…`.
type Found = Vec<(String, Tensor)>;

/// Runs one backward pass over all ranks, in small buckets, of which some must go out early.
fn reduced(ranks: &Ranks, parameters: &Parameters, prefix: &str, backward: impl FnOnce() -> f64) -> Found {
    let list: Vec<Tensor> = parameters.trainable().into_iter().map(|(_, t)| t).collect();
    let buckets = ranks.buckets_of(&list, 4 << 10).unwrap();
    if let Some(buckets) = &buckets {
        buckets.arm();
    }
    let loss = backward();
    if let Some(buckets) = &buckets {
        ranks.finish(buckets).unwrap();
        let (early, all) = ranks.overlap().unwrap();
        assert!(all > 3 && early > all / 2, "{early} of {all} buckets went out during the backward pass");
    }
    let mut found: Found =
        parameters.trainable().into_iter().map(|(name, t)| (format!("{prefix}{name}"), t.grad())).collect();
    let loss = ranks.sum(&[loss]).unwrap()[0] / ranks.size() as f64;
    found.push((format!("loss.{prefix}"), Tensor::from_slice(&[loss])));
    found
}

fn diffusion_gradients(ranks: &Ranks, kind: Kind, recompute: bool) -> Found {
    let config = json!({"channels": 32, "multipliers": [1, 2], "blocks_per_level": 1, "attention_factors": [2],
        "heads": 2, "recompute": recompute});
    let config: UNetConfig = serde_json::from_value(config).unwrap();
    let parameters = Parameters::new(Device::Cpu, 1);
    let ports = Ports::of([4, 2, 1, 1]);
    let unet = UNet3d::new(&parameters.root(), &config, &ports);
    wake(&parameters);
    parameters.to_kind(kind);
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let shape = [4, 4, 2, 8, 8];
    let (z_0, drawn) = (share(ranks, &noise(0, &shape)).to_kind(kind), share(ranks, &noise(1, &shape)).to_kind(kind));
    let t: Vec<f64> = share(ranks, &Tensor::from_slice(&[3f64, 250.0, 600.0, 990.0])).try_into().unwrap();
    reduced(ranks, &parameters, "", || {
        let loss = plain_loss(&Objective::default(), &unet, &schedule, &z_0, &t, &drawn);
        loss.backward();
        loss.double_value(&[])
    })
}

/// With `of_clips` a discriminator of whole clips and feature matching too.
fn autoencoder_gradients(ranks: &Ranks, kind: Kind, of_clips: bool) -> Found {
    let config: AutoencoderConfig =
        serde_json::from_value(json!({"channels": 4, "factors": [2, 4, 4], "norm_groups": 4})).unwrap();
    let parameters = Parameters::new(Device::Cpu, 2);
    let autoencoder = VideoAutoencoder::new(&parameters.root(), &config);
    parameters.to_kind(kind);
    let loss = AutoencoderLossConfig {
        perceptual_weight: 0.0,
        kl_weight: 1e-3,
        adversarial_start: 0,
        sync_batch_norm: true,
        discriminator: DiscriminatorConfig { channels: 8, layers: 2 },
        video_discriminator: of_clips.then_some(VideoDiscriminatorConfig { channels: 4, layers: 2, weight: 1.0 }),
        feature_matching: if of_clips { 1.0 } else { 0.0 },
        ..Default::default()
    };
    let loss = AutoencoderLoss::new(&loss, Device::Cpu, kind, 3).unwrap().over(ranks);
    let x = share(ranks, &noise(0, &[4, 3, 4, 32, 32]).clamp(-1.0, 1.0)).to_kind(kind);
    let posterior_noise = |posterior: &Encoded| {
        let [_, rest @ ..] = &posterior.mode().size()[..] else { unreachable!() };
        share(ranks, &noise(5, &[&[4], rest].concat())).to_kind(kind)
    };
    let mut factor = 0.0;
    let mut found = reduced(ranks, &parameters, "", || {
        let posterior = Encoded::from(autoencoder.encode(&x));
        let reconstruction = autoencoder.decode(&posterior.sample(&posterior_noise(&posterior)));
        let terms = loss.generator_backward(&x, &reconstruction, &posterior, autoencoder.last_kernel(), 0, 1.0).read();
        factor = terms.adversarial_factor;
        terms.total
    });
    let discriminator = loss.discriminator_parameters().clone();
    let reconstruction = tch::no_grad(|| autoencoder.decode(&autoencoder.encode(&x).mean));
    found.extend(reduced(ranks, &discriminator, "discriminator.", || {
        loss.discriminator_backward(&x, &reconstruction, 1.0).read().loss
    }));
    assert!(factor > 0.0 && factor < 1e4);
    found.push(("loss.adversarial_factor".into(), Tensor::from_slice(&[factor])));
    let running = |(name, _): &(String, Tensor)| name.contains("running");
    found.extend(discriminator.named().into_iter().filter(running));
    found
}

/// One number that is trained; at the second step the loss of a `bad` rank is NaN.
struct Toy {
    parameters: Parameters,
    weight: Tensor,
    bad: bool,
    /// How long its pictures take.
    pictures: Duration,
}

impl Task for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        vec![TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() }]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        Ok(Batch { data: Tensor::from(1.0f32), text: None, labels: None, samples: vec![0], position: 0 })
    }

    fn gradients(&mut self, _network: usize, batch: &Batch, step: i64, scale: f64) -> Result<Terms> {
        let loss = (&self.weight - &batch.data).square().mean(None);
        (&loss * scale).backward();
        // the gradient is finite everywhere
        Ok(vec![("loss", if self.bad && step == 1 { loss.detach() * f64::NAN } else { loss.detach() })])
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        std::thread::sleep(self.pictures);
        Ok(Vec::new())
    }
}

/// Four steps; returns how many were left out.
fn train_toy(ranks: &Ranks, run: &Path, bad: bool, pictures: Duration) -> Result<i64> {
    let parameters = Parameters::new(Device::Cpu, 0);
    let weight = parameters.root().parameter("weight", &[1], Init::ZEROS);
    let task = Toy { parameters, weight: weight.shallow_clone(), bad, pictures };
    let config = json!({"steps": 4, "batch": 1, "log_every": 4, "picture_every": 2, "ema_decay": 0.9});
    let optimizer = serde_json::from_value(json!({"kind": "adam", "learning_rate": 0.1}))?;
    let config = serde_json::from_value(config)?;
    let trainer = Trainer::new(task, run, &config, &optimizer, &json!({}), Device::Cpu, None)?;
    let progress = trainer.over(ranks)?.train()?;
    assert_eq!(progress.step, 4, "rank {}", ranks.rank());
    ranks.ensure_same("after it", &[("weight".to_string(), weight)])?;
    Ok(progress.skipped_steps)
}

fn job(name: &str, ranks: &Ranks) -> Found {
    match name {
        "diffusion.float" => diffusion_gradients(ranks, Kind::Float, false),
        "diffusion.double" => diffusion_gradients(ranks, Kind::Double, false),
        "diffusion.recompute" => diffusion_gradients(ranks, Kind::Double, true),
        "autoencoder.float" => autoencoder_gradients(ranks, Kind::Float, false),
        "autoencoder.double" => autoencoder_gradients(ranks, Kind::Double, false),
        "discriminators.double" => autoencoder_gradients(ranks, Kind::Double, true),
        other => panic!("{other}"),
    }
}

/// Not a test: one rank of those below, in a process of its own.
#[test]
#[ignore = "started by the tests of gradients"]
fn worker() {
    let (Ok(names), Ok(out)) = (std::env::var(JOB), std::env::var(OUT)) else { return };
    tch::set_num_threads(1);
    let launch =
        Launch { rank_timeout: if ["hang", "slow"].contains(&names.as_str()) { 3 } else { 60 }, ..Launch::default() };
    let done = distributed::run(&launch, DeviceName::Cpu, |ranks, _| {
        for name in names.split(',') {
            if name == "hang" {
                ranks.at_step(if ranks.is_first() { 5 } else { 4 });
                if !ranks.is_first() {
                    std::thread::sleep(Duration::from_secs(600));
                }
                ranks.sum(&[0.0])?;
            }
            if name == "differ" {
                let mut tensors: Found = ["a", "b", "c"].map(|n| (n.to_string(), noise(1, &[5]))).into();
                ranks.ensure_same("step 7", &tensors)?;
                if !ranks.is_first() {
                    let _ = tensors[1].1.get(3).g_add_scalar_(1e-6);
                    let _ = tensors[2].1.zero_();
                }
                let error = ranks.ensure_same("step 8", &tensors).unwrap_err().to_string();
                assert!(error.contains("step 8") && error.contains("`b`") && error.contains("rank 1"), "{error}");
                continue;
            }
            if name == "nan" {
                // a loss that is not finite on one rank leaves the step out on all
                let bad = ranks.rank() == 1;
                let skipped = train_toy(ranks, &Path::new(&out).join("nan"), bad, Duration::ZERO)?;
                assert_eq!(skipped, 1, "rank {}", ranks.rank());
                continue;
            }
            if name == "slow" {
                let long = Duration::from_secs(8);
                train_toy(ranks, &Path::new(&out).join("slow"), false, long)?;
                // three pieces: the last one keeps one rank at work, and the other waits
                let make = |number: usize| {
                    std::thread::sleep(if number == 2 { long } else { Duration::ZERO });
                    Ok(Tensor::from(number as i64))
                };
                assert_eq!(ranks.share(3, make)?.iter().map(|t| t.int64_value(&[])).collect::<Vec<_>>(), [0, 1, 2]);
                let mut taken = Vec::new();
                ranks.collect(
                    3,
                    |number| Ok(vec![make(number)?]),
                    |number, _| {
                        taken.push(number);
                        Ok(())
                    },
                )?;
                assert_eq!(taken, if ranks.is_first() { vec![0, 1, 2] } else { vec![] });
                continue;
            }
            let found = job(name, ranks);
            if ranks.is_first() {
                write_safetensors_atomically(&Path::new(&out).join(name), &found, &Value::Null)?;
            }
        }
        Ok(())
    });
    if let Err(error) = done {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

/// Two ranks of this test's own program.
fn workers(job: &str, out: &Path) -> [Child; 2] {
    start(|| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["worker", "--exact", "--ignored", "--nocapture"]);
        command.env(JOB, job).env(OUT, out).env("OMP_NUM_THREADS", "1");
        command
    })
}

/// The reduced gradients, losses, adaptive weight and running statistics of two ranks are those of one rank with the
/// whole batch; also with activations recomputed. Ranks whose weights differ are told so, and a step that is bad on one is
/// left out on both.
#[test]
fn two_ranks_have_the_gradients_of_the_doubled_batch() {
    let folder = tempfile::tempdir().unwrap();
    let names = [
        "diffusion.float",
        "diffusion.double",
        "diffusion.recompute",
        "autoencoder.float",
        "autoencoder.double",
        "discriminators.double",
    ];
    for worker in workers(&(names.join(",") + ",differ,nan"), folder.path()) {
        let said = said(worker);
        assert_eq!(said.status, 0, "{}\n{}", said.out, said.err);
    }
    for name in names {
        let bound = if name.contains("float") { 1e-5 } else { 1e-10 };
        let (two, _) = read_safetensors(&folder.path().join(name)).unwrap();
        let one: BTreeMap<String, Tensor> = job(name, &Ranks::alone()).into_iter().collect();
        assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
        let flat = |tensors: &BTreeMap<String, Tensor>| {
            let gradients = tensors.iter().filter(|(name, _)| !name.starts_with("loss.") && !name.contains("running"));
            Tensor::cat(&gradients.map(|(_, t)| t.flatten(0, -1)).collect::<Vec<_>>(), 0)
        };
        let gradients = relative_error(&flat(&two), &flat(&one));
        let others = one.keys().filter(|name| name.starts_with("loss.") || name.contains("running"));
        let losses = others.map(|key| relative_error(&two[key], &one[key])).fold(0.0, f64::max);
        println!("{name}: gradients {gradients:.1e}, losses {losses:.1e}");
        assert!(gradients < bound && losses < bound, "{name}: gradients {gradients:e}, losses {losses:e}");
        let whole = flat(&one).norm().double_value(&[]);
        for (key, tensor) in &one {
            let difference = (tensor - &two[key]).norm().double_value(&[]);
            let size = tensor.norm().double_value(&[]);
            assert!(difference <= bound * (size + 1e-2 * whole), "{name}, {key}: {difference:e} of {size:e}");
        }
    }
}

// ---- whole runs -------------------------------------------------------------------------------------------------------

const AUTOENCODER: &str = "\
seed: 3
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, flip: true, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {pixel: l1, perceptual_weight: 0.0, adversarial_weight: 0.1, adversarial_start: 2, adversarial_warmup: 3, sync_batch_norm: true, discriminator: {channels: 4, layers: 1}}
optimizer: {kind: adam, learning_rate: 1.0e-4, eps: 1.0e-4}
trainer: {steps: 6, batch: 4, device: cpu, log_every: 1, checkpoint_every: 3, picture_every: 100, ema_decay: 0.99}
";

const DIFFUSION: &str = "\
seed: 4
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, workers: 1}
autoencoder: runs/autoencoder
unet: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-4, eps: 1.0e-4}
trainer: {steps: 6, batch: 4, device: cpu, log_every: 1, checkpoint_every: 3, picture_every: 100, ema_decay: 0.99}
sampler: {kind: ddim, steps: 2, eta: 1.0}
";

fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_packed(&folder.path().join("clips.safetensors"), 5, 6, 32);
    fs::write(folder.path().join("autoencoder.yaml"), AUTOENCODER).unwrap();
    fs::write(folder.path().join("diffusion.yaml"), DIFFUSION).unwrap();
    folder
}

fn metrics(run: &Path) -> Vec<BTreeMap<String, f64>> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let parse = |line| serde_json::from_str::<BTreeMap<String, f64>>(line).unwrap();
    let timeless = |(key, _): &(String, f64)| !key.contains("second") && !key.contains("memory");
    text.lines().map(|line| parse(line).into_iter().filter(timeless).collect()).collect()
}

/// The largest relative difference of two logs.
fn log_difference(a: &Path, b: &Path) -> f64 {
    let (a, b) = (metrics(a), metrics(b));
    assert_eq!(a.len(), b.len());
    let mut largest = 0.0f64;
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (key, value) in a {
            // means of logits have no scale of their own
            let scale = if key.contains("logits") || key == "adversarial" { 1.0 } else { b[key].abs() };
            largest = largest.max((value - b[key]).abs() / scale.max(1e-12));
        }
    }
    largest
}

/// Two ranks train as one with the doubled batch does, accumulation included; a run goes on to the bit, and on another
/// number of ranks with the same samples. Samples and figures do not depend on the number of ranks.
#[test]
fn two_ranks_do_what_one_does() {
    let folder = workplace();
    let at = folder.path();
    let train = |kind: &str, run: &str, more: &[&str]| {
        let file = format!("{kind}.yaml");
        succeed_in(at, &[&["train", kind, &file, "--run", run], more].concat())
    };
    let two = ["--nproc", "2"];
    for kind in ["autoencoder", "diffusion"] {
        let run = |name: &str| format!("runs/{kind}{name}");
        let last = |name: &str, step: i64| checkpoint::path(&at.join(run(name)), step);
        train(kind, &run(""), &["trainer.accumulate=2"]);
        let halves = ["trainer.batch=2", "trainer.accumulate=2"];
        let said = train(kind, &run("-two"), &[&two[..], &halves].concat());
        assert_eq!(said.out.matches("trained to step 6").count(), 1, "one rank speaks: {}", said.out);
        let difference = log_difference(&at.join(run("")), &at.join(run("-two")));
        println!("{kind}: the logs differ by {difference:.1e}");
        assert!(difference < 1e-4, "{kind}: {difference:e}");
        assert_eq!(Checkpoint::read(&last("-two", 6)).unwrap().progress.position, 6 * 8);
        // a group of one
        train(kind, &run("-one"), &["--nproc", "1", "trainer.accumulate=2"]);
        same_checkpoint(&last("", 6), &last("-one", 6));
        // interrupted after step 3
        let stop = ["trainer.steps=3"];
        train(kind, &run("-parts"), &[&two[..], &halves, &stop].concat());
        train(kind, &run("-parts"), &[&two[..], &halves].concat());
        same_checkpoint(&last("-two", 6), &last("-parts", 6));
        // on two ranks, then on one
        train(kind, &run("-mixed"), &[&two[..], &halves, &stop].concat());
        train(kind, &run("-mixed"), &["trainer.accumulate=2"]);
        let difference = log_difference(&at.join(run("")), &at.join(run("-mixed")));
        assert!(difference < 1e-4, "{kind}: {difference:e}");
    }
    let sample = |out: &str, more: &[&str]| {
        let sample = ["sample", "runs/diffusion", "--videos", "5", "--batch", "2", "--steps", "3", "--device", "cpu"];
        succeed_in(at, &[&sample[..], &["--out", out], more].concat());
        fs::read(at.join(out)).unwrap()
    };
    assert!(sample("one.safetensors", &[]) == sample("two.safetensors", &two), "samples differ");
}

/// Two ranks that train from one file of latents have each its own rows of it, and train as one rank with all of them
/// does. The first one sees that the file is not damaged.
#[cfg(feature = "video")]
#[test]
fn ranks_read_their_own_rows_of_a_latent_file() {
    let folder = workplace();
    let at = folder.path();
    fs::create_dir(at.join("videos")).unwrap();
    for i in 0..5 {
        let clip = common::moving_clips(5, 6, 32).get(i);
        lvdm::data::write_video(&at.join(format!("videos/{i}.mp4")), &clip, 8.0).unwrap();
    }
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "trainer.steps=1"]);
    let clips = ["--videos", "videos", "--frames", "4", "--resolution", "32", "--device", "cpu"];
    succeed_in(at, &[&["encode", "runs/autoencoder", "--out", "latents.safetensors"], &clips[..]].concat());
    let train = ["train", "diffusion", "diffusion.yaml", "latents=latents.safetensors", "--run"];
    succeed_in(at, &[&train[..], &["runs/one"]].concat());
    succeed_in(at, &[&train[..], &["runs/two", "trainer.batch=2", "--nproc", "2"]].concat());
    let difference = log_difference(&at.join("runs/one"), &at.join("runs/two"));
    assert!(difference < 1e-4, "{difference:e}");
    let mut bytes = fs::read(at.join("latents.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(at.join("latents.safetensors"), bytes).unwrap();
    let said = run_in(at, &[&train[..], &["runs/three", "--nproc", "2"]].concat());
    assert!(said.status == 1 && said.err.contains("latents.safetensors is damaged"), "{}", said.err);
}

/// `skipped_videos` of the log is the number of videos that could not be used, each once: one that the table names and
/// that is not there, which every rank knows, and two that ranks come across, both of them in time. It is the same for
/// either kind of training and on any number of ranks.
#[cfg(feature = "video")]
#[test]
fn skipped_videos_are_counted_once_over_ranks() {
    let folder = workplace();
    let at = folder.path();
    fs::create_dir(at.join("videos")).unwrap();
    let mut table = "videoid,name\nnowhere,a\n".to_string();
    for i in 0..5 {
        // the last two are too short
        let clip = common::moving_clips(5, 6, 32).get(i).narrow(1, 0, if i < 3 { 6 } else { 2 });
        lvdm::data::write_video(&at.join(format!("videos/{i}.mp4")), &clip, 8.0).unwrap();
        table += &format!("{i},a\n");
    }
    fs::write(at.join("table.csv"), table).unwrap();
    let counts = |kind: &str, run: &str, more: &[&str]| -> Vec<f64> {
        let videos = "data.dataset={kind: webvid, table: table.csv, root: videos}";
        let file = format!("{kind}.yaml");
        let train = ["train", kind, &file, "--run", run, videos, "data.resolution=16", "trainer.steps=8"];
        succeed_in(at, &[&train[..], more].concat());
        metrics(&at.join(run)).iter().map(|line| line["skipped_videos"]).collect()
    };
    let one = counts("autoencoder", "runs/one", &["trainer.batch=2"]);
    let two = ["--nproc", "2", "trainer.batch=1"];
    assert_eq!(counts("autoencoder", "runs/two", &two), one);
    let pixels = ["autoencoder=pixels", "unet.channels=32", "unet.attention_factors=[]"];
    assert_eq!(counts("diffusion", "runs/pixels", &[&two[..], &pixels].concat()).last(), Some(&3.0));
    assert!(one[0] >= 1.0 && one.is_sorted() && one.last() == Some(&3.0), "{one:?}");
}

/// FVD, KVD and PSNR, to the last digit, on one rank and on two.
#[test]
fn figures_do_not_depend_on_the_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 6, 10, 32);
    fs::write(
        at.join("autoencoder.yaml"),
        AUTOENCODER.replace("frames: 4", "frames: 10").replace("steps: 6", "steps: 1"),
    )
    .unwrap();
    fs::write(at.join("diffusion.yaml"), DIFFUSION.replace("frames: 4", "frames: 10").replace("steps: 6", "steps: 1"))
        .unwrap();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "--run", "runs/autoencoder"]);
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion"]);
    fs::write(
        at.join("evaluate.yaml"),
        "\
evaluation: {clips: 6}
real: {dataset: {kind: packed, file: clips.safetensors}, frames: 10, resolution: 32}
generated: {kind: run, run: runs/diffusion, sampler: {kind: ddim, steps: 2, eta: 0.0}, batch: 4}
out: evaluation
",
    )
    .unwrap();
    let figures = |more: &[&str]| -> Value {
        succeed_in(at, &[&["evaluate", "evaluate.yaml", "--device", "cpu"], more].concat());
        let report: Value = serde_json::from_slice(&fs::read(at.join("evaluation/figures.json")).unwrap()).unwrap();
        json!([report["figures"], report["psnr_db"]])
    };
    let one = figures(&[]);
    assert!(one[0]["samples"]["fvd"].as_f64().unwrap() > 0.0);
    fs::remove_dir_all(at.join("runs/features")).unwrap();
    assert_eq!(one, figures(&["--nproc", "2"]));
}

/// What several ranks keep of real clips they find again, and so does one: the key holds the kind of the devices and
/// nothing that differs from rank to rank. Figures name that kind.
#[test]
fn features_that_two_ranks_keep_are_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("real.safetensors"), 4, 10, 32);
    write_packed(&at.join("generated.safetensors"), 5, 10, 32);
    let device = device_name(Device::Cpu);
    let evaluate = |more: &[&str]| {
        let files = ["evaluate", "--real", "real.safetensors", "--generated", "generated.safetensors"];
        let size = ["--frames", "10", "--resolution", "32", "--clips", "4", "--device", "cpu", "--out", "out"];
        succeed_in(at, &[&files[..], &size, more].concat());
        let report: Value = serde_json::from_slice(&fs::read(at.join("out/figures.json")).unwrap()).unwrap();
        assert_eq!(report["device"], device.as_str());
        let kept: Vec<_> = fs::read_dir(at.join("runs/features")).unwrap().map(|file| file.unwrap().path()).collect();
        let [file] = &kept[..] else { panic!("{kept:?}") };
        // a file that is written anew is another one
        (report["figures"].clone(), std::os::unix::fs::MetadataExt::ino(&fs::metadata(file).unwrap()), file.clone())
    };
    let first = evaluate(&["--nproc", "2"]);
    assert_eq!(evaluate(&["--nproc", "2"]), first);
    assert_eq!(evaluate(&[]), first);
    let (_, key) = read_safetensors(&first.2).unwrap();
    assert_eq!(key.unwrap()["devices"], json!([device]));
}

/// Latents and packed clips are the same to the byte on one rank and on two, videos that cannot be used among them; so
/// are samples in one file.
#[test]
fn what_is_encoded_and_packed_does_not_depend_on_the_number_of_ranks() {
    let folder = workplace();
    let at = folder.path();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "trainer.steps=1"]);
    fs::create_dir(at.join("videos")).unwrap();
    for i in 0..5 {
        let clip = common::moving_clips(5, 6, 32).get(i);
        lvdm::data::write_video(&at.join(format!("videos/{i}.mp4")), &clip, 8.0).unwrap();
        fs::write(at.join(format!("videos/{i}.txt")), format!("video {i}, a caption of its own\n")).unwrap();
    }
    fs::write(at.join("videos/2.mp4"), "damaged").unwrap();
    let two = ["--nproc", "2"];
    let clips = ["--videos", "videos", "--frames", "4", "--resolution", "32"];
    let encode = ["encode", "runs/autoencoder", "--device", "cpu", "--flip", "--clips", "21"];
    for (name, verb, last) in [
        ("latents", &encode[..], "21 clips"),
        ("packed", &["data", "pack", "--captions"], "4 clips"),
        ("more", &["data", "pack", "--clips", "7"], "7 clips"),
    ] {
        let make = |ranks: usize, launch: &[&str]| {
            let file = format!("{name}-{ranks}.safetensors");
            let said = succeed_in(at, &[verb, &clips, &["--out", &file], launch].concat());
            assert_eq!(said.out, format!("{last} in {file}\n"), "one rank speaks");
            fs::read(at.join(file)).unwrap()
        };
        assert!(make(1, &[]) == make(2, &two), "{name} differs");
    }
    let (packed, _) = read_safetensors(&at.join("packed-2.safetensors")).unwrap();
    let captions = String::from_utf8(Vec::try_from(&packed["captions"]).unwrap()).unwrap();
    assert_eq!(captions.matches("a caption of its own").count(), 4, "{captions}");
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "trainer.steps=1"]);
    for ending in ["npz", "npy"] {
        let sample = |name: &str, launch: &[&str]| {
            let file = format!("{name}.{ending}");
            let fixed =
                ["sample", "runs/diffusion", "--videos", "5", "--batch", "2", "--steps", "2", "--device", "cpu"];
            succeed_in(at, &[&fixed[..], &["--out", &file], launch].concat());
            fs::read(at.join(file)).unwrap()
        };
        assert!(sample("one", &[]) == sample("shared", &two), "samples differ");
    }
}

/// mpirun's variables, as torchrun's: one training of two ranks, not two trainings in one folder. Where the variables say
/// only half, it is an error.
#[test]
fn processes_of_mpirun_are_ranks() {
    let folder = workplace();
    let at = folder.path();
    let port = free_port().to_string();
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.batch=2"];
    let children = ["0", "1"].map(|rank| {
        let mut command = lvdm_in(at, &train);
        command.env("OMPI_COMM_WORLD_RANK", rank).env("OMPI_COMM_WORLD_SIZE", "2");
        command.env("OMPI_COMM_WORLD_LOCAL_RANK", rank).env("OMPI_COMM_WORLD_LOCAL_SIZE", "2");
        command.env("MASTER_PORT", &port).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    });
    let [first, second] = children.map(said);
    assert_eq!((first.status, second.status), (0, 0), "{}\n{}", first.err, second.err);
    assert!(first.out.contains("trained to step 6") && second.out.is_empty(), "{}{}", first.out, second.out);
    let steps: Vec<f64> = metrics(&at.join("runs/autoencoder")).iter().map(|line| line["step"]).collect();
    assert_eq!(steps, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let last = Checkpoint::read(&checkpoint::path(&at.join("runs/autoencoder"), 6)).unwrap();
    assert_eq!(last.progress.position, 6 * 4, "two ranks of two clips each");
    for (variable, words) in [("RANK", "WORLD_SIZE is not"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK is not")] {
        let said: Said =
            lvdm_in(at, &[&train[..], &["--run", "half"]].concat()).env(variable, "1").output().unwrap().into();
        assert!(said.error(1).contains(words), "{}", said.err);
        assert!(!at.join("half").exists());
    }
}

/// A launcher has started the ranks: `--nproc` beside it would be one rank a machine, or ranks of ranks.
#[test]
fn nproc_beside_a_launcher_is_an_error() {
    let folder = workplace();
    let train = ["train", "autoencoder", "autoencoder.yaml", "--nproc", "2"];
    let torchrun = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29999")];
    let srun = [
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_STEP_NODELIST", "n[1-2]"),
    ];
    for variables in [torchrun, srun] {
        let said: Said = lvdm_in(folder.path(), &train).envs(variables).output().unwrap().into();
        let line = said.error(1);
        assert!(line.contains("rank 1 of 2") && line.contains("--ntasks-per-node"), "{line}");
    }
    assert!(!folder.path().join("runs").exists());
}

// ---- faults -------------------------------------------------------------------------------------------------------------

/// Two ranks that train for long, as started by a cluster; returns when both are at work.
fn long_training(at: &Path, timeout: &str) -> [Child; 2] {
    let ranks = start(|| {
        let mut command = lvdm_in(at, &["train", "autoencoder", "autoencoder.yaml", "--rank-timeout", timeout]);
        command.args(["trainer.steps=1000000", "trainer.batch=1", "trainer.checkpoint_every=1000000"]);
        command
    });
    wait_for(at, 3);
    ranks
}

/// Waits until the log has so many lines.
fn wait_for(at: &Path, lines: usize) {
    let start = Instant::now();
    let log = at.join("runs/autoencoder/metrics.jsonl");
    while fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < lines {
        assert!(start.elapsed() < Duration::from_secs(60), "training does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A rank that is killed, or hangs: the other ends within the time, and its error names that rank and the step.
#[test]
fn a_lost_rank_is_named() {
    for (lost, how, words) in [(1, "KILL", "rank 1 is gone"), (1, "STOP", "rank 1 is gone"), (0, "KILL", "rank 0")] {
        let folder = workplace();
        let ranks = long_training(folder.path(), "4");
        signal(&ranks[lost], how);
        let [first, second] = ranks;
        let (lost_rank, other) = if lost == 0 { (first, second) } else { (second, first) };
        let (status, text) = ends_within(other, 30);
        let error = text.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert_eq!(status, 1, "{text}");
        assert!(error.contains(words), "{text}");
        assert!(error.contains(&format!("error: rank {}, step ", 1 - lost)), "{text}");
        assert!(!text.contains("frame #"), "{text}");
        signal(&lost_rank, "KILL");
        said(lost_rank);
    }
}

/// A rank that lives, and does not do what the others wait for.
#[test]
fn a_hanging_rank_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let [first, hanging] = workers("hang", folder.path());
    let (status, text) = ends_within(first, 60);
    assert_eq!(status, 1);
    assert!(text.contains("error: rank 0, step 5: rank 1 hangs") && text.contains("step 4"), "{text}");
    signal(&hanging, "KILL");
    said(hanging);
}

/// Rank 0's pictures, or one rank's piece of shared work, take longer than a late rank is waited for: the others wait.
#[test]
fn work_of_one_rank_may_take_longer_than_ranks_wait() {
    let folder = tempfile::tempdir().unwrap();
    for worker in workers("slow", folder.path()) {
        let (status, text) = ends_within(worker, 120);
        assert_eq!(status, 0, "{text}");
    }
    assert!(folder.path().join("slow/checkpoints/step-00000004.safetensors").exists());
}

/// A rank that fails by itself: its own error, and the other's, which names it; the launcher names it too.
#[test]
fn a_rank_that_fails_is_named() {
    let folder = workplace();
    let at = folder.path();
    // rank 1 alone cannot read the checkpoint with which rank 0 goes on: it has another folder
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "trainer.steps=3"]);
    let other = workplace();
    let mut folders = [at, other.path()].into_iter();
    let [first, second] = start(|| lvdm_in(folders.next().unwrap(), &["train", "autoencoder", "autoencoder.yaml"]));
    let (status, text) = ends_within(second, 30);
    assert_eq!(status, 1);
    assert!(text.contains("error: rank 1") && text.contains("same folder"), "{text}");
    let (status, text) = ends_within(first, 30);
    assert_eq!(status, 1);
    assert!(text.contains("rank 1 failed") && text.contains("same folder"), "{text}");
    // under the launcher
    let train = ["train", "autoencoder", "autoencoder.yaml", "--nproc", "2", "autoencoder.channels=8"];
    let said = run_in(at, &train);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("autoencoder.channels: 4 → 8") && said.err.contains("error: rank "), "{}", said.err);
    let said = run_in(at, &[&train[..], &["--change-settings"]].concat());
    assert_eq!(said.status, 1);
    assert!(said.err.contains("another architecture") && said.err.contains("error: rank "), "{}", said.err);
}

/// SIGTERM and SIGUSR1, to one process or to ranks: saved, left with status 75, and gone on from to the bit.
#[test]
fn a_signal_saves_and_leaves() {
    let folder = workplace();
    let at = folder.path();
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.batch=1", "trainer.log_every=7"];
    let more = ["trainer.checkpoint_every=1000", "trainer.steps=100000"];
    for (signal_name, two) in [("TERM", false), ("USR1", true)] {
        let _ = fs::remove_dir_all(at.join("runs"));
        let launch: &[&str] = if two { &["--nproc", "2"] } else { &[] };
        let mut command = lvdm_in(at, &[&train[..], &more, launch].concat());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for(at, 1);
        signal(&child, signal_name);
        let said = said(child);
        assert_eq!(said.status, 75, "{}", said.err);
        assert!(said.out.contains("stopped and saved at step"), "{}", said.out);
        assert!(!said.err.contains("error"), "{}", said.err);
        let run = at.join("runs/autoencoder");
        let kept = checkpoint::list(&run).unwrap();
        assert_eq!(kept.len(), 1);
        let step = Checkpoint::read(&kept[0]).unwrap().progress.step;
        let (on, whole) = (format!("trainer.steps={}", step + 10), at.join("runs/whole"));
        let ends = ["trainer.checkpoint_every=1000", &on];
        succeed_in(at, &[&train[..], &ends, launch].concat());
        succeed_in(at, &[&train[..], &ends, launch, &["--run", "runs/whole"]].concat());
        same_checkpoint(&checkpoint::path(&run, step + 10), &checkpoint::path(&whole, step + 10));
        assert_eq!(metrics(&run), metrics(&whole));
    }
}
