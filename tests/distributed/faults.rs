//! How ranks are launched; ranks that are lost, hang, fail or are asked to stop.

use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use lvdm::checkpoint::{self, Checkpoint};

use crate::{
    common::{
        Said, lvdm_in,
        processes::{ends_within, free_port, said, signal, start},
        run_in, same_checkpoint, succeed_in,
    },
    gradients::workers,
    metrics, workplace,
};

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
    for worker in workers::<2>("slow", folder.path()) {
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

/// SIGTERM and SIGUSR1, to one process, to ranks, or to ranks that share out the optimizer's state: saved, left with status 75, and gone on from to the bit.
#[test]
fn a_signal_saves_and_leaves() {
    let folder = workplace();
    let at = folder.path();
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.batch=1", "trainer.log_every=7"];
    let more = ["trainer.checkpoint_every=1000", "trainer.steps=100000"];
    let two = ["--nproc", "2", "trainer.shard_optimizer=true"];
    for (signal_name, launch) in [("TERM", &[][..]), ("USR1", &two[..2]), ("TERM", &two)] {
        let _ = fs::remove_dir_all(at.join("runs"));
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
