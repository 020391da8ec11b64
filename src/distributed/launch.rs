//! How ranks come to be.

use std::{
    process::{Child, Command, ExitStatus},
    sync::mpsc::{RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tch::{Cuda, Device};

use super::{Place, Ranks, Stopped, here, stop_is_asked, watch::STOP_KEY};
use crate::torch::{DeviceName, Store, caught, cpus};

/// How many ranks, and how long they wait for each other. torchrun and SLURM's srun say the first by themselves.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Launch {
    /// Share the work among so many processes on this machine, one a GPU. Not needed under torchrun or srun, whose
    /// environment is read
    #[arg(long, value_name = "N")]
    pub nproc: Option<usize>,
    /// Seconds after which a rank that is silent, or late, is given up; at least as long as rank 0 takes for
    /// pictures, or a batch of long videos
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub rank_timeout: u64,
}

/// The variable that says how many threads a rank computes with.
const THREADS: &str = "OMP_NUM_THREADS";

/// Runs `body` on each rank, with the rank's own device: as the rank that the environment says, or, with `nproc`,
/// in so many new processes of the same command line, or alone.
///
/// # Errors
/// Those of `body`, with the rank's name and step; where another rank is to blame, its name. For the launching process:
/// which rank failed first, or [`Stopped`] where the ranks were.
pub fn run(launch: &Launch, device: DeviceName, body: impl FnOnce(&Ranks, Device) -> Result<()>) -> Result<()> {
    let timeout = Duration::from_secs(launch.rank_timeout.max(1));
    match (here()?, launch.nproc) {
        (Some(place), _) => {
            let device = device_of(&place, device)?;
            let ranks = Ranks::join(place, timeout)?;
            let result = caught(|| body(&ranks, device));
            ranks.end(result)
        }
        (None, Some(count)) => spawn(count, timeout),
        (None, None) => body(&Ranks::alone(), device.open()?),
    }
}

/// One GPU a rank.
fn device_of(place: &Place, name: DeviceName) -> Result<Device> {
    let gpus = Cuda::device_count().max(0) as usize;
    match name {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Auto if gpus == 0 => Ok(Device::Cpu),
        DeviceName::Cuda(index) if index > 0 && place.size > 1 => {
            bail!("every rank has a GPU of its own: give the device `cuda` or `auto`, not cuda:{index}")
        }
        // a cluster that shows each rank its own GPU alone
        _ if gpus == 1 && place.local_rank > 0 && std::env::var_os("CUDA_VISIBLE_DEVICES").is_some() => {
            Ok(Device::Cuda(0))
        }
        DeviceName::Cuda(index) if place.size == 1 => DeviceName::Cuda(index).open(),
        _ => {
            ensure!(
                place.local_rank < gpus,
                "rank {} is number {} on its machine, where LibTorch sees {gpus} GPUs: start one rank a GPU",
                place.rank,
                place.local_rank
            );
            Ok(Device::Cuda(place.local_rank))
        }
    }
}

/// Starts `count` processes of this one's command line and waits for them. The store is here, so that it outlives
/// each of them.
fn spawn(count: usize, timeout: Duration) -> Result<()> {
    ensure!(count >= 1, "--nproc must be at least 1");
    let store = Store::serve(timeout).context("cannot serve a store for the ranks")?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let threads = std::env::var(THREADS).unwrap_or_else(|_| (cpus() / count).max(1).to_string());
    let (sender, ended) = channel();
    for rank in 0..count {
        let mut child: Child = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", count.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", store.port().to_string())
            .env("TORCHELASTIC_USE_AGENT_STORE", "True")
            .env("TORCHELASTIC_RESTART_COUNT", "0")
            .env(THREADS, &threads)
            .spawn()
            .with_context(|| format!("cannot start rank {rank}"))?;
        let sender = sender.clone();
        std::thread::spawn(move || sender.send((rank, child.wait())));
    }
    let shared = store.under("lvdm/0")?;
    let (mut running, mut told, mut first) = (count, false, None::<(usize, String, Instant)>);
    let mut stopped = false;
    while running > 0 {
        if stop_is_asked() && !told {
            shared.set(STOP_KEY, b"")?;
            told = true;
        }
        match ended.recv_timeout(Duration::from_millis(100)) {
            Ok((rank, status)) => {
                running -= 1;
                let status = status.with_context(|| format!("cannot wait for rank {rank}"))?;
                if status.code() == Some(i32::from(Stopped::STATUS)) {
                    stopped = true;
                } else if !status.success() && first.is_none() {
                    first = Some((rank, ending(status), Instant::now()));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if let Some((rank, how, since)) = &first
            && since.elapsed() > timeout + Duration::from_secs(30)
        {
            // with the store gone, those that still run end too
            bail!("rank {rank} of {count} {how}, and {running} others have not ended since");
        }
    }
    match first {
        Some((rank, how, _)) => bail!("rank {rank} of {count} {how}; what it said stands above"),
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
