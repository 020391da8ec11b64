//! Reading frames by their number.
//!
//! A reader first lists the presentation times of all packets, which decodes nothing and costs one pass over the file,
//! unless the list is known from before. The list gives the true number of frames, shows whether the file was cut off, and
//! turns a frame's number into its time: after a seek, frames are picked by that time, whatever order, key frame or frame
//! rate the file has.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use video_rs::ffmpeg::{
    Packet, Rational, codec, decoder, format,
    frame::Video as RawFrame,
    media,
    util::error::{EAGAIN, Error},
};

use super::{
    prepare,
    shown::{Orientation, Screen},
    timeline::{Timeline, Times, timeline_of},
};
use crate::{
    data::clip::{FrameSource, RgbFrame, window},
    ffmpeg::{is_hidden, listed_packets, open_input},
};

/// A video file, open for reading frames by number.
pub struct VideoReader {
    path: PathBuf,
    track: Track,
    timeline: Arc<Timeline>,
    fps: f64,
    size: (usize, usize),
    screen: Screen,
}

/// The file's video stream and its decoder.
struct Track {
    input: format::context::Input,
    stream: usize,
    time_base: Rational,
    /// What the container says.
    orientation: Option<Orientation>,
    decoder: decoder::Video,
    /// Whether a packet was decoded that is not to be shown.
    has_hidden: bool,
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
        let file = fs::metadata(path)?;
        ensure!(file.len() > 0, "the file is empty");
        let mut track = Track::open(path)?;
        let stream = track.input.stream(track.stream).context("the video stream is gone")?;
        let rate =
            [stream.avg_frame_rate(), stream.rate()].map(f64::from).into_iter().find(|r| r.is_finite() && *r > 0.0);
        let fps = rate.context("the file says no frame rate")?;
        let stored = (track.decoder.width() as usize, track.decoder.height() as usize);
        let size = track.orientation.map_or(stored, |orientation| orientation.shown(stored));
        let timeline = timeline_of(path, &file, || track.timeline(fps))?;
        Ok(Self { path: path.to_path_buf(), track, timeline, fps, size, screen: Screen::default() })
    }

    /// How many frames the file has.
    pub fn frames(&self) -> i64 {
        match &*self.timeline {
            Timeline::Timed { frames, .. } => frames.len() as i64,
            Timeline::Counted(count) => *count as i64,
        }
    }

    /// Frames a second, on average.
    pub fn fps(&self) -> f64 {
        self.fps
    }

    /// Pixels across, as the video is shown: one that was filmed on its side is turned.
    pub fn width(&self) -> usize {
        self.size.0
    }

    /// Pixels down, as the video is shown.
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
        // else FFmpeg paints over what it cannot decode
        match self.decode_all(decoder::Check::EXPLODE) {
            // An edit list lets decoding begin where there is something that refers to frames before.
            Err(_) if self.track.has_hidden => self.decode_all(decoder::Check::empty()),
            done => done,
        }
    }

    fn decode_all(&mut self, check: decoder::Check) -> Result<()> {
        self.track = Track::open(&self.path)?;
        self.track.decoder.check(check);
        let (mut frame, mut count) = (RawFrame::empty(), 0);
        while self.track.decode(&mut frame).with_context(|| format!("after {count} frames"))? {
            ensure!(!frame.is_corrupt() && !frame.has_decode_errors(), "frame {count} of {}", self.frames());
            count += 1;
        }
        Ok(())
    }

    fn read_inner(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        let indices = window(self.frames(), start, count, stride)?;
        let timeline = self.timeline.clone();
        let Timeline::Timed { frames, keys } = &*timeline else {
            let counts: Vec<i64> = indices.iter().map(|&i| i as i64).collect();
            return self.read_from_start(&counts);
        };
        let times: Vec<i64> = indices.iter().map(|&i| frames.at(i)).collect();
        // Frames shown before a key frame may be stored after it, so a seek to the wanted time itself could land too late.
        if let Some(key) = keys.last_until(times[0])
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
        let counted = matches!(*self.timeline, Timeline::Counted(_));
        let mut picked: Vec<RgbFrame> = Vec::with_capacity(times.len());
        // the frame before, unless it was picked last
        let mut before = None;
        let (mut orientation, mut count) = (self.track.orientation, 0);
        while picked.len() < times.len() {
            let mut frame = RawFrame::empty();
            if !self.track.decode(&mut frame)? {
                bail!("the video ends after {count} decoded frames, before all that its container lists");
            }
            let time = if counted { count } else { frame.timestamp().context("a frame without a time")? };
            count += 1;
            let shown_before = orientation;
            // the coded video says it at a key frame, for all frames up to the next one
            orientation = match Orientation::of_frame(&frame) {
                Some(said) => Some(said),
                None if frame.is_key() => self.track.orientation,
                None => orientation,
            };
            while times.get(picked.len()).is_some_and(|&wanted| wanted < time) {
                let seconds = times[picked.len()] as f64 * f64::from(self.track.time_base);
                ensure!(hold && count > 1, "nothing can be shown at {seconds:.2} s: there is no key frame before it");
                picked.push(match before.take() {
                    Some(mut frame) => self.screen.show(&mut frame, shown_before)?,
                    None => picked.last().context("no frame was shown yet")?.clone(),
                });
            }
            before = Some(frame);
            if times.get(picked.len()) == Some(&time)
                && let Some(mut frame) = before.take()
            {
                ensure!(!frame.is_corrupt() && !frame.has_decode_errors(), "the frame at time {time} is damaged");
                picked.push(self.screen.show(&mut frame, orientation)?);
            }
        }
        Ok(picked)
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
        let input = open_input(path)?;
        let stream = input.streams().best(media::Type::Video).context("there is no video stream in it")?;
        let orientation = Orientation::of_stream(&stream);
        let mut context = codec::Context::from_parameters(stream.parameters())?;
        context.set_time_base(stream.time_base());
        let decoder = context.decoder().video()?;
        ensure!(decoder.width() > 0 && decoder.height() > 0, "its pictures have no size");
        let (stream, time_base) = (stream.index(), stream.time_base());
        Ok(Self { stream, time_base, orientation, decoder, has_hidden: false, input })
    }

    /// Reads all packets, decoding none. Those that an edit list hides are no frames, but decoding can begin at them.
    fn timeline(&mut self, fps: f64) -> Result<Timeline> {
        let (mut frames, mut keys, mut untimed, mut hidden) = (Vec::new(), Vec::new(), 0, 0);
        // Where frames are spliced, decoding times fall back; presentation times should not.
        let (mut decoded, mut latest, mut spliced_from, mut overlap) = (i64::MIN, i64::MIN, i64::MIN, false);
        let stream = self.input.stream(self.stream).context("the video stream is gone")?;
        let is_mov = self.input.format().name().contains("mov");
        // before packets are read: other containers list those that were
        let promised = if is_mov { stream.frames().min(listed_packets(&stream)) } else { stream.frames() };
        let mut packet = Packet::empty();
        loop {
            let count = frames.len() + untimed;
            match packet.read(&mut self.input) {
                Ok(()) => {}
                Err(Error::Eof) => break,
                Err(error) => bail!("the file is damaged or cut off after {count} frames: {error}"),
            }
            if packet.stream() != self.stream {
                continue;
            }
            ensure!(!packet.is_corrupt(), "the file is damaged or cut off after {count} frames");
            keys.extend(packet.pts().filter(|_| packet.is_key()));
            if packet.dts().is_some_and(|dts| dts < decoded) {
                spliced_from = latest;
            }
            decoded = packet.dts().unwrap_or(decoded);
            match packet.pts() {
                _ if is_hidden(&packet) => hidden += 1,
                Some(time) => {
                    overlap |= spliced_from > i64::MIN && time <= spliced_from;
                    latest = latest.max(time);
                    frames.push(time);
                }
                None => untimed += 1,
            }
        }
        let count = frames.len() + untimed;
        ensure!(count > 0, "it holds no frames");
        frames.sort_unstable();
        keys.sort_unstable();

        // A cut file ends as quietly as a whole one. Some whole files list frames that an edit list
        // leaves out, so the missing ones must show in the duration too.
        let stream = self.input.stream(self.stream).context("the video stream is gone")?;
        let frame = 1.0 / (fps * f64::from(self.time_base));
        // an edit list can begin with a pause, which counts
        let begin = if is_mov { frames.first().min(Some(&0)) } else { frames.first() };
        let shown = match (begin, frames.last()) {
            (Some(first), Some(last)) if untimed == 0 => (last - first) as f64 + frame,
            _ => count as f64 * frame,
        };
        let short = shown < stream.duration() as f64 - 1.5 * frame || stream.duration() <= 0;
        ensure!(
            promised <= (count + hidden) as i64 || !(short || untimed > 0),
            "the file is cut off: it promises {promised} frames and holds {count}"
        );
        if untimed > 0 || overlap {
            return Ok(Timeline::Counted(count));
        }
        frames.dedup();
        keys.dedup();
        Ok(Timeline::Timed { frames: Times::of(frames), keys: Times::of(keys) })
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
                Ok(()) if packet.stream() == self.stream => {
                    self.has_hidden |= is_hidden(&packet);
                    self.decoder.send_packet(&packet)?;
                }
                Ok(()) => {}
                Err(Error::Eof) => self.decoder.send_eof()?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}
