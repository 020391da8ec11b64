//! Asked to stop: Ctrl-C, a terminal that is closed, a cluster's warning that the time is over.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1},
    iterator::Signals,
    low_level::{emulate_default_handler, exit},
};

use super::rank;
use crate::atomic_file::delete_unfinished;

/// A training that was asked to save and leave before its end. It has said so; [`Self::STATUS`] says it to scripts.
#[derive(Debug)]
pub struct Stopped;

impl Stopped {
    /// EX_TEMPFAIL of sysexits.h: the same command, started again, goes on.
    pub const STATUS: u8 = 75;
}

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("asked to stop before the end")
    }
}

impl std::error::Error for Stopped {}

/// What SIGINT, SIGTERM, SIGHUP and SIGUSR1 do to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSignal {
    /// End it, as they end any process.
    End,
    /// End it at once with [`Stopped::STATUS`]: there is nothing to save, and the same command goes on.
    Leave,
    /// Nothing but a mark, which [`stop_is_asked`] reads: the work saves and ends by itself.
    Save,
}

const SIGNALS: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGUSR1];

/// A signal that comes again sooner is the same request: a terminal and a launcher may both pass it on.
const AGAIN: Duration = Duration::from_secs(1);

static MODE: Mutex<OnSignal> = Mutex::new(OnSignal::End);
static ASKED: AtomicBool = AtomicBool::new(false);

fn mode() -> std::sync::MutexGuard<'static, OnSignal> {
    MODE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives, signals do as was said; then what they did before.
#[derive(Debug)]
#[must_use = "signals are caught as long as this lives"]
pub struct Catching {
    before: OnSignal,
}

impl Drop for Catching {
    fn drop(&mut self) {
        *mode() = self.before;
    }
}

/// From now on, as long as the returned value lives, signals do this. In any case the same one again, a second later or
/// more, ends the process at once, SIGUSR1 excepted: a warning may be repeated. Another one does not: a launcher that was
/// interrupted, or whose warning came first, sends SIGTERM after it. A signal that this process was
/// started to ignore, as `nohup` does, is ignored.
///
/// # Errors
/// The system's.
pub fn catch_signals(what: OnSignal) -> Result<Catching> {
    static LISTENS: Mutex<bool> = Mutex::new(false);
    let mut listens = LISTENS.lock().unwrap_or_else(PoisonError::into_inner);
    if !*listens {
        let ignored = ignored();
        let signals = SIGNALS.iter().filter(|&signal| ignored >> (signal - 1) & 1 == 0);
        let signals = Signals::new(signals).context("cannot listen for signals")?;
        std::thread::Builder::new().name("signals".into()).spawn(move || listen(signals))?;
        *listens = true;
    }
    let before = std::mem::replace(&mut *mode(), what);
    Ok(Catching { before })
}

fn listen(mut signals: Signals) {
    let mut came: BTreeMap<i32, Instant> = BTreeMap::new();
    for signal in signals.forever() {
        let again = came.get(&signal).is_some_and(|first| first.elapsed() > AGAIN) && signal != SIGUSR1;
        came.entry(signal).or_insert_with(Instant::now);
        if again {
            end_by(signal);
        }
        ask(signal);
    }
}

fn ask(signal: i32) {
    let mode = mode();
    if ASKED.load(Ordering::Relaxed) {
        return;
    }
    match *mode {
        OnSignal::End => end_by(signal),
        OnSignal::Leave => {
            delete_unfinished();
            exit(i32::from(Stopped::STATUS))
        }
        OnSignal::Save => {
            ASKED.store(true, Ordering::Relaxed);
            // of ranks, who started them says it
            if rank().is_none() {
                tracing::info!("asked to stop: it saves first; asked once more, it ends at once");
            }
        }
    }
}

/// As a signal ends any process, except that no half-written files are left.
fn end_by(signal: i32) {
    delete_unfinished();
    let _ = emulate_default_handler(signal);
}

/// The signals that this process ignores, as bits from 1.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Whether this process was asked to save and leave.
pub fn stop_is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// As SIGTERM: another rank, or who started this one, was asked to stop. Once is enough.
pub fn ask_to_stop() {
    ask(SIGTERM);
}
