//! Files that are either there and whole, or not there: written beside their place, then renamed.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context, Result};

/// Writes `path` by way of a temporary file in the same folder: a reader, or a run that was killed,
/// finds the old file or the new one and nothing in between. Missing folders are made.
///
/// # Errors
/// Those of `fill`; a folder that cannot be written, a full disk: what was there before stays.
pub fn write_atomically(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let temporary = temporary_path(path)?;
    let written = (|| {
        let file = File::create(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        fill(&mut writer)?;
        writer.flush()?;
        drop(writer);
        publish(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {} (what was there before is untouched)", path.display()))
}

/// A name in the folder of `path` that no one else uses; the folder is made if it is not there.
///
/// # Errors
/// A folder that cannot be made; a path without a file name.
pub fn temporary_path(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let folder = folder_of(path);
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let name = path.file_name().with_context(|| format!("{} does not name a file", path.display()))?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{}.partial", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    Ok(folder.join(temporary))
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
}
