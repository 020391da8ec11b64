//! PyTorch's own checkpoint files: a zip of one pickle and the bytes of its storages, or what [`super::torch_legacy`]
//! reads. The pickle is read as data.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use tch::Tensor;
use zip::ZipArchive;

use super::{
    kind::TensorShapes,
    pickle::{self, Object, Value},
    torch_legacy::{self, Places},
    torch_storage::{MOST_PICKLE_BYTES, storage_kind},
};
use crate::file_format::FileFormat;

/// Largest number of elements believed of one storage: 2³³.
const MOST_ELEMENTS: i64 = 1 << 33;

/// Under which names trainings keep a network's weights in what they save: Lightning's, DeepSpeed's, and others'.
const STATES: [&str; 4] = ["state_dict", "module", "model", "model_state_dict"];

/// An open checkpoint file.
pub struct TorchFile {
    /// The state: names, each with the tensor that it asks for.
    state: Vec<(String, Value)>,
    /// Under which name the state was found; none where the file is nothing but the state.
    pub state_name: Option<String>,
    /// What stands beside the state.
    pub beside: Vec<(String, Value)>,
    storages: Storages,
}

impl TorchFile {
    /// Opens a checkpoint file of any age. `preferred` names the entry that is the state where there is one of that name.
    ///
    /// # Errors
    /// Not such a file, truncated or damaged.
    pub fn open(path: &Path, preferred: Option<&str>) -> Result<Self> {
        let name = || path.display().to_string();
        let mut file = File::open(path).with_context(|| format!("cannot open {}", name()))?;
        let length = file.metadata()?.len();
        let (root, source) = if FileFormat::read(path)? == FileFormat::LegacyTorch {
            let (root, places) = torch_legacy::open(&mut file)
                .with_context(|| format!("{}, a checkpoint of PyTorch before 1.6", name()))?;
            (root, Source::Legacy { file, places })
        } else {
            let zip = ZipArchive::new(BufReader::new(file)).with_context(|| {
                format!("{} is truncated or no zip file, which checkpoints of PyTorch are ({length} bytes)", name())
            })?;
            let mut source = Source::zip(zip).with_context(name)?;
            let pickle = source.bytes_of("data.pkl", MOST_PICKLE_BYTES).with_context(name)?;
            (pickle::read(&pickle).with_context(name)?, source)
        };
        let (state_name, state, beside) = state_of(&root, preferred).with_context(name)?;
        // twice: a view that is not contiguous is copied out of its storage
        Ok(TorchFile {
            state,
            state_name,
            beside,
            storages: Storages { source, read: BTreeMap::new(), left: 2 * length },
        })
    }

    /// Names and shapes of the tensors, of which none is read.
    ///
    /// # Errors
    /// An entry of the state that is no tensor.
    pub fn shapes(&self) -> Result<TensorShapes> {
        let shape = |(name, value): &(String, Value)| {
            Ok((name.clone(), Layout::of(value).with_context(|| format!("tensor `{name}`"))?.size))
        };
        self.state.iter().map(shape).collect()
    }

    /// These tensors, on the host, under the names that are asked for.
    ///
    /// # Errors
    /// A tensor that is not there, of a type that is not read, or beyond its storage.
    pub fn read<'a>(&mut self, names: impl Iterator<Item = &'a String>) -> Result<BTreeMap<String, Tensor>> {
        // of equal names the last one counts
        let state: BTreeMap<&String, &Value> = self.state.iter().map(|(name, value)| (name, value)).collect();
        let mut tensors = BTreeMap::new();
        for name in names {
            let value = state.get(name).with_context(|| format!("tensor `{name}` is missing"))?;
            tensors.insert(name.clone(), self.storages.tensor(value).with_context(|| format!("tensor `{name}`"))?);
        }
        Ok(tensors)
    }
}

/// Entries by name.
type Entries = Vec<(String, Value)>;

/// The state of a saved object with the name under which it was found, and what stands beside it.
fn state_of(root: &Value, preferred: Option<&str>) -> Result<(Option<String>, Entries, Entries)> {
    ensure!(
        root.get("string_to_param").is_none(),
        "this is a textual inversion (`string_to_param`): vectors of new words, without a network"
    );
    // some trainings save a list, whose entries have the names of their places
    if let (Some(listed), Some(place)) = (root.as_sequence(), preferred.and_then(|place| place.parse::<usize>().ok())) {
        let entries = listed.get(place).and_then(Value::entries);
        let entries = entries.with_context(|| format!("it is a list, and its entry {place} is no dictionary"))?;
        let odd = entries.iter().find(|(key, _)| key.as_str().is_none());
        ensure!(odd.is_none(), "a key of the state at {place} of the list is no text");
        let state = entries.iter().filter_map(|(key, value)| Some((key.as_str()?.to_string(), value.clone())));
        let others = listed.iter().enumerate().filter(|(i, _)| *i != place);
        let beside = others.map(|(i, value)| (i.to_string(), value.clone())).collect();
        return Ok((Some(place.to_string()), state.collect(), beside));
    }
    let is_state = |key: &&str| {
        let found = root.get(key);
        *key == "state_dict" && found.is_some() || found.is_some_and(|found| found.entries().is_some())
    };
    let key = preferred.into_iter().chain(STATES).find(is_state);
    let state = key.and_then(|key| root.get(key)).unwrap_or(root);
    let class = |object: &Object| match &object.callable {
        Value::Global(module, name) => format!(" of {module}.{name}"),
        _ => String::new(),
    };
    let entries = state.entries().with_context(|| match state {
        Value::Object(_) if Layout::of(state).is_ok() => "it is one tensor, not a dictionary of tensors".to_string(),
        Value::Object(object) => format!(
            "its state is an object{}, not a dictionary: a whole model was saved. In Python with its code: \
             `torch.save(model.state_dict(), …)`",
            class(object)
        ),
        _ => format!("its state is {}, not a dictionary", state.kind()),
    })?;
    let odd = entries.iter().find(|(key, _)| key.as_str().is_none());
    if let Some((odd, _)) = odd {
        bail!("a key of the state is {}", odd.kind());
    }
    if let Some(key) = key {
        let beside = named(root).into_iter().filter(|(name, _)| name != key);
        return Ok((Some(key.to_string()), named(state), beside.collect()));
    }
    // numbers and texts among the tensors are no part of a network
    let is_plain = |value: &Value| {
        matches!(value, Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::String(_))
    };
    let (state, beside) = named(state).into_iter().partition(|(_, value)| !is_plain(value));
    Ok((None, state, beside))
}

fn named(dictionary: &Value) -> Entries {
    let name = |key: &Value| key.as_str().map_or_else(|| format!("{key:?}"), str::to_string);
    dictionary.entries().unwrap_or_default().iter().map(|(key, value)| (name(key), value.clone())).collect()
}

/// How a tensor lies in its storage.
struct Layout<'a> {
    storage: &'a [Value],
    offset: i64,
    size: Vec<i64>,
    stride: Vec<i64>,
}

impl<'a> Layout<'a> {
    /// `_rebuild_tensor_v2(storage, offset, size, stride, …)`, or a parameter around it.
    fn of(value: &'a Value) -> Result<Self> {
        let object = value.as_object().with_context(|| format!("is {}", value.kind()))?;
        let arguments = object.arguments.as_sequence().unwrap_or_default();
        let is = |name: &str| object.callable.is_global("torch._utils", name);
        if is("_rebuild_parameter") || is("_rebuild_parameter_with_state") {
            return Layout::of(arguments.first().context("a parameter of nothing")?);
        }
        ensure!(is("_rebuild_tensor_v2") || is("_rebuild_tensor"), "is made by other code than PyTorch's tensors");
        let [Value::Persistent(storage), offset, size, stride, ..] = arguments else {
            bail!("its storage, offset, size and stride are not there");
        };
        let storage = storage.as_sequence().unwrap_or_default();
        let numbers = |value: &Value| -> Option<Vec<i64>> { value.as_sequence()?.iter().map(Value::as_int).collect() };
        let (size, stride) = (numbers(size).context("no size")?, numbers(stride).context("no stride")?);
        let offset = offset.as_int().context("no offset")?;
        ensure!(size.len() == stride.len() && size.len() <= 16, "size {size:?} with stride {stride:?}");
        ensure!(offset >= 0 && size.iter().chain(&stride).all(|&n| n >= 0), "a negative size, stride or offset");
        Ok(Layout { storage, offset, size, stride })
    }
}

/// Where the bytes are.
enum Source {
    Zip { zip: Box<ZipArchive<BufReader<File>>>, folder: String },
    Legacy { file: File, places: Places },
}

impl Source {
    fn zip(zip: ZipArchive<BufReader<File>>) -> Result<Self> {
        let has = |end: &str| zip.file_names().any(|entry| entry.ends_with(end));
        ensure!(!has("/constants.pkl"), "it is a TorchScript program (torch.jit.save), not a file of torch.save");
        ensure!(!has(".npy"), "it is an archive of numpy (npz), not a checkpoint of PyTorch");
        let entry = zip.file_names().find(|entry| entry.ends_with("/data.pkl"));
        let entry = entry.context("is a zip file without a `data.pkl`: unpack it, if weights are in it")?;
        let folder = entry.trim_end_matches("data.pkl").to_string();
        let mut source = Source::Zip { zip: Box::new(zip), folder };
        let order = source.bytes_of("byteorder", 16).unwrap_or_default();
        ensure!(order.is_empty() || order == b"little", "it was written by a big-endian machine, which is not read");
        Ok(source)
    }

    /// An entry of at most `most` bytes: of an old file, the storage of this key.
    fn bytes_of(&mut self, entry: &str, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self {
            Source::Zip { zip, folder } => {
                let entry = format!("{folder}{entry}");
                let file = zip.by_name(&entry).with_context(|| format!("the entry `{entry}` is missing"))?;
                // reads to the end and checks the entry's CRC-32; what the header promises is not allocated ahead
                let mut limited = file.take(most + 1);
                limited.read_to_end(&mut bytes).with_context(|| format!("the entry `{entry}` is damaged"))?;
                ensure!(bytes.len() as u64 <= most, "the entry `{entry}` is longer than {most} bytes");
            }
            Source::Legacy { file, places } => {
                let key = entry.trim_start_matches("data/");
                let (start, length) = *places.get(key).with_context(|| format!("the storage {key} is missing"))?;
                ensure!(length <= most, "the storage {key} has {length} bytes, its pickle says {most}");
                file.seek(SeekFrom::Start(start))?;
                file.take(length).read_to_end(&mut bytes).with_context(|| format!("the storage {key} is damaged"))?;
            }
        }
        Ok(bytes)
    }
}

/// The storages of an open checkpoint, with those that were read.
struct Storages {
    source: Source,
    read: BTreeMap<String, Tensor>,
    /// Bytes that may still be read or copied: a small file cannot ask for much memory.
    left: u64,
}

impl Storages {
    fn spend(&mut self, bytes: u64) -> Result<()> {
        let left = self.left.checked_sub(bytes);
        self.left = left.context("its tensors are together more than twice as large as the file")?;
        Ok(())
    }

    fn tensor(&mut self, value: &Value) -> Result<Tensor> {
        let Layout { storage, offset, size, stride } = Layout::of(value)?;
        let [_, kind, key, _, count, view @ ..] = storage else {
            bail!("the pickle does not say where its numbers lie");
        };
        ensure!(
            view.iter().all(|view| *view == Value::None),
            "its storage is a part of another one, which is not read"
        );
        let kind = storage_kind(kind)?;
        let key = key.as_str().context("its storage has no key")?;
        let count = count.as_int().context("its storage has no length")?;
        ensure!((0..=MOST_ELEMENTS).contains(&count), "a storage of {count} elements");
        let whole = match self.read.get(key) {
            Some(found) => found.shallow_clone(),
            None => {
                let expected = count as u64 * kind.elt_size_in_bytes() as u64;
                self.spend(expected)?;
                let bytes = self.source.bytes_of(&format!("data/{key}"), expected)?;
                ensure!(
                    bytes.len() as u64 == expected,
                    "storage {key} has {} bytes, its pickle says {expected}",
                    bytes.len()
                );
                let whole = Tensor::f_from_data_size(&bytes, &[count], kind)?;
                self.read.insert(key.to_string(), whole.shallow_clone());
                whole
            }
        };
        // a second tensor may give the storage another length or type than the first one did
        let (kind, count) = (whole.kind(), whole.numel() as i64);
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

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, panic::catch_unwind, path::PathBuf};

    use zip::{CompressionMethod, ZipWriter, write::FileOptions};

    use tch::Kind;

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

    fn read_torch(path: &Path) -> Result<BTreeMap<String, Tensor>> {
        let mut file = TorchFile::open(path, None)?;
        let names: Vec<String> = file.shapes()?.into_keys().collect();
        file.read(names.iter())
    }

    fn refusal(path: &Path) -> String {
        format!("{:#}", read_torch(path).expect_err("it must be refused"))
    }

    #[test]
    fn a_tensor_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), &pickle(2, 3));
        assert!(TorchFile::open(&path, None).unwrap().beside.is_empty());
        let tensors = read_torch(&path).unwrap();
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
            if let Ok(tensors) = read {
                assert_eq!(tensors["a"].size(), [2, 3]);
                assert_eq!(tensors["a"].sum(None).double_value(&[]), 15.0, "bit {bit}");
            }
        }
    }
}
