//! From the names and shapes of a network's tensors back to its configuration.
//!
//! What shapes do not tell is left to the caller. Whether all tensors fit what was found is not judged here:
//! declare the network and compare.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result, bail, ensure};
use tch::Tensor;

use crate::autoencoder_loss::DiscriminatorConfig;
use crate::codecs::{AutoencoderConfig, ImageAutoencoderConfig};
use crate::networks::{AttentionKind, Ports, Recompute, UNetConfig};
use crate::text::{ClipTextConfig, TextActivation};

/// Deeper networks are not believed.
const MOST_LEVELS: usize = 16;

/// The shape of each tensor by its name, aliases included.
pub struct Shapes(BTreeMap<String, Vec<i64>>);

impl From<&BTreeMap<String, Tensor>> for Shapes {
    fn from(tensors: &BTreeMap<String, Tensor>) -> Self {
        Shapes(tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect())
    }
}

impl FromIterator<(String, Vec<i64>)> for Shapes {
    fn from_iter<I: IntoIterator<Item = (String, Vec<i64>)>>(shapes: I) -> Self {
        Shapes(shapes.into_iter().collect())
    }
}

impl Shapes {
    /// Length of an axis.
    pub(super) fn axis(&self, name: &str, axis: usize) -> Result<i64> {
        let shape = self.0.get(name).with_context(|| format!("`{name}` is missing"))?;
        let length = shape.get(axis).with_context(|| format!("`{name}` has shape {shape:?}"))?;
        ensure!((1..1 << 31).contains(length), "`{name}` has shape {shape:?}");
        Ok(*length)
    }

    /// Of a video autoencoder's convolution, which checkpoints list under two names.
    fn conv(&self, name: &str, axis: usize) -> Result<i64> {
        let alias = format!("{name}.weight");
        if self.has(&alias) { self.axis(&alias, axis) } else { self.axis(&format!("{name}.conv.weight"), axis) }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether any name begins so.
    fn has_below(&self, prefix: &str) -> bool {
        self.0.range(prefix.to_string()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
    }
}

/// What the names and shapes of a U-Net's tensors show.
#[derive(Debug, Clone, PartialEq)]
pub struct InferredUNet {
    /// Complete but for `heads` where these are unknown; `norm_per_frame` and `recompute` leave no trace.
    pub config: UNetConfig,
    /// Known only from tables of relative positions.
    pub heads: Option<i64>,
    /// Channels that enter, a mask among them.
    pub inputs: i64,
    /// Channels that leave.
    pub outputs: i64,
    /// Latent frames of a clip: known only from tables of relative positions.
    pub temporal_length: Option<i64>,
    /// Rows of the class embedding, where there is one.
    pub classes: Option<i64>,
}

impl InferredUNet {
    /// # Errors
    /// Names the tensor that is missing or out of line.
    pub fn from_shapes(shapes: &Shapes) -> Result<Self> {
        let channels = shapes.axis("input_blocks.0.0.weight", 0)?;
        let (mut multipliers, mut counts, mut attention_factors) = (vec![], vec![0], vec![]);
        let mut attending: Vec<(usize, i64)> = Vec::new();
        for i in 1.. {
            let block = format!("input_blocks.{i}");
            let level = counts.len() - 1;
            if shapes.has(&format!("{block}.0.op.weight")) {
                ensure!(counts.len() < MOST_LEVELS, "more than {MOST_LEVELS} levels");
                counts.push(0);
            } else if shapes.has(&format!("{block}.0.in_layers.2.weight")) {
                let width = shapes.axis(&format!("{block}.0.in_layers.2.weight"), 0)?;
                ensure!(width % channels == 0, "{block} is {width} wide, not a multiple of {channels}");
                match multipliers.get(level) {
                    None => multipliers.push(width / channels),
                    Some(known) => ensure!(
                        known * channels == width,
                        "{block} is {width} wide, its level begins with {}",
                        known * channels
                    ),
                }
                counts[level] += 1;
                let factor = 1 << level;
                if shapes.has_below(&format!("{block}.1.")) {
                    attending.push((i, width));
                    if !attention_factors.contains(&factor) {
                        attention_factors.push(factor);
                    }
                }
            } else {
                break;
            }
        }
        let blocks_per_level = counts[0];
        ensure!(
            counts.iter().all(|&count| count == blocks_per_level) && blocks_per_level > 0,
            "the levels have {counts:?} residual blocks; as many in each are wanted"
        );
        let width = multipliers.last().expect("a level at least") * channels;

        let middle = "middle_block.1.";
        let text = format!("{middle}transformer_blocks.0.");
        let (attention, tables) = if shapes.has_below(&text) {
            (AttentionKind::Text, format!("{text}attn1_tmp."))
        } else if shapes.has(&format!("{middle}norm_t.weight")) {
            (AttentionKind::Factorized, middle.to_string())
        } else if shapes.has(&format!("{middle}norm_s.weight")) {
            (AttentionKind::Joint, middle.to_string())
        } else {
            bail!("there is no attention that is known in `middle_block.1`");
        };
        let table = format!("{tables}relative_position_k.embeddings_table");
        let relative_position = shapes.has(&table);
        let (mut heads, mut head_width, mut temporal_length) = (None, None, None);
        if relative_position {
            let (rows, columns) = (shapes.axis(&table, 0)?, shapes.axis(&table, 1)?);
            ensure!(rows % 2 == 1 && rows > 1, "`{table}` has {rows} rows, 2·L + 1 are wanted");
            ensure!(width % columns == 0, "`{table}` is {columns} wide, which does not divide {width} channels");
            (heads, temporal_length) = (Some(width / columns), Some((rows - 1) / 2));
            // heads as wide in a level of another width
            let other = attending.iter().find(|(_, other)| *other != width);
            let table_of = |block: usize| table.replacen("middle_block.1.", &format!("input_blocks.{block}.1."), 1);
            if let Some((block, _)) = other
                && shapes.axis(&table_of(*block), 1)? == columns
            {
                head_width = Some(columns);
            }
        }
        let context_width = match attention {
            AttentionKind::Text => shapes.axis(&format!("{text}attn2.to_k.weight"), 1)?,
            _ => UNetConfig::default().context_width,
        };
        let first = "input_blocks.1.0";
        let (time, outputs) = (
            shapes.axis(&format!("{first}.emb_layers.1.weight"), 0)?,
            shapes.axis(&format!("{first}.in_layers.2.weight"), 0)?,
        );
        Ok(InferredUNet {
            config: UNetConfig {
                channels,
                multipliers,
                blocks_per_level,
                attention_factors,
                heads: heads.unwrap_or(1),
                head_width,
                attention,
                relative_position,
                adaptive_norm: time == 2 * outputs,
                norm_groups: UNetConfig::default().norm_groups,
                norm_per_frame: false,
                context_width,
                temporal: attention != AttentionKind::Text || shapes.has_below(&tables),
                recompute: Recompute::Everywhere(false),
            },
            heads,
            inputs: shapes.axis("input_blocks.0.0.weight", 1)?,
            outputs: shapes.axis("out.2.weight", 0)?,
            temporal_length,
            classes: shapes.has("label_emb.weight").then(|| shapes.axis("label_emb.weight", 0)).transpose()?,
        })
    }

    /// The network's ports, for clips of so many latent frames where the tensors do not tell.
    pub fn ports(&self, latent_frames: i64) -> Ports {
        let frames = self.temporal_length.unwrap_or(latent_frames);
        Ports {
            outputs: self.outputs,
            text: self.config.text_width(),
            levels: self.classes,
            // the mask is counted among the channels, and sizes leave no trace
            ..Ports::of([self.inputs, frames, 1, 1])
        }
    }
}

/// What a video autoencoder's tensors tell: neither strides nor groups leave a trace in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InferredAutoencoder {
    /// Filters of the first convolution.
    pub channels: i64,
    /// Downsampling blocks: the largest factor is 2 to this power.
    pub blocks: u32,
    /// Half of the channels that leave the encoder.
    pub z_channels: i64,
    /// C of a latent.
    pub latent_channels: i64,
}

impl fmt::Display for InferredAutoencoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InferredAutoencoder { channels, blocks, z_channels, latent_channels } = self;
        write!(f, "{channels} channels, {blocks} blocks, {z_channels} and {latent_channels} latent channels")
    }
}

impl InferredAutoencoder {
    /// # Errors
    /// Names the tensor that is missing or out of line.
    pub fn from_shapes(shapes: &Shapes) -> Result<Self> {
        let blocks = (0..).take_while(|i| shapes.has_below(&format!("encoder.conv_blocks.{i}."))).count();
        ensure!((1..=MOST_LEVELS).contains(&blocks), "the encoder has {blocks} blocks");
        Ok(InferredAutoencoder {
            channels: shapes.conv("encoder.conv_first", 0)?,
            blocks: blocks as u32,
            z_channels: shapes.conv("encoder.final_block.2", 0)? / 2,
            latent_channels: shapes.conv("post_quant_conv", 1)?,
        })
    }

    /// The released configuration, if all that leaves a trace agrees with it.
    pub fn released(&self) -> Option<AutoencoderConfig> {
        let released = AutoencoderConfig::default();
        let inferred = self.config(released.factors[0], released.norm_groups);
        (inferred == released).then_some(released)
    }

    /// With what the tensors do not tell. The largest factor is taken for the spatial one.
    pub fn config(&self, temporal_factor: i64, norm_groups: i64) -> AutoencoderConfig {
        let spatial = 1 << self.blocks;
        AutoencoderConfig {
            channels: self.channels,
            factors: [temporal_factor, spatial, spatial],
            z_channels: self.z_channels,
            latent_channels: self.latent_channels,
            norm_groups,
            ..AutoencoderConfig::default()
        }
    }
}

impl DiscriminatorConfig {
    /// # Errors
    /// Names the tensor that is missing.
    pub fn from_shapes(shapes: &Shapes) -> Result<Self> {
        // a strided layer and its norm take three places each
        let layers =
            (1..=MOST_LEVELS as i64).take_while(|l| shapes.has(&format!("main.{}.running_mean", 3 * l))).count();
        Ok(DiscriminatorConfig { channels: shapes.axis("main.0.weight", 0)?, layers: layers as i64 })
    }
}

impl ImageAutoencoderConfig {
    /// All but the norm groups, which leave no trace: they are those of Stable Diffusion.
    ///
    /// # Errors
    /// Names the tensor that is missing or out of line.
    pub fn from_shapes(shapes: &Shapes) -> Result<Self> {
        let width = |level| format!("encoder.down.{level}.block.0.conv1.weight");
        let widths: Vec<i64> = (0..MOST_LEVELS)
            .take_while(|level| shapes.has(&width(*level)))
            .map(|level| shapes.axis(&width(level), 0))
            .collect::<Result<_>>()?;
        let block = |i| format!("encoder.down.0.block.{i}.conv1.weight");
        Ok(ImageAutoencoderConfig {
            widths,
            blocks_per_level: (0..).take_while(|i| shapes.has(&block(*i))).count() as i64,
            latent_channels: shapes.axis("post_quant_conv.weight", 1)?,
            attention: shapes.has("encoder.mid.attn_1.norm.weight"),
            ..ImageAutoencoderConfig::default()
        })
    }
}

impl ClipTextConfig {
    /// All but heads and nonlinearity, which leave no trace: where they are not given, heads are 64 wide as in every
    /// CLIP, and the nonlinearity is that of Stable Diffusion's text encoder of this width: of 2.x, which is OpenCLIP's and
    /// 1024 wide, or of 1.x.
    ///
    /// # Errors
    /// Names the tensor that is missing or out of line.
    pub fn from_shapes(shapes: &Shapes, heads: Option<i64>) -> Result<Self> {
        let tokens = "embeddings.token_embedding.weight";
        let width = shapes.axis(tokens, 1)?;
        let layer = |i| format!("encoder.layers.{i}.mlp.fc1.weight");
        let layers = (0..).take_while(|i| shapes.has(&layer(*i))).count() as i64;
        ensure!(
            layers > 0 && (width % 64 == 0 || heads.is_some()),
            "{layers} layers of width {width}: no text encoder that is known"
        );
        Ok(ClipTextConfig {
            vocabulary: shapes.axis(tokens, 0)?,
            positions: shapes.axis("embeddings.position_embedding.weight", 0)?,
            width,
            hidden: shapes.axis(&layer(0), 0)?,
            layers,
            heads: heads.unwrap_or(width / 64),
            activation: if width == 1024 { TextActivation::Gelu } else { TextActivation::QuickGelu },
        })
    }
}
