//! Files and folders of data sets: the folders under a folder, each once, whatever links lie in them; and what is said where
//! something else was found than was looked for.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, ensure};
use tracing::warn;

/// Calls `visit` with each folder at and under `root` and the files directly in it. Hidden names are passed over. A
/// link to a folder is followed, but no folder is visited twice: one that lies under `root` is visited where it lies.
pub(super) fn walk(root: &Path, visit: &mut impl FnMut(&Path, Vec<PathBuf>)) -> Result<()> {
    let mut known = BTreeSet::new();
    folders_without_links(root, &mut known)?;
    visit_folder(root, false, &mut known, visit)
}

/// The class of a video in a set that keeps one folder for each class: the name of the folder in which it lies. A video
/// directly in `root` has none.
pub(super) fn class_of(root: &Path, video: &Path) -> Option<String> {
    let folder = video.parent().filter(|folder| *folder != root && folder.starts_with(root))?;
    Some(folder.file_name()?.to_string_lossy().into_owned())
}

/// What a folder is, whatever it is called: its file system and its number in it.
fn identity(folder: &Path) -> Result<(u64, u64)> {
    let folder = fs::metadata(folder).with_context(|| format!("cannot read the folder {}", folder.display()))?;
    Ok((folder.dev(), folder.ino()))
}

/// What lies in a folder, but for hidden names.
fn entries(folder: &Path) -> Result<Vec<fs::DirEntry>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut entries = entries.with_context(|| format!("cannot read the folder {}", folder.display()))?;
    entries.retain(|entry| !entry.file_name().as_bytes().starts_with(b"."));
    Ok(entries)
}

fn folders_without_links(folder: &Path, found: &mut BTreeSet<(u64, u64)>) -> Result<()> {
    found.insert(identity(folder)?);
    let inside = entries(folder)?;
    let mut folders = inside.iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.try_for_each(|entry| folders_without_links(&entry.path(), found))
}

fn visit_folder(
    folder: &Path,
    behind_link: bool,
    known: &mut BTreeSet<(u64, u64)>,
    visit: &mut impl FnMut(&Path, Vec<PathBuf>),
) -> Result<()> {
    if behind_link && !known.insert(identity(folder)?) {
        return Ok(());
    }
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in entries(folder)? {
        let path = entry.path();
        if path.is_dir() {
            let linked = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            folders.push((path, behind_link || linked));
        } else {
            files.push(path);
        }
    }
    files.sort();
    folders.sort();
    visit(folder, files);
    folders.iter().try_for_each(|(folder, behind_link)| visit_folder(folder, *behind_link, known, visit))
}

/// Whether a name ends as one of these does, in either case.
pub(super) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| extensions.contains(&extension.as_str()))
}

/// A warning that is given once in a process, since a dataset may be listed several times.
pub(super) fn warn_once(text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
        warn!("{text}");
    }
}

/// There must be some videos; else says what was looked for and what is there.
pub(super) fn ensure_some(videos: usize, root: &Path, wanted: &str, others: usize) -> Result<()> {
    ensure!(videos > 0, "no {wanted} in {} or below it, but {others} other files", root.display());
    Ok(())
}

/// Errors for a folder that is not there.
pub(super) fn ensure_folder(root: &Path, wanted: &str) -> Result<()> {
    ensure!(root.exists(), "there is no folder {}; {wanted} were looked for in it", root.display());
    ensure!(root.is_dir(), "{} is a file; a folder of {wanted} was looked for", root.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link to the own parent is not followed, one to another folder is; two names of a file are two videos.
    #[test]
    fn each_folder_is_visited_once() {
        use std::os::unix::fs::symlink;
        let place = tempfile::tempdir().unwrap();
        let (root, other) = (place.path().join("root"), place.path().join("other"));
        for folder in [root.join("a"), root.join("c"), other.join("deep")] {
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("x.mp4"), b"").unwrap();
        }
        let listed = || {
            let mut found = Vec::new();
            walk(&root, &mut |_, files| found.extend(files)).unwrap();
            found.iter().map(|file| file.strip_prefix(&root).unwrap().display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(listed(), ["a/x.mp4", "c/x.mp4"]);
        for (to, name) in
            [(".", "again"), ("..", "up"), ("../..", "a/twice"), ("../c", "a/before"), ("a/x.mp4", "y.mp4")]
        {
            symlink(to, root.join(name)).unwrap();
        }
        // `up` holds the other folder, and `root` once more
        assert_eq!(listed(), ["y.mp4", "a/x.mp4", "a/twice/other/deep/x.mp4", "c/x.mp4"]);
        fs::remove_file(root.join("up")).unwrap();
        fs::remove_file(root.join("a/twice")).unwrap();
        for name in ["b", "d"] {
            symlink(&other, root.join(name)).unwrap();
        }
        symlink(other.join("deep"), root.join("e")).unwrap();
        assert_eq!(listed(), ["y.mp4", "a/x.mp4", "b/deep/x.mp4", "c/x.mp4"]);
    }
}
