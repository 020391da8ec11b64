//! How ranks find each other: they reach the store, agree on who is there now, and say where and on what they compute.
//!
//! A store may outlive ranks: torchrun starts them anew around the same one, not all at the same time. So rank 0 begins
//! an attempt under a new name, each rank says there that it has come, and rank 0 writes down who was there. Whoever
//! stands in that list has met the others; a process that does not looks for a newer attempt.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, TcpStream, ToSocketAddrs, UdpSocket},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tch::Device;

use super::{
    Place,
    keys::{FAILED_KEY, PREFIX, STOP_KEY},
    stop::ask_to_stop,
    watch::Watch,
};
use crate::torch::{Store, gpus};

/// The name of the newest attempt.
const ATTEMPT_KEY: &str = "attempt";

/// Between two looks at the store.
const POLL: Duration = Duration::from_millis(50);
/// After a rank that cannot take part has arrived, rank 0 waits this much longer, so that ranks which come a little later
/// hear why the attempt ends.
const LATE: Duration = Duration::from_secs(2);
/// How long a name that does not resolve is tried again: the machine that bears it may just be starting.
const RESOLVE: Duration = Duration::from_secs(30);

/// What a rank publishes about itself when it arrives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Arrival {
    /// Tells this process from one that had its rank before.
    process: String,
    host: String,
    /// From where it reaches the store.
    address: Option<IpAddr>,
    /// None on the CPU.
    gpu: Option<RankGpu>,
    /// Why it cannot take part.
    fault: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RankGpu {
    name: String,
    /// No two GPUs have the same, wherever they are.
    id: String,
}

/// The result of an attempt, which rank 0 writes into the store for all.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    arrivals: BTreeMap<usize, Arrival>,
    /// Why they cannot work together.
    fault: Option<String>,
}

/// All ranks are there and know of each other.
pub(super) struct Rendezvous {
    /// What stands before the keys of this attempt alone.
    pub prefix: String,
    /// Where this rank is reached by the others.
    pub address: IpAddr,
    arrivals: BTreeMap<usize, Arrival>,
}

impl Arrival {
    /// Describes this process. A `device` that could not be opened becomes its `fault`.
    pub fn new(place: &Place, device: &Result<Device>) -> Self {
        let host = host_name();
        let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let gpu = match device {
            Ok(Device::Cuda(index)) => Some(RankGpu::new(*index, &host)),
            _ => None,
        };
        Arrival {
            process: format!("{:x}-{}", began.as_nanos(), std::process::id()),
            address: address_towards(&place.host, place.port),
            gpu,
            fault: device.as_ref().err().map(|error| format!("{error:#}")),
            host,
        }
    }
}

impl RankGpu {
    fn new(index: usize, host: &str) -> Self {
        if let Some(gpu) = gpus().into_iter().nth(index) {
            return RankGpu { name: gpu.name, id: gpu.id };
        }
        // without NVIDIA's driver, as its variable numbers them
        let shown = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let id = shown.split(',').nth(index).filter(|id| !id.is_empty()).map_or(index.to_string(), str::to_string);
        RankGpu { name: format!("GPU {id}"), id: format!("{id} of {host}") }
    }
}

/// This machine's name.
fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "a machine without a name".to_string() } else { name.trim().to_string() }
}

/// This machine's address on the way to another one; nothing is sent.
fn address_towards(host: &str, port: u16) -> Option<IpAddr> {
    let towards = |to: std::net::SocketAddr| {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    (host, port).to_socket_addrs().ok()?.find_map(towards)
}

/// What it means that something listens where the store should be, and does not answer as one.
pub(super) fn foreign(place: &Place) -> String {
    format!(
        "what listens at {}:{} does not answer as the store of these ranks; if it is another program's, set MASTER_PORT \
         to a port that is free",
        place.host, place.port
    )
}

/// Serves the store where this is the rank that does, else waits until it is there.
///
/// # Errors
/// A name that does not resolve, nobody who listens, a port that another program has.
pub(super) fn reach(place: &Place, timeout: Duration, watch: &Watch) -> Result<Store> {
    let Place { rank, size, ref host, port, serves, .. } = *place;
    if serves {
        return Store::serve(port, timeout).map_err(|error| match error.to_string() {
            text if text.contains("EADDRINUSE") => anyhow!(
                "rank {rank} of {size} cannot listen on port {port}, which another program uses: set MASTER_PORT to one \
                 that is free"
            ),
            _ => error.context(format!("rank {rank} of {size} cannot serve a store at port {port}")),
        });
    }
    let began = Instant::now();
    loop {
        watch.is_polling();
        let (words, last) = match (host.as_str(), port).to_socket_addrs() {
            Err(error) => {
                (format!("MASTER_ADDR `{host}` is not the name of a machine that is known here: {error}"), RESOLVE)
            }
            Ok(addresses) => {
                let mut words = format!("{host}:{port} has no address");
                for address in addresses {
                    match TcpStream::connect_timeout(&address, Duration::from_secs(2).min(timeout)) {
                        Ok(_) => {
                            return Store::join(host, port, timeout)
                                .with_context(|| format!("rank {rank} of {size}: {}", foreign(place)));
                        }
                        Err(error) => words = format!("rank 0 is not at {host}:{port} ({}): {error}", address.ip()),
                    }
                }
                (words, timeout)
            }
        };
        if began.elapsed() >= last.min(timeout) {
            bail!("rank {rank} of {size} waited {:.0} s in vain: {words}", began.elapsed().as_secs_f64());
        }
        std::thread::sleep(4 * POLL);
    }
}

impl Rendezvous {
    /// Waits until all ranks are here. `store` is the whole one.
    ///
    /// # Errors
    /// Ranks that do not come within the time; one that cannot take part; two on one GPU; some on GPUs and some not.
    pub fn hold(place: &Place, store: &Store, own: Arrival, timeout: Duration, watch: &Watch) -> Result<Self> {
        let mut participant =
            Participant { place, store: store.under(PREFIX)?, own, timeout, watch, began: Instant::now() };
        let (attempt, outcome) = if place.rank == 0 { participant.lead()? } else { participant.follow()? };
        let Place { rank, size, .. } = *place;
        if let Some(fault) = outcome.fault {
            if place.serves {
                std::thread::sleep(20 * POLL); // the others read it too
            }
            bail!("rank {rank} of {size}: {fault}");
        }
        let address = listening_address(&participant.own, &outcome.arrivals);
        Ok(Rendezvous { prefix: format!("{PREFIX}/{attempt}"), address, arrivals: outcome.arrivals })
    }

    /// Who is where, in words.
    pub fn words(&self) -> String {
        let mut hosts: Vec<(&str, usize)> = Vec::new();
        for arrival in self.arrivals.values() {
            match hosts.iter_mut().find(|(host, _)| *host == arrival.host) {
                Some((_, count)) => *count += 1,
                None => hosts.push((&arrival.host, 1)),
            }
        }
        let several = hosts.len() > 1;
        let host = |(host, count): &(&str, usize)| match count {
            2.. if several => format!("{host} ({count})"),
            _ => host.to_string(),
        };
        let hosts: Vec<String> = hosts.iter().map(host).collect();
        let mut names: Vec<&str> = Vec::new();
        for gpu in self.arrivals.values().filter_map(|arrival| arrival.gpu.as_ref()) {
            if !names.contains(&gpu.name.as_str()) {
                names.push(&gpu.name);
            }
        }
        let device =
            if names.is_empty() { "device cpu".to_string() } else { format!("a GPU each ({})", names.join(", ")) };
        format!("{} ranks on {}; {device}", self.arrivals.len(), hosts.join(", "))
    }
}

/// One rank on its way to the rendezvous.
struct Participant<'a> {
    place: &'a Place,
    /// All attempts.
    store: Store,
    own: Arrival,
    timeout: Duration,
    watch: &'a Watch,
    began: Instant,
}

impl Participant<'_> {
    fn arrival_key(attempt: &str, rank: usize) -> String {
        format!("{attempt}/here/{rank}")
    }

    fn outcome_key(attempt: &str) -> String {
        format!("{attempt}/outcome")
    }

    fn read<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let gone = || self.gone();
        if !self.store.has(key).with_context(gone)? {
            return Ok(None);
        }
        Ok(serde_json::from_slice(&self.store.get(key).with_context(gone)?).ok())
    }

    fn write(&self, key: &str, value: &impl Serialize) -> Result<()> {
        self.store.set(key, &serde_json::to_vec(value)?).with_context(|| self.gone())
    }

    fn gone(&self) -> String {
        let Place { rank, size, ref host, port, .. } = *self.place;
        format!("rank {rank} of {size}: the store at {host}:{port} does not answer; who serves it is gone")
    }

    /// Between two looks at the store: passes on a request to stop, and ends the waiting where a rank has failed.
    fn wait(&self) -> Result<()> {
        self.watch.is_polling();
        if self.store.has(STOP_KEY).with_context(|| self.gone())? {
            ask_to_stop();
        }
        if let Some(words) = self.read::<String>(FAILED_KEY)? {
            let Place { rank, size, .. } = *self.place;
            bail!("rank {rank} of {size} waited for the others: {words}");
        }
        std::thread::sleep(POLL);
        Ok(())
    }

    fn missing(&self, attempt: &str) -> Result<Vec<usize>> {
        let mut missing = Vec::new();
        for rank in 0..self.place.size {
            if !self.store.has(&Self::arrival_key(attempt, rank)).with_context(|| self.gone())? {
                missing.push(rank);
            }
        }
        Ok(missing)
    }

    /// Rank 0: begins an attempt, waits for the others and says what comes of it.
    fn lead(&mut self) -> Result<(String, Outcome)> {
        let attempt = self.own.process.clone();
        self.write(ATTEMPT_KEY, &attempt)?;
        let mut arrivals = BTreeMap::from([(0, self.own.clone())]);
        self.write(&Self::arrival_key(&attempt, 0), &self.own)?;
        // one that cannot take part ends it; those who come at about the same time hear why
        let mut last = self.began + self.timeout;
        while arrivals.len() < self.place.size && Instant::now() < last {
            self.wait()?;
            for rank in 1..self.place.size {
                if !arrivals.contains_key(&rank)
                    && let Some(arrival) = self.read::<Arrival>(&Self::arrival_key(&attempt, rank))?
                {
                    arrivals.insert(rank, arrival);
                }
            }
            if refusal(&arrivals).is_some() {
                last = last.min(Instant::now() + LATE);
            }
        }
        let missing: Vec<usize> = (0..self.place.size).filter(|rank| !arrivals.contains_key(rank)).collect();
        let not_come = || (!missing.is_empty()).then(|| self.not_come(&missing));
        let fault = refusal(&arrivals).or_else(not_come);
        let outcome = Outcome { arrivals, fault };
        self.write(&Self::outcome_key(&attempt), &outcome)?;
        Ok((attempt, outcome))
    }

    /// The others: come to the newest attempt until there is one that counts them in.
    fn follow(&mut self) -> Result<(String, Outcome)> {
        let rank = self.place.rank;
        let mut at = None;
        loop {
            let newest = self.read::<String>(ATTEMPT_KEY)?;
            if let Some(newest) = newest.filter(|newest| Some(newest) != at.as_ref()) {
                self.write(&Self::arrival_key(&newest, rank), &self.own)?;
                at = Some(newest);
            }
            let mut over = false;
            if let Some(attempt) = &at
                && let Some(outcome) = self.read::<Outcome>(&Self::outcome_key(attempt))?
            {
                over = true;
                let counted = outcome.arrivals.get(&rank).is_some_and(|counted| counted.process == self.own.process);
                if counted {
                    return Ok((attempt.clone(), outcome));
                }
            }
            // rank 0 says it first, and for all
            if self.began.elapsed() > self.timeout + 20 * POLL {
                let missing = match &at {
                    Some(attempt) if !over => self.missing(attempt)?,
                    _ => vec![0],
                };
                bail!("rank {rank} of {}: {}", self.place.size, self.not_come(&missing));
            }
            self.wait()?;
        }
    }

    fn not_come(&self, missing: &[usize]) -> String {
        let Place { ref host, port, .. } = *self.place;
        let who = match missing {
            [] => "rank 0 has".to_string(),
            [one] => format!("rank {one} has"),
            [first, .., last] if missing.len() > 8 => format!("{} ranks, from {first} to {last}, have", missing.len()),
            several => {
                let several: Vec<String> = several.iter().map(usize::to_string).collect();
                format!("ranks {} have", several.join(", "))
            }
        };
        format!("{who} not come to {host}:{port} within {:.0} s", self.timeout.as_secs_f64())
    }
}

fn fault_of(rank: usize, arrival: &Arrival) -> Option<String> {
    arrival.fault.as_ref().map(|fault| format!("rank {rank} on {} cannot take part: {fault}", arrival.host))
}

/// Why these ranks cannot work together.
fn refusal(arrivals: &BTreeMap<usize, Arrival>) -> Option<String> {
    if let Some(fault) = arrivals.iter().find_map(|(&rank, arrival)| fault_of(rank, arrival)) {
        return Some(fault);
    }
    let mut owners: BTreeMap<&str, usize> = BTreeMap::new();
    for (&rank, arrival) in arrivals {
        if let Some(gpu) = &arrival.gpu
            && let Some(other) = owners.insert(&gpu.id, rank)
        {
            return Some(format!(
                "ranks {other} and {rank} are both on one GPU, {} of {}: start one rank a GPU",
                gpu.name, arrival.host
            ));
        }
    }
    let first = |has_gpu: bool| arrivals.iter().find(|(_, arrival)| arrival.gpu.is_some() == has_gpu);
    if let (Some((with, there)), Some((without, here))) = (first(true), first(false)) {
        return Some(format!(
            "rank {with} on {} has a GPU, and rank {without} on {} has none that LibTorch sees: give all ranks GPUs, or \
             all the CPU by the device `cpu`",
            there.host, here.host
        ));
    }
    None
}

/// Where a rank listens for the others: at its address on the way to the store. Where that does not lead out of the
/// machine (its own name may stand for 127.0.1.1), at its address on the way to a rank that is elsewhere.
fn listening_address(own: &Arrival, all: &BTreeMap<usize, Arrival>) -> IpAddr {
    let is_reachable = |address: &IpAddr| !address.is_loopback() && !address.is_unspecified();
    let outside = || all.values().filter_map(|arrival| arrival.address).find(is_reachable);
    let towards = || address_towards(&outside()?.to_string(), 9);
    own.address.filter(is_reachable).or_else(towards).unwrap_or(Ipv4Addr::LOCALHOST.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(host: &str, gpu: Option<&str>) -> Arrival {
        let gpu = gpu.map(|id| RankGpu { name: "NVIDIA H100".into(), id: id.into() });
        Arrival { process: host.into(), host: host.into(), address: None, gpu, fault: None }
    }

    fn table(rows: &[(&str, Option<&str>)]) -> BTreeMap<usize, Arrival> {
        rows.iter().map(|(host, gpu)| arrival(host, *gpu)).enumerate().collect()
    }

    #[test]
    fn two_ranks_on_one_gpu_are_refused() {
        // what `srun --gpus-per-task 1` gives: number 0 everywhere, and yet different ones
        assert_eq!(refusal(&table(&[("n1", Some("a")), ("n1", Some("b")), ("n2", Some("c"))])), None);
        assert_eq!(refusal(&table(&[("n1", None), ("n1", None)])), None);
        let words = refusal(&table(&[("n1", Some("a")), ("n1", Some("b")), ("n1", Some("b"))])).unwrap();
        assert!(words.contains("ranks 1 and 2") && words.contains("one GPU"), "{words}");
    }

    #[test]
    fn a_rank_without_a_gpu_among_ranks_with_one_is_refused() {
        let words = refusal(&table(&[("n1", Some("a")), ("n2", None)])).unwrap();
        assert!(words.contains("rank 0 on n1") && words.contains("rank 1 on n2 has none"), "{words}");
    }

    #[test]
    fn a_rank_that_cannot_take_part_is_named() {
        let mut ranks = table(&[("n1", None), ("n2", None)]);
        ranks.get_mut(&1).unwrap().fault = Some("no interface eth9".into());
        assert_eq!(refusal(&ranks).unwrap(), "rank 1 on n2 cannot take part: no interface eth9");
    }

    #[test]
    fn ranks_listen_where_others_reach_them() {
        let at = |address: &str| Some(address.parse().unwrap());
        let mut ranks = table(&[("n1", None), ("n2", None)]);
        let listens = |ranks: &BTreeMap<usize, Arrival>, rank| listening_address(&ranks[&rank], ranks).to_string();
        assert_eq!(listens(&ranks, 0), "127.0.0.1");
        ranks.get_mut(&1).unwrap().address = at("10.77.0.2");
        assert_eq!(listens(&ranks, 1), "10.77.0.2");
        // its own name leads to itself, and the way to the other one is by the loopback too
        ranks.get_mut(&0).unwrap().address = at("127.0.1.1");
        ranks.get_mut(&1).unwrap().address = at("127.0.0.3");
        assert_eq!(listens(&ranks, 0), "127.0.0.1");
    }

    #[test]
    fn ranks_are_listed_by_host() {
        let words = |rows: &[(&str, Option<&str>)]| {
            Rendezvous { prefix: String::new(), address: Ipv4Addr::LOCALHOST.into(), arrivals: table(rows) }.words()
        };
        assert_eq!(words(&[("n1", None), ("n2", None)]), "2 ranks on n1, n2; device cpu");
        assert_eq!(
            words(&[("n1", Some("a")), ("n1", Some("b")), ("n2", Some("c"))]),
            "3 ranks on n1 (2), n2; a GPU each (NVIDIA H100)"
        );
    }
}
