//! Low-rank changes of a Stable Diffusion (LoRA, Hu et al. 2021) → changes of our weights.
//!
//! A file holds two small maps for each map that it changes: W + scale · α / rank · up · down. Trainers spell the places in
//! many ways: kohya-ss joins the names of the modules by underscores (`lora_unet_…_to_q.lora_down.weight`, `.alpha`), PEFT
//! has `base_model.model.….to_q.lora_A.weight`, diffusers `unet.….to_q.lora.down.weight` and, before 2024,
//! `….attn1.processor.to_q_lora.down.weight`. Here a place is known by its modules joined by underscores.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{
    lvdm_checkpoint::{first_few, scalar},
    stable_diffusion::Network,
};

/// The tensors of one change.
#[derive(Debug, Default)]
struct Change {
    /// As the file has it, for messages.
    place: String,
    /// `[rank, inputs, …]`
    down: Option<Tensor>,
    /// `[outputs, rank, …]`
    up: Option<Tensor>,
    /// `[rank, rank, k, k]` of a convolution whose other two are of one place.
    mid: Option<Tensor>,
    alpha: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Down,
    Up,
    Mid,
    Alpha,
}

/// How names end, the longer first.
const ENDINGS: [(&str, Role); 13] = [
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_mid", Role::Mid),
    (".alpha", Role::Alpha),
];

/// Parts of names that tell of other kinds of change.
const OTHER_KINDS: [(&str, &str); 9] = [
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding", "a LoRA of word vectors"),
    (".diff", "a difference of whole weights"),
    ("bundle_emb", "a textual inversion"),
    ("emb_params", "a textual inversion"),
];

/// The network that a name says is changed, where it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    UNet,
    TextEncoder,
}

/// A file of low-rank changes.
pub struct Lora {
    changes: BTreeMap<(Option<Side>, String), Change>,
    /// α where a change says none, by what a note of PEFT says.
    alpha: Vec<(Option<Side>, Scaling)>,
}

/// What PEFT's configuration says of all changes of a network.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scaling {
    alpha: f64,
    /// α is divided by the root of the rank (rsLoRA).
    by_root: bool,
}

impl Lora {
    /// Sorts the tensors of a file. `notes` are what stands beside them: PEFT's `adapter_config.json`, or the keys of
    /// diffusers' `lora_adapter_metadata`.
    ///
    /// # Errors
    /// Names what belongs to no low-rank change, or to another kind of change.
    pub fn sort(tensors: BTreeMap<String, Tensor>, notes: &Value) -> Result<Self> {
        let mut changes: BTreeMap<(Option<Side>, String), Change> = BTreeMap::new();
        let mut unknown = Vec::new();
        for (name, tensor) in tensors {
            if let Some((_, kind)) = OTHER_KINDS.iter().find(|(part, _)| name.contains(part)) {
                bail!("`{name}` is of {kind}; only LoRA (an up and a down map for each weight) is imported");
            }
            let Some((place, role)) = parsed(&name) else {
                unknown.push(name);
                continue;
            };
            let change = changes.entry(sided(&place)?).or_default();
            change.place = place;
            let twice = match role {
                Role::Down => change.down.replace(tensor).is_some(),
                Role::Up => change.up.replace(tensor).is_some(),
                Role::Mid => change.mid.replace(tensor).is_some(),
                Role::Alpha => {
                    let alpha = scalar(&name, &tensor)?;
                    ensure!(alpha.is_finite(), "`{name}` = {alpha}: a number is needed");
                    change.alpha.replace(alpha).is_some()
                }
            };
            ensure!(!twice, "`{name}` and another name are the same change");
        }
        ensure!(unknown.is_empty(), "these are no names of a LoRA: {}", first_few(&unknown));
        ensure!(!changes.is_empty(), "there is no LoRA in it");
        Ok(Lora { changes, alpha: scalings(notes)? })
    }

    /// Adds the changes to weights, and returns how many maps of the denoiser and of the text encoder were changed. Both
    /// sets have our names. An error changes nothing.
    ///
    /// # Errors
    /// Names a change of a map that is not there, has another shape, or is not whole.
    pub fn merge(
        self,
        blocks_per_level: usize,
        unet: &mut BTreeMap<String, Tensor>,
        text_encoder: &mut BTreeMap<String, Tensor>,
        scale: f64,
    ) -> Result<[usize; 2]> {
        let mut places = BTreeMap::new();
        for (side, network, weights) in [
            (Side::UNet, Network::UNet { blocks_per_level }, &*unet),
            (Side::TextEncoder, Network::TextEncoder, &*text_encoder),
        ] {
            for (name, weight) in weights.iter().filter(|(_, weight)| weight.dim() >= 2) {
                for spelled in spellings(network, name) {
                    places.insert((side, spelled), (name.clone(), weight.size()));
                }
            }
        }
        // all are checked before the first weight is changed, so that old and new ones are never held together
        let (mut checked, mut unknown, mut used) = (Vec::new(), Vec::new(), BTreeSet::new());
        for ((side, place), change) in self.changes {
            let sides = side.map_or(vec![Side::UNet, Side::TextEncoder], |side| vec![side]);
            let found = sides.into_iter().find_map(|side| Some((side, places.get(&(side, place.clone()))?)));
            let Some((side, (name, shape))) = found else {
                unknown.push(change.place);
                continue;
            };
            ensure!(used.insert((side, name)), "two changes of `{name}`, one of them as `{}`", change.place);
            let scaling = self.alpha.iter().find(|(of, _)| of.is_none_or(|of| of == side)).map(|(_, scaling)| *scaling);
            checked.push((side, name.clone(), change.whole(shape, scaling)?));
        }
        ensure!(
            unknown.is_empty(),
            "these networks have no {}: is the LoRA of another Stable Diffusion than the run?",
            first_few(&unknown)
        );
        let mut counts = [0, 0];
        for (side, name, change) in checked {
            let (weights, count) = match side {
                Side::UNet => (&mut *unet, &mut counts[0]),
                Side::TextEncoder => (&mut *text_encoder, &mut counts[1]),
            };
            let weight = weights.get_mut(&name).with_context(|| format!("the network has no `{name}`"))?;
            *weight = change.added_to(weight, scale);
            *count += 1;
        }
        Ok(counts)
    }
}

impl Change {
    /// The change, if it is whole and fits a weight of this shape.
    fn whole(self, shape: &[i64], scaling: Option<Scaling>) -> Result<WholeChange> {
        let Change { place, down, up, mid, alpha } = self;
        let half = |half: Option<Tensor>, name: &str| half.with_context(|| format!("`{place}` has no {name} map"));
        let (down, up) = (half(down, "down")?, half(up, "up")?);
        ensure!(down.dim() >= 2 && up.dim() >= 2, "`{place}`: maps of shape {:?} and {:?}", down.size(), up.size());
        let (d, u) = (down.size(), up.size());
        let rank = d[0];
        ensure!(rank >= 1, "`{place}` has a rank of 0: there is nothing in it");
        let shapes = || format!("down {d:?}, up {u:?}, and the network's {shape:?}");
        // positions that the two maps and, where there is one, the map between them look at
        let positions = |size: &[i64]| size[2..].iter().product::<i64>();
        let mut inner = positions(&d);
        if let Some(mid) = &mid {
            let m = mid.size();
            ensure!(
                m.len() == 4 && m[..2] == [rank, rank] && inner == 1,
                "`{place}`: the map between, {m:?}, does not fit: {}",
                shapes()
            );
            inner = positions(&m);
        }
        ensure!(
            u[0] == shape[0]
                && u[1] == rank
                && positions(&u) == 1
                && d[1] == shape[1]
                && u[0] * d[1] * inner == shape.iter().product::<i64>(),
            "`{place}` does not fit: {}: is the LoRA of another Stable Diffusion than the run?",
            shapes()
        );
        let factor = match (alpha, scaling) {
            (Some(alpha), _) => alpha / rank as f64,
            (None, Some(Scaling { alpha, by_root: true })) => alpha / (rank as f64).sqrt(),
            (None, Some(Scaling { alpha, by_root: false })) => alpha / rank as f64,
            (None, None) => 1.0,
        };
        ensure!(factor.is_finite(), "`{place}`: its α is {factor} times its rank");
        Ok(WholeChange { down, up, mid, factor })
    }
}

/// A change that was found to fit its weight.
struct WholeChange {
    down: Tensor,
    up: Tensor,
    mid: Option<Tensor>,
    /// α / rank, or what stands for it.
    factor: f64,
}

impl WholeChange {
    /// W + scale · α / rank · up · down
    fn added_to(self, weight: &Tensor, scale: f64) -> Tensor {
        let single = |tensor: Tensor| tensor.to_kind(Kind::Float);
        let down = single(self.down).flatten(1, -1); // [rank, i·k·k]
        let inner = match self.mid.map(single) {
            None => down,
            Some(mid) => Tensor::einsum("rskl,si->rikl", &[mid, down], None::<i64>).flatten(1, -1),
        };
        let up = single(self.up).flatten(1, -1); // [o, rank]
        weight + (up.matmul(&inner) * (scale * self.factor)).reshape(weight.size())
    }
}

/// The layer and the role in a name.
fn parsed(name: &str) -> Option<(String, Role)> {
    // PEFT writes the adapter's name between: `lora_A.default.weight`
    let plain = ["lora_A", "lora_B"].iter().find_map(|half| {
        let (place, rest) = name.split_once(&format!(".{half}."))?;
        let adapter = rest.strip_suffix(".weight")?;
        (!adapter.contains('.')).then(|| format!("{place}.{half}.weight"))
    });
    let name = plain.as_deref().unwrap_or(name);
    ENDINGS.iter().find_map(|(ending, role)| Some((name.strip_suffix(ending)?.to_string(), *role)))
}

/// Whose place it is, and its modules joined by underscores.
fn sided(place: &str) -> Result<(Option<Side>, String)> {
    let place = place.strip_prefix("base_model.model.").unwrap_or(place);
    let joined = place.replace(".processor.", ".").replace('.', "_");
    for second in ["lora_te2_", "text_encoder_2_"] {
        ensure!(!joined.starts_with(second), "`{place}` is of a second text encoder: the LoRA is one of SDXL");
    }
    for (prefix, side) in [
        ("lora_unet_", Side::UNet),
        ("unet_", Side::UNet),
        ("lora_te1_", Side::TextEncoder),
        ("lora_te_", Side::TextEncoder),
        ("text_encoder_", Side::TextEncoder),
    ] {
        if let Some(rest) = joined.strip_prefix(prefix) {
            return Ok((Some(side), rest.to_string()));
        }
    }
    Ok((None, joined))
}

/// All ways in which the place of one of our weights is spelled.
fn spellings(network: Network, name: &str) -> Vec<String> {
    let Some(place) = name.strip_suffix(".weight") else { return Vec::new() };
    let mut places = vec![place.to_string()];
    places.extend(network.module_in_diffusers(place));
    if network == Network::TextEncoder {
        places.push(format!("text_model.{place}"));
    }
    let joined: Vec<String> = places.iter().map(|place| place.replace('.', "_")).collect();
    // diffusers' old attention processors leave the number out
    let short: Vec<String> =
        joined.iter().filter_map(|place| Some(format!("{}to_out", place.strip_suffix("to_out_0")?))).collect();
    joined.into_iter().chain(short).collect()
}

/// α and how it is used, out of `adapter_config.json` or diffusers' keys of the same with a network's name before them.
fn scalings(notes: &Value) -> Result<Vec<(Option<Side>, Scaling)>> {
    let mut found = Vec::new();
    let kind = notes["peft_type"].as_str().unwrap_or("LORA");
    ensure!(kind == "LORA", "its configuration says peft_type {kind}: only LoRA is imported");
    for (prefix, side) in [("unet.", Some(Side::UNet)), ("text_encoder.", Some(Side::TextEncoder)), ("", None)] {
        let note = |key: &str| &notes[format!("{prefix}{key}")];
        let is_on = |key: &str| !matches!(note(key), Value::Null | Value::Bool(false));
        ensure!(!is_on("use_dora"), "its configuration says use_dora: only LoRA is imported, not DoRA");
        for key in ["alpha_pattern", "rank_pattern"] {
            let empty = note(key).as_object().is_none_or(|pattern| pattern.is_empty());
            // a rank is seen in the tensors; an α of its own is not
            ensure!(empty || key == "rank_pattern", "its configuration has an alpha_pattern, which is not supported");
        }
        if !note("lora_alpha").is_null() {
            let alpha = note("lora_alpha").as_f64().with_context(|| {
                format!("its configuration says lora_alpha {}: a number is wanted", note("lora_alpha"))
            })?;
            found.push((side, Scaling { alpha, by_root: is_on("use_rslora") }));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn notes_that_are_not_of_a_lora_are_refused() {
        let of = |notes: Value| scalings(&notes);
        assert_eq!(of(json!({})).unwrap(), []);
        let found = of(json!({"peft_type": "LORA", "lora_alpha": 4, "use_rslora": true})).unwrap();
        assert_eq!(found, [(None, Scaling { alpha: 4.0, by_root: true })]);
        for (notes, word) in [
            (json!({"peft_type": "LOHA", "r": 2}), "LOHA"),
            (json!({"lora_alpha": "1"}), "lora_alpha"),
            (json!({"use_dora": "true"}), "use_dora"),
        ] {
            let error = of(notes).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
