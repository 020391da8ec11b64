//! What a run records: `metrics.jsonl` and TensorBoard events, the same figures in both.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
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

/// The file of figures in a run folder, one JSON object a line.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The folder of TensorBoard events in a run folder.
pub const TENSORBOARD_FOLDER: &str = "tensorboard";

/// Writes what happens in a run. Everything logged is on its way to the disk when a call returns.
pub struct RunLogger {
    metrics: File,
    metrics_path: PathBuf,
    events: EventFile,
}

impl RunLogger {
    /// Opens the log of a run folder, which is made where it is missing.
    ///
    /// `resume_step` is the last step of the checkpoint that training goes on from, `None` at a start
    /// from nothing. What an earlier start logged beyond it is dropped from `metrics.jsonl` and hidden
    /// by TensorBoard, so that the log reads as that of a run never interrupted.
    ///
    /// # Errors
    /// A folder that cannot be made or written; a line of `metrics.jsonl`, other than one cut off at
    /// the end, that is not an object with a `step`.
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
        let events = EventFile::create(&folder, resume_step.map_or(0, |step| step + 1))?;
        Ok(RunLogger { metrics, metrics_path, events })
    }

    /// Logs figures of one step. A value that is not finite is `null` in `metrics.jsonl`.
    ///
    /// # Errors
    /// The disk's.
    pub fn scalars(&mut self, step: i64, values: &[(&str, f64)]) -> Result<()> {
        let mut line = format!("{{\"step\":{step}");
        for (name, value) in values {
            // json! turns what is not finite into null
            line += &format!(",{}:{}", json!(name), json!(value));
        }
        line += "}\n";
        self.metrics
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write {}", self.metrics_path.display()))?;
        for (name, value) in values {
            self.events.summary(step, scalar(name, *value as f32))?;
        }
        self.events.flush()
    }

    /// Logs a picture, given as the bytes of a PNG file and its size in pixels.
    ///
    /// # Errors
    /// Bytes that are no PNG; the disk's.
    pub fn image_png(&mut self, step: i64, tag: &str, png: &[u8], width: i32, height: i32) -> Result<()> {
        if !png.starts_with(b"\x89PNG\r\n\x1a\n") {
            bail!("the picture `{tag}` is not a PNG file");
        }
        self.picture(step, tag, png, width, height)
    }

    /// Logs a moving picture, given as the bytes of a GIF file: TensorBoard's image tab plays it.
    ///
    /// # Errors
    /// Bytes that are no GIF; the disk's.
    pub fn gif(&mut self, step: i64, tag: &str, gif: &[u8], width: i32, height: i32) -> Result<()> {
        if !gif.starts_with(b"GIF8") {
            bail!("the moving picture `{tag}` is not a GIF file");
        }
        self.picture(step, tag, gif, width, height)
    }

    /// Writes what is left and waits for the disk.
    ///
    /// # Errors
    /// The disk's.
    pub fn finish(mut self) -> Result<()> {
        self.metrics.sync_all().with_context(|| format!("cannot write {}", self.metrics_path.display()))?;
        self.events.flush()?;
        self.events.file.sync_all().with_context(|| format!("cannot write {}", self.events.path.display()))
    }

    fn picture(&mut self, step: i64, tag: &str, bytes: &[u8], width: i32, height: i32) -> Result<()> {
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
        self.events.summary(step, summary)?;
        self.events.flush()
    }
}

/// Drops the lines of a metrics file that lie beyond `last` (all where it is `None`).
fn keep_up_to(path: &Path, last: Option<i64>) -> Result<()> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut kept = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if !line.ends_with('\n') {
            break; // cut off when the run was stopped
        }
        let object: Option<Map<String, Value>> = serde_json::from_str(line).ok();
        let step = object.and_then(|object| object.get("step")?.as_i64()).ok_or_else(|| {
            anyhow!("{}, line {}: not a JSON object with a `step`; mend or remove the file", path.display(), index + 1)
        })?;
        if last.is_some_and(|last| step <= last) {
            kept += line;
        }
    }
    if kept.len() < text.len() {
        let partial = path.with_extension("jsonl.partial");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&partial)?;
            file.write_all(kept.as_bytes())?;
            file.sync_all()?;
            fs::rename(&partial, path)
        };
        write().with_context(|| format!("cannot rewrite {}", path.display()))?;
    }
    Ok(())
}

/// One file of TensorBoard events.
///
/// Of `tensorboard-rs` it takes the records and summaries, not the writer, which runs in a thread that
/// panics where the disk fails and overwrites a file begun in the same second.
struct EventFile {
    records: RecordWriter<BufWriter<File>>,
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Begins a file beside those of earlier starts; TensorBoard forgets what they say of `first_step`
    /// and the steps after it.
    fn create(folder: &Path, first_step: i64) -> Result<Self> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        // TensorBoard reads files in the order of their names
        let (path, file) = (0..10_000)
            .map(|index| folder.join(format!("events.out.tfevents.{seconds:010}.{index:04}.lvdm")))
            .find_map(|path| match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => None,
                opened => Some((path, opened)),
            })
            .ok_or_else(|| anyhow!("{} has 10,000 files of this second", folder.display()))?;
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        let handle = file.try_clone().with_context(|| format!("cannot write {}", path.display()))?;
        let mut events = EventFile { records: RecordWriter::new(BufWriter::new(handle)), file, path };

        let mut version = Event::new();
        version.set_file_version("brain.Event:2".to_string());
        events.write(version)?;
        let mut log = SessionLog::new();
        log.set_status(SessionLog_SessionStatus::START);
        let mut start = Event::new();
        start.set_step(first_step);
        start.set_session_log(log);
        events.write(start)?;
        events.flush()?;
        Ok(events)
    }

    fn summary(&mut self, step: i64, summary: Summary) -> Result<()> {
        let mut event = Event::new();
        event.set_step(step);
        event.set_summary(summary);
        self.write(event)
    }

    fn write(&mut self, mut event: Event) -> Result<()> {
        event.set_wall_time(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64()));
        let bytes = event.write_to_bytes()?;
        self.records.write(&bytes).with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn flush(&mut self) -> Result<()> {
        self.records.flush().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(logger: &mut RunLogger, steps: std::ops::RangeInclusive<i64>) {
        for step in steps {
            logger.scalars(step, &[("loss", 1.0 / step as f64), ("learning_rate", 6e-5)]).unwrap();
        }
    }

    #[test]
    fn a_resumed_log_equals_an_uninterrupted_one() {
        let folder = tempfile::tempdir().unwrap();
        let (through, broken) = (folder.path().join("through"), folder.path().join("broken"));
        let mut logger = RunLogger::open(&through, None).unwrap();
        log(&mut logger, 1..=10);
        logger.finish().unwrap();

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
        logger.finish().unwrap();

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
        RunLogger::open(folder.path(), None).unwrap().finish().unwrap();
        assert_eq!(fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap(), "");
    }

    #[test]
    fn what_is_not_finite_is_null() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = RunLogger::open(folder.path(), None).unwrap();
        logger.scalars(3, &[("a \"name\"", f64::NAN), ("b", f64::INFINITY), ("c", -0.25)]).unwrap();
        logger.finish().unwrap();
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

        fs::write(folder.path().join(METRICS_FILE), "{\"step\":1}\nnonsense\n").unwrap();
        let error = RunLogger::open(folder.path(), Some(1)).err().unwrap();
        assert!(format!("{error:#}").contains("metrics.jsonl, line 2"), "{error:#}");

        fs::remove_file(folder.path().join(METRICS_FILE)).unwrap();
        let mut logger = RunLogger::open(folder.path(), None).unwrap();
        assert!(logger.image_png(0, "grid", b"GIF89a", 1, 1).is_err());
        assert!(logger.gif(0, "clip", b"\x89PNG", 1, 1).is_err());
    }
}
