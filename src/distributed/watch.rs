//! Which rank is to blame: every rank says now and then that it lives and where it stands.
//!
//! One thread alone speaks with the store, whose calls wait as long as the network makes them wait; another, which
//! speaks with nobody, ends the process where that thread or the main one waits in vain.

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
    meeting::{FAILED_KEY, PREFIX, STOP_KEY},
    stop::ask_to_stop,
    stop_is_asked,
};
use crate::torch::Store;

/// Between two signs of life.
const BEAT: Duration = Duration::from_millis(500);
/// A rank from which nothing came for so long is dead, where a connection to a rank has just broken, or where it was
/// asked to stop.
const STILL: Duration = Duration::from_secs(3);
/// Calls that end by themselves are given so long before the process is ended.
const GRACE: Duration = Duration::from_secs(5);
const STORE_IS_GONE: &str =
    "the store does not answer: rank 0, or the launcher that serves it, is gone or not to be reached";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Condition {
    Working,
    /// By a mistake of its own.
    Failed,
    /// Because another rank is gone.
    Bereft,
    Done,
}

/// What a rank says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sign {
    beat: u64,
    condition: Condition,
    /// The step of the training; −1 before the first.
    step: i64,
    /// Calls to all ranks so far, and one more while in one: odd then.
    calls: u64,
    message: String,
}

/// What this rank does and what it knows of the others.
struct State {
    rank: usize,
    size: usize,
    began: Instant,
    sign: Sign,
    /// Since when nothing has happened here.
    since: Instant,
    /// What it means that the store does not answer.
    silence: String,
    /// When the store answered last.
    answered: Instant,
    /// Whether the last look at it was in vain.
    gone: bool,
    /// When the others' signs were read last.
    read: Option<Instant>,
    /// Their last signs, and since when they are known.
    seen: BTreeMap<usize, (Sign, Instant)>,
    /// What the launcher says of a rank that ended.
    ended: Option<String>,
}

/// The state, which nobody holds over a call to the store.
struct Shared {
    state: Mutex<State>,
    looked: Condvar,
}

/// Tells the others of this rank, and finds out which of them is gone.
pub(super) struct Watch {
    shared: Arc<Shared>,
    eyes: Option<Thread>,
    _guard: Thread,
    timeout: Duration,
}

/// A thread that ends, if it can, when its sender is dropped; what is sent wakes it.
struct Thread {
    wake: Option<Sender<()>>,
    handle: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.wake = None;
        let Some(handle) = self.handle.take() else { return };
        // one that waits in the store is left there
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
    /// Begins to guard this process: it ends where the store is silent for longer than `timeout` and some seconds.
    /// `timeout` is how long a rank may be silent or late; `silence` says what it means that the store was never heard.
    pub fn new(rank: usize, size: usize, timeout: Duration, silence: String) -> Result<Self> {
        let sign = Sign { beat: 0, condition: Condition::Working, step: -1, calls: 0, message: String::new() };
        let now = Instant::now();
        let state = State {
            rank,
            size,
            began: now,
            sign,
            since: now,
            silence,
            answered: now,
            gone: false,
            read: None,
            seen: BTreeMap::new(),
            ended: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), looked: Condvar::new() });
        let theirs = shared.clone();
        let (wake, woken) = channel();
        let handle = std::thread::Builder::new().name("guard".into()).spawn(move || {
            let mut last = Instant::now();
            while let Err(RecvTimeoutError::Timeout) = woken.recv_timeout(BEAT) {
                let mut state = theirs.state();
                // after a sleep of the whole process (a suspended job, a debugger) the store is asked anew first
                if std::mem::replace(&mut last, Instant::now()).elapsed() > STILL {
                    state.answered = last;
                }
                let (silent, step, words) = (state.answered.elapsed(), state.sign.step, state.silence.clone());
                drop(state);
                if silent > GRACE + if stop_is_asked() { STILL } else { timeout } {
                    end(rank, step, &words);
                }
            }
        })?;
        let guard = Thread { wake: Some(wake), handle: Some(handle) };
        Ok(Watch { shared, eyes: None, _guard: guard, timeout })
    }

    /// This process waits in vain for nothing: it looks again and again by itself.
    pub fn waits(&self) {
        self.shared.state().answered = Instant::now();
    }

    /// Begins to watch the others: `store` is the whole one, `prefix` where they leave their signs.
    ///
    /// # Errors
    /// LibTorch's, the system's.
    pub fn begin(&mut self, store: &Store, prefix: &str) -> Result<()> {
        let (rank, size) = {
            let mut state = self.shared.state();
            state.began = Instant::now();
            state.silence = STORE_IS_GONE.to_string();
            (state.rank, state.size)
        };
        let mut eyes = Eyes { all: store.under(PREFIX)?, store: store.under(prefix)?, rank, size };
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
                let found = eyes.look(&sign, reads);
                let mut state = shared.state();
                state.take_in(found, reads.then_some(began));
                let found = state.blame(timeout);
                let step = state.sign.step;
                drop(state);
                shared.looked.notify_all();
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
        self.eyes = Some(Thread { wake: Some(wake), handle: Some(handle) });
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Sign)) {
        let mut state = self.shared.state();
        change(&mut state.sign);
        state.since = Instant::now();
    }

    /// The watching thread looks now.
    fn wake(&self) {
        if let Some(wake) = self.eyes.as_ref().and_then(|eyes| eyes.wake.as_ref()) {
            let _ = wake.send(());
        }
    }

    /// Waits until `found` finds something in a state that was read after this call began, but not for ever.
    fn look_until<T>(&self, patience: Duration, found: impl Fn(&State) -> Option<T>) -> Option<T> {
        let asked = Instant::now();
        let mut state = self.shared.state();
        loop {
            if state.read.is_some_and(|read| read >= asked)
                && let Some(found) = found(&state)
            {
                return Some(found);
            }
            if asked.elapsed() > patience || state.gone || state.answered.elapsed() > STILL {
                return None;
            }
            state = self.shared.looked.wait_timeout(state, BEAT).expect("no one panics with it").0;
        }
    }

    /// The training stands at this step.
    pub fn at_step(&self, step: i64) {
        self.change(|sign| sign.step = step);
    }

    /// A call to all ranks begins, or has ended.
    pub fn call(&self) {
        self.change(|sign| sign.calls += 1);
    }

    pub fn step(&self) -> i64 {
        self.shared.state().sign.step
    }

    /// This rank ends by its own fault; the others will say so.
    pub fn failed(&self, message: &str) {
        self.change(|sign| (sign.condition, sign.message) = (Condition::Failed, message.to_string()));
        self.wake();
        self.look_until(STILL, |_| Some(()));
    }

    /// Who is to blame for a call that was not answered: waits a little for the signs to become clear.
    pub fn culprit(&self) -> String {
        self.change(|sign| sign.condition = Condition::Bereft);
        self.wake();
        let calls = self.shared.state().sign.calls;
        let early = self.look_until(STILL + 2 * BEAT, |state| state.fault(STILL, None));
        let state = self.shared.state();
        let known = early.or_else(|| state.failed());
        known
            .or_else(|| (state.gone || state.answered.elapsed() > STILL).then(|| state.silence.clone()))
            .or_else(|| state.fault(STILL, Some(calls)))
            .unwrap_or_else(|| "another rank does not answer".to_string())
    }

    /// This rank is through: its silence means nothing any more.
    pub fn done(&self) {
        self.change(|sign| sign.condition = Condition::Done);
        self.wake();
        self.look_until(STILL, |_| Some(()));
    }

    /// Waits until each of the others has said that it is through, or is gone, but no longer than this.
    pub fn wait_for_ends(&self, patience: Duration) {
        let ended = |(sign, when): &(Sign, Instant)| sign.condition != Condition::Working || when.elapsed() > STILL;
        let asked = Instant::now();
        while asked.elapsed() < patience {
            self.wake();
            let all = |state: &State| state.seen.len() + 1 >= state.size && state.seen.values().all(ended);
            if self.look_until(STILL, |state| Some(all(state))).unwrap_or(true) {
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

/// The watching thread's way to the store.
struct Eyes {
    /// What is said to every attempt.
    all: Store,
    store: Store,
    rank: usize,
    size: usize,
}

/// What was found in the store.
struct Found {
    signs: Vec<(usize, Sign)>,
    ended: Option<String>,
}

impl Eyes {
    fn key(rank: usize) -> String {
        format!("sign/{rank}")
    }

    /// One beat: tells of this rank, and, if it `reads`, takes in what the others say.
    fn look(&mut self, sign: &Sign, reads: bool) -> Result<Found> {
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
    /// What was found in a look that, where it read the others' signs, began then.
    fn take_in(&mut self, found: Result<Found>, read: Option<Instant>) {
        self.gone = found.is_err();
        let Ok(found) = found else { return };
        let now = Instant::now();
        self.answered = now;
        self.read = read.or(self.read);
        self.ended = found.ended.or(self.ended.take());
        for (rank, sign) in found.signs {
            let changed =
                |(before, _): &(Sign, Instant)| (before.beat, before.condition) != (sign.beat, sign.condition);
            if self.seen.get(&rank).is_none_or(changed) {
                self.seen.insert(rank, (sign, now));
            }
        }
    }

    /// Who is to blame that nothing happens here; none while something does.
    fn blame(&self, timeout: Duration) -> Option<String> {
        if self.sign.condition != Condition::Working {
            return None;
        }
        if self.gone {
            return Some(self.failed().unwrap_or_else(|| self.silence.clone()));
        }
        let quiet = self.since.elapsed();
        if quiet < 4 * BEAT {
            return None;
        }
        // who was asked to stop waits for nobody who is silent
        let silent = if stop_is_asked() && self.sign.calls % 2 == 1 { STILL } else { timeout };
        self.fault(silent, (quiet > timeout + GRACE).then_some(self.sign.calls)).or_else(|| self.ended.clone())
    }

    /// The rank that ended by a fault of its own.
    fn failed(&self) -> Option<String> {
        let failed = |(_, (sign, _)): &(&usize, &(Sign, Instant))| sign.condition == Condition::Failed;
        let (rank, (sign, _)) = self.seen.iter().find(failed)?;
        Some(format!("rank {rank} failed{}: {}", at(sign.step), sign.message))
    }

    /// The rank that failed, or was silent for so long; with `calls`, this rank's own count, else the one that has
    /// made the fewest calls, if fewer.
    fn fault(&self, silent: Duration, calls: Option<u64>) -> Option<String> {
        if let Some(words) = self.failed() {
            return Some(words);
        }
        let working = |rank: &usize| self.seen[rank].0.condition == Condition::Working;
        for rank in (0..self.size).filter(|&rank| rank != self.rank) {
            match self.seen.get(&rank) {
                Some((sign, when)) if working(&rank) && when.elapsed() > silent => {
                    return Some(format!(
                        "rank {rank} is gone: no sign of it for {:.0} s, the last one {}",
                        when.elapsed().as_secs_f64(),
                        where_it_stood(sign.step)
                    ));
                }
                None if self.began.elapsed() > silent.max(STILL) => {
                    return Some(format!("rank {rank} is gone: it never gave a sign"));
                }
                _ => {}
            }
        }
        let (rank, (sign, _)) =
            self.seen.iter().filter(|(rank, _)| working(rank)).min_by_key(|(_, (sign, _))| sign.calls)?;
        (sign.calls < calls?).then(|| {
            format!(
                "rank {rank} hangs: it lives, and stands {} while others wait for it (if it only takes long, raise \
                 --rank-timeout)",
                where_it_stood(sign.step)
            )
        })
    }
}
