//! Video files through FFmpeg: any frame by its number, and H.264 out.
//!
//! A reader first lists the presentation times of all packets, which decodes nothing and costs one
//! pass over the file. The list gives the true number of frames, tells a file that was cut off from
//! a whole one, and turns a frame's number into its time: after a seek, frames are picked by that
//! time, whatever order, key frame or frame rate the file has.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Once,
};

use anyhow::{Context, Result, bail, ensure};
use tch::Tensor;
use video_rs::ffmpeg::{
    self, Dictionary, Packet, Rational, codec, decoder, encoder, format,
    format::Pixel,
    frame::Video as RawFrame,
    media,
    software::scaling,
    util::error::{EAGAIN, Error},
};

use super::clip::{FrameSource, RgbFrame, window};
use crate::atomic_file::{publish, temporary_path};

fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // What FFmpeg prints about damaged files says no file name; our errors do.
        ffmpeg::util::log::set_level(ffmpeg::util::log::Level::Fatal);
        ffmpeg::init().expect("FFmpeg does not start");
    });
}

/// A video file, open for reading frames by number.
pub struct VideoReader {
    path: PathBuf,
    track: Track,
    timeline: Timeline,
    fps: f64,
    size: (usize, usize),
    scaler: Option<scaling::Context>,
}

/// The file's video stream and its decoder.
struct Track {
    input: format::context::Input,
    stream: usize,
    time_base: Rational,
    decoder: decoder::Video,
}

/// When frames are shown, in units of the stream's time base.
enum Timeline {
    /// Presentation times of all frames and of those that decoding can begin at, both ascending.
    Timed { frames: Vec<i64>, keys: Vec<i64> },
    /// The container knows no presentation times: frames are counted from the beginning.
    Counted(usize),
}

impl VideoReader {
    /// Opens a file and lists its frames.
    ///
    /// # Errors
    /// No such file, no video in it, damage, an end that comes before the container says.
    pub fn open(path: &Path) -> Result<Self> {
        prepare();
        Self::open_inner(path).with_context(|| format!("cannot read the video {}", path.display()))
    }

    fn open_inner(path: &Path) -> Result<Self> {
        let length = fs::metadata(path)?.len();
        ensure!(length > 0, "the file is empty");
        let mut track = Track::open(path)?;
        let stream = track.input.stream(track.stream).context("the video stream is gone")?;
        let rate =
            [stream.avg_frame_rate(), stream.rate()].map(f64::from).into_iter().find(|r| r.is_finite() && *r > 0.0);
        let fps = rate.context("the file says no frame rate")?;
        let size = (track.decoder.width() as usize, track.decoder.height() as usize);
        let timeline = track.timeline(fps)?;
        Ok(Self { path: path.to_path_buf(), track, timeline, fps, size, scaler: None })
    }

    /// How many frames the file has.
    pub fn frames(&self) -> i64 {
        match &self.timeline {
            Timeline::Timed { frames, .. } => frames.len() as i64,
            Timeline::Counted(count) => *count as i64,
        }
    }

    /// Frames a second, on average.
    pub fn fps(&self) -> f64 {
        self.fps
    }

    /// Pixels across.
    pub fn width(&self) -> usize {
        self.size.0
    }

    /// Pixels down.
    pub fn height(&self) -> usize {
        self.size.1
    }

    /// Frames `start`, `start + stride`, … in the order in which they are shown, `count` of them, at
    /// the file's own size.
    ///
    /// # Errors
    /// A window beyond the file; a damaged file.
    pub fn read(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        self.read_inner(start, count, stride)
            .with_context(|| format!("cannot read frames {start}, … of the video {}", self.path.display()))
    }

    /// Decodes the whole file. Formats without checksums, which is most, let a little damage inside a picture pass.
    ///
    /// # Errors
    /// Names the first damaged place.
    pub fn check(&mut self) -> Result<()> {
        self.check_inner().with_context(|| format!("the video {} is damaged", self.path.display()))
    }

    fn check_inner(&mut self) -> Result<()> {
        self.track = Track::open(&self.path)?;
        // else FFmpeg paints over what it cannot decode
        self.track.decoder.check(decoder::Check::EXPLODE);
        let (mut frame, mut count) = (RawFrame::empty(), 0);
        while self.track.decode(&mut frame).with_context(|| format!("after {count} frames"))? {
            ensure!(!frame.is_corrupt() && !frame.has_decode_errors(), "frame {count} of {}", self.frames());
            count += 1;
        }
        Ok(())
    }

    fn read_inner(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        let indices = window(self.frames(), start, count, stride)?;
        let Timeline::Timed { frames, keys } = &self.timeline else {
            let counts: Vec<i64> = indices.iter().map(|&i| i as i64).collect();
            return self.read_from_start(&counts);
        };
        let times: Vec<i64> = indices.iter().map(|&i| frames[i]).collect();
        // Frames shown before a key frame may be stored after it, so a seek to the wanted time itself could land too late.
        let key = keys[..keys.partition_point(|&key| key <= times[0])].last().copied();
        if let Some(key) = key
            && self.track.seek(key).is_ok()
            && let Ok(frames) = self.pick(&times, false)
        {
            return Ok(frames);
        }
        self.read_from_start(&times)
    }

    /// The slow and certain way, for files whose seeking goes astray.
    fn read_from_start(&mut self, times: &[i64]) -> Result<Vec<RgbFrame>> {
        self.track = Track::open(&self.path)?;
        self.pick(times, true)
    }

    /// Decodes onward and keeps the frames of these times. Where the stream has a packet but the
    /// decoder shows nothing new (`hold`), the frame before stays on the screen.
    fn pick(&mut self, times: &[i64], hold: bool) -> Result<Vec<RgbFrame>> {
        let counted = matches!(self.timeline, Timeline::Counted(_));
        let mut picked = Vec::with_capacity(times.len());
        let (mut frame, mut shown) = (RawFrame::empty(), RawFrame::empty());
        let mut count = 0;
        while picked.len() < times.len() {
            if !self.track.decode(&mut frame)? {
                bail!("the video ends after {count} decoded frames, before all that its container lists");
            }
            let time = if counted { count } else { frame.timestamp().context("a frame without a time")? };
            count += 1;
            while times.get(picked.len()).is_some_and(|&wanted| wanted < time) {
                ensure!(hold && count > 1, "frame at time {} is missing", times[picked.len()]);
                picked.push(self.convert(&shown)?);
            }
            if times.get(picked.len()) == Some(&time) {
                ensure!(!frame.is_corrupt() && !frame.has_decode_errors(), "the frame at time {time} is damaged");
                picked.push(self.convert(&frame)?);
            }
            std::mem::swap(&mut frame, &mut shown);
        }
        Ok(picked)
    }

    fn convert(&mut self, frame: &RawFrame) -> Result<RgbFrame> {
        let input =
            scaling::context::Definition { format: frame.format(), width: frame.width(), height: frame.height() };
        if self.scaler.as_ref().is_none_or(|scaler| *scaler.input() != input) {
            self.scaler = Some(scaler(frame.format(), Pixel::RGB24, frame.width(), frame.height())?);
        }
        let mut rgb = RawFrame::empty();
        self.scaler.as_mut().expect("made above").run(frame, &mut rgb)?;
        let (width, height) = (rgb.width() as usize, rgb.height() as usize);
        let rows = rgb.data(0).chunks(rgb.stride(0)).take(height);
        Ok(RgbFrame { width, height, pixels: rows.flat_map(|row| &row[..width * 3]).copied().collect() })
    }
}

impl FrameSource for VideoReader {
    fn frames(&self) -> i64 {
        self.frames()
    }

    fn read(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        self.read(start, count, stride)
    }
}

impl Track {
    fn open(path: &Path) -> Result<Self> {
        let input = format::input(path)?;
        let stream = input.streams().best(media::Type::Video).context("there is no video stream in it")?;
        let mut context = codec::Context::from_parameters(stream.parameters())?;
        context.set_time_base(stream.time_base());
        let decoder = context.decoder().video()?;
        ensure!(decoder.width() > 0 && decoder.height() > 0, "its pictures have no size");
        Ok(Self { stream: stream.index(), time_base: stream.time_base(), decoder, input })
    }

    /// Reads all packets, decoding none.
    fn timeline(&mut self, fps: f64) -> Result<Timeline> {
        let (mut frames, mut keys, mut untimed) = (Vec::new(), Vec::new(), 0);
        let mut packet = Packet::empty();
        loop {
            match packet.read(&mut self.input) {
                Ok(()) => {}
                Err(Error::Eof) => break,
                Err(error) => bail!("the file is damaged or cut off after {} frames: {error}", frames.len() + untimed),
            }
            if packet.stream() != self.stream {
                continue;
            }
            ensure!(!packet.is_corrupt(), "the file is damaged or cut off after {} frames", frames.len() + untimed);
            match packet.pts() {
                Some(time) => {
                    frames.push(time);
                    keys.extend(packet.is_key().then_some(time));
                }
                None => untimed += 1,
            }
        }
        let count = frames.len() + untimed;
        ensure!(count > 0, "it holds no frames");
        frames.sort_unstable();
        keys.sort_unstable();

        // A cut file ends as quietly as a whole one. Some whole files list frames that an edit list
        // hides, so the missing ones must show in the duration too.
        let stream = self.input.stream(self.stream).context("the video stream is gone")?;
        let promised = stream.frames();
        let frame = 1.0 / (fps * f64::from(self.time_base));
        let shown = match (frames.first(), frames.last()) {
            (Some(first), Some(last)) if untimed == 0 => (last - first) as f64 + frame,
            _ => count as f64 * frame,
        };
        let short = shown < stream.duration() as f64 - 1.5 * frame || stream.duration() <= 0;
        ensure!(
            promised <= count as i64 || !(short || untimed > 0),
            "the file is cut off: it promises {promised} frames and holds {count}"
        );
        if untimed > 0 {
            return Ok(Timeline::Counted(count));
        }
        if self.input.format().name().contains("mov") {
            // An edit list keeps what leads up to its beginning at negative times, not to be shown.
            frames.retain(|&time| time >= 0);
        }
        frames.dedup();
        Ok(Timeline::Timed { frames, keys })
    }

    /// Goes to the key frame shown at `time`, or before it.
    fn seek(&mut self, time: i64) -> Result<()> {
        let microseconds = (time as f64 * f64::from(self.time_base) * 1e6).ceil() as i64;
        self.input.seek(microseconds, ..microseconds)?;
        self.decoder.flush();
        Ok(())
    }

    /// The next frame in the order of presentation; false at the end.
    fn decode(&mut self, frame: &mut RawFrame) -> Result<bool> {
        let mut packet = Packet::empty();
        loop {
            match self.decoder.receive_frame(frame) {
                Ok(()) => return Ok(true),
                Err(Error::Eof) => return Ok(false),
                Err(Error::Other { errno: EAGAIN }) => {}
                Err(error) => return Err(error.into()),
            }
            match packet.read(&mut self.input) {
                Ok(()) if packet.stream() == self.stream => self.decoder.send_packet(&packet)?,
                Ok(()) => {}
                Err(Error::Eof) => self.decoder.send_eof()?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Conversion between pixel formats at one size, with full chroma interpolation.
fn scaler(from: Pixel, to: Pixel, width: u32, height: u32) -> Result<scaling::Context> {
    use scaling::Flags;
    let flags = Flags::BICUBIC | Flags::ACCURATE_RND | Flags::FULL_CHR_H_INT | Flags::FULL_CHR_H_INP | Flags::BITEXACT;
    Ok(scaling::Context::get(from, width, height, to, width, height, flags)?)
}

/// How frames are stored.
struct Encoding {
    container: &'static str,
    codec: &'static str,
    options: &'static [(&'static str, &'static str)],
}

const H264: Encoding = Encoding {
    container: "mp4",
    codec: "libx264",
    // x264's macroblock tree (release 164) reads memory that it never wrote: with it, equal frames
    // give files that differ from run to run.
    options: &[("crf", "12"), ("preset", "medium"), ("threads", "1"), ("x264-params", "mbtree=0")],
};

/// A key frame at least this often: a random clip decodes few frames that it does not need.
const KEY_FRAME_EVERY: u32 = 24;

/// Writes one H.264 file, frame by frame. It appears under its name when `finish` has returned;
/// dropping an unfinished writer leaves nothing.
pub struct VideoWriter {
    path: PathBuf,
    temporary: PathBuf,
    output: format::context::Output,
    encoder: encoder::video::Encoder,
    scaler: scaling::Context,
    time_base: Rational,
    size: (usize, usize),
    frames: i64,
    done: bool,
}

impl VideoWriter {
    /// An mp4 file (H.264, 4:2:0, visually lossless) of `fps` frames a second.
    ///
    /// # Errors
    /// An odd or empty size, which 4:2:0 pictures cannot have; a folder that cannot be written.
    pub fn create(path: &Path, width: usize, height: usize, fps: f64) -> Result<Self> {
        Self::create_as(path, width, height, fps, &H264)
    }

    fn create_as(path: &Path, width: usize, height: usize, fps: f64, encoding: &Encoding) -> Result<Self> {
        prepare();
        let name = path.display();
        ensure!(
            width > 0 && height > 0 && width.is_multiple_of(2) && height.is_multiple_of(2),
            "cannot write {name}: H.264 in 4:2:0 needs even sides, the frames are {width}×{height}; choose an even resolution"
        );
        ensure!(fps.is_finite() && (0.01..=1000.0).contains(&fps), "cannot write {name}: {fps} frames a second");
        let temporary = temporary_path(path)?;
        Self::start(path, &temporary, (width, height), fps, encoding)
            .inspect_err(|_| drop(fs::remove_file(&temporary)))
            .with_context(|| format!("cannot write the video {name}"))
    }

    fn start(
        path: &Path,
        temporary: &Path,
        size: (usize, usize),
        fps: f64,
        Encoding { container, codec, options }: &Encoding,
    ) -> Result<Self> {
        let mut output = format::output_as(temporary, container)?;
        let codec = encoder::find_by_name(codec).with_context(|| format!("this FFmpeg has no encoder {codec}"))?;
        let time_base = Rational::new(1000, (fps * 1000.0).round() as i32).reduce();
        let (width, height) = (size.0 as u32, size.1 as u32);
        let mut context = codec::Context::new_with_codec(codec).encoder().video()?;
        context.set_width(width);
        context.set_height(height);
        context.set_format(Pixel::YUV420P);
        context.set_time_base(time_base);
        context.set_frame_rate(Some(time_base.invert()));
        context.set_gop(KEY_FRAME_EVERY);
        // What the conversion from RGB below does, said so that players undo it.
        context.set_colorspace(ffmpeg::color::Space::SMPTE170M);
        context.set_color_range(ffmpeg::color::Range::MPEG);
        if output.format().flags().contains(format::flag::Flags::GLOBAL_HEADER) {
            context.set_flags(codec::Flags::GLOBAL_HEADER);
        }
        let mut settings = Dictionary::new();
        for (key, value) in *options {
            settings.set(key, value);
        }
        let encoder = context.open_with(settings)?;
        let mut stream = output.add_stream_with(&encoder)?;
        stream.set_time_base(time_base);
        stream.set_avg_frame_rate(time_base.invert());
        // The index goes to the front of an mp4, so that it plays before it is all there.
        let mut layout = Dictionary::new();
        layout.set("movflags", "+faststart");
        output.write_header_with(layout)?;
        Ok(Self {
            path: path.to_path_buf(),
            temporary: temporary.to_path_buf(),
            output,
            encoder,
            scaler: scaler(Pixel::RGB24, Pixel::YUV420P, width, height)?,
            time_base,
            size,
            frames: 0,
            done: false,
        })
    }

    /// Adds a frame. It must have the size given to `create`.
    ///
    /// # Errors
    /// A frame of another size; what the encoder says.
    pub fn write(&mut self, frame: &RgbFrame) -> Result<()> {
        let (width, height) = self.size;
        ensure!(
            (frame.width, frame.height) == self.size && frame.pixels.len() == width * height * 3,
            "a frame of {}×{} for the video {}, which is {width}×{height}",
            frame.width,
            frame.height,
            self.path.display()
        );
        let mut rgb = RawFrame::new(Pixel::RGB24, width as u32, height as u32);
        let stride = rgb.stride(0);
        for (to, from) in rgb.data_mut(0).chunks_mut(stride).zip(frame.pixels.chunks(width * 3)) {
            to[..width * 3].copy_from_slice(from);
        }
        let mut yuv = RawFrame::empty();
        self.scaler.run(&rgb, &mut yuv)?;
        yuv.set_pts(Some(self.frames));
        self.frames += 1;
        self.encoder
            .send_frame(&yuv)
            .map_err(anyhow::Error::from)
            .and_then(|()| self.pass_on())
            .with_context(|| self.failure())
    }

    /// Adds the frames of a piece of a video, unsigned bytes `[3, f, H, W]`, to a writer that the first piece makes.
    ///
    /// # Errors
    /// As `create` and `write`.
    pub fn append(writer: &mut Option<Self>, path: &Path, piece: &Tensor, fps: f64) -> Result<()> {
        let size = piece.size();
        ensure!(size.len() == 4 && size[0] == 3, "a piece of a video is [3, f, H, W]; this one is {size:?}");
        let writer = match writer {
            Some(writer) => writer,
            None => writer.insert(Self::create(path, size[3] as usize, size[2] as usize, fps)?),
        };
        (0..size[1]).try_for_each(|f| writer.write(&RgbFrame::from_tensor(&piece.select(1, f).permute([1, 2, 0]))?))
    }

    /// Brings the file to the disk under its name.
    ///
    /// # Errors
    /// What the encoder says; a full disk.
    pub fn finish(mut self) -> Result<()> {
        ensure!(self.frames > 0, "no frames were written to the video {}", self.path.display());
        let finished = (|| {
            self.encoder.send_eof()?;
            self.pass_on()?;
            self.output.write_trailer()?;
            publish(&self.temporary, &self.path)
        })();
        self.done = finished.is_ok();
        finished.with_context(|| self.failure())
    }

    /// Moves what the encoder has finished into the file.
    fn pass_on(&mut self) -> Result<()> {
        let mut packet = Packet::empty();
        let stream = self.output.stream(0).context("the stream is gone")?.time_base();
        loop {
            match self.encoder.receive_packet(&mut packet) {
                Ok(()) => {}
                Err(Error::Eof | Error::Other { errno: EAGAIN }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            packet.set_stream(0);
            // Without it the container gives the last frame no time to be shown, and readers drop it.
            packet.set_duration(1);
            packet.rescale_ts(self.time_base, stream);
            packet.write_interleaved(&mut self.output)?;
        }
    }

    fn failure(&self) -> String {
        format!("cannot write the video {}", self.path.display())
    }
}

impl Drop for VideoWriter {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes one clip, unsigned bytes `[3, F, H, W]`, as an mp4 file.
///
/// # Errors
/// An odd or empty size; a full disk.
pub fn write_video(path: &Path, clip: &Tensor, fps: f64) -> Result<()> {
    let mut writer = None;
    VideoWriter::append(&mut writer, path, clip, fps)?;
    writer.context("a clip without a shape")?.finish()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, path::Path};

    use rand::RngExt;

    use super::*;
    use crate::random::{Purpose, stream};

    const MPEG4: Encoding = Encoding { container: "avi", codec: "mpeg4", options: &[("qscale", "2"), ("bf", "0")] };
    const MPEG4_B: Encoding = Encoding { container: "avi", codec: "mpeg4", options: &[("qscale", "2"), ("bf", "2")] };
    const VP9: Encoding =
        Encoding { container: "webm", codec: "libvpx-vp9", options: &[("crf", "15"), ("b", "0"), ("cpu-used", "8")] };
    const LONG_GOP: Encoding = Encoding {
        container: "mp4",
        codec: "libx264",
        options: &[("crf", "12"), ("g", "250"), ("bf", "3"), ("open_gop", "1")],
    };

    /// The frame's number is written in eight black or white fields, so that neighbours differ plainly.
    fn numbered(number: i64, width: usize, height: usize) -> RgbFrame {
        let bit = |x: usize| if number >> (x * 10 / width) & 1 == 1 { 235 } else { 20 };
        let row: Vec<u8> = (0..width).flat_map(|x| [bit(x); 3]).collect();
        RgbFrame { width, height, pixels: row.repeat(height) }
    }

    fn number(frame: &RgbFrame) -> i64 {
        let y = frame.height / 2;
        let field = |i: usize| frame.pixels[(y * frame.width + (2 * i + 1) * frame.width / 20) * 3];
        (0..10).map(|i| i64::from(field(i) > 127) << i).sum()
    }

    fn write_numbered(path: &Path, frames: i64, encoding: &Encoding) {
        let mut writer = VideoWriter::create_as(path, 160, 48, 12.5, encoding).unwrap();
        for i in 0..frames {
            writer.write(&numbered(i, 160, 48)).unwrap();
        }
        writer.finish().unwrap();
    }

    /// A short real H.264 file for the tests of other modules.
    pub fn write_test_video(path: &Path, frames: i64) {
        write_numbered(path, frames, &H264);
    }

    #[test]
    fn any_window_of_any_container_is_exact() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [("a.mp4", &H264), ("b.mp4", &LONG_GOP), ("c.avi", &MPEG4), ("d.avi", &MPEG4_B), ("e.webm", &VP9)];
        for (name, encoding) in cases {
            if encoder::find_by_name(encoding.codec).is_none() {
                eprintln!("{name} is not tested: this FFmpeg has no encoder {}", encoding.codec);
                continue;
            }
            let path = folder.path().join(name);
            write_numbered(&path, 101, encoding);
            let mut reader = VideoReader::open(&path).unwrap();
            assert_eq!((reader.frames(), reader.width(), reader.height()), (101, 160, 48), "{name}");
            assert!((reader.fps() - 12.5).abs() < 0.01, "{name}: {}", reader.fps());
            // Other readers go by the duration: a last frame without one is lost to them.
            let duration = format::input(&path).unwrap().duration() as f64 / 1e6;
            assert!((duration - 101.0 / 12.5).abs() < 0.005, "{name}: {duration} s");
            let mut generator = stream(1, Purpose::Crop, 0, 0);
            for window in 0..25 {
                let (count, stride) = (generator.random_range(1..6), generator.random_range(1..5));
                let last = 101 - ((count - 1) * stride + 1);
                let start = if window == 0 { last } else { generator.random_range(0..=last) };
                let found: Vec<i64> = reader.read(start, count, stride).unwrap().iter().map(number).collect();
                let expected: Vec<i64> = (0..count).map(|i| start + i * stride).collect();
                assert_eq!(found, expected, "{name}");
            }
            assert_eq!(number(&reader.read(100, 1, 1).unwrap()[0]), 100, "{name}: the last frame");
            assert!(reader.read(99, 3, 1).is_err() && reader.read(-1, 1, 1).is_err());
        }
    }

    #[test]
    fn equal_frames_give_equal_files() {
        let folder = tempfile::tempdir().unwrap();
        let ramp = |i: usize| (0..64 * 64 * 3).map(|p| ((p / 3 % 64 * 5 + p / 192 * 3 + i * 11) % 199) as u8).collect();
        let write = |run: usize| {
            let path = folder.path().join("a.mp4");
            let mut writer = VideoWriter::create(&path, 64, 64, 12.0).unwrap();
            let _other_memory: Vec<Vec<u8>> = (0..20).map(|k| vec![(run * 37 + k) as u8; 1000 + 150 * k]).collect();
            for i in 0..12 {
                writer.write(&RgbFrame { width: 64, height: 64, pixels: ramp(i) }).unwrap();
            }
            writer.finish().unwrap();
            fs::read(&path).unwrap()
        };
        let first = write(0);
        assert!((1..20).all(|run| write(run) == first));
    }

    #[test]
    fn colours_survive() {
        let path = tempfile::tempdir().unwrap().keep().join("colour.mp4");
        let colours = [[200, 30, 40], [30, 180, 60], [40, 60, 220], [128, 128, 128]];
        let pixels: Vec<u8> = (0..32 * 32).flat_map(|i| colours[i % 32 / 8]).collect();
        let mut writer = VideoWriter::create(&path, 32, 32, 8.0).unwrap();
        writer.write(&RgbFrame { width: 32, height: 32, pixels }).unwrap();
        writer.finish().unwrap();
        let frame = VideoReader::open(&path).unwrap().read(0, 1, 1).unwrap().remove(0);
        for (i, colour) in colours.iter().enumerate() {
            let at = (16 * 32 + i * 8 + 4) * 3;
            let found = &frame.pixels[at..at + 3];
            assert!(found.iter().zip(colour).all(|(&a, &b)| a.abs_diff(b) <= 6), "{found:?} for {colour:?}");
        }
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn broken_files_are_errors_at_opening() {
        let folder = tempfile::tempdir().unwrap();
        let (empty, noise) = (folder.path().join("empty.mp4"), folder.path().join("noise.mp4"));
        fs::write(&empty, []).unwrap();
        fs::write(&noise, vec![77; 5000]).unwrap();
        let fast_start = Encoding { container: "mp4", codec: "libx264", options: &[("crf", "12")] };
        let mut files = vec![folder.path().join("missing.mp4"), empty, noise];
        for (name, encoding) in [("h264.mp4", &fast_start), ("mpeg4.avi", &MPEG4), ("mpeg4b.avi", &MPEG4_B)] {
            let path = folder.path().join(name);
            write_numbered(&path, 60, encoding);
            let bytes = fs::read(&path).unwrap();
            if encoding.container == "avi" {
                // Cut between two frames nothing is damaged: only the count tells.
                let frames: Vec<usize> =
                    (0..bytes.len() - 4).filter(|&i| bytes[i..].starts_with(b"00dc")).take(60).collect();
                fs::write(&path, &bytes[..frames[30]]).unwrap();
                let inside = folder.path().join(format!("inside-{name}"));
                fs::write(&inside, &bytes[..frames[30] + 20]).unwrap();
                files.push(inside);
            } else {
                fs::write(&path, &bytes[..bytes.len() * 6 / 10]).unwrap();
            }
            files.push(path);
        }
        for path in files {
            let error = VideoReader::open(&path).err().unwrap_or_else(|| panic!("{} opened", path.display()));
            assert!(format!("{error:#}").contains(path.to_str().unwrap()), "{error:#}");
        }
    }

    /// Damage behind the first frame and before the last one: opening tells nothing, decoding all does.
    #[test]
    fn damage_inside_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for (name, encoding) in [("h264.mp4", &LONG_GOP), ("mpeg4.avi", &MPEG4), ("mpeg4b.avi", &MPEG4_B)] {
            let path = folder.path().join(name);
            let mut generator = stream(2, Purpose::Crop, 0, 0);
            let mut writer = VideoWriter::create_as(&path, 64, 64, 12.0, encoding).unwrap();
            for _ in 0..40 {
                let pixels = (0..64 * 64 * 3).map(|_| generator.random()).collect();
                writer.write(&RgbFrame { width: 64, height: 64, pixels }).unwrap();
            }
            writer.finish().unwrap();
            VideoReader::open(&path).unwrap().check().unwrap();
            let mut bytes = fs::read(&path).unwrap();
            // lost blocks; in an avi inside one frame, so that the container is whole
            let chunks: Vec<usize> = (0..bytes.len() - 4).filter(|&i| bytes[i..].starts_with(b"00dc")).collect();
            let at = chunks.get(20).map_or(bytes.len() / 2, |frame| frame + 1000);
            let length = if chunks.is_empty() { bytes.len() / 8 } else { 512 };
            bytes[at..at + length].fill(0);
            fs::write(&path, &bytes).unwrap();
            let mut reader = VideoReader::open(&path).unwrap();
            reader.read(0, 1, 1).unwrap();
            let error = format!("{:#}", reader.check().expect_err(name));
            assert!(error.contains(name) && error.contains("damaged"), "{error}");
        }
    }

    #[test]
    fn odd_sizes_and_wrong_frames_are_refused_and_leave_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.mp4");
        let error = VideoWriter::create(&path, 33, 32, 8.0).err().unwrap().to_string();
        assert!(error.contains("even") && error.contains("33×32"), "{error}");
        let mut writer = VideoWriter::create(&path, 32, 32, 8.0).unwrap();
        writer.write(&numbered(0, 32, 32)).unwrap();
        assert!(writer.write(&numbered(0, 32, 30)).is_err());
        drop(writer);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
