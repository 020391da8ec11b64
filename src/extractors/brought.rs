//! Weights that no package carries, which a user brings: `lvdm weights add NAME FILE` checks a released checkpoint and puts
//! what the extractor needs of it into the folder of weights.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::Tensor;

use crate::{
    safetensors::{read_metadata, write_safetensors_atomically},
    weights::{TensorShapes, WeightsFile, released::folder},
};

/// An extractor's weights that a user brings.
pub struct Brought {
    /// The kind of the extractor, which is also what `lvdm weights add` calls it.
    pub kind: &'static str,
    /// What they are.
    pub content: &'static str,
    /// Which published file holds them.
    pub published: &'static str,
    /// Under which name a checkpoint of several networks keeps the extractor's.
    pub state: Option<&'static str>,
    /// Builds the network once, which fails where names or shapes are another network's.
    pub check: fn(BroughtFile) -> Result<()>,
}

/// What a file of weights holds for an extractor.
pub struct BroughtFile {
    /// On the host, under the names of the released network.
    pub tensors: BTreeMap<String, Tensor>,
    /// The hash of the checkpoint that the user brought.
    pub sha256: String,
}

impl BroughtFile {
    /// Names and shapes.
    pub fn shapes(&self) -> TensorShapes {
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect()
    }
}

/// Where the hash of the checkpoint stands in what `lvdm weights add` writes.
const SOURCE: &str = "source_sha256";

/// A wrapper of V-JEPA's around its encoder's names.
const BACKBONE: &str = "backbone.";

impl Brought {
    /// The file's place in the folder of weights.
    pub fn place(&self) -> PathBuf {
        folder().join(format!("{}.safetensors", self.kind))
    }

    /// Builds the extractor from the file in its place, or from a user's own one, a released checkpoint or one that
    /// [`Brought::add`] wrote.
    ///
    /// # Errors
    /// No file, one that is damaged, or one of another network.
    pub fn open<T>(&self, own: Option<&Path>, build: impl FnOnce(BroughtFile) -> Result<T>) -> Result<T> {
        let path = own.map_or_else(|| self.place(), Path::to_path_buf);
        if own.is_none() && !path.is_file() {
            bail!(
                "{} is not there: {} is missing. No package carries it: get {} and run `lvdm weights add {} FILE`; \
                 LVDM_WEIGHTS names another folder to look in",
                self.content,
                path.display(),
                self.published,
                self.kind
            );
        }
        build(self.read(&path)?)
            .with_context(|| format!("{} holds the weights of another network than {}", path.display(), self.content))
    }

    fn read(&self, path: &Path) -> Result<BroughtFile> {
        let file = WeightsFile::open_state(path, self.state)?;
        let noted = source_of(file.metadata()?.as_ref());
        let sha256 = noted.map_or_else(|| sha256_of(path), Ok)?;
        let mut tensors = file.read()?;
        if tensors.keys().all(|name| name.starts_with(BACKBONE)) {
            tensors = tensors.into_iter().map(|(name, t)| (name[BACKBONE.len()..].to_string(), t)).collect();
        }
        Ok(BroughtFile { tensors, sha256 })
    }

    /// Checks a checkpoint by names and shapes and puts what the extractor needs of it into its place; returns the
    /// checkpoint's hash.
    ///
    /// # Errors
    /// A file that cannot be read or belongs to another network; a folder that cannot be written.
    pub fn add(&self, path: &Path) -> Result<String> {
        ensure!(path.is_file(), "there is no file {}", path.display());
        let other = || format!("{} is not {}; wanted is {}", path.display(), self.content, self.published);
        let file = self.read(path).with_context(other)?;
        let tensors: Vec<(String, Tensor)> =
            file.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let sha256 = file.sha256.clone();
        (self.check)(file).with_context(other)?;
        let place = self.place();
        let folder = folder();
        std::fs::create_dir_all(&folder).with_context(|| format!("the folder {} cannot be made", folder.display()))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        write_safetensors_atomically(&place, &tensors, &json!({"source": name, SOURCE: sha256}))?;
        Ok(sha256)
    }

    /// The hash of the checkpoint whose weights are in their place, if there are some.
    ///
    /// # Errors
    /// A file that is damaged or that `lvdm weights add` did not write.
    pub fn found(&self) -> Result<Option<String>> {
        let place = self.place();
        if !place.is_file() {
            return Ok(None);
        }
        let noted = source_of(read_metadata(&place)?.as_ref());
        let noted = noted.with_context(|| {
            format!("{} was not written by `lvdm weights add {}`: delete it and add it so", place.display(), self.kind)
        })?;
        Ok(Some(noted))
    }
}

fn source_of(metadata: Option<&Value>) -> Option<String> {
    Some(metadata?.get(SOURCE)?.as_str()?.to_string())
}

fn sha256_of(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).with_context(|| format!("the weight file {} cannot be read", path.display()))?;
    io::copy(&mut file, &mut hash)?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_says_where_it_comes_from() {
        let nothing = Brought {
            kind: "nothing_of_this_name",
            content: "Nothing, the network of no metric",
            published: "the file nothing.pth",
            state: None,
            check: |_| Ok(()),
        };
        let error = nothing.open(None, |_| Ok(())).unwrap_err().to_string();
        for word in
            ["nothing_of_this_name.safetensors is missing", "get the file nothing.pth", "weights add nothing_of"]
        {
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(nothing.found().unwrap(), None);
    }
}
