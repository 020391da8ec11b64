//! `lvdm data`: data sets made ready, the demo's videos, and packing.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use anyhow::Result;
use clap::{
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
    value_parser,
};

use super::{out::check_ending, sample::MOST_VIDEOS};
use crate::{
    data::{
        Captioned, DataConfig, DatasetConfig, Folder, FrameFolders, Indexed, Webvid, decode_workers, demo,
        index::read_index,
        inspect::{ContactSheet, summary},
        pack_clips,
        prepare::{Count, Depth, KNOWN_SETS, KnownSet, ProblemKind, prepare, problems_file},
    },
    distributed::{self, Launch},
    experiment::UserError,
    torch::DeviceName,
    train::progress::Progress,
};

/// Prepare, inspect and pack data sets, or generate the demo's videos
#[derive(Debug, clap::Args)]
pub struct Data {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Find and check the videos of a data set, and write an index of them, from which training starts at once
    Prepare(Prepare),
    /// Print the counts and durations of an index, and draw a contact sheet of its videos
    Inspect(Inspect),
    /// Generate the demo's videos: coloured shapes that move over drifting backgrounds
    MakeDemo(MakeDemo),
    /// Decode clips into one safetensors file, from which networks train without FFmpeg and OpenCV
    ///
    /// An experiment names the file as `data: {dataset: {kind: packed, file: FILE}}`. With --nproc, the ranks share the
    /// decoding; the file is the same for any number of them.
    Pack(Pack),
}

#[derive(Debug, clap::Args)]
struct Prepare {
    /// The data set
    #[arg(value_parser = known_sets())]
    set: &'static dyn KnownSet,
    /// Folder in which the data set was unpacked; data/ describes the layouts that are accepted
    root: PathBuf,
    /// Index to write [default: ROOT/index.jsonl]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder with UCF-101's trainlist01.txt and testlist01.txt, if these are neither in ROOT nor beside it
    #[arg(long)]
    lists: Option<PathBuf>,
    /// Frames in a clip; videos that are too short for a clip are reported
    #[arg(long, default_value_t = 16)]
    frames: i64,
    /// Take every n-th frame of a video [default: 4 for taichi, otherwise 1]
    #[arg(long)]
    frame_stride: Option<i64>,
    /// Decode only the first and the last frame of each video, so that damage in between is not found
    #[arg(long)]
    quick: bool,
}

/// The data sets that can be prepared, by name.
fn known_sets() -> impl TypedValueParser<Value = &'static dyn KnownSet> {
    let names = KNOWN_SETS.map(|set| PossibleValue::new(set.name()).help(set.about()));
    let named = |name: String| KNOWN_SETS.into_iter().find(|set| set.name() == name).expect("clap checked the name");
    PossibleValuesParser::new(names).map(named)
}

#[derive(Debug, clap::Args)]
struct Inspect {
    /// Index written by `lvdm data prepare`
    index: PathBuf,
    /// Split of the index, such as test [default: all]
    #[arg(long)]
    split: Option<String>,
    /// Contact sheet to write; not in the folder of the videos, where it could be taken for a video
    #[arg(long, default_value = "contact-sheet.png")]
    out: PathBuf,
    /// Videos on the sheet, chosen evenly from all
    #[arg(long, default_value_t = 12)]
    videos: usize,
    /// Height and width of a picture on the sheet
    #[arg(long, default_value_t = 96)]
    resolution: i64,
}

#[derive(Debug, clap::Args)]
struct MakeDemo {
    /// Folder in which train/ and test/ are created
    #[arg(long, default_value = "data/demo")]
    out: PathBuf,
    /// Number of videos for training
    #[arg(long, default_value_t = demo::DemoConfig::default().train)]
    train: u64,
    /// Number of videos held out for evaluation
    #[arg(long, default_value_t = demo::DemoConfig::default().test)]
    test: u64,
    /// Frames in each video
    #[arg(long, default_value_t = demo::DemoConfig::default().frames)]
    frames: i64,
    /// Width and height in pixels
    #[arg(long, default_value_t = demo::DemoConfig::default().size)]
    size: i64,
    /// Seed of the shapes, colours and movements
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, clap::Args)]
struct Pack {
    #[command(flatten)]
    clips: Clips,
    /// Number of clips [default: one from each video]
    #[arg(long = "clips", value_parser = value_parser!(u64).range(..=MOST_VIDEOS))]
    count: Option<u64>,
    /// File to write (.safetensors)
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    launch: Launch,
}

/// Which clips are cut out of which videos, as `pack` and `encode` ask for them.
#[derive(Debug, clap::Args)]
pub(super) struct Clips {
    /// Videos: a folder, an index (.jsonl), a numpy array (.npy or .npz), or a file that `lvdm data pack` wrote
    #[arg(long)]
    videos: PathBuf,
    /// Split of the index, such as train [default: all]
    #[arg(long)]
    split: Option<String>,
    /// The folder contains folders of pictures, each a video, instead of video files
    #[arg(long)]
    frames_folders: bool,
    /// Each video file has its caption in a text file of the same name: x.mp4 and x.txt
    #[arg(long, conflicts_with = "frames_folders")]
    captions: bool,
    /// Table (CSV) of the videos, with the columns videoid, name (the caption) and, if there are subfolders, page_dir
    #[arg(long, conflicts_with_all = ["frames_folders", "captions"])]
    table: Option<PathBuf>,
    /// Frames in a clip
    #[arg(long, default_value_t = 16)]
    frames: i64,
    /// Take every n-th frame of a video
    #[arg(long, default_value_t = 1)]
    frame_stride: i64,
    /// Height and width of a clip in pixels
    #[arg(long, default_value_t = 256)]
    resolution: i64,
    /// Seed of the random places at which clips begin
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
}

impl Clips {
    /// # Errors
    /// Videos that are not there.
    pub(super) fn data(&self, flip: bool) -> Result<DataConfig> {
        if !self.videos.exists() {
            return Err(UserError(format!("there is no folder {}", self.videos.display())).into());
        }
        let root = self.videos.clone();
        let mut dataset = match &self.table {
            Some(table) => DatasetConfig::Webvid(Webvid { table: table.clone(), root }),
            None if self.captions => DatasetConfig::Captioned(Captioned { root }),
            None if self.frames_folders => DatasetConfig::Frames(FrameFolders { root }),
            None if root.is_file() => DatasetConfig::at(&root).map_err(|error| UserError(format!("{error:#}")))?,
            None => DatasetConfig::Folder(Folder { root }),
        };
        if self.split.is_some() {
            match &mut dataset {
                DatasetConfig::Indexed(Indexed { split, .. }) => *split = self.split.clone(),
                _ => return Err(UserError("--split: only an index (.jsonl) has splits".into()).into()),
            }
        }
        dataset.check().map_err(|error| UserError(format!("{error:#}")))?;
        let Clips { frames, frame_stride, resolution, .. } = *self;
        Ok(DataConfig { dataset, frames, frame_stride, resolution, flip, workers: decode_workers() })
    }
}

impl Data {
    /// # Errors
    /// Videos that are not there; a full disk.
    pub fn run(self) -> Result<()> {
        match self.what {
            What::MakeDemo(options) => {
                let MakeDemo { out, train, test, frames, size, seed } = options;
                let config =
                    demo::DemoConfig { root: out, train, test, frames, size, seed, ..demo::DemoConfig::default() };
                demo::write(&config)?;
                say!("{train} videos to train on and {test} held out in {}", config.root.display());
                Ok(())
            }
            What::Prepare(options) => options.run(),
            What::Inspect(options) => options.run(),
            What::Pack(options) => options.run(),
        }
    }
}

/// So many problems of a kind are printed; the file has them all.
const SHOWN: usize = 5;

impl Prepare {
    fn run(self) -> Result<()> {
        let stride = self.frame_stride.unwrap_or(self.set.frame_stride());
        if self.frames < 1 || stride < 1 {
            return Err(UserError("--frames and --frame-stride must be at least 1".into()).into());
        }
        if let Some(folder) = &self.lists {
            let Some(list) = self.set.list() else {
                return Err(UserError(format!("--lists: {} has no lists of splits", self.set.name())).into());
            };
            if !folder.join(list).is_file() {
                return Err(UserError(format!("--lists: there is no {list} in {}", folder.display())).into());
            }
        }
        let span = (self.frames - 1) * stride + 1;
        let bar: Mutex<Option<(Progress, u64)>> = Mutex::new(None);
        let done = |total: usize| {
            let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
            let (progress, count) = bar.get_or_insert_with(|| (Progress::new("look into", total as u64, 0), 0));
            *count += 1;
            progress.step(*count, "");
        };
        // a wrong folder is what the user wrote
        let depth = if self.quick { Depth::Ends } else { Depth::Whole };
        let prepared = prepare(self.set, &self.root, self.lists.as_deref(), span, depth, &done)
            .map_err(|error| UserError(format!("{error:#}")))?;
        if let Some((progress, _)) = bar.into_inner().unwrap_or_else(PoisonError::into_inner) {
            progress.finish();
        }
        let index = self.out.unwrap_or_else(|| self.root.join("index.jsonl"));
        prepared.write(&index)?;
        for Count { what, found, published } in &prepared.counts {
            let beside = match published {
                None => ", no number is published".to_string(),
                Some(range) if range.start() < range.end() => {
                    format!(", published are {} to {}", range.start(), range.end())
                }
                Some(range) if range.contains(found) => ", as published".to_string(),
                Some(range) => format!(", published are {}", range.start()),
            };
            say!("{found} {what}{beside}");
        }
        for note in &prepared.notes {
            say!("note: {note}");
        }
        for (kind, what) in [
            (ProblemKind::Missing, "missing".to_string()),
            (ProblemKind::Corrupt, "corrupt, left out".to_string()),
            (
                ProblemKind::Uneven,
                "with a gap, pictures of several sizes or beside others; in the index all the same".to_string(),
            ),
            (
                ProblemKind::TooShort,
                format!("too short for {} frames at stride {stride}; in the index all the same", self.frames),
            ),
        ] {
            say!("{} {what}", prepared.count(kind));
            let of_kind = prepared.problems.iter().filter(|problem| problem.kind == kind);
            for problem in of_kind.take(SHOWN) {
                say!("    {}: {}", problem.name, problem.reason);
            }
            if prepared.count(kind) > SHOWN {
                say!("    …");
            }
        }
        say!(
            "checked: {}",
            match depth {
                Depth::Whole => "every frame of every video was decoded",
                Depth::Ends => "first and last frame of each video, and every picture's header; not what lies between",
            }
        );
        say!("{} in {}", super::counted(prepared.entries.len() as u64, "video"), index.display());
        if !prepared.problems.is_empty() {
            say!("all problems: {}", problems_file(&index).display());
        }
        say!("data: {{dataset: {{kind: indexed, file: {}}}, …}}", index.display());
        Ok(())
    }
}

impl Inspect {
    fn run(self) -> Result<()> {
        if !self.index.exists() {
            let text = format!("there is no index {} (`lvdm data prepare` writes one)", self.index.display());
            return Err(UserError(text).into());
        }
        if self.videos < 1 || self.resolution < 1 {
            return Err(UserError("--videos and --resolution must be at least 1".into()).into());
        }
        check_ending(&self.out, "png")?;
        let mut entries = read_index(&self.index)?;
        if let Some(split) = &self.split {
            entries.retain(|entry| entry.split.as_ref() == Some(split));
        }
        if entries.is_empty() {
            return Err(UserError(format!("no videos of this split in {}", self.index.display())).into());
        }
        super::say::text(summary(&entries));
        let sheet = ContactSheet::draw(&entries, self.videos, self.resolution)?;
        sheet.write(&self.out)?;
        say!("contact sheet, from top to bottom: {}", self.out.display());
        for (entry, error) in sheet.rows() {
            match error {
                None => say!("    {}", entry.path.display()),
                Some(error) => say!("    {}: left grey, {error:#}", entry.path.display()),
            }
        }
        let (rows, broken) = (sheet.rows().len(), sheet.rows().iter().filter(|(_, error)| error.is_some()).count());
        if broken > 0 {
            tracing::warn!(
                "{broken} of the {rows} videos on the sheet cannot be read; `lvdm data prepare` finds all such"
            );
        }
        Ok(())
    }
}

impl Pack {
    fn run(self) -> Result<()> {
        check_ending(&self.out, "safetensors")?;
        let data = self.clips.data(false)?;
        distributed::run(&self.launch, DeviceName::Cpu, |ranks, _| {
            let count = pack_clips(&data, self.count, self.clips.seed, &self.out, ranks)?;
            if ranks.is_first() {
                say!("{} in {}", super::counted(count, "clip"), self.out.display());
            }
            Ok(())
        })
    }
}
