//! A list of shapes that becomes an SVG and a PNG: one list, so both show the same.

use std::fmt::Write;

use anyhow::{Context, Result};
use tiny_skia::{
    FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, Stroke as SkiaStroke, StrokeDash, Transform,
};
use ttf_parser::{Face, GlyphId, OutlineBuilder};

/// Pixels from the left and from the top.
pub type Point = (f64, f64);
/// Red, green and blue.
pub type Colour = [u8; 3];

pub const WHITE: Colour = [255; 3];
const BAND_OPACITY: f32 = 0.18;

pub struct Drawing {
    /// Pixels.
    pub width: f64,
    /// Pixels.
    pub height: f64,
    /// The first lies lowest.
    pub shapes: Vec<Shape>,
}

pub enum Shape {
    Path {
        outlines: Vec<Outline>,
        fill: Option<Colour>,
        stroke: Option<Stroke>,
        /// What the path stands for: a viewer of the SVG shows it under the pointer.
        title: Option<String>,
    },
    /// A filled outline that what lies below shows through.
    Band { outline: Vec<Point>, colour: Colour },
    Text {
        /// On the baseline: where the text starts, has its middle or ends, as `anchor` says.
        at: Point,
        text: String,
        /// Of the letters, in pixels.
        size: f64,
        anchor: Anchor,
        colour: Colour,
        /// Reads upwards.
        upright: bool,
    },
}

pub enum Outline {
    Open(Vec<Point>),
    Closed(Vec<Point>),
    Circle(Point, f64),
}

#[derive(Clone, Copy)]
pub struct Stroke {
    pub colour: Colour,
    pub width: f64,
    /// Pixels of line and of gap.
    pub dash: Option<[f64; 2]>,
}

#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

impl Drawing {
    pub fn svg(&self) -> String {
        let mut svg = String::new();
        self.write_svg(&mut svg).expect("a string takes everything");
        svg
    }

    fn write_svg(&self, svg: &mut String) -> std::fmt::Result {
        let (width, height) = (self.width, self.height);
        writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"DejaVu Sans, Verdana, sans-serif\">"
        )?;
        writeln!(svg, "<rect width=\"{width}\" height=\"{height}\" fill=\"{}\"/>", hex(WHITE))?;
        for shape in &self.shapes {
            match shape {
                Shape::Path { outlines, fill, stroke, title } => {
                    write!(svg, "<path fill=\"{}\"", fill.map_or("none".to_string(), hex))?;
                    if let Some(Stroke { colour, width, dash }) = stroke {
                        write!(svg, " stroke=\"{}\" stroke-width=\"{width}\" stroke-linejoin=\"round\"", hex(*colour))?;
                        if let Some([line, gap]) = dash {
                            write!(svg, " stroke-dasharray=\"{line} {gap}\"")?;
                        }
                    }
                    svg.push_str(" d=\"");
                    outlines.iter().try_for_each(|outline| write_outline(svg, outline))?;
                    match title {
                        Some(title) => writeln!(svg, "\"><title>{}</title></path>", escaped(title))?,
                        None => writeln!(svg, "\"/>")?,
                    }
                }
                Shape::Band { outline, colour } => {
                    write!(svg, "<path fill=\"{}\" fill-opacity=\"{BAND_OPACITY}\" d=\"", hex(*colour))?;
                    write_points(svg, outline)?;
                    writeln!(svg, "Z\"/>")?;
                }
                Shape::Text { at: (x, y), text, size, anchor, colour, upright } => {
                    let anchor = match anchor {
                        Anchor::Start => "start",
                        Anchor::Middle => "middle",
                        Anchor::End => "end",
                    };
                    write!(svg, "<text x=\"{x:.2}\" y=\"{y:.2}\" font-size=\"{size}\" text-anchor=\"{anchor}\"")?;
                    if *upright {
                        write!(svg, " transform=\"rotate(-90 {x:.2} {y:.2})\"")?;
                    }
                    writeln!(svg, " fill=\"{}\">{}</text>", hex(*colour), escaped(text))?;
                }
            }
        }
        writeln!(svg, "</svg>")
    }

    /// The bytes of a PNG file.
    pub fn png(&self, font: &Font) -> Result<Vec<u8>> {
        let (width, height) = (self.width.ceil() as u32, self.height.ceil() as u32);
        let mut pixels =
            Pixmap::new(width, height).with_context(|| format!("no picture of {width}×{height} can be made"))?;
        pixels.fill(skia_colour(WHITE));
        for shape in &self.shapes {
            match shape {
                Shape::Path { outlines, fill, stroke, .. } => {
                    let Some(path) = skia_path(outlines) else { continue };
                    if let Some(colour) = fill {
                        fill_path(&mut pixels, &path, *colour);
                    }
                    if let Some(Stroke { colour, width, dash }) = stroke {
                        let stroke = SkiaStroke {
                            width: *width as f32,
                            line_cap: LineCap::Butt,
                            line_join: LineJoin::Round,
                            dash: dash.and_then(|d| StrokeDash::new(d.map(|d| d as f32).to_vec(), 0.0)),
                            ..SkiaStroke::default()
                        };
                        pixels.stroke_path(&path, &paint(*colour), &stroke, Transform::identity(), None);
                    }
                }
                Shape::Band { outline, colour } => {
                    let Some(path) = skia_path(&[Outline::Closed(outline.clone())]) else { continue };
                    let mut paint = paint(*colour);
                    let mut faint = skia_colour(*colour);
                    faint.set_alpha(BAND_OPACITY);
                    paint.set_color(faint);
                    pixels.fill_path(&path, &paint, FillRule::Winding, Transform::identity(), None);
                }
                Shape::Text { at, text, size, anchor, colour, upright } => {
                    if let Some(path) = font.outline(*at, text, *size, *anchor, *upright) {
                        fill_path(&mut pixels, &path, *colour);
                    }
                }
            }
        }
        let rgb: Vec<u8> = pixels.pixels().iter().flat_map(|p| [p.red(), p.green(), p.blue()]).collect();
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&rgb)?;
        writer.finish()?;
        Ok(bytes)
    }
}

/// DejaVu Sans, carried along so that a figure needs no font of the machine. It is a wide font: where an SVG
/// falls back on another one, the text takes less room than was measured.
pub struct Font(Face<'static>);

impl Font {
    pub fn dejavu_sans() -> Result<Self> {
        Ok(Self(Face::parse(dejavu::sans::regular(), 0).context("the font of the figures cannot be read")?))
    }

    /// The length of a text in letters of `size` pixels, in pixels.
    pub fn width(&self, text: &str, size: f64) -> f64 {
        self.glyphs(text).map(|(_, advance)| advance).sum::<f64>() * self.scale(size)
    }

    /// The text in lines of at most `width` pixels; a word longer than that is broken.
    pub fn wrap(&self, text: &str, size: f64, width: f64) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            if let Some(line) = lines.last_mut() {
                let longer = format!("{line} {word}");
                if self.width(&longer, size) <= width {
                    *line = longer;
                    continue;
                }
            }
            lines.push(String::new());
            for letter in word.chars() {
                let line = lines.last_mut().expect("a line was pushed");
                let longer = format!("{line}{letter}");
                if line.is_empty() || self.width(&longer, size) <= width {
                    *line = longer;
                } else {
                    lines.push(letter.to_string());
                }
            }
        }
        lines
    }

    /// Each letter's glyph with how far it moves the pen, in units of the font.
    fn glyphs(&self, text: &str) -> impl Iterator<Item = (GlyphId, f64)> {
        text.chars().map(|letter| {
            let glyph = self.0.glyph_index(letter).unwrap_or_default();
            (glyph, f64::from(self.0.glyph_hor_advance(glyph).unwrap_or(0)))
        })
    }

    /// Pixels per unit of the font.
    fn scale(&self, size: f64) -> f64 {
        size / f64::from(self.0.units_per_em())
    }

    fn outline(&self, at: Point, text: &str, size: f64, anchor: Anchor, upright: bool) -> Option<Path> {
        let scale = self.scale(size) as f32;
        let before = match anchor {
            Anchor::Start => 0.0,
            Anchor::Middle => 0.5,
            Anchor::End => 1.0,
        };
        let mut pen = Pen { path: PathBuilder::new(), x: -(before * self.width(text, size)) as f32 / scale };
        for (glyph, advance) in self.glyphs(text) {
            self.0.outline_glyph(glyph, &mut pen);
            pen.x += advance as f32;
        }
        // The font's y goes up, the picture's down.
        let (x, y) = (at.0 as f32, at.1 as f32);
        let place = if upright {
            Transform::from_row(0.0, -scale, -scale, 0.0, x, y)
        } else {
            Transform::from_row(scale, 0.0, 0.0, -scale, x, y)
        };
        pen.path.finish()?.transform(place)
    }
}

/// Puts glyphs side by side into one path.
struct Pen {
    path: PathBuilder,
    x: f32,
}

impl OutlineBuilder for Pen {
    fn move_to(&mut self, x: f32, y: f32) {
        self.path.move_to(self.x + x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        self.path.line_to(self.x + x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        self.path.quad_to(self.x + x1, y1, self.x + x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        self.path.cubic_to(self.x + x1, y1, self.x + x2, y2, self.x + x, y);
    }

    fn close(&mut self) {
        self.path.close();
    }
}

fn skia_path(outlines: &[Outline]) -> Option<Path> {
    let mut path = PathBuilder::new();
    for outline in outlines {
        match outline {
            Outline::Open(points) | Outline::Closed(points) => {
                for (i, (x, y)) in points.iter().enumerate() {
                    if i == 0 { path.move_to(*x as f32, *y as f32) } else { path.line_to(*x as f32, *y as f32) }
                }
                if matches!(outline, Outline::Closed(_)) {
                    path.close();
                }
            }
            Outline::Circle((x, y), radius) => path.push_circle(*x as f32, *y as f32, *radius as f32),
        }
    }
    path.finish()
}

fn fill_path(pixels: &mut Pixmap, path: &Path, colour: Colour) {
    pixels.fill_path(path, &paint(colour), FillRule::Winding, Transform::identity(), None);
}

fn paint(colour: Colour) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color(skia_colour(colour));
    paint
}

fn skia_colour([red, green, blue]: Colour) -> tiny_skia::Color {
    tiny_skia::Color::from_rgba8(red, green, blue, 255)
}

fn write_outline(svg: &mut String, outline: &Outline) -> std::fmt::Result {
    match outline {
        Outline::Open(points) | Outline::Closed(points) => {
            write_points(svg, points)?;
            if matches!(outline, Outline::Closed(_)) {
                svg.push('Z');
            }
            Ok(())
        }
        // Two half circles.
        Outline::Circle((x, y), r) => {
            let (left, d) = (x - r, 2.0 * r);
            write!(svg, "M{left:.2} {y:.2}a{r} {r} 0 1 1 {d} 0a{r} {r} 0 1 1 -{d} 0Z")
        }
    }
}

fn write_points(svg: &mut String, points: &[Point]) -> std::fmt::Result {
    let letter = |i| if i == 0 { 'M' } else { 'L' };
    points.iter().enumerate().try_for_each(|(i, (x, y))| write!(svg, "{}{x:.2} {y:.2}", letter(i)))
}

fn hex([red, green, blue]: Colour) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// The text as XML has it; characters that XML forbids become U+FFFD.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\t' | '\n' | '\r' => escaped.push(' '),
            '\0'..' ' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_every_letter_and_the_width() {
        let font = Font::dejavu_sans().unwrap();
        let text = format!("a plot of several methods with one {} in it", "verylongword".repeat(8));
        let lines = font.wrap(&text, 16.0, 200.0);
        assert!(lines.len() > 4);
        assert!(lines.iter().all(|line| font.width(line, 16.0) <= 200.0), "{lines:?}");
        assert_eq!(lines.concat().replace(' ', ""), text.replace(' ', ""));
        assert_eq!(font.wrap("one line", 16.0, 200.0), ["one line"]);
        assert!(font.wrap(" ", 16.0, 200.0).is_empty());
        assert_eq!(font.wrap("ab", 16.0, 0.0), ["a", "b"], "no width is too small to end");
    }
}
