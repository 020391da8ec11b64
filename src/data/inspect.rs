//! What an index holds, for people: counts in a table, and a contact sheet of its videos.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Error, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::{
    clip::{ClipSpec, Fit},
    index::IndexEntry,
    pictures,
};

/// A table of the splits of an index, one a row: numbers of videos, classes and frames, hours, the shortest, median and
/// longest video, and the three most frequent sizes and rates.
pub fn summary(entries: &[IndexEntry]) -> String {
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
        text += &format!(
            "{split:12} {:>8} {:>8} {:>11} {hours:>9}  {range:24} {}\n",
            entries.len(),
            classes.len(),
            frames.iter().sum::<i64>(),
            most_frequent_formats(&entries)
        );
    }
    text + "frames a video: shortest / median / longest\n"
}

/// `320x240 25.00 fps (9537), 2 others`
fn most_frequent_formats(entries: &[&IndexEntry]) -> String {
    let mut formats: BTreeMap<String, usize> = BTreeMap::new();
    for IndexEntry { width, height, fps, .. } in entries {
        let rate = fps.map_or("pictures".into(), |fps| format!("{fps:.2} fps"));
        *formats.entry(format!("{width}x{height} {rate}")).or_default() += 1;
    }
    let mut formats: Vec<(String, usize)> = formats.into_iter().collect();
    formats.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let others = if formats.len() > 3 { format!(", {} others", formats.len() - 3) } else { String::new() };
    let shown: Vec<String> = formats.iter().take(3).map(|(format, count)| format!("{format} ({count})")).collect();
    shown.join(", ") + &others
}

/// Pictures of a video, from its first frame to its last.
const COLUMNS: i64 = 8;

/// A picture of some videos of an index: a row a video, with eight of its frames.
pub struct ContactSheet<'a> {
    picture: Tensor,
    rows: Vec<(&'a IndexEntry, Option<Error>)>,
}

impl<'a> ContactSheet<'a> {
    /// At most so many videos, at even distances in the index, with frames of `side` × `side` pixels.
    ///
    /// # Errors
    /// An index without videos.
    pub fn draw(entries: &'a [IndexEntry], videos: usize, side: i64) -> Result<Self> {
        let count = entries.len().min(videos);
        ensure!(count > 0, "{videos} of {} videos make no contact sheet", entries.len());
        let grey = || Tensor::full([3, COLUMNS, side, side], 128, (Kind::Uint8, Device::Cpu));
        let (mut clips, mut rows) = (Vec::new(), Vec::new());
        for entry in (0..count).map(|row| &entries[row * entries.len() / count]) {
            let (clip, error) = match frames_of(entry, side) {
                Ok(clip) => (clip, None),
                Err(error) => (grey(), Some(error)),
            };
            clips.push(clip);
            rows.push((entry, error));
        }
        Ok(ContactSheet { picture: pictures::grid(&Tensor::stack(&clips, 0), 1)?, rows })
    }

    /// The videos from top to bottom. One that cannot be read is grey, and has the reason beside it.
    pub fn rows(&self) -> &[(&'a IndexEntry, Option<Error>)] {
        &self.rows
    }

    /// Writes it as a PNG file.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&self, path: &Path) -> Result<()> {
        pictures::write_png(path, &self.picture)
    }
}

/// Frames of a video at even distances from its first to its last, `[3, COLUMNS, side, side]`.
fn frames_of(entry: &IndexEntry, side: i64) -> Result<Tensor> {
    let spec = ClipSpec { frames: COLUMNS, frame_stride: 1, resolution: side, fit: Fit::default() };
    let mut source = entry.source().open()?;
    let last = source.frames() - 1;
    let mut frames = Vec::new();
    for column in 0..COLUMNS {
        frames.extend(source.read(column * last / (COLUMNS - 1), 1, 1)?);
    }
    Ok(Tensor::from_slice(&spec.fit(&frames)).reshape([3, COLUMNS, side, side]))
}
