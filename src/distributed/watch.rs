//! Which rank is to blame: every rank says now and then that it lives and where it stands.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::stop::ask_to_stop;
use crate::torch::Store;

/// Between two signs of life.
const BEAT: Duration = Duration::from_millis(500);
/// A rank from which nothing came for so long is dead, where a connection to a rank has just broken.
const STILL: Duration = Duration::from_secs(3);
/// Calls that end by themselves are given so long before the process is ended.
const GRACE: Duration = Duration::from_secs(5);
/// The key that tells all ranks to save and leave.
pub(super) const STOP_KEY: &str = "stop";

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
    /// Calls to all ranks so far.
    calls: u64,
    message: String,
}

/// What this rank does, as its main thread says and the watching thread tells.
struct Own {
    sign: Sign,
    /// Since when nothing has happened.
    since: Instant,
}

/// Tells the others of this rank, and finds out which of them is gone.
pub(super) struct Watch {
    own: Arc<Mutex<Own>>,
    eyes: Arc<Mutex<Eyes>>,
    end: Option<(Sender<()>, JoinHandle<()>)>,
}

/// Reads what the others say.
struct Eyes {
    store: Store,
    rank: usize,
    size: usize,
    timeout: Duration,
    seen: BTreeMap<usize, (Sign, Instant)>,
    began: Instant,
}

impl Watch {
    /// Starts the watching thread. `timeout` is how long a rank may be silent or late.
    pub fn new(store: Store, rank: usize, size: usize, timeout: Duration) -> Result<Self> {
        let sign = Sign { beat: 0, condition: Condition::Working, step: -1, calls: 0, message: String::new() };
        let own = Arc::new(Mutex::new(Own { sign, since: Instant::now() }));
        let eyes = Eyes { store, rank, size, timeout, seen: BTreeMap::new(), began: Instant::now() };
        let eyes = Arc::new(Mutex::new(eyes));
        let (end, ended) = channel();
        let (mine, theirs) = (own.clone(), eyes.clone());
        let thread = std::thread::Builder::new().name("watch".into()).spawn(move || {
            look(&mine, &theirs);
            let mut blamed: Option<(String, Instant)> = None;
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(BEAT) {
                let found = look(&mine, &theirs);
                blamed = match (found, blamed) {
                    (Some(words), None) => Some((words, Instant::now())),
                    (Some(_), before) => before,
                    (None, _) => None,
                };
                if let Some((words, since)) = &blamed
                    && since.elapsed() > GRACE
                {
                    // the main thread waits in a call that does not end by itself
                    let step = mine.lock().expect("no one panics with it").sign.step;
                    eprintln!("error: rank {rank}{}: {words}", at(step));
                    signal_hook::low_level::exit(1);
                }
            }
        })?;
        Ok(Watch { own, eyes, end: Some((end, thread)) })
    }

    fn change(&self, change: impl FnOnce(&mut Sign)) {
        let mut own = self.own.lock().expect("no one panics with it");
        change(&mut own.sign);
        own.since = Instant::now();
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
        self.own.lock().expect("no one panics with it").sign.step
    }

    /// This rank ends by its own fault; the others will say so.
    pub fn failed(&self, message: &str) {
        self.change(|sign| (sign.condition, sign.message) = (Condition::Failed, message.to_string()));
        self.tell();
    }

    /// Who is to blame for a call that was not answered: waits a little for the signs to become clear.
    pub fn culprit(&self) -> String {
        self.change(|sign| sign.condition = Condition::Bereft);
        self.tell();
        let asked = Instant::now();
        loop {
            let mut eyes = self.eyes.lock().expect("no one panics with it");
            let late = asked.elapsed() > STILL + 2 * BEAT;
            let calls = self.own.lock().expect("no one panics with it").sign.calls;
            if let Err(words) = eyes.read() {
                return words;
            }
            if let Some(words) = eyes.fault(STILL, late.then_some(calls)) {
                return words;
            }
            if late {
                return "another rank does not answer".to_string();
            }
            drop(eyes);
            std::thread::sleep(BEAT);
        }
    }

    /// This rank is through: its silence means nothing any more.
    pub fn done(&self) {
        self.change(|sign| sign.condition = Condition::Done);
        self.tell();
    }

    /// Whether `rank` has said that it is through, or is gone.
    pub fn has_ended(&self, rank: usize) -> bool {
        let mut eyes = self.eyes.lock().expect("no one panics with it");
        eyes.read().is_err()
            || eyes
                .seen
                .get(&rank)
                .is_some_and(|(sign, when)| sign.condition != Condition::Working || when.elapsed() > STILL)
    }

    fn tell(&self) {
        let own = self.own.lock().expect("no one panics with it");
        let eyes = self.eyes.lock().expect("no one panics with it");
        let _ = eyes.tell(&own.sign);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.end.take() {
            drop(end);
            let _ = thread.join();
        }
    }
}

fn at(step: i64) -> String {
    if step < 0 { String::new() } else { format!(", step {step}") }
}

fn where_it_stood(step: i64) -> String {
    if step < 0 { "before the first step".to_string() } else { format!("at step {step}") }
}

/// One beat: tells of this rank, and, where nothing has happened here for a while, looks at the others.
fn look(own: &Mutex<Own>, eyes: &Mutex<Eyes>) -> Option<String> {
    let (sign, quiet) = {
        let mut own = own.lock().expect("no one panics with it");
        own.sign.beat += 1;
        (own.sign.clone(), own.since.elapsed())
    };
    let mut eyes = eyes.lock().expect("no one panics with it");
    let told = eyes.tell(&sign);
    if eyes.store.has(STOP_KEY).unwrap_or(false) {
        ask_to_stop();
    }
    if sign.condition != Condition::Working {
        return None;
    }
    if told.is_err() {
        return Some(eyes.store_is_gone());
    }
    if quiet < 4 * BEAT {
        return None;
    }
    if let Err(words) = eyes.read() {
        return Some(words);
    }
    let timeout = eyes.timeout;
    eyes.fault(timeout, (quiet > timeout + GRACE).then_some(sign.calls))
}

impl Eyes {
    fn key(rank: usize) -> String {
        format!("sign/{rank}")
    }

    fn tell(&self, sign: &Sign) -> Result<()> {
        self.store.set(&Self::key(self.rank), &serde_json::to_vec(sign)?)
    }

    fn store_is_gone(&self) -> String {
        "the store does not answer: rank 0, or the launcher that serves it, is gone".to_string()
    }

    /// Takes in the others' signs; the error says that there is nothing to read from.
    fn read(&mut self) -> Result<(), String> {
        for rank in (0..self.size).filter(|&rank| rank != self.rank) {
            let read = || -> Result<Option<Sign>> {
                if !self.store.has(&Self::key(rank))? {
                    return Ok(None);
                }
                Ok(serde_json::from_slice(&self.store.get(&Self::key(rank))?).ok())
            };
            let Ok(sign) = read() else { return Err(self.store_is_gone()) };
            if let Some(sign) = sign {
                let changed = self
                    .seen
                    .get(&rank)
                    .is_none_or(|(before, _)| (before.beat, before.condition) != (sign.beat, sign.condition));
                if changed {
                    self.seen.insert(rank, (sign, Instant::now()));
                }
            }
        }
        Ok(())
    }

    /// The rank that failed, or was silent for so long; with `calls`, this rank's own count, else the one that has
    /// made the fewest calls, if fewer.
    fn fault(&self, silent: Duration, calls: Option<u64>) -> Option<String> {
        let working = |rank: &usize| self.seen[rank].0.condition == Condition::Working;
        for (rank, (sign, _)) in &self.seen {
            if sign.condition == Condition::Failed {
                return Some(format!("rank {rank} failed{}: {}", at(sign.step), sign.message));
            }
        }
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
            format!("rank {rank} hangs: it lives, and stands {} while others wait for it", where_it_stood(sign.step))
        })
    }
}
