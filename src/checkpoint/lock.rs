//! One process at a time writes a run.

use std::{
    fmt,
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::atomic_file::{is_dead, place};

/// The file by which a run folder is held. It is there as long as it is.
const LOCK_FILE: &str = ".lock";
/// Where the file system has no locks, the holder renews its file so often …
const RENEWED_EVERY: Duration = Duration::from_secs(60);
/// … and on another machine it is taken for dead after so long.
const STALE_AFTER: Duration = Duration::from_secs(300);

/// Who holds a run folder, as its file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    /// For people.
    host: String,
    /// Where its number means this process.
    #[serde(default)]
    place: String,
    pid: u32,
    /// In the kernel's ticks since the machine was started: tells a process from a later one of the same number.
    started: u64,
    /// Seconds since 1970 at which the folder was taken.
    since: u64,
}

impl Holder {
    /// This process, from now on.
    fn new() -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let pid = std::process::id();
        Holder { host: host.trim().into(), place: place(), pid, started: start_of(pid).unwrap_or(0), since: now() }
    }

    fn read(file: &mut File) -> Option<Self> {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).ok()?;
        file.read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn write(&self, file: &mut File) -> Result<()> {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(writeln!(file, "{}", serde_json::to_string(self)?)?)
    }

    /// Whether it lives, for all that can be known from the place `here`: on one machine by the process, else by how
    /// long ago the file was renewed.
    fn lives(&self, here: &str, renewed: Duration) -> bool {
        if self.place != here {
            return renewed < STALE_AFTER;
        }
        match start_of(self.pid) {
            Some(started) => started == self.started,
            // `/proc` may hide it
            None => i32::try_from(self.pid).ok().and_then(Pid::from_raw).is_some_and(|pid| !is_dead(pid)),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minutes = now().saturating_sub(self.since) / 60;
        write!(f, "process {} on {}, for {} h {} min", self.pid, self.host, minutes / 60, minutes % 60)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// When a process of this machine was started; none where there is no such process.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name of the program, in parentheses, may hold anything
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A run folder in which this process alone trains or imports, as long as this value lives.
///
/// A lock of the file system's holds it (`flock`), so that it ends with the process however that ends. Where the file
/// system has none, the file says who holds the folder and since when, and is renewed every minute.
#[derive(Debug)]
pub struct RunLock {
    run: PathBuf,
    file: File,
    made_folder: bool,
    renewal: Option<(Sender<()>, JoinHandle<()>)>,
}

impl RunLock {
    /// Takes the folder, which is made where it is missing.
    ///
    /// # Errors
    /// A folder that another process has: says which. A folder that cannot be written.
    pub fn take(run: &Path) -> Result<Self> {
        let made_folder = !run.exists();
        let cannot = || format!("cannot take the run folder {}", run.display());
        fs::create_dir_all(run).with_context(cannot)?;
        let path = run.join(LOCK_FILE);
        loop {
            let mut options = OpenOptions::new();
            let mut file =
                options.read(true).write(true).create(true).truncate(false).open(&path).with_context(cannot)?;
            let by_system = match file.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => return refuse(run, Holder::read(&mut file)),
                Err(TryLockError::Error(_)) => false,
            };
            // who held it may have deleted the file between the two lines above
            if !fs::metadata(&path).is_ok_and(|there| file.metadata().is_ok_and(|own| own.ino() == there.ino())) {
                continue;
            }
            let own = Holder::new();
            if !by_system
                && let Some(holder) = Holder::read(&mut file)
                && holder.lives(&own.place, file.metadata()?.modified()?.elapsed().unwrap_or_default())
            {
                return refuse(run, Some(holder));
            }
            own.write(&mut file).with_context(cannot)?;
            let renewal = if by_system { None } else { Some(hold_by_file(run, &own, &mut file)?) };
            return Ok(RunLock { run: run.to_path_buf(), file, made_folder, renewal });
        }
    }
}

fn refuse<T>(run: &Path, holder: Option<Holder>) -> Result<T> {
    // one that has just begun has not written its name yet
    let holder = holder.map_or("another process".to_string(), |holder| holder.to_string());
    bail!("{} is being written by {holder}: wait for its end, or give another folder", run.display())
}

/// Without locks of the system: of two that come at once the last one's name stands in the file, and is renewed.
fn hold_by_file(run: &Path, own: &Holder, file: &mut File) -> Result<(Sender<()>, JoinHandle<()>)> {
    std::thread::sleep(Duration::from_secs(1));
    match Holder::read(file) {
        Some(holder) if holder == *own => {}
        other => return refuse(run, other),
    }
    let file = file.try_clone()?;
    let (end, ended) = channel();
    let renew = move || {
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(RENEWED_EVERY) {
            let _ = file.set_modified(SystemTime::now());
        }
    };
    Ok((end, std::thread::Builder::new().name("run lock".into()).spawn(renew)?))
}

impl Drop for RunLock {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.renewal.take() {
            drop(end);
            let _ = thread.join();
        }
        // still held, so that nobody else's file is deleted
        let _ = fs::remove_file(self.run.join(LOCK_FILE));
        if self.made_folder {
            // only where nothing came to lie in it
            let _ = fs::remove_dir(&self.run);
        }
        let _ = self.file.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_held_by_one_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("deep/run");
        let lock = RunLock::take(&run).unwrap();
        let error = RunLock::take(&run).unwrap_err().to_string();
        let who = format!("is being written by process {} on ", std::process::id());
        assert!(error.contains(&who) && error.contains("deep/run"), "{error}");
        drop(lock);
        assert!(!run.exists(), "a folder of which nothing came is left behind");
        let lock = RunLock::take(&run).unwrap();
        fs::write(run.join("kept"), "").unwrap();
        drop(lock);
        assert_eq!(fs::read_dir(&run).unwrap().count(), 1);
        // what a process that was killed has left
        fs::write(run.join(LOCK_FILE), r#"{"host": "elsewhere", "pid": 1, "started": 5, "since": 7}"#).unwrap();
        RunLock::take(&run).unwrap();
    }

    #[test]
    fn without_locks_of_the_system_host_process_and_time_decide() {
        let own = Holder::new();
        let (old, new) = (2 * STALE_AFTER, Duration::ZERO);
        assert!(own.lives(&own.place, old), "this process lives");
        let reused = Holder { started: own.started + 1, ..own.clone() };
        assert!(!reused.lives(&own.place, new), "a later process of the same number is another one");
        assert!(!Holder { pid: u32::MAX, ..own.clone() }.lives(&own.place, new));
        // another machine may have the same name
        let namesake = Holder { place: "elsewhere".into(), pid: u32::MAX, ..own.clone() };
        assert!(namesake.lives(&own.place, new), "its processes are not those of this machine");
        let far = Holder { host: "elsewhere".into(), ..namesake };
        assert!(far.lives(&own.place, new) && !far.lives(&own.place, old));
        // and the file is what says so
        let folder = tempfile::tempdir().unwrap();
        let mut file = File::create_new(folder.path().join(LOCK_FILE)).unwrap();
        own.write(&mut file).unwrap();
        let mut file = OpenOptions::new().read(true).write(true).open(folder.path().join(LOCK_FILE)).unwrap();
        assert_eq!(Holder::read(&mut file), Some(own.clone()));
        let (end, thread) = hold_by_file(folder.path(), &own, &mut file).unwrap();
        drop(end);
        thread.join().unwrap();
        far.write(&mut file).unwrap();
        let error = hold_by_file(folder.path(), &own, &mut file).unwrap_err().to_string();
        assert!(error.contains("on elsewhere"), "{error}");
    }
}
