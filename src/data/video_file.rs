//! Video files through FFmpeg: any frame by its number, and H.264 out.

mod reader;
mod shown;
mod timeline;
mod writer;

use std::sync::Once;

use video_rs::ffmpeg;

pub use reader::VideoReader;
pub use writer::{VideoWriter, write_video};

fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // What FFmpeg prints about damaged files says no file name; our errors do.
        ffmpeg::util::log::set_level(ffmpeg::util::log::Level::Fatal);
        ffmpeg::init().expect("FFmpeg does not start");
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, path::Path};

    use rand::RngExt;

    use video_rs::ffmpeg::{encoder, format};

    use super::{
        writer::{Encoding, H264},
        *,
    };
    use crate::{
        data::clip::RgbFrame,
        random::{Purpose, stream},
    };

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
                if window % 5 == 4 {
                    // by the list that is known from before
                    reader = VideoReader::open(&path).unwrap();
                }
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
