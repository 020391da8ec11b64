//! Videos with captions: a table and a folder, or a text beside each video.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    clip::ClipSpec,
    folder::{EXTENSIONS, Folder},
    table::{Row, Rows, names},
    video::{Listing, VideoDataset, VideoEntry},
    video_path::VideoFile,
    walk::{class_of, ensure_folder, has_extension, warn_once},
};
use crate::text_file::{read_text, trim};

/// A table like WebVid's (`videoid,name,page_dir,contentUrl`; other columns are not read) and a folder of videos:
/// `page_dir/videoid.mp4`, or without the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Webvid {
    /// The table; between its cells are commas, semicolons or tabs.
    pub table: PathBuf,
    /// The folder of its videos.
    pub root: PathBuf,
}

/// Where the columns stand that are read.
struct Columns {
    id: usize,
    caption: usize,
    folder: Option<usize>,
    /// How many there are.
    count: usize,
}

/// Rows that do not fit are left out, up to a tenth of a table, or so many where that is more.
const FEW: usize = 10;
/// Of a table that has so many by then no more is read.
const MANY: usize = 1000;

impl Webvid {
    /// The rows behind the header.
    fn open(&self) -> Result<(Rows<BufReader<File>>, Columns)> {
        let name = self.table.display();
        let mut header = Vec::new();
        // the separator by which the columns are there; where none is, commas are what is meant
        for separator in [b';', b'\t', b','] {
            let file = File::open(&self.table).with_context(|| format!("cannot open the table {name}"))?;
            let mut rows = Rows::new(BufReader::new(file), separator);
            let first = rows.next_row().with_context(|| format!("cannot read the table {name}"))?;
            header = match first {
                Some(Row { cells: Ok(cells), .. }) => cells,
                Some(Row { cells: Err(_), .. }) if separator != b',' => continue,
                Some(Row { line, cells: Err(why), .. }) => {
                    bail!("{name} is not a table of comma-separated values: its header, on line {line}, {why}")
                }
                None => Vec::new(),
            };
            let heads = names(&header);
            let find = |wanted: &str| heads.iter().position(|head| *head == wanted);
            if let (Some(id), Some(caption)) = (find("videoid"), find("name")) {
                return Ok((rows, Columns { id, caption, folder: find("page_dir"), count: heads.len() }));
            }
        }
        let heads = names(&header);
        let lacking: Vec<&str> = ["videoid", "name"].into_iter().filter(|wanted| !heads.contains(wanted)).collect();
        bail!(
            "{name} lacks the column{} `{}`: a table of captioned videos has `videoid`, `name` (the caption) and \
             perhaps `page_dir`; this one has `{}`",
            if lacking.len() == 1 { "" } else { "s" },
            lacking.join("`, `"),
            heads.join("`, `")
        )
    }

    /// Whether a quote that is open has swallowed rows, up to one that ends in a quote: lines with as many cells as the
    /// header, whose id is another than the row's, and a number as WebVid's are or that of a video that is there.
    fn holds_rows(&self, row: &Row, rows: &Rows<impl BufRead>, columns: &Columns) -> bool {
        let own = row.cells.as_ref().ok().and_then(|cells| cells.get(columns.id));
        rows.inner(row).any(|cells| {
            let id = trim(cells.get(columns.id).map_or("", String::as_str));
            let is_id = || {
                let folder = columns.folder.and_then(|column| cells.get(column)).map_or("", |folder| trim(folder));
                id.bytes().all(|byte| byte.is_ascii_digit()) || self.video(folder, id).is_some()
            };
            cells.len() == columns.count && !id.is_empty() && own.is_none_or(|own| trim(own) != id) && is_id()
        })
    }

    /// `root/page_dir/videoid.mp4`, without the folder where there is none, or with another ending, which the id may have
    /// already.
    fn video(&self, folder: &str, id: &str) -> Option<PathBuf> {
        let inside = |part: &str| !part.is_empty() && !part.starts_with('/') && !part.split('/').any(|p| p == "..");
        if !inside(id) {
            return None;
        }
        let folders = [Some(self.root.join(folder)).filter(|_| inside(folder)), Some(self.root.clone())];
        let named = has_extension(Path::new(id), &EXTENSIONS).then(|| id.to_string());
        let names: Vec<String> = EXTENSIONS.iter().map(|ending| format!("{id}.{ending}")).chain(named).collect();
        let files = |folder: PathBuf| names.iter().map(move |name| folder.join(name));
        folders.into_iter().flatten().flat_map(files).find(|path| path.is_file())
    }
}

impl VideoDataset for Webvid {
    /// In the table's order.
    fn videos(&self, _: &ClipSpec) -> Result<Listing> {
        ensure_folder(&self.root, "the table's videos")?;
        let (mut rows, columns) = self.open()?;
        let name = self.table.display();
        let mut videos = Vec::new();
        let (mut absent, mut silent, mut unfit) = (LeftOut::default(), LeftOut::default(), LeftOut::default());
        let mut count = 0;
        while let Some(row) = rows.next_row().with_context(|| format!("cannot read the table {name}"))? {
            count += 1;
            let line = row.line;
            let cells = match &row.cells {
                Ok(_) if self.holds_rows(&row, &rows, &columns) => {
                    unfit
                        .add(&format!("row {count}, on line {line}, has other rows within quotes: is one not closed?"));
                    rows.read_again(row);
                    continue;
                }
                Ok(cells) => cells,
                Err(why) => {
                    unfit.add(&format!("row {count}, on line {line}, {why}"));
                    continue;
                }
            };
            // cells without anything behind the last column are what some programs add
            if cells.len() < columns.count || cells[columns.count..].iter().any(|cell| !trim(cell).is_empty()) {
                let (has, wanted) = (cells.len(), columns.count);
                unfit.add(&format!(
                    "row {count}, on line {line}, has {has} cells, the header {wanted}: are quotes missing?"
                ));
                continue;
            }
            let cell = |column: usize| trim(&cells[column]);
            let (id, caption) = (cell(columns.id), cell(columns.caption));
            let folder = columns.folder.map_or("", cell);
            match self.video(folder, id) {
                _ if caption.is_empty() => silent.add(id),
                None => absent.add(id),
                Some(path) => videos.push(captioned(path, caption)),
            }
            ensure!(unfit.count <= MANY.max(count / 10), "{}", too_many(&unfit, count, &self.table));
        }
        ensure!(unfit.count <= FEW.max(count / 10), "{}", too_many(&unfit, count, &self.table));
        listing(videos, &[(absent, "are not there"), (silent, "have no caption"), (unfit, UNFIT)], &self.table)
    }

    fn path(&self) -> &Path {
        &self.root
    }

    fn paths(&self) -> Vec<&Path> {
        vec![&self.table, &self.root]
    }

    fn line(&self) -> String {
        format!("{} in {}", self.table.display(), self.root.display())
    }

    /// Whether the table has its columns.
    fn check(&self) -> Result<()> {
        ensure!(self.table.exists(), "there is no {}", self.table.display());
        self.open()?;
        ensure!(self.root.exists(), "there is no {}", self.root.display());
        Ok(())
    }

    fn root(&self) -> Option<&Path> {
        Some(&self.root)
    }

    fn has_captions(&self) -> bool {
        true
    }
}

const UNFIT: &str = "stand in rows that do not fit the table";

fn too_many(unfit: &LeftOut, rows: usize, table: &Path) -> String {
    let LeftOut { count, first } = unfit;
    format!("{}: {count} of its first {rows} rows do not fit, more than a tenth (the first: {first})", table.display())
}

/// Every video file under `root`, at any depth, with its caption in a text file of the same name: `x.mp4`, `x.txt`. The
/// class of a video is the name of the folder below `root` in which it lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Captioned {
    /// The folder of videos and texts.
    pub root: PathBuf,
}

impl VideoDataset for Captioned {
    fn videos(&self, _: &ClipSpec) -> Result<Listing> {
        let mut videos = Vec::new();
        let mut silent = LeftOut::default();
        for path in (Folder { root: self.root.clone() }).files()? {
            // what is no text is no caption
            let caption = read_text(&path.with_extension("txt")).unwrap_or_default();
            match trim(&caption) {
                "" => silent.add(&path.display().to_string()),
                caption => {
                    let class = class_of(&self.root, &path);
                    videos.push(VideoEntry { class, ..captioned(path, caption) });
                }
            }
        }
        listing(videos, &[(silent, "have no caption")], &self.root)
    }

    fn path(&self) -> &Path {
        &self.root
    }

    fn root(&self) -> Option<&Path> {
        Some(&self.root)
    }

    fn has_captions(&self) -> bool {
        true
    }
}

fn captioned(path: PathBuf, caption: &str) -> VideoEntry {
    let entry = VideoEntry::new(path.display().to_string(), VideoFile::new(path));
    VideoEntry { caption: Some(caption.to_string()), ..entry }
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

/// What is left of a list of videos; a warning says which groups are left out.
fn listing(videos: Vec<VideoEntry>, groups: &[(LeftOut, &str)], place: &Path) -> Result<Listing> {
    let left_out = groups.iter().map(|(group, _)| group.count).sum();
    let mut said = Vec::new();
    for (group, what) in groups {
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::clip::SHORT, *};

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
        let listing = Webvid { table: table.clone(), root: root.clone() }.videos(&SHORT).unwrap();
        assert_eq!(names(&listing), [("1.mp4".to_string(), "A dog, \"running\"\nfast"), ("2.webm".to_string(), "Cat")]);
        assert_eq!(listing.left_out, 4);

        // a preview beside a video is not the video
        fs::write(root.join("6.gif"), []).unwrap();
        fs::write(root.join("6.ts"), []).unwrap();
        fs::write(&table, "videoid,name\n6,Bird\n").unwrap();
        let listing = Webvid { table: table.clone(), root: root.clone() }.videos(&SHORT).unwrap();
        assert_eq!(names(&listing), [("6.ts".to_string(), "Bird")]);

        fs::write(&table, "videoid,page_dir,contentUrl\n1,a,b\n").unwrap();
        let webvid = Webvid { table: table.clone(), root: root.clone() };
        let error = webvid.check().unwrap_err().to_string();
        assert!(error.contains("lacks the column `name`") && error.contains("`page_dir`, `contentUrl`"), "{error}");
        fs::write(&table, "id,text\n").unwrap();
        assert!(webvid.check().unwrap_err().to_string().contains("`videoid`, `name`"));
        fs::write(&table, "videoid,name\n9,nothing\n").unwrap();
        let error = webvid.videos(&SHORT).unwrap_err().to_string();
        assert!(error.contains("of 1 videos") && error.contains("1 are not there (the first: 9)"), "{error}");
    }

    /// Names of the videos and captions of such a table, and how many rows are left out.
    fn read(text: &str) -> Result<(Vec<(String, String)>, usize)> {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..40 {
            fs::write(folder.path().join(format!("{i}.mp4")), []).unwrap();
        }
        let table = folder.path().join("table.csv");
        fs::write(&table, text).unwrap();
        let listing = Webvid { table, root: folder.path().to_path_buf() }.videos(&SHORT)?;
        let found = names(&listing).into_iter().map(|(name, caption)| (name, caption.to_string())).collect();
        Ok((found, listing.left_out))
    }

    #[test]
    fn a_row_that_does_not_fit_is_left_out_and_never_cut_short() {
        let pair = |i: usize, caption: &str| (format!("{i}.mp4"), caption.to_string());
        for (rows, captions, left_out) in [
            ("1,A dog, running, in snow\n2,a cat\n", &[(2, "a cat")][..], 1),
            ("1\n2,a cat\n", &[(2, "a cat")], 1),
            ("1,\"A dog\n2,a cat\n3,a bird\n", &[(2, "a cat"), (3, "a bird")], 1),
            ("1,\"A dog\n2,a cat\n3,\"a bird\"\n", &[(2, "a cat"), (3, "a bird")], 1),
            ("1,\"A dog, running\"\n2,a cat,,\n", &[(1, "A dog, running"), (2, "a cat")], 0),
            ("1.mp4,A dog\n2.MP4,a cat\n", &[(1, "A dog")], 1),
            ("1,\u{feff}A dog\n\u{feff}2,a cat\n", &[(1, "A dog"), (2, "a cat")], 0),
        ] {
            let (found, count) = read(&format!("videoid,name\n{rows}")).unwrap();
            let captions: Vec<_> = captions.iter().map(|(i, caption)| pair(*i, caption)).collect();
            assert_eq!((found, count), (captions, left_out), "{rows}");
        }
        for (separator, header) in [(';', "name;videoid"), ('\t', "\u{feff}\"name\"\tvideoid")] {
            let (found, _) = read(&format!("{header}\nA dog, running{separator}1\n")).unwrap();
            assert_eq!(found, [pair(1, "A dog, running")]);
        }
    }

    /// A quote that is open ends at the next one that stands at the end of a row: that row is none of its caption.
    #[test]
    fn an_open_quote_that_a_later_row_seems_to_close_swallows_no_row() {
        let pair = |i: usize, caption: &str| (format!("{i}.mp4"), caption.to_string());
        let (found, count) = read("videoid,name\n1,\"A dog\n2,a cat\n5,pipe 5\"\n6,a bird\n").unwrap();
        assert_eq!((found, count), (vec![pair(2, "a cat"), pair(5, "pipe 5\""), pair(6, "a bird")], 1));
        // what is one caption stays one, wherever its column stands
        for (text, caption) in [
            ("videoid,name\n1,\"A dog,\nwalks, slowly\nhome, 2\"\n", "A dog,\nwalks, slowly\nhome, 2"),
            ("name,videoid\n\"A dog,\nrunning\",1\n", "A dog,\nrunning"),
            ("name,videoid\n\"A dog\nwalks, slowly\",1\n", "A dog\nwalks, slowly"),
        ] {
            assert_eq!(read(text).unwrap(), (vec![pair(1, caption)], 0), "{text}");
        }
    }

    #[test]
    fn where_many_rows_do_not_fit_it_is_an_error() {
        let table = |bad: usize, good: usize| {
            let rows: String =
                (0..bad).map(|i| format!("{i},a, b\n")).chain((0..good).map(|i| format!("{i},a\n"))).collect();
            read(&format!("videoid,name\n{rows}"))
        };
        assert_eq!(table(10, 10).unwrap().1, 10);
        let error = table(11, 20).unwrap_err().to_string();
        let words = ["11 of its first 31 rows do not fit", "row 1, on line 2, has 3 cells, the header 2", "quotes"];
        words.iter().for_each(|words| assert!(error.contains(words), "{words}: {error}"));
        assert!(table(11, 99).is_ok());
        assert!(table(1001, 100).is_err() && table(0, 1).is_ok());
    }

    #[test]
    fn a_text_lies_beside_each_video() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["a.mp4", "b.mp4", "c.avi", "d.mp4"] {
            fs::write(path(name), []).unwrap();
        }
        fs::write(path("a.txt"), "\u{feff}one\r\n").unwrap();
        fs::write(path("b.txt"), "\u{feff} \n").unwrap();
        fs::write(path("c.txt"), "three words more").unwrap();
        let listing = Captioned { root: folder.path().to_path_buf() }.videos(&SHORT).unwrap();
        assert_eq!(names(&listing), [("a.mp4".to_string(), "one"), ("c.avi".to_string(), "three words more")]);
        assert_eq!(listing.left_out, 2);
        let config = Captioned { root: path("nowhere") };
        assert!(config.check().unwrap_err().to_string().contains("there is no") && config.has_captions());
    }
}
