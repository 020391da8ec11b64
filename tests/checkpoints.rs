//! Checkpoints that are cut or damaged are found out; runs that are killed at any moment go on to the bit.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use common::{lvdm_in, noise, succeed_in, write_packed};
use lvdm::{
    checkpoint::{self, Checkpoint, Progress},
    random::{Purpose, stream},
};
use rand::RngExt;
use serde_json::{Value, json};
use tch::Tensor;

fn checkpoint_of(step: i64) -> Checkpoint {
    let tensors = BTreeMap::from([
        ("model.weight".to_string(), noise(1, &[40, 30])),
        ("model.bias".to_string(), noise(2, &[30])),
        ("optimizer.model.step".to_string(), Tensor::from(step as f32)),
    ]);
    let progress = Progress { step, position: 2 * step as u64, ema_updates: 0, skipped_steps: 0, seconds: 0.5 };
    Checkpoint { task: "toy".into(), progress, experiment: json!({"seed": 3}), tensors }
}

/// A hundred cuts and a hundred single flipped bits, half of these in the header: each is found out, the file is
/// named, and the checkpoint before is used.
#[test]
fn every_damage_is_found_out() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let (older, newer) = (checkpoint::path(run, 1), checkpoint::path(run, 2));
    checkpoint_of(1).write(&older).unwrap();
    checkpoint_of(2).write(&newer).unwrap();
    assert_eq!(checkpoint::latest(run).unwrap().unwrap().1.progress.step, 2);
    let whole = fs::read(&newer).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut random = stream(5, Purpose::Evaluation, 0, 0);
    let mut damaged = Vec::new();
    for i in 0..100 {
        let end = if i % 2 == 0 { header } else { whole.len() };
        damaged.push((format!("cut at {end}"), whole[..random.random_range(0..end)].to_vec()));
        let (byte, bit) = (random.random_range(0..end), random.random_range(0..8));
        let mut bytes = whole.clone();
        bytes[byte] ^= 1 << bit;
        damaged.push((format!("bit {bit} of byte {byte}"), bytes));
    }
    for (what, bytes) in &damaged {
        fs::write(&newer, bytes).unwrap();
        let error = Checkpoint::read(&newer).err().unwrap_or_else(|| panic!("{what}: loaded"));
        assert!(format!("{error:#}").contains("step-00000002"), "{what}: {error:#}");
        let (path, found) = checkpoint::latest(run).unwrap().unwrap();
        assert_eq!((path, found.progress.step), (older.clone(), 1), "{what}");
    }
    fs::write(&newer, &whole).unwrap();
    assert_eq!(checkpoint::latest(run).unwrap().unwrap().1.progress.step, 2);
    println!("{} damaged files, none loaded", damaged.len());
}

/// What runs a network does not read what trains it, and a plan no tensor at all; the first is checked like the whole.
#[test]
fn as_much_is_read_as_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let path = checkpoint::path(folder.path(), 1);
    checkpoint_of(1).write(&path).unwrap();
    let names = |found: Checkpoint| found.tensors.into_keys().collect::<Vec<_>>();
    assert_eq!(names(checkpoint::open(folder.path()).unwrap().1), ["model.bias", "model.weight"]);
    assert_eq!(names(checkpoint::latest(folder.path()).unwrap().unwrap().1).len(), 3);
    let head = checkpoint::open_head(folder.path()).unwrap().1;
    assert_eq!((head.tensors.len(), head.progress.step, &head.experiment["seed"]), (0, 1, &json!(3)));
    // damage in what is passed over is found all the same
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(checkpoint::open(folder.path()).is_err() && checkpoint::open_head(folder.path()).is_ok());
}

const AUTOENCODER: &str = "\
seed: 3
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 16, flip: true, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {perceptual_weight: 0.0, adversarial_weight: 0.1, adversarial_start: 5, adversarial_warmup: 9, discriminator: {channels: 4, layers: 1}}
optimizer: {kind: adam, learning_rate: 1.0e-3, warmup: 7, decay: cosine}
trainer: {steps: 1, batch: 1, accumulate: 2, device: cpu, log_every: 1, checkpoint_every: 3, picture_every: 100000, ema_decay: 0.99}
";

/// The log without what depends on the clock, as text: equal to the bit.
fn losses(run: &Path) -> Vec<String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let parse = |line| serde_json::from_str::<BTreeMap<String, Value>>(line).ok();
    let timeless = |line: BTreeMap<String, Value>| {
        let kept: BTreeMap<_, _> =
            line.into_iter().filter(|(key, _)| !key.contains("second") && !key.contains("memory")).collect();
        serde_json::to_string(&kept).unwrap()
    };
    text.lines().filter_map(parse).map(timeless).collect()
}

fn half_written(run: &Path) -> bool {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

/// A run is killed many times, at random moments and in the middle of writing a checkpoint: its log and its last
/// checkpoint are, to the bit, those of a run that never was. `LVDM_SOAK` says how many times (20 if not set).
#[test]
fn a_run_that_is_killed_again_and_again() {
    let kills: i64 = std::env::var("LVDM_SOAK").ok().and_then(|kills| kills.parse().ok()).unwrap_or(20);
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 5, 6, 16);
    fs::write(at.join("autoencoder.yaml"), AUTOENCODER).unwrap();
    let steps = format!("trainer.steps={}", 7 * kills + 5);
    let train = |run: &'static str| vec!["train", "autoencoder", "autoencoder.yaml", "--run", run, &steps];
    succeed_in(at, &train("whole"));

    let run = at.join("killed");
    let mut random = stream(6, Purpose::Evaluation, 0, 0);
    let (mut killed, mut torn) = (0, 0);
    let start = Instant::now();
    while killed < kills {
        let before = losses(&run).len();
        let mut child = lvdm_in(at, &train("killed")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let in_writing = killed % 2 == 0;
        let lines = before + random.random_range(0..5);
        let pause = Duration::from_micros(random.random_range(0..20_000));
        let ended = loop {
            if child.try_wait().unwrap().is_some() {
                break true;
            }
            if if in_writing { half_written(&run) } else { losses(&run).len() > lines } {
                break false;
            }
            assert!(start.elapsed() < Duration::from_secs(60 + 20 * kills as u64), "no progress");
            std::thread::sleep(Duration::from_micros(100));
        };
        assert!(!ended, "the run ended after {killed} kills");
        if !in_writing {
            std::thread::sleep(pause);
        }
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        killed += 1;
        torn += i64::from(half_written(&run));
    }
    succeed_in(at, &train("killed"));
    let (through, broken) = (losses(&at.join("whole")), losses(&run));
    assert_eq!(through.len() as i64, 7 * kills + 5);
    assert_eq!(through, broken);
    let last = |run: &Path| Checkpoint::read(checkpoint::list(run).unwrap().last().unwrap()).unwrap();
    let (a, b) = (last(&at.join("whole")), last(&run));
    assert_eq!(Progress { seconds: 0.0, ..a.progress }, Progress { seconds: 0.0, ..b.progress });
    assert_eq!(a.tensors.keys().collect::<Vec<_>>(), b.tensors.keys().collect::<Vec<_>>());
    assert!(a.tensors.iter().all(|(name, tensor)| tensor.equal(&b.tensors[name])));
    assert!(!half_written(&run), "what was half written is swept away");
    assert!(torn > 0, "no kill fell into the writing of a checkpoint");
    println!(
        "killed {killed} times, {torn} of them with a checkpoint half written; {} steps equal to the bit, {:.0} s",
        through.len(),
        start.elapsed().as_secs_f64()
    );
}
