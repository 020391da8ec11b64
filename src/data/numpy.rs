//! Videos in numpy's files, as other projects write their samples: `.npy`, or `.npz` with an array `arr_0`, unsigned
//! bytes `[N, F, H, W, 3]`. Windows are read when they are asked for; nothing of the file is executed.

use std::{
    fs::File,
    io::{self, BufWriter, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter, write::FileOptions};

use super::{
    clip::{ClipSpec, FrameSource, RgbFrame, window},
    video::{Listing, VideoDataset, VideoEntry, VideoSource, digest_of_file},
    walk::has_extension,
};
use crate::atomic_file::PendingFile;

/// More than any header of an array of five dimensions.
const MAX_HEADER: usize = 1 << 16;

/// An array of videos, open.
#[derive(Debug)]
pub struct NumpyFile {
    path: PathBuf,
    file: File,
    /// Where the pixels begin.
    start: u64,
    /// N, F, H, W
    shape: [usize; 4],
}

impl NumpyFile {
    /// A compressed archive is unpacked into a temporary file without a name first.
    ///
    /// # Errors
    /// A file that is missing, truncated, or holds another kind of array; says what it holds.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_inner(path).with_context(|| format!("cannot read the videos in {}", path.display()))
    }

    fn open_inner(path: &Path) -> Result<Self> {
        let whole = File::open(path)?;
        let (file, start, length) = match has_extension(path, &["npz"]) {
            false => {
                let length = whole.metadata()?.len();
                (whole, 0, length)
            }
            true => member(whole)?,
        };
        let mut magic = [0; 8];
        file.read_exact_at(&mut magic, start).context("the file ends within its header")?;
        ensure!(magic.starts_with(b"\x93NUMPY"), "this is no numpy array");
        let (prefix, size) = match magic[6] {
            1 => {
                let mut bytes = [0; 2];
                file.read_exact_at(&mut bytes, start + 8)?;
                (10, usize::from(u16::from_le_bytes(bytes)))
            }
            2 | 3 => {
                let mut bytes = [0; 4];
                file.read_exact_at(&mut bytes, start + 8)?;
                (12, u32::from_le_bytes(bytes) as usize)
            }
            version => bail!("version {version} of numpy's format is not known"),
        };
        ensure!(size <= MAX_HEADER, "a header of {size} bytes");
        let mut header = vec![0; size];
        file.read_exact_at(&mut header, start + prefix).context("the file ends within its header")?;
        let shape = shape(std::str::from_utf8(&header).context("a header that is no text")?)?;
        let begin = prefix + size as u64;
        let bytes = shape.iter().try_fold(3u64, |bytes, size| bytes.checked_mul(*size as u64));
        let there = length.checked_sub(begin).context("the file ends within its header")?;
        ensure!(
            bytes == Some(there),
            "an array of shape [{}, 3] with {there} bytes of pixels",
            shape.map(|size| size.to_string()).join(", ")
        );
        ensure!(shape.iter().all(|size| *size > 0), "an empty array");
        Ok(Self { path: path.to_path_buf(), file, start: start + begin, shape })
    }

    /// N, the number of videos.
    pub fn videos(&self) -> i64 {
        self.shape[0] as i64
    }

    /// F, the frames of each.
    pub fn frames(&self) -> i64 {
        self.shape[1] as i64
    }
}

/// The array of an archive: a file that holds it, where it begins, and its length.
fn member(file: File) -> Result<(File, u64, u64)> {
    let mut archive = ZipArchive::new(file).context("this is no .npz archive")?;
    let names: Vec<String> = archive.file_names().map(String::from).collect();
    let name = match names.as_slice() {
        [only] => only.clone(),
        _ => names.iter().find(|name| *name == "arr_0.npy").cloned().with_context(|| {
            format!(
                "the archive holds {}, and no arr_0",
                names.iter().map(|n| n.trim_end_matches(".npy")).collect::<Vec<_>>().join(", ")
            )
        })?,
    };
    let mut entry = archive.by_name(&name)?;
    let (start, length) = (entry.data_start(), entry.size());
    if entry.compression() == CompressionMethod::Stored {
        drop(entry);
        return Ok((archive.into_inner(), start, length));
    }
    let mut unpacked = tempfile::tempfile().context("no room for the unpacked videos")?;
    let copied = io::copy(&mut entry.by_ref().take(length), &mut unpacked).context("cannot unpack the videos")?;
    Ok((unpacked, 0, copied))
}

/// N, F, H, W of a header such as `{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16, 64, 64, 3), }`.
fn shape(header: &str) -> Result<[usize; 4]> {
    let value = |key: &str| {
        let at = header.find(&format!("'{key}':")).with_context(|| format!("a header without `{key}`"))?;
        Ok::<&str, anyhow::Error>(header[at + key.len() + 3..].trim_start())
    };
    let descr = value("descr")?;
    let kind = descr.strip_prefix('\'').and_then(|rest| rest.split('\'').next()).unwrap_or("a structure");
    let sizes = value("shape")?;
    let inside = sizes.strip_prefix('(').and_then(|rest| rest.split(')').next()).context("a header without a shape")?;
    let sizes: Vec<usize> = inside
        .split(',')
        .map(str::trim)
        .filter(|size| !size.is_empty())
        .map(|size| size.parse().with_context(|| format!("a shape that holds `{size}`")))
        .collect::<Result<_>>()?;
    let wanted = "unsigned bytes (uint8) of shape [N, F, H, W, 3] are";
    ensure!(matches!(kind, "|u1" | "u1" | "<u1" | ">u1"), "{wanted} expected; these are `{kind}` of shape {sizes:?}");
    ensure!(value("fortran_order")?.starts_with("False"), "{wanted} expected in C order; these are in Fortran's");
    match sizes[..] {
        [n, f, h, w, 3] => Ok([n, f, h, w]),
        _ => bail!("{wanted} expected; these have shape {sizes:?}"),
    }
}

/// Writes clips as other projects read them, as they come: an array `[N, F, H, W, 3]` of unsigned bytes, in an archive
/// under the name `arr_0` where the path ends in `.npz`.
pub struct NumpyWriter {
    pending: PendingFile,
    path: PathBuf,
    array: Array,
    /// `[3, F, H, W]`
    clip: [i64; 4],
    /// Clips that are still to come.
    left: i64,
}

enum Array {
    Plain(BufWriter<File>),
    Archived(Box<ZipWriter<BufWriter<File>>>),
}

impl Array {
    fn writer(&mut self) -> &mut dyn Write {
        match self {
            Array::Plain(file) => file,
            Array::Archived(archive) => &mut **archive,
        }
    }
}

impl NumpyWriter {
    /// For exactly `count` clips of the shape `[3, F, H, W]`.
    ///
    /// # Errors
    /// An unwritable place.
    pub fn create(path: &Path, count: i64, clip: [i64; 4]) -> Result<Self> {
        let [channels, f, h, w] = clip;
        ensure!(channels == 3, "clips are [3, F, H, W]; these are {clip:?}");
        let mut header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {f}, {h}, {w}, 3), }}");
        // pixels begin at a multiple of 64; before the header stand ten bytes, and a line ends it
        let length = (header.len() + 11).next_multiple_of(64) - 11;
        header = format!("{header:length$}\n");
        let (pending, file) = PendingFile::create(path)?;
        let mut array = Array::Plain(file);
        if has_extension(path, &["npz"])
            && let Array::Plain(file) = array
        {
            let mut archive = ZipWriter::new(file);
            // the time of day is left out, so that equal videos give equal bytes
            let options = FileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
            archive.start_file("arr_0.npy", options.last_modified_time(DateTime::default()))?;
            array = Array::Archived(Box::new(archive));
        }
        let out = array.writer();
        out.write_all(b"\x93NUMPY\x01\x00")?;
        out.write_all(&(header.len() as u16).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        Ok(NumpyWriter { pending, path: path.to_path_buf(), array, clip, left: count })
    }

    /// Adds clips, unsigned bytes `[n, 3, F, H, W]`.
    ///
    /// # Errors
    /// Another shape, more clips than were announced, a full disk.
    pub fn push(&mut self, clips: &Tensor) -> Result<()> {
        let (size, wanted) = (clips.size(), self.clip);
        ensure!(size.len() == 5 && size[1..] == wanted, "clips are [n, {wanted:?}]; these are {size:?}");
        ensure!(size[0] <= self.left, "{} clips too many for {}", size[0] - self.left, self.path.display());
        self.left -= size[0];
        for i in 0..size[0] {
            let clip = clips.get(i).permute([1, 2, 3, 0]).contiguous(); // [F, H, W, 3]
            let mut bytes = vec![0; clip.numel()];
            clip.f_copy_data_u8(&mut bytes, clip.numel())?;
            let written = self.array.writer().write_all(&bytes);
            written.with_context(|| format!("cannot write {}", self.path.display()))?;
        }
        Ok(())
    }

    /// Brings the file to the disk under its name.
    ///
    /// # Errors
    /// Clips that did not come; a full disk.
    pub fn finish(self) -> Result<()> {
        let Self { pending, path, array, left, .. } = self;
        ensure!(left == 0, "{left} clips of {} did not come", path.display());
        let end = || -> Result<()> {
            match array {
                Array::Plain(mut file) => file.flush()?,
                Array::Archived(mut archive) => archive.finish()?.flush()?,
            }
            pending.publish()
        };
        end().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// One video of an array.
#[derive(Debug, Clone)]
pub struct NumpyVideo {
    file: Arc<NumpyFile>,
    index: i64,
}

impl NumpyVideo {
    /// The video with this number of the array, from 0.
    pub fn new(file: Arc<NumpyFile>, index: i64) -> Self {
        Self { file, index }
    }
}

impl VideoSource for NumpyVideo {
    fn open(&self) -> Result<Box<dyn FrameSource>> {
        Ok(Box::new(self.clone()))
    }

    fn digest(&self, blocks: u64) -> Result<Vec<u8>> {
        digest_of_file(&self.file.path, blocks)
    }

    fn array(&self) -> Option<&Path> {
        Some(&self.file.path)
    }
}

impl FrameSource for NumpyVideo {
    fn frames(&self) -> i64 {
        self.file.frames()
    }

    fn read(&mut self, start: i64, count: i64, stride: i64) -> Result<Vec<RgbFrame>> {
        let NumpyFile { path, file, start: begin, shape: [_, frames, height, width] } = &*self.file;
        let picture = height * width * 3;
        let read = |frame: usize| {
            let mut pixels = vec![0; picture];
            let offset = (self.index as usize * frames + frame) * picture;
            file.read_exact_at(&mut pixels, begin + offset as u64)
                .with_context(|| format!("cannot read video {} of {}", self.index, path.display()))?;
            Ok(RgbFrame { width: *width, height: *height, pixels })
        };
        window(*frames as i64, start, count, stride)?.into_iter().map(read).collect()
    }
}

/// The videos of such a file, in its order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Numpy {
    /// `.npy` or `.npz`, unsigned bytes `[N, F, H, W, 3]`.
    pub file: PathBuf,
}

impl VideoDataset for Numpy {
    fn videos(&self, _: &ClipSpec) -> Result<Listing> {
        let file = Arc::new(NumpyFile::open(&self.file)?);
        let name = self.file.display();
        let entry = |index| VideoEntry::new(format!("{name}#{index}"), NumpyVideo::new(file.clone(), index));
        Ok((0..file.videos()).map(entry).collect::<Vec<_>>().into())
    }

    fn path(&self) -> &Path {
        &self.file
    }

    fn reading(&self) -> Result<Option<u32>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tch::{Device, Kind};

    use super::{super::clip::SHORT, *};

    /// As `numpy.save` writes it.
    fn npy(descr: &str, fortran: &str, shape: &str, pixels: &[u8]) -> Vec<u8> {
        let mut header = format!("{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}");
        while (header.len() + 11) % 64 != 0 {
            header.push(' ');
        }
        header.push('\n');
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(pixels);
        bytes
    }

    fn npz(path: &Path, method: CompressionMethod, members: &[(&str, &[u8])]) {
        let mut writer = ZipWriter::new(File::create(path).unwrap());
        for (name, bytes) in members {
            writer.start_file(*name, FileOptions::default().compression_method(method)).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap();
    }

    fn pixels() -> Vec<u8> {
        (0..2 * 3 * 4 * 5 * 3u32).map(|i| (i * 7 % 251) as u8).collect()
    }

    #[test]
    fn arrays_and_archives_hold_the_same_videos() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let pixels = pixels();
        let array = npy("'|u1'", "False", "(2, 3, 4, 5, 3)", &pixels);
        fs::write(at("a.npy"), &array).unwrap();
        npz(&at("stored.npz"), CompressionMethod::Stored, &[("label.npy", b"no array"), ("arr_0.npy", &array)]);
        npz(&at("deflated.npz"), CompressionMethod::Deflated, &[("arr_0.npy", &array)]);
        npz(&at("named.npz"), CompressionMethod::Stored, &[("samples.npy", &array)]);
        for name in ["a.npy", "stored.npz", "deflated.npz", "named.npz"] {
            let videos = Numpy { file: at(name) }.videos(&SHORT).unwrap().videos;
            assert_eq!(videos.len(), 2, "{name}");
            let mut second = videos[1].source.open().unwrap();
            let frames = second.read(0, 2, 2).unwrap();
            for (frame, number) in frames.iter().zip([3, 5]) {
                assert_eq!((frame.width, frame.height), (5, 4));
                assert_eq!(frame.pixels, pixels[number * 60..(number + 1) * 60], "{name}");
            }
            assert!(second.read(1, 2, 2).is_err());
        }
    }

    /// What was written is read back, and an array's bytes are those of `numpy.save`.
    #[test]
    fn clips_are_written_as_numpy_does() {
        let folder = tempfile::tempdir().unwrap();
        let clips = Tensor::from_slice(&pixels()).view([2, 3, 4, 5, 3]);
        for name in ["a.npy", "a.npz"] {
            let path = folder.path().join(name);
            let mut writer = NumpyWriter::create(&path, 2, [3, 3, 4, 5]).unwrap();
            for i in 0..2 {
                writer.push(&clips.permute([0, 4, 1, 2, 3]).narrow(0, i, 1)).unwrap();
            }
            assert!(!path.exists(), "it is there before it is whole");
            writer.finish().unwrap();
            let videos = Numpy { file: path.clone() }.videos(&SHORT).unwrap().videos;
            let mut found = Vec::new();
            for video in &videos {
                for frame in video.source.open().unwrap().read(0, 3, 1).unwrap() {
                    assert_eq!((frame.width, frame.height), (5, 4));
                    found.extend(frame.pixels);
                }
            }
            assert_eq!((videos.len(), found), (2, pixels()), "{name}");
        }
        let expected = npy("'|u1'", "False", "(2, 3, 4, 5, 3)", &pixels());
        assert_eq!(fs::read(folder.path().join("a.npy")).unwrap(), expected);
        let mut writer = NumpyWriter::create(&folder.path().join("b.npy"), 1, [3, 3, 4, 5]).unwrap();
        assert!(writer.push(&Tensor::zeros([1, 1, 3, 4, 5], (Kind::Uint8, Device::Cpu))).is_err());
        assert!(writer.finish().unwrap_err().to_string().contains("1 clips"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn other_arrays_say_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        let pixels = pixels();
        for (bytes, word) in [
            (npy("'<f4'", "False", "(2, 3, 4, 5, 3)", &pixels), "`<f4` of shape [2, 3, 4, 5, 3]"),
            (
                npy("'|u1'", "False", "(2, 3, 3, 4, 5)", &pixels),
                "[N, F, H, W, 3] are expected; these have shape [2, 3, 3, 4, 5]",
            ),
            (npy("'|u1'", "True", "(2, 3, 4, 5, 3)", &pixels), "Fortran"),
            (npy("[('a', '<f4')]", "False", "(2,)", &pixels), "a structure"),
            (npy("'|u1'", "False", "(2, 3, 4, 5, 3)", &pixels[1..]), "359 bytes of pixels"),
            (npy("'|u1'", "False", "(0, 3, 4, 5, 3)", &[]), "empty"),
            (npy("'|u1'", "False", "(99999999999, 99999999999, 4, 5, 3)", &pixels), "bytes of pixels"),
            (npy("'|u1'", "False", "(2, -3, 4, 5, 3)", &pixels), "`-3`"),
            (b"hello, this is a text".to_vec(), "no numpy array"),
            (b"\x93NUM".to_vec(), "ends within its header"),
        ] {
            fs::write(&path, bytes).unwrap();
            let message = format!("{:#}", NumpyFile::open(&path).unwrap_err());
            assert!(message.contains(word) && message.contains("x.npy"), "{message}");
        }
        let path = folder.path().join("x.npz");
        npz(&path, CompressionMethod::Stored, &[("a.npy", b"1"), ("b.npy", b"2")]);
        let message = format!("{:#}", NumpyFile::open(&path).unwrap_err());
        assert!(message.contains("holds a, b") || message.contains("holds b, a"), "{message}");
        fs::write(&path, b"no archive").unwrap();
        assert!(NumpyFile::open(&path).is_err());
    }

    #[test]
    fn damaged_files_never_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        let whole = npy("'|u1'", "False", "(2, 3, 4, 5, 3)", &pixels());
        for bit in 0..128 * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, damaged).unwrap();
            let _ = NumpyFile::open(&path);
        }
    }
}
