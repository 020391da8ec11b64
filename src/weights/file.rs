//! A foreign file of weights, whatever its name ends in: safetensors, or a checkpoint of PyTorch of any age.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;
use tch::Tensor;

use super::{kind::TensorShapes, pickle::Value, torch_file::TorchFile};
use crate::{
    file_format::FileFormat,
    safetensors::{read_metadata, read_notes, read_safetensors, read_shapes},
};

/// What trainings wrap around networks: segments of names that say nothing of the network.
const WRAPPERS: [&str; 4] = ["_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Of data-parallel training: before every name, or no wrapper at all.
const PARALLEL: &str = "module.";

/// An open file of weights, of which names and shapes are known and the tensors are still in the file.
///
/// Names are without what training wraps around networks (`_orig_mod.`, `module.`).
pub struct WeightsFile {
    path: PathBuf,
    shapes: TensorShapes,
    /// The file's own name of each tensor.
    own_names: BTreeMap<String, String>,
    wrappers: Vec<&'static str>,
    source: Source,
}

enum Source {
    Safetensors,
    Torch(Box<TorchFile>),
}

impl WeightsFile {
    /// # Errors
    /// Says what the file is where it holds no weights that can be read; a file that is truncated or damaged; two names
    /// that are one without their wrappers.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_state(path, None)
    }

    /// As [`Self::open`]; where the file keeps several networks under names, that of the preferred one is read.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_state(path: &Path, preferred: Option<&str>) -> Result<Self> {
        let name = || path.display().to_string();
        let (shapes, source) = match FileFormat::read(path)? {
            FileFormat::Safetensors => (read_shapes(path)?, Source::Safetensors),
            FileFormat::Zip | FileFormat::LegacyTorch => {
                let file = TorchFile::open(path, preferred)?;
                (file.shapes().with_context(name)?, Source::Torch(Box::new(file)))
            }
            format => bail!("{} is {format}", name()),
        };
        ensure!(
            shapes.is_empty() || shapes.values().any(|shape| !shape.contains(&0)),
            "{}: its tensors are all empty, as where DeepSpeed shares them among processes (ZeRO-3): its \
             zero_to_fp32.py joins them",
            name()
        );
        let mut file = WeightsFile {
            path: path.to_path_buf(),
            shapes: TensorShapes::new(),
            own_names: BTreeMap::new(),
            wrappers: Vec::new(),
            source,
        };
        let (clean, wrappers) = unwrapped(shapes.keys());
        file.wrappers = wrappers;
        for ((own, shape), clean) in shapes.into_iter().zip(clean) {
            if let Some(other) = file.own_names.insert(clean.clone(), own.clone()) {
                bail!("{}: `{other}` and `{own}` are both `{clean}`", name());
            }
            file.shapes.insert(clean, shape);
        }
        Ok(file)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and shapes.
    pub fn shapes(&self) -> &TensorShapes {
        &self.shapes
    }

    /// Under which name a checkpoint of PyTorch keeps the weights; none where it holds nothing else.
    pub fn state_name(&self) -> Option<&str> {
        match &self.source {
            Source::Safetensors => None,
            Source::Torch(file) => file.state_name.as_deref(),
        }
    }

    /// What stands beside the weights in a checkpoint of PyTorch.
    pub fn beside(&self) -> &[(String, Value)] {
        match &self.source {
            Source::Safetensors => &[],
            Source::Torch(file) => &file.beside,
        }
    }

    /// What this program wrote beside the tensors of a safetensors file.
    ///
    /// # Errors
    /// It is damaged.
    pub fn metadata(&self) -> Result<Option<Json>> {
        match self.source {
            Source::Safetensors => read_metadata(&self.path),
            Source::Torch(_) => Ok(None),
        }
    }

    /// The notes in the header of a safetensors file, whatever its name ends in.
    ///
    /// # Errors
    /// It is damaged.
    pub fn notes(&self) -> Result<HashMap<String, String>> {
        match self.source {
            Source::Safetensors => read_notes(&self.path),
            Source::Torch(_) => Ok(HashMap::new()),
        }
    }

    /// Leaves out tensors and other entries whose names begin with these prefixes; a note says how many.
    ///
    /// # Errors
    /// A beginning that no name has.
    pub fn ignore(&mut self, prefixes: &[String]) -> Result<()> {
        for prefix in prefixes {
            let own_names = &self.own_names;
            let ignored = |name: &str| name.starts_with(prefix) || own_names[name].starts_with(prefix);
            let before = self.shapes.len();
            self.shapes.retain(|name, _| !ignored(name));
            let mut count = before - self.shapes.len();
            if let Source::Torch(file) = &mut self.source {
                let before = file.beside.len();
                file.beside.retain(|(name, _)| !name.starts_with(prefix));
                count += before - file.beside.len();
            }
            ensure!(count > 0, "{prefix}: no name in {} begins so", self.path.display());
            tracing::info!("{count} names that begin with `{prefix}` are ignored");
        }
        Ok(())
    }

    /// All tensors, on the host. A note says what was removed from their names.
    ///
    /// # Errors
    /// A file that is damaged; a tensor of a type that is not read, or beyond its storage.
    pub fn read(self) -> Result<BTreeMap<String, Tensor>> {
        for wrapper in &self.wrappers {
            tracing::info!("names are read without `{wrapper}`, which the training that wrote the file put into them");
        }
        let mut tensors = match self.source {
            Source::Safetensors => read_safetensors(&self.path)?.0,
            Source::Torch(mut file) => {
                let own = self.shapes.keys().map(|name| &self.own_names[name]);
                file.read(own).with_context(|| self.path.display().to_string())?
            }
        };
        let take = |name: String| {
            let own = &self.own_names[&name];
            let tensor = tensors.remove(own).with_context(|| format!("`{own}` went from {}", self.path.display()))?;
            Ok((name, tensor))
        };
        self.shapes.into_keys().map(take).collect()
    }
}

/// The names without what training wraps around networks, in their order, and what was taken off.
fn unwrapped<'a>(names: impl Iterator<Item = &'a String>) -> (Vec<String>, Vec<&'static str>) {
    let mut names: Vec<String> = names.cloned().collect();
    let mut taken = Vec::new();
    for wrapper in WRAPPERS {
        let mut found = false;
        for name in &mut names {
            let clean = if name.starts_with("model_ema.") {
                // averages have their dots removed
                name.replace(wrapper, "")
            } else {
                name.split('.').filter(|segment| *segment != wrapper).collect::<Vec<_>>().join(".")
            };
            found |= clean != *name;
            *name = clean;
        }
        taken.extend(found.then_some(wrapper));
    }
    while !names.is_empty() && names.iter().all(|name| name.starts_with(PARALLEL)) {
        names.iter_mut().for_each(|name| drop(name.drain(..PARALLEL.len())));
        if !taken.contains(&PARALLEL) {
            taken.push(PARALLEL);
        }
    }
    (names, taken)
}

/// The tensors of a file alone.
///
/// # Errors
/// As [`WeightsFile::open`] and [`WeightsFile::read`].
pub fn read_state_dict(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    WeightsFile::open(path)?.read()
}
