//! Videos kept as folders of numbered pictures.

use std::{
    borrow::Cow,
    cmp::{Ordering, Reverse},
    collections::BTreeMap,
    fs::{self, File},
    io::{BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::{
    clip::{FrameSource, RgbFrame, window},
    video::{VideoSource, hash_blocks},
    walk::has_extension,
};

/// Endings of pictures.
pub(super) const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// The pictures of a folder.
#[derive(Debug, PartialEq)]
pub struct Pictures {
    /// Those of the video, in the order in which they are shown.
    pub frames: Vec<PathBuf>,
    /// The others: a thumbnail, a contact sheet, masks beside the frames.
    pub strays: Vec<PathBuf>,
}

impl Pictures {
    /// Tells the frames among pictures that lie in one folder. Where most names are alike but for their numbers, those
    /// are the frames; of kinds that are equally many, the one with the shortest names. Names that follow no pattern are
    /// all taken.
    pub fn of(mut pictures: Vec<PathBuf>) -> Self {
        let mut patterns: BTreeMap<String, usize> = BTreeMap::new();
        for picture in &pictures {
            *patterns.entry(pattern(picture)).or_default() += 1;
        }
        patterns.retain(|pattern, _| pattern.contains('#'));
        let numbered: usize = patterns.values().sum();
        let main = patterns.iter().max_by_key(|(pattern, count)| (**count, Reverse((pattern.len(), *pattern))));
        let strays = match main {
            Some((main, &count)) if count > 1 && (patterns.len() <= count || 2 * count > numbered) => {
                pictures.extract_if(.., |picture| pattern(picture) != *main).collect()
            }
            _ => Vec::new(),
        };
        let mut pictures = Pictures { frames: pictures, strays };
        sort_naturally(&mut pictures.frames);
        sort_naturally(&mut pictures.strays);
        pictures
    }

    /// The first strays by name, in words.
    pub fn strays_line(strays: &[PathBuf]) -> String {
        let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let first = strays.iter().take(5).map(name).collect::<Vec<_>>().join(", ");
        format!("{first}{}", if strays.len() > 5 { ", …" } else { "" })
    }
}

/// A name without its numbers: `v#_frame#.jpg`. Small and capital letters are one, and so are `jpg` and `jpeg`.
fn pattern(picture: &Path) -> String {
    let name = picture.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let ending = picture.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut rest = name.as_bytes();
    let mut pattern = Vec::new();
    while let Some(&byte) = rest.first() {
        if byte.is_ascii_digit() {
            take_number(&mut rest);
            take_fraction(&mut rest);
            pattern.push(b'#');
        } else {
            pattern.push(byte);
            rest = &rest[1..];
        }
    }
    format!("{}.{}", String::from_utf8_lossy(&pattern), if ending == "jpeg" { "jpg" } else { &ending })
}

/// The pictures that lie directly in a folder. Hidden names are passed over.
///
/// # Errors
/// No such folder, no pictures in it.
pub fn pictures_in(folder: &Path) -> Result<Pictures> {
    let mut pictures = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && has_extension(&path, &EXTENSIONS) {
            pictures.push(path);
        }
    }
    ensure!(!pictures.is_empty(), "there are no pictures ({}) in {}", EXTENSIONS.join(", "), folder.display());
    Ok(Pictures::of(pictures))
}

/// A video that is pictures, in the order in which they are shown.
#[derive(Debug, Clone)]
pub struct PictureList {
    pictures: Vec<PathBuf>,
}

impl PictureList {
    /// Of pictures already in order; [`Pictures::of`] puts them so.
    pub fn new(pictures: Vec<PathBuf>) -> Self {
        Self { pictures }
    }
}

impl VideoSource for PictureList {
    fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(Box::new(self.clone()))
    }

    /// Of their number, and of the first, middle and last one.
    fn digest(&self, blocks: u64) -> Result<Vec<u8>> {
        let Self { pictures } = self;
        let mut hash = Sha256::new();
        hash.update(format!("{} pictures\n", pictures.len()));
        let mut places = vec![0, pictures.len() / 2, pictures.len().saturating_sub(1)];
        places.dedup();
        places
            .iter()
            .filter_map(|&place| pictures.get(place))
            .try_for_each(|path| hash_blocks(path, blocks, &mut hash))?;
        Ok(hash.finalize().to_vec())
    }
}

/// A video that is a folder of pictures, which is listed when it is opened.
#[derive(Debug, Clone)]
pub struct PictureFolder {
    folder: PathBuf,
}

impl PictureFolder {
    /// The folder at a path, which need not be there yet.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    fn listed(&self) -> Result<PictureList> {
        Ok(PictureList::new(pictures_in(&self.folder)?.frames))
    }
}

impl VideoSource for PictureFolder {
    fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(Box::new(self.listed()?))
    }

    fn digest(&self, blocks: u64) -> Result<Vec<u8>> {
        self.listed()?.digest(blocks)
    }
}

impl FrameSource for PictureList {
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

/// Orders names as people do: runs of digits by their value, so `frame9` comes before `frame10`. What stands behind a
/// point is a fraction, and `t0.25` comes before `t0.5`, unless a longer one ends in 0: then it counts, `2.9`, `2.10`.
fn sort_naturally(pictures: &mut [PathBuf]) {
    let counts = pictures.iter().any(|picture| {
        let name = stem(picture);
        let mut rest = name.as_bytes();
        std::iter::from_fn(|| {
            let start = rest.iter().position(u8::is_ascii_digit)?;
            rest = &rest[start..];
            take_number(&mut rest);
            Some(take_fraction(&mut rest))
        })
        .any(|fraction| fraction.len() > 1 && fraction.ends_with(b"0"))
    });
    pictures.sort_by(|a, b| natural_order(a, b, !counts));
}

fn stem(picture: &Path) -> Cow<'_, str> {
    picture.file_stem().unwrap_or_default().to_string_lossy()
}

fn natural_order(a: &Path, b: &Path, fractions: bool) -> Ordering {
    let (a_text, b_text) = (stem(a), stem(b));
    let (mut a_rest, mut b_rest) = (a_text.as_bytes(), b_text.as_bytes());
    while let (Some(&x), Some(&y)) = (a_rest.first(), b_rest.first()) {
        let order = if x.is_ascii_digit() && y.is_ascii_digit() {
            let (x, y) = (take_number(&mut a_rest), take_number(&mut b_rest));
            let whole = x.len().cmp(&y.len()).then(x.cmp(y));
            if whole.is_eq() && fractions {
                // digits behind a point are compared from the left
                take_fraction(&mut a_rest).cmp(take_fraction(&mut b_rest))
            } else {
                whole
            }
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

/// The digits behind a point at the beginning; none where there is no such point.
fn take_fraction<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let Some(behind) = text.strip_prefix(b".") else { return &[] };
    let end = behind.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(behind.len());
    if end > 0 {
        *text = &behind[end..];
    }
    &behind[..end]
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

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn numbers_are_ordered_by_value() {
        for ordered in [
            &["f.jpg", "f1.jpg", "f009.jpg", "f9.jpg", "f10.jpg", "f99999999999999999999999.jpg", "g0.jpg"][..],
            &["t0.0.png", "t0.25.png", "t0.5.png", "t0.75.png", "t1.png", "t1.5.png", "t10.125.png"],
            &["0.00.png", "0.25.png", "0.50.png", "0.75.png", "1.00.png"],
            &["shot1.8.png", "shot1.9.png", "shot1.10.png", "shot1.11.png", "shot2.1.png"],
            &["at 12.30.5.jpg", "at 12.30.10.jpg", "at 12.31.0.jpg", "at 13.2.7.jpg"],
        ] {
            let mut names = paths(ordered);
            names.reverse();
            sort_naturally(&mut names);
            assert_eq!(names, paths(ordered));
        }
    }

    /// A thumbnail, a contact sheet, masks, the same frames once more: the video has the frames alone.
    #[test]
    fn pictures_of_another_pattern_are_no_frames() {
        let frames_and_strays = |names: &[&str]| {
            let Pictures { frames, strays } = Pictures::of(paths(names));
            let names = |paths: Vec<PathBuf>| paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
            (names(frames), names(strays))
        };
        let frames = ["f1.jpg", "f2.JPG", "f3.jpeg", "F10.jpg"];
        for strays in [
            &["contact_sheet.png", "thumb.jpg"][..],
            &["f1.png", "f2.png", "f3.png", "f10.png"],
            &["f1_mask.png", "f2_mask.png", "f3_mask.png", "f10_mask.png"],
            &["depth1.jpg", "depth2.jpg", "left1.jpg", "left2.jpg", "sheet.jpg"],
        ] {
            let (found, others) = frames_and_strays(&[strays, &frames[..]].concat());
            assert_eq!((found.len(), others.len()), (frames.len(), strays.len()), "{found:?} {others:?}");
            assert!(strays.iter().all(|stray| others.iter().any(|other| other == stray)), "{others:?}");
        }
        // no pattern, or one alone
        for all in
            [&["a.jpg", "b.jpg", "c.jpg"][..], &["3fa9.jpg", "b07.jpg", "1c2d3.jpg", "e4.jpg"], &["9.png"], &frames]
        {
            assert_eq!(frames_and_strays(all).0.len(), all.len(), "{all:?}");
        }
        assert_eq!(pattern(Path::new("v/V2_t0.25é.JPEG")), "v#_t#é.jpg");
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
