//! OpenCLIP's text encoder, as original files of Stable Diffusion 2.x hold it → the names of CLIP in transformers.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::Tensor;

/// Where it stands in an original file.
const PLACE: &str = "cond_stage_model.model.";
/// Where CLIP of transformers stands in one.
const CLIP: &str = "cond_stage_model.transformer.text_model.";
const BLOCKS: &str = "transformer.resblocks.";

/// The tensors of a file of OpenCLIP itself where an original file of Stable Diffusion has them, without the half that looks
/// at pictures; other tensors as they are.
pub fn in_place(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    if !tensors.keys().any(|name| name.starts_with(BLOCKS)) {
        return tensors;
    }
    let of_text = tensors.into_iter().filter(|(name, _)| !name.starts_with("visual."));
    of_text.map(|(name, tensor)| (format!("{PLACE}{name}"), tensor)).collect()
}

/// Whether a text encoder's tensors are OpenCLIP's.
pub fn is_open_clip(tensors: &BTreeMap<String, Tensor>) -> bool {
    tensors.keys().any(|name| name.starts_with(PLACE))
}

/// The tensors as CLIP's in an original file. The map of queries, keys and values, one matrix there, becomes three; the last
/// layer is left out, since Stable Diffusion 2.x sees the states before it.
///
/// # Errors
/// A name that is not known; no layer to leave out.
pub fn as_clip(tensors: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    let layer =
        |name: &str| -> Option<i64> { name.strip_prefix(PLACE)?.strip_prefix(BLOCKS)?.split('.').next()?.parse().ok() };
    let last = tensors.keys().filter_map(|name| layer(name)).max().context("OpenCLIP's text encoder has no layers")?;
    ensure!(last > 0, "OpenCLIP's text encoder has a single layer, and the states before the last are wanted");
    let mut clip = BTreeMap::new();
    for (name, tensor) in tensors {
        let rest = name.strip_prefix(PLACE).with_context(|| format!("`{name}` is no tensor of OpenCLIP"))?;
        // of no use to a text encoder whose states are what is seen, or buffers
        if layer(&name) == Some(last) || ["attn_mask", "text_projection", "logit_scale"].contains(&rest) {
            continue;
        }
        let renamed = match rest.strip_prefix(BLOCKS) {
            Some(inner) => {
                let (i, inner) = inner.split_once('.').with_context(|| format!("`{name}` is of no layer"))?;
                let place = format!("{CLIP}encoder.layers.{i}");
                if let Some(leaf) = inner.strip_prefix("attn.in_proj_") {
                    ensure!(
                        tensor.size()[0] % 3 == 0,
                        "`{name}` has shape {:?}, a multiple of 3 rows is wanted",
                        tensor.size()
                    );
                    for (map, part) in ["q", "k", "v"].into_iter().zip(tensor.chunk(3, 0)) {
                        clip.insert(format!("{place}.self_attn.{map}_proj.{leaf}"), part);
                    }
                    continue;
                }
                let (module, leaf) = inner.rsplit_once('.').with_context(|| format!("`{name}` is of no module"))?;
                let module = match module {
                    "ln_1" => "layer_norm1",
                    "ln_2" => "layer_norm2",
                    "attn.out_proj" => "self_attn.out_proj",
                    "mlp.c_fc" => "mlp.fc1",
                    "mlp.c_proj" => "mlp.fc2",
                    _ => anyhow::bail!("`{name}` is unknown"),
                };
                format!("{place}.{module}.{leaf}")
            }
            None => match rest {
                "token_embedding.weight" => format!("{CLIP}embeddings.token_embedding.weight"),
                "positional_embedding" => format!("{CLIP}embeddings.position_embedding.weight"),
                "ln_final.weight" | "ln_final.bias" => rest.replace("ln_final", &format!("{CLIP}final_layer_norm")),
                _ => anyhow::bail!("`{name}` is unknown"),
            },
        };
        clip.insert(renamed, tensor);
    }
    Ok(clip)
}
