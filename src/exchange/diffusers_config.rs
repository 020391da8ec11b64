//! What the configuration files of Stable Diffusion's parts (diffusers, transformers) say, in our words.
//!
//! Keys that a file leaves out have the libraries' defaults. What our networks do not do is refused by its key.

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::codecs::{CodecSettings, ImageAutoencoderConfig};
use crate::networks::{AttentionKind, Ports, UNetConfig};
use crate::text::{ClipTextConfig, TextActivation};

/// `unet/config.json` (UNet2DConditionModel): the video network made from it, and its input and output channels.
///
/// # Errors
/// Names the key that our network has no counterpart for.
pub fn unet(config: &Value) -> Result<(UNetConfig, [i64; 2])> {
    let mut keys = Keys::of(config)?;
    let widths: Vec<i64> = keys.take("block_out_channels", json!([320, 640, 1280, 1280]))?;
    let levels = widths.len();
    let channels = *widths.first().context("block_out_channels: at least one level is needed")?;
    ensure!(
        channels > 0 && widths.iter().all(|width| width % channels == 0),
        "block_out_channels = {widths:?}: each must be a multiple of the first"
    );
    let cross = ["DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"];
    let default = [json!([cross[1], cross[1], cross[1], cross[0]]), json!([cross[2], cross[3], cross[3], cross[3]])];
    let [down, up] = default;
    let down = attends(&keys.take::<Vec<String>>("down_block_types", down)?, cross[0], cross[1], levels)?;
    let mut up = attends(&keys.take::<Vec<String>>("up_block_types", up)?, cross[2], cross[3], levels)?;
    up.reverse();
    ensure!(down == up, "down_block_types and up_block_types must have attention at the same levels");

    let head_key = if keys.is_set("num_attention_heads") { "num_attention_heads" } else { "attention_head_dim" };
    let (heads, head_width) = keys.heads(head_key, &widths)?;
    let blocks_per_level = keys.uniform("layers_per_block", 2, levels)?;
    let depth = keys.uniform("transformer_layers_per_block", 1, levels)?;
    ensure!(depth == 1, "transformer_layers_per_block = {depth}: only 1 is supported");
    let adaptive_norm = match keys.take::<String>("resnet_time_scale_shift", json!("default"))?.as_str() {
        "default" => false,
        "scale_shift" => true,
        other => bail!("resnet_time_scale_shift = `{other}` is neither default nor scale_shift"),
    };
    let ports = [keys.take("in_channels", json!(4))?, keys.take("out_channels", json!(4))?];
    let config = UNetConfig {
        channels,
        multipliers: widths.iter().map(|width| width / channels).collect(),
        blocks_per_level,
        attention_factors: (0..levels).filter(|&level| down[level]).map(|level| 1 << level).collect(),
        heads,
        head_width,
        attention: AttentionKind::Text,
        adaptive_norm,
        norm_groups: keys.take("norm_num_groups", json!(32))?,
        norm_per_frame: true,
        context_width: keys.take("cross_attention_dim", json!(1280))?,
        ..UNetConfig::default()
    };
    keys.only("act_fn", &[json!("silu"), json!("swish")])?;
    keys.only("mid_block_type", &[json!("UNetMidBlock2DCrossAttn")])?;
    keys.only("norm_eps", &[json!(1e-5)])?;
    keys.only("flip_sin_to_cos", &[json!(true)])?;
    keys.only("time_embedding_type", &[json!("positional")])?;
    keys.only("time_embedding_dim", &[json!(null), json!(4 * channels)])?;
    keys.only("attention_type", &[json!("default")])?;
    keys.only("freq_shift", &[json!(0)])?;
    keys.only("only_cross_attention", &[json!(false), json!(vec![false; levels])])?;
    for key in ["downsample_padding", "mid_block_scale_factor", "resnet_out_scale_factor"] {
        keys.only(key, &[json!(1)])?;
    }
    for key in ["conv_in_kernel", "conv_out_kernel"] {
        keys.only(key, &[json!(3)])?;
    }
    // nothing of the result depends on these; a linear projection is a kernel of one position
    keys.ignore(&["sample_size", "dropout", "upcast_attention", "use_linear_projection"]);
    keys.ignore(&["addition_embed_type_num_heads", "attention_head_dim"]);
    keys.finish()?;
    config.validate()?;
    Ok((config, ports))
}

/// `vae/config.json` (AutoencoderKL).
///
/// # Errors
/// As [`unet`].
pub fn autoencoder(config: &Value) -> Result<ImageAutoencoderConfig> {
    let mut keys = Keys::of(config)?;
    let widths: Vec<i64> = keys.take("block_out_channels", json!([64]))?;
    for (key, block) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
        let types: Vec<String> = keys.take(key, json!([block]))?;
        ensure!(types.len() == widths.len(), "{key} has {} levels, block_out_channels {}", types.len(), widths.len());
        if let Some(other) = types.iter().find(|name| *name != block) {
            bail!("{key}: `{other}` is not supported, only {block}");
        }
    }
    let config = ImageAutoencoderConfig {
        blocks_per_level: keys.uniform("layers_per_block", 1, widths.len())?,
        widths,
        latent_channels: keys.take("latent_channels", json!(4))?,
        norm_groups: keys.take("norm_num_groups", json!(32))?,
        attention: keys.take("mid_block_add_attention", json!(true))?,
    };
    keys.only("act_fn", &[json!("silu"), json!("swish")])?;
    for key in ["in_channels", "out_channels"] {
        keys.only(key, &[json!(3)])?;
    }
    for key in ["use_quant_conv", "use_post_quant_conv"] {
        keys.only(key, &[json!(true)])?;
    }
    // how latents are normalised and computed, not what they are
    keys.ignore(&["sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"]);
    keys.finish()?;
    config.validate()?;
    Ok(config)
}

/// `text_encoder/config.json` (CLIPTextConfig). Its many keys that say nothing of the network are passed over.
///
/// # Errors
/// As [`unet`].
pub fn text_encoder(config: &Value) -> Result<ClipTextConfig> {
    let mut keys = Keys::of(config)?;
    let config = ClipTextConfig {
        vocabulary: keys.take("vocab_size", json!(49_408))?,
        positions: keys.take("max_position_embeddings", json!(77))?,
        width: keys.take("hidden_size", json!(512))?,
        hidden: keys.take("intermediate_size", json!(2048))?,
        layers: keys.take("num_hidden_layers", json!(12))?,
        heads: keys.take("num_attention_heads", json!(8))?,
        activation: match keys.take::<String>("hidden_act", json!("quick_gelu"))?.as_str() {
            "quick_gelu" => TextActivation::QuickGelu,
            "gelu" => TextActivation::Gelu,
            other => bail!("hidden_act = `{other}` is not supported, only quick_gelu and gelu"),
        },
    };
    keys.only("layer_norm_eps", &[json!(1e-5)])?;
    config.validate()?;
    Ok(config)
}

/// The inverse of [`unet`], for latents of so many pixels a side; layers over frames have no words there.
pub fn unet_in_diffusers(config: &UNetConfig, ports: &Ports, side: i64) -> Value {
    let levels = 0..config.multipliers.len();
    let block = |level: usize, way: &str| match config.attention_factors.contains(&(1 << level)) {
        true => format!("CrossAttn{way}Block2D"),
        false => format!("{way}Block2D"),
    };
    json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": side,
        "in_channels": ports.inputs(),
        "out_channels": ports.outputs,
        "block_out_channels": config.multipliers.iter().map(|m| m * config.channels).collect::<Vec<_>>(),
        "layers_per_block": config.blocks_per_level,
        "down_block_types": levels.clone().map(|level| block(level, "Down")).collect::<Vec<_>>(),
        "up_block_types": levels.rev().map(|level| block(level, "Up")).collect::<Vec<_>>(),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        // diffusers' name for the number of heads
        "attention_head_dim": match config.head_width {
            None => json!(config.heads),
            Some(_) => json!(config.multipliers.iter().map(|m| config.heads_of(m * config.channels)).collect::<Vec<_>>()),
        },
        "cross_attention_dim": config.context_width,
        "resnet_time_scale_shift": if config.adaptive_norm { "scale_shift" } else { "default" },
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "use_linear_projection": false,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "center_input_sample": false,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    })
}

/// The inverse of [`autoencoder`], with the factor of its latents, for pictures of so many pixels a side.
pub fn autoencoder_in_diffusers(config: &ImageAutoencoderConfig, scale: f64, side: i64) -> Value {
    let levels = config.widths.len();
    json!({
        "_class_name": "AutoencoderKL",
        "sample_size": side,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks_per_level,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.attention,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "act_fn": "silu",
        "scaling_factor": scale,
    })
}

/// The inverse of [`text_encoder`].
pub fn text_encoder_in_diffusers(config: &ClipTextConfig) -> Value {
    json!({
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "hidden_size": config.width,
        "projection_dim": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": match config.activation {
            TextActivation::QuickGelu => "quick_gelu",
            TextActivation::Gelu => "gelu",
        },
        "layer_norm_eps": 1e-5,
        "torch_dtype": "float32",
    })
}

/// Which levels have attention, out of their blocks' types.
fn attends(types: &[String], without: &str, with: &str, levels: usize) -> Result<Vec<bool>> {
    ensure!(
        types.len() == levels,
        "{} block types {types:?} for the {levels} levels of block_out_channels",
        types.len()
    );
    let attends = |name: &String| match name.as_str() {
        name if name == without => Ok(false),
        name if name == with => Ok(true),
        other => bail!("the block type `{other}` is not supported, only {without} and {with}"),
    };
    types.iter().map(attends).collect()
}

/// The keys of a configuration file that were not asked for yet.
struct Keys(Map<String, Value>);

impl Keys {
    fn of(config: &Value) -> Result<Self> {
        Ok(Keys(config.as_object().context("a configuration is a dictionary")?.clone()))
    }

    /// Whether the key is there and not null.
    fn is_set(&self, key: &str) -> bool {
        self.0.get(key).is_some_and(|value| !value.is_null())
    }

    fn take<T: DeserializeOwned>(&mut self, key: &str, default: Value) -> Result<T> {
        let value = self.0.remove(key).unwrap_or(default);
        let text = value.to_string();
        serde_json::from_value(value).with_context(|| format!("{key} = {text} is not supported"))
    }

    /// Heads of every attention, and the width of each where wider levels have more of them.
    fn heads(&mut self, key: &str, widths: &[i64]) -> Result<(i64, Option<i64>)> {
        let list = self.0.get(key).and_then(Value::as_array).map(|list| list.iter().map(Value::as_i64).collect());
        let several: Option<Option<Vec<i64>>> = list;
        let Some(heads) = several.flatten().filter(|heads| heads.windows(2).any(|two| two[0] != two[1])) else {
            return Ok((self.uniform(key, 8, widths.len())?, None));
        };
        let fits = |head: i64| heads.iter().zip(widths).all(|(heads, width)| *heads > 0 && heads * head == *width);
        let head = heads.first().filter(|first| **first > 0).map(|first| widths[0] / first);
        match head.filter(|head| heads.len() == widths.len() && fits(*head)) {
            Some(head) => {
                self.0.remove(key);
                Ok((heads[heads.len() - 1], Some(head)))
            }
            None => bail!(
                "{key} = {heads:?}: the heads of all levels must be as wide, or as many; levels are {widths:?} wide"
            ),
        }
    }

    /// One number, or one for each level, all the same.
    fn uniform(&mut self, key: &str, default: i64, levels: usize) -> Result<i64> {
        match self.take::<Value>(key, json!(default))? {
            Value::Array(values) => {
                let one = values.first().and_then(Value::as_i64);
                let one = one.filter(|_| values.len() == levels && values.iter().all(|value| *value == values[0]));
                one.with_context(|| {
                    format!("{key} = {}: the {levels} levels must have the same number", Value::Array(values))
                })
            }
            value => value.as_i64().with_context(|| format!("{key} = {value} is not a whole number")),
        }
    }

    /// Only these values are supported.
    fn only(&mut self, key: &str, values: &[Value]) -> Result<()> {
        let Some(found) = self.0.remove(key) else { return Ok(()) };
        let equal = |value: &Value| *value == found || (found.is_number() && value.as_f64() == found.as_f64());
        if values.iter().any(equal) {
            return Ok(());
        }
        let values: Vec<String> = values.iter().map(Value::to_string).collect();
        bail!("{key} = {found} is not supported, only {}", values.join(" or "))
    }

    fn ignore(&mut self, keys: &[&str]) {
        keys.iter().for_each(|key| drop(self.0.remove(*key)));
    }

    /// What nobody asked for is an option of the library that must be off, or a note (`_class_name`).
    fn finish(self) -> Result<()> {
        let off = |value: &Value| value.is_null() || *value == json!(false);
        match self.0.iter().find(|(key, value)| !key.starts_with('_') && !off(value)) {
            Some((key, value)) => bail!("{key} = {value} is not supported"),
            None => Ok(()),
        }
    }
}
