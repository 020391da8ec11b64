//! How ranks are started: by this program (`--nproc`), or by a launcher whose environment says which rank this is.

use std::{
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tch::{Cuda, Device};

use super::{
    OnSignal, Place, Ranks, Stopped, catch_signals, here,
    keys::{FAILED_KEY, PREFIX, STOP_KEY},
    stop_is_asked,
};
use crate::torch::{DeviceName, Store, caught, cpus, say_device};

/// How many ranks, and how long they wait for each other. torchrun, srun and mpirun say the first by themselves.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Launch {
    /// Divide the work among N processes (ranks) on this machine, one for each GPU. Not for programs started by torchrun,
    /// srun or mpirun: these start the processes themselves, and lvdm reads the variables that they set
    #[arg(long, value_name = "N")]
    pub nproc: Option<usize>,
    /// Seconds to wait for another rank that gives no sign of life, or is late within a training step, before all give
    /// up. A rank that samples, decodes videos, or writes previews and checkpoints may take as long as it needs
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub rank_timeout: u64,
}

/// The variable that says how many threads a rank computes with.
const THREADS: &str = "OMP_NUM_THREADS";
/// Between two looks at the ranks that were started.
const POLL: Duration = Duration::from_millis(20);
/// After one rank has failed, the others have this long to notice, say so and end by themselves.
const GRACE: Duration = Duration::from_secs(20);

/// Set for the ranks that `--nproc` starts. Their command line says `--nproc` too, and this keeps them from starting more.
const STARTED: &str = "LVDM_NPROC";

/// Runs `body` on each rank, with the rank's own device: as the rank that the environment says, or, with `nproc`,
/// in so many new processes of the same command line, or alone.
///
/// # Errors
/// Those of `body`, with the rank's name and step; where another rank is to blame, its name. For the launching process:
/// which rank failed first, or [`Stopped`] where the ranks were.
pub fn run(launch: &Launch, device: DeviceName, body: impl FnOnce(&Ranks, Device) -> Result<()>) -> Result<()> {
    let timeout = Duration::from_secs(launch.rank_timeout.max(1));
    match (here()?, launch.nproc) {
        (Some(place), nproc) => {
            let Place { rank, size, .. } = place;
            ensure!(
                nproc.is_none() || std::env::var_os(STARTED).is_some(),
                "--nproc is for a machine without a launcher: this process was started, by torchrun, srun or mpirun, as \
                 rank {rank} of {size} (RANK and WORLD_SIZE, or what SLURM and MPI set, say so). Let the launcher start \
                 one process a GPU (torchrun --nproc-per-node, srun --ntasks-per-node, mpirun -np), without --nproc"
            );
            let device = device_of(&place, device, true);
            let (ranks, device) = Ranks::join(place, device, timeout)?;
            say_device(device);
            let result = caught(|| body(&ranks, device));
            ranks.end(result)
        }
        (None, Some(count)) => spawn(count, device, timeout),
        (None, None) => body(&Ranks::alone(), device.open()?),
    }
}

/// The device of a rank: the GPU whose number is the rank's on its machine. With `may_show_one`, a single visible GPU is taken
/// for the rank's own, since a cluster may show each rank only its own (two ranks on one GPU are refused when they meet).
fn device_of(place: &Place, name: DeviceName, may_show_one: bool) -> Result<Device> {
    let gpus = Cuda::device_count().max(0) as usize;
    match name {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Auto if gpus == 0 => name.find(),
        DeviceName::Cuda(index) if index > 0 && place.size > 1 => {
            bail!("every rank has a GPU of its own: give the device `cuda` or `auto`, not cuda:{index}")
        }
        _ if may_show_one
            && gpus == 1
            && place.local_rank > 0
            && std::env::var_os("CUDA_VISIBLE_DEVICES").is_some() =>
        {
            Ok(Device::Cuda(0))
        }
        DeviceName::Cuda(index) if place.size == 1 => DeviceName::Cuda(index).find(),
        _ => {
            ensure!(
                place.local_rank < gpus,
                "rank {} is number {} on its machine, counted from 0, where LibTorch sees {gpus} GPUs: start one rank a GPU",
                place.rank,
                place.local_rank
            );
            Ok(Device::Cuda(place.local_rank))
        }
    }
}

/// Starts `count` processes of this one's command line and waits for them. The store is here, so that it outlives
/// each of them.
fn spawn(count: usize, device: DeviceName, timeout: Duration) -> Result<()> {
    ensure!(count >= 1, "--nproc must be at least 1");
    let _catching = catch_signals(OnSignal::Save)?;
    let store = Store::serve(0, timeout).context("cannot serve a store for the ranks")?;
    let place = |rank| Place {
        rank,
        size: count,
        local_rank: rank,
        host: "127.0.0.1".to_string(),
        port: store.port(),
        serves: false,
    };
    for rank in 0..count {
        device_of(&place(rank), device, false)?;
    }
    let program = std::env::current_exe().context("cannot find this program")?;
    let threads = std::env::var(THREADS).unwrap_or_else(|_| (cpus() / count).max(1).to_string());
    let mut children = Vec::new();
    for rank in 0..count {
        let child = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .envs(place(rank).variables())
            .env(THREADS, &threads)
            .env(STARTED, count.to_string())
            .spawn()
            .with_context(|| format!("cannot start rank {rank}"))?;
        children.push(Some(child));
    }
    let shared = store.under(PREFIX)?;
    let (mut stop_is_passed_on, mut stopped) = (false, false);
    let mut first: Option<(String, Instant)> = None;
    while children.iter().any(Option::is_some) {
        if stop_is_asked() && !stop_is_passed_on {
            shared.set(STOP_KEY, b"")?;
            stop_is_passed_on = true;
        }
        for (rank, running) in children.iter_mut().enumerate() {
            let Some(child) = running else { continue };
            let Some(status) = child.try_wait().with_context(|| format!("cannot wait for rank {rank}"))? else {
                continue;
            };
            *running = None;
            stopped |= status.code() == Some(i32::from(Stopped::STATUS));
            if !status.success() && status.code() != Some(i32::from(Stopped::STATUS)) && first.is_none() {
                let words = format!("rank {rank} of {count} {}", ending(status));
                shared.set(FAILED_KEY, &serde_json::to_vec(&words)?)?;
                first = Some((words, Instant::now()));
            }
        }
        if first.as_ref().is_some_and(|(_, since)| since.elapsed() > GRACE) {
            for child in children.iter_mut().flatten() {
                child.kill().context("cannot end a rank")?;
            }
        }
        std::thread::sleep(POLL);
    }
    match first {
        // a verb that has nothing to save
        Some(_) if stop_is_passed_on => bail!("asked to stop: the ranks ended before their work was done"),
        Some((words, _)) => bail!("{words}; what it said stands above"),
        None if stopped => Err(Stopped.into()),
        None => Ok(()),
    }
}

fn ending(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (_, Some(signal)) => format!("was ended by signal {signal}"),
        _ => format!("ended: {status}"),
    }
}
