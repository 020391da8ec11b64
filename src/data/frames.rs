//! A tree of folders of pictures.

use std::path::PathBuf;

use anyhow::Result;

use super::{
    dataset::{Listing, Source, VideoDataset, VideoEntry, ensure_folder, has_extension, some, walk},
    frame_folder::{EXTENSIONS, natural_order},
};

/// Every folder at or under `root` that directly holds pictures is one video, at any depth.
pub struct Frames {
    /// Searched at any depth.
    pub root: PathBuf,
}

impl VideoDataset for Frames {
    fn videos(&self) -> Result<Listing> {
        let wanted = format!("folders of pictures ({})", EXTENSIONS.join(", "));
        ensure_folder(&self.root, &wanted)?;
        let (mut videos, mut others) = (Vec::new(), 0);
        walk(&self.root, &mut |folder, mut files| {
            let count = files.len();
            files.retain(|file| has_extension(file, &EXTENSIONS));
            others += count - files.len();
            if !files.is_empty() {
                files.sort_by(|a, b| natural_order(a, b));
                videos.push(VideoEntry {
                    name: folder.display().to_string(),
                    source: Source::Frames(files),
                    caption: None,
                });
            }
        })?;
        some(videos, &self.root, &wanted, others)
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
}
