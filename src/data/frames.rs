//! A tree of folders of pictures.

use std::path::PathBuf;

use anyhow::Result;

use super::{
    dataset::{Listing, Source, VideoDataset, VideoEntry, ensure_folder, ensure_some, has_extension, warn_once},
    folder,
    frame_folder::{EXTENSIONS, Pictures},
    walk::walk,
};

/// Every folder at or under `root` that directly holds pictures is one video, at any depth. Pictures that lie in `root`
/// itself beside such folders, or beside video files, belong to none.
pub struct Frames {
    /// Searched at any depth.
    pub root: PathBuf,
}

impl VideoDataset for Frames {
    fn videos(&self) -> Result<Listing> {
        let (listing, strays) = self.listing_and_strays()?;
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
        Ok(listing)
    }
}

impl Frames {
    /// The videos, and the pictures beside their frames that are none.
    pub(super) fn listing_and_strays(&self) -> Result<(Listing, Vec<PathBuf>)> {
        let wanted = format!("folders of pictures ({})", EXTENSIONS.join(", "));
        ensure_folder(&self.root, &wanted)?;
        let (mut videos, mut strays, mut others, mut video_files) = (Vec::new(), Vec::new(), 0, 0);
        walk(&self.root, &mut |folder, mut files| {
            let count = files.len();
            video_files += files.iter().filter(|file| has_extension(file, &folder::EXTENSIONS)).count();
            files.retain(|file| has_extension(file, &EXTENSIONS));
            others += count - files.len();
            if !files.is_empty() {
                let pictures = Pictures::of(files);
                strays.extend(pictures.strays);
                videos.push(VideoEntry {
                    name: folder.display().to_string(),
                    source: Source::Frames(pictures.frames),
                    caption: None,
                });
            }
        })?;
        let of_root = |video: &VideoEntry| matches!(&video.source, Source::Frames(files) if files[0].parent() == Some(&self.root));
        if videos.first().is_some_and(of_root) && videos.len() + video_files > 1 {
            videos.remove(0);
            strays.retain(|stray| stray.parent() != Some(&self.root));
        }
        ensure_some(videos.len(), &self.root, &wanted, others)?;
        Ok((videos.into(), strays))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_folder_with_pictures_is_a_video() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let frames = Frames { root: root.to_path_buf() };
        assert!(frames.videos().unwrap_err().to_string().contains("jpg"));
        for name in ["v1/c1/10.jpg", "v1/c1/9.jpg", "v1/c2/0.png", "v2/0.jpeg", "v3/note.txt"] {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), []).unwrap();
        }
        let videos = frames.videos().unwrap().videos;
        let names: Vec<String> = videos.iter().map(|video| video.name.clone()).collect();
        assert_eq!(names, ["v1/c1", "v1/c2", "v2"].map(|name| root.join(name).display().to_string()));
        let Source::Frames(pictures) = &videos[0].source else { panic!() };
        assert_eq!(pictures[..], ["v1/c1/9.jpg", "v1/c1/10.jpg"].map(|name| root.join(name)));
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
            let videos = Frames { root: root.to_path_buf() }.videos();
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
