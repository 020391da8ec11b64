//! Which files of a folder of diffusers hold a network's weights: whole or in shards, safetensors or PyTorch's, in
//! variants.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use super::mistake;
use crate::{
    file_format::read_json,
    weights::{WeightsFile, lvdm_checkpoint::Tensors},
};

/// How files of weights are called, before the variant and the ending.
const STEMS: [&str; 3] = ["diffusion_pytorch_model", "model", "pytorch_model"];

/// A file of weights, or the index of its shards.
#[derive(Debug, PartialEq)]
struct Candidate {
    file: String,
    /// `fp16` or `non_ema`; empty for the plain file.
    variant: String,
    /// safetensors before PyTorch's, one file before shards.
    rank: (bool, bool),
}

impl Candidate {
    /// `diffusion_pytorch_model.non_ema.safetensors`, `pytorch_model.bin.index.json`; none for anything else, and for
    /// a shard, which its index names.
    fn of(file: &str) -> Option<Self> {
        let lower = file.to_ascii_lowercase();
        let mut words: Vec<&str> = lower.split('.').collect();
        let stem = words.remove(0);
        let sharded = words.last() == Some(&"json") && words.contains(&"index");
        if sharded {
            words.retain(|word| !matches!(*word, "json" | "index"));
        }
        let ending = words.iter().position(|word| matches!(*word, "safetensors" | "bin"))?;
        let pickled = words.remove(ending) == "bin";
        let variant = words.join(".");
        let last = sharded || ending == words.len();
        let shard = stem.contains("-of-") || variant.contains("-of-");
        (STEMS.contains(&stem) && last && !shard).then(|| Candidate {
            file: file.to_string(),
            variant,
            rank: (pickled, sharded),
        })
    }
}

/// The files of weights in a part of the folder, the best first.
fn candidates(folder: &Path) -> Result<Vec<Candidate>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let names: BTreeSet<String> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    let mut found: Vec<Candidate> = names.iter().filter_map(|name| Candidate::of(name)).collect();
    found.sort_by_key(|candidate| candidate.rank);
    Ok(found)
}

/// # Errors
/// [`crate::experiment::UserError`]: a variant that none of these parts of the folder has.
pub(super) fn check_variant(folder: &Path, parts: &[&str], variant: &str) -> Result<()> {
    let mut others = BTreeSet::new();
    for part in parts.iter().map(|part| folder.join(part)).filter(|part| part.is_dir()) {
        others.extend(candidates(&part)?.into_iter().map(|candidate| candidate.variant));
    }
    if others.contains(variant) {
        return Ok(());
    }
    others.remove("");
    let there = if others.is_empty() { "none".to_string() } else { others.into_iter().collect::<Vec<_>>().join(", ") };
    mistake(format!("--variant {variant}: no weights in {} are called so; variants there: {there}", folder.display()))
}

/// The weights of a part: of the variant that is asked for where the part has it, else the plain ones, else those in
/// half precision.
///
/// # Errors
/// No weights, and what lies there instead; an index whose shards are not there or do not hold what it says; files that
/// cannot be read.
pub(super) fn read(folder: &Path, variant: Option<&str>) -> Result<Tensors> {
    let found = candidates(folder)?;
    let wanted = variant.into_iter().chain(["", "fp16"]);
    let Some(chosen) = wanted.filter_map(|name| found.iter().find(|found| found.variant == name)).next() else {
        return nothing(folder, &found);
    };
    let path = folder.join(&chosen.file);
    if chosen.rank.1 { read_shards(folder, &path) } else { read_file(&path) }
}

fn read_file(path: &Path) -> Result<Tensors> {
    ensure!(
        path.exists() || !path.is_symlink(),
        "{} is a link to a file that is not there: an unfinished download",
        path.display()
    );
    WeightsFile::open(path)?.read()
}

/// All shards that an index names.
fn read_shards(folder: &Path, index: &Path) -> Result<Tensors> {
    let context = || index.display().to_string();
    let json = read_json(index)?;
    let map = json["weight_map"].as_object().context("there is no weight_map in it").with_context(context)?;
    let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file));
        let file = file.with_context(|| format!("`{name}` lies in no file of this folder")).with_context(context)?;
        places.entry(file).or_default().push(name);
    }
    let mut tensors = Tensors::new();
    for (file, names) in places {
        let shard = folder.join(file);
        ensure!(shard.exists(), "{}: the shard {file} is missing", context());
        let mut found = read_file(&shard)?;
        for name in names {
            let tensor = found.remove(name).with_context(|| format!("{} holds no `{name}`", shard.display()))?;
            tensors.insert(name.to_string(), tensor);
        }
        if let Some(name) = found.keys().next() {
            bail!("{}: `{name}` of the shard {file} is not in it", context());
        }
    }
    Ok(tensors)
}

/// Says what lies there instead of weights.
fn nothing(folder: &Path, found: &[Candidate]) -> Result<Tensors> {
    if let Some(Candidate { file, variant, .. }) = found.first() {
        return mistake(format!(
            "{} holds no plain weights but {file}: --variant {variant} takes them",
            folder.display()
        ));
    }
    let ends: [(&str, &str); 5] =
        [("msgpack", "Flax"), ("onnx", "ONNX"), ("xml", "OpenVINO"), ("h5", "TensorFlow"), ("part", "a download")];
    let entries = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let other = |path: PathBuf| {
        let name = path.file_name()?.to_string_lossy().into_owned();
        let ending = name.rsplit('.').next()?.to_ascii_lowercase();
        let (_, maker) = ends.iter().find(|(end, _)| *end == ending)?;
        Some(format!("; {name} is of {maker} and is not read"))
    };
    let other = entries.filter_map(other).next().unwrap_or_default();
    bail!(
        "{} holds no weights; sought were {}, or the same as .bin{other}",
        folder.display(),
        STEMS[..2].iter().map(|stem| format!("{stem}.safetensors")).collect::<Vec<_>>().join(" and ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_weights_tell_variant_and_shards() {
        for (file, variant, rank) in [
            ("diffusion_pytorch_model.safetensors", "", (false, false)),
            ("pytorch_model.bin", "", (true, false)),
            ("diffusion_pytorch_model.non_ema.safetensors", "non_ema", (false, false)),
            ("model.fp16.safetensors", "fp16", (false, false)),
            ("diffusion_pytorch_model.safetensors.index.json", "", (false, true)),
            ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16", (false, true)),
            ("diffusion_pytorch_model.fp16.safetensors.index.json", "fp16", (false, true)),
            ("pytorch_model.bin.index.json", "", (true, true)),
            ("model.SAFETENSORS", "", (false, false)),
        ] {
            let expected = Candidate { file: file.to_string(), variant: variant.to_string(), rank };
            assert_eq!(Candidate::of(file), Some(expected));
        }
        for file in [
            "config.json",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_flax_model.msgpack",
            "model.safetensors.aria2",
            "other.bin",
        ] {
            assert_eq!(Candidate::of(file), None, "{file}");
        }
    }
}
