//! Videos kept as folders of numbered pictures.

use std::{
    cmp::Ordering,
    fs::{self, File},
    io::{BufReader, Read, Seek, SeekFrom},
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
/// # Errors
/// No such folder, no pictures in it.
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
/// # Errors
/// A file that is missing or no picture; a binary without the feature `opencv`.
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

/// One JPEG or PNG file, which this binary cannot read.
///
/// # Errors
/// Always.
#[cfg(not(feature = "opencv"))]
pub fn read_picture(path: &Path) -> Result<RgbFrame> {
    anyhow::bail!(
        "{}: this binary was built without the feature `opencv` and cannot read pictures; \
         it can use packed data (`lvdm data pack`, written by a binary that has it)",
        path.display()
    )
}

/// Width and height of a JPEG or PNG file as its header says them; nothing is decoded.
///
/// # Errors
/// A file that is missing, empty, or neither.
pub fn picture_size(path: &Path) -> Result<(usize, usize)> {
    let mut file = BufReader::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?);
    header_size(&mut file).ok().flatten().with_context(|| format!("{} has no header of a picture", path.display()))
}

fn header_size(file: &mut (impl Read + Seek)) -> std::io::Result<Option<(usize, usize)>> {
    fn bytes<const N: usize>(file: &mut impl Read) -> std::io::Result<[u8; N]> {
        let mut bytes = [0; N];
        file.read_exact(&mut bytes).map(|()| bytes)
    }
    let start: [u8; 2] = bytes(file)?;
    if start == [0x89, b'P'] {
        // the rest of the signature, the length and name of the first chunk, which begins with the size
        let [b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A, _, _, _, _, b'I', b'H', b'D', b'R'] = bytes(file)? else {
            return Ok(None);
        };
        let [width, height] = [bytes(file)?, bytes(file)?].map(|side| u32::from_be_bytes(side) as usize);
        return Ok((width > 0 && height > 0).then_some((width, height)));
    }
    if start != [0xFF, 0xD8] {
        return Ok(None);
    }
    // JPEG: segments up to the one that begins a frame
    loop {
        let [mark, mut kind] = bytes(file)?;
        while kind == 0xFF {
            [kind] = bytes(file)?;
        }
        let length = i64::from(u16::from_be_bytes(bytes(file)?));
        match kind {
            _ if mark != 0xFF || length < 2 => return Ok(None),
            0xC4 | 0xC8 | 0xCC => {}
            0xC0..=0xCF => {
                let [_, h, more_h, w, more_w] = bytes(file)?;
                let [height, width] = [[h, more_h], [w, more_w]].map(|side| usize::from(u16::from_be_bytes(side)));
                return Ok((width > 0 && height > 0).then_some((width, height)));
            }
            0xD9 | 0xDA => return Ok(None),
            _ => {}
        }
        file.seek(SeekFrom::Current(length - 2))?;
    }
}

/// The first number that is left out among pictures that are numbered evenly, in words.
pub fn gap(pictures: &[PathBuf]) -> Option<String> {
    let numbers: Vec<u64> = pictures.iter().map(|picture| number(picture)).collect::<Option<_>>()?;
    let steps = || numbers.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
    let usual = steps().min().filter(|&step| step > 0)?;
    let at = steps().position(|step| step >= 2 * usual)?;
    let name = |i: usize| pictures[i].file_name().unwrap_or_default().to_string_lossy().into_owned();
    Some(format!("from {} to {} there is a gap", name(at), name(at + 1)))
}

/// The last number in a picture's name.
fn number(picture: &Path) -> Option<u64> {
    let stem = picture.file_stem()?.to_string_lossy();
    let end = stem.rfind(|c: char| c.is_ascii_digit())? + 1;
    let start = stem[..end]
        .rfind(|c: char| !c.is_ascii_digit())
        .map_or(0, |i| i + stem[i..].chars().next().map_or(1, char::len_utf8));
    stem[start..end].parse().ok()
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

    #[test]
    fn a_gap_in_the_numbers_is_found() {
        let found = |names: &[&str]| gap(&names.iter().map(PathBuf::from).collect::<Vec<_>>());
        for even in [
            &["f1.jpg", "f2.jpg", "f3.jpg"][..],
            &["0005.png", "0010.png", "0015.png"],
            &["a.jpg", "b.jpg"],
            &["7.jpg"],
        ] {
            assert_eq!(found(even), None, "{even:?}");
        }
        assert_eq!(
            found(&["v2_f6.jpg", "v2_f7.jpg", "v2_f9.jpg"]).unwrap(),
            "from v2_f7.jpg to v2_f9.jpg there is a gap"
        );
        assert_eq!(number(Path::new("a/é12é.jpg")), Some(12));
    }

    #[cfg(feature = "opencv")]
    #[test]
    fn a_header_says_the_size() {
        use opencv::{core, imgcodecs, prelude::*};
        let folder = tempfile::tempdir().unwrap();
        for ending in ["jpg", "png"] {
            let path = folder.path().join("0").with_extension(ending);
            let image = core::Mat::new_rows_cols_with_default(22, 31, core::CV_8UC3, core::Scalar::all(90.0)).unwrap();
            assert!(imgcodecs::imwrite(path.to_str().unwrap(), &image, &core::Vector::new()).unwrap());
            assert!(image.rows() == 22 && picture_size(&path).unwrap() == (31, 22), "{ending}");
            for wrong in [&b""[..], b"no picture", &fs::read(&path).unwrap()[..12]] {
                fs::write(&path, wrong).unwrap();
                assert!(picture_size(&path).is_err(), "{ending} {wrong:?}");
            }
        }
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
