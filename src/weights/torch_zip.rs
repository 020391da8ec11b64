//! PyTorch's own checkpoint files: a zip of one pickle and the bytes of its storages. The pickle is read as data.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tch::{Kind, Tensor};
use zip::ZipArchive;

use super::pickle::{self, Value};

/// Largest number of elements believed of one storage: 2³³.
const MOST_ELEMENTS: i64 = 1 << 33;

/// Longest pickle that is believed: names, shapes and settings of a checkpoint are a few megabytes.
const MOST_PICKLE_BYTES: u64 = 1 << 28;

/// What a checkpoint file holds.
pub struct TorchFile {
    /// Of its `state_dict` (or of the file itself, where it is one), by name, on the host.
    pub tensors: BTreeMap<String, Tensor>,
    /// What stands beside the `state_dict`.
    pub beside: Vec<(String, Value)>,
}

/// Reads a checkpoint file.
///
/// # Errors
/// Not such a file, truncated or damaged; a tensor of a type that is not read, or beyond its storage.
pub fn read_torch(path: &Path) -> Result<TorchFile> {
    let name = || path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot open {}", name()))?;
    let length = file.metadata()?.len();
    let zip = ZipArchive::new(BufReader::new(file))
        .with_context(|| format!("{} is not a checkpoint of PyTorch (a zip file), or it is truncated", name()))?;
    // twice: a view that is not contiguous is copied out of its storage
    let mut archive = Archive { zip, folder: String::new(), storages: BTreeMap::new(), left: 2 * length };
    let entry = archive
        .zip
        .file_names()
        .find(|entry| entry.ends_with("/data.pkl"))
        .map(str::to_string)
        .with_context(|| format!("{} is a zip file without a `data.pkl`", name()))?;
    archive.folder = entry.trim_end_matches("data.pkl").to_string();
    let root = pickle::read(&archive.bytes_of(&entry, MOST_PICKLE_BYTES)?).with_context(name)?;
    let state = root.get("state_dict");
    let beside = match state {
        None => Vec::new(),
        Some(_) => {
            let others = root.entries().unwrap_or_default().iter().filter(|(k, _)| k.as_str() != Some("state_dict"));
            others
                .map(|(k, value)| (k.as_str().map_or_else(|| format!("{k:?}"), str::to_string), value.clone()))
                .collect()
        }
    };
    let state = state.unwrap_or(&root);
    let entries =
        state.entries().with_context(|| format!("{}: its state is {}, not a dictionary", name(), state.kind()))?;
    let mut tensors = BTreeMap::new();
    for (key, value) in entries {
        let key = key.as_str().with_context(|| format!("{}: a key of the state is {}", name(), key.kind()))?;
        let tensor = archive.tensor(value).with_context(|| format!("{}: tensor `{key}`", name()))?;
        tensors.insert(key.to_string(), tensor);
    }
    Ok(TorchFile { tensors, beside })
}

/// The tensors alone.
///
/// # Errors
/// As [`read_torch`].
pub fn read_state_dict(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    Ok(read_torch(path)?.tensors)
}

/// An open checkpoint, with the storages that were read.
struct Archive {
    zip: ZipArchive<BufReader<File>>,
    folder: String,
    storages: BTreeMap<String, Tensor>,
    /// Bytes that may still be read or copied: a small file cannot ask for much memory.
    left: u64,
}

impl Archive {
    /// An entry of at most `most` bytes.
    fn bytes_of(&mut self, entry: &str, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = self.zip.by_name(entry).with_context(|| format!("the entry `{entry}` is missing"))?;
        // reads to the end and checks the entry's CRC-32; what the header promises is not allocated ahead
        let mut limited = file.take(most + 1);
        limited.read_to_end(&mut bytes).with_context(|| format!("the entry `{entry}` is damaged"))?;
        ensure!(bytes.len() as u64 <= most, "the entry `{entry}` is longer than {most} bytes");
        Ok(bytes)
    }

    fn spend(&mut self, bytes: u64) -> Result<()> {
        let left = self.left.checked_sub(bytes);
        self.left = left.context("its tensors are together more than twice as large as the file")?;
        Ok(())
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, …)`, or a parameter around it.
    fn tensor(&mut self, value: &Value) -> Result<Tensor> {
        let object = value.as_object().with_context(|| format!("is {}", value.kind()))?;
        let arguments = object.arguments.as_sequence().unwrap_or_default();
        if object.callable.is_global("torch._utils", "_rebuild_parameter") {
            return self.tensor(arguments.first().context("a parameter of nothing")?);
        }
        ensure!(
            object.callable.is_global("torch._utils", "_rebuild_tensor_v2"),
            "is made by other code than PyTorch's tensors"
        );
        let [Value::Persistent(storage), offset, size, stride, ..] = arguments else {
            bail!("its storage, offset, size and stride are not there");
        };
        let [_, kind, key, _, count, ..] = storage.as_sequence().unwrap_or_default() else {
            bail!("its storage is not told");
        };
        let kind = storage_kind(kind)?;
        let key = key.as_str().context("its storage has no key")?;
        let count = count.as_int().context("its storage has no length")?;
        ensure!((0..=MOST_ELEMENTS).contains(&count), "a storage of {count} elements");
        let whole = match self.storages.get(key) {
            Some(found) => found.shallow_clone(),
            None => {
                let expected = count as u64 * kind.elt_size_in_bytes() as u64;
                self.spend(expected)?;
                let bytes = self.bytes_of(&format!("{}data/{key}", self.folder), expected)?;
                ensure!(bytes.len() as u64 == expected, "storage {key} has {} bytes, {expected} are told", bytes.len());
                let whole = Tensor::f_from_data_size(&bytes, &[count], kind)?;
                self.storages.insert(key.to_string(), whole.shallow_clone());
                whole
            }
        };
        // a second tensor may give the storage another length or type than the first one did
        let (kind, count) = (whole.kind(), whole.numel() as i64);
        let numbers = |value: &Value| -> Option<Vec<i64>> { value.as_sequence()?.iter().map(Value::as_int).collect() };
        let (size, stride) = (numbers(size).context("no size")?, numbers(stride).context("no stride")?);
        let offset = offset.as_int().context("no offset")?;
        ensure!(size.len() == stride.len() && size.len() <= 16, "size {size:?} with stride {stride:?}");
        ensure!(offset >= 0 && size.iter().chain(&stride).all(|&n| n >= 0), "a negative size, stride or offset");
        if size.iter().all(|&n| n > 0) {
            let reach =
                size.iter().zip(&stride).try_fold(offset, |at, (n, s)| at.checked_add((n - 1).checked_mul(*s)?));
            ensure!(
                reach.is_some_and(|last| last < count),
                "size {size:?} with stride {stride:?} reaches beyond its {count} elements"
            );
        }
        let view = whole.f_as_strided(&size, &stride, offset)?;
        if view.is_contiguous() {
            return Ok(view);
        }
        let numel = size.iter().try_fold(1u64, |all, &n| all.checked_mul(n as u64));
        let bytes = numel.and_then(|n| n.checked_mul(kind.elt_size_in_bytes() as u64));
        self.spend(bytes.context("its size overflows")?)?;
        Ok(view.f_contiguous()?)
    }
}

fn storage_kind(value: &Value) -> Result<Kind> {
    let Value::Global(module, name) = value else { bail!("its storage's type is {}", value.kind()) };
    ensure!(&**module == "torch", "its storage's type is {module}.{name}");
    Ok(match &**name {
        "FloatStorage" => Kind::Float,
        "DoubleStorage" => Kind::Double,
        "HalfStorage" => Kind::Half,
        "BFloat16Storage" => Kind::BFloat16,
        "LongStorage" => Kind::Int64,
        "IntStorage" => Kind::Int,
        "ByteStorage" => Kind::Uint8,
        "BoolStorage" => Kind::Bool,
        other => return Err(anyhow!("a storage of type {other} is not read")),
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, panic::catch_unwind, path::PathBuf};

    use zip::{CompressionMethod, ZipWriter, write::FileOptions};

    use super::*;

    fn text(value: &str) -> Vec<u8> {
        [b"X".as_slice(), &(value.len() as u32).to_le_bytes(), value.as_bytes()].concat()
    }

    /// `{"state_dict": {"a": …}}`, a [2, 3] view of six floats with the given sizes.
    fn pickle(rows: u8, columns: u8) -> Vec<u8> {
        let storage = [
            b"(".to_vec(),
            text("storage"),
            b"ctorch\nFloatStorage\n".to_vec(),
            text("0"),
            text("cpu"),
            b"K\x06tQ".to_vec(),
        ];
        let rest = [b"K\x00".to_vec(), vec![b'K', rows, b'K', columns, 0x86], b"K\x03K\x01\x86\x89NtR".to_vec()];
        [
            b"\x80\x02}(".to_vec(),
            text("state_dict"),
            b"}(".to_vec(),
            text("a"),
            b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
            storage.concat(),
            rest.concat(),
            b"uu.".to_vec(),
        ]
        .concat()
    }

    fn write(folder: &Path, pickle: &[u8]) -> PathBuf {
        let path = folder.join("x.ckpt");
        let mut archive = ZipWriter::new(File::create(&path).unwrap());
        let stored = FileOptions::default().compression_method(CompressionMethod::Stored);
        archive.start_file("archive/data.pkl", stored).unwrap();
        archive.write_all(pickle).unwrap();
        archive.start_file("archive/data/0", stored).unwrap();
        (0..6).for_each(|i| archive.write_all(&(i as f32).to_le_bytes()).unwrap());
        archive.finish().unwrap();
        path
    }

    fn refusal(path: &Path) -> String {
        format!("{:#}", read_torch(path).err().expect("it must be refused"))
    }

    #[test]
    fn a_tensor_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let TorchFile { tensors, beside } = read_torch(&write(folder.path(), &pickle(2, 3))).unwrap();
        assert!(beside.is_empty());
        assert_eq!(tensors["a"], Tensor::arange(6, (Kind::Float, tch::Device::Cpu)).reshape([2, 3]));
    }

    #[test]
    fn a_tensor_beyond_its_storage_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = refusal(&write(folder.path(), &pickle(3, 3)));
        assert!(error.contains("beyond its 6 elements"), "{error}");
    }

    /// Four petabytes out of one number: a view whose strides are zero.
    #[test]
    fn a_small_file_cannot_ask_for_much_memory() {
        let folder = tempfile::tempdir().unwrap();
        let (shape, strides) = (b"K\x02K\x03\x86".to_vec(), b"K\x03K\x01\x86".to_vec());
        let large = b"J\x00\x00\x00\x40J\x00\x00\x10\x00\x86".to_vec();
        let replace = |text: &[u8], from: &[u8], to: &[u8]| {
            let at = text.windows(from.len()).position(|w| w == from).unwrap();
            [&text[..at], to, &text[at + from.len()..]].concat()
        };
        let hostile = replace(&replace(&pickle(2, 3), &shape, &large), &strides, b"K\x00K\x00\x86");
        let error = refusal(&write(folder.path(), &hostile));
        assert!(error.contains("larger") || error.contains("as large as the file"), "{error}");
    }

    #[test]
    fn a_command_is_never_run() {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("made");
        let call = [b"cposix\nsystem\n(".to_vec(), text(&format!("touch {}", made.display())), b"tR".to_vec()].concat();
        let hostile = [b"\x80\x02}(".to_vec(), text("a"), call, b"u.".to_vec()].concat();
        let error = refusal(&write(folder.path(), &hostile));
        assert!(error.contains("other code"), "{error}");
        assert!(!made.exists());
    }

    #[test]
    fn damage_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), &pickle(2, 3));
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(read_torch(&path).is_err(), "cut to {length} of {} bytes", whole.len());
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &flipped).unwrap();
            // names and dates may change and harm nothing; what is read is right or refused
            let read = catch_unwind(|| read_torch(&path)).expect("no panic");
            if let Ok(TorchFile { tensors, .. }) = read {
                assert_eq!(tensors["a"].size(), [2, 3]);
                assert_eq!(tensors["a"].sum(None).double_value(&[]), 15.0, "bit {bit}");
            }
        }
    }
}
