//! Videos kept as folders of numbered pictures.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{
    clip::{FrameSource, RgbFrame, window},
    dataset::has_extension,
};

/// Endings of pictures.
pub(super) const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// The pictures that lie directly in a folder, in the order in which they are shown. Hidden names are passed over.
///
/// Errors: no such folder, no pictures in it.
pub fn pictures_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut pictures = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && has_extension(&path, &EXTENSIONS) {
            pictures.push(path);
        }
    }
    ensure!(!pictures.is_empty(), "there are no pictures ({}) in {}", EXTENSIONS.join(", "), folder.display());
    pictures.sort_by(|a, b| natural_order(a, b));
    Ok(pictures)
}

/// Pictures in the order in which they are shown.
pub struct FrameFolder {
    pictures: Vec<PathBuf>,
}

impl FrameFolder {
    /// Of pictures already in order; `natural_order` puts them so.
    pub fn new(pictures: Vec<PathBuf>) -> Self {
        Self { pictures }
    }
}

impl FrameSource for FrameFolder {
    fn frames(&self) -> i64 {
        self.pictures.len() as i64
    }

    fn read(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        let indices = window(self.frames(), start, count, stride)?;
        indices.into_iter().map(|i| read_picture(&self.pictures[i])).collect()
    }
}

/// One JPEG or PNG file.
///
/// Errors: a file that is missing or no picture; a binary without the feature `opencv`.
#[cfg(feature = "opencv")]
pub fn read_picture(path: &Path) -> Result<RgbFrame> {
    use opencv::{core::Vec3b, imgcodecs, prelude::*};
    let image = imgcodecs::imread(path, imgcodecs::IMREAD_COLOR)
        .with_context(|| format!("cannot read the picture {}", path.display()))?;
    // `imread` answers a missing or damaged file with an empty picture.
    ensure!(!image.empty(), "the picture {} is missing or damaged", path.display());
    let pixels = image.data_typed::<Vec3b>()?.iter().flat_map(|bgr| [bgr[2], bgr[1], bgr[0]]).collect();
    Ok(RgbFrame { width: image.cols() as usize, height: image.rows() as usize, pixels })
}

#[cfg(not(feature = "opencv"))]
pub fn read_picture(path: &Path) -> Result<RgbFrame> {
    anyhow::bail!(
        "{}: this binary was built without the feature `opencv` and cannot read pictures; \
         it can use packed data (`lvdm data pack`, written by a binary that has it)",
        path.display()
    )
}

/// Orders names as people do: runs of digits by their value, so `frame9` comes before `frame10`.
pub fn natural_order(a: &Path, b: &Path) -> Ordering {
    let (a_text, b_text) = (a.to_string_lossy(), b.to_string_lossy());
    let (mut a_rest, mut b_rest) = (a_text.as_bytes(), b_text.as_bytes());
    while let (Some(&x), Some(&y)) = (a_rest.first(), b_rest.first()) {
        let order = if x.is_ascii_digit() && y.is_ascii_digit() {
            let (x, y) = (take_number(&mut a_rest), take_number(&mut b_rest));
            x.len().cmp(&y.len()).then(x.cmp(y))
        } else {
            (a_rest, b_rest) = (&a_rest[1..], &b_rest[1..]);
            x.cmp(&y)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    a_rest.len().cmp(&b_rest.len()).then_with(|| a.cmp(b))
}

/// The digits at the beginning, without leading zeros.
fn take_number<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    &digits[digits.iter().take_while(|&&digit| digit == b'0').count()..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_ordered_by_value() {
        let mut names = ["f10.jpg", "f9.jpg", "f009.jpg", "f1.jpg", "g0.jpg", "f.jpg", "f99999999999999999999999.jpg"];
        names.sort_by(|a, b| natural_order(Path::new(a), Path::new(b)));
        assert_eq!(
            names,
            ["f.jpg", "f1.jpg", "f009.jpg", "f9.jpg", "f10.jpg", "f99999999999999999999999.jpg", "g0.jpg"]
        );
    }

    #[cfg(feature = "opencv")]
    #[test]
    fn pictures_are_read_in_red_green_blue() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.png");
        let frame = RgbFrame { width: 3, height: 2, pixels: (0..18).map(|i| i * 14).collect() };
        crate::data::pictures::write_png(&path, &frame.to_tensor()).unwrap();
        assert_eq!(read_picture(&path).unwrap(), frame);
        assert!(read_picture(&folder.path().join("1.png")).is_err());
        std::fs::write(&path, b"no picture").unwrap();
        assert!(read_picture(&path).is_err());
    }
}
