//! Clips as pictures, for reports and logs.

use std::{io::Write, path::Path};

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::clip::RgbFrame;
use crate::atomic_file::write_atomically;

/// White pixels between pictures.
const GAP: i64 = 2;

/// One row a clip, of every `every`-th frame: clips are unsigned bytes `[N, 3, F, H, W]`, the
/// picture `[H', W', 3]`.
///
/// # Errors
/// Clips of another shape or kind; `every` below 1.
pub fn grid(clips: &Tensor, every: i64) -> Result<Tensor> {
    let (n, f, h, w) = clip_size(clips)?;
    ensure!(every >= 1, "every {every}th frame; it must be at least 1");
    let columns = (f + every - 1) / every;
    let sheet = white([3, n * (h + GAP) - GAP, columns * (w + GAP) - GAP]);
    for row in 0..n {
        for column in 0..columns {
            let mut cell = sheet.narrow(1, row * (h + GAP), h).narrow(2, column * (w + GAP), w);
            cell.copy_(&clips.select(0, row).select(1, column * every));
        }
    }
    Ok(sheet.permute([1, 2, 0]).contiguous())
}

/// A PNG file's bytes, of unsigned bytes `[H, W, 3]`.
///
/// # Errors
/// A picture of another shape or kind.
pub fn png(image: &Tensor) -> Result<Vec<u8>> {
    let RgbFrame { width, height, pixels } = RgbFrame::from_tensor(image)?;
    let mut bytes = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(::png::ColorType::Rgb);
    encoder.set_depth(::png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(bytes)
}

/// Writes a PNG file of unsigned bytes `[H, W, 3]`.
///
/// # Errors
/// A picture of another shape or kind; a full disk.
pub fn write_png(path: &Path, image: &Tensor) -> Result<()> {
    let bytes = png(image)?;
    write_atomically(path, |file| Ok(file.write_all(&bytes)?))
}

/// The bytes of an endless animated GIF with the clips side by side: unsigned bytes
/// `[N, 3, F, H, W]`. The format counts hundredths of a second and viewers slow down below two.
///
/// # Errors
/// Clips of another shape or kind.
pub fn gif(clips: &Tensor, fps: f64) -> Result<Vec<u8>> {
    let (n, f, h, w) = clip_size(clips)?;
    ensure!(fps > 0.0, "{fps} frames a second");
    let width = n * (w + GAP) - GAP;
    let (Ok(columns), Ok(rows)) = (u16::try_from(width), u16::try_from(h)) else {
        anyhow::bail!("{n} clips of {w}×{h} are too large for a GIF, whose sides end at 65535");
    };
    let mut bytes = Vec::new();
    let mut encoder = ::gif::Encoder::new(&mut bytes, columns, rows, &[])?;
    encoder.set_repeat(::gif::Repeat::Infinite)?;
    for frame in 0..f {
        let strip = white([3, h, width]);
        for clip in 0..n {
            strip.narrow(2, clip * (w + GAP), w).copy_(&clips.select(0, clip).select(1, frame));
        }
        let pixels = RgbFrame::from_tensor(&strip.permute([1, 2, 0]))?.pixels;
        let mut picture = ::gif::Frame::from_rgb_speed(columns, rows, &pixels, 10);
        picture.delay = (100.0 / fps).round().clamp(2.0, 65535.0) as u16;
        encoder.write_frame(&picture)?;
    }
    drop(encoder);
    Ok(bytes)
}

fn white<const D: usize>(size: [i64; D]) -> Tensor {
    Tensor::full(size, 255, (Kind::Uint8, Device::Cpu))
}

fn clip_size(clips: &Tensor) -> Result<(i64, i64, i64, i64)> {
    let size = clips.size();
    let &[n, 3, f, h, w] = size.as_slice() else {
        anyhow::bail!("clips are [N, 3, F, H, W]; these are {size:?}");
    };
    ensure!(clips.numel() > 0, "there is nothing in clips of {size:?}");
    ensure!(clips.kind() == Kind::Uint8, "clips are unsigned bytes; these are {:?}", clips.kind());
    Ok((n, f, h, w))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn clips() -> Tensor {
        // Clip and frame show in the grey level.
        let level = Tensor::arange(8, (Kind::Uint8, Device::Cpu)).reshape([2, 1, 4, 1, 1]) * 30;
        level.expand([2, 3, 4, 6, 10], false).contiguous()
    }

    #[test]
    fn a_grid_can_be_decoded_and_shows_every_second_frame() {
        let sheet = grid(&clips(), 2).unwrap();
        assert_eq!(sheet.size(), [6 + 2 + 6, 10 + 2 + 10, 3]);
        let mut reader = ::png::Decoder::new(Cursor::new(png(&sheet).unwrap())).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let at = |y: usize, x: usize| pixels[(y * 22 + x) * 3];
        assert_eq!([at(0, 0), at(0, 12), at(8, 0), at(13, 21), at(6, 0)], [0, 60, 120, 180, 255]);
    }

    #[test]
    fn a_gif_can_be_decoded() {
        let bytes = gif(&clips(), 10.0).unwrap();
        let mut options = ::gif::DecodeOptions::new();
        options.set_color_output(::gif::ColorOutput::RGBA);
        let mut decoder = options.read_info(Cursor::new(bytes)).unwrap();
        assert_eq!(decoder.repeat(), ::gif::Repeat::Infinite);
        let mut frames = Vec::new();
        while let Some(frame) = decoder.read_next_frame().unwrap() {
            assert_eq!((frame.width, frame.height, frame.delay), (22, 6, 10));
            frames.push((frame.buffer[0], frame.buffer[12 * 4]));
        }
        assert_eq!(frames, [(0, 120), (30, 150), (60, 180), (90, 210)]);
    }

    #[test]
    fn wrong_shapes_are_errors() {
        assert!(grid(&clips().get(0), 1).is_err());
        assert!(gif(&clips().to_kind(Kind::Float), 10.0).is_err());
        assert!(png(&clips()).is_err());
    }
}
