//! Checkpoints as PyTorch writes them.

use std::{collections::BTreeMap, fs::File, io::Write, path::Path};

use tch::{Kind, Tensor};
use zip::{CompressionMethod, ZipWriter, write::FileOptions};

/// A pickle under construction, as PyTorch writes it.
pub struct Pickle(pub Vec<u8>);

impl Pickle {
    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn text(&mut self, text: &str) {
        self.raw(b"X");
        self.raw(&(text.len() as u32).to_le_bytes());
        self.raw(text.as_bytes());
    }

    pub fn int(&mut self, value: i64) {
        self.raw(b"J");
        self.raw(&(value as i32).to_le_bytes());
    }

    pub fn ints(&mut self, values: &[i64]) {
        self.raw(b"(");
        values.iter().for_each(|&value| self.int(value));
        self.raw(b"t");
    }

    /// A call of `_rebuild_tensor_v2` on a contiguous tensor.
    pub fn tensor(&mut self, tensor: &Tensor, storage: &str) {
        self.tensor_with(tensor, storage, b"");
    }

    /// As [`Self::tensor`], with this behind the storage's length.
    fn tensor_with(&mut self, tensor: &Tensor, storage: &str, behind: &[u8]) {
        self.raw(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        let kind = match tensor.kind() {
            Kind::Float => "Float",
            Kind::Half => "Half",
            Kind::Int => "Int",
            Kind::Int64 => "Long",
            other => panic!("{other:?}"),
        };
        self.raw(format!("ctorch\n{kind}Storage\n").as_bytes());
        self.text(storage);
        self.text("cpu");
        self.int(tensor.numel() as i64);
        self.raw(behind);
        self.raw(b"tQK\x00");
        self.ints(&tensor.size());
        // as `bytes` lays them
        self.ints(&tensor.contiguous().stride());
        self.raw(b"\x89ccollections\nOrderedDict\n)RtR");
    }
}

/// Writes a checkpoint; `more` adds to the dictionary that holds the state dict.
pub fn write_checkpoint(path: &Path, tensors: &BTreeMap<String, Tensor>, more: &dyn Fn(&mut Pickle)) {
    write_checkpoint_under("state_dict", path, tensors, more);
}

/// As [`write_checkpoint`], the state dict under a name of its own.
pub fn write_checkpoint_under(
    state: &str,
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    more: &dyn Fn(&mut Pickle),
) {
    let mut pickle = Pickle(b"\x80\x02}(".to_vec());
    more(&mut pickle);
    pickle.text(state);
    pickle.raw(b"ccollections\nOrderedDict\n)R(");
    // names of one tensor share its storage
    let mut storages: Vec<&Tensor> = Vec::new();
    for (name, tensor) in tensors {
        let known = storages.iter().position(|other| other.data_ptr() == tensor.data_ptr());
        let storage = known.unwrap_or_else(|| {
            storages.push(tensor);
            storages.len() - 1
        });
        pickle.text(name);
        pickle.tensor(tensor, &storage.to_string());
    }
    pickle.raw(b"uu.");
    let mut archive = ZipWriter::new(File::create(path).unwrap());
    let stored = FileOptions::default().compression_method(CompressionMethod::Stored);
    archive.start_file("archive/data.pkl", stored).unwrap();
    archive.write_all(&pickle.0).unwrap();
    for (i, tensor) in storages.iter().enumerate() {
        archive.start_file(format!("archive/data/{i}"), stored).unwrap();
        archive.write_all(&bytes(tensor)).unwrap();
    }
    archive.finish().unwrap();
}

/// Writes the list that MCVD saves: weights, an optimizer's state, the epoch, the step, and, where there is one, an average.
pub fn write_listed_checkpoint(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    step: i64,
    average: Option<&BTreeMap<String, Tensor>>,
) {
    let mut pickle = Pickle(b"\x80\x02](".to_vec());
    let mut storages = Vec::new();
    let mut dictionary = |pickle: &mut Pickle, tensors: &BTreeMap<String, Tensor>| {
        pickle.raw(b"ccollections\nOrderedDict\n)R(");
        for (name, tensor) in tensors {
            pickle.text(name);
            pickle.tensor(tensor, &storages.len().to_string());
            storages.push(bytes(tensor));
        }
        pickle.raw(b"u");
    };
    dictionary(&mut pickle, tensors);
    pickle.raw(b"}");
    pickle.int(7);
    pickle.int(step);
    if let Some(average) = average {
        dictionary(&mut pickle, average);
    }
    pickle.raw(b"e.");
    let names: Vec<String> = (0..storages.len()).map(|i| format!("archive/data/{i}")).collect();
    let data = names.iter().zip(&storages).map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    write_zip(path, &[("archive/data.pkl", pickle.0.as_slice())].into_iter().chain(data).collect::<Vec<_>>());
}

/// Writes a checkpoint as PyTorch before 1.6 did: pickles one after the other, then the storages.
pub fn write_legacy_checkpoint(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let mut object = Pickle(b"\x80\x02}(".to_vec());
    object.text("state_dict");
    object.raw(b"}(");
    let mut keys = Pickle(b"\x80\x02](".to_vec());
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        object.text(name);
        object.tensor_with(tensor, &format!("9420{i}"), b"N");
        keys.text(&format!("9420{i}"));
    }
    object.raw(b"uu.");
    keys.raw(b"e.");
    let mut machine = Pickle(b"\x80\x02}(".to_vec());
    machine.text("little_endian");
    machine.raw(b"\x88u.");
    let mut file = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.".to_vec();
    file.extend([machine.0, object.0, keys.0].concat());
    for tensor in tensors.values() {
        file.extend((tensor.numel() as i64).to_le_bytes());
        file.extend(bytes(tensor));
    }
    std::fs::write(path, file).unwrap();
}

/// A zip of these entries.
pub fn write_zip(path: &Path, entries: &[(&str, &[u8])]) {
    let mut archive = ZipWriter::new(File::create(path).unwrap());
    for (name, contents) in entries {
        archive.start_file(*name, FileOptions::default()).unwrap();
        archive.write_all(contents).unwrap();
    }
    archive.finish().unwrap();
}

/// The numbers of a tensor as a file has them.
pub fn bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.detach().contiguous();
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}
