//! A decoded picture as it is shown: turned as its container says, and in RGB by the matrix and the range that it says
//! of itself. Both are done by the filters that the command `ffmpeg` puts in for them, so the values are its values:
//! `ffmpeg -i x.mp4 -sws_flags FLAGS -f rawvideo -pix_fmt rgb24 x.rgb`, with the flags below.

use anyhow::{Context, Result};
use video_rs::ffmpeg::{
    codec::packet,
    filter,
    format::{Pixel, stream::Stream},
    frame::{Video as RawFrame, side_data},
};

use crate::{
    data::clip::RgbFrame,
    ffmpeg::{colours, filter_graph},
};

/// Rounded where FFmpeg by itself is faster and cuts off, and with colours interpolated where 4:2:0 stores one for four
/// pixels and FFmpeg by itself repeats it.
const FLAGS: &str = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact";

/// Where a stored pixel (x, y) is shown: at (a·x + c·y, b·x + d·y), out of the rows (a, b, u), (c, d, v), … of a display
/// matrix. Only signs and angles count, so its fixed points need not be divided out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orientation {
    a: i32,
    b: i32,
    c: i32,
    d: i32,
}

impl Orientation {
    /// Of the bytes of a display matrix.
    fn of(matrix: &[u8]) -> Option<Self> {
        let number = |i: usize| Some(i32::from_ne_bytes(matrix.get(4 * i..4 * i + 4)?.try_into().ok()?));
        Some(Self { a: number(0)?, b: number(1)?, c: number(3)?, d: number(4)? })
    }

    /// What the container says of a whole stream.
    pub fn of_stream(stream: &Stream) -> Option<Self> {
        let mut said = stream.side_data();
        Self::of(said.find(|data| data.kind() == packet::side_data::Type::DisplayMatrix)?.data())
    }

    /// What the coded video says of a picture.
    pub fn of_frame(frame: &RawFrame) -> Option<Self> {
        Self::of(frame.side_data(side_data::Type::DisplayMatrix)?.data())
    }

    /// How far it turns a picture clockwise, in whole degrees from 0 to 359; none where it shows nothing at all.
    fn degrees(self) -> Option<u32> {
        let [a, b, c, d] = [self.a, self.b, self.c, self.d].map(f64::from);
        let (across, down) = (a.hypot(c), b.hypot(d));
        let turned = (b / down).atan2(a / across).to_degrees();
        (across > 0.0 && down > 0.0).then(|| (turned.round() as i32).rem_euclid(360) as u32)
    }

    /// The filters that do it, first to last.
    fn filters(self) -> Vec<String> {
        let filters: &[&str] = match self.degrees() {
            None | Some(0 | 1) if self.d < 0 => &["vflip"],
            None | Some(0 | 1) => &[],
            Some(90) if self.c > 0 => &["transpose=cclock_flip"],
            Some(90) => &["transpose=clock"],
            Some(180) if self.d >= 0 => &["hflip"],
            Some(180) => &["hflip", "vflip"],
            Some(270) if self.c < 0 => &["transpose=clock_flip"],
            Some(270) => &["transpose=cclock"],
            // in a frame of the stored size, with black corners
            Some(other) => return vec![format!("rotate={other}*PI/180")],
        };
        filters.iter().map(ToString::to_string).collect()
    }

    /// Width and height that are shown of those that are stored.
    pub fn shown(self, (width, height): (usize, usize)) -> (usize, usize) {
        match self.degrees() {
            Some(90 | 270) => (height, width),
            _ => (width, height),
        }
    }
}

/// What the filters for a picture depend on.
#[derive(PartialEq)]
struct Stored {
    format: Pixel,
    width: u32,
    height: u32,
    /// Matrix and range.
    colours: [i32; 2],
    orientation: Option<Orientation>,
}

/// Shows pictures; its filters are kept as long as pictures are stored alike.
#[derive(Default)]
pub struct Screen {
    filters: Option<(Stored, filter::Graph)>,
}

impl Screen {
    /// The picture in RGB. It is moved out of `frame`.
    pub fn show(&mut self, frame: &mut RawFrame, orientation: Option<Orientation>) -> Result<RgbFrame> {
        let stored = Stored {
            format: frame.format(),
            width: frame.width(),
            height: frame.height(),
            colours: colours(frame),
            orientation,
        };
        if self.filters.as_ref().is_none_or(|(known, _)| *known != stored) {
            let filters = filters_for(&stored)?;
            self.filters = Some((stored, filters));
        }
        let (_, filters) = self.filters.as_mut().expect("made above");
        let mut rgb = RawFrame::empty();
        filters.get("in").context("a graph without its beginning")?.source().add(frame)?;
        filters.get("out").context("a graph without its end")?.sink().frame(&mut rgb)?;
        let (width, height) = (rgb.width() as usize, rgb.height() as usize);
        let rows = rgb.data(0).chunks(rgb.stride(0)).take(height);
        Ok(RgbFrame { width, height, pixels: rows.flat_map(|row| &row[..width * 3]).copied().collect() })
    }
}

fn filters_for(Stored { format, width, height, orientation, .. }: &Stored) -> Result<filter::Graph> {
    let named = |name: &str| filter::find(name).with_context(|| format!("this FFmpeg has no filter {name}"));
    let format = format.descriptor().context("pictures of an unknown format")?.name();
    let source = format!("video_size={width}x{height}:pix_fmt={format}:time_base=1/1:pixel_aspect=1/1");
    let mut graph = filter_graph();
    graph.add(&named("buffer")?, "in", &source)?;
    graph.add(&named("buffersink")?, "out", "")?;
    let mut filters = orientation.map_or_else(Vec::new, Orientation::filters);
    // before this one FFmpeg puts a scaler of its own, which takes matrix and range from the picture
    filters.push("format=rgb24".into());
    graph.output("in", 0)?.input("out", 0)?.parse(&format!("sws_flags={FLAGS};{}", filters.join(",")))?;
    graph.validate()?;
    Ok(graph)
}
