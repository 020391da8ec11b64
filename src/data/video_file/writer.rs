//! Writing H.264.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use tch::Tensor;
use video_rs::ffmpeg::{
    self, Dictionary, Packet, Rational, codec, encoder, format,
    format::Pixel,
    frame::Video as RawFrame,
    software::scaling,
    util::error::{EAGAIN, Error},
};

use super::prepare;
use crate::{
    atomic_file::{publish, temporary_path},
    data::clip::RgbFrame,
};

/// How frames are stored.
pub(super) struct Encoding {
    pub(super) container: &'static str,
    pub(super) codec: &'static str,
    pub(super) options: &'static [(&'static str, &'static str)],
}

pub(super) const H264: Encoding = Encoding {
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

    pub(super) fn create_as(path: &Path, width: usize, height: usize, fps: f64, encoding: &Encoding) -> Result<Self> {
        prepare();
        let name = path.display();
        ensure!(path.to_str().is_some(), "cannot write {name}: its name is not UTF-8; choose another one");
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
            scaler: to_yuv(width, height)?,
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

/// Conversion of RGB to 4:2:0 by BT.601 in the limited range, the same to the bit on every machine.
fn to_yuv(width: u32, height: u32) -> Result<scaling::Context> {
    use scaling::Flags;
    let flags = Flags::BICUBIC | Flags::ACCURATE_RND | Flags::FULL_CHR_H_INT | Flags::FULL_CHR_H_INP | Flags::BITEXACT;
    Ok(scaling::Context::get(Pixel::RGB24, width, height, Pixel::YUV420P, width, height, flags)?)
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
