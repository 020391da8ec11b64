//! Files of `torch.save` before PyTorch 1.6: pickles one after the other (a magic number, a version, the machine, the
//! object, the storages' keys), then each storage's length and bytes.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    rc::Rc,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    pickle::{self, Value},
    torch_storage::{MOST_PICKLE_BYTES, storage_kind},
};

/// Where each storage lies in the file: its first byte and how many bytes it has.
pub(super) type Places = BTreeMap<String, (u64, u64)>;

/// The object that was saved, and the places of its storages.
///
/// # Errors
/// A file that is truncated or damaged.
pub(super) fn open(file: &mut File) -> Result<(Value, Places)> {
    let length = file.metadata()?.len();
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(MOST_PICKLE_BYTES).read_to_end(&mut bytes)?;
    let mut at = 0;
    let mut next = |what: &str| -> Result<Value> {
        let (value, used) = pickle::read_first(&bytes[at..]).with_context(|| format!("its {what}"))?;
        at += used;
        Ok(value)
    };
    next("magic number")?;
    next("version")?;
    let machine = next("machine")?;
    ensure!(
        machine.get("little_endian") != Some(&Value::Bool(false)),
        "it was written by a big-endian machine, which is not read"
    );
    let root = next("object")?;
    let keys = next("list of storages")?;
    let keys = keys.as_sequence().context("its list of storages is none")?;
    let mut sizes = BTreeMap::new();
    element_sizes(&root, &mut HashSet::new(), &mut sizes)?;
    let mut places = Places::new();
    let mut at = at as u64;
    for key in keys {
        let key = key.as_str().context("the key of a storage is no text")?;
        let size =
            *sizes.get(key).with_context(|| format!("nothing uses the storage {key}, so its type is unknown"))?;
        let mut count = [0; 8];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut count).with_context(|| format!("it is truncated: the storage {key} is missing"))?;
        let count = i64::from_le_bytes(count);
        let (start, bytes) = (at + 8, u64::try_from(count).ok().and_then(|count| count.checked_mul(size)));
        let Some(bytes) = bytes.filter(|bytes| *bytes <= length.saturating_sub(start)) else {
            bail!(
                "it is truncated or damaged: the storage {key} of {count} elements reaches beyond its {length} bytes"
            );
        };
        places.insert(key.to_string(), (start, bytes));
        at = start + bytes;
    }
    Ok((root, places))
}

/// Bytes of an element of each storage that a value names; each shared value is looked at once.
fn element_sizes(value: &Value, seen: &mut HashSet<*const ()>, sizes: &mut BTreeMap<String, u64>) -> Result<()> {
    let mut all = |values: &Rc<[Value]>| -> Result<()> {
        if seen.insert(Rc::as_ptr(values).cast()) {
            values.iter().try_for_each(|value| element_sizes(value, seen, sizes))?;
        }
        Ok(())
    };
    match value {
        Value::List(values) | Value::Tuple(values) | Value::Set(values) => all(values),
        Value::Dict(entries) => {
            if seen.insert(Rc::as_ptr(entries).cast()) {
                for (key, value) in entries.iter() {
                    element_sizes(key, seen, sizes)?;
                    element_sizes(value, seen, sizes)?;
                }
            }
            Ok(())
        }
        Value::Object(object) => {
            if seen.insert(Rc::as_ptr(object).cast()) {
                for value in [&object.callable, &object.arguments, &object.keywords, &object.state] {
                    element_sizes(value, seen, sizes)?;
                }
                for (key, value) in &object.items {
                    element_sizes(key, seen, sizes)?;
                    element_sizes(value, seen, sizes)?;
                }
                object.elements.iter().try_for_each(|value| element_sizes(value, seen, sizes))?;
            }
            Ok(())
        }
        Value::Persistent(storage) => {
            if let [Value::String(word), kind, Value::String(key), ..] = storage.as_sequence().unwrap_or_default()
                && &**word == "storage"
            {
                sizes.insert(key.to_string(), storage_kind(kind)?.elt_size_in_bytes() as u64);
            }
            Ok(())
        }
        _ => Ok(()),
    }
}
