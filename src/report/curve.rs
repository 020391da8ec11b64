//! One curve of a plot: its points as they are drawn, its line and its markers.

use super::{
    axis::{Axis, Scale},
    drawing::{Colour, Outline, Point, Shape, Stroke, WHITE},
    look::{FIGURE, Look},
    series::{Series, is_finite},
};

/// The colours of Okabe and Ito, which colour-blind readers can tell apart, without their yellow, which is
/// too light for a line on white.
pub(super) const COLOURS: [Colour; 7] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [0, 0, 0]];

/// What is drawn of a series.
pub(super) struct Curve {
    /// Pieces between gaps, as means of neighbours.
    pub(super) pieces: Vec<Vec<Mean>>,
    averaged: bool,
}

/// The mean of neighbouring points, and the least and the greatest y of them.
pub(super) struct Mean {
    pub(super) at: (f64, f64),
    pub(super) least: f64,
    pub(super) most: f64,
}

/// How many neighbouring points become one.
pub(super) fn neighbours(series: &Series, look: &Look) -> usize {
    series.points.len().div_ceil(look.points).max(1)
}

impl Curve {
    pub(super) fn of(series: &Series, look: &Look, scale: Scale) -> Self {
        let together = neighbours(series, look);
        let mean = |points: &[(f64, f64)]| {
            let count = points.len() as f64;
            let (least, most) = range(points.iter().map(|(_, y)| *y));
            let at = (points.iter().map(|p| p.0 / count).sum(), points.iter().map(|p| p.1 / count).sum());
            // a point alone is itself, to the bit
            Mean { at: if points.len() == 1 { points[0] } else { at }, least, most }
        };
        let pieces = series.points.split(|point| !has_place(point, scale)).filter(|piece| !piece.is_empty());
        let pieces = pieces.map(|piece| piece.chunks(together).map(mean).collect()).collect();
        Curve { pieces, averaged: together > 1 }
    }

    pub(super) fn last(&self) -> Option<(f64, f64)> {
        Some(self.pieces.last()?.last()?.at)
    }

    /// From the least to the greatest of the averaged values.
    pub(super) fn draw_band(&self, shapes: &mut Vec<Shape>, i: usize, x: &Axis, y: &Axis) {
        for piece in self.pieces.iter().filter(|piece| self.averaged && piece.len() > 1) {
            let below = piece.iter().map(|mean| (x.at(mean.at.0), y.at(mean.least)));
            let above = piece.iter().rev().map(|mean| (x.at(mean.at.0), y.at(mean.most)));
            shapes.push(Shape::Band { outline: below.chain(above).collect(), colour: colour(i) });
        }
    }

    /// The curve and its markers. A point without neighbours is a marker alone.
    pub(super) fn draw(&self, shapes: &mut Vec<Shape>, i: usize, name: &str, look: &Look, x: &Axis, y: &Axis) {
        let mut lines = Vec::new();
        let mut marks = Vec::new();
        for piece in &self.pieces {
            let points: Vec<Point> = piece.iter().map(|mean| (x.at(mean.at.0), y.at(mean.at.1))).collect();
            let between = |a: &Point, b: &Point| (a.0 - b.0).hypot(a.1 - b.1);
            let close = points.windows(2).any(|two| between(&two[0], &two[1]) < look.close);
            let least = if close { look.between_markers } else { 0.0 };
            let mut last: Option<&Point> = None;
            for point in &points {
                if last.is_none_or(|last| between(last, point) >= least) {
                    marks.push(marker(i, *point, look));
                    last = Some(point);
                }
            }
            if points.len() > 1 {
                lines.push(Outline::Open(points));
            }
        }
        if !lines.is_empty() {
            shapes.push(path(lines, None, Some(stroke(i, look)), Some(name.to_string())));
        }
        if !marks.is_empty() {
            shapes.push(markers(i, marks, Some(name.to_string())));
        }
    }
}

/// Colours come around after 7 series, markers and dashes after 5, so 35 differ.
pub(super) fn colour(i: usize) -> Colour {
    COLOURS[i % COLOURS.len()]
}

/// Solid, then dashed in four ways, in thicknesses of the curve.
pub(super) fn stroke(i: usize, look: &Look) -> Stroke {
    let dash = [None, Some([5.0, 2.0]), Some([1.2, 1.6]), Some([9.0, 3.5]), Some([2.5, 2.5])][i % 5];
    let dash = dash.map(|dash| dash.map(|length: f64| length * look.curve));
    Stroke { colour: colour(i), width: look.curve, dash }
}

pub(super) fn marker(i: usize, (x, y): Point, look: &Look) -> Outline {
    let size = look.curve / FIGURE.curve;
    let around =
        |corners: &[Point]| Outline::Closed(corners.iter().map(|(dx, dy)| (x + size * dx, y + size * dy)).collect());
    match i % 5 {
        0 => Outline::Circle((x, y), 4.6 * size),
        1 => around(&[(-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)]),
        2 => around(&[(0.0, -5.8), (5.4, 3.8), (-5.4, 3.8)]),
        3 => around(&[(0.0, -6.0), (6.0, 0.0), (0.0, 6.0), (-6.0, 0.0)]),
        _ => around(&[(0.0, 5.8), (5.4, -3.8), (-5.4, -3.8)]),
    }
}

/// With a white rim, so that markers on another curve are seen.
pub(super) fn markers(i: usize, marks: Vec<Outline>, title: Option<String>) -> Shape {
    path(marks, Some(colour(i)), Some(Stroke { colour: WHITE, width: 0.8, dash: None }), title)
}

pub(super) fn path(
    outlines: Vec<Outline>,
    fill: Option<Colour>,
    stroke: Option<Stroke>,
    title: Option<String>,
) -> Shape {
    Shape::Path { outlines, fill, stroke, title }
}

/// Whether a point can be drawn on an axis of this scale.
pub(super) fn has_place(point: &(f64, f64), scale: Scale) -> bool {
    is_finite(point) && scale.has(point.1)
}

/// The least and the greatest value.
pub(super) fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}
