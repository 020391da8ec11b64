//! The demo set: procedural videos of a few large shapes that move, turn and cover each other over a
//! smooth, drifting background. Made to be learned by a small network in minutes: low frequencies,
//! few colours, slow motion, and still something that only a model of motion gets right.

use std::{
    f32::consts::{PI, TAU},
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rand::{Rng, RngExt, seq::SliceRandom};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    clip::RgbFrame,
    index::{IndexEntry, write_index},
    video_file::VideoWriter,
};
use crate::{
    atomic_file::write_atomically,
    random::{Purpose, stream},
};

/// How many videos, and of what size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DemoConfig {
    /// Holds `train/` and `test/` when written.
    pub root: PathBuf,
    /// Videos to train on.
    pub train: u64,
    /// Videos that nothing is trained on.
    pub test: u64,
    /// Frames of each video.
    pub frames: i64,
    /// Width and height in pixels, even.
    pub size: i64,
    /// Frames a second.
    pub fps: f64,
    /// Video i depends on the seed and i alone.
    pub seed: u64,
}

impl Default for DemoConfig {
    fn default() -> Self {
        Self { root: "data/demo".into(), train: 512, test: 64, frames: 48, size: 64, fps: 12.0, seed: 0 }
    }
}

const MANIFEST: &str = "demo.json";
/// All videos with their splits and classes.
const INDEX: &str = "index.jsonl";

/// Writes `root/train/00000.mp4`, … and `root/test/00000.mp4`, …, each a function of the seed, the
/// split and its number alone, and `root/index.jsonl`, which names the class of each video: the colour of its
/// background. Does nothing where this very set is already there.
///
/// # Errors
/// An odd size; a folder that cannot be written; a binary without the feature `video`.
pub fn write(config: &DemoConfig) -> Result<()> {
    ensure!(
        config.frames >= 1 && config.size >= 8 && config.size % 2 == 0,
        "demo videos of {} frames of size {}: at least 1 frame, and an even size of at least 8",
        config.frames,
        config.size
    );
    let videos: Vec<(Split, u64)> = (0..config.train)
        .map(|index| (Split::Train, index))
        .chain((0..config.test).map(|index| (Split::Test, index)))
        .collect();
    let manifest = config.root.join(MANIFEST);
    let expected = manifest_text(config)?;
    if fs::read_to_string(&manifest).is_ok_and(|found| found == expected)
        && videos.iter().all(|&(split, index)| config.file(split, index).exists())
    {
        // earlier versions wrote the same videos without an index
        return if config.root.join(INDEX).exists() { Ok(()) } else { config.write_index(&videos) };
    }

    // The true manifest is written last: an interrupted set is never taken for a whole one.
    if manifest.exists() {
        for split in [Split::Train, Split::Test].map(|split| config.root.join(split.name())) {
            if split.exists() {
                fs::remove_dir_all(&split).with_context(|| format!("cannot clear {}", split.display()))?;
            }
        }
    }
    write_atomically(&manifest, |file| Ok(file.write_all(b"not finished\n")?))?;
    videos.par_iter().try_for_each(|&(split, index)| {
        let size = config.size as usize;
        let scene = config.scene(split, index);
        let mut writer = VideoWriter::create(&config.file(split, index), size, size, config.fps)?;
        (0..config.frames).try_for_each(|frame| writer.write(&scene.draw(frame as f32, size)))?;
        writer.finish()
    })?;
    config.write_index(&videos)?;
    write_atomically(&manifest, |file| Ok(file.write_all(expected.as_bytes())?))
}

/// What decides the content; where the set lies does not.
fn manifest_text(config: &DemoConfig) -> Result<String> {
    Ok(serde_json::to_string_pretty(&DemoConfig { root: PathBuf::from("."), ..config.clone() })?)
}

#[derive(Clone, Copy)]
enum Split {
    Train = 0,
    Test = 1,
}

impl Split {
    fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Test => "test",
        }
    }
}

impl DemoConfig {
    fn file(&self, split: Split, index: u64) -> PathBuf {
        Path::new(&self.root).join(split.name()).join(format!("{index:05}.mp4"))
    }

    fn scene(&self, split: Split, index: u64) -> Scene {
        Scene::new(&mut stream(self.seed, Purpose::Scene, index, split as u64))
    }

    /// As `lvdm data prepare` writes one, so that a data set `{kind: indexed}` reads it.
    fn write_index(&self, videos: &[(Split, u64)]) -> Result<()> {
        let entry = |&(split, index): &(Split, u64)| IndexEntry {
            path: self.file(split, index),
            frames: self.frames,
            width: self.size as usize,
            height: self.size as usize,
            fps: Some(self.fps),
            class: Some(self.scene(split, index).background.palette.name.to_string()),
            split: Some(split.name().to_string()),
        };
        write_index(&self.root.join(INDEX), &videos.iter().map(entry).collect::<Vec<_>>())
    }
}

type Colour = [f32; 3];
type Point = [f32; 2];

const SHAPE_COLOURS: [Colour; 6] = [
    [230.0, 50.0, 50.0],
    [250.0, 200.0, 40.0],
    [60.0, 190.0, 80.0],
    [60.0, 110.0, 240.0],
    [240.0, 120.0, 200.0],
    [245.0, 245.0, 245.0],
];

/// What a background is made of. Its name is the class of a video.
struct Palette {
    name: &'static str,
    darkest: Colour,
    lightest: Colour,
}

const PALETTES: [Palette; 4] = [
    Palette { name: "blue", darkest: [30.0, 40.0, 80.0], lightest: [70.0, 100.0, 140.0] },
    Palette { name: "purple", darkest: [50.0, 30.0, 60.0], lightest: [120.0, 80.0, 120.0] },
    Palette { name: "green", darkest: [20.0, 60.0, 60.0], lightest: [80.0, 130.0, 110.0] },
    Palette { name: "brown", darkest: [60.0, 50.0, 40.0], lightest: [140.0, 115.0, 90.0] },
];

/// Lengths are in frame sides and times in frames, so a scene has no resolution.
struct Scene {
    background: Background,
    /// From the farthest to the nearest.
    shapes: Vec<Moving>,
}

/// A wave of less than a period across the frame.
struct Background {
    palette: &'static Palette,
    /// Radians per frame side.
    wave: Point,
    phase: f32,
    /// Radians per frame.
    drift: f32,
}

struct Moving {
    shape: Shape,
    colour: Colour,
    radius: f32,
    start: Point,
    /// Per frame.
    velocity: Point,
    angle: f32,
    /// Radians per frame.
    turn: f32,
}

enum Shape {
    Disc,
    /// Corners on the unit disc, in order.
    Polygon(Vec<Point>),
}

impl Scene {
    fn new(generator: &mut impl Rng) -> Self {
        let direction = generator.random_range(0.0..TAU);
        let length = TAU * generator.random_range(0.4..0.9);
        let drift = generator.random_range(0.05..0.12) * if generator.random_bool(0.5) { 1.0 } else { -1.0 };
        let background = Background {
            palette: &PALETTES[generator.random_range(0..PALETTES.len())],
            wave: [length * direction.cos(), length * direction.sin()],
            phase: generator.random_range(0.0..TAU),
            drift,
        };
        let mut colours = SHAPE_COLOURS;
        colours.shuffle(generator);
        let count = generator.random_range(2..=4);
        let shapes = colours[..count].iter().map(|&colour| Moving::new(colour, generator)).collect();
        Self { background, shapes }
    }

    /// One frame, with edges smoothed over a pixel.
    fn draw(&self, time: f32, size: usize) -> RgbFrame {
        let pixel = 1.0 / size as f32;
        let placed: Vec<_> = self.shapes.iter().map(|moving| (moving, moving.place(time))).collect();
        let mut pixels = Vec::with_capacity(size * size * 3);
        for y in 0..size {
            for x in 0..size {
                let point = [(x as f32 + 0.5) * pixel, (y as f32 + 0.5) * pixel];
                let mut colour = self.background.colour(point, time);
                for (moving, place) in &placed {
                    let cover = (0.5 - moving.distance(point, place) / pixel).clamp(0.0, 1.0);
                    colour = mix(colour, moving.colour, cover);
                }
                pixels.extend(colour.map(|value| value.round() as u8));
            }
        }
        RgbFrame { width: size, height: size, pixels }
    }
}

impl Background {
    fn colour(&self, [x, y]: Point, time: f32) -> Colour {
        let wave = (self.wave[0] * x + self.wave[1] * y + self.phase + self.drift * time).sin();
        mix(self.palette.darkest, self.palette.lightest, 0.5 + 0.5 * wave)
    }
}

/// Where a shape is: its centre and the cosine and sine of its angle.
struct Place {
    centre: Point,
    cos: f32,
    sin: f32,
}

impl Moving {
    fn new(colour: Colour, generator: &mut impl Rng) -> Self {
        let shape = match generator.random_range(0..4) {
            0 => Shape::Disc,
            1 => {
                let half = generator.random_range(PI / 7.0..PI / 4.0); // from a rectangle to a square
                let (cos, sin) = (half.cos(), half.sin());
                Shape::Polygon(vec![[cos, sin], [-cos, sin], [-cos, -sin], [cos, -sin]])
            }
            2 => Shape::Polygon(star(3, 0.5)),
            _ => Shape::Polygon(star(5, 0.5)),
        };
        // Thin shapes are drawn larger, to cover about as much as a disc.
        let scale = if matches!(shape, Shape::Disc) { 1.0 } else { 1.25 };
        let radius = generator.random_range(0.15..0.21) * scale;
        let (low, high) = (radius * 0.7, 1.0 - radius * 0.7);
        let direction = generator.random_range(0.0..TAU);
        let speed = generator.random_range(0.5..2.0) / 32.0;
        Self {
            shape,
            colour,
            radius,
            start: [generator.random_range(low..high), generator.random_range(low..high)],
            velocity: [speed * direction.cos(), speed * direction.sin()],
            angle: generator.random_range(0.0..TAU),
            turn: generator.random_range(-0.1..0.1),
        }
    }

    /// The centre bounces between two borders, from which the shape peeps over the frame's edge.
    fn place(&self, time: f32) -> Place {
        let (low, span) = (self.radius * 0.7, 1.0 - self.radius * 1.4);
        let bounce = |axis: usize| {
            let way = (self.start[axis] - low + self.velocity[axis] * time).rem_euclid(2.0 * span);
            low + if way > span { 2.0 * span - way } else { way }
        };
        let (sin, cos) = (self.angle + self.turn * time).sin_cos();
        Place { centre: [bounce(0), bounce(1)], cos, sin }
    }

    /// From a point to the shape's edge: negative inside.
    fn distance(&self, [x, y]: Point, Place { centre, cos, sin }: &Place) -> f32 {
        let (x, y) = (x - centre[0], y - centre[1]);
        let from_disc = (x * x + y * y).sqrt() - self.radius;
        match &self.shape {
            Shape::Polygon(corners) if from_disc < self.radius => {
                let point = [(x * cos + y * sin) / self.radius, (y * cos - x * sin) / self.radius];
                polygon_distance(point, corners) * self.radius
            }
            _ => from_disc, // a polygon lies within its disc, and far away the number does not matter
        }
    }
}

/// Corners on the unit circle with `inner` ones between them; a regular polygon if those lie on the
/// straight line.
fn star(points: usize, inner: f32) -> Vec<Point> {
    let corner = |i: usize| {
        let angle = PI * i as f32 / points as f32;
        let radius = if i.is_multiple_of(2) { 1.0 } else { inner };
        [radius * angle.cos(), radius * angle.sin()]
    };
    (0..2 * points).map(corner).collect()
}

/// Signed distance to a closed polygon: the nearest edge, and inside if a ray crosses an odd number
/// of edges.
fn polygon_distance([x, y]: Point, corners: &[Point]) -> f32 {
    let (mut nearest, mut inside) = (f32::INFINITY, false);
    for (i, &[ax, ay]) in corners.iter().enumerate() {
        let [bx, by] = corners[(i + 1) % corners.len()];
        let (ex, ey, px, py) = (bx - ax, by - ay, x - ax, y - ay);
        let along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0.0, 1.0);
        nearest = nearest.min((px - along * ex).hypot(py - along * ey));
        if (ay > y) != (by > y) && px < ex * py / ey {
            inside = !inside;
        }
    }
    if inside { -nearest } else { nearest }
}

fn mix(a: Colour, b: Colour, t: f32) -> Colour {
    [0, 1, 2].map(|c| a[c] + (b[c] - a[c]) * t)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            clip::{ClipSpec, SHORT},
            index::{Indexed, read_index},
            video::VideoDataset,
            video_file::VideoReader,
        },
        *,
    };

    #[test]
    fn distances_have_the_right_sign() {
        let square = [[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]];
        assert!((polygon_distance([0.0, 0.5], &square) + 0.5).abs() < 1e-6);
        assert!((polygon_distance([3.0, 0.0], &square) - 2.0).abs() < 1e-6);
        assert!(polygon_distance([-0.45, 0.0], &star(5, 0.5)) < 0.0);
        assert!(polygon_distance([-0.8, 0.0], &star(5, 0.5)) > 0.0);
    }

    #[test]
    fn shapes_stay_in_the_frame_and_move_slowly() {
        for index in 0..50 {
            let scene = Scene::new(&mut stream(0, Purpose::Scene, index, 0));
            assert!((2..=4).contains(&scene.shapes.len()));
            for moving in &scene.shapes {
                let mut last = moving.place(0.0).centre;
                for time in 1..100 {
                    let centre = moving.place(time as f32).centre;
                    assert!(centre.iter().all(|x| (0.0..=1.0).contains(x)));
                    let step = (centre[0] - last[0]).hypot(centre[1] - last[1]) * 32.0;
                    assert!(step < 2.01, "{step}");
                    last = centre;
                }
            }
        }
    }

    #[cfg(feature = "video")]
    #[test]
    fn the_set_is_the_same_each_time_and_written_once() {
        let folder = tempfile::tempdir().unwrap();
        let config = |name: &str| DemoConfig {
            root: folder.path().join(name),
            train: 2,
            test: 1,
            frames: 6,
            size: 32,
            ..DemoConfig::default()
        };
        let (one, two) = (config("one"), config("two"));
        write(&one).unwrap();
        write(&two).unwrap();
        let bytes = |config: &DemoConfig, name: &str| fs::read(config.root.join(name)).unwrap();
        for name in ["train/00000.mp4", "train/00001.mp4", "test/00000.mp4"] {
            assert!(bytes(&one, name) == bytes(&two, name), "{name}");
        }
        assert!(bytes(&one, "train/00000.mp4") != bytes(&one, "test/00000.mp4"));

        let touched =
            |config: &DemoConfig| fs::metadata(config.root.join("train/00001.mp4")).unwrap().modified().unwrap();
        let before = touched(&one);
        // as an earlier version left it: the index is added, and nothing is drawn again
        fs::remove_file(one.root.join(INDEX)).unwrap();
        for _ in 0..2 {
            write(&one).unwrap();
            assert_eq!(touched(&one), before);
            assert!(bytes(&one, INDEX) == bytes(&two, INDEX));
        }
        fs::remove_file(one.root.join("test/00000.mp4")).unwrap();
        write(&one).unwrap();
        assert!(bytes(&one, "test/00000.mp4") == bytes(&two, "test/00000.mp4"));
        write(&DemoConfig { train: 1, seed: 1, ..one.clone() }).unwrap();
        assert!(!one.root.join("train/00001.mp4").exists());
        assert!(bytes(&one, "train/00000.mp4") != bytes(&two, "train/00000.mp4"));
        assert_eq!(read_index(&one.root.join(INDEX)).unwrap().len(), 2);
    }

    /// Decoded, the class is the palette to whose colours most pixels are nearest, in both splits.
    #[cfg(feature = "video")]
    #[test]
    fn the_class_of_a_video_is_the_colour_of_its_background() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_path_buf();
        let config = DemoConfig { root: root.clone(), train: 12, test: 6, frames: 2, size: 32, ..Default::default() };
        write(&config).unwrap();
        let entries = read_index(&root.join(INDEX)).unwrap();
        // as an experiment reads it
        for (split, count) in [("train", 12), ("test", 6)] {
            let set = Indexed { file: root.join(INDEX), split: Some(split.into()) };
            let videos = set.videos(&ClipSpec { frames: 2, ..SHORT }).unwrap();
            assert_eq!((videos.videos.len(), videos.classes().unwrap().len()), (count, PALETTES.len()), "{split}");
        }
        for entry in &entries {
            let frame = VideoReader::open(&entry.path).unwrap().read(0, 1, 1).unwrap().remove(0);
            let near = |palette: &Palette| {
                let middle = mix(palette.darkest, palette.lightest, 0.5);
                let reach = distance(middle, palette.lightest) + 15.0;
                let pixels = frame.pixels.as_chunks::<3>().0.iter();
                let distance_to = |pixel: &[u8; 3], other: &Palette| {
                    let ends = [0.0, 0.25, 0.5, 0.75, 1.0].map(|t| mix(other.darkest, other.lightest, t));
                    ends.map(|colour| distance(pixel.map(f32::from), colour)).into_iter().fold(f32::INFINITY, f32::min)
                };
                let own = pixels.filter(|pixel| {
                    let nearest = PALETTES.iter().map(|other| distance_to(pixel, other)).fold(f32::INFINITY, f32::min);
                    distance(pixel.map(f32::from), middle) < reach && distance_to(pixel, palette) == nearest
                });
                own.count()
            };
            let most = PALETTES.iter().max_by_key(|palette| near(palette)).unwrap();
            assert_eq!(entry.class.as_deref(), Some(most.name), "{}", entry.path.display());
        }
        // which video is of which class never changes, since figures that were measured are of these very videos
        let classes: String = entries.iter().map(|entry| &entry.class.as_ref().unwrap()[..2]).collect();
        assert_eq!(classes, "brbrblpubrgrpugrblbrpubrpupublbrbrgr");
    }

    fn distance(a: Colour, b: Colour) -> f32 {
        (0..3).map(|c| (a[c] - b[c]).powi(2)).sum::<f32>().sqrt()
    }
}
