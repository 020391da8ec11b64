//! Run folders: one process at a time trains in them, signals leave them whole, and other settings do not slip in.

mod common;

use std::{
    fs,
    io::Read,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::{Said, contents, lvdm_in, run_in, same_checkpoint, succeed_in, write_packed};
use lvdm::checkpoint::{self, Checkpoint};

const DIFFUSION: &str = "\
seed: 4
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 2, resolution: 8, workers: 1}
autoencoder: pixels
unet: {channels: 4, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 2, norm_groups: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-3}
trainer: {steps: 6, batch: 1, device: cpu, log_every: 1, checkpoint_every: 3, picture_every: 1000000}
sampler: {kind: ddim, steps: 2, eta: 1.0}
";

fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_packed(&folder.path().join("clips.safetensors"), 5, 4, 8);
    fs::write(folder.path().join("diffusion.yaml"), DIFFUSION).unwrap();
    folder
}

/// For a long time, with no checkpoint by itself.
const LONG: [&str; 5] =
    ["train", "diffusion", "diffusion.yaml", "trainer.steps=1000000", "trainer.checkpoint_every=1000000"];

/// A process group of a test's own, which does not outlive it.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            signal_all(self, "KILL");
            let _ = self.0.wait();
        }
    }
}

/// The command in a process group of its own, as a terminal starts it, or with SIGHUP ignored, as `nohup` does.
fn start(at: &Path, arguments: &[&str], signals: &str) -> Started {
    let mut command = Command::new("env");
    command.arg(format!("--{signals}")).arg(env!("CARGO_BIN_EXE_lvdm")).args(arguments).current_dir(at);
    command.env_remove("LD_LIBRARY_PATH").env("OMP_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "");
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Started(command.spawn().unwrap())
}

fn from_terminal(at: &Path, arguments: &[&str]) -> Started {
    start(at, arguments, "default-signal=INT,HUP")
}

/// As a terminal does: to every process of the group.
fn signal_all(started: &Started, name: &str) {
    let sent = Command::new("sh").args(["-c", &format!("kill -{name} -{}", started.0.id())]).status().unwrap();
    assert!(sent.success());
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn lines(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

fn wait_for_lines(run: &Path, count: usize) {
    wait_until("training", || lines(run) >= count);
}

/// What it said, and how long it took to end.
fn ended(mut started: Started) -> (Said, f64) {
    let start = Instant::now();
    wait_until("the end", || started.0.try_wait().unwrap().is_some());
    let seconds = start.elapsed().as_secs_f64();
    (output(&mut started).into(), seconds)
}

fn output(started: &mut Started) -> Output {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    started.0.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
    started.0.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
    Output { status: started.0.wait().unwrap(), stdout, stderr }
}

fn last_step(run: &Path) -> i64 {
    Checkpoint::read(checkpoint::list(run).unwrap().last().unwrap()).unwrap().progress.step
}

/// The second is refused at once, says who trains, and touches nothing; the lock goes with its process, however it ends.
#[test]
fn a_second_training_of_a_run_is_refused() {
    let folder = workplace();
    let at = folder.path();
    let run = at.join("runs/diffusion");
    let first = from_terminal(at, &LONG);
    wait_for_lines(&run, 5);
    // what the second one would sweep away
    let partial = run.join("checkpoints/.step-00000003.safetensors.1-0.partial");
    fs::create_dir_all(partial.parent().unwrap()).unwrap();
    fs::write(&partial, "half").unwrap();
    let settings = fs::read(run.join("experiment.yaml")).unwrap();
    for more in [&["seed=5", "optimizer.learning_rate=1"][..], &["--nproc", "2"]] {
        let began = Instant::now();
        let said = run_in(at, &[&["train", "diffusion", "diffusion.yaml"], more].concat());
        let seconds = began.elapsed().as_secs_f64();
        assert_eq!(said.status, 1, "{}", said.err);
        let words = format!("runs/diffusion is being written by process {} on ", first.0.id());
        assert!(said.err.contains(&words), "{}", said.err);
        assert!(seconds < 30.0, "{seconds} s");
        println!("refused after {seconds:.1} s: {}", said.err.lines().next().unwrap_or_default());
    }
    assert!(partial.exists() && fs::read(run.join("experiment.yaml")).unwrap() == settings);
    let lines_then = lines(&run);
    wait_for_lines(&run, lines_then + 3);
    signal_all(&first, "TERM");
    let (said, _) = ended(first);
    assert_eq!(said.status, 75, "{}", said.err);
    assert_eq!(last_step(&run) as usize, lines(&run));
    assert!(!run.join(".lock").exists());
    // one that was killed is no obstacle
    let killed = from_terminal(at, &LONG);
    let known = lines(&run);
    wait_for_lines(&run, known + 3);
    signal_all(&killed, "KILL");
    ended(killed);
    assert!(run.join(".lock").exists());
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", &format!("trainer.steps={}", known + 2)]);
    assert!(!partial.exists() && !run.join(".lock").exists());
}

/// Ctrl-C and a closed terminal, for one process and for ranks, which get the signal too: one checkpoint, status 75, and
/// the run goes on to the bit.
#[test]
fn ctrl_c_and_a_closed_terminal_save_and_leave() {
    for (signal, launch) in [("INT", &[][..]), ("HUP", &[]), ("INT", &["--nproc", "2"])] {
        let folder = workplace();
        let at = folder.path();
        let run = at.join("runs/diffusion");
        let child = from_terminal(at, &[&LONG[..], launch].concat());
        wait_for_lines(&run, 3);
        signal_all(&child, signal);
        let (said, _) = ended(child);
        assert_eq!(said.status, 75, "{signal} {launch:?}: {}", said.err);
        assert_eq!(said.out.matches("stopped and saved at step").count(), 1, "{}", said.out);
        assert!(!said.err.contains("error"), "{}", said.err);
        let step = last_step(&run);
        assert_eq!((checkpoint::list(&run).unwrap().len(), lines(&run)), (1, step as usize));
        let steps = format!("trainer.steps={}", step + 2);
        let on = ["train", "diffusion", "diffusion.yaml", "trainer.checkpoint_every=1000000", &steps];
        succeed_in(at, &[&on[..], launch].concat());
        succeed_in(at, &[&on[..], launch, &["--run", "runs/whole"]].concat());
        same_checkpoint(&checkpoint::path(&run, step + 2), &checkpoint::path(&at.join("runs/whole"), step + 2));
    }
}

/// When a terminal is closed nothing can be said on it any more, and all the same every step is saved.
#[test]
fn a_terminal_that_is_gone_does_not_keep_a_training_from_saving() {
    let folder = workplace();
    let at = folder.path();
    let run = at.join("runs/diffusion");
    let mut child = from_terminal(at, &LONG);
    wait_for_lines(&run, 3);
    drop((child.0.stdout.take(), child.0.stderr.take()));
    signal_all(&child, "HUP");
    wait_until("the end", || child.0.try_wait().unwrap().is_some());
    assert_eq!(child.0.wait().unwrap().code(), Some(75));
    assert_eq!(last_step(&run) as usize, lines(&run));
}

/// stdout and stderr on a full disk from the start on: progress, notes and the last line are lost, and nothing else.
#[test]
fn a_training_that_can_say_nothing_trains_all_the_same() {
    let folder = workplace();
    let at = folder.path();
    succeed_in(at, &["train", "diffusion", "diffusion.yaml"]);
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    // this start has something to say: where it goes on from, and which setting differs
    let mut command = lvdm_in(at, &["train", "diffusion", "diffusion.yaml", "trainer.steps=8"]);
    assert_eq!(command.stdout(full()).stderr(full()).status().unwrap().code(), Some(0));
    assert_eq!(last_step(&at.join("runs/diffusion")), 8);
}

/// Files that may not grow beyond a size stand for a disk that is full: the log reaches it, checkpoints do not.
#[test]
fn a_log_that_takes_no_more_ends_no_training() {
    let folder = workplace();
    let at = folder.path();
    // a network whose checkpoint is smaller than the log
    let small = "unet.multipliers=[1] unet.attention_factors=[]";
    succeed_in(at, &[&["train", "diffusion", "diffusion.yaml"][..], &small.split(' ').collect::<Vec<_>>()].concat());
    let run = at.join("runs/diffusion");
    let size = fs::metadata(checkpoint::path(&run, 6)).unwrap().len();
    let (blocks, binary) = (size * 5 / 4 / 512, env!("CARGO_BIN_EXE_lvdm"));
    let script = format!(
        "trap '' XFSZ; ulimit -f {blocks}; exec {binary} train diffusion diffusion.yaml {small} \
         trainer.steps=400 trainer.checkpoint_every=400"
    );
    let output = Command::new("sh").args(["-c", &script]).current_dir(at).stdin(Stdio::null()).output().unwrap();
    let said = Said::from(output);
    assert_eq!(said.status, 0, "{}", said.err);
    let events = |line: &&str| line.contains("/tensorboard/events.out.tfevents.");
    let told: Vec<&str> = said.err.lines().filter(events).collect();
    assert_eq!(told.len(), 2, "the first failure, and how much is missing in the end: {told:#?}");
    assert!(told[0].contains("cannot write") && told[0].contains("the work goes on"), "{}", told[0]);
    let count: u64 =
        told[1].strip_prefix("warning: ").and_then(|rest| rest.split(' ').next()).unwrap().parse().unwrap();
    assert!(count > 100 && told[1].contains("TensorBoard events are not in"), "{}", told[1]);
    assert_eq!(last_step(&run), 400);
}

/// While a step takes long, the first Ctrl-C waits for it and the second does not.
#[test]
fn a_second_ctrl_c_ends_at_once() {
    let folder = workplace();
    let at = folder.path();
    let child = from_terminal(at, &[&LONG[..], &["trainer.accumulate=1000000"]].concat());
    wait_until("the first step begins", || at.join("runs/diffusion/tensorboard").exists());
    // one that comes right behind, as where a launcher passes the terminal's on, is the same
    let twice = format!("kill -INT -{0}; kill -INT -{0}", child.0.id());
    assert!(Command::new("sh").args(["-c", &twice]).status().unwrap().success());
    std::thread::sleep(Duration::from_millis(1500));
    let mut child = child;
    assert!(child.0.try_wait().unwrap().is_none(), "the first one waits for the step");
    signal_all(&child, "INT");
    let start = Instant::now();
    wait_until("the end", || child.0.try_wait().unwrap().is_some());
    assert!(start.elapsed() < Duration::from_secs(5));
    let output = output(&mut child);
    assert_eq!(output.status.signal(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("asked once more, it ends at once"), "{output:?}");
}

/// Before the first step there is nothing to save: a signal ends the process, with the status of what goes on.
#[test]
fn a_signal_before_the_first_step_ends_at_once() {
    let folder = workplace();
    let at = folder.path();
    // opening it waits for someone who writes
    fs::remove_file(at.join("clips.safetensors")).unwrap();
    assert!(Command::new("mkfifo").arg(at.join("clips.safetensors")).status().unwrap().success());
    let child = from_terminal(at, &LONG);
    wait_until("the folder is taken", || at.join("runs/diffusion/.lock").exists());
    std::thread::sleep(Duration::from_millis(300));
    signal_all(&child, "TERM");
    let (said, seconds) = ended(child);
    assert_eq!(said.status, 75, "{}", said.err);
    assert!(seconds < 5.0, "{seconds} s");
}

/// Started by `nohup`, a training outlives its terminal.
#[test]
fn a_signal_that_is_ignored_stays_ignored() {
    let folder = workplace();
    let at = folder.path();
    let run = at.join("runs/diffusion");
    let child = start(at, &LONG, "ignore-signal=HUP");
    wait_for_lines(&run, 2);
    signal_all(&child, "HUP");
    let known = lines(&run);
    wait_for_lines(&run, known + 20);
    signal_all(&child, "TERM");
    let (said, _) = ended(child);
    assert_eq!(said.status, 75, "{}", said.err);
}

/// What changes the meaning of what was learned must be asked for; the rest is told; and a start that trains nothing
/// writes nothing.
#[test]
fn going_on_with_other_settings_is_told_or_asked_for() {
    let folder = workplace();
    let at = folder.path();
    let run = at.join("runs/diffusion");
    let train = |more: &[&'static str]| [&["train", "diffusion", "diffusion.yaml"], more].concat();
    succeed_in(at, &train(&[]));
    let before = contents(&run);
    let other = [
        "seed=5",
        "objective.predict=velocity",
        "schedule.beta_end=0.02",
        "data.frame_stride=2",
        "data.flip=true",
        "unet.heads=1",
    ];
    // whether or not there is anything left to do
    for (setting, steps) in other.into_iter().zip(["trainer.steps=6", "trainer.steps=8"].into_iter().cycle()) {
        // by its name of today
        let key = setting.split('=').next().unwrap().replace("unet.", "network.");
        let said = run_in(at, &train(&[setting, steps]));
        let line = said.error(2);
        assert!(line.contains(&key) && line.contains("--change-settings"), "{setting}: {line}");
        assert!(contents(&run) == before, "{setting}: a refused start wrote something");
    }
    // nothing is left to do: nothing is written, whatever is told
    for more in [&[][..], &["optimizer.learning_rate=0.5", "trainer.log_every=2"], &["seed=5", "--change-settings"]] {
        let said = succeed_in(at, &train(more));
        assert!(said.out.contains("trained to step 6"), "{}", said.out);
        assert!(contents(&run) == before, "{more:?}: a start that trains nothing wrote something");
    }
    let said = succeed_in(at, &train(&["trainer.steps=7", "optimizer.learning_rate=0.0005", "data.workers=2"]));
    for words in ["trainer.steps: 6 → 7", "optimizer.learning_rate: 0.001 → 0.0005", "data.workers: 1 → 2"] {
        assert!(said.err.contains(words), "{words}: {}", said.err);
    }
    let said = succeed_in(at, &train(&["trainer.steps=8", "objective.predict=velocity", "--change-settings"]));
    assert!(said.err.contains("objective.predict: ") && said.err.contains("→ velocity"), "{}", said.err);
    assert!(fs::read_to_string(run.join("experiment.yaml")).unwrap().contains("predict: velocity"));
    // these are its settings from now on
    let said = succeed_in(at, &train(&["trainer.steps=9", "objective.predict=velocity"]));
    assert!(!said.err.contains("objective.predict"), "{}", said.err);
}
