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

/// The tensors of a checkpoint's `state_dict` (or of the file itself, where it is one), by name, on the host.
///
/// # Errors
/// Not such a file, truncated or damaged; a tensor of a type that is not read, or beyond its storage.
pub fn read_state_dict(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let name = || path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot open {}", name()))?;
    let mut archive = ZipArchive::new(BufReader::new(file))
        .with_context(|| format!("{} is not a checkpoint of PyTorch (a zip file), or it is truncated", name()))?;
    let entry = archive
        .file_names()
        .find(|entry| entry.ends_with("/data.pkl"))
        .map(str::to_string)
        .with_context(|| format!("{} is a zip file without a `data.pkl`", name()))?;
    let folder = entry.trim_end_matches("data.pkl").to_string();
    let root = pickle::read(&bytes_of(&mut archive, &entry)?).with_context(name)?;
    let state = root.get("state_dict").unwrap_or(&root);
    let entries =
        state.entries().with_context(|| format!("{}: its state is {}, not a dictionary", name(), state.kind()))?;
    let mut storages = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (key, value) in entries {
        let key = key.as_str().with_context(|| format!("{}: a key of the state is {}", name(), key.kind()))?;
        let tensor = tensor(value, &mut archive, &folder, &mut storages)
            .with_context(|| format!("{}: tensor `{key}`", name()))?;
        tensors.insert(key.to_string(), tensor);
    }
    Ok(tensors)
}

fn bytes_of(archive: &mut ZipArchive<BufReader<File>>, entry: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = archive.by_name(entry).with_context(|| format!("the entry `{entry}` is missing"))?;
    // reads to the end and checks the entry's CRC-32; what the header promises is not allocated ahead
    file.read_to_end(&mut bytes).with_context(|| format!("the entry `{entry}` is damaged"))?;
    Ok(bytes)
}

/// `_rebuild_tensor_v2(storage, offset, size, stride, …)`, or a parameter around it.
fn tensor(
    value: &Value,
    archive: &mut ZipArchive<BufReader<File>>,
    folder: &str,
    storages: &mut BTreeMap<String, Tensor>,
) -> Result<Tensor> {
    let object = value.as_object().with_context(|| format!("is {}", value.kind()))?;
    let arguments = object.arguments.as_sequence().unwrap_or_default();
    if object.callable.is_global("torch._utils", "_rebuild_parameter") {
        return tensor(arguments.first().context("a parameter of nothing")?, archive, folder, storages);
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
    let whole = match storages.get(key) {
        Some(found) => found.shallow_clone(),
        None => {
            let bytes = bytes_of(archive, &format!("{folder}data/{key}"))?;
            let expected = count as usize * kind.elt_size_in_bytes();
            ensure!(bytes.len() == expected, "storage {key} has {} bytes, {expected} are told", bytes.len());
            let whole = Tensor::f_from_data_size(&bytes, &[count], kind)?;
            storages.insert(key.to_string(), whole.shallow_clone());
            whole
        }
    };
    let numbers = |value: &Value| -> Option<Vec<i64>> { value.as_sequence()?.iter().map(Value::as_int).collect() };
    let (size, stride) = (numbers(size).context("no size")?, numbers(stride).context("no stride")?);
    let offset = offset.as_int().context("no offset")?;
    ensure!(size.len() == stride.len() && size.len() <= 16, "size {size:?} with stride {stride:?}");
    ensure!(offset >= 0 && size.iter().chain(&stride).all(|&n| n >= 0), "a negative size, stride or offset");
    if size.iter().all(|&n| n > 0) {
        let reach = size.iter().zip(&stride).try_fold(offset, |at, (n, s)| at.checked_add((n - 1).checked_mul(*s)?));
        ensure!(
            reach.is_some_and(|last| last < count),
            "size {size:?} with stride {stride:?} reaches beyond its {count} elements"
        );
    }
    Ok(whole.f_as_strided(&size, &stride, offset)?.f_contiguous()?)
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

    #[test]
    fn a_tensor_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = read_state_dict(&write(folder.path(), &pickle(2, 3))).unwrap();
        assert_eq!(tensors["a"], Tensor::arange(6, (Kind::Float, tch::Device::Cpu)).reshape([2, 3]));
    }

    #[test]
    fn a_tensor_beyond_its_storage_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = read_state_dict(&write(folder.path(), &pickle(3, 3))).unwrap_err();
        assert!(format!("{error:#}").contains("beyond its 6 elements"), "{error:#}");
    }

    #[test]
    fn a_command_is_never_run() {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("made");
        let call = [b"cposix\nsystem\n(".to_vec(), text(&format!("touch {}", made.display())), b"tR".to_vec()].concat();
        let hostile = [b"\x80\x02}(".to_vec(), text("a"), call, b"u.".to_vec()].concat();
        let error = read_state_dict(&write(folder.path(), &hostile)).unwrap_err();
        assert!(format!("{error:#}").contains("other code"), "{error:#}");
        assert!(!made.exists());
    }

    #[test]
    fn damage_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), &pickle(2, 3));
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(read_state_dict(&path).is_err(), "cut to {length} of {} bytes", whole.len());
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &flipped).unwrap();
            // names and dates may change and harm nothing; what is read is right or refused
            let read = catch_unwind(|| read_state_dict(&path)).expect("no panic");
            if let Ok(tensors) = read {
                assert_eq!(tensors["a"].size(), [2, 3]);
                assert_eq!(tensors["a"].sum(None).double_value(&[]), 15.0, "bit {bit}");
            }
        }
    }
}
