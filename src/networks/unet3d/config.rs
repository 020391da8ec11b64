//! The settings of the U-Net.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::super::recompute::Recompute;
use crate::nn::Over;

/// How positions and frames attend to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKind {
    /// Over the positions of each frame, then over the frames of each position (the paper's choice).
    Factorized,
    /// Over all positions of all frames at once (the paper's ablation).
    Joint,
    /// Transformer blocks with attention to a text, as in Stable Diffusion, inflated by temporal layers.
    Text,
}

/// What the U-Net looks like. The default is the paper's for 16×256×256 clips.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct UNetConfig {
    /// Width of the first level; a multiple of the norm groups.
    pub channels: i64,
    /// Width of each level, in units of `channels`.
    pub multipliers: Vec<i64>,
    /// Residual blocks a level.
    pub blocks_per_level: i64,
    /// Downsampling factors (not sizes) at which there is attention.
    pub attention_factors: Vec<i64>,
    /// Heads of each attention.
    pub heads: i64,
    /// Channels of each head, in place of `heads`: wider levels have more of them (Stable Diffusion 2.x: 64).
    pub head_width: Option<i64>,
    /// What attends to what.
    pub attention: AttentionKind,
    /// Learned relative positions of frames.
    pub relative_position: bool,
    /// Time enters as scale and shift of the group norms (else it is added).
    pub adaptive_norm: bool,
    /// Groups of every group norm.
    pub norm_groups: i64,
    /// Group norms see each frame alone (a fresh start from an image model) instead of the whole clip.
    pub norm_per_frame: bool,
    /// Width of a text token; only for `attention: text`.
    pub context_width: i64,
    /// Attention over frames; without it each frame is an image of its own (only for `attention: text`).
    pub temporal: bool,
    /// Activations that are computed again in the backward pass instead of being kept: `true` for all, `false` for none, or
    /// the downsampling factors of the levels, such as `[1, 2]`. Less memory in training for more time.
    pub recompute: Recompute,
}

impl Default for UNetConfig {
    fn default() -> Self {
        UNetConfig {
            channels: 256,
            multipliers: vec![1, 2, 3, 4],
            blocks_per_level: 3,
            attention_factors: vec![2, 4, 8],
            heads: 4,
            head_width: None,
            attention: AttentionKind::Factorized,
            relative_position: true,
            adaptive_norm: true,
            norm_groups: 32,
            norm_per_frame: false,
            context_width: 768,
            temporal: true,
            recompute: Recompute::Everywhere(false),
        }
    }
}

impl UNetConfig {
    /// Stable Diffusion 1.x's network with temporal layers; each frame starts as the image model makes it.
    pub fn stable_diffusion() -> Self {
        UNetConfig {
            channels: 320,
            multipliers: vec![1, 2, 4, 4],
            blocks_per_level: 2,
            attention_factors: vec![1, 2, 4],
            heads: 8,
            attention: AttentionKind::Text,
            adaptive_norm: false,
            norm_per_frame: true,
            ..UNetConfig::default()
        }
    }

    /// Width of the texts that it attends to, with `attention: text`.
    pub fn text_width(&self) -> Option<i64> {
        (self.attention == AttentionKind::Text).then_some(self.context_width)
    }

    /// Heads of the attentions of so many channels.
    pub fn heads_of(&self, channels: i64) -> i64 {
        self.head_width.map_or(self.heads, |width| channels / width)
    }

    /// # Errors
    /// Names the number that does not fit and the rule.
    pub fn validate(&self) -> Result<()> {
        /// No network is meant to be wider.
        const MOST_CHANNELS: i64 = 1 << 20;
        ensure!(!self.multipliers.is_empty(), "multipliers: at least one level is needed");
        ensure!(self.multipliers.len() <= 32, "multipliers: at most 32 levels, not {}", self.multipliers.len());
        ensure!(
            self.channels > 0 && self.norm_groups > 0 && self.channels % self.norm_groups == 0,
            "channels = {} is not a multiple of the {} norm groups",
            self.channels,
            self.norm_groups
        );
        ensure!((1..=1000).contains(&self.blocks_per_level), "blocks_per_level must be from 1 to 1000");
        let deepest = self.multipliers.len() - 1;
        for (level, &multiplier) in self.multipliers.iter().enumerate() {
            ensure!(multiplier > 0, "multipliers must be positive, not {multiplier}");
            let width = self.channels.checked_mul(multiplier).filter(|width| *width <= MOST_CHANNELS);
            let Some(width) = width else {
                bail!("multipliers: {} channels times {multiplier} are more than {MOST_CHANNELS}", self.channels)
            };
            // there is always attention in the middle
            if level == deepest || self.attention_factors.contains(&(1 << level)) {
                match self.head_width {
                    Some(head) => ensure!(
                        head > 0 && width % head == 0,
                        "{width} channels do not divide into heads of {head} (head_width)"
                    ),
                    None => ensure!(
                        self.heads > 0 && width % self.heads == 0,
                        "{width} channels do not divide into {} heads",
                        self.heads
                    ),
                }
            }
        }
        let recompute = if let Recompute::At(factors) = &self.recompute { factors.as_slice() } else { &[] };
        for (key, factors) in [("attention_factors", self.attention_factors.as_slice()), ("recompute", recompute)] {
            for factor in factors {
                ensure!(
                    (0..=deepest).any(|level| 1 << level == *factor),
                    "{key}: {factor} is not one of this network's downsampling factors 1 … {}",
                    1 << deepest
                );
            }
        }
        ensure!(
            self.temporal || self.attention == AttentionKind::Text,
            "temporal: false is for attention: text; with {:?} attention frames are seen together",
            self.attention
        );
        Ok(())
    }
}

/// Statistics over a whole clip (F, H, W), or over each frame alone.
pub(super) fn over(per_frame: bool) -> Over {
    if per_frame { Over::Frame } else { Over::Clip }
}
