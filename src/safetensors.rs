//! Tensors on disk: whole or not at all, the same bytes for the same tensors.
//!
//! Metadata is one JSON value, kept as text under the key `lvdm` of the file's header. Beside it stands the SHA-256 of
//! the whole file, taken with zeros in its own place, so that a reader finds any damage.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use ::safetensors::tensor::{Dtype, Metadata, TensorInfo};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::{atomic_file::write_atomically, file_format::FileFormat};

mod rows;

pub use rows::{TensorRows, check_digest};

const METADATA_KEY: &str = "lvdm";
/// How a header begins whose file has a digest: the 64 digits follow.
const DIGEST_HEAD: &[u8] = b"{\"__metadata__\":{\"sha256\":\"";
const DIGEST_LENGTH: usize = 64;
/// Where the digest's digits stand in the file.
const DIGEST_PLACE: std::ops::Range<usize> = 8 + DIGEST_HEAD.len()..8 + DIGEST_HEAD.len() + DIGEST_LENGTH;

/// Writes named tensors of any device and layout. Tensors lie in the file by falling element size,
/// then by name, so that each is aligned and equal contents give equal bytes.
///
/// # Errors
/// Two tensors of one name, a type that the format lacks, a full disk. The file that was
/// there before stays as it was.
pub fn write_safetensors_atomically<S: AsRef<str>, T: Borrow<Tensor>>(
    path: &Path,
    tensors: &[(S, T)],
    metadata: &Value,
) -> Result<()> {
    let sorted = sorted(tensors)?;
    write_atomically(path, |file| {
        let mut writer = DigestedWriter::new(file, infos(&sorted), metadata)?;
        each_host(&sorted, &mut |bytes| writer.push(bytes))?;
        writer.finish().map(drop)
    })
}

/// As [`write_safetensors_atomically`], as other programs write: with the note `format: pt`, which transformers asks for, and
/// without a digest.
///
/// # Errors
/// The same.
pub fn write_foreign_safetensors<S: AsRef<str>, T: Borrow<Tensor>>(path: &Path, tensors: &[(S, T)]) -> Result<()> {
    let sorted = sorted(tensors)?;
    let header = header_of(infos(&sorted), ("format", "pt".into()), 0)?;
    write_atomically(path, |file| {
        file.write_all(&header)?;
        each_host(&sorted, &mut |bytes| Ok(file.write_all(bytes)?))
    })
}

/// Name, tensor and type, in the order in which they lie in a file.
type Sorted<'a> = Vec<(&'a str, &'a Tensor, Dtype)>;

fn sorted<S: AsRef<str>, T: Borrow<Tensor>>(tensors: &[(S, T)]) -> Result<Sorted<'_>> {
    let mut sorted = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let (name, tensor) = (name.as_ref(), tensor.borrow());
        sorted.push((name, tensor, dtype(tensor.kind()).with_context(|| format!("tensor `{name}`"))?));
    }
    sorted.sort_by(|a, b| b.2.bitsize().cmp(&a.2.bitsize()).then(a.0.cmp(b.0)));
    Ok(sorted)
}

fn infos(sorted: &Sorted) -> Vec<(String, TensorInfo)> {
    let mut offset = 0;
    let infos = sorted.iter().map(|(name, tensor, dtype)| {
        let start = offset;
        offset += tensor.numel() * tensor.kind().elt_size_in_bytes();
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        (name.to_string(), TensorInfo { dtype: *dtype, shape, data_offsets: (start, offset) })
    });
    infos.collect()
}

/// Hands on the bytes of one tensor after the other.
fn each_host(sorted: &Sorted, push: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut bytes = Vec::new();
    for (_, tensor, _) in sorted {
        let host = tensor.detach().to_device(Device::Cpu).contiguous();
        bytes.resize(host.numel() * host.kind().elt_size_in_bytes(), 0);
        host.f_copy_data_u8(&mut bytes, host.numel())?;
        push(&bytes)?;
    }
    Ok(())
}

/// A file of tensors whose bytes come piece by piece, in the order of its header; it carries its digest.
pub(crate) struct DigestedWriter<W: Write + Seek> {
    file: W,
    digest: Sha256,
}

impl<W: Write + Seek> DigestedWriter<W> {
    pub fn new(mut file: W, tensors: Vec<(String, TensorInfo)>, metadata: &Value) -> Result<Self> {
        let header = with_digest_place(header_bytes(tensors, metadata, 0)?)?;
        file.write_all(&header)?;
        Ok(DigestedWriter { file, digest: Sha256::new_with_prefix(&header) })
    }

    pub fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.digest.update(bytes);
        Ok(self.file.write_all(bytes)?)
    }

    /// Puts the digest into its place.
    pub fn finish(mut self) -> Result<W> {
        self.file.seek(SeekFrom::Start(DIGEST_PLACE.start as u64))?;
        self.file.write_all(hex(self.digest).as_bytes())?;
        self.file.flush()?;
        Ok(self.file)
    }
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A header with zeros where the digest will stand.
fn with_digest_place(header: Vec<u8>) -> Result<Vec<u8>> {
    const BEFORE: &[u8] = b"{\"__metadata__\":{";
    let rest = header[8..].strip_prefix(BEFORE).context("a header begins with its metadata")?;
    let mut text = DIGEST_HEAD.to_vec();
    text.extend([b'0'; DIGEST_LENGTH]);
    text.extend(b"\",");
    text.extend(rest.trim_ascii_end());
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

/// Reads every tensor of a file onto the host, with the metadata that `write_safetensors_atomically`
/// stored; `None` for files of other makers. A file that carries its digest is checked by it.
///
/// # Errors
/// A file that is missing, cut short, damaged, or of another kind.
pub fn read_safetensors(path: &Path) -> Result<(BTreeMap<String, Tensor>, Option<Value>)> {
    let (tensors, metadata, _) = read_checked(path, &|_| true)?;
    Ok((tensors, metadata))
}

/// What `write_safetensors_atomically` stored beside the tensors, which are not looked at.
///
/// # Errors
/// As [`read_safetensors`], but damage behind the header is not found.
pub fn read_metadata(path: &Path) -> Result<Option<Value>> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Header::read(&mut file, path)?.metadata)
}

/// The notes in a file's header, this program's among them.
///
/// # Errors
/// As [`read_metadata`].
pub fn read_notes(path: &Path) -> Result<HashMap<String, String>> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Header::read(&mut file, path)?.tensors.metadata().clone().unwrap_or_default())
}

/// Names and shapes of the tensors, which are not looked at.
///
/// # Errors
/// As [`read_metadata`].
pub fn read_shapes(path: &Path) -> Result<BTreeMap<String, Vec<i64>>> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let tensors = Header::read(&mut file, path)?.tensors;
    let shape = |name: String| {
        let shape = tensors.info(&name).map(|info| info.shape.iter().map(|&n| n as i64).collect());
        (name, shape.unwrap_or_default())
    };
    Ok(tensors.offset_keys().into_iter().map(shape).collect())
}

/// As [`read_safetensors`], those tensors alone whose names are wanted; and whether the file carries a digest, and so
/// is known to be whole.
///
/// # Errors
/// As [`read_safetensors`]; a wanted tensor that is not there.
pub fn read_checked(
    path: &Path,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<(BTreeMap<String, Tensor>, Option<Value>, bool)> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let header = Header::read(&mut file, path)?;
    let promised = header.digest();
    let mut digest = promised.as_ref().map(|_| {
        let mut text = header.bytes.clone();
        text[DIGEST_PLACE].fill(b'0');
        Sha256::new_with_prefix(text)
    });
    let mut tensors = BTreeMap::new();
    // `offset_keys` follows the file, so this reads straight through.
    for name in header.tensors.offset_keys() {
        let info = header.tensors.info(&name).expect("a name of the header");
        let kind = kind(info.dtype).with_context(|| format!("tensor `{name}` of {}", path.display()))?;
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        file.read_exact(&mut bytes).with_context(|| format!("cannot read `{name}` of {}", path.display()))?;
        if let Some(digest) = &mut digest {
            digest.update(&bytes);
        }
        if wanted(&name) {
            let shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
            tensors.insert(name, Tensor::f_from_data_size(&bytes, &shape, kind)?);
        }
    }
    if let (Some(promised), Some(digest)) = (&promised, digest) {
        let found = hex(digest);
        ensure!(
            *promised == found,
            "{} is damaged: its SHA-256 is {found}, it was written with {promised}",
            path.display()
        );
    }
    Ok((tensors, header.metadata, promised.is_some()))
}

/// What stands before the tensors' bytes.
pub(crate) struct Header {
    pub tensors: Metadata,
    pub metadata: Option<Value>,
    /// Where the tensors' bytes begin in the file; their offsets count from here.
    pub data_start: u64,
    /// All that stands before `data_start`.
    bytes: Vec<u8>,
}

impl Header {
    /// The digest that the file was written with.
    fn digest(&self) -> Option<String> {
        let digits = self.bytes.get(DIGEST_PLACE)?;
        let there = self.bytes[8..].starts_with(DIGEST_HEAD);
        there.then(|| String::from_utf8_lossy(digits).into_owned())
    }

    /// Reads the header and checks that the file is as long as it says. Leaves the file at `data_start`.
    pub fn read(file: &mut File, path: &Path) -> Result<Self> {
        let name = path.display();
        let length = file.metadata()?.len();
        match FileFormat::read(path)? {
            FileFormat::Safetensors | FileFormat::Unknown => {}
            format => bail!("{name} is not a safetensors file but {format}"),
        }
        let mut size = [0; 8];
        file.read_exact(&mut size).with_context(|| {
            format!("{name} is not a safetensors file: it has {length} bytes, fewer than the 8 of a header's size")
        })?;
        let size = u64::from_le_bytes(size);
        let whole = size.checked_add(8).filter(|&start| start <= length);
        let data_start = whole.with_context(|| {
            format!("{name} is truncated or not a safetensors file: a header of {size} bytes in a file of {length}")
        })?;
        let mut text = vec![0; size as usize];
        file.read_exact(&mut text).with_context(|| format!("cannot read the header of {name}"))?;
        let tensors: Metadata = serde_json::from_slice(&text)
            .with_context(|| format!("{name} is not a safetensors file: its header is damaged"))?;
        let expected = data_start + tensors.data_len() as u64;
        ensure!(
            length == expected,
            "{name} is {}: its header promises {expected} bytes, the file has {length}",
            if length < expected { "truncated" } else { "damaged" }
        );
        let entry = tensors.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY));
        let metadata = entry.map(|entry| serde_json::from_str(entry)).transpose();
        Ok(Self {
            metadata: metadata.with_context(|| format!("the metadata of {name} is damaged"))?,
            tensors,
            data_start,
            bytes: [&size.to_le_bytes()[..], &text].concat(),
        })
    }
}

/// The header's bytes, its size first: at least `least` bytes in all, filled up with spaces.
pub(crate) fn header_bytes(tensors: Vec<(String, TensorInfo)>, metadata: &Value, least: usize) -> Result<Vec<u8>> {
    header_of(tensors, (METADATA_KEY, metadata.to_string()), least)
}

/// As [`header_bytes`], with one note of any name.
fn header_of(tensors: Vec<(String, TensorInfo)>, (key, note): (&str, String), least: usize) -> Result<Vec<u8>> {
    let mut names = HashSet::new();
    for (name, _) in &tensors {
        ensure!(names.insert(name), "two tensors are named `{name}`");
    }
    let entries = HashMap::from([(key.to_string(), note)]);
    let mut text = serde_json::to_vec(&Metadata::new(Some(entries), tensors)?)?;
    let length = (text.len() + 8).max(least).next_multiple_of(8);
    text.resize(length - 8, b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}

const TYPES: [(Kind, Dtype); 8] = [
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Uint8, Dtype::U8),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Bool, Dtype::BOOL),
];

fn dtype(kind: Kind) -> Result<Dtype> {
    match TYPES.iter().find(|(known, _)| *known == kind) {
        Some((_, dtype)) => Ok(*dtype),
        None => bail!("type {kind:?} is not stored; convert it to one of {:?}", TYPES.map(|(kind, _)| kind)),
    }
}

fn kind(dtype: Dtype) -> Result<Kind> {
    match TYPES.iter().find(|(_, known)| *known == dtype) {
        Some((kind, _)) => Ok(*kind),
        None if dtype.bitsize() <= 8 => bail!(
            "type {dtype:?} is not read: weights of eight bits or fewer (fp8) have lost too much to be trained further; \
             take the file in half precision (F16 or BF16)"
        ),
        None => bail!("type {dtype:?} is not read; known are {:?}", TYPES.map(|(_, dtype)| dtype)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn tensors() -> Vec<(String, Tensor)> {
        let base = Tensor::arange(24, (Kind::Float, Device::Cpu)).reshape([2, 3, 4]);
        let mut tensors: Vec<_> =
            TYPES.iter().map(|(kind, _)| (format!("tensor.{kind:?}"), base.to_kind(*kind))).collect();
        tensors.push(("odd".into(), Tensor::from_slice(&[1u8, 2, 3])));
        tensors.push(("transposed".into(), base.transpose(0, 2)));
        tensors.push(("scalar".into(), Tensor::from(2.5f32)));
        tensors.push(("empty".into(), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))));
        tensors
    }

    #[test]
    fn every_type_comes_back_and_the_bytes_do_not_depend_on_order() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        let metadata = json!({"step": 7, "text": "\"quoted\""});
        let mut tensors = tensors();
        write_safetensors_atomically(&one, &tensors, &metadata).unwrap();
        let (read, found) = read_safetensors(&one).unwrap();
        assert_eq!(found, Some(metadata.clone()));
        assert_eq!(read.len(), tensors.len());
        for (name, tensor) in &tensors {
            assert_eq!((read[name].kind(), read[name].size()), (tensor.kind(), tensor.size()), "{name}");
            assert!(read[name].equal(tensor), "{name}");
        }
        tensors.reverse();
        write_safetensors_atomically(&two, &tensors, &metadata).unwrap();
        assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());
        assert_eq!(Tensor::read_safetensors(&one).unwrap().len(), tensors.len());
    }

    #[test]
    fn cut_files_are_named_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_safetensors_atomically(&path, &tensors(), &Value::Null).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in [0, 5, 8, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            let error = format!("{:#}", read_safetensors(&path).unwrap_err());
            assert!(error.contains("file") && (error.contains("truncated") || error.contains("not a safe")), "{error}");
        }
        fs::write(&path, [whole, vec![0]].concat()).unwrap();
        assert!(read_safetensors(&path).is_err());
    }

    #[test]
    fn two_tensors_of_one_name_are_refused() {
        let path = tempfile::tempdir().unwrap().path().join("file");
        let twice = [("a", Tensor::from(1.0)), ("a", Tensor::from(2.0))];
        assert!(write_safetensors_atomically(&path, &twice, &Value::Null).is_err());
        assert!(!path.exists());
    }
}
