//! One case: a safetensors file of inputs and of what a reference made of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use safetensors::SafeTensors;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use crate::{
    nn::Parameters,
    safetensors::read_safetensors,
    weights::{lvdm_checkpoint::averaged_name, read_state_dict, stable_diffusion::Network, synthesize},
};

/// The contents of a case.
pub struct Case {
    pub component: String,
    config: String,
    /// Where the parameters come from; without one they are synthetic.
    checkpoint: Option<PathBuf>,
    tensors: BTreeMap<String, Tensor>,
    device: Device,
    /// Mixed precision in bfloat16.
    pub half: bool,
}

impl Case {
    /// `weights` replaces the checkpoint that a case names, which else lies beside it.
    ///
    /// # Errors
    /// Where the file is not a case.
    pub fn read(path: &Path, weights: Option<&Path>, device: Device, half: bool) -> Result<Self> {
        let (tensors, _) = read_safetensors(path)?;
        let bytes = fs::read(path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let entries = header.metadata().clone().unwrap_or_default();
        let text = |key: &str| {
            entries.get(key).cloned().with_context(|| format!("not a parity case: its metadata has no `{key}`"))
        };
        Ok(Case {
            component: text("component")?,
            config: text("config")?,
            checkpoint: entries
                .get("weights")
                .map(|named| weights.map_or(path.with_file_name(named), Path::to_path_buf)),
            tensors,
            device,
            half,
        })
    }

    /// The configuration, in the reference's words.
    pub fn config<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.config).context("the case's configuration")
    }

    /// The input `in.name` on the device.
    pub fn input(&self, name: &str) -> Result<Tensor> {
        match self.optional(name) {
            Some(tensor) => Ok(tensor),
            None => bail!("the case has no input `in.{name}`"),
        }
    }

    /// The input `in.name`, if there is one.
    pub fn optional(&self, name: &str) -> Option<Tensor> {
        Some(self.tensors.get(&format!("in.{name}"))?.to_device(self.device))
    }

    /// Puts the case's parameters into a network: those of its checkpoint under `prefix`, else synthetic ones.
    /// With `averaged` those of the checkpoint's moving average, whose names are built from the network's.
    ///
    /// # Errors
    /// A checkpoint that cannot be read or belongs to another architecture.
    pub fn fill(&self, parameters: &Parameters, prefix: &str, averaged: bool) -> Result<()> {
        let Some(checkpoint) = &self.checkpoint else {
            return parameters.load(&synthesize(&parameters.named(), ""));
        };
        let tensors = read_state_dict(checkpoint)?;
        let own: BTreeMap<String, Tensor> = if averaged {
            let inner = prefix.trim_start_matches("model.");
            let stored = |name: &str| averaged_name(inner, name);
            let find = |(name, _): (String, Tensor)| Some((name.clone(), tensors.get(&stored(&name))?.shallow_clone()));
            parameters.named().into_iter().filter_map(find).collect()
        } else {
            let strip = |(name, tensor): (&String, &Tensor)| {
                Some((name.strip_prefix(prefix)?.to_string(), tensor.shallow_clone()))
            };
            tensors.iter().filter_map(strip).collect()
        };
        parameters.load(&own).with_context(|| checkpoint.display().to_string())
    }

    /// Puts the case's parameters into a network of Stable Diffusion, by way of the import: those of its
    /// checkpoint, else synthetic ones of diffusers' names and shapes.
    ///
    /// # Errors
    /// As [`Self::fill`].
    pub fn import(&self, parameters: &Parameters, network: Network) -> Result<()> {
        let tensors = match &self.checkpoint {
            Some(path) => read_state_dict(path)?,
            None => {
                let named: Vec<_> = network.in_diffusers(parameters).into_iter().collect();
                synthesize(&named, "")
            }
        };
        network.import(&tensors, parameters)?;
        Ok(())
    }

    /// What the reference made: names without `out.`.
    pub fn expected(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("out.")?, tensor)))
    }

    /// The file that the case's parameters come from; none where they are synthetic.
    pub fn checkpoint(&self) -> Option<&Path> {
        self.checkpoint.as_deref()
    }

    pub fn device(&self) -> Device {
        self.device
    }
}

/// Distance of a result from the reference.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    /// The largest difference of any value.
    pub absolute: f64,
    /// ‖result − reference‖ / ‖reference‖; where the reference is zero, ‖result‖. Of integers that are not all equal it is
    /// infinite.
    pub relative: f64,
}

/// # Errors
/// Where the shapes differ.
pub fn distance(result: &Tensor, reference: &Tensor) -> Result<Distance> {
    let is_exact = result.kind() == Kind::Int64;
    let result = result.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    let reference = reference.to_kind(Kind::Double);
    if result.size() != reference.size() {
        bail!("shape {:?}, the reference has {:?}", result.size(), reference.size());
    }
    if reference.numel() == 0 {
        return Ok(Distance { absolute: 0.0, relative: 0.0 });
    }
    let difference: Tensor = &result - &reference;
    let norm = |x: &Tensor| x.square().sum(None).sqrt().double_value(&[]);
    let scale = norm(&reference);
    let relative = if scale == 0.0 { norm(&result) } else { norm(&difference) / scale };
    let absolute = difference.abs().max().double_value(&[]);
    Ok(Distance { absolute, relative: if is_exact && absolute > 0.0 { f64::INFINITY } else { relative } })
}
