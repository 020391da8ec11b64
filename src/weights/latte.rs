//! Released checkpoints of Latte: `{"model": …, "ema": …}`, each a state dict, or one state dict alone.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail};
use tch::{Device, Kind, Tensor};

use super::WeightsFile;

/// The name of the moving average in a released checkpoint.
const AVERAGE: &str = "ema";

/// The embeddings of places and frames: in every checkpoint, and a fixed function of the settings.
pub const FIXED_EMBEDDINGS: [&str; 2] = ["pos_embed", "temp_embed"];

/// The weights of a checkpoint, under the released names.
pub struct LatteWeights {
    /// Whether they are the moving average of the training.
    pub averaged: bool,
    /// With the fixed embeddings, as the file has them.
    pub tensors: BTreeMap<String, Tensor>,
}

impl LatteWeights {
    /// Reads the moving average where the checkpoint has one and it is `wanted`, else the weights themselves.
    ///
    /// # Errors
    /// As [`WeightsFile::open`] and [`WeightsFile::read`].
    pub fn read(path: &Path, average_wanted: bool) -> Result<Self> {
        let file = WeightsFile::open_state(path, average_wanted.then_some(AVERAGE))?;
        Ok(LatteWeights { averaged: file.state_name() == Some(AVERAGE), tensors: file.read()? })
    }

    /// Compares the stored fixed embeddings with what their formulas give: those of the network, (name, tensor).
    ///
    /// # Errors
    /// Names the embedding that is missing, of another shape, or holds other values: another network than Latte.
    pub fn check_embeddings(&self, network: &[(String, Tensor)]) -> Result<()> {
        for (name, wanted) in network.iter().filter(|(name, _)| FIXED_EMBEDDINGS.contains(&name.as_str())) {
            let found = self.tensors.get(name).with_context(|| format!("the fixed embedding `{name}` is missing"))?;
            if found.size() != wanted.size() {
                bail!(
                    "the fixed embedding `{name}` has shape {:?}, the network's is {:?}",
                    found.size(),
                    wanted.size()
                );
            }
            let exact = |tensor: &Tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double);
            let difference = (exact(found) - exact(wanted)).abs().max().double_value(&[]);
            // not finite is never near
            if difference.is_nan() || difference > 1e-5 {
                bail!("the fixed embedding `{name}` is not the sinusoidal one: it differs by up to {difference:.1e}");
            }
        }
        Ok(())
    }
}
