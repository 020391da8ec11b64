//! A cluster's warning that the time is over.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result};
use signal_hook::{
    consts::{SIGTERM, SIGUSR1},
    flag,
};

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

fn asked() -> &'static Arc<AtomicBool> {
    static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    ASKED.get_or_init(Arc::default)
}

/// From now on SIGTERM and SIGUSR1 do not end this process: [`stop_is_asked`] tells of them.
///
/// # Errors
/// The system's.
pub fn catch_signals() -> Result<()> {
    for signal in [SIGTERM, SIGUSR1] {
        flag::register(signal, asked().clone()).with_context(|| format!("cannot listen for signal {signal}"))?;
    }
    Ok(())
}

/// Whether this process was asked to save and leave.
pub fn stop_is_asked() -> bool {
    asked().load(Ordering::Relaxed)
}

pub(super) fn ask_to_stop() {
    asked().store(true, Ordering::Relaxed);
}
