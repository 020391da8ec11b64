//! What a run records: `metrics.jsonl` and TensorBoard events, the same figures in both.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail};
use protobuf::Message;
use serde_json::{Map, Value, json};
use tensorboard_proto::{
    event::{Event, SessionLog, SessionLog_SessionStatus},
    summary::{Summary, Summary_Image, Summary_Value},
};
use tensorboard_rs::{record_writer::RecordWriter, summary::scalar};

use crate::{
    atomic_file::write_atomically,
    run_files::{METRICS_FILE, TENSORBOARD_FOLDER},
};

/// Writes what happens in a run. Everything logged is on its way to the disk when a call returns; where the disk does
/// not take it, it waits and is tried again with what is logged next, so that a full disk ends no training.
pub struct RunLogger {
    metrics: Appended,
    events: Appended,
}

impl RunLogger {
    /// Opens the log of a run folder, which is made where it is missing.
    ///
    /// `resume_step` is the last step of the checkpoint that training goes on from, `None` at a start
    /// from nothing. What an earlier start logged beyond it is dropped from `metrics.jsonl` and hidden
    /// by TensorBoard, so that the log reads as that of a run never interrupted. Lines that are no objects with a
    /// `step`, as a power failure leaves them, are left out with a warning; the file as it was stays beside it.
    ///
    /// # Errors
    /// A folder that cannot be made or written.
    pub fn open(run: &Path, resume_step: Option<i64>) -> Result<Self> {
        let folder = run.join(TENSORBOARD_FOLDER);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let metrics_path = run.join(METRICS_FILE);
        keep_up_to(&metrics_path, resume_step)?;
        let metrics = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&metrics_path)
            .with_context(|| format!("cannot write {}", metrics_path.display()))?;
        let metrics = Appended::new(metrics, metrics_path, "metrics");
        let events = begin_events(&folder, resume_step.map_or(0, |step| step + 1))?;
        Ok(RunLogger { metrics, events })
    }

    /// Logs figures of one step. A value that is not finite is `null` in `metrics.jsonl`.
    pub fn scalars(&mut self, step: i64, values: &[(&str, f64)]) {
        let mut line = format!("{{\"step\":{step}");
        for (name, value) in values {
            // json! turns what is not finite into null
            line += &format!(",{}:{}", json!(name), json!(value));
        }
        line += "}\n";
        self.metrics.add(line.into_bytes());
        for (name, value) in values {
            self.summary(step, scalar(name, *value as f32));
        }
    }

    /// Logs a picture, given as the bytes of a PNG file and its size in pixels.
    ///
    /// # Errors
    /// Bytes that are no PNG.
    pub fn image_png(&mut self, step: i64, tag: &str, png: &[u8], width: i32, height: i32) -> Result<()> {
        if !png.starts_with(b"\x89PNG\r\n\x1a\n") {
            bail!("the picture `{tag}` is not a PNG file");
        }
        self.picture(step, tag, png, width, height);
        Ok(())
    }

    /// Logs a moving picture, given as the bytes of a GIF file: TensorBoard's image tab plays it.
    ///
    /// # Errors
    /// Bytes that are no GIF.
    pub fn gif(&mut self, step: i64, tag: &str, gif: &[u8], width: i32, height: i32) -> Result<()> {
        if !gif.starts_with(b"GIF8") {
            bail!("the moving picture `{tag}` is not a GIF file");
        }
        self.picture(step, tag, gif, width, height);
        Ok(())
    }

    /// Writes what is left and waits for the disk. A warning names what could not be written, and how much it is.
    pub fn finish(mut self) {
        self.metrics.finish();
        self.events.finish();
    }

    fn picture(&mut self, step: i64, tag: &str, bytes: &[u8], width: i32, height: i32) {
        let mut picture = Summary_Image::new();
        picture.set_width(width);
        picture.set_height(height);
        picture.set_colorspace(3); // RGB
        picture.set_encoded_image_string(bytes.to_vec());
        let mut value = Summary_Value::new();
        value.set_tag(tag.to_string());
        value.set_image(picture);
        let mut summary = Summary::new();
        summary.mut_value().push(value);
        self.summary(step, summary);
    }

    fn summary(&mut self, step: i64, summary: Summary) {
        let mut event = Event::new();
        event.set_step(step);
        event.set_summary(summary);
        self.events.add(record(event));
    }
}

/// Drops the lines of a metrics file that lie beyond `last` (all where it is `None`), and those that are damaged.
fn keep_up_to(path: &Path, last: Option<i64>) -> Result<()> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let text = String::from_utf8_lossy(&bytes);
    let mut kept = String::with_capacity(text.len());
    let mut damaged = 0;
    for line in text.split_inclusive('\n') {
        if !line.ends_with('\n') {
            break; // cut off when the run was stopped
        }
        let object: Option<Map<String, Value>> = serde_json::from_str(line).ok();
        match object.and_then(|object| object.get("step")?.as_i64()) {
            Some(step) if last.is_some_and(|last| step <= last) => kept += line,
            Some(_) => {}
            None => damaged += 1,
        }
    }
    let write = |path: &Path, bytes: &[u8]| write_atomically(path, |file| Ok(file.write_all(bytes)?));
    if damaged > 0 {
        let aside = path.with_extension("jsonl.damaged");
        write(&aside, &bytes)?;
        tracing::warn!(
            "{damaged} lines of {} are no JSON objects with a `step` and are left out; the file as it was is {}",
            path.display(),
            aside.display()
        );
    }
    if kept.len() < bytes.len() { write(path, kept.as_bytes()) } else { Ok(()) }
}

/// As many bytes wait at most for a disk that takes nothing; what comes then is given up.
const MOST_WAITING: usize = 16 << 20;

/// A file that grows by records. What the disk does not take waits in memory, in order.
struct Appended {
    file: File,
    path: PathBuf,
    /// Of its records, for messages.
    content: &'static str,
    waiting: VecDeque<Vec<u8>>,
    /// Bytes of the first of them that are written.
    begun: usize,
    given_up: u64,
    has_warned: bool,
}

impl Appended {
    fn new(file: File, path: PathBuf, content: &'static str) -> Self {
        Appended { file, path, content, waiting: VecDeque::new(), begun: 0, given_up: 0, has_warned: false }
    }

    fn add(&mut self, record: Vec<u8>) {
        let waiting: usize = self.waiting.iter().map(Vec::len).sum();
        if waiting > 0 && waiting + record.len() > MOST_WAITING {
            self.given_up += 1;
        } else {
            self.waiting.push_back(record);
        }
        if let Err(error) = self.write()
            && !std::mem::replace(&mut self.has_warned, true)
        {
            tracing::warn!(
                "cannot write {}: {error}; the work goes on, and tries again with what is logged next",
                self.path.display()
            );
        }
    }

    /// Writes what waits, as far as the disk takes it.
    fn write(&mut self) -> io::Result<()> {
        while let Some(first) = self.waiting.front() {
            match self.file.write(&first[self.begun..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.begun += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.begun == first.len() {
                self.waiting.pop_front();
                self.begun = 0;
            }
        }
        Ok(())
    }

    fn finish(&mut self) {
        let written = self.write().and_then(|()| self.file.sync_all());
        let lost = self.given_up + self.waiting.len() as u64;
        let (content, path) = (self.content, self.path.display());
        match written {
            Err(error) => tracing::warn!("{lost} {content} are not in {path}: {error}"),
            Ok(()) if lost > 0 => {
                tracing::warn!("{lost} {content} are not in {path}, to which nothing could be written for a while")
            }
            Ok(()) => {}
        }
    }
}

/// Begins a file of TensorBoard events beside those of earlier starts; TensorBoard forgets what they say of
/// `first_step` and the steps after it.
///
/// Of `tensorboard-rs` it takes the records and summaries, not the writer, which runs in a thread that panics where
/// the disk fails and overwrites a file begun in the same second.
fn begin_events(folder: &Path, first_step: i64) -> Result<Appended> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    // TensorBoard reads files in the order of their names
    let (path, file) = (0..10_000)
        .map(|index| folder.join(format!("events.out.tfevents.{seconds:010}.{index:04}.lvdm")))
        .find_map(|path| match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
            opened => Some((path, opened)),
        })
        .ok_or_else(|| anyhow!("{} has 10,000 files of this second", folder.display()))?;
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
    let mut events = Appended::new(file, path, "TensorBoard events");

    let mut version = Event::new();
    version.set_file_version("brain.Event:2".to_string());
    events.add(record(version));
    let mut log = SessionLog::new();
    log.set_status(SessionLog_SessionStatus::START);
    let mut start = Event::new();
    start.set_step(first_step);
    start.set_session_log(log);
    events.add(record(start));
    Ok(events)
}

/// An event of this moment as it stands in a file of events.
fn record(mut event: Event) -> Vec<u8> {
    event.set_wall_time(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64()));
    let bytes = event.write_to_bytes().expect("an event has all that its format asks for");
    let mut whole = Vec::with_capacity(bytes.len() + 16);
    RecordWriter::new(&mut whole).write(&bytes).expect("memory takes all");
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(logger: &mut RunLogger, steps: std::ops::RangeInclusive<i64>) {
        for step in steps {
            logger.scalars(step, &[("loss", 1.0 / step as f64), ("learning_rate", 6e-5)]);
        }
    }

    #[test]
    fn a_resumed_log_equals_an_uninterrupted_one() {
        let folder = tempfile::tempdir().unwrap();
        let (through, broken) = (folder.path().join("through"), folder.path().join("broken"));
        let mut logger = RunLogger::open(&through, None).unwrap();
        log(&mut logger, 1..=10);
        logger.finish();

        let mut logger = RunLogger::open(&broken, None).unwrap();
        log(&mut logger, 1..=7);
        drop(logger);
        // killed in the middle of a line
        OpenOptions::new()
            .append(true)
            .open(broken.join(METRICS_FILE))
            .unwrap()
            .write_all(b"{\"step\":8,\"lo")
            .unwrap();
        let mut logger = RunLogger::open(&broken, Some(5)).unwrap();
        log(&mut logger, 6..=10);
        logger.finish();

        let read = |run: &Path| fs::read_to_string(run.join(METRICS_FILE)).unwrap();
        assert_eq!(read(&through), read(&broken));
        assert_eq!(read(&through).lines().count(), 10);
        // two starts within a second, two event files
        assert_eq!(fs::read_dir(broken.join(TENSORBOARD_FOLDER)).unwrap().count(), 2);
    }

    #[test]
    fn a_start_from_nothing_forgets_what_was_logged() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = RunLogger::open(folder.path(), None).unwrap();
        log(&mut logger, 1..=3);
        drop(logger);
        RunLogger::open(folder.path(), None).unwrap().finish();
        assert_eq!(fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap(), "");
    }

    #[test]
    fn what_is_not_finite_is_null() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = RunLogger::open(folder.path(), None).unwrap();
        logger.scalars(3, &[("a \"name\"", f64::NAN), ("b", f64::INFINITY), ("c", -0.25)]);
        logger.finish();
        let text = fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap();
        assert_eq!(text, "{\"step\":3,\"a \\\"name\\\"\":null,\"b\":null,\"c\":-0.25}\n");
        serde_json::from_str::<Value>(&text).unwrap();
    }

    #[test]
    fn errors_name_the_place() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let error = RunLogger::open(&folder.path().join("file"), None).err().unwrap();
        assert!(format!("{error:#}").contains("file/tensorboard"), "{error:#}");

        let mut logger = RunLogger::open(folder.path(), None).unwrap();
        assert!(logger.image_png(0, "grid", b"GIF89a", 1, 1).is_err());
        assert!(logger.gif(0, "clip", b"\x89PNG", 1, 1).is_err());
    }

    /// Power that fails leaves zeros in the middle of a file. The checkpoint is whole, and training goes on from it.
    #[test]
    fn damaged_lines_are_left_out_and_the_file_as_it_was_stays_beside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_FILE);
        let before = b"{\"step\":1}\n\0\0\0\n{\"step\":2}\nnonsense\n\xff\n{\"step\":3}\n{\"st";
        fs::write(&path, before).unwrap();
        RunLogger::open(folder.path(), Some(2)).unwrap().finish();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
        assert_eq!(fs::read(path.with_extension("jsonl.damaged")).unwrap(), before);
    }

    /// A disk that is full for a while: what could not be written is written when there is room, in order. One that
    /// stays full costs what does not fit into the memory set aside for it, and is counted.
    #[test]
    fn what_a_full_disk_does_not_take_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_FILE);
        let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut log = Appended::new(full(), path.clone(), "metrics");
        log.add(b"one\n".to_vec());
        log.add(b"two\n".to_vec());
        assert!(log.has_warned && log.waiting.len() == 2);
        log.file = File::create(&path).unwrap();
        log.add(b"three\n".to_vec());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\n");

        log.file = full();
        for _ in 0..20 {
            log.add(vec![b' '; 1 << 20]);
        }
        assert_eq!((log.waiting.len(), log.given_up), (16, 4));
    }
}
