//! Histograms of velocity and acceleration: what the motion distance compares. No network, and blind to what moves.
//!
//! The Fréchet video motion distance (Liu et al. 2024, arXiv 2407.16124) tracks points by a network and compares
//! histograms of their velocities and accelerations by direction, which count each motion by the logarithm of its speed.
//! Here the motion is optical flow instead, Farnebäck's (2003) in OpenCV with the settings of Chu et al. 2020 (arXiv
//! 1811.09393), who measure the motion of generated videos with it too. It fits a quadratic to the grey values about each
//! pixel and finds how far that moved: adding to the brightness of a whole video or multiplying it changes nothing. It is
//! computed without random numbers, and the same on any number of threads.
//!
//! A clip's features: for each cell of a 4×4 grid over the picture and each of 8 directions, 45° apart, the mean over
//! pixels and frames of log₂(1 + speed), a motion between two directions counting for both; first of velocities, then of
//! accelerations, 256 numbers. Speeds are in pixels a frame of pictures of 128×128. An acceleration is how the velocity
//! changes along the path: v at the next frame and the place that a pixel moved to, less v.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::{FeatureExtractor, feature_extractor::ensure_videos};

/// Frames are resized to this height and width.
const SIDE: usize = 128;

/// Cells along the height and along the width.
const CELLS: usize = 4;

/// Directions.
const DIRECTIONS: usize = 8;

/// Numbers of one histogram: cells × directions.
const BINS: usize = CELLS * CELLS * DIRECTIONS;

/// A field of motion, `SIDE`² vectors (right, down) in pixels, row by row.
type Field = Vec<[f32; 2]>;

/// The histograms of videos, on all threads.
pub struct Motion;

impl Motion {
    /// # Errors
    /// A file of weights; a binary without the feature `opencv`.
    pub fn new(file: Option<&Path>) -> Result<Self> {
        ensure!(file.is_none(), "the motion distance has no weights: take the `file` of its extractor away");
        flow::available()?;
        Ok(Motion)
    }
}

impl FeatureExtractor for Motion {
    fn name(&self) -> &str {
        "histograms of optical flow (Farnebäck)"
    }

    fn weights_sha256(&self) -> &str {
        ""
    }

    fn width(&self) -> i64 {
        2 * BINS as i64
    }

    fn least_frames(&self) -> i64 {
        3
    }

    fn preparation(&self) -> &str {
        "frames in grey to 128x128"
    }

    fn library(&self) -> Option<String> {
        flow::version()
    }

    fn features(&self, videos: &Tensor) -> Result<Tensor> {
        ensure_videos("the motion distance", videos, self.least_frames())?;
        let size = videos.size();
        let [frames, height, width] = [1, 2, 3].map(|axis| size[axis] as usize);
        let bytes: Vec<u8> = Vec::try_from(videos.to_device(Device::Cpu).contiguous().view(-1))?;
        let rows: Vec<Vec<f32>> = bytes
            .par_chunks(frames * height * width * 3)
            .map(|clip| {
                let fields = flow::of_clip(clip, height, width).context("the optical flow of a clip")?;
                Ok(histograms(&fields))
            })
            .collect::<Result<_>>()?;
        Ok(Tensor::from_slice(&rows.concat()).to_kind(Kind::Float).view([size[0], self.width()]))
    }
}

/// Of velocities, one field a pair of neighbouring frames.
fn histograms(velocities: &[Field]) -> Vec<f32> {
    let accelerations: Vec<Field> = velocities.windows(2).map(|pair| acceleration(&pair[0], &pair[1])).collect();
    [histogram(velocities), histogram(&accelerations)].concat()
}

/// How velocity changes along the path of each pixel.
fn acceleration(now: &Field, next: &Field) -> Field {
    let along = |place: usize, v: &[f32; 2]| {
        let (x, y) = ((place % SIDE) as f32 + v[0], (place / SIDE) as f32 + v[1]);
        let then = at(next, x, y);
        [then[0] - v[0], then[1] - v[1]]
    };
    now.iter().enumerate().map(|(place, v)| along(place, v)).collect()
}

/// A field between its pixels, bilinear; beyond the edge it is that of the edge.
fn at(field: &Field, x: f32, y: f32) -> [f32; 2] {
    let split = |position: f32| {
        let position = position.clamp(0.0, (SIDE - 1) as f32);
        let low = (position as usize).min(SIDE - 2);
        (low, position - low as f32)
    };
    let ((x, right), (y, down)) = (split(x), split(y));
    let corner = |x: usize, y: usize, i: usize| field[y * SIDE + x][i];
    [0, 1].map(|i| {
        let above = corner(x, y, i) * (1.0 - right) + corner(x + 1, y, i) * right;
        let below = corner(x, y + 1, i) * (1.0 - right) + corner(x + 1, y + 1, i) * right;
        above * (1.0 - down) + below * down
    })
}

/// By cell (row by row) and direction: the mean of log₂(1 + speed) over the cell's pixels and all fields.
fn histogram(fields: &[Field]) -> Vec<f32> {
    let mut sums = vec![0.0f64; BINS];
    for field in fields {
        for (place, v) in field.iter().enumerate() {
            let (column, row) = (place % SIDE * CELLS / SIDE, place / SIDE * CELLS / SIDE);
            let bins = &mut sums[(row * CELLS + column) * DIRECTIONS..][..DIRECTIONS];
            let size = f64::from((v[0] * v[0] + v[1] * v[1]).sqrt().ln_1p()) / std::f64::consts::LN_2;
            // directions are the middles of bins
            let turn = f64::from(v[1]).atan2(f64::from(v[0])) / std::f64::consts::TAU;
            let position = turn.rem_euclid(1.0) * DIRECTIONS as f64;
            let (low, part) = (position.floor(), position.fract());
            bins[low as usize % DIRECTIONS] += size * (1.0 - part);
            bins[(low as usize + 1) % DIRECTIONS] += size * part;
        }
    }
    let counted = (fields.len() * SIDE * SIDE / (CELLS * CELLS)) as f64;
    sums.into_iter().map(|sum| (sum / counted) as f32).collect()
}

/// OpenCV's part.
#[cfg(feature = "opencv")]
mod flow {
    use anyhow::Result;
    use opencv::{
        core::{Mat, Point2f, Size},
        imgproc,
        prelude::*,
        video,
    };

    use super::{Field, SIDE};

    pub fn available() -> Result<()> {
        Ok(())
    }

    /// Of the OpenCV that is loaded.
    pub fn version() -> Option<String> {
        opencv::core::get_version_string().ok().map(|version| format!("OpenCV {version}"))
    }

    /// From each frame of a clip, u8 `[F, H, W, 3]`, to the next.
    pub fn of_clip(clip: &[u8], height: usize, width: usize) -> Result<Vec<Field>> {
        let frames: Vec<Mat> =
            clip.chunks(height * width * 3).map(|frame| grey(frame, height)).collect::<Result<_>>()?;
        frames.windows(2).map(|pair| between(&pair[0], &pair[1])).collect()
    }

    fn grey(frame: &[u8], height: usize) -> Result<Mat> {
        let flat = Mat::from_slice(frame)?;
        let rgb = flat.reshape(3, height as i32)?;
        let (mut grey, mut small) = (Mat::default(), Mat::default());
        imgproc::cvt_color_def(&rgb, &mut grey, imgproc::COLOR_RGB2GRAY)?;
        let side = SIDE as i32;
        let shrinks = rgb.rows() > side || rgb.cols() > side;
        let filter = if shrinks { imgproc::INTER_AREA } else { imgproc::INTER_LINEAR };
        imgproc::resize(&grey, &mut small, Size::new(side, side), 0.0, 0.0, filter)?;
        Ok(small)
    }

    fn between(from: &Mat, to: &Mat) -> Result<Field> {
        let mut flow = Mat::default();
        // three levels of a pyramid, windows of 15 pixels, three iterations, polynomials of 5×5 with deviation 1.2
        video::calc_optical_flow_farneback(from, to, &mut flow, 0.5, 3, 15, 3, 5, 1.2, 0)?;
        Ok(flow.data_typed::<Point2f>()?.iter().map(|v| [v.x, v.y]).collect())
    }
}

#[cfg(not(feature = "opencv"))]
mod flow {
    use anyhow::{Result, bail};

    use super::Field;

    pub fn available() -> Result<()> {
        bail!(
            "the motion distance looks at optical flow, and this binary was built without the feature `opencv`: build it \
             with default features"
        )
    }

    pub fn version() -> Option<String> {
        None
    }

    pub fn of_clip(_clip: &[u8], _height: usize, _width: usize) -> Result<Vec<Field>> {
        available().map(|()| Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uniform(v: [f32; 2]) -> Field {
        vec![v; SIDE * SIDE]
    }

    /// A motion along one of the 8 directions is all in its bin; one between two counts half for each.
    #[test]
    fn directions() {
        let of = |v| histogram(&[uniform(v), uniform(v)]);
        let bins = |found: &[f32], cell: usize| found[cell * DIRECTIONS..][..DIRECTIONS].to_vec();
        let expected = |entries: &[(usize, f32)]| {
            let mut bins = vec![0.0f32; DIRECTIONS];
            entries.iter().for_each(|(bin, value)| bins[*bin] = *value);
            bins
        };
        let near = |found: Vec<f32>, wanted: Vec<f32>| {
            let far = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 1e-5, "{found:?} is not {wanted:?}");
        };
        let root = std::f32::consts::FRAC_1_SQRT_2;
        for (v, entries) in [
            ([3.0, 0.0], vec![(0, 2.0)]),
            ([0.0, 3.0], vec![(2, 2.0)]),
            ([-7.0, 0.0], vec![(4, 3.0)]),
            ([root, -root], vec![(7, 1.0)]),
            ([(22.5f32).to_radians().cos(), (22.5f32).to_radians().sin()], vec![(0, 0.5), (1, 0.5)]),
            ([0.0, 0.0], vec![]),
        ] {
            let found = of(v);
            for cell in [0, 5, 15] {
                near(bins(&found, cell), expected(&entries));
            }
        }
        // a cell sees its own pixels only: the upper right quarter of the picture moves down
        let moving = |place: usize| if place % SIDE >= SIDE / 2 && place / SIDE < SIDE / 2 { 1.0 } else { 0.0 };
        let field: Field = (0..SIDE * SIDE).map(|place| [0.0, moving(place)]).collect();
        let found = histogram(&[field]);
        for cell in 0..CELLS * CELLS {
            let wanted = if [2, 3, 6, 7].contains(&cell) { expected(&[(2, 1.0)]) } else { expected(&[]) };
            near(bins(&found, cell), wanted);
        }
    }

    /// Along the path: what moves evenly does not accelerate, though the field at one place changes.
    #[test]
    fn accelerations() {
        // velocity grows with the column that the pixel had at the start
        let slope = 0.1f32;
        let start: Field = (0..SIDE * SIDE).map(|place| [slope * (place % SIDE) as f32 * 0.1, 0.0]).collect();
        // after a step the pixel of column c is at c·(1 + slope/10), with the velocity that it had
        let then = |x: f32| slope * 0.1 * x / (1.0 + slope * 0.1);
        let next: Field = (0..SIDE * SIDE).map(|place| [then((place % SIDE) as f32), 0.0]).collect();
        let found = acceleration(&start, &next);
        let inside = |place: &usize| (place % SIDE) < SIDE - 2;
        let most = (0..SIDE * SIDE).filter(inside).map(|place| found[place][0].abs()).fold(0.0, f32::max);
        assert!(most < 1e-5, "{most}");
        // at one and the same place it did change
        assert!((next[SIDE - 3][0] - start[SIDE - 3][0]).abs() > 1e-3);
        assert_eq!(acceleration(&uniform([1.0, 0.0]), &uniform([1.0, 2.5]))[777], [0.0, 2.5]);
    }
}
