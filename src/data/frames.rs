//! A tree of folders of pictures.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{
    clip::ClipSpec,
    folder,
    frame_folder::{EXTENSIONS, PictureList, Pictures},
    video::{Listing, VideoDataset, VideoEntry},
    walk::{class_of, ensure_folder, ensure_some, has_extension, walk, warn_once},
};

/// Every folder at or under `root` that directly holds pictures is one video, at any depth. Pictures that lie in `root`
/// itself beside such folders, or beside video files, belong to none. The class of a video is the name of the folder below
/// `root` in which its folder lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FrameFolders {
    /// Searched at any depth.
    pub root: PathBuf,
}

impl VideoDataset for FrameFolders {
    fn videos(&self, _: &ClipSpec) -> Result<Listing> {
        let Found { videos, strays, .. } = self.found()?;
        if let Some(first) = strays.first() {
            let beside: Vec<PathBuf> =
                strays.iter().filter(|stray| stray.parent() == first.parent()).cloned().collect();
            warn_once(format!(
                "{} pictures below {} are not taken for frames, since their names follow another pattern than most beside \
                 them; the first, in {}: {}",
                strays.len(),
                self.root.display(),
                first.parent().unwrap_or(&self.root).display(),
                Pictures::strays_line(&beside)
            ));
        }
        Ok(videos.into())
    }

    fn path(&self) -> &Path {
        &self.root
    }

    fn root(&self) -> Option<&Path> {
        Some(&self.root)
    }
}

/// What lies below a folder of folders of pictures.
pub(super) struct Found {
    /// At least one.
    pub videos: Vec<VideoEntry>,
    /// Of how many pictures the videos are made.
    pub pictures: usize,
    /// Pictures beside the frames that are none.
    strays: Vec<PathBuf>,
}

impl FrameFolders {
    pub(super) fn found(&self) -> Result<Found> {
        let wanted = format!("folders of pictures ({})", EXTENSIONS.join(", "));
        ensure_folder(&self.root, &wanted)?;
        let (mut folders, mut strays, mut others, mut video_files) = (Vec::new(), Vec::new(), 0, 0);
        walk(&self.root, &mut |folder, mut files| {
            let count = files.len();
            video_files += files.iter().filter(|file| has_extension(file, &folder::EXTENSIONS)).count();
            files.retain(|file| has_extension(file, &EXTENSIONS));
            others += count - files.len();
            if !files.is_empty() {
                let pictures = Pictures::of(files);
                strays.extend(pictures.strays);
                folders.push((folder.to_path_buf(), pictures.frames));
            }
        })?;
        let is_root = |(folder, _): &(PathBuf, Vec<PathBuf>)| *folder == self.root;
        if folders.first().is_some_and(is_root) && folders.len() + video_files > 1 {
            folders.remove(0);
            strays.retain(|stray| stray.parent() != Some(&self.root));
        }
        ensure_some(folders.len(), &self.root, &wanted, others)?;
        let pictures = folders.iter().map(|(_, frames)| frames.len()).sum();
        let entry = |(folder, frames): (PathBuf, Vec<PathBuf>)| VideoEntry {
            class: class_of(&self.root, &folder),
            ..VideoEntry::new(folder.display().to_string(), PictureList::new(frames))
        };
        Ok(Found { videos: folders.into_iter().map(entry).collect(), pictures, strays })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::clip::SHORT, *};

    #[test]
    fn each_folder_with_pictures_is_a_video() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let frames = FrameFolders { root: root.to_path_buf() };
        assert!(frames.videos(&SHORT).unwrap_err().to_string().contains("jpg"));
        for name in ["v1/c1/10.jpg", "v1/c1/9.jpg", "v1/c2/0.png", "v2/0.jpeg", "v3/note.txt"] {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), []).unwrap();
        }
        let videos = frames.videos(&SHORT).unwrap().videos;
        let names: Vec<String> = videos.iter().map(|video| video.name.clone()).collect();
        assert_eq!(names, ["v1/c1", "v1/c2", "v2"].map(|name| root.join(name).display().to_string()));
        let wanted = PictureList::new(["v1/c1/9.jpg", "v1/c1/10.jpg"].map(|name| root.join(name)).to_vec());
        assert_eq!(format!("{:?}", videos[0].source), format!("{wanted:?}"));
    }

    /// A contact sheet, or whatever lies beside the videos, is none; pictures alone are.
    #[test]
    fn pictures_beside_folders_of_pictures_are_no_video() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let put = |name: &str| {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), []).unwrap();
        };
        let names = || {
            let videos = FrameFolders { root: root.to_path_buf() }.videos(&SHORT);
            videos.map_or(Vec::new(), |found| found.videos.into_iter().map(|video| video.name).collect())
        };
        put("index.png");
        assert_eq!(names(), [root.display().to_string()]);
        put("v1/0.png");
        assert_eq!(names(), [root.join("v1").display().to_string()]);
        fs::remove_file(root.join("v1/0.png")).unwrap();
        put("v1/a.mp4");
        assert!(names().is_empty());
    }
}
