//! Videos with captions: a table and a folder, or a text beside each video.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, ensure};

use super::{
    dataset::{Listing, Source, VideoDataset, VideoEntry, ensure_folder},
    folder::{EXTENSIONS, Folder},
};

/// A table like WebVid's (`videoid,name,page_dir,contentUrl`; other columns are not read) and a folder of videos.
pub struct Webvid {
    /// The CSV file.
    pub table: PathBuf,
    /// The folder of its videos.
    pub root: PathBuf,
}

/// Where the columns stand that are read.
struct Columns {
    id: usize,
    caption: usize,
    folder: Option<usize>,
}

impl Webvid {
    /// Whether the table has its columns.
    ///
    /// # Errors
    /// A table that cannot be read; the columns it lacks.
    pub fn check(&self) -> Result<()> {
        self.open().map(|_| ())
    }

    fn open(&self) -> Result<(csv::Reader<File>, Columns)> {
        let name = self.table.display();
        let file = File::open(&self.table).with_context(|| format!("cannot open the table {name}"))?;
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(file);
        let header = reader.headers().with_context(|| format!("{name} is not a table of comma-separated values"))?;
        let heads: Vec<&str> = header.iter().map(|head| head.trim_start_matches('\u{feff}').trim()).collect();
        let find = |wanted: &str| heads.iter().position(|head| *head == wanted);
        let lacking: Vec<&str> = ["videoid", "name"].into_iter().filter(|wanted| find(wanted).is_none()).collect();
        let columns = match (find("videoid"), find("name")) {
            (Some(id), Some(caption)) => Columns { id, caption, folder: find("page_dir") },
            _ => anyhow::bail!(
                "{name} lacks the column{} `{}`: a table of captioned videos has `videoid`, `name` (the caption) and \
                 perhaps `page_dir`; this one has `{}`",
                if lacking.len() == 1 { "" } else { "s" },
                lacking.join("`, `"),
                heads.join("`, `")
            ),
        };
        Ok((reader, columns))
    }

    /// `root/page_dir/videoid.mp4`, without the folder where there is none, or with another ending.
    fn video(&self, folder: &str, id: &str) -> Option<PathBuf> {
        let inside = |part: &str| !part.is_empty() && !part.starts_with('/') && !part.split('/').any(|p| p == "..");
        if !inside(id) {
            return None;
        }
        let folders = [Some(self.root.join(folder)).filter(|_| inside(folder)), Some(self.root.clone())];
        let files = |folder: PathBuf| EXTENSIONS.iter().map(move |ending| folder.join(format!("{id}.{ending}")));
        folders.into_iter().flatten().flat_map(files).find(|path| path.is_file())
    }
}

impl VideoDataset for Webvid {
    /// In the table's order.
    fn videos(&self) -> Result<Listing> {
        ensure_folder(&self.root, "the table's videos")?;
        let (mut reader, columns) = self.open()?;
        let mut videos = Vec::new();
        let (mut absent, mut silent) = (LeftOut::default(), LeftOut::default());
        for (i, row) in reader.records().enumerate() {
            let row = row.with_context(|| format!("{}: row {}", self.table.display(), i + 1))?;
            let cell = |column: usize| row.get(column).unwrap_or_default().trim();
            let (id, caption) = (cell(columns.id), cell(columns.caption));
            let folder = columns.folder.map_or("", cell);
            match self.video(folder, id) {
                _ if caption.is_empty() => silent.add(id),
                None => absent.add(id),
                Some(path) => videos.push(captioned(path, caption)),
            }
        }
        listing(videos, &absent, &silent, &self.table)
    }
}

/// Every video file under `root`, at any depth, with its caption in a text file of the same name.
pub struct Captioned {
    /// The folder of videos and texts.
    pub root: PathBuf,
}

impl VideoDataset for Captioned {
    fn videos(&self) -> Result<Listing> {
        let mut videos = Vec::new();
        let mut silent = LeftOut::default();
        for entry in (Folder { root: self.root.clone() }).videos()?.videos {
            let Source::File(path) = entry.source else { unreachable!("a folder lists files") };
            // what is no text is no caption
            let caption = fs::read_to_string(path.with_extension("txt")).unwrap_or_default();
            match caption.trim() {
                "" => silent.add(&entry.name),
                caption => videos.push(captioned(path, caption)),
            }
        }
        listing(videos, &LeftOut::default(), &silent, &self.root)
    }
}

fn captioned(path: PathBuf, caption: &str) -> VideoEntry {
    VideoEntry { name: path.display().to_string(), source: Source::File(path), caption: Some(caption.to_string()) }
}

/// Videos that are passed over: how many, and the first.
#[derive(Default)]
struct LeftOut {
    count: usize,
    first: String,
}

impl LeftOut {
    fn add(&mut self, name: &str) {
        if self.count == 0 {
            self.first = name.to_string();
        }
        self.count += 1;
    }
}

fn listing(videos: Vec<VideoEntry>, absent: &LeftOut, silent: &LeftOut, place: &Path) -> Result<Listing> {
    let left_out = absent.count + silent.count;
    let mut said = Vec::new();
    for (group, what) in [(absent, "are not there"), (silent, "have no caption")] {
        if group.count > 0 {
            said.push(format!("{} {what} (the first: {})", group.count, group.first));
        }
    }
    let said = format!("of {} videos in {} {}", videos.len() + left_out, place.display(), said.join(", "));
    ensure!(!videos.is_empty(), "no captioned video: {said}");
    if left_out > 0 {
        warn_once(said);
    }
    Ok(Listing { videos, left_out })
}

/// A command that lists its videos several times says once what it leaves out.
fn warn_once(said: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut before = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !before.contains(&said) {
        tracing::warn!("{said}");
        before.insert(said);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(listing: &Listing) -> Vec<(String, &str)> {
        let file = |v: &VideoEntry| Path::new(&v.name).file_name().unwrap().to_string_lossy().into_owned();
        listing.videos.iter().map(|v| (file(v), v.caption.as_deref().unwrap())).collect()
    }

    #[test]
    fn a_table_finds_its_videos_and_counts_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("videos");
        fs::create_dir_all(root.join("000_050")).unwrap();
        for name in ["000_050/1.mp4", "2.webm", "4.mp4", "5.mp4"] {
            fs::write(root.join(name), []).unwrap();
        }
        fs::write(folder.path().join("secret.mp4"), []).unwrap();
        let table = folder.path().join("table.csv");
        let text = "\u{feff}contentUrl,videoid,page_dir,name\nx,1,000_050,\"A dog, \"\"running\"\"\nfast\"\n,2,gone,Cat\n\
                    ,3,000_050,not there\n,4,000_050,  \n,5\n,../secret,,outside\n";
        fs::write(&table, text).unwrap();
        let listing = Webvid { table: table.clone(), root: root.clone() }.videos().unwrap();
        assert_eq!(names(&listing), [("1.mp4".to_string(), "A dog, \"running\"\nfast"), ("2.webm".to_string(), "Cat")]);
        assert_eq!(listing.left_out, 4);

        fs::write(&table, "videoid,page_dir,contentUrl\n1,a,b\n").unwrap();
        let webvid = Webvid { table: table.clone(), root: root.clone() };
        let error = webvid.check().unwrap_err().to_string();
        assert!(error.contains("lacks the column `name`") && error.contains("`page_dir`, `contentUrl`"), "{error}");
        fs::write(&table, "id,text\n").unwrap();
        assert!(webvid.check().unwrap_err().to_string().contains("`videoid`, `name`"));
        fs::write(&table, "videoid,name\n9,nothing\n").unwrap();
        let error = webvid.videos().unwrap_err().to_string();
        assert!(error.contains("of 1 videos") && error.contains("1 are not there (the first: 9)"), "{error}");
    }

    #[test]
    fn a_text_lies_beside_each_video() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["a.mp4", "b.mp4", "c.avi", "d.mp4"] {
            fs::write(path(name), []).unwrap();
        }
        fs::write(path("a.txt"), "one\n").unwrap();
        fs::write(path("b.txt"), " \n").unwrap();
        fs::write(path("c.txt"), "three words more").unwrap();
        let listing = Captioned { root: folder.path().to_path_buf() }.videos().unwrap();
        assert_eq!(names(&listing), [("a.mp4".to_string(), "one"), ("c.avi".to_string(), "three words more")]);
        assert_eq!(listing.left_out, 2);
        let config = super::super::DatasetConfig::Captioned { root: path("nowhere") };
        assert!(config.check().unwrap_err().to_string().contains("there is no") && config.has_captions());
    }
}
