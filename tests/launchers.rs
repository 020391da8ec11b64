//! How ranks meet and part: names, ports and interfaces that are wrong, signals while they wait, a network that falls
//! silent, machines of their own (network namespaces), and torchrun.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::{
    lvdm_in,
    processes::{ends_within, free_port, said, signal, start, start_rank},
    skip, source, write_packed,
};
use lvdm::checkpoint;

const AUTOENCODER: &str = "\
seed: 3
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {pixel: l1, perceptual_weight: 0.0, adversarial_weight: 0.0}
optimizer: {kind: adam, learning_rate: 1.0e-4}
trainer: {steps: 6, batch: 1, device: cpu, log_every: 1, checkpoint_every: 2, picture_every: 1000000}
";

fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_packed(&folder.path().join("clips.safetensors"), 3, 4, 32);
    fs::write(folder.path().join("autoencoder.yaml"), AUTOENCODER).unwrap();
    folder
}

/// A training of so many steps, whose ranks wait so many seconds for each other.
fn train(at: &Path, steps: u32, timeout: u32) -> Command {
    let mut command = lvdm_in(at, &["train", "autoencoder", "autoencoder.yaml"]);
    command.args(["--rank-timeout", &timeout.to_string(), &format!("trainer.steps={steps}")]);
    command
}

/// The one line of error that a rank ends with, soon enough, with status 1.
fn error_within(child: Child, seconds: u64) -> String {
    let (status, text) = ends_within(child, seconds);
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!((status, lines.len()), (1, 1), "{text}");
    for word in ["frame #", "C++", "panicked", "[W", "[E"] {
        assert!(!text.contains(word), "`{word}` in {text}");
    }
    lines[0].to_string()
}

fn wait_until(what: &str, seconds: u64, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until a training has logged so many steps.
fn logs(at: &Path, steps: usize) {
    let log = at.join("runs/autoencoder/metrics.jsonl");
    let lines = || fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    wait_until("training begins", 60, || lines() >= steps);
}

/// The processes that this one has started and that still run.
fn children(of: u32) -> Vec<u32> {
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut behind = stat.rsplit_once(')')?.1.split_whitespace();
        let runs = behind.next()? != "Z";
        behind.next()?.parse::<u32>().ok().filter(|_| runs)
    };
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    all.filter(|&pid| parent(pid) == Some(of)).collect()
}

fn kill(pid: u32) {
    assert!(Command::new("sh").args(["-c", &format!("kill -KILL {pid}")]).status().unwrap().success());
}

// ---- one machine ------------------------------------------------------------------------------------------------------

/// A name that leads nowhere, nobody there, too few ranks, a port of another program: after one timeout at most, in one
/// line each, which says what is wrong.
#[test]
fn what_keeps_ranks_apart_is_said_once_and_in_time() {
    let folder = workplace();
    let at = folder.path();
    let one = |rank, host: &str, port| start_rank(train(at, 6, 3), rank, 2, host, port);
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let busy = listener.local_addr().unwrap().port();
    let unresolved = one(1, "no-such-machine.invalid", free_port());
    let nobody = one(1, "127.0.0.1", free_port());
    let lonely = one(0, "127.0.0.1", free_port());
    let [server, guest] = [0, 1].map(|rank| one(rank, "127.0.0.1", busy));
    let error = error_within(unresolved, 15);
    assert!(error.contains("MASTER_ADDR `no-such-machine.invalid` is not the name of a machine"), "{error}");
    let error = error_within(nobody, 15);
    assert!(error.contains("rank 0 is not at 127.0.0.1:") && error.contains("refused"), "{error}");
    let error = error_within(lonely, 15);
    assert!(error.contains("rank 1 has not come to 127.0.0.1:"), "{error}");
    for rank in [server, guest] {
        let error = error_within(rank, 20);
        assert!(error.contains("another program") && error.contains("MASTER_PORT"), "{error}");
    }
}

/// A mistake of one rank's own is not another's: both say whose it is, at once.
#[test]
fn an_interface_that_is_not_there_is_told_to_all_ranks() {
    let folder = workplace();
    let mut interfaces = ["lo", "eth9"].into_iter();
    let ranks = start(|| {
        let mut command = train(folder.path(), 6, 60);
        command.env("GLOO_SOCKET_IFNAME", interfaces.next().unwrap());
        command
    });
    for rank in ranks {
        let error = error_within(rank, 20);
        assert!(error.contains("rank 1 on ") && error.contains("GLOO_SOCKET_IFNAME is `eth9`"), "{error}");
    }
}

/// Nothing is lost before the first step, so nothing is waited for.
#[test]
fn a_signal_ends_a_rank_that_waits_for_others() {
    let folder = workplace();
    for rank in [0, 1] {
        let child = start_rank(train(folder.path(), 6, 600), rank, 2, "127.0.0.1", free_port());
        // until it catches the signal
        let caught = || fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        wait_until("signals are caught", 30, || {
            let mask = caught().lines().find_map(|line| line.strip_prefix("SigCgt:").map(str::to_string));
            mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() >> 14 & 1 == 1)
        });
        std::thread::sleep(Duration::from_millis(300));
        signal(&child, "TERM");
        assert_eq!(ends_within(child, 5).0, 75);
    }
}

/// A rank that ends before it has met the others: the launcher and they do not wait for it.
#[test]
fn a_rank_that_fails_before_it_joins_ends_the_others() {
    let folder = workplace();
    let mut command = train(folder.path(), 6, 600);
    let child = command.args(["--nproc", "2"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("ranks start", 30, || children(child.id()).len() == 2);
    kill(children(child.id()).into_iter().max().unwrap());
    let (status, text) = ends_within(child, 30);
    assert_eq!(status, 1);
    assert!(text.contains("error: rank 0 of 2 waited for the others: rank 1 of 2 was ended by signal 9"), "{text}");
    assert!(text.contains("error: rank 1 of 2 was ended by signal 9"), "{text}");
}

// ---- machines of their own --------------------------------------------------------------------------------------------

/// Two machines in all but name: network namespaces `.0` and `.1` with addresses 10.77.0.1 and 10.77.0.2, joined by a
/// cable.
struct Machines([String; 2]);

impl Machines {
    /// None, with the reason printed, where this machine does not allow them.
    fn new(name: &str) -> Option<Self> {
        let pid = std::process::id();
        let [a, b] = ["a", "b"].map(|side| format!("lvdm-{name}-{side}-{pid}"));
        let machines = Machines([a.clone(), b.clone()]);
        let cable = format!("link add veth0 netns {a} type veth peer name veth0 netns {b}");
        let mut lines = vec![format!("netns add {a}"), format!("netns add {b}"), cable];
        for (i, side) in [a, b].iter().enumerate() {
            lines.push(format!("-n {side} addr add 10.77.0.{}/24 dev veth0", i + 1));
            lines.push(format!("-n {side} link set lo up"));
            lines.push(format!("-n {side} link set veth0 up"));
        }
        for line in lines {
            if let Err(reason) = ip(&line) {
                skip(&format!("no network namespaces here: `ip {line}`: {reason}"), false);
                return None;
            }
        }
        Some(machines)
    }

    /// The command, as it runs on one of them; with `hosts`, its own name is `n1` or `n2`, and names lead where that says.
    fn on(&self, side: usize, command: &Command, hosts: Option<&str>) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.0[side]]);
        if let Some(hosts) = hosts {
            let folder = Path::new("/etc/netns").join(&self.0[side]);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("hosts"), hosts).unwrap();
            let named = format!("hostname n{}; exec \"$@\"", side + 1);
            inside.args(["unshare", "--uts", "sh", "-c", &named, "sh"]);
        }
        inside.arg(command.get_program()).args(command.get_args());
        inside.current_dir(command.get_current_dir().unwrap());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    fn cut(&self) {
        ip(&format!("-n {} link set veth0 down", self.0[0])).unwrap();
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for side in &self.0 {
            let _ = ip(&format!("netns del {side}"));
            let _ = fs::remove_dir_all(Path::new("/etc/netns").join(side));
        }
    }
}

fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip").args(line.split(' ')).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_string()) }
}

/// A network that falls silent: no rank outlives --rank-timeout by more than 10 s, and who is asked to stop does not even
/// wait that long. On the far side the store's connection is one that nobody answers.
#[test]
fn a_cut_link_ends_both_ranks() {
    let Some(machines) = Machines::new("cut") else { return };
    for (timeout, asked) in [(4, false), (600, true)] {
        let folder = workplace();
        let at = folder.path();
        let port = free_port();
        let mut training = train(at, 1_000_000, timeout);
        training.env("GLOO_SOCKET_IFNAME", "veth0");
        let ranks = [0, 1].map(|rank| start_rank(machines.on(rank, &training, None), rank, 2, "10.77.0.1", port));
        logs(at, 3);
        machines.cut();
        if asked {
            std::thread::sleep(Duration::from_secs(1));
            ranks.iter().for_each(|rank| signal(rank, "TERM"));
        }
        let [near, far] = ranks;
        let limit = if asked { 12 } else { u64::from(timeout) + 10 };
        let cut = Instant::now();
        let error = error_within(far, limit);
        assert!(error.contains("error: rank 1, step ") && error.contains("the store does not answer"), "{error}");
        let error = error_within(near, limit.saturating_sub(cut.elapsed().as_secs()).max(1));
        assert!(error.contains("error: rank 0, step ") && error.contains("rank 1 is gone: no sign of it"), "{error}");
        ip(&format!("-n {} link set veth0 up", machines.0[0])).unwrap();
    }
}

/// Debian gives a machine's own name the address 127.0.1.1: rank 0 knows itself by that, and the other by 10.77.0.1.
#[test]
fn machines_whose_own_name_leads_to_themselves_meet() {
    let Some(machines) = Machines::new("name") else { return };
    let folder = workplace();
    let training = train(folder.path(), 2, 20);
    let hosts = ["127.0.0.1 localhost\n127.0.1.1 n1\n", "127.0.0.1 localhost\n127.0.1.1 n2\n10.77.0.1 n1\n"];
    let port = free_port();
    let ranks = [0, 1].map(|rank| start_rank(machines.on(rank, &training, Some(hosts[rank])), rank, 2, "n1", port));
    let [first, second] = ranks.map(said);
    assert_eq!((first.status, second.status), (0, 0), "{}\n{}", first.err, second.err);
    let table = "rank 0: 2 ranks on n1, n2; device cpu; Gloo on 10.77.0.1";
    assert!((first.out.clone() + &first.err).contains(table), "{}{}", first.out, first.err);
    assert!(!second.err.contains("2 ranks on"), "{}", second.err);
}

// ---- torchrun ---------------------------------------------------------------------------------------------------------

/// torchrun: the one on the PATH, or that of the wheel which LibTorch comes from, with the Python packages that set-up
/// installs for it. None, with the reason printed, where there is none.
fn torchrun() -> Option<Command> {
    if Command::new("torchrun").arg("--help").output().is_ok_and(|output| output.status.success()) {
        return Some(Command::new("torchrun"));
    }
    let libtorch = std::env::var_os("LIBTORCH").map_or_else(|| source(".libtorch/torch"), PathBuf::from);
    let mut command = Command::new("python3");
    command.arg(source("tests/common/torchrun.py")).arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("torchrun"));
    command.env("LIBTORCH", libtorch).env("PYTHONPATH", source(".python")).env("PYTHONWARNINGS", "ignore");
    let mut tried = Command::new("python3");
    tried.args(command.get_args()).arg("--help");
    tried.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    match tried.output() {
        Ok(output) if output.status.success() => Some(command),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let last = text.lines().last().unwrap_or_default();
            skip(&format!("no torchrun on the PATH, nor in LibTorch's wheel: {last}"), true);
            None
        }
        Err(error) => {
            skip(&format!("no torchrun on the PATH, and no Python: {error}"), true);
            None
        }
    }
}

/// The training, under torchrun with these options.
fn under_torchrun(training: &Command, options: &str) -> Option<Child> {
    let mut command = torchrun()?;
    command.args(options.split(' ')).args(["--no-python", "--nproc-per-node", "1", "--"]);
    // libraries that stand in for CUDA's are torchrun's alone
    command.args(["env", "-u", "LD_LIBRARY_PATH"]).arg(training.get_program()).args(training.get_args());
    command.current_dir(training.get_current_dir().unwrap());
    command.env("OMP_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "");
    Some(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Two nodes whose agents meet by c10d's rendezvous: a rank is killed, both nodes start theirs anew around the same store,
/// one of them because its own rank failed and the other because the members changed, and the training goes on to its end.
#[test]
fn two_nodes_of_torchrun_come_back_after_a_rank_is_killed() {
    let folder = workplace();
    let at = folder.path();
    let mut training = train(at, 150, 20);
    training.arg("trainer.checkpoint_every=10");
    let port = free_port();
    let node = |is_host: bool| {
        let rendezvous = format!(
            "--nnodes 2 --max-restarts 1 --monitor-interval 0.1 --rdzv-backend c10d --rdzv-id lvdm --rdzv-endpoint \
             127.0.0.1:{port} --rdzv-conf is_host={is_host},join_timeout=60,last_call_timeout=1"
        );
        under_torchrun(&training, &rendezvous)
    };
    let Some(first) = node(true) else { return };
    let second = node(false).unwrap();
    let run = at.join("runs/autoencoder");
    wait_until("a checkpoint is written", 120, || checkpoint::list(&run).is_ok_and(|kept| !kept.is_empty()));
    let pid = children(second.id()).into_iter().max().unwrap();
    kill(pid);
    let [first, second] = [first, second].map(said);
    assert_eq!((first.status, second.status), (0, 0), "{}\n{}", first.err, second.err);
    let all = [first.out, first.err, second.out, second.err].concat();
    assert!(all.contains("going on from step") && all.contains("trained to step 150"), "{all}");
    assert_eq!(checkpoint::list(&run).unwrap().last().unwrap(), &checkpoint::path(&run, 150));
}
