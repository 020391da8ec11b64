//! Video files are read as the command `ffmpeg` shows them: colours, orientation, edit lists, names.
//!
//! What is expected is known beforehand. Where the command is installed, every frame is compared with its frames too, to
//! the bit: `cargo test --release --test video_files -- --nocapture` prints the table of colours.

#![cfg(feature = "video")]

mod common;

use std::{
    cell::Cell,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
};

use common::skip;
use lvdm::data::{DataConfig, DatasetConfig, Folder, RgbFrame, VideoReader, VideoWriter};
use video_rs::ffmpeg::{
    Dictionary, Packet, Rational, codec,
    color::{Range, Space},
    encoder, format,
    format::Pixel,
    frame::Video,
};

/// The way in which lvdm has FFmpeg convert colours.
const FLAGS: &str = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact";

/// Says once a test that its frames are not compared with those of the command `ffmpeg`.
fn skip_ffmpeg() {
    thread_local!(static SAID: Cell<bool> = const { Cell::new(false) });
    if !SAID.replace(true) {
        skip("the command ffmpeg is not installed: frames are compared with what was stored alone", true);
    }
}

/// Whether this FFmpeg has an encoder that Debian's has; says so where it does not.
fn has_encoder(name: &str) -> bool {
    let found = encoder::find_by_name(name).is_some();
    if !found {
        skip(&format!("this FFmpeg has no encoder {name}"), true);
    }
    found
}

/// Mean and largest difference of all frames from those that `ffmpeg` shows; none where it is not installed.
fn against_ffmpeg(path: &Path, frames: &[RgbFrame]) -> Option<(f64, u8)> {
    let sync = ["-fps_mode", "passthrough", "-sws_flags", FLAGS, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"];
    let mut command = Command::new("ffmpeg");
    let shown = match command.args(["-v", "error", "-i"]).arg(path).args(sync).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            skip_ffmpeg();
            return None;
        }
        shown => shown.unwrap(),
    };
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    let pixels: Vec<u8> = frames.iter().flat_map(|frame| frame.pixels.iter().copied()).collect();
    assert_eq!(pixels.len(), shown.stdout.len(), "{}: other frames than ffmpeg's", path.display());
    let differences = pixels.iter().zip(&shown.stdout).map(|(a, b)| a.abs_diff(*b));
    let sum: f64 = differences.clone().map(f64::from).sum();
    Some((sum / pixels.len() as f64, differences.max().unwrap()))
}

/// All frames, each window of two of which is the same however it is come at.
fn frames_of(path: &Path) -> Vec<RgbFrame> {
    let mut reader = VideoReader::open(path).unwrap();
    let all = reader.read(0, reader.frames(), 1).unwrap();
    for first in (0..reader.frames() - 2).rev() {
        let found = reader.read(first, 2, 2).unwrap();
        let right = [&all[first as usize], &all[first as usize + 2]];
        assert!(found.iter().zip(right).all(|(found, right)| found == right), "{}: frame {first}", path.display());
    }
    all
}

const COLOURS: [[u8; 3]; 8] = [
    [200, 30, 40],
    [30, 180, 60],
    [40, 60, 220],
    [230, 230, 230],
    [20, 20, 20],
    [220, 200, 30],
    [30, 200, 210],
    [190, 40, 200],
];

/// Pixels of a side of a coloured square.
const SQUARE: usize = 16;

/// Eight coloured squares, two rows of four, in Y′CbCr of this matrix and range by its definition.
fn coloured_squares(format: Pixel, [red, blue]: [f64; 2], full: bool) -> Video {
    let deep = format == Pixel::YUV420P10LE;
    let unit = if deep { 4.0 } else { 1.0 };
    let colour = |x: usize, y: usize| {
        let [r, g, b] = COLOURS[(y / SQUARE) * 4 + x / SQUARE].map(|value| f64::from(value) / 255.0);
        let luma = red * r + (1.0 - red - blue) * g + blue * b;
        let (cb, cr) = ((b - luma) / (2.0 - 2.0 * blue), (r - luma) / (2.0 - 2.0 * red));
        let most = if deep { 1023.0 } else { 255.0 };
        match full {
            true => [luma * most, 128.0 * unit + cb * most, 128.0 * unit + cr * most],
            false => [(16.0 + 219.0 * luma) * unit, (128.0 + 224.0 * cb) * unit, (128.0 + 224.0 * cr) * unit],
        }
    };
    let mut frame = Video::new(format, 4 * SQUARE as u32, 2 * SQUARE as u32);
    for plane in 0..3 {
        let sampled = if plane > 0 && format != Pixel::YUV444P { 2 } else { 1 };
        let stride = frame.stride(plane);
        for y in 0..2 * SQUARE / sampled {
            for x in 0..4 * SQUARE / sampled {
                let value = colour(x * sampled, y * sampled)[plane].round();
                match deep {
                    true => {
                        frame.data_mut(plane)[y * stride + 2 * x..][..2].copy_from_slice(&(value as u16).to_le_bytes())
                    }
                    false => frame.data_mut(plane)[y * stride + x] = value as u8,
                }
            }
        }
    }
    frame
}

/// A file of twelve such frames that says its matrix and its range.
fn encode(path: &Path, codec: &str, options: &[(&str, &str)], picture: &Video, space: Space, range: Range) {
    let mut output = format::output(path).unwrap();
    let mut context = codec::Context::new_with_codec(encoder::find_by_name(codec).unwrap()).encoder().video().unwrap();
    context.set_width(picture.width());
    context.set_height(picture.height());
    context.set_format(picture.format());
    context.set_time_base(Rational::new(1, 25));
    context.set_frame_rate(Some(Rational::new(25, 1)));
    context.set_colorspace(space);
    context.set_color_range(range);
    context.set_max_b_frames(0);
    if output.format().flags().contains(format::flag::Flags::GLOBAL_HEADER) {
        context.set_flags(codec::Flags::GLOBAL_HEADER);
    }
    let settings: Dictionary = options.iter().copied().collect();
    let mut encoder = context.open_with(settings).unwrap();
    let mut stream = output.add_stream_with(&encoder).unwrap();
    stream.set_time_base(Rational::new(1, 25));
    stream.set_avg_frame_rate(Rational::new(25, 1));
    output.write_header().unwrap();
    let to = output.stream(0).unwrap().time_base();
    let mut packet = Packet::empty();
    for number in 0..13 {
        if number < 12 {
            let mut frame = picture.clone();
            frame.set_pts(Some(number));
            frame.set_color_space(space);
            frame.set_color_range(range);
            encoder.send_frame(&frame).unwrap();
        } else {
            encoder.send_eof().unwrap();
        }
        while encoder.receive_packet(&mut packet).is_ok() {
            packet.set_stream(0);
            packet.set_duration(1);
            packet.rescale_ts(Rational::new(1, 25), to);
            packet.write_interleaved(&mut output).unwrap();
        }
    }
    output.write_trailer().unwrap();
}

/// Mean and largest difference from the colours that were stored, borders of squares left out.
fn against_stored(frame: &RgbFrame) -> (f64, u8) {
    let mut differences = Vec::new();
    for (i, colour) in COLOURS.iter().enumerate() {
        for y in 4..SQUARE - 4 {
            for x in 4..SQUARE - 4 {
                let at = ((i / 4 * SQUARE + y) * frame.width + i % 4 * SQUARE + x) * 3;
                differences.extend(frame.pixels[at..at + 3].iter().zip(colour).map(|(a, b)| a.abs_diff(*b)));
            }
        }
    }
    let sum: f64 = differences.iter().map(|difference| f64::from(*difference)).sum();
    (sum / differences.len() as f64, *differences.iter().max().unwrap())
}

/// Every matrix in both ranges, of five codecs: the colours that were stored, and where nothing is said those of BT.601.
#[test]
fn colours_are_of_the_matrix_and_the_range_that_a_video_says() {
    let folder = tempfile::tempdir().unwrap();
    struct Coder<'a> {
        name: &'a str,
        encoder: &'a str,
        format: Pixel,
        ending: &'a str,
        options: &'a [(&'a str, &'a str)],
    }
    let coder = |name, encoder, format, ending, options| Coder { name, encoder, format, ending, options };
    let coders = [
        coder("H.264", "libx264", Pixel::YUV420P, "mp4", &[("crf", "8")][..]),
        coder("HEVC 10 bit", "libx265", Pixel::YUV420P10LE, "mp4", &[("x265-params", "crf=6:log-level=none")]),
        coder("VP9", "libvpx-vp9", Pixel::YUV420P, "webm", &[("crf", "8"), ("b", "0"), ("cpu-used", "8")]),
        coder("AV1", "libaom-av1", Pixel::YUV420P, "mkv", &[("crf", "8"), ("cpu-used", "8")]),
        coder("FFV1", "ffv1", Pixel::YUV444P, "mkv", &[]),
    ];
    // the parts of red and of blue in luma
    let matrices = [
        ("BT.601", Space::SMPTE170M, [0.299, 0.114]),
        ("BT.709", Space::BT709, [0.2126, 0.0722]),
        ("BT.2020", Space::BT2020NCL, [0.2627, 0.0593]),
        ("unsaid", Space::Unspecified, [0.299, 0.114]),
    ];
    println!(
        "codec        matrix   range    from what was stored   from ffmpeg's frames\n{:42}mean  most      mean  most",
        ""
    );
    for Coder { name, encoder, format, ending, options } in coders {
        if !has_encoder(encoder) {
            continue;
        }
        for (matrix, space, parts) in matrices {
            for (range_name, range) in [("limited", Range::MPEG), ("full", Range::JPEG), ("unsaid", Range::Unspecified)]
            {
                if (matrix == "unsaid") != (range_name == "unsaid") {
                    continue;
                }
                let path = folder.path().join(format!("{encoder}-{matrix}-{range_name}.{ending}"));
                let picture = coloured_squares(format, parts, range == Range::JPEG);
                encode(&path, encoder, options, &picture, space, range);
                let frames = frames_of(&path);
                let (mean, most) = against_stored(&frames[0]);
                let exact = against_ffmpeg(&path, &frames);
                let other = exact.map_or("no such command".into(), |(mean, most)| format!("{mean:.3} {most:4}"));
                println!("{name:12} {matrix:8} {range_name:8} {mean:15.2} {most:5}     {other}");
                assert!(frames.len() == 12 && mean < 1.0 && most <= 3, "{name} {matrix} {range_name}: {mean} {most}");
                assert!(exact.is_none_or(|(_, most)| most == 0), "{name} {matrix} {range_name}: {exact:?}");
            }
        }
    }
}

/// A number that no standard gives a matrix is none, as ffmpeg takes it.
#[test]
fn an_unknown_matrix_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let [said, none] = ["said.mkv", "none.mkv"].map(|name| folder.path().join(name));
    let picture = coloured_squares(Pixel::YUV444P, [0.299, 0.114], false);
    encode(&said, "ffv1", &[], &picture, Space::BT709, Range::MPEG);
    encode(&none, "ffv1", &[], &picture, Space::Unspecified, Range::MPEG);
    let bytes = fs::read(&said).unwrap();
    // the element MatrixCoefficients, one byte long
    let at = bytes.windows(4).position(|element| element == [0x55, 0xB1, 0x81, 1]).unwrap() + 3;
    for unknown in [3, 12, 99, 200, 255] {
        let mut bytes = bytes.clone();
        bytes[at] = unknown;
        fs::write(&said, bytes).unwrap();
        assert_eq!(frames_of(&said), frames_of(&none), "{unknown}");
    }
}

/// All that FFmpeg reads is found by its ending and read.
#[test]
fn files_of_other_endings_are_videos_too() {
    let folder = tempfile::tempdir().unwrap();
    let picture = coloured_squares(Pixel::YUV420P, [0.299, 0.114], false);
    let files = [("m4v", "mpeg4"), ("TS", "mpeg2video"), ("mpg", "mpeg2video"), ("wmv", "wmv2"), ("flv", "flv")];
    for (ending, encoder) in files {
        let path = folder.path().join("a").with_extension(ending);
        encode(&path, encoder, &[("b", "8000000")], &picture, Space::Unspecified, Range::Unspecified);
        let frames = frames_of(&path);
        let (mean, most) = against_stored(&frames[0]);
        assert!(frames.len() == 12 && mean < 2.0 && most <= 10, "{ending}: {} frames, {mean} {most}", frames.len());
        assert!(against_ffmpeg(&path, &frames).is_none_or(|(_, most)| most == 0), "{ending}");
    }
    let listed = DatasetConfig::Folder(Folder { root: folder.path().into() });
    let data = DataConfig { dataset: listed, frames: 12, frame_stride: 1, resolution: 16, flip: false, workers: 1 };
    assert_eq!(data.videos().unwrap().videos.len(), files.len());
}

/// An mp4 of numbered frames of 64×32, eight a second: ten fields, white for the ones of the number.
fn write_numbered(path: &Path, frames: i64) {
    let mut writer = VideoWriter::create(path, 160, 32, 8.0).unwrap();
    for number in 0..frames {
        let row: Vec<u8> = (0..160).flat_map(|x| [if number >> (x / 16) & 1 == 1 { 235 } else { 20 }; 3]).collect();
        writer.write(&RgbFrame { width: 160, height: 32, pixels: row.repeat(32) }).unwrap();
    }
    writer.finish().unwrap();
}

fn number(frame: &RgbFrame) -> i64 {
    (0..10).map(|i| i64::from(frame.pixels[(16 * 160 + i * 16 + 8) * 3] > 127) << i).sum()
}

/// The boxes of an mp4 file with an edit list in the place of its own: pieces of so many frames from a frame on, or of
/// nothing. What stands behind moves by `moved` bytes.
fn with_edits(bytes: &[u8], list: &[u8], moved: u32) -> Vec<u8> {
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let length = word(at) as usize;
        let (kind, body) = (&bytes[at + 4..at + 8], &bytes[at + 8..at + length]);
        let body = match kind {
            b"moov" | b"trak" | b"mdia" | b"minf" | b"stbl" => with_edits(body, list, moved),
            b"stco" => {
                let places = body[8..].chunks(4).map(|place| u32::from_be_bytes(place.try_into().unwrap()) + moved);
                [body[..8].to_vec(), places.flat_map(u32::to_be_bytes).collect()].concat()
            }
            _ => body.to_vec(),
        };
        if kind != b"edts" {
            out.extend([&(body.len() as u32 + 8).to_be_bytes(), kind, &body].concat());
        }
        if kind == b"tkhd" {
            out.extend(list);
        }
        at += length;
    }
    out
}

/// The place of the word that stands so many bytes behind the name of the first box of a kind.
fn place(bytes: &[u8], kind: &[u8], behind: usize) -> usize {
    bytes.windows(4).position(|name| name == kind).unwrap() + 4 + behind
}

fn cut(from: &Path, to: &Path, pieces: &[(u32, Option<u32>)]) {
    let bytes = fs::read(from).unwrap();
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let [film, track] = [b"mvhd", b"mdhd"].map(|kind| word(place(&bytes, kind, 12)) / 8);
    // B frames are stored before they are shown, which the file's own edit list makes good
    let delay = word(place(&bytes, b"elst", 12));
    let mut list = [&0u32.to_be_bytes()[..], &(pieces.len() as u32).to_be_bytes()].concat();
    for (count, first) in pieces {
        let start = first.map_or(u32::MAX, |first| delay + first * track);
        list.extend([count * film, start, 1 << 16].map(u32::to_be_bytes).concat());
    }
    let named = |name: &[u8], body: &[u8]| [&(body.len() as u32 + 8).to_be_bytes(), name, body].concat();
    let list = named(b"edts", &named(b"elst", &list));
    let moved = with_edits(&bytes, &list, 0).len() as u32 - bytes.len() as u32;
    fs::write(to, with_edits(&bytes, &list, moved)).unwrap();
}

/// Cuts at the start, at the end, in the middle, into three pieces, a pause before: what is hidden is no frame, and what
/// is shown is found by its number in any window.
#[test]
fn an_edit_list_shows_its_frames_alone() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.mp4");
    write_numbered(&base, 40);
    for ending in ["mp4", "mov"] {
        for (name, pieces) in [
            ("start", &[(30, Some(10))][..]),
            ("end", &[(30, Some(0))]),
            ("both", &[(11, Some(17))]),
            ("middle", &[(8, Some(0)), (8, Some(16))]),
            ("three", &[(4, Some(2)), (6, Some(9)), (10, Some(27))]),
            ("pause", &[(8, None), (10, Some(7))]),
            ("turned", &[(6, Some(26)), (6, Some(2))]),
            ("twice", &[(6, Some(4)), (6, Some(4))]),
            ("beyond", &[(90, Some(25))]),
            ("far beyond", &[(40, Some(37))]),
        ] {
            let path = folder.path().join(format!("{name}.{ending}"));
            cut(&base, &path, pieces);
            let right: Vec<i64> = pieces
                .iter()
                .flat_map(|(count, first)| first.map_or(0..0, |first| first..(first + count).min(40)))
                .map(i64::from)
                .collect();
            let frames = frames_of(&path);
            assert_eq!(frames.iter().map(number).collect::<Vec<_>>(), right, "{}", path.display());
            assert!(against_ffmpeg(&path, &frames).is_none_or(|(_, most)| most == 0), "{}", path.display());
            VideoReader::open(&path).unwrap().check().unwrap();
        }
    }
}

/// All eight ways to lay a picture, and turns by no quarter: as they are shown, with the size that is shown.
#[test]
fn a_video_is_turned_as_its_display_matrix_says() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.mp4");
    let mut writer = VideoWriter::create(&base, 96, 64, 8.0).unwrap();
    let quarter = |x: usize, y: usize| COLOURS[y / 32 * 2 + x / 48];
    let pixels = (0..96 * 64).flat_map(|i| quarter(i % 96, i / 96)).collect();
    let picture = RgbFrame { width: 96, height: 64, pixels };
    (0..4).for_each(|_| writer.write(&picture).unwrap());
    writer.finish().unwrap();
    let bytes = fs::read(&base).unwrap();
    // the rows of a matrix are 12 bytes long
    let at = place(&bytes, b"tkhd", 40);
    assert_eq!(bytes[at..at + 4], 65536u32.to_be_bytes());
    let turned = |name: &str, matrix: [f64; 4]| {
        let path = folder.path().join(format!("{name}.mp4"));
        let mut bytes = bytes.clone();
        for (value, behind) in matrix.into_iter().zip([0, 4, 12, 16]) {
            bytes[at + behind..at + behind + 4].copy_from_slice(&((value * 65536.0).round() as i32).to_be_bytes());
        }
        fs::write(&path, bytes).unwrap();
        let frames = frames_of(&path);
        let reader = VideoReader::open(&path).unwrap();
        assert!(frames.iter().all(|f| (f.width, f.height) == (reader.width(), reader.height())), "{name}");
        assert!(against_ffmpeg(&path, &frames).is_none_or(|(_, most)| most == 0), "{name}");
        frames.into_iter().next().unwrap()
    };
    for [a, b, c, d] in [
        [1, 0, 0, 1],
        [0, 1, -1, 0],
        [-1, 0, 0, -1],
        [0, -1, 1, 0],
        [-1, 0, 0, 1],
        [1, 0, 0, -1],
        [0, 1, 1, 0],
        [0, -1, -1, 0],
    ] {
        let frame = turned(&format!("{a},{b},{c},{d}"), [a, b, c, d].map(f64::from));
        assert_eq!((frame.width, frame.height), if a == 0 { (64, 96) } else { (96, 64) });
        for (x, y) in [(-1, -1), (1, -1), (-1, 1), (1, 1)] {
            // a stored quarter, and the one where it is shown, seen from the middle
            let [shown_x, shown_y] = [a * x + c * y, b * x + d * y];
            let middle = |side: i32, length: usize| if side < 0 { length / 4 } else { 3 * length / 4 };
            let at = (middle(shown_y, frame.height) * frame.width + middle(shown_x, frame.width)) * 3;
            let right = quarter(middle(x, 96), middle(y, 64));
            let found = &frame.pixels[at..at + 3];
            assert!(found.iter().zip(right).all(|(a, b)| a.abs_diff(b) <= 3), "{a},{b},{c},{d}: {found:?} {right:?}");
        }
    }
    for degrees in [30.0f64, 135.0, 200.0] {
        let (sin, cos) = degrees.to_radians().sin_cos();
        let frame = turned(&format!("{degrees}"), [cos, sin, -sin, cos]);
        assert_eq!((frame.width, frame.height, &frame.pixels[..3]), (96, 64, &[0, 0, 0][..]));
    }
    // nonsense turns nothing
    assert_eq!(turned("nothing", [0.0; 4]), turned("upright", [1.0, 0.0, 0.0, 1.0]));
}

/// What the coded video itself says at a key frame turns all frames up to the next one, and not the first alone.
#[test]
fn an_orientation_in_the_coded_video_holds_from_its_key_frame_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.h264");
    if !has_encoder("libx264") {
        return;
    }
    let picture = coloured_squares(Pixel::YUV420P, [0.299, 0.114], false);
    encode(&path, "libx264", &[("crf", "8"), ("g", "100")], &picture, Space::Unspecified, Range::Unspecified);
    let mut bytes = fs::read(&path).unwrap();
    // a message (6) on orientation (47) of three bytes before the key frame (5): a quarter anticlockwise
    let key = (0..bytes.len()).find(|&at| bytes[at..].starts_with(&[0, 0, 1]) && bytes[at + 3] & 31 == 5).unwrap();
    bytes.splice(key..key, [0, 0, 1, 6, 47, 3, 0x08, 0x00, 0x09, 0x80]);
    fs::write(&path, bytes).unwrap();
    for frame in frames_of(&path) {
        assert_eq!((frame.width, frame.height), (2 * SQUARE, 4 * SQUARE));
        for (i, right) in COLOURS.iter().enumerate() {
            let [x, y] = [i % 4, i / 4].map(|square| square * SQUARE + SQUARE / 2);
            let at = ((4 * SQUARE - 1 - x) * frame.width + y) * 3;
            let found = &frame.pixels[at..at + 3];
            assert!(found.iter().zip(right).all(|(a, b)| a.abs_diff(*b) <= 3), "{i}: {found:?} {right:?}");
        }
    }
}

/// What comes before the first key frame cannot be decoded, which the error says; the rest is read.
#[test]
fn a_stream_that_begins_without_a_key_frame_is_read_from_the_first_one_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ts");
    if !has_encoder("libx264") {
        return;
    }
    let picture = coloured_squares(Pixel::YUV420P, [0.299, 0.114], false);
    encode(&path, "libx264", &[("crf", "8"), ("g", "6")], &picture, Space::Unspecified, Range::Unspecified);
    let bytes = fs::read(&path).unwrap();
    // without the first two frames: a transport packet of the stream (0x100) begins a frame where a bit says so
    let mut begun = 0;
    let kept = bytes.chunks(188).filter(|packet| {
        let is_video = u16::from_be_bytes([packet[1] & 31, packet[2]]) == 0x100;
        begun += usize::from(is_video && packet[1] & 64 > 0);
        !is_video || begun > 2
    });
    fs::write(&path, kept.collect::<Vec<_>>().concat()).unwrap();
    let mut reader = VideoReader::open(&path).unwrap();
    assert_eq!(reader.frames(), 10);
    let error = format!("{:#}", reader.read(0, 1, 1).unwrap_err());
    assert!(error.contains("there is no key frame before it") && error.contains("a.ts"), "{error}");
    assert!(reader.read(4, 6, 1).unwrap().iter().all(|frame| against_stored(frame).1 <= 3));
}

/// Names that are no text, and names that look like addresses or patterns.
#[test]
fn a_name_may_be_any_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.mp4");
    write_numbered(&base, 3);
    for name in
        [&b"caf\xe9.mp4"[..], b"\xff\xfe", b"http:x.mp4", b"%03d.mp4", b"a:b,c|d 'e' \"f\".mp4", "шум.mp4".as_bytes()]
    {
        let path: PathBuf = folder.path().join(OsStr::from_bytes(name));
        fs::copy(&base, &path).unwrap();
        assert_eq!(frames_of(&path).iter().map(number).collect::<Vec<_>>(), [0, 1, 2], "{}", path.display());
    }
    let error = VideoWriter::create(&folder.path().join(OsStr::from_bytes(b"\xe9.mp4")), 32, 32, 8.0).err().unwrap();
    assert!(error.to_string().contains("UTF-8"), "{error}");
}
