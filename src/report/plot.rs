//! Several curves in one figure.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{
    axis::{Axis, Scale},
    curve::{Curve, colour, has_place, marker, markers, neighbours, path, range, stroke},
    drawing::{Anchor, Colour, Drawing, Font, Outline, Point, Shape, Stroke},
    look::{FIGURE, Look, SMALL},
    series::Series,
};
use crate::atomic_file::write_atomically;

const BLACK: Colour = [20; 3];
const GREY: Colour = [90; 3];
const AXIS: Stroke = Stroke { colour: [60; 3], width: 1.0, dash: None };
const GRID: Stroke = Stroke { colour: [228; 3], width: 1.0, dash: None };
const LEVEL: Stroke = Stroke { colour: [90; 3], width: 1.8, dash: Some([7.0, 5.0]) };

/// From the end of the x axis to the names at the ends of curves.
const LEADER: f64 = 14.0;

/// A figure of several curves over one x.
pub struct Plot {
    /// Above the figure.
    pub title: String,
    /// In small letters under the title: what the numbers depend on.
    pub subtitle: String,
    /// Below the axis.
    pub x_label: String,
    /// Beside the axis.
    pub y_label: String,
    /// In the order of the legend.
    pub series: Vec<Series>,
    /// A y that curves are compared with, by its name: a dashed line from side to side.
    pub level: Option<(String, f64)>,
}

impl Plot {
    /// The `<svg>` element of a small plot for a page: 360 pixels wide, so that its letters can be read on a phone too.
    /// Several curves have their names at their ends besides the legend. A curve of more than 120 points is drawn as
    /// means of [`Plot::averaged`] neighbours, with a pale band from the least to the greatest of them.
    ///
    /// # Errors
    /// No series; no finite point that the scale has a place for.
    pub fn small_svg(&self, scale: Scale) -> Result<String> {
        Ok(self.draw(&Font::dejavu_sans()?, &SMALL, scale)?.svg())
    }

    /// Of how many neighbouring points each point of the longest curve is the mean, in [`Plot::small_svg`].
    pub fn averaged(&self) -> usize {
        self.series.iter().map(|series| neighbours(series, &SMALL)).max().unwrap_or(1)
    }

    /// Writes `stem`.svg and `stem`.png, which show the same, 1200 pixels wide and about 750 high. The y axis
    /// contains 0, so that heights can be compared.
    ///
    /// # Errors
    /// No series; no finite point; the files cannot be written.
    pub fn write(&self, stem: &Path) -> Result<()> {
        let draw = || -> Result<_> {
            let font = Font::dejavu_sans()?;
            let drawing = self.draw(&font, &FIGURE, Scale::Linear)?;
            Ok((drawing.svg(), drawing.png(&font)?))
        };
        let (svg, png) = draw().with_context(|| format!("cannot draw the plot {}", stem.display()))?;
        write_atomically(&with_ending(stem, ".svg"), |file| Ok(file.write_all(svg.as_bytes())?))?;
        write_atomically(&with_ending(stem, ".png"), |file| Ok(file.write_all(&png)?))
    }

    fn draw(&self, font: &Font, look: &Look, scale: Scale) -> Result<Drawing> {
        ensure!(!self.series.is_empty(), "it has no series; give it at least one");
        let curves: Vec<Curve> = self.series.iter().map(|series| Curve::of(series, look, scale)).collect();
        let points: Vec<_> = self.series.iter().flat_map(|s| &s.points).filter(|p| has_place(p, scale)).collect();
        ensure!(!points.is_empty(), "no point of its {} series is finite", self.series.len());
        let level = self.level.as_ref().filter(|(_, y)| scale.has(*y));

        let (low, high) = range(points.iter().map(|(x, _)| *x));
        let mut x = Axis::new(low, high, if look.width > 600.0 { 10.0 } else { 3.5 })?;
        let values = points.iter().map(|(_, y)| *y).chain(level.map(|(_, y)| *y));
        let mut y = match scale {
            Scale::Linear => {
                let (low, high) = range(values.chain([0.0]));
                let count = if look.height_of_curves > 300.0 { 8.0 } else { 4.0 };
                let mut y = Axis::new(low, if high > low { high } else { 1.0 }, count)?;
                if low == 0.0 {
                    y.low = 0.0;
                }
                y
            }
            Scale::Logarithmic => {
                let (low, high) = range(values);
                Axis::logarithmic(low, high)
            }
        };

        // From left to right: the y label, its numbers, the curves, their names.
        let y_label = font.wrap(&self.y_label, look.label, look.height_of_curves);
        let numbers = y.ticks.iter().map(|(_, number)| font.width(number, look.number)).fold(0.0, f64::max);
        let gap = 0.6 * look.number;
        let left = (look.margin + line(look.label) * y_label.len() as f64 + 0.5 * gap + numbers + gap).round() + 0.5;
        let fit = line(look.name) * self.series.len() as f64 <= look.height_of_curves;
        let named = look.names > 0.0 && self.series.len() > 1 && fit;
        let widest = self.series.iter().map(|series| font.width(&series.name, look.name)).fold(0.0, f64::max);
        let right = look.width - if named { look.names.min(LEADER + widest + look.margin) } else { look.margin + 10.5 };

        // From top to bottom: title, subtitle, legend, curves, numbers, the x label.
        let mut shapes = Vec::new();
        let mut down = look.margin;
        let edge = look.width - look.margin - 10.5;
        for (words, size, colour) in [(&self.title, look.title, BLACK), (&self.subtitle, look.subtitle, GREY)] {
            paragraph(&mut shapes, &font.wrap(words, size, edge - left), (left, &mut down), size, colour);
        }
        if self.series.len() > 1 || level.is_some() || look.names == 0.0 {
            down += gap;
            // a small plot has no room left of the axis to lose
            let from = if look.names == 0.0 { left } else { look.margin };
            self.legend(&mut shapes, font, look, level.map(|(name, _)| name), (from, edge), &mut down);
        }
        let top = (down + gap).round() + 0.5;
        let bottom = top + look.height_of_curves;
        x.place(left, right);
        y.place(bottom, top);

        let line_between = |a, b, stroke| path(vec![Outline::Open(vec![a, b])], None, Some(stroke), None);
        for (value, number) in &x.ticks {
            let x = sharp(x.at(*value));
            shapes.push(line_between((x, top), (x, bottom + 5.0), GRID));
            shapes.push(text((x, bottom + 8.0 + look.number), number, look.number, Anchor::Middle, BLACK));
        }
        for (value, number) in &y.ticks {
            let y = sharp(y.at(*value));
            shapes.push(line_between((left - 5.0, y), (right, y), GRID));
            // A digit is 0.73 of its size high.
            shapes.push(text((left - gap, y + 0.365 * look.number), number, look.number, Anchor::End, BLACK));
        }
        if scale == Scale::Linear {
            let zero = sharp(y.at(0.0));
            shapes.push(line_between((left, zero), (right, zero), AXIS));
        }
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
        for (i, curve) in curves.iter().enumerate() {
            curve.draw_band(&mut shapes, i, &x, &y);
        }
        for (i, (curve, series)) in curves.iter().zip(&self.series).enumerate() {
            curve.draw(&mut shapes, i, &series.name, look, &x, &y);
        }
        if named {
            self.names_at_ends(&mut shapes, font, look, &curves, (&x, &y));
        }

        for (i, label) in y_label.iter().enumerate() {
            let at = (look.margin + look.label + i as f64 * line(look.label), (top + bottom) / 2.0);
            shapes.push(Shape::Text {
                at,
                text: label.clone(),
                size: look.label,
                anchor: Anchor::Middle,
                colour: BLACK,
                upright: true,
            });
        }
        down = bottom + 8.0 + line(look.number) + 0.3 * look.label;
        for label in font.wrap(&self.x_label, look.label, right - left) {
            shapes.push(text(((left + right) / 2.0, down + look.label), &label, look.label, Anchor::Middle, BLACK));
            down += line(look.label);
        }
        Ok(Drawing { width: look.width, height: (down + look.margin).ceil(), shapes })
    }

    /// The names side by side in as many rows as they need, above the curves, where they hide nothing.
    fn legend(
        &self,
        shapes: &mut Vec<Shape>,
        font: &Font,
        look: &Look,
        level: Option<&String>,
        (left, right): (f64, f64),
        down: &mut f64,
    ) {
        let Look { name: size, sample: length, .. } = *look;
        let before = length + 0.6 * size;
        let names = self.series.iter().map(|s| &s.name).chain(level);
        let mut across = left;
        let mut lines_of_row = 0;
        for (i, name) in names.enumerate() {
            let lines = font.wrap(name, size, right - left - before);
            let width = before + lines.iter().map(|l| font.width(l, size)).fold(0.0, f64::max);
            if across > left && across + width > right {
                *down += line(size) * lines_of_row as f64;
                (across, lines_of_row) = (left, 0);
            }
            let middle = *down + 0.6 * size;
            let sample = vec![Outline::Open(vec![(across, middle), (across + length, middle)])];
            if i < self.series.len() {
                shapes.push(path(sample, None, Some(stroke(i, look)), None));
                shapes.push(markers(i, vec![marker(i, (across + length / 2.0, middle), look)], None));
            } else {
                shapes.push(path(sample, None, Some(LEVEL), None));
            }
            paragraph(shapes, &lines, (across + before, &mut down.clone()), size, BLACK);
            across += width + 1.6 * size;
            lines_of_row = lines_of_row.max(lines.len().max(1));
        }
        *down += line(size) * lines_of_row as f64;
    }

    /// Each name beside the last point of its curve, moved up or down where names would meet, with a thin line to it.
    fn names_at_ends(
        &self,
        shapes: &mut Vec<Shape>,
        font: &Font,
        look: &Look,
        curves: &[Curve],
        (x, y): (&Axis, &Axis),
    ) {
        let mut ends: Vec<(usize, Point)> = curves
            .iter()
            .enumerate()
            .filter_map(|(i, curve)| Some((i, curve.last()?)))
            .map(|(i, (last_x, last_y))| (i, (x.at(last_x), y.at(last_y))))
            .collect();
        ends.sort_by(|a, b| a.1.1.total_cmp(&b.1.1));
        let wanted: Vec<f64> = ends.iter().map(|(_, (_, y))| *y).collect();
        let heights = spread(&wanted, line(look.name), (y.to + 0.5 * look.name, y.from - 0.5 * look.name));
        for ((i, end), height) in ends.into_iter().zip(heights) {
            let at = x.to + LEADER;
            let leader = Stroke { colour: colour(i), width: 0.7, dash: None };
            shapes.push(path(vec![Outline::Open(vec![end, (at - 2.0, height)])], None, Some(leader), None));
            let name = shortened(font, &self.series[i].name, look.name, look.width - at);
            shapes.push(text((at, height + 0.365 * look.name), &name, look.name, Anchor::Start, BLACK));
        }
    }
}

/// The numbers, which ascend, moved as little as keeps them `least` apart and, where they all fit, between two others.
fn spread(wanted: &[f64], least: f64, (low, high): (f64, f64)) -> Vec<f64> {
    let mut found = wanted.to_vec();
    let mut lowest = low;
    for at in &mut found {
        *at = at.max(lowest);
        lowest = *at + least;
    }
    let mut highest = high;
    for at in found.iter_mut().rev() {
        *at = at.min(highest);
        highest = *at - least;
    }
    found
}

/// As much of a text as fits into `width` pixels; `…` stands for the rest.
fn shortened(font: &Font, text: &str, size: f64, width: f64) -> String {
    if font.width(text, size) <= width {
        return text.into();
    }
    let mut short = String::new();
    for letter in text.chars() {
        if font.width(&format!("{short}{letter}…"), size) > width {
            break;
        }
        short.push(letter);
    }
    short + "…"
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
    use crate::report::{curve::COLOURS, drawing::WHITE};

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
        figure.level = Some(("real <&>".to_string(), 50.0));
        let (svg, pixels, width) = written(&figure);
        assert_eq!(width, 1200);
        assert_eq!(curves(&svg).len(), 9);
        for i in 0..9 {
            let escaped = format!("x &lt; y &amp; \"z\" &gt; 'w'\u{fffd}{i}");
            // In the legend, at the line and at the markers.
            assert_eq!(svg.matches(&format!(">{escaped}</")).count(), 3);
        }
        assert!(svg.contains(">real &lt;&amp;&gt;</text>") && svg.contains(">FVD &lt;over&gt; frames</text>"));
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
            figure.draw(&Font::dejavu_sans().unwrap(), &FIGURE, Scale::Linear).unwrap()
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
                Shape::Text { at, text, anchor: Anchor::End, .. } if text == number => {
                    Some(at.1 - 0.365 * FIGURE.number)
                }
                _ => None,
            };
            drawing.shapes.iter().find_map(of_number).unwrap()
        };
        for (low, lowest) in [(0.0, "0"), (-20.0, "−20")] {
            let drawing = draw(low);
            let (start, end) = ends(&drawing);
            assert!((start - number(&drawing, lowest)).abs() <= 1.0 && (end - number(&drawing, "100")).abs() <= 1.0);
            assert!((start - end) / FIGURE.height_of_curves > 0.9);
        }
    }

    fn small(plot: &Plot, scale: Scale) -> Drawing {
        plot.draw(&Font::dejavu_sans().unwrap(), &SMALL, scale).unwrap()
    }

    /// 1,000 points become 112 means of 9, whose band reaches the one value that stands out.
    #[test]
    fn long_curves_are_means_with_a_band() {
        let points: Vec<_> = (0..1000).map(|i| (i as f64, if i == 500 { 50.0 } else { (i % 2) as f64 })).collect();
        let long = series("a", points);
        let curve = Curve::of(&long, &SMALL, Scale::Linear);
        let piece = &curve.pieces[0];
        assert_eq!((piece.len(), plot(vec![long]).averaged()), (112, 9));
        assert_eq!((piece[0].at, piece[0].least, piece[0].most), ((4.0, 4.0 / 9.0), 0.0, 1.0));
        assert!(piece.iter().any(|mean| mean.most == 50.0 && mean.at.1 < 7.0));
        let short = series("b", (0..120).map(|i| (i as f64, 1.0)).collect());
        assert_eq!(plot(vec![short]).averaged(), 1);
        // in a figure of its own every point is drawn
        assert_eq!(Curve::of(&series("c", vec![(0.0, 1.0); 5000]), &FIGURE, Scale::Linear).pieces[0].len(), 5000);
    }

    #[test]
    fn bands_show_in_both_kinds_of_picture() {
        let long = plot(vec![series("a", (0..500).map(|i| (i as f64, (i % 4) as f64)).collect())]);
        let drawing = small(&long, Scale::Linear);
        assert!(drawing.svg().contains("fill-opacity=\"0.18\" d=\"M"), "{}", drawing.svg());
        let png = drawing.png(&Font::dejavu_sans().unwrap()).unwrap();
        let mut reader = png::Decoder::new(Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let pale = |pixel: &[u8; 3]| (200..220).contains(&pixel[0]) && pixel[2] > 235;
        assert!(pixels.as_chunks().0.iter().filter(|pixel| pale(pixel)).count() > 5000);
    }

    #[test]
    fn a_squashed_curve_gets_a_logarithmic_axis() {
        let of = |values: &[f64]| Scale::of(&[series("a", values.iter().map(|y| (0.0, *y)).collect())]);
        assert_eq!(of(&[1000.0, 50.0, 20.0, 10.0, 5.0]), Scale::Logarithmic);
        assert_eq!(of(&[1000.0, 50.0, 20.0, 10.0, 0.0]), Scale::Linear);
        assert_eq!(of(&[1000.0, 500.0, 250.0, f64::NAN]), Scale::Linear);
        assert_eq!(of(&[]), Scale::Linear);
        let mut axis = Axis::logarithmic(1.0, 10_000.0);
        axis.place(100.0, 0.0);
        assert!((axis.at(100.0) - 50.0).abs() < 1e-9 && axis.at(1.0) < 100.0 && axis.at(10_000.0) > 0.0);
        let numbers: Vec<&str> = axis.ticks.iter().map(|(_, number)| number.as_str()).collect();
        assert_eq!(numbers, ["1", "10", "100", "1000", "10000"]);
        let few: Vec<String> = Axis::logarithmic(0.02, 0.3).ticks.into_iter().map(|tick| tick.1).collect();
        assert_eq!(few, ["0.02", "0.05", "0.1", "0.2"]);
        // no place for 0
        let drawing =
            small(&plot(vec![series("a", vec![(0.0, 1.0), (1.0, 0.0), (2.0, 9.0), (3.0, 5.0)])]), Scale::Logarithmic);
        let svg = drawing.svg();
        assert_eq!(curves(&svg)[0].matches('M').count(), 1);
    }

    /// By their names, dashes and markers besides colours; a curve alone has no legend.
    #[test]
    fn small_curves_differ_without_colour() {
        let line = |y: f64| vec![(0.0, y), (10.0, y)];
        let names = ["one", "two", "a name far too long for the end of a curve"];
        let svg = small(&plot(names.iter().map(|name| series(name, line(5.0))).collect()), Scale::Linear).svg();
        let dashes = |line: &&str| line.contains("<title>") && line.contains("fill=\"none\"");
        let drawn: std::collections::BTreeSet<&str> = svg
            .lines()
            .filter(dashes)
            .map(|line| line.split(" d=").next().unwrap().split("linejoin").nth(1).unwrap())
            .collect();
        assert_eq!(drawn.len(), 3, "{drawn:?}");
        for (name, times) in [("one", 4), ("two", 4)] {
            assert_eq!(svg.matches(&format!(">{name}</")).count(), times, "legend, end, line, markers");
        }
        assert!(svg.contains("…</text>"));
        let alone = small(&plot(vec![series("one", line(5.0))]), Scale::Linear).svg();
        assert_eq!(alone.matches(">one</text>").count(), 0);
    }

    #[test]
    fn names_at_ends_do_not_meet() {
        let found = spread(&[10.0, 11.0, 12.0, 90.0, 99.0], 12.0, (0.0, 100.0));
        assert_eq!(found, [10.0, 22.0, 34.0, 88.0, 100.0]);
        assert_eq!(spread(&[-5.0, 50.0], 10.0, (0.0, 100.0)), [0.0, 50.0]);
    }
}
