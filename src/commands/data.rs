//! `lvdm data`: data sets made ready, the demo's videos, and packing.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use anyhow::Result;
use clap::{
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
    value_parser,
};
use tch::{Device, Kind, Tensor};

use super::{out::check_ending, sample::MOST_VIDEOS};
use crate::{
    data::{
        Captioned, ClipSpec, DataConfig, DatasetConfig, Fit, Folder, FrameFolders, Indexed, Webvid, decode_workers,
        demo,
        index::{IndexEntry, read_index},
        pack_clips, pictures,
        prepare::{Count, Depth, KNOWN_SETS, KnownSet, ProblemKind, prepare, problems_file},
    },
    distributed::{self, Launch},
    experiment::UserError,
    torch::DeviceName,
    train::progress::Progress,
};

/// Prepare, look at, make and pack data
#[derive(Debug, clap::Args)]
pub struct Data {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Find a data set's videos, check them, and write an index from which training starts at once
    Prepare(Prepare),
    /// Show an index: counts, durations, and a contact sheet
    Inspect(Inspect),
    /// Write the procedural demo videos
    MakeDemo(MakeDemo),
    /// Pack clips into one safetensors file, from which everything trains without FFmpeg and OpenCV
    ///
    /// Ranks share the decoding, and the file does not depend on how many there are.
    Pack(Pack),
}

#[derive(Debug, clap::Args)]
struct Prepare {
    #[arg(value_parser = known_sets())]
    set: &'static dyn KnownSet,
    /// Where it was unpacked
    root: PathBuf,
    /// The index [default: ROOT/index.jsonl]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder with UCF-101's trainlist01.txt and testlist01.txt, if it is neither in ROOT nor beside it
    #[arg(long)]
    lists: Option<PathBuf>,
    /// Frames of the clips that videos must be long enough for
    #[arg(long, default_value_t = 16)]
    frames: i64,
    /// Every n-th frame of a video [default: 4 for taichi, else 1]
    #[arg(long)]
    frame_stride: Option<i64>,
    /// Decode the first and the last frame of each video alone, not all: damage in between is not found
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
    /// One split only
    #[arg(long)]
    split: Option<String>,
    /// The contact sheet. Not beside the index: among videos it could be taken for one
    #[arg(long, default_value = "contact-sheet.png")]
    out: PathBuf,
    /// Videos on the sheet, evenly out of all
    #[arg(long, default_value_t = 12)]
    videos: usize,
    /// Height and width of a picture on it
    #[arg(long, default_value_t = 96)]
    resolution: i64,
}

#[derive(Debug, clap::Args)]
struct MakeDemo {
    /// Folder for train/ and test/
    #[arg(long, default_value = "data/demo")]
    out: PathBuf,
    /// Videos to train on
    #[arg(long, default_value_t = demo::DemoConfig::default().train)]
    train: u64,
    /// Videos held out
    #[arg(long, default_value_t = demo::DemoConfig::default().test)]
    test: u64,
    /// Frames of each
    #[arg(long, default_value_t = demo::DemoConfig::default().frames)]
    frames: i64,
    /// Width and height in pixels
    #[arg(long, default_value_t = demo::DemoConfig::default().size)]
    size: i64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, clap::Args)]
struct Pack {
    #[command(flatten)]
    clips: Clips,
    /// How many clips (default: one of each video)
    #[arg(long = "clips", value_parser = value_parser!(u64).range(..=MOST_VIDEOS))]
    count: Option<u64>,
    /// The file (.safetensors)
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    launch: Launch,
}

/// Which clips are cut out of which videos, as `pack` and `encode` ask for them.
#[derive(Debug, clap::Args)]
pub(super) struct Clips {
    /// Folder of videos, or an index (.jsonl), a numpy array (.npy, .npz), a packed file
    #[arg(long)]
    videos: PathBuf,
    /// One split of an index only
    #[arg(long)]
    split: Option<String>,
    /// The folder holds folders of pictures instead of video files
    #[arg(long)]
    frames_folders: bool,
    /// Each video has its caption beside it, in a text file of its name
    #[arg(long, conflicts_with = "frames_folders")]
    captions: bool,
    /// Table (CSV) of the videos with the columns videoid, name (the caption) and perhaps page_dir
    #[arg(long, conflicts_with_all = ["frames_folders", "captions"])]
    table: Option<PathBuf>,
    /// Frames of a clip
    #[arg(long, default_value_t = 16)]
    frames: i64,
    #[arg(long, default_value_t = 1)]
    frame_stride: i64,
    #[arg(long, default_value_t = 256)]
    resolution: i64,
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
        crate::commands::say::text(summary(&entries));
        let rows = entries.len().min(self.videos);
        let chosen: Vec<&IndexEntry> = (0..rows).map(|row| &entries[row * entries.len() / rows]).collect();
        let looked: Vec<Result<Tensor>> = chosen.iter().map(|entry| overview(entry, self.resolution)).collect();
        let side = self.resolution;
        let empty = || Tensor::full([3, COLUMNS, side, side], 128, (Kind::Uint8, Device::Cpu));
        let clips: Vec<Tensor> =
            looked.iter().map(|clip| clip.as_ref().map_or_else(|_| empty(), Tensor::shallow_clone)).collect();
        pictures::write_png(&self.out, &pictures::grid(&Tensor::stack(&clips, 0), 1)?)?;
        say!("contact sheet, from top to bottom: {}", self.out.display());
        for (entry, clip) in chosen.iter().zip(&looked) {
            match clip {
                Ok(_) => say!("    {}", entry.path.display()),
                Err(error) => say!("    {}: left grey, {error:#}", entry.path.display()),
            }
        }
        let broken = looked.iter().filter(|clip| clip.is_err()).count();
        if broken > 0 {
            tracing::warn!(
                "{broken} of the {rows} videos on the sheet cannot be read; `lvdm data prepare` finds all such"
            );
        }
        Ok(())
    }
}

/// Pictures of a row of the contact sheet.
const COLUMNS: i64 = 8;

/// Frames from the first to the last of a video, evenly, `[3, COLUMNS, S, S]`.
fn overview(entry: &IndexEntry, side: i64) -> Result<Tensor> {
    let spec = ClipSpec { frames: COLUMNS, frame_stride: 1, resolution: side, fit: Fit::default() };
    let mut source = entry.source().open()?;
    let frame = |column: i64| column * (source.frames() - 1) / (COLUMNS - 1);
    let places: Vec<i64> = (0..COLUMNS).map(frame).collect();
    let mut frames = Vec::new();
    for place in places {
        frames.extend(source.read(place, 1, 1)?);
    }
    Ok(Tensor::from_slice(&spec.fit(&frames)).reshape([3, COLUMNS, side, side]))
}

/// Counts and ranges, split by split.
fn summary(entries: &[IndexEntry]) -> String {
    let mut splits: BTreeMap<&str, Vec<&IndexEntry>> = BTreeMap::new();
    for entry in entries {
        splits.entry(entry.split.as_deref().unwrap_or("(no split)")).or_default().push(entry);
    }
    let mut text = format!(
        "{:12} {:>8} {:>8} {:>11} {:>9}  {:24} {}\n",
        "split", "videos", "classes", "frames", "hours", "frames a video", "sizes and rates"
    );
    for (split, entries) in splits {
        let classes: BTreeSet<&String> = entries.iter().filter_map(|entry| entry.class.as_ref()).collect();
        let mut frames: Vec<i64> = entries.iter().map(|entry| entry.frames).collect();
        frames.sort_unstable();
        let seconds: Option<f64> = entries.iter().map(|entry| Some(entry.frames as f64 / entry.fps?)).sum();
        let hours = seconds.map_or("-".into(), |seconds| format!("{:.2}", seconds / 3600.0));
        let range = format!("{} / {} / {}", frames[0], frames[frames.len() / 2], frames[frames.len() - 1]);
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        for IndexEntry { width, height, fps, .. } in &entries {
            let rate = fps.map_or("pictures".into(), |fps| format!("{fps:.2} fps"));
            *kinds.entry(format!("{width}x{height} {rate}")).or_default() += 1;
        }
        let mut kinds: Vec<(String, usize)> = kinds.into_iter().collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let more = if kinds.len() > 3 { format!(", {} others", kinds.len() - 3) } else { String::new() };
        let kinds: Vec<String> = kinds.iter().take(3).map(|(kind, count)| format!("{kind} ({count})")).collect();
        text += &format!(
            "{split:12} {:>8} {:>8} {:>11} {hours:>9}  {range:24} {}{more}\n",
            entries.len(),
            classes.len(),
            frames.iter().sum::<i64>(),
            kinds.join(", ")
        );
    }
    text + "frames a video: shortest / median / longest\n"
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
