//! A folder of video files.

use std::path::PathBuf;

use anyhow::Result;

use super::dataset::{Listing, Source, VideoDataset, VideoEntry, ensure_folder, has_extension, some, walk, warn_once};

/// Endings of video files that FFmpeg reads, the usual ones first.
pub(super) const EXTENSIONS: [&str; 33] = [
    "mp4", "avi", "webm", "mkv", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "gif", "ts", "mts", "m2ts", "3gp", "3g2",
    "ogv", "qt", "asf", "f4v", "vob", "m1v", "m2v", "mxf", "dv", "divx", "rm", "rmvb", "y4m", "h264", "hevc", "ivf",
    "apng",
];

/// The ending of pictures that may move, of which FFmpeg shows no more than one.
const UNREAD: &str = "webp";

/// Every video file under `root`, at any depth, sorted by path.
pub struct Folder {
    /// Searched at any depth.
    pub root: PathBuf,
}

impl VideoDataset for Folder {
    fn videos(&self) -> Result<Listing> {
        let (listing, unread) = self.listing_and_unread()?;
        if let Some(first) = unread.first() {
            warn_once(format!(
                "{} {UNREAD} files below {} are passed over, since FFmpeg shows no moving pictures of that format; the first: {}",
                unread.len(),
                self.root.display(),
                first.display()
            ));
        }
        Ok(listing)
    }
}

impl Folder {
    /// The videos, and files that may be videos and cannot be read.
    pub(super) fn listing_and_unread(&self) -> Result<(Listing, Vec<PathBuf>)> {
        let wanted = format!("video files ({})", EXTENSIONS.join(", "));
        ensure_folder(&self.root, &wanted)?;
        let (mut videos, mut unread, mut others) = (Vec::new(), Vec::new(), 0);
        walk(&self.root, &mut |_, files| {
            for file in files {
                if has_extension(&file, &EXTENSIONS) {
                    videos.push(VideoEntry {
                        name: file.display().to_string(),
                        source: Source::File(file),
                        caption: None,
                    });
                } else {
                    others += 1;
                    unread.extend(Some(file).filter(|file| has_extension(file, &[UNREAD])));
                }
            }
        })?;
        Ok((some(videos, &self.root, &wanted, others)?, unread))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_of_all_depths_in_order() {
        let root = tempfile::tempdir().unwrap().keep();
        fs::create_dir_all(root.join("b/c")).unwrap();
        let folder = Folder { root: root.clone() };
        let error = folder.videos().unwrap_err().to_string();
        assert!(error.contains("mp4") && error.contains("0 other files"), "{error}");
        for name in ["z.MP4", "b/c/y.avi", "b/x.webm", "note.txt", ".hidden.mp4"] {
            fs::write(root.join(name), []).unwrap();
        }
        let names: Vec<String> = folder.videos().unwrap().videos.into_iter().map(|video| video.name).collect();
        assert_eq!(names, ["z.MP4", "b/x.webm", "b/c/y.avi"].map(|name| root.join(name).display().to_string()));
        fs::write(root.join("moving.webp"), []).unwrap();
        let (listing, unread) = folder.listing_and_unread().unwrap();
        assert_eq!((listing.videos.len(), unread), (3, vec![root.join("moving.webp")]));
        fs::remove_dir_all(&root).unwrap();
        assert!(folder.videos().unwrap_err().to_string().contains("there is no folder"));
    }
}
