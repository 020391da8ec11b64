//! Clips: a window of a video, resized and cropped to a square, as unsigned bytes `[3, F, H, W]`.

use anyhow::{Result, ensure};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// One picture: red, green, blue of each pixel, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbFrame {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// `[height, width, 3]`
    pub pixels: Vec<u8>,
}

impl RgbFrame {
    /// From an unsigned byte tensor `[H, W, 3]` of any layout and device.
    ///
    /// # Errors
    /// Another shape or kind.
    pub fn from_tensor(image: &Tensor) -> Result<Self> {
        let size = image.size();
        ensure!(
            size.len() == 3 && size[2] == 3 && image.kind() == Kind::Uint8,
            "a picture is an unsigned byte tensor [H, W, 3]; this one is {:?} {size:?}",
            image.kind()
        );
        let mut pixels = vec![0; image.numel()];
        image.contiguous().f_copy_data_u8(&mut pixels, image.numel())?;
        Ok(Self { height: size[0] as usize, width: size[1] as usize, pixels })
    }

    /// Unsigned bytes `[H, W, 3]` on the host.
    pub fn to_tensor(&self) -> Tensor {
        Tensor::from_slice(&self.pixels).reshape([self.height as i64, self.width as i64, 3])
    }
}

/// A video's frames by number, whatever holds them.
pub trait FrameSource {
    /// How many frames there are.
    fn frames(&self) -> i64;

    /// Frames `start`, `start + stride`, …, `count` of them.
    ///
    /// # Errors
    /// A window that does not lie inside the video; a file that cannot be decoded.
    fn read(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>>;
}

/// The frames `start`, `start + stride`, … as indices, if all of them lie in a video of `frames`.
pub(crate) fn window(frames: i64, start: i64, count: i64, stride: i64) -> Result<Vec<usize>> {
    ensure!(count >= 1 && stride >= 1, "a window of {count} frames at a stride of {stride}: both must be at least 1");
    let last = start + (count - 1) * stride;
    ensure!(start >= 0 && last < frames, "frames {start} to {last} are not in a video of {frames} frames");
    Ok((0..count).map(|i| (start + i * stride) as usize).collect())
}

/// How a frame becomes a square. Training uses the default; the others are what some evaluations do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Fit {
    /// How pixels are resized.
    pub filter: Filter,
    /// Both sides are resized to the resolution, and nothing is cropped.
    pub squash: bool,
    /// Resized values are cut off instead of rounded.
    pub truncate: bool,
}

/// What a resized pixel is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// A triangle as wide as the picture shrinks (bilinear where it grows).
    #[default]
    Antialiased,
    /// The two nearest pixels along each axis, however much the picture shrinks.
    Bilinear,
}

impl Fit {
    /// A few words for people.
    pub fn words(&self) -> String {
        let filter = match self.filter {
            Filter::Antialiased => "antialiased triangle",
            Filter::Bilinear => "bilinear without antialias",
        };
        let shape = if self.squash { "squashed" } else { "centre crop" };
        let cut = if self.truncate { ", truncated to bytes" } else { "" };
        format!("{filter}, {shape}{cut}")
    }
}

/// What is cut out of a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipSpec {
    /// F, frames of a clip.
    pub frames: i64,
    /// Every n-th frame of the video.
    pub frame_stride: i64,
    /// H and W, in pixels: the short side is resized to it, the long side is cropped at both ends.
    pub resolution: i64,
    /// How frames become squares.
    pub fit: Fit,
}

impl ClipSpec {
    /// Frames of the video that a clip spans.
    pub fn span(&self) -> i64 {
        (self.frames - 1) * self.frame_stride + 1
    }

    /// A first frame, all valid ones being equally likely.
    ///
    /// # Errors
    /// A video shorter than `span`.
    pub fn start(&self, frames: i64, generator: &mut impl Rng) -> Result<i64> {
        let Self { frames: wanted, frame_stride, .. } = *self;
        let span = self.span();
        ensure!(
            frames >= span,
            "too short: {frames} frames, {wanted} frames at a stride of {frame_stride} need {span}"
        );
        Ok(generator.random_range(0..=frames - span))
    }

    /// A clip from a random place of a video: `[3, F, H, W]`, row by row. With `flip`, every second
    /// one is mirrored.
    ///
    /// # Errors
    /// A video that is too short or damaged.
    pub fn cut(&self, video: &mut dyn FrameSource, generator: &mut impl Rng, flip: bool) -> Result<Vec<u8>> {
        let start = self.start(video.frames(), generator)?;
        let mirrored = flip && generator.random_bool(0.5);
        let mut clip = self.fit(&video.read(start, self.frames, self.frame_stride)?);
        if mirrored {
            clip.chunks_exact_mut(self.resolution as usize).for_each(<[u8]>::reverse);
        }
        Ok(clip)
    }

    /// Frames resized and centre-cropped: `[3, F, H, W]`, row by row.
    pub fn fit(&self, frames: &[RgbFrame]) -> Vec<u8> {
        let side = self.resolution as usize;
        let plane = frames.len() * side * side;
        let mut clip = vec![0; 3 * plane];
        let mut resize: Option<Resize> = None;
        for (f, frame) in frames.iter().enumerate() {
            if resize.as_ref().is_none_or(|resize| resize.from != (frame.width, frame.height)) {
                resize = Some(Resize::new(frame.width, frame.height, side, self.fit));
            }
            let (red, rest) = clip.split_at_mut(plane);
            let (green, blue) = rest.split_at_mut(plane);
            let at = f * side * side..(f + 1) * side * side;
            let planes = [&mut red[at.clone()], &mut green[at.clone()], &mut blue[at]];
            resize.as_ref().expect("made above").run(frame, planes);
        }
        clip
    }
}

/// Resizing of one picture size, with the centre crop. The default filter is what "antialiased bilinear" means
/// elsewhere. Only the pixels inside the crop are computed.
struct Resize {
    from: (usize, usize),
    /// Added before the cast to bytes, which cuts off.
    half: f32,
    columns: Vec<Taps>,
    rows: Vec<Taps>,
    /// Pixels are copied as they are: each is one of the picture, neighbours are its neighbours.
    copies: bool,
}

/// Where an output pixel comes from along one axis.
struct Taps {
    first: usize,
    weights: Vec<f32>,
}

impl Resize {
    fn new(width: usize, height: usize, side: usize, fit: Fit) -> Self {
        let short = width.min(height);
        let scaled = |length: usize| match fit.squash {
            true => side,
            false => (2 * length * side + short) / (2 * short), // rounded length·side / short
        };
        let (columns, rows) =
            (taps(width, scaled(width), side, fit.filter), taps(height, scaled(height), side, fit.filter));
        let in_place = |taps: &[Taps]| {
            taps.iter().all(|taps| taps.weights == [1.0])
                && taps.windows(2).all(|pair| pair[1].first == pair[0].first + 1)
        };
        Self {
            from: (width, height),
            // what is a whole number must not fall below it by the arithmetic of floats
            half: if fit.truncate { 1e-3 } else { 0.5 },
            copies: in_place(&columns) && in_place(&rows),
            columns,
            rows,
        }
    }

    fn run(&self, frame: &RgbFrame, mut planes: [&mut [u8]; 3]) {
        let side = self.columns.len();
        if self.copies {
            for (y, taps) in self.rows.iter().enumerate() {
                let first = (taps.first * frame.width + self.columns[0].first) * 3;
                let row = frame.pixels[first..first + side * 3].chunks_exact(3);
                for (channel, plane) in planes.iter_mut().enumerate() {
                    for (value, pixel) in plane[y * side..(y + 1) * side].iter_mut().zip(row.clone()) {
                        *value = pixel[channel];
                    }
                }
            }
            return;
        }
        let left = self.columns.first().map_or(0, |taps| taps.first);
        let right = self.columns.last().map_or(0, |taps| taps.first + taps.weights.len());
        let mut line = vec![0f32; (right - left) * 3];
        for (y, taps) in self.rows.iter().enumerate() {
            line.fill(0.0);
            for (i, &weight) in taps.weights.iter().enumerate() {
                let row = (taps.first + i) * frame.width;
                let source = &frame.pixels[(row + left) * 3..(row + right) * 3];
                for (sum, &value) in line.iter_mut().zip(source) {
                    *sum += weight * f32::from(value);
                }
            }
            for (x, taps) in self.columns.iter().enumerate() {
                let mut sums = [self.half; 3];
                let pixels = line[(taps.first - left) * 3..].chunks_exact(3);
                for (&weight, pixel) in taps.weights.iter().zip(pixels) {
                    for (sum, value) in sums.iter_mut().zip(pixel) {
                        *sum += weight * value;
                    }
                }
                for (plane, sum) in planes.iter_mut().zip(sums) {
                    plane[y * side + x] = sum as u8;
                }
            }
        }
    }
}

/// The middle `side` of `to` output pixels that `from` pixels are resized to.
fn taps(from: usize, to: usize, side: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let support = match filter {
        Filter::Antialiased => scale.max(1.0),
        Filter::Bilinear => 1.0,
    };
    let offset = (to - side) / 2;
    let tap = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let weight = |j: usize| (1.0 - ((j as f64 + 0.5 - centre) / support).abs()).max(0.0);
        let first = (centre - support).floor().max(0.0) as usize;
        let end = ((centre + support).ceil() as usize).min(from);
        let taps: Vec<usize> = (first..end).filter(|&j| weight(j) > 1e-9).collect();
        let total: f64 = taps.iter().map(|&j| weight(j)).sum();
        Taps { first: taps[0], weights: taps.iter().map(|&j| (weight(j) / total) as f32).collect() }
    };
    (offset..offset + side).map(tap).collect()
}

/// Unsigned bytes to float32 in [-1, 1]: x / 127.5 - 1, on the tensor's own device.
pub fn normalise(clips: &Tensor) -> Tensor {
    clips.to_kind(Kind::Float) / 127.5 - 1.0
}

/// The way back from [-1, 1] to unsigned bytes: rounded, and clamped where the network overshoots.
pub fn to_u8(clips: &Tensor) -> Tensor {
    ((clips.to_kind(Kind::Float) + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8)
}

/// What tests ask data sets for where the clip does not matter.
#[cfg(test)]
pub(super) const SHORT: ClipSpec = ClipSpec {
    frames: 1,
    frame_stride: 1,
    resolution: 8,
    fit: Fit { filter: Filter::Antialiased, squash: false, truncate: false },
};

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::random::{Purpose, stream};

    fn picture(width: usize, height: usize, value: impl Fn(usize, usize, usize) -> u8) -> RgbFrame {
        let mut pixels = Vec::new();
        for y in 0..height {
            for x in 0..width {
                pixels.extend((0..3).map(|c| value(x, y, c)));
            }
        }
        RgbFrame { width, height, pixels }
    }

    fn spec(resolution: i64) -> ClipSpec {
        ClipSpec { frames: 1, frame_stride: 1, resolution, fit: Fit::default() }
    }

    #[test]
    fn a_constant_stays_constant() {
        for (width, height, side) in [(320, 240, 256), (64, 64, 32), (31, 77, 40), (5, 9, 16)] {
            let clip = spec(side).fit(&[picture(width, height, |_, _, c| [7, 128, 255][c])]);
            let plane = (side * side) as usize;
            for (c, value) in [7, 128, 255].into_iter().enumerate() {
                assert!(clip[c * plane..(c + 1) * plane].iter().all(|&v| v == value), "{width} {height} {side}");
            }
        }
    }

    #[test]
    fn the_same_size_is_copied() {
        // of a picture that is wider or higher, its middle
        for (width, height) in [(16, 16), (20, 16), (16, 22)] {
            let frame = picture(width, height, |x, y, c| (x * 13 + y * 7 + c * 31) as u8);
            let clip = spec(16).fit(std::slice::from_ref(&frame));
            let pixels = frame.to_tensor().permute([2, 0, 1]);
            let expected = pixels.narrow(1, (height as i64 - 16) / 2, 16).narrow(2, (width as i64 - 16) / 2, 16);
            assert!(Tensor::from_slice(&clip).reshape([3, 16, 16]).equal(&expected), "{width}x{height}");
        }
    }

    #[test]
    fn a_gradient_is_sampled_at_pixel_centres_of_the_crop() {
        // 128×64 to 32: the picture shrinks by 2 to 64×32, the crop takes columns 16..48.
        let clip = spec(32).fit(&[picture(128, 64, |x, _, _| x as u8 * 2)]);
        for (x, &found) in clip[..32].iter().enumerate() {
            let expected = ((x + 16) * 2) as f32 * 2.0 + 1.0;
            assert!((f32::from(found) - expected).abs() <= 1.0, "{x}: {found} {expected}");
        }
    }

    #[test]
    fn it_is_the_antialiased_bilinear_of_libtorch() {
        for (width, height, side) in [(320, 240, 256), (90, 64, 32), (50, 33, 64)] {
            let noise = |x: usize, y: usize, c: usize| ((x * 7919 + y * 104_729 + c * 31) % 251) as u8;
            let frame = picture(width, height, noise);
            let clip = Tensor::from_slice(&spec(side).fit(std::slice::from_ref(&frame))).reshape([3, side, side]);
            let short = width.min(height) as f64;
            let size = [height, width].map(|n| (n as f64 * side as f64 / short).round() as i64);
            let x = frame.to_tensor().permute([2, 0, 1]).unsqueeze(0).to_kind(Kind::Float);
            let reference = x.internal_upsample_bilinear2d_aa(size, false, None, None).squeeze_dim(0);
            let crop = reference.narrow(1, (size[0] - side) / 2, side).narrow(2, (size[1] - side) / 2, side);
            let difference = (clip.to_kind(Kind::Float) - crop).abs().max().double_value(&[]);
            assert!(difference < 0.51, "{width}×{height} to {side}: {difference}");
        }
    }

    /// Each other way of making a square, against LibTorch's.
    #[test]
    fn other_fits_are_those_of_libtorch() {
        for (width, height, side) in [(320, 240, 256), (90, 64, 32), (50, 33, 64)] {
            let noise = |x: usize, y: usize, c: usize| ((x * 7919 + y * 104_729 + c * 31) % 251) as u8;
            let frame = picture(width, height, noise);
            let x = frame.to_tensor().permute([2, 0, 1]).unsqueeze(0).to_kind(Kind::Float);
            let short = width.min(height) as f64;
            for (filter, squash) in [(Filter::Bilinear, false), (Filter::Bilinear, true), (Filter::Antialiased, true)] {
                let size = match squash {
                    true => [side; 2],
                    false => [height, width].map(|n| (n as f64 * side as f64 / short).round() as i64),
                };
                let reference = match filter {
                    Filter::Bilinear => x.upsample_bilinear2d(size, false, None, None),
                    Filter::Antialiased => x.internal_upsample_bilinear2d_aa(size, false, None, None),
                };
                let crop = reference.squeeze_dim(0).narrow(1, (size[0] - side) / 2, side);
                let crop = crop.narrow(2, (size[1] - side) / 2, side);
                for truncate in [false, true] {
                    let spec = ClipSpec { fit: Fit { filter, squash, truncate }, ..spec(side) };
                    let clip = Tensor::from_slice(&spec.fit(std::slice::from_ref(&frame))).reshape([3, side, side]);
                    let above = &crop - clip.to_kind(Kind::Float);
                    let ends = [above.min().double_value(&[]), above.max().double_value(&[])];
                    let wanted = if truncate { [-0.01, 1.01] } else { [-0.51, 0.51] };
                    assert!(ends[0] > wanted[0] && ends[1] < wanted[1], "{spec:?}: {ends:?}");
                }
            }
        }
    }

    #[test]
    fn every_start_is_drawn_and_none_beyond() {
        let spec = ClipSpec { frames: 4, frame_stride: 3, ..spec(8) };
        let mut seen = [0; 4];
        for sample in 0..400 {
            seen[spec.start(13, &mut stream(0, Purpose::Crop, sample, 0)).unwrap() as usize] += 1;
        }
        assert!(seen.iter().all(|&count| (70..130).contains(&count)), "{seen:?}");
        let error = spec.start(9, &mut stream(0, Purpose::Crop, 0, 0)).unwrap_err().to_string();
        assert!(error.contains("9 frames") && error.contains("need 10"), "{error}");
    }

    #[test]
    fn bytes_survive_normalisation() {
        let bytes = Tensor::arange(256, (Kind::Uint8, Device::Cpu));
        let x = normalise(&bytes);
        assert_eq!((x.min().double_value(&[]), x.max().double_value(&[])), (-1.0, 1.0));
        assert!(to_u8(&x).equal(&bytes));
        assert!(to_u8(&(x * 2.0)).int64_value(&[255]) == 255);
    }
}
