//! CLIP's text encoder (Radford et al. 2021): tokens → what Stable Diffusion's cross-attention sees.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    nn::{Init, LayerNorm, Linear, Scope, causal_attention},
    torch::upload,
};

/// The nonlinearity of the feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextActivation {
    /// x·σ(1.702 x)
    QuickGelu,
    /// The exact GELU.
    Gelu,
}

impl TextActivation {
    fn apply(self, x: &Tensor) -> Tensor {
        match self {
            TextActivation::QuickGelu => x * (x * 1.702).sigmoid(),
            TextActivation::Gelu => x.gelu("none"),
        }
    }
}

/// What the text encoder looks like. The default is ViT-L/14's, which Stable Diffusion 1.x uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    /// Number of tokens.
    pub vocabulary: i64,
    /// Most tokens in a text.
    pub positions: i64,
    /// Of a token's vector.
    pub width: i64,
    /// Width of the feed-forward layers.
    pub hidden: i64,
    /// Transformer blocks.
    pub layers: i64,
    /// Of each attention.
    pub heads: i64,
    /// Of the feed-forward layers.
    pub activation: TextActivation,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        ClipTextConfig {
            vocabulary: 49_408,
            positions: 77,
            width: 768,
            hidden: 3072,
            layers: 12,
            heads: 12,
            activation: TextActivation::QuickGelu,
        }
    }
}

impl ClipTextConfig {
    /// # Errors
    /// Names the number that does not fit and the rule.
    pub fn validate(&self) -> Result<()> {
        const MOST: i64 = 1 << 24;
        for (name, value) in [
            ("vocabulary", self.vocabulary),
            ("positions", self.positions),
            ("width", self.width),
            ("hidden", self.hidden),
        ] {
            ensure!((1..=MOST).contains(&value), "{name} must be from 1 to {MOST}, not {value}");
        }
        ensure!((0..=1000).contains(&self.layers), "layers must be from 0 to 1000, not {}", self.layers);
        ensure!(
            self.heads > 0 && self.width % self.heads == 0,
            "a width of {} does not divide into {} heads",
            self.width,
            self.heads
        );
        Ok(())
    }
}

/// Causal self-attention and a feed-forward network, each behind its norm and beside its residual.
struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
    activation: TextActivation,
}

impl Layer {
    fn new(scope: &Scope, config: &ClipTextConfig) -> Self {
        let width = config.width;
        let (attention, mlp) = (scope.sub("self_attn"), scope.sub("mlp"));
        let project = |name: &str| Linear::new(&attention.sub(name), width, width);
        Layer {
            norm1: LayerNorm::new(&scope.sub("layer_norm1"), width),
            q: project("q_proj"),
            k: project("k_proj"),
            v: project("v_proj"),
            out: project("out_proj"),
            norm2: LayerNorm::new(&scope.sub("layer_norm2"), width),
            fc1: Linear::new(&mlp.sub("fc1"), width, config.hidden),
            fc2: Linear::new(&mlp.sub("fc2"), config.hidden, width),
            heads: config.heads,
            activation: config.activation,
        }
    }

    /// `[B, T, width]` → the same.
    fn forward(&self, x: &Tensor) -> Tensor {
        let h = self.norm1.forward(x);
        let h = causal_attention(&self.q.forward(&h), &self.k.forward(&h), &self.v.forward(&h), self.heads);
        let x = x + self.out.forward(&h);
        let h = self.fc1.forward(&self.norm2.forward(&x));
        &x + self.fc2.forward(&self.activation.apply(&h))
    }
}

/// The text encoder.
pub struct ClipText {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
}

impl ClipText {
    /// Declares the parameters under `scope`, with CLIP's names.
    pub fn new(scope: &Scope, config: &ClipTextConfig) -> Self {
        let (embeddings, layers) = (scope.sub("embeddings"), scope.sub("encoder").sub("layers"));
        let table =
            |name: &str, rows| embeddings.sub(name).parameter("weight", &[rows, config.width], Init::Normal(0.0, 0.02));
        ClipText {
            token_embedding: table("token_embedding", config.vocabulary),
            position_embedding: table("position_embedding", config.positions),
            layers: (0..config.layers).map(|i| Layer::new(&layers.sub(i), config)).collect(),
            final_layer_norm: LayerNorm::new(&scope.sub("final_layer_norm"), config.width),
        }
    }

    /// Token numbers `[B, T]` int64, best on the host, where they are checked → the last hidden state behind the final norm, `[B, T, width]`.
    ///
    /// # Errors
    /// More tokens than positions; a token that is not in the vocabulary.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (b, t) = tokens.size2()?;
        let (positions, vocabulary) = (self.position_embedding.size()[0], self.token_embedding.size()[0]);
        ensure!(t <= positions, "a text of {t} tokens, the encoder has {positions} positions");
        if tokens.numel() > 0 {
            let (least, most) = (tokens.min().int64_value(&[]), tokens.max().int64_value(&[]));
            ensure!(
                0 <= least && most < vocabulary,
                "tokens from {least} to {most}, the vocabulary has 0 to {}",
                vocabulary - 1
            );
        }
        let tokens = upload(tokens, self.token_embedding.device());
        let embedded = self.token_embedding.index_select(0, &tokens.flatten(0, 1)).reshape([b, t, -1]);
        let x = embedded + self.position_embedding.narrow(0, 0, t);
        Ok(self.final_layer_norm.forward(&self.layers.iter().fold(x, |x, layer| layer.forward(&x))))
    }
}
