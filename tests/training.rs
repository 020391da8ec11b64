//! The one training loop: resume, losses that are not finite, checkpoints that are kept, damaged or foreign.

mod common;

use std::{cell::RefCell, collections::BTreeMap, fs, path::Path, rc::Rc};

use anyhow::Result;
use common::{contents, run_in, same_checkpoint, succeed_in, write_packed};
use lvdm::{
    checkpoint::{self, Checkpoint, Progress},
    distributed::Ranks,
    experiment::{OptimizerConfig, TrainerConfig},
    nn::{Init, Parameters},
    random::{Purpose, normal_batch},
    train::{Batch, Picture, Task, Terms, TrainedNetwork, Trainer},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// A network of three numbers that learns to be one, from noisy samples; at some steps its loss is NaN.
struct Toy {
    parameters: Parameters,
    weight: Tensor,
    /// No optimizer moves it: each pass adds one to it, and each step a hundred.
    seen: Tensor,
    position: u64,
    nan: fn(i64) -> bool,
}

impl Task for Toy {
    type Drawn = ();

    fn name(&self) -> &'static str {
        "toy"
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        vec![TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() }]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        let samples: Vec<u64> = (self.position..self.position + 2).collect();
        self.position += 2;
        let data = normal_batch(1, Purpose::DiffusionNoise, &samples, 0, &[3]) * 0.1 + 1.0;
        Ok(Batch { data, text: None, labels: None, samples, position: self.position })
    }

    fn draw(&self, _network: usize, _batch: &Batch) -> Result<()> {
        Ok(())
    }

    fn gradients(&mut self, _network: usize, (batch, ()): (&Batch, &()), step: i64, scale: f64) -> Result<Terms> {
        let mut loss = (&self.weight - &batch.data).square().mean(None);
        if (self.nan)(step) {
            loss *= f64::NAN;
        }
        (&loss * scale).backward();
        let _ = self.seen.g_add_scalar_(1);
        Ok(vec![("loss", loss.detach())])
    }

    fn after_passes(&mut self, _network: usize, _step: i64) {
        let _ = self.seen.g_add_scalar_(100);
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        Ok(Vec::new())
    }
}

/// Trains the toy in `run`, or goes on with it.
fn toy(run: &Path, settings: Value, nan: fn(i64) -> bool) -> Result<Progress> {
    let mut config = json!({"steps": 12, "batch": 2, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 2,
        "max_bad_steps": 3, "ema_decay": 0.9});
    config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    let config: TrainerConfig = serde_json::from_value(config).unwrap();
    let optimizer: OptimizerConfig = serde_json::from_value(json!({"kind": "adam", "learning_rate": 0.1})).unwrap();
    let resume = lvdm::train::resume_point(run, "toy", &Ranks::alone())?;
    let position = resume.as_ref().map_or(0, |found| found.progress.position);
    let parameters = Parameters::new(Device::Cpu, 0);
    let weight = parameters.root().parameter("weight", &[3], Init::ZEROS);
    let seen = parameters.root().buffer("seen", &[1], Init::ZEROS);
    let task = Toy { parameters, weight, seen, position, nan };
    Trainer::new(task, run, &config, &optimizer, &json!({"is": "a toy"}), &Ranks::alone(), resume)?.train()
}

/// What moves without an optimizer is where it was after a step that is left out, and goes on from a checkpoint.
#[test]
fn a_step_that_is_left_out_moves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let seen = |step: i64| {
        let found = Checkpoint::read(&checkpoint::path(folder.path(), step)).unwrap();
        found.tensors["model.seen"].double_value(&[0])
    };
    for steps in [5, 8] {
        let settings = json!({"steps": steps, "accumulate": 2, "checkpoint_every": 5});
        toy(folder.path(), settings, |step| step == 2 || step == 6).unwrap();
    }
    assert_eq!([seen(5), seen(8)], [4.0 * 102.0, 6.0 * 102.0]);
}

/// Two networks of one number each, updated in turn; at some steps the loss of one is NaN.
struct Pair {
    networks: [Parameters; 2],
    weights: [Tensor; 2],
    position: u64,
}

impl Task for Pair {
    type Drawn = ();

    fn name(&self) -> &'static str {
        "pair"
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        let [first, second] = self.networks.clone();
        vec![
            TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: first },
            TrainedNetwork { name: "other", gradient_norm: "other_gradient_norm", parameters: second },
        ]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        self.position += 1;
        Ok(Batch {
            data: Tensor::from(1.0f32),
            text: None,
            labels: None,
            samples: vec![self.position - 1],
            position: self.position,
        })
    }

    fn draw(&self, _network: usize, _batch: &Batch) -> Result<()> {
        Ok(())
    }

    fn gradients(&mut self, network: usize, (batch, ()): (&Batch, &()), step: i64, scale: f64) -> Result<Terms> {
        let mut loss = (&self.weights[network] - &batch.data).square().mean(None);
        if (network, step) == (0, 2) || (network, step) == (1, 4) {
            loss *= f64::NAN;
        }
        (&loss * scale).backward();
        Ok(vec![(["loss", "other_loss"][network], loss.detach())])
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        Ok(Vec::new())
    }
}

/// A bad step of one network is not one of the other's; each counts as one step that was left out.
#[test]
fn networks_are_left_out_one_by_one() {
    let found = [1, 3, 6].map(|log_every| {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({"steps": 6, "batch": 1, "accumulate": 2, "log_every": log_every, "ema_decay": 0.9});
        let config: TrainerConfig = serde_json::from_value(config).unwrap();
        let optimizer = serde_json::from_value(json!({"kind": "adam", "learning_rate": 0.1})).unwrap();
        let networks = [0, 1].map(|seed| Parameters::new(Device::Cpu, seed));
        let weights = [0, 1].map(|i: usize| networks[i].root().parameter("weight", &[1], Init::ZEROS));
        let task = Pair { networks, weights, position: 0 };
        let trainer = Trainer::new(task, folder.path(), &config, &optimizer, &json!({}), &Ranks::alone(), None);
        let progress = trainer.unwrap().train().unwrap();
        assert_eq!((progress.skipped_steps, progress.ema_updates, progress.position), (2, 5, 12));
        let logged: Vec<bool> = metrics(folder.path()).iter().map(|line| line["other_loss"].is_null()).collect();
        assert_eq!(logged, (0..6).step_by(log_every).map(|i| (i..i + log_every).contains(&4)).collect::<Vec<_>>());
        let tensors = Checkpoint::read(&checkpoint::path(folder.path(), 6)).unwrap().tensors;
        assert_eq!(["model", "other"].map(|n| tensors[&format!("optimizer.{n}.step")].double_value(&[])), [5.0, 5.0]);
        ["model.weight", "other.weight", "ema.weight"].map(|name| tensors[name].double_value(&[0]))
    });
    assert!(found.iter().all(|weights| *weights == found[0]), "{found:?}");
    let [model, other, ema] = found[0];
    assert!(model > 0.4 && other > 0.4 && ema > 0.0 && ema < model, "{found:?}");
}

/// A network that notes at which precision products are computed while batches are fetched, trained on, shown and
/// measured.
struct Witness {
    parameters: Parameters,
    weight: Tensor,
    seen: Rc<RefCell<BTreeMap<&'static str, Kind>>>,
}

impl Witness {
    fn note(&self, when: &'static str) {
        let one = Tensor::ones([1, 1], (Kind::Float, Device::Cpu));
        self.seen.borrow_mut().insert(when, one.matmul(&one).kind());
    }
}

impl Task for Witness {
    type Drawn = ();

    fn name(&self) -> &'static str {
        "witness"
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        vec![TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() }]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        self.note("fetched");
        Ok(Batch { data: Tensor::from(1.0f32), text: None, labels: None, samples: vec![0], position: 1 })
    }

    fn draw(&self, _network: usize, _batch: &Batch) -> Result<()> {
        Ok(())
    }

    fn gradients(&mut self, _network: usize, (batch, ()): (&Batch, &()), _step: i64, scale: f64) -> Result<Terms> {
        self.note("trained");
        let loss = (&self.weight - &batch.data).square().mean(None);
        (&loss * scale).backward();
        Ok(vec![("loss", loss.detach())])
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        self.note("shown");
        Ok(Vec::new())
    }

    fn measure(&mut self) -> Result<Vec<(String, Tensor)>> {
        self.note("measured");
        Ok(Vec::new())
    }
}

/// `precision: bf16` reaches all networks of a step, the frozen ones that batches come out of among them; what a
/// checkpoint keeps of measurements is in float32.
#[test]
fn precision_reaches_encoding_and_pictures_and_not_measurements() {
    for (precision, kind) in [("bf16", Kind::BFloat16), ("f32", Kind::Float)] {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({"steps": 1, "batch": 1, "precision": precision, "ema_decay": 0.9});
        let config: TrainerConfig = serde_json::from_value(config).unwrap();
        let optimizer = serde_json::from_value(json!({"kind": "adam", "learning_rate": 0.1})).unwrap();
        let parameters = Parameters::new(Device::Cpu, 0);
        let weight = parameters.root().parameter("weight", &[1], Init::ZEROS);
        let seen = Rc::default();
        let task = Witness { parameters, weight, seen: Rc::clone(&seen) };
        Trainer::new(task, folder.path(), &config, &optimizer, &json!({}), &Ranks::alone(), None)
            .unwrap()
            .train()
            .unwrap();
        let expected = [("fetched", kind), ("trained", kind), ("shown", kind), ("measured", Kind::Float)];
        assert_eq!(*seen.borrow(), BTreeMap::from(expected), "{precision}");
    }
}

fn steps_kept(run: &Path) -> Vec<i64> {
    let number = |path: &std::path::PathBuf| path.file_stem().unwrap().to_str().unwrap()[5..].parse().unwrap();
    checkpoint::list(run).unwrap().iter().map(number).collect()
}

/// The lines of `metrics.jsonl` without what depends on the clock.
fn metrics(run: &Path) -> Vec<BTreeMap<String, Value>> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let parse = |line| serde_json::from_str::<BTreeMap<String, Value>>(line).unwrap();
    let timeless = |(key, _): &(String, Value)| !key.contains("second") && !key.contains("memory");
    text.lines().map(|line| parse(line).into_iter().filter(timeless).collect()).collect()
}

/// Bad steps are left out, counted and logged as null; training goes on, and the weights are those of the others.
#[test]
fn a_step_that_is_not_finite_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let progress = toy(folder.path(), json!({}), |step| step == 3 || step == 6 || step == 7).unwrap();
    assert_eq!((progress.step, progress.skipped_steps, progress.ema_updates), (12, 3, 9));
    let metrics = metrics(folder.path());
    let counts: Vec<f64> = metrics.iter().map(|line| line["skipped_steps"].as_f64().unwrap()).collect();
    assert_eq!(counts, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]);
    let nulls: Vec<u64> =
        metrics.iter().filter(|line| line["loss"].is_null()).map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(nulls, [4, 7, 8]);
    let last = Checkpoint::read(&checkpoint::path(folder.path(), 12)).unwrap();
    assert_eq!(last.tensors["optimizer.model.step"].double_value(&[]), 9.0);
    assert!(last.tensors.values().all(|t| t.isfinite().all().int64_value(&[]) == 1));
    assert!(last.tensors["model.weight"].min().double_value(&[]) > 0.3, "nothing was learned");
}

/// Losses are read when the next step is queued, or when a log or a checkpoint asks for them: it makes no difference.
#[test]
fn when_losses_are_read_changes_nothing() {
    let [often, seldom] = [1, 12].map(|every| {
        let folder = tempfile::tempdir().unwrap();
        let settings = json!({"log_every": every, "checkpoint_every": every, "clip_gradient": 0.05});
        let progress = toy(folder.path(), settings, |step| step == 3 || step == 6 || step == 7).unwrap();
        assert_eq!((progress.skipped_steps, progress.ema_updates), (3, 9));
        let tensors = Checkpoint::read(&checkpoint::path(folder.path(), 12)).unwrap().tensors;
        tensors.into_iter().filter(|(name, _)| !name.starts_with("window.")).collect::<BTreeMap<_, _>>()
    });
    assert_eq!(often.keys().collect::<Vec<_>>(), seldom.keys().collect::<Vec<_>>());
    for (name, tensor) in &often {
        assert!(tensor.equal(&seldom[name]), "{name}: {tensor:?}, {:?}", seldom[name]);
    }
    assert!(often.contains_key("ema.weight") && !often["ema.weight"].equal(&often["model.weight"]));
    // nor does it leave anything out: without clipping, and without the average, the training is another one
    for (name, change) in [("model.weight", json!({"clip_gradient": null})), ("ema.weight", json!({"ema_decay": 0.5}))]
    {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = json!({"clip_gradient": 0.05});
        settings.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        toy(folder.path(), settings, |step| step == 3 || step == 6 || step == 7).unwrap();
        let other = Checkpoint::read(&checkpoint::path(folder.path(), 12)).unwrap().tensors;
        assert!(!other[name].equal(&often[name]), "{name} does not depend on {change}");
    }
    // noticed one step later where nothing asks
    let folder = tempfile::tempdir().unwrap();
    let settings = json!({"log_every": 100, "checkpoint_every": 5});
    let error = toy(folder.path(), settings, |step| step >= 5).map(drop).unwrap_err().to_string();
    assert!(error.contains("3 steps in a row (up to step 8)"), "{error}");
    assert_eq!(steps_kept(folder.path()), [5]);
}

/// N in a row: training stops, names the last good checkpoint, and stored nothing after the first bad step.
#[test]
fn training_stops_after_too_many_bad_steps() {
    let folder = tempfile::tempdir().unwrap();
    let error = format!("{:#}", toy(folder.path(), json!({}), |step| step >= 5).map(drop).unwrap_err());
    let good = checkpoint::path(folder.path(), 4);
    assert!(error.contains("3 steps in a row") && error.contains(good.to_str().unwrap()), "{error}");
    assert!(error.contains("learning_rate"), "what to do: {error}");
    assert_eq!(steps_kept(folder.path()), [2, 4], "no checkpoint is of a bad step");
    // from there it goes on
    assert_eq!(toy(folder.path(), json!({}), |_| false).unwrap().step, 12);
    // before any checkpoint
    let folder = tempfile::tempdir().unwrap();
    let error = toy(folder.path(), json!({}), |_| true).map(drop).unwrap_err().to_string();
    assert!(error.contains("there is no checkpoint yet"), "{error}");
    assert_eq!(steps_kept(folder.path()), [0i64; 0]);
}

/// The latest K stay, the last step's among them.
#[test]
fn the_latest_checkpoints_are_kept() {
    for (settings, kept) in [
        (json!({"keep_checkpoints": 1}), vec![12]),
        (json!({"keep_checkpoints": 3}), vec![8, 10, 12]),
        (json!({"keep_checkpoints": 3, "checkpoint_every": 5}), vec![5, 10, 12]),
        (json!({"keep_checkpoints": 100, "checkpoint_every": 6}), vec![6, 12]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        toy(folder.path(), settings, |_| false).unwrap();
        assert_eq!(steps_kept(folder.path()), kept);
        let others: Vec<_> = fs::read_dir(folder.path().join("checkpoints")).unwrap().collect();
        assert_eq!(others.len(), kept.len(), "only checkpoints lie there: {others:?}");
    }
}

/// Stopped and started again in the middle, with accumulation and a bad step: the same log and the same weights.
#[test]
fn going_on_is_as_if_never_stopped() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    toy(whole.path(), json!({"accumulate": 2}), |step| step == 4).unwrap();
    for steps in [5, 5, 9, 12] {
        toy(parts.path(), json!({"accumulate": 2, "steps": steps}), |step| step == 4).unwrap();
    }
    same_checkpoint(&checkpoint::path(whole.path(), 12), &checkpoint::path(parts.path(), 12));
    assert_eq!(metrics(whole.path()), metrics(parts.path()));
}

/// A training that has had its minutes ends with a checkpoint, and started again does nothing; given more, it goes on.
#[test]
fn training_ends_when_its_time_is_over() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let progress = toy(folder.path(), json!({"minutes": 1e-9, "log_every": 5}), |_| false).unwrap();
        assert_eq!((progress.step, steps_kept(folder.path()), metrics(folder.path()).len()), (1, vec![1], 1));
    }
    let progress = toy(folder.path(), json!({"minutes": 60.0, "checkpoint_every": 12}), |_| false).unwrap();
    assert_eq!((progress.step, steps_kept(folder.path())), (12, vec![1, 12]));
}

const AUTOENCODER: &str = "\
seed: 3
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, flip: true, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {pixel: l1, perceptual_weight: 0.0, adversarial_weight: 0.1, adversarial_start: 2, adversarial_warmup: 3, discriminator: {channels: 4, layers: 1}}
optimizer: {kind: adam, learning_rate: 1.0e-3, warmup: 2, decay: cosine}
trainer: {steps: 6, batch: 2, device: cpu, deterministic: true, log_every: 1, checkpoint_every: 3, picture_every: 100, ema_decay: 0.99, clip_gradient: 1000.0}
";

const DIFFUSION: &str = "\
seed: 4
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, workers: 1}
autoencoder: runs/autoencoder
unet: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-3, weight_decay: 0.01}
trainer: {steps: 6, batch: 2, device: cpu, log_every: 1, checkpoint_every: 3, picture_every: 100, ema_decay: 0.99, clip_gradient: 1.0}
sampler: {kind: ddim, steps: 2, eta: 1.0}
";

/// TATS' autoencoder and losses in place of LVDM's.
const VQGAN: [&str; 3] = [
    "autoencoder={kind: vqgan, channels: 4, factors: [2, 4, 4], latent_channels: 4, codebook: {codes: 24, restart: true}}",
    "loss={kind: tats, perceptual_weight: 0.0, adversarial_start: 2, discriminator: {channels: 4, layers: 1}}",
    "trainer.ema_decay=null",
];

/// A run that died after step 3 — its log is longer, its last checkpoint cut short — and was started again equals,
/// to the bit, one that never stopped: weights, averages, optimizer, log. For both kinds of training, from packed
/// clips and from packed latents.
#[test]
fn an_interrupted_run_equals_a_whole_one() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 5, 6, 32);
    fs::write(at.join("autoencoder.yaml"), AUTOENCODER).unwrap();
    fs::write(at.join("diffusion.yaml"), DIFFUSION).unwrap();
    let interrupted = |kind: &str, run: &str, more: &[&str]| {
        let file = format!("{kind}.yaml");
        succeed_in(at, &[&["train", kind, &file, "--run", run], more].concat());
        let (whole, died) = (at.join(run), at.join(format!("{run}-died")));
        assert_eq!(steps_kept(&whole), [3, 6]);
        assert_eq!(metrics(&whole).len(), 6);
        for (path, bytes) in contents(&whole) {
            let copy = died.join(path.strip_prefix(&whole).unwrap());
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::write(copy, bytes).unwrap();
        }
        let last = fs::read(checkpoint::path(&died, 6)).unwrap();
        fs::write(checkpoint::path(&died, 6), &last[..last.len() / 2]).unwrap();
        let said = succeed_in(at, &[&["train", kind, &file, "--run", died.to_str().unwrap()], more].concat());
        assert!(said.err.contains("warning: ") && said.err.contains("step-00000006"), "{}", said.err);
        assert!(said.err.contains("going on from step 3"), "{}", said.err);
        same_checkpoint(&checkpoint::path(&whole, 6), &checkpoint::path(&died, 6));
        assert_eq!(metrics(&whole), metrics(&died));
        // once more: nothing is left to do
        let before = fs::read(checkpoint::path(&died, 6)).unwrap();
        succeed_in(at, &[&["train", kind, &file, "--run", died.to_str().unwrap()], more].concat());
        assert!(fs::read(checkpoint::path(&died, 6)).unwrap() == before, "a finished run trained on");
        assert_eq!(metrics(&whole), metrics(&died));
    };
    interrupted("autoencoder", "runs/autoencoder", &[]);
    // the discriminator came in at its step and was trained
    let lines = metrics(&at.join("runs/autoencoder"));
    let adversarial = |i: usize| lines[i]["adversarial_factor"].as_f64().unwrap();
    assert_eq!((adversarial(0), adversarial(1)), (0.0, 0.0));
    assert!(adversarial(2) > 0.0 && adversarial(4) > adversarial(2));
    assert!(lines[3]["discriminator_gradient_norm"].as_f64().unwrap() > 0.0);
    // a discriminator of clips and feature matching beside it
    let both = ["loss.video_discriminator={channels: 4, layers: 1}", "loss.feature_matching=0.5"];
    interrupted("autoencoder", "runs/both", &both);
    let (lines, alone) = (metrics(&at.join("runs/both")), &lines);
    for (step, line) in lines.iter().enumerate() {
        let value = |key: &str| line.get(key).map_or(0.0, |value| value.as_f64().unwrap());
        let on = step >= 2;
        assert_eq!(value("feature_matching") > 0.0, on, "step {step}");
        assert_eq!(value("video_logits_real") != 0.0 && value("video_logits_fake") != 0.0, on, "step {step}");
        // until the discriminators come in it is the same training
        assert_eq!(value("loss") == alone[step]["loss"].as_f64().unwrap(), !on, "step {step}");
    }
    // a codebook and running statistics, which no optimizer moves, with everything that is drawn for them
    interrupted("autoencoder", "runs/vqgan", &VQGAN);
    let lines = metrics(&at.join("runs/vqgan"));
    let value = |i: usize, key: &str| lines[i][key].as_f64().unwrap();
    assert!(value(0, "perplexity") > 1.0 && value(0, "adversarial") == 0.0 && value(2, "feature_matching") > 0.0);
    interrupted("diffusion", "runs/diffusion", &[]);
    // on pixels, without an autoencoder
    interrupted("diffusion", "runs/pixels", &["autoencoder=pixels"]);
    assert!(!at.join("runs/pixels/autoencoder.safetensors").exists());
    // scale and shift are measured, and travel with the run
    let stored = Checkpoint::read(&checkpoint::path(&at.join("runs/autoencoder"), 6)).unwrap().part("latent");
    assert!(stored["scale"].double_value(&[]) > 0.0 && stored.contains_key("shift"));
    let clips = at.join("clips");
    fs::create_dir(&clips).unwrap();
    for i in 0..3i64 {
        let clip = common::moving_clips(3, 8, 32).get(i);
        lvdm::data::write_video(&clips.join(format!("{i}.mp4")), &clip, 8.0).unwrap();
    }
    let encode = ["encode", "runs/autoencoder", "--videos", "clips", "--frames", "4", "--resolution", "32"];
    let latents = ["--clips", "7", "--out", "latents.safetensors", "--device", "cpu"];
    succeed_in(at, &[&encode[..], &latents].concat());
    let rounded = ["--clips", "7", "--out", "rounded.safetensors", "--device", "cpu", "--precision", "bf16", "--tf32"];
    succeed_in(at, &[&encode[..], &rounded].concat());
    let [exact, rounded] = ["latents", "rounded"].map(|name| {
        let (mut tensors, told) = lvdm::safetensors::read_safetensors(&at.join(format!("{name}.safetensors"))).unwrap();
        (tensors.remove("moments").unwrap(), told.unwrap()["numerics"].clone())
    });
    assert_eq!(rounded.1, serde_json::json!({"precision": "bf16", "tf32": true}));
    assert_eq!(exact.1, serde_json::json!({"precision": "f32", "tf32": false}));
    let error = (&rounded.0 - &exact.0).norm().double_value(&[]) / exact.0.norm().double_value(&[]);
    assert!(rounded.0.kind() == tch::Kind::Float && error > 0.0 && error < 3e-2, "{:?}, {error}", rounded.0.kind());
    interrupted("diffusion", "runs/latents", &["latents=latents.safetensors"]);
}

/// Trains either network for some steps; its losses, and what its last checkpoint stores of it.
fn trained(at: &Path, kind: &str, run: &str, steps: i64, more: &[&str]) -> (Vec<f64>, BTreeMap<String, Tensor>) {
    let (file, steps_asked) = (format!("{kind}.yaml"), format!("trainer.steps={steps}"));
    succeed_in(at, &[&["train", kind, &file, "--run", run, &steps_asked], more].concat());
    let losses = metrics(&at.join(run)).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    (losses, Checkpoint::read(&checkpoint::path(&at.join(run), steps)).unwrap().part("model"))
}

/// Without the discriminator, whose batch statistics are those of one forward pass.
const PLAIN: [&str; 2] = ["loss.adversarial_weight=0", "optimizer.eps=1e-4"];

/// Mixed precision trains both networks as float32 does, on the same samples with the same noise: the loss falls, each
/// step's stays by the other's, and the weights are float32.
#[test]
fn both_networks_train_in_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 4, 4, 32);
    fs::write(at.join("autoencoder.yaml"), AUTOENCODER).unwrap();
    fs::write(at.join("diffusion.yaml"), DIFFUSION).unwrap();
    let diffusion: &[&str] = &["optimizer.learning_rate=2e-3", "optimizer.eps=1e-4"];
    // measured: 2.4e-3 and 1.4e-2
    for (kind, steps, more, bound) in [("autoencoder", 20, &PLAIN[..], 1e-2), ("diffusion", 40, diffusion, 5e-2)] {
        let run = |precision: &str| {
            let run = if precision == "f32" { format!("runs/{kind}") } else { format!("runs/{kind}-half") };
            trained(at, kind, &run, steps, &[more, &[&format!("trainer.precision={precision}")]].concat())
        };
        let ((full, _), (half, weights)) = (run("f32"), run("bf16"));
        assert!(weights.iter().all(|(_, t)| t.kind() == Kind::Float), "{kind}");
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let quarter = half.len() / 4;
        let (first, last) = (mean(&half[..quarter]), mean(&half[half.len() - quarter..]));
        let error = half.iter().zip(&full).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
        println!("{kind}: loss {first:.4} to {last:.4} in bf16, at most {error:.1e} from float32's");
        assert!(last < 0.9 * first, "{kind}: {first} to {last}");
        assert!(half != full && error < bound, "{kind}: {error:e}");
    }
}

/// Two passes of two clips a step are one pass of four, in losses and in weights.
#[test]
fn accumulated_passes_are_one_pass_of_all_clips() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 5, 6, 32);
    fs::write(at.join("autoencoder.yaml"), AUTOENCODER).unwrap();
    fs::write(at.join("diffusion.yaml"), DIFFUSION).unwrap();
    for (kind, more) in [("autoencoder", &PLAIN[..]), ("diffusion", &["optimizer.eps=1e-4"])] {
        let run = |run: &str, batch: &str, accumulate: &str| {
            let both = [format!("trainer.batch={batch}"), format!("trainer.accumulate={accumulate}")];
            trained(at, kind, run, 6, &[more, &[&both[0], &both[1], "trainer.clip_gradient=0.5"]].concat())
        };
        let (whole, parts) = (run(&format!("runs/{kind}"), "4", "1"), run(&format!("runs/{kind}-parts"), "2", "2"));
        let losses = whole.0.iter().zip(&parts.0).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max);
        let flat = |weights: &BTreeMap<String, Tensor>| {
            Tensor::cat(&weights.values().map(|t| t.to_kind(Kind::Double).flatten(0, -1)).collect::<Vec<_>>(), 0)
        };
        let weights = common::relative_error(&flat(&parts.1), &flat(&whole.1));
        println!("{kind}: losses differ by {losses:.1e}, weights by {weights:.1e}");
        assert!(losses < 1e-5 && weights < 1e-5, "{kind}: losses {losses:e}, weights {weights:e}");
        // and a pass of two alone is another training
        let half = run(&format!("runs/{kind}-half"), "2", "1");
        assert!(common::relative_error(&flat(&half.1), &flat(&whole.1)) > 1e-3, "{kind}");
    }
}

/// A checkpoint of another architecture or another kind of run: one clear error, status 1, the run as it was.
#[test]
fn a_foreign_checkpoint_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 4, 4, 32);
    fs::write(at.join("autoencoder.yaml"), AUTOENCODER).unwrap();
    fs::write(at.join("diffusion.yaml"), DIFFUSION).unwrap();
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.checkpoint_every=2", "trainer.max_bad_steps=3"];
    let train = |more: &[&'static str]| [&train[..], more].concat();
    succeed_in(at, &train(&["trainer.steps=2"]));
    let before = contents(at);
    let said = run_in(at, &train(&["trainer.steps=4", "autoencoder.channels=8"]));
    assert!(said.error(2).contains("autoencoder.channels: 4 → 8"), "{}", said.err);
    let said = run_in(at, &train(&["trainer.steps=4", "autoencoder.channels=8", "--change-settings"]));
    let line = said.error(1);
    assert!(line.contains("another --run") && line.contains("shape"), "{line}");
    let said = run_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/autoencoder"]);
    assert!(said.error(1).contains("autoencoder"), "{}", said.err);
    assert!(contents(at) == before, "a refused start wrote something");
    // a learning rate that destroys the weights: stopped, and the checkpoint from before is named and untouched
    let said = run_in(at, &train(&["trainer.steps=40", "optimizer.learning_rate=1e30"]));
    let line = said.error(1);
    assert!(line.contains("3 steps in a row") && line.contains("step-00000002.safetensors"), "{line}");
    assert!(said.err.matches("warning: step").count() >= 3, "{}", said.err);
    let good = checkpoint::path(&at.join("runs/autoencoder"), 2);
    assert!(fs::read(&good).unwrap() == before[&good]);
    assert_eq!(steps_kept(&at.join("runs/autoencoder")), [2]);
}
