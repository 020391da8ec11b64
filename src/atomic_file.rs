//! Files that are either there and whole, or not there: written beside their place, then renamed.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result};
use rustix::{
    io::Errno,
    process::{Pid, test_kill_process},
};

/// Writes `path` by way of a temporary file in the same folder: a reader, or a run that was killed,
/// finds the old file or the new one and nothing in between. Missing folders are made.
///
/// # Errors
/// Those of `fill`; a folder that cannot be written, a full disk: what was there before stays.
pub fn write_atomically(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let (pending, mut file) = PendingFile::create(path)?;
    let written = fill(&mut file).and_then(|()| Ok(file.flush()?));
    drop(file);
    let written = written.and_then(|()| pending.publish());
    written.with_context(|| format!("cannot write {} (what was there before is untouched)", path.display()))
}

/// Makes the folder `path` by way of a temporary one beside it, into which `fill` writes: a reader, or a process that was
/// killed, finds it whole or not at all. An empty folder of this name gives way.
///
/// # Errors
/// Those of `fill`; a folder that cannot be made, or that is there and holds something. Then nothing is left.
pub fn write_folder_atomically<T>(path: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let temporary = temporary_path(path)?;
    fs::create_dir(&temporary).with_context(|| format!("cannot make the folder {}", temporary.display()))?;
    let written = fill(&temporary).and_then(|made| {
        fs::rename(&temporary, path)?;
        File::open(folder_of(path))?.sync_all().context("the folder did not reach the disk")?;
        Ok(made)
    });
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// A file that is written piece by piece, as [`write_atomically`] writes one at once: dropped before it is published,
/// it was never there.
#[derive(Debug)]
pub struct PendingFile {
    path: PathBuf,
    temporary: PathBuf,
    is_published: bool,
}

impl PendingFile {
    /// What will be `path`, and where to write it. Missing folders are made.
    ///
    /// # Errors
    /// A folder that cannot be written; a path without a file name.
    pub fn create(path: &Path) -> Result<(Self, BufWriter<File>)> {
        let pending = PendingFile { path: path.to_path_buf(), temporary: temporary_path(path)?, is_published: false };
        let file = File::create(&pending.temporary);
        let file = file.with_context(|| format!("cannot create {}", pending.temporary.display()))?;
        Ok((pending, BufWriter::with_capacity(1 << 20, file)))
    }

    /// Gives what was written, and flushed, its name.
    ///
    /// # Errors
    /// As [`publish`].
    pub fn publish(mut self) -> Result<()> {
        publish(&self.temporary, &self.path)?;
        self.is_published = true;
        Ok(())
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.is_published {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// A name in the folder of `path` that no one else uses; the folder is made if it is not there, and what dead processes
/// left half written in it is deleted.
///
/// # Errors
/// A folder that cannot be made; a path without a file name.
pub fn temporary_path(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let folder = folder_of(path);
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let name = path.file_name().with_context(|| format!("{} does not name a file", path.display()))?;
    sweep(folder);
    let mut temporary = OsString::from(".");
    temporary.push(name);
    let (place, id) = (place(), process::id());
    temporary.push(format!(".{place}-{id}-{}.{ENDING}", COUNT.fetch_add(1, Ordering::Relaxed)));
    Ok(folder.join(temporary))
}

/// Of names of files that are not whole yet.
const ENDING: &str = "partial";

/// Where the numbers of processes mean what they mean here: the machine and, of containers on one machine, the
/// container.
pub fn place() -> String {
    let text = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let processes = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    place_of(&text("/etc/machine-id"), &text("/proc/sys/kernel/hostname"), &processes)
}

/// Machines that share a disk may have one name, and containers of one machine one name and one identity.
fn place_of(machine: &str, host: &str, processes: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    (machine, host, processes).hash(&mut hasher);
    format!("{:08x}", hasher.finish() as u32)
}

/// Whether there is no process of this number here. The kernel is asked, since `/proc` may hide those of other people.
pub fn is_dead(process: Pid) -> bool {
    test_kill_process(process) == Err(Errno::SRCH)
}

/// The folders in which this process has made temporary files.
static FOLDERS: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn folders() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Deletes what processes of this machine that are no more have left half written in a folder, once for each folder: a
/// process that is killed cannot do it itself.
fn sweep(folder: &Path) {
    if folders().insert(folder.to_path_buf()) {
        delete_temporary(folder, is_dead);
    }
}

/// Deletes what this process has half written, before a signal ends it.
pub fn delete_unfinished() {
    let own = Pid::from_raw(process::id() as i32);
    folders().iter().for_each(|folder| delete_temporary(folder, |writer| Some(writer) == own));
}

/// Deletes the temporary files and folders in a folder whose writer is such a process.
fn delete_temporary(folder: &Path, of: impl Fn(Pid) -> bool) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if writer(&entry.file_name().to_string_lossy()).is_some_and(&of) {
            // a file, or a folder with all that is in it
            let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
        }
    }
}

/// The process of this machine that writes a file of this name, if it is a temporary one.
fn writer(name: &str) -> Option<Pid> {
    let (_, of) = name.strip_prefix('.')?.strip_suffix(ENDING)?.strip_suffix('.')?.rsplit_once('.')?;
    let (pid, count) = of.strip_prefix(&place())?.strip_prefix('-')?.split_once('-')?;
    count.parse::<u64>().ok()?;
    Pid::from_raw(pid.parse().ok().filter(|pid| *pid > 0)?)
}

/// Brings the finished `temporary` to the disk and gives it its name, `path`, in the same folder.
///
/// # Errors
/// A full disk; a name that cannot be given.
pub fn publish(temporary: &Path, path: &Path) -> Result<()> {
    File::open(temporary)?.sync_all().context("the file did not reach the disk")?;
    fs::rename(temporary, path)?;
    // The new name is itself data of the folder.
    File::open(folder_of(path))?.sync_all().context("the folder did not reach the disk")
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/file");
        write_atomically(&path, |file| Ok(file.write_all(b"old")?)).unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(b"half")?;
            bail!("no more")
        });
        assert!(format!("{:#}", error.unwrap_err()).contains("no more"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn machines_of_one_name_are_told_apart() {
        let processes = Path::new("pid:[4026531836]");
        let here = place_of("1c4e", "node", processes);
        assert_eq!(here, place_of("1c4e", "node", processes));
        assert_ne!(here, place_of("77ab", "node", processes));
        assert_ne!(here, place_of("1c4e", "node", Path::new("pid:[4026532999]")));
        // of everybody, and of this process itself
        assert!(!is_dead(Pid::INIT) && !is_dead(rustix::process::getpid()));
    }

    #[test]
    fn a_folder_is_whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/folder");
        let error = write_folder_atomically(&path, |at| {
            fs::write(at.join("half"), "half")?;
            bail!("no more") as Result<()>
        });
        assert!(format!("{:#}", error.unwrap_err()).contains("no more"));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
        // what a process that was killed left of one goes with the next
        let mut ended = process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let left = folder.path().join(format!(".export.{}-{}-0.partial", place(), ended.id()));
        fs::create_dir_all(left.join("unet")).unwrap();
        fs::write(left.join("unet/config.json"), "{").unwrap();
        let path = folder.path().join("export");
        fs::create_dir(&path).unwrap();
        write_folder_atomically(&path, |at| Ok(fs::write(at.join("whole"), "whole")?)).unwrap();
        assert_eq!(fs::read(path.join("whole")).unwrap(), b"whole");
        assert!(!left.exists());
        // what is in a folder stays
        assert!(write_folder_atomically(&path, |at| Ok(fs::write(at.join("other"), "")?)).is_err());
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    }

    #[test]
    fn what_a_process_that_was_killed_left_half_written_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut ended = process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let (place, dead, living) = (place(), ended.id(), process::id());
        let swept = at(&format!(".x.npz.{place}-{dead}-0.partial"));
        let kept = [
            at(&format!(".x.npz.{place}-{living}-7.partial")),
            at(&format!(".x.npz.other-{dead}-0.partial")),
            at(&format!("x.npz.{place}-{dead}-0.partial")),
            at(&format!(".x.npz.{place}-{dead}-a.partial")),
            at(".partial"),
            at("x.npz"),
        ];
        kept.iter().chain([&swept]).for_each(|path| fs::write(path, "half").unwrap());
        write_atomically(&at("y"), |file| Ok(file.write_all(b"whole")?)).unwrap();
        assert!(!swept.exists());
        kept.iter().for_each(|path| assert!(path.exists(), "{} is gone", path.display()));
    }
}
