//! A folder of video files.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{
    clip::ClipSpec,
    video::{Listing, VideoDataset, VideoEntry},
    video_path::VideoFile,
    walk::{class_of, ensure_folder, ensure_some, has_extension, walk, warn_once},
};

/// Endings of video files that FFmpeg reads, the usual ones first.
pub(super) const EXTENSIONS: [&str; 33] = [
    "mp4", "avi", "webm", "mkv", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "mts", "m2ts", "3gp", "3g2", "ogv",
    "qt", "asf", "f4v", "vob", "m1v", "m2v", "mxf", "dv", "divx", "rm", "rmvb", "y4m", "h264", "hevc", "ivf", "gif",
    "apng",
];

/// Those of pictures that move: videos of a data set that has no others, and beside others their previews.
const MOVING_PICTURES: [&str; 2] = ["gif", "apng"];

/// The ending of pictures that may move, of which FFmpeg shows no more than one.
const UNREAD: &str = "webp";

/// Takes the previews out of the videos of a data set: pictures that move, where there are other videos too.
pub(super) fn take_previews(videos: &mut Vec<PathBuf>) -> Vec<PathBuf> {
    let (mut moving, others): (Vec<_>, Vec<_>) =
        std::mem::take(videos).into_iter().partition(|video| has_extension(video, &MOVING_PICTURES));
    *videos = if others.is_empty() { std::mem::take(&mut moving) } else { others };
    moving
}

/// Says that [`take_previews`] took some.
pub(super) fn warn_of_previews(previews: &[PathBuf], root: &Path) {
    if let Some(first) = previews.first() {
        warn_once(format!(
            "{} files ending in {} below {} are passed over, since they are taken for previews of the other videos there; \
             the first: {}",
            previews.len(),
            MOVING_PICTURES.join(" or "),
            root.display(),
            first.display()
        ));
    }
}

/// Every video file under `root`, at any depth, sorted by path. Pictures that move count where there is no other video.
/// The class of a video is the name of the folder below `root` in which it lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Folder {
    /// Searched at any depth.
    pub root: PathBuf,
}

impl VideoDataset for Folder {
    fn videos(&self, _: &ClipSpec) -> Result<Listing> {
        let entry = |file: PathBuf| VideoEntry {
            class: class_of(&self.root, &file),
            ..VideoEntry::new(file.display().to_string(), VideoFile::new(file))
        };
        Ok(self.files()?.into_iter().map(entry).collect::<Vec<_>>().into())
    }

    fn path(&self) -> &Path {
        &self.root
    }

    fn root(&self) -> Option<&Path> {
        Some(&self.root)
    }
}

impl Folder {
    /// The video files; a warning says what lies beside them and is none.
    pub(super) fn files(&self) -> Result<Vec<PathBuf>> {
        let Found { videos, unread, previews } = self.found()?;
        warn_of_previews(&previews, &self.root);
        if let Some(first) = unread.first() {
            warn_once(format!(
                "{} {UNREAD} files below {} are passed over, since FFmpeg shows no moving pictures of that format; the first: {}",
                unread.len(),
                self.root.display(),
                first.display()
            ));
        }
        Ok(videos)
    }
}

/// What lies below a folder of videos.
pub(super) struct Found {
    /// At least one.
    pub videos: Vec<PathBuf>,
    /// May be videos, and cannot be read.
    pub unread: Vec<PathBuf>,
    /// Show the videos to people.
    pub previews: Vec<PathBuf>,
}

impl Found {
    /// Whether all videos are pictures that move.
    pub fn is_of_pictures(&self) -> bool {
        self.videos.iter().all(|video| has_extension(video, &MOVING_PICTURES))
    }
}

impl Folder {
    pub(super) fn found(&self) -> Result<Found> {
        let wanted = format!("video files ({})", EXTENSIONS.join(", "));
        ensure_folder(&self.root, &wanted)?;
        let (mut videos, mut unread, mut others) = (Vec::new(), Vec::new(), 0);
        walk(&self.root, &mut |_, files| {
            for file in files {
                if has_extension(&file, &EXTENSIONS) {
                    videos.push(file);
                } else {
                    others += 1;
                    unread.extend(Some(file).filter(|file| has_extension(file, &[UNREAD])));
                }
            }
        })?;
        ensure_some(videos.len(), &self.root, &wanted, others)?;
        let previews = take_previews(&mut videos);
        Ok(Found { videos, unread, previews })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::clip::SHORT, *};

    #[test]
    fn files_of_all_depths_in_order() {
        let root = tempfile::tempdir().unwrap().keep();
        fs::create_dir_all(root.join("b/c")).unwrap();
        let folder = Folder { root: root.clone() };
        let error = folder.videos(&SHORT).unwrap_err().to_string();
        assert!(error.contains("mp4") && error.contains("0 other files"), "{error}");
        for name in ["z.MP4", "b/c/y.avi", "b/x.webm", "note.txt", ".hidden.mp4"] {
            fs::write(root.join(name), []).unwrap();
        }
        let names: Vec<String> = folder.videos(&SHORT).unwrap().videos.into_iter().map(|video| video.name).collect();
        assert_eq!(names, ["z.MP4", "b/x.webm", "b/c/y.avi"].map(|name| root.join(name).display().to_string()));
        fs::write(root.join("moving.webp"), []).unwrap();
        let found = folder.found().unwrap();
        assert_eq!((found.videos.len(), found.unread), (3, vec![root.join("moving.webp")]));
        fs::remove_dir_all(&root).unwrap();
        assert!(folder.videos(&SHORT).unwrap_err().to_string().contains("there is no folder"));
    }

    #[test]
    fn pictures_that_move_are_videos_only_where_no_others_are() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path();
        for name in ["samples.gif", "a/x.GIF", "a/y.apng"] {
            fs::create_dir_all(root.join("a")).unwrap();
            fs::write(root.join(name), []).unwrap();
        }
        let folder = Folder { root: root.to_path_buf() };
        let found = folder.found().unwrap();
        assert!(found.videos.len() == 3 && found.previews.is_empty() && found.is_of_pictures());
        fs::create_dir(root.join("samples")).unwrap();
        fs::write(root.join("samples/00000.mp4"), []).unwrap();
        let found = folder.found().unwrap();
        assert_eq!(found.previews, ["samples.gif", "a/x.GIF", "a/y.apng"].map(|name| root.join(name)));
        assert!(!found.is_of_pictures());
        let names: Vec<String> = folder.videos(&SHORT).unwrap().videos.into_iter().map(|video| video.name).collect();
        assert_eq!(names, [root.join("samples/00000.mp4").display().to_string()]);
    }
}
