//! Several curves in one figure.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::drawing::{Anchor, Colour, Drawing, Font, Outline, Point, Shape, Stroke, WHITE};
use crate::atomic_file::write_atomically;

/// The colours of Okabe and Ito, which colour-blind readers can tell apart, without their yellow, which is
/// too light for a line on white.
const COLOURS: [Colour; 7] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [0, 0, 0]];
const BLACK: Colour = [20; 3];
const GREY: Colour = [90; 3];
const AXIS: Stroke = Stroke { colour: [60; 3], width: 1.0, dash: None };
const GRID: Stroke = Stroke { colour: [228; 3], width: 1.0, dash: None };
const LEVEL: Stroke = Stroke { colour: [90; 3], width: 1.8, dash: Some([7.0, 5.0]) };

// Pixels.
const WIDTH: f64 = 1200.0;
const HEIGHT_OF_CURVES: f64 = 540.0;
const MARGIN: f64 = 20.0;
const TITLE: f64 = 24.0;
const SUBTITLE: f64 = 15.0;
const LABEL: f64 = 19.0;
const NAME: f64 = 17.0;
const NUMBER: f64 = 16.0;
const CURVE: f64 = 2.4;
/// Of a name's piece of curve in the legend.
const SAMPLE: f64 = 44.0;
/// Points nearer to each other than this do not each get a marker: 64 do on the width of a figure.
const CLOSE: f64 = 14.0;
/// Between the markers of a curve with close points, at least.
const BETWEEN_MARKERS: f64 = 30.0;

/// One curve.
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// x and y, joined in this order. Where one of the two is not finite, the curve has a gap.
    pub points: Vec<(f64, f64)>,
}

/// A figure of several curves over one x.
pub struct Plot {
    pub title: String,
    /// In small letters under the title: what the numbers depend on.
    pub subtitle: String,
    pub x_label: String,
    pub y_label: String,
    /// In the order of the legend.
    pub series: Vec<Series>,
    /// A y that curves are compared with, by its name: a dashed line from side to side.
    pub level: Option<(String, f64)>,
}

impl Plot {
    /// Writes `stem`.svg and `stem`.png, which show the same, 1200 pixels wide and about 750 high. The y axis
    /// contains 0, so that heights can be compared.
    ///
    /// # Errors
    /// No series; no finite point; the files cannot be written.
    pub fn write(&self, stem: &Path) -> Result<()> {
        let draw = || -> Result<_> {
            let font = Font::dejavu_sans()?;
            let drawing = self.draw(&font)?;
            Ok((drawing.svg(), drawing.png(&font)?))
        };
        let (svg, png) = draw().with_context(|| format!("cannot draw the plot {}", stem.display()))?;
        write_atomically(&with_ending(stem, ".svg"), |file| Ok(file.write_all(svg.as_bytes())?))?;
        write_atomically(&with_ending(stem, ".png"), |file| Ok(file.write_all(&png)?))
    }

    fn draw(&self, font: &Font) -> Result<Drawing> {
        ensure!(!self.series.is_empty(), "it has no series; give it at least one");
        let points: Vec<_> = self.series.iter().flat_map(|s| &s.points).filter(|p| is_finite(p)).collect();
        ensure!(!points.is_empty(), "no point of its {} series is finite", self.series.len());
        let level = self.level.as_ref().filter(|(_, y)| y.is_finite());

        let (low, high) = range(points.iter().map(|(x, _)| *x));
        let mut x = Axis::new(low, high, 10.0)?;
        let (low, high) = range(points.iter().map(|(_, y)| *y).chain(level.map(|(_, y)| *y)).chain([0.0]));
        let mut y = Axis::new(low, if high > low { high } else { 1.0 }, 8.0)?;
        if low == 0.0 {
            y.low = 0.0;
        }

        // From left to right: the y label, its numbers, the curves.
        let y_label = font.wrap(&self.y_label, LABEL, HEIGHT_OF_CURVES);
        let numbers = y.ticks.iter().map(|(_, number)| font.width(number, NUMBER)).fold(0.0, f64::max);
        let left = (MARGIN + line(LABEL) * y_label.len() as f64 + 8.0 + numbers + 10.0).round() + 0.5;
        let right = WIDTH - MARGIN - 10.5;

        // From top to bottom: title, subtitle, legend, curves, numbers, the x label.
        let mut shapes = Vec::new();
        let mut down = MARGIN;
        paragraph(&mut shapes, &font.wrap(&self.title, TITLE, right - left), (left, &mut down), TITLE, BLACK);
        paragraph(&mut shapes, &font.wrap(&self.subtitle, SUBTITLE, right - left), (left, &mut down), SUBTITLE, GREY);
        down += 8.0;
        self.legend(&mut shapes, font, level.map(|(name, _)| name), (left, right), &mut down);
        let top = (down + 12.0).round() + 0.5;
        let bottom = top + HEIGHT_OF_CURVES;
        x.place(left, right);
        y.place(bottom, top);

        let line_between = |a, b, stroke| path(vec![Outline::Open(vec![a, b])], None, Some(stroke), None);
        for (value, number) in &x.ticks {
            let x = sharp(x.at(*value));
            shapes.push(line_between((x, top), (x, bottom + 5.0), GRID));
            shapes.push(text((x, bottom + 8.0 + NUMBER), number, NUMBER, Anchor::Middle, BLACK));
        }
        for (value, number) in &y.ticks {
            let y = sharp(y.at(*value));
            shapes.push(line_between((left - 5.0, y), (right, y), GRID));
            // A digit is 0.73 of its size high.
            shapes.push(text((left - 10.0, y + 0.365 * NUMBER), number, NUMBER, Anchor::End, BLACK));
        }
        let zero = sharp(y.at(0.0));
        shapes.push(line_between((left, zero), (right, zero), AXIS));
        shapes.push(path(
            vec![Outline::Open(vec![(left, top), (left, bottom), (right, bottom)])],
            None,
            Some(AXIS),
            None,
        ));
        if let Some((_, value)) = level {
            let y = y.at(*value);
            shapes.push(line_between((left, y), (right, y), LEVEL));
        }
        for (i, series) in self.series.iter().enumerate() {
            curve(&mut shapes, i, series, &x, &y);
        }

        for (i, label) in y_label.iter().enumerate() {
            let at = (MARGIN + LABEL + i as f64 * line(LABEL), (top + bottom) / 2.0);
            shapes.push(Shape::Text {
                at,
                text: label.clone(),
                size: LABEL,
                anchor: Anchor::Middle,
                colour: BLACK,
                upright: true,
            });
        }
        down = bottom + 8.0 + line(NUMBER) + 6.0;
        for label in font.wrap(&self.x_label, LABEL, right - left) {
            shapes.push(text(((left + right) / 2.0, down + LABEL), &label, LABEL, Anchor::Middle, BLACK));
            down += line(LABEL);
        }
        Ok(Drawing { width: WIDTH, height: (down + MARGIN).ceil(), shapes })
    }

    /// The names side by side in as many rows as they need, above the curves, where they hide nothing.
    fn legend(
        &self,
        shapes: &mut Vec<Shape>,
        font: &Font,
        level: Option<&String>,
        (left, right): (f64, f64),
        down: &mut f64,
    ) {
        let names = self.series.iter().map(|s| &s.name).chain(level);
        let mut across = left;
        let mut lines_of_row = 0;
        for (i, name) in names.enumerate() {
            let lines = font.wrap(name, NAME, right - left - SAMPLE - 10.0);
            let width = SAMPLE + 10.0 + lines.iter().map(|l| font.width(l, NAME)).fold(0.0, f64::max);
            if across > left && across + width > right {
                *down += line(NAME) * lines_of_row as f64;
                (across, lines_of_row) = (left, 0);
            }
            let middle = *down + 0.6 * NAME;
            let sample = vec![Outline::Open(vec![(across, middle), (across + SAMPLE, middle)])];
            if i < self.series.len() {
                shapes.push(path(sample, None, Some(Stroke { colour: colour(i), width: CURVE, dash: None }), None));
                shapes.push(markers(i, vec![marker(i, (across + SAMPLE / 2.0, middle))], None));
            } else {
                shapes.push(path(sample, None, Some(LEVEL), None));
            }
            paragraph(shapes, &lines, (across + SAMPLE + 10.0, &mut down.clone()), NAME, BLACK);
            across += width + 28.0;
            lines_of_row = lines_of_row.max(lines.len().max(1));
        }
        *down += line(NAME) * lines_of_row as f64;
    }
}

/// The values between two pixels.
struct Axis {
    low: f64,
    high: f64,
    /// Round values with what is written at them.
    ticks: Vec<(f64, String)>,
    /// Pixels of `low` and `high`.
    from: f64,
    to: f64,
}

impl Axis {
    /// An axis a little longer than from `low` to `high`, with about `count` ticks.
    fn new(low: f64, high: f64, count: f64) -> Result<Self> {
        let span = high - low;
        let size = low.abs().max(high.abs());
        ensure!(size < 1e300, "the values {low:e} and {high:e} do not fit on one axis");
        // A single value, as far as numbers can tell: it stands in the middle.
        if span <= 1e-12 * size || span < 1e-300 {
            let room = size.max(1.0);
            let ticks = vec![(low, signed(low.to_string()))];
            return Ok(Self { low: low - room, high: low + room, ticks, from: 0.0, to: 1.0 });
        }
        let (low, high) = (low - 0.02 * span, high + 0.02 * span);
        Ok(Self { low, high, ticks: ticks(low, high, count), from: 0.0, to: 1.0 })
    }

    fn place(&mut self, from: f64, to: f64) {
        (self.from, self.to) = (from, to);
    }

    /// The pixel of a value.
    fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }
}

/// About `count` values from `low` to `high`, one, two or five times a power of ten apart, as numbers and in
/// writing.
fn ticks(low: f64, high: f64, count: f64) -> Vec<(f64, String)> {
    let rough = (high - low) / count;
    let power = rough.log10().floor() as i32;
    let (digit, power) = match rough / 10f64.powi(power) {
        r if r < 1.5 => (1, power),
        r if r < 3.5 => (2, power),
        r if r < 7.5 => (5, power),
        _ => (1, power + 1),
    };
    // By way of the decimal writing, so that 3 · 0.1 is 0.3.
    let round = |k: i64| format!("{}e{power}", k * digit).parse::<f64>().expect("a number");
    let step = round(1);
    let write = |value: f64| match power {
        -5..=6 => format!("{value:.*}", 0.max(-power) as usize),
        _ if value == 0.0 => "0".to_string(),
        _ => format!("{value:e}"),
    };
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|k| (round(k), signed(write(round(k))))).collect()
}

/// With the minus that is as wide as a digit.
fn signed(number: String) -> String {
    number.replace('-', "−")
}

/// The curve and its markers. A point without neighbours is a marker alone.
fn curve(shapes: &mut Vec<Shape>, i: usize, series: &Series, x: &Axis, y: &Axis) {
    let mut lines = Vec::new();
    let mut marks = Vec::new();
    for run in series.points.split(|point| !is_finite(point)) {
        let points: Vec<Point> = run.iter().map(|point| (x.at(point.0), y.at(point.1))).collect();
        let between = |a: &Point, b: &Point| (a.0 - b.0).hypot(a.1 - b.1);
        let least = if points.windows(2).any(|two| between(&two[0], &two[1]) < CLOSE) { BETWEEN_MARKERS } else { 0.0 };
        let mut last: Option<&Point> = None;
        for point in &points {
            if last.is_none_or(|last| between(last, point) >= least) {
                marks.push(marker(i, *point));
                last = Some(point);
            }
        }
        if points.len() > 1 {
            lines.push(Outline::Open(points));
        }
    }
    if !lines.is_empty() {
        let stroke = Stroke { colour: colour(i), width: CURVE, dash: None };
        shapes.push(path(lines, None, Some(stroke), Some(series.name.clone())));
    }
    if !marks.is_empty() {
        shapes.push(markers(i, marks, Some(series.name.clone())));
    }
}

/// Colours and markers come around after 7 and after 5 series, so 35 differ.
fn colour(i: usize) -> Colour {
    COLOURS[i % COLOURS.len()]
}

fn marker(i: usize, (x, y): Point) -> Outline {
    let around = |corners: &[Point]| Outline::Closed(corners.iter().map(|(dx, dy)| (x + dx, y + dy)).collect());
    match i % 5 {
        0 => Outline::Circle((x, y), 4.6),
        1 => around(&[(-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)]),
        2 => around(&[(0.0, -5.8), (5.4, 3.8), (-5.4, 3.8)]),
        3 => around(&[(0.0, -6.0), (6.0, 0.0), (0.0, 6.0), (-6.0, 0.0)]),
        _ => around(&[(0.0, 5.8), (5.4, -3.8), (-5.4, -3.8)]),
    }
}

/// With a white rim, so that markers on another curve are seen.
fn markers(i: usize, marks: Vec<Outline>, title: Option<String>) -> Shape {
    path(marks, Some(colour(i)), Some(Stroke { colour: WHITE, width: 0.8, dash: None }), title)
}

fn path(outlines: Vec<Outline>, fill: Option<Colour>, stroke: Option<Stroke>, title: Option<String>) -> Shape {
    Shape::Path { outlines, fill, stroke, title }
}

fn text(at: Point, text: &str, size: f64, anchor: Anchor, colour: Colour) -> Shape {
    Shape::Text { at, text: text.to_string(), size, anchor, colour, upright: false }
}

fn paragraph(shapes: &mut Vec<Shape>, lines: &[String], (left, down): (f64, &mut f64), size: f64, colour: Colour) {
    for words in lines {
        shapes.push(text((left, *down + size), words, size, Anchor::Start, colour));
        *down += line(size);
    }
}

/// From one line of text to the next.
fn line(size: f64) -> f64 {
    (1.4 * size).round()
}

/// The middle of a pixel, where a thin line is not smeared over two.
fn sharp(pixel: f64) -> f64 {
    pixel.floor() + 0.5
}

fn is_finite((x, y): &(f64, f64)) -> bool {
    x.is_finite() && y.is_finite()
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}

/// `Path::with_extension` would take `0.5` in a name for an ending.
fn with_ending(stem: &Path, ending: &str) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Cursor};

    use super::*;

    fn series(name: &str, points: Vec<(f64, f64)>) -> Series {
        Series { name: name.to_string(), points }
    }

    fn plot(series: Vec<Series>) -> Plot {
        Plot {
            title: "FVD <over> frames".to_string(),
            subtitle: "2048 & 2048 clips".to_string(),
            x_label: "first frame of the window".to_string(),
            y_label: "FVD".to_string(),
            series,
            level: None,
        }
    }

    /// Both files, as text and as RGB rows with their width.
    fn written(plot: &Plot) -> (String, Vec<u8>, u32) {
        let folder = tempfile::tempdir().unwrap();
        let stem = folder.path().join("new/fvd_0.5");
        plot.write(&stem).unwrap();
        let read = |name: &str| fs::read(stem.with_file_name(name)).unwrap();
        let first = (read("fvd_0.5.svg"), read("fvd_0.5.png"));
        plot.write(&stem).unwrap();
        assert_eq!(first, (read("fvd_0.5.svg"), read("fvd_0.5.png")), "the same plot, the same bytes");
        assert_eq!(fs::read_dir(stem.parent().unwrap()).unwrap().count(), 2);
        let mut reader = png::Decoder::new(Cursor::new(first.1)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let width = reader.next_frame(&mut pixels).unwrap().width;
        (String::from_utf8(first.0).unwrap(), pixels, width)
    }

    fn count(pixels: &[u8], colour: Colour) -> usize {
        pixels.as_chunks().0.iter().filter(|pixel| **pixel == colour).count()
    }

    /// The `d` of the line of each curve, without its markers.
    fn curves(svg: &str) -> Vec<&str> {
        let of_curve = |l: &&str| l.starts_with("<path fill=\"none\"") && l.contains("<title>");
        svg.lines().filter(of_curve).map(|l| l.split(" d=\"").nth(1).unwrap().split('"').next().unwrap()).collect()
    }

    #[test]
    fn every_series_is_in_both_files() {
        let name = "x < y & \"z\" > 'w'\u{1}";
        let line = |height: f64| (0..64).map(|i| (16.0 * i as f64, height + i as f64)).collect();
        let mut figure = plot((0..9).map(|i| series(&format!("{name}{i}"), line(100.0 * i as f64))).collect());
        figure.level = Some(("floor <&>".to_string(), 50.0));
        let (svg, pixels, width) = written(&figure);
        assert_eq!(width, 1200);
        assert_eq!(curves(&svg).len(), 9);
        for i in 0..9 {
            let escaped = format!("x &lt; y &amp; \"z\" &gt; 'w'\u{fffd}{i}");
            // In the legend, at the line and at the markers.
            assert_eq!(svg.matches(&format!(">{escaped}</")).count(), 3);
        }
        assert!(svg.contains(">floor &lt;&amp;&gt;</text>") && svg.contains(">FVD &lt;over&gt; frames</text>"));
        assert!(!svg.contains('\u{1}') && svg.contains("sans-serif"));
        assert!(curves(&svg).iter().all(|d| d.matches('L').count() == 63));
        assert!(COLOURS.iter().all(|colour| count(&pixels, *colour) > 500));
        assert!(count(&pixels, WHITE) > pixels.len() / 3 / 2);
    }

    #[test]
    fn a_point_that_is_not_finite_leaves_a_gap() {
        let mut points: Vec<_> = (0..10).map(|i| (i as f64, 1.0)).collect();
        points[3].1 = f64::NAN;
        points[5].1 = f64::INFINITY;
        let (svg, pixels, _) = written(&plot(vec![series("a", points), series("none", vec![(0.0, f64::NAN)])]));
        // 0 1 2 | 4 | 6 7 8 9, the lonely one as a marker; the series without a point is in the legend alone.
        let curves = curves(&svg);
        assert_eq!((curves.len(), curves[0].matches('M').count(), curves[0].matches('L').count()), (1, 2, 5));
        assert_eq!(svg.matches("<title>none").count(), 0);
        assert_eq!(svg.matches(">none</text>").count(), 1);
        assert!(count(&pixels, COLOURS[0]) > 1000);
    }

    /// More pixels of its colour than the legend has.
    #[test]
    fn a_single_point_is_seen() {
        for point in [(0.0, 300.0), (1000.0, 0.0), (-7.5, -0.25)] {
            let with = count(&written(&plot(vec![series("a", vec![point])])).1, COLOURS[0]);
            let legend_only = plot(vec![series("a", vec![]), series("b", vec![point])]);
            let without = count(&written(&legend_only).1, COLOURS[0]);
            assert!(with >= without + 40, "{point:?}: {with} pixels, {without} of them in the legend");
        }
    }

    #[test]
    fn nothing_to_draw_is_an_error_and_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let huge = vec![(0.0, 1e305), (1.0, 0.0)];
        for (series, word) in [
            (vec![], "no series"),
            (vec![series("a", vec![]), series("b", vec![(f64::NAN, 0.0)])], "no point of its 2 series is finite"),
            (vec![series("a", huge)], "do not fit"),
        ] {
            let error = format!("{:#}", plot(series).write(&folder.path().join("fvd")).unwrap_err());
            assert!(error.contains(word) && error.contains("fvd"), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// The y of a value is where its tick is, 0 is on the axis, and a negative value has room below it.
    #[test]
    fn heights_are_true() {
        let draw = |low: f64| {
            let figure = plot(vec![series("a", vec![(0.0, low), (10.0, 100.0)])]);
            figure.draw(&Font::dejavu_sans().unwrap()).unwrap()
        };
        let ends = |drawing: &Drawing| {
            let of_curve = |shape: &Shape| match shape {
                Shape::Path { outlines, fill: None, title: Some(_), .. } => match &outlines[0] {
                    Outline::Open(points) => Some((points[0].1, points[1].1)),
                    _ => None,
                },
                _ => None,
            };
            drawing.shapes.iter().find_map(of_curve).unwrap()
        };
        let number = |drawing: &Drawing, number: &str| {
            let of_number = |shape: &Shape| match shape {
                Shape::Text { at, text, anchor: Anchor::End, .. } if text == number => Some(at.1 - 0.365 * NUMBER),
                _ => None,
            };
            drawing.shapes.iter().find_map(of_number).unwrap()
        };
        for (low, lowest) in [(0.0, "0"), (-20.0, "−20")] {
            let drawing = draw(low);
            let (start, end) = ends(&drawing);
            assert!((start - number(&drawing, lowest)).abs() <= 1.0 && (end - number(&drawing, "100")).abs() <= 1.0);
            assert!((start - end) / HEIGHT_OF_CURVES > 0.9);
        }
    }

    #[test]
    fn ticks_are_round() {
        let written = |low, high, count| ticks(low, high, count).into_iter().map(|t| t.1).collect::<Vec<_>>().join(" ");
        assert_eq!(written(-20.0, 1028.0, 10.0), "0 100 200 300 400 500 600 700 800 900 1000");
        assert_eq!(written(0.0, 3.3, 8.0), "0.0 0.5 1.0 1.5 2.0 2.5 3.0");
        assert_eq!(written(-0.021, 0.1, 8.0), "−0.02 0.00 0.02 0.04 0.06 0.08 0.10");
        assert_eq!(written(0.0, 7e-7, 8.0), "0 1e−7 2e−7 3e−7 4e−7 5e−7 6e−7 7e−7");
        assert_eq!(written(0.0, 2.5e9, 5.0), "0 5e8 1e9 1.5e9 2e9 2.5e9");
        assert_eq!(ticks(0.0, 0.9, 9.0)[3].0, 0.3);
    }
}
