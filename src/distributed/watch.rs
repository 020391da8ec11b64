//! Finds the rank that others wait for: every rank writes a sign of life and the step it has reached into the store.
//!
//! Two threads do this. The watching thread alone calls the store, whose calls take as long as the network makes them
//! take. The guarding thread calls nobody, and ends the process where the watching or the main thread waits in vain.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{
    keys::{FAILED_KEY, PREFIX, STOP_KEY},
    stop::ask_to_stop,
    stop_is_asked,
};
use crate::torch::Store;

/// Between two signs of life.
const BEAT: Duration = Duration::from_millis(500);
/// A rank that has been silent for this long counts as dead once a connection has broken or a stop was asked for.
const SILENCE: Duration = Duration::from_secs(3);
/// How long a call that should end by itself may still take before the process is ended.
const GRACE: Duration = Duration::from_secs(5);
const STORE_IS_GONE: &str =
    "the store does not answer: rank 0, or the launcher that serves it, is gone or not to be reached";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Condition {
    Working,
    /// It ends because of an error of its own.
    Failed,
    /// It ends because another rank is gone.
    PeerLost,
    Done,
}

/// What a rank tells the others of itself, again and again.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sign {
    beat: u64,
    condition: Condition,
    /// The step of the training; −1 before the first.
    step: i64,
    /// Counts the beginning and the end of each call to all ranks: odd while the rank is in such a call.
    calls: u64,
    message: String,
}

/// What this rank does and what it knows of the others.
struct State {
    rank: usize,
    size: usize,
    began: Instant,
    sign: Sign,
    /// When `sign` changed last.
    since: Instant,
    /// The error to report where the store does not answer.
    unanswered: String,
    /// When the store answered last.
    answered: Instant,
    /// Whether the last call to the store failed.
    store_failed: bool,
    /// When the peers' signs were read last.
    read: Option<Instant>,
    /// The peers' last signs, and when each was first seen.
    peers: BTreeMap<usize, (Sign, Instant)>,
    /// What the launcher says of a rank that ended.
    ended: Option<String>,
}

/// The state, which no thread keeps locked during a call to the store.
struct Shared {
    state: Mutex<State>,
    polled: Condvar,
}

/// Tells the peers of this rank, and finds out which of them is gone.
pub(super) struct Watch {
    shared: Arc<Shared>,
    watcher: Option<Thread>,
    _guard: Thread,
    timeout: Duration,
}

/// A thread that a message wakes, and that ends when its sender is dropped.
struct Thread {
    wake: Option<Sender<()>>,
    handle: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.wake = None;
        let Some(handle) = self.handle.take() else { return };
        // a thread that waits for the store is not waited for
        let asked = Instant::now();
        while !handle.is_finished() && asked.elapsed() < 2 * BEAT {
            std::thread::sleep(BEAT / 50);
        }
        if handle.is_finished() {
            let _ = handle.join();
        }
    }
}

fn end(rank: usize, step: i64, words: &str) -> ! {
    let _ = writeln!(io::stderr(), "error: rank {rank}{}: {words}", at(step));
    signal_hook::low_level::exit(1)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no one panics with it")
    }
}

impl Watch {
    /// Begins to guard this process, which ends where the store is silent for longer than `timeout` and some seconds.
    /// `timeout` is how long a rank may be silent or late. `unanswered` is the error to report where the store has never
    /// answered.
    pub fn new(rank: usize, size: usize, timeout: Duration, unanswered: String) -> Result<Self> {
        let sign = Sign { beat: 0, condition: Condition::Working, step: -1, calls: 0, message: String::new() };
        let now = Instant::now();
        let state = State {
            rank,
            size,
            began: now,
            sign,
            since: now,
            unanswered,
            answered: now,
            store_failed: false,
            read: None,
            peers: BTreeMap::new(),
            ended: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), polled: Condvar::new() });
        let theirs = shared.clone();
        let (wake, woken) = channel();
        let handle = std::thread::Builder::new().name("guard".into()).spawn(move || {
            let mut last = Instant::now();
            while let Err(RecvTimeoutError::Timeout) = woken.recv_timeout(BEAT) {
                let mut state = theirs.state();
                // after a sleep of the whole process (a suspended job, a debugger) the store is asked anew first
                if std::mem::replace(&mut last, Instant::now()).elapsed() > SILENCE {
                    state.answered = last;
                }
                let (silent, step, words) = (state.answered.elapsed(), state.sign.step, state.unanswered.clone());
                drop(state);
                if silent > GRACE + if stop_is_asked() { SILENCE } else { timeout } {
                    end(rank, step, &words);
                }
            }
        })?;
        let guard = Thread { wake: Some(wake), handle: Some(handle) };
        Ok(Watch { shared, watcher: None, _guard: guard, timeout })
    }

    /// The main thread polls the store itself, so that it cannot be stuck in a call: the guard begins to count anew.
    pub fn is_polling(&self) {
        self.shared.state().answered = Instant::now();
    }

    /// Begins to watch the peers. `store` has no prefix yet; `prefix` is that of the keys under which they write their signs.
    ///
    /// # Errors
    /// LibTorch's, the system's.
    pub fn begin(&mut self, store: &Store, prefix: &str) -> Result<()> {
        let (rank, size) = {
            let mut state = self.shared.state();
            state.began = Instant::now();
            state.unanswered = STORE_IS_GONE.to_string();
            (state.rank, state.size)
        };
        let mut peers = PeerView { all: store.under(PREFIX)?, store: store.under(prefix)?, rank, size };
        let (shared, timeout) = (self.shared.clone(), self.timeout);
        let (wake, woken) = channel();
        let handle = std::thread::Builder::new().name("watch".into()).spawn(move || {
            let mut blamed: Option<(String, Instant)> = None;
            loop {
                let mut state = shared.state();
                state.sign.beat += 1;
                let sign = state.sign.clone();
                let reads = state.since.elapsed() >= 4 * BEAT || sign.condition != Condition::Working;
                drop(state);
                let began = Instant::now();
                let found = peers.poll_peers(&sign, reads);
                let mut state = shared.state();
                state.take_in(found, reads.then_some(began));
                let found = state.stall(timeout);
                let step = state.sign.step;
                drop(state);
                shared.polled.notify_all();
                blamed = match (found, blamed) {
                    (Some(words), None) => Some((words, Instant::now())),
                    (Some(_), before) => before,
                    (None, _) => None,
                };
                if let Some((words, since)) = &blamed
                    && since.elapsed() > GRACE
                {
                    // the main thread waits in a call that does not end by itself
                    end(rank, step, words);
                }
                if let Err(RecvTimeoutError::Disconnected) = woken.recv_timeout(BEAT) {
                    break;
                }
            }
        })?;
        self.watcher = Some(Thread { wake: Some(wake), handle: Some(handle) });
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Sign)) {
        let mut state = self.shared.state();
        change(&mut state.sign);
        state.since = Instant::now();
    }

    /// Makes the watching thread poll now.
    fn wake(&self) {
        if let Some(wake) = self.watcher.as_ref().and_then(|watcher| watcher.wake.as_ref()) {
            let _ = wake.send(());
        }
    }

    /// Waits until `found` gives something for a state that was read after this call began; none after `patience`, or where
    /// the store is silent.
    fn wait_until<T>(&self, patience: Duration, found: impl Fn(&State) -> Option<T>) -> Option<T> {
        let asked = Instant::now();
        let mut state = self.shared.state();
        loop {
            if state.read.is_some_and(|read| read >= asked)
                && let Some(found) = found(&state)
            {
                return Some(found);
            }
            if asked.elapsed() > patience || state.store_failed || state.answered.elapsed() > SILENCE {
                return None;
            }
            state = self.shared.polled.wait_timeout(state, BEAT).expect("no one panics with it").0;
        }
    }

    /// The training has reached this step.
    pub fn at_step(&self, step: i64) {
        self.change(|sign| sign.step = step);
    }

    /// To be called at the beginning and at the end of each call to all ranks.
    pub fn call(&self) {
        self.change(|sign| sign.calls += 1);
    }

    pub fn step(&self) -> i64 {
        self.shared.state().sign.step
    }

    /// This rank ends by an error of its own, which the peers will report.
    pub fn failed(&self, message: &str) {
        self.change(|sign| (sign.condition, sign.message) = (Condition::Failed, message.to_string()));
        self.wake();
        self.wait_until(SILENCE, |_| Some(()));
    }

    /// Which rank is to blame for a call that was not answered, as an error text. Waits a little until the signs are clear.
    pub fn blame(&self) -> String {
        self.change(|sign| sign.condition = Condition::PeerLost);
        self.wake();
        let calls = self.shared.state().sign.calls;
        let early = self.wait_until(SILENCE + 2 * BEAT, |state| state.fault(SILENCE, None));
        let state = self.shared.state();
        let known = early.or_else(|| state.failed());
        known
            .or_else(|| (state.store_failed || state.answered.elapsed() > SILENCE).then(|| state.unanswered.clone()))
            .or_else(|| state.fault(SILENCE, Some(calls)))
            .unwrap_or_else(|| "another rank does not answer".to_string())
    }

    /// This rank has finished, and its silence from now on is no fault.
    pub fn done(&self) {
        self.change(|sign| sign.condition = Condition::Done);
        self.wake();
        self.wait_until(SILENCE, |_| Some(()));
    }

    /// Waits until each peer has finished or is gone, but no longer than `patience`.
    pub fn wait_for_ends(&self, patience: Duration) {
        let ended = |(sign, when): &(Sign, Instant)| sign.condition != Condition::Working || when.elapsed() > SILENCE;
        let asked = Instant::now();
        while asked.elapsed() < patience {
            self.wake();
            let all = |state: &State| state.peers.len() + 1 >= state.size && state.peers.values().all(ended);
            if self.wait_until(SILENCE, |state| Some(all(state))).unwrap_or(true) {
                return;
            }
            std::thread::sleep(BEAT / 25);
        }
    }
}

fn at(step: i64) -> String {
    if step < 0 { String::new() } else { format!(", step {step}") }
}

fn where_it_stood(step: i64) -> String {
    if step < 0 { "before the first step".to_string() } else { format!("at step {step}") }
}

/// The watching thread's view of its peers, by way of the store.
struct PeerView {
    /// Keys that hold for every attempt.
    all: Store,
    /// Keys of this attempt.
    store: Store,
    rank: usize,
    size: usize,
}

/// What was found in the store.
struct Found {
    signs: Vec<(usize, Sign)>,
    ended: Option<String>,
}

impl PeerView {
    fn key(rank: usize) -> String {
        format!("sign/{rank}")
    }

    /// One beat: writes this rank's sign, and, if it `reads`, reads those of its peers.
    fn poll_peers(&mut self, sign: &Sign, reads: bool) -> Result<Found> {
        self.store.set(&Self::key(self.rank), &serde_json::to_vec(sign)?)?;
        if self.all.has(STOP_KEY)? {
            ask_to_stop();
        }
        let mut found = Found { signs: Vec::new(), ended: None };
        if reads {
            for rank in (0..self.size).filter(|&rank| rank != self.rank) {
                if self.store.has(&Self::key(rank))?
                    && let Ok(sign) = serde_json::from_slice(&self.store.get(&Self::key(rank))?)
                {
                    found.signs.push((rank, sign));
                }
            }
        }
        if reads && self.all.has(FAILED_KEY)? {
            found.ended = serde_json::from_slice(&self.all.get(FAILED_KEY)?).ok();
        }
        Ok(found)
    }
}

impl State {
    /// Takes in what a poll found; `read` is when the poll began, if it read the peers' signs.
    fn take_in(&mut self, found: Result<Found>, read: Option<Instant>) {
        self.store_failed = found.is_err();
        let Ok(found) = found else { return };
        let now = Instant::now();
        self.answered = now;
        self.read = read.or(self.read);
        self.ended = found.ended.or(self.ended.take());
        for (rank, sign) in found.signs {
            let changed =
                |(before, _): &(Sign, Instant)| (before.beat, before.condition) != (sign.beat, sign.condition);
            if self.peers.get(&rank).is_none_or(changed) {
                self.peers.insert(rank, (sign, now));
            }
        }
    }

    /// Which rank is to blame for this rank's standing still; none while it makes progress.
    fn stall(&self, timeout: Duration) -> Option<String> {
        if self.sign.condition != Condition::Working {
            return None;
        }
        if self.store_failed {
            return Some(self.failed().unwrap_or_else(|| self.unanswered.clone()));
        }
        let quiet = self.since.elapsed();
        if quiet < 4 * BEAT {
            return None;
        }
        // after a request to stop, a silent peer is not waited for
        let silent = if stop_is_asked() && self.sign.calls % 2 == 1 { SILENCE } else { timeout };
        self.fault(silent, (quiet > timeout + GRACE).then_some(self.sign.calls)).or_else(|| self.ended.clone())
    }

    /// The peer that ended by an error of its own.
    fn failed(&self) -> Option<String> {
        let failed = |(_, (sign, _)): &(&usize, &(Sign, Instant))| sign.condition == Condition::Failed;
        let (rank, (sign, _)) = self.peers.iter().find(failed)?;
        Some(format!("rank {rank} failed{}: {}", at(sign.step), sign.message))
    }

    /// The peer that failed, or has been silent for longer than `silent`. Where there is none and `calls`, this rank's own
    /// count, is given: the peer that has made the fewest calls, if these are fewer.
    fn fault(&self, silent: Duration, calls: Option<u64>) -> Option<String> {
        if let Some(words) = self.failed() {
            return Some(words);
        }
        let working = |rank: &usize| self.peers[rank].0.condition == Condition::Working;
        for rank in (0..self.size).filter(|&rank| rank != self.rank) {
            match self.peers.get(&rank) {
                Some((sign, when)) if working(&rank) && when.elapsed() > silent => {
                    return Some(format!(
                        "rank {rank} is gone: no sign of it for {:.0} s, the last one {}",
                        when.elapsed().as_secs_f64(),
                        where_it_stood(sign.step)
                    ));
                }
                None if self.began.elapsed() > silent.max(SILENCE) => {
                    return Some(format!("rank {rank} is gone: it never gave a sign"));
                }
                _ => {}
            }
        }
        let (rank, (sign, _)) =
            self.peers.iter().filter(|(rank, _)| working(rank)).min_by_key(|(_, (sign, _))| sign.calls)?;
        (sign.calls < calls?).then(|| {
            format!(
                "rank {rank} hangs: it lives, and stands {} while others wait for it (if it only takes long, raise \
                 --rank-timeout)",
                where_it_stood(sign.step)
            )
        })
    }
}
