//! TATS' video autoencoder with a codebook (Ge et al. 2022, arXiv 2204.03638, section 3.1): convolutions as LVDM's, which
//! come from it, and between encoder and decoder each vector is replaced by the nearest one of a codebook.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    Codebook, CodebookConfig, CodecSettings, Encoded, EncodedKind, LongDecoding, VideoCodec,
    video_autoencoder::{check_factors, conv_flops, decoder_reach, divided, preferred_layout, stage_flops, strides},
};
use crate::{
    distributed::Ranks,
    nn::{BatchNorm, Conv3d, GroupNorm, Init, Padding, Scope, Statistics, TransposedConv3d},
};

/// How activations are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VqganNorm {
    /// Over the batches of all ranks; outside training by running statistics. As the released models were trained.
    Batch,
    /// Over each of 32 groups of channels of a clip.
    Group,
}

/// What the autoencoder looks like. The default is that of the released models.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VqganConfig {
    /// Channels after the first convolution (n); block i has n·2^(i+1).
    pub channels: i64,
    /// Downsampling of time, height and width: powers of two.
    pub factors: [i64; 3],
    /// Numbers of an entry of the codebook, the channels of a latent.
    pub latent_channels: i64,
    /// How activations are normalised.
    pub norm: VqganNorm,
    /// The codebook.
    pub codebook: CodebookConfig,
}

impl Default for VqganConfig {
    fn default() -> Self {
        VqganConfig {
            channels: 32,
            factors: [4, 8, 8],
            latent_channels: 256,
            norm: VqganNorm::Batch,
            codebook: CodebookConfig::default(),
        }
    }
}

/// Groups of a group norm.
const GROUPS: i64 = 32;

impl CodecSettings for VqganConfig {
    fn name(&self) -> &'static str {
        "autoencoder with a codebook"
    }

    fn validate(&self) -> Result<()> {
        let VqganConfig { channels, factors, latent_channels, norm, codebook } = *self;
        ensure!(channels > 0 && latent_channels > 0, "channels and latent_channels must be positive");
        check_factors(factors)?;
        ensure!(
            norm == VqganNorm::Batch || (2 * channels) % GROUPS == 0,
            "norm: group has {GROUPS} groups, which do not divide 2·channels = {}",
            2 * channels
        );
        codebook.validate()
    }

    fn latent_channels(&self) -> i64 {
        self.latent_channels
    }

    fn codebook(&self) -> Option<i64> {
        Some(self.codebook.codes)
    }

    /// `[C, F/ft, H/fh, W/fw]`, where the factors divide the clip's sizes.
    fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        let [f, h, w] = divided(self.factors, frames, height, width)?;
        Ok([self.latent_channels, f, h, w])
    }

    fn clip_shape(&self, [f, h, w]: [i64; 3]) -> [i64; 3] {
        let [ft, fh, fw] = self.factors;
        [f * ft, h * fh, w * fw]
    }

    fn long_decoding(&self) -> LongDecoding {
        LongDecoding::Overlapping { reach: decoder_reach(&strides(self.factors)) }
    }

    fn encodes_to(&self) -> EncodedKind {
        EncodedKind::Exact
    }

    fn flops(&self, frames: i64, height: i64, width: i64) -> [i64; 2] {
        let strides = strides(self.factors);
        let widest = self.channels << strides.len();
        let ([encoder, decoder], latent) = stage_flops(self.channels, &strides, widest, [frames, height, width]);
        let before = conv_flops(latent, 1, widest, self.latent_channels);
        let distances = conv_flops(latent, 1, self.latent_channels, self.codebook.codes);
        [encoder + before + distances, decoder + conv_flops(latent, 1, self.latent_channels, widest)]
    }

    fn build(&self, scope: &Scope) -> Box<dyn VideoCodec> {
        Box::new(Vqgan::new(scope, self))
    }
}

enum Norm {
    Batch(BatchNorm),
    Group(GroupNorm),
}

impl Norm {
    fn new(scope: &Scope, channels: i64, kind: VqganNorm) -> Self {
        match kind {
            VqganNorm::Batch => Norm::Batch(BatchNorm::new(scope, channels, Init::ONES)),
            VqganNorm::Group => Norm::Group(GroupNorm::new(scope, GROUPS, channels, 1e-6)),
        }
    }

    /// The norm, then SiLU.
    fn silu(&self, x: &Tensor, statistics: Statistics) -> Tensor {
        match self {
            Norm::Batch(norm) => norm.by(statistics, x).silu(),
            Norm::Group(norm) => norm.silu_of_video(x),
        }
    }

    fn synchronise(&mut self, ranks: &Ranks) {
        if let Norm::Batch(norm) = self {
            norm.synchronise(ranks);
        }
    }
}

/// norm → SiLU → 3×3×3, twice, plus x.
struct ResidualBlock {
    norm1: Norm,
    conv1: Conv3d,
    norm2: Norm,
    conv2: Conv3d,
}

impl ResidualBlock {
    fn new(scope: &Scope, channels: i64, kind: VqganNorm) -> Self {
        let norm = |name: &str| Norm::new(&scope.sub(name), channels, kind);
        let conv = |name: &str| conv(&scope.sub(name), channels, channels, 3, [1; 3]);
        ResidualBlock { norm1: norm("norm1"), conv1: conv("conv1"), norm2: norm("norm2"), conv2: conv("conv2") }
    }

    fn forward(&self, x: &Tensor, statistics: Statistics) -> Tensor {
        let h = self.conv1.forward(&self.norm1.silu(x, statistics));
        x + self.conv2.forward(&self.norm2.silu(&h, statistics))
    }

    fn synchronise(&mut self, ranks: &Ranks) {
        self.norm1.synchronise(ranks);
        self.norm2.synchronise(ranks);
    }
}

/// A convolution whose edges are repeated.
fn conv(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, stride: [i64; 3]) -> Conv3d {
    Conv3d::new(scope, inputs, outputs, kernel, stride, Padding::Replicate)
}

/// Clip → activations of n·2^m channels, for m blocks.
struct Encoder {
    conv_first: Conv3d,
    blocks: Vec<(Conv3d, ResidualBlock)>,
    final_norm: Norm,
}

impl Encoder {
    fn new(scope: &Scope, config: &VqganConfig) -> Self {
        let n = config.channels;
        let conv_first = conv(&scope.sub("conv_first"), 3, n, 3, [1; 3]);
        let block = |(i, stride): (usize, [i64; 3])| {
            let scope = scope.sub("conv_blocks").sub(i);
            let down = conv(&scope.sub("down"), n << i, n << (i + 1), 4, stride);
            (down, ResidualBlock::new(&scope.sub("res"), n << (i + 1), config.norm))
        };
        let blocks: Vec<_> = strides(config.factors).into_iter().enumerate().map(block).collect();
        let final_norm = Norm::new(&scope.sub("final_block").sub(0), n << blocks.len(), config.norm);
        Encoder { conv_first, blocks, final_norm }
    }

    fn forward(&self, x: &Tensor, statistics: Statistics) -> Tensor {
        let mut h = self.conv_first.forward(&preferred_layout(x));
        for (down, res) in &self.blocks {
            h = res.forward(&down.forward(&h), statistics);
        }
        self.final_norm.silu(&h, statistics)
    }
}

/// Activations of n·2^m channels → clip.
struct Decoder {
    final_norm: Norm,
    blocks: Vec<(TransposedConv3d, ResidualBlock, ResidualBlock)>,
    conv_last: Conv3d,
}

impl Decoder {
    fn new(scope: &Scope, config: &VqganConfig) -> Self {
        let strides = strides(config.factors);
        let width = |i: usize| config.channels << (strides.len() - i); // block i's output
        let final_norm = Norm::new(&scope.sub("final_block").sub(0), width(0), config.norm);
        let block = |(i, &stride): (usize, &[i64; 3])| {
            let scope = scope.sub("conv_blocks").sub(i);
            let inputs = width(i.saturating_sub(1));
            let up = TransposedConv3d::new(&scope.sub("up"), inputs, width(i), 4, stride, Padding::Replicate);
            let res = |name: &str| ResidualBlock::new(&scope.sub(name), width(i), config.norm);
            (up, res("res1"), res("res2"))
        };
        let blocks = strides.iter().enumerate().map(block).collect();
        let conv_last = conv(&scope.sub("conv_last"), width(strides.len() - 1), 3, 3, [1; 3]);
        Decoder { final_norm, blocks, conv_last }
    }

    fn forward(&self, h: &Tensor, statistics: Statistics) -> Tensor {
        let mut h = self.final_norm.silu(h, statistics);
        for (up, res1, res2) in &self.blocks {
            h = res2.forward(&res1.forward(&up.forward(&h), statistics), statistics);
        }
        self.conv_last.forward(&h).contiguous()
    }
}

/// The autoencoder. Inside, pixels lie in [−0.5, 0.5].
pub struct Vqgan {
    config: VqganConfig,
    encoder: Encoder,
    decoder: Decoder,
    pre_vq_conv: Conv3d,
    codebook: Codebook,
    post_vq_conv: Conv3d,
}

impl Vqgan {
    /// Declares the parameters under `scope`, with the released names.
    pub fn new(scope: &Scope, config: &VqganConfig) -> Self {
        let widest = config.channels << strides(config.factors).len();
        let pointwise = |name: &str, inputs, outputs| conv(&scope.sub(name), inputs, outputs, 1, [1; 3]);
        Vqgan {
            config: *config,
            encoder: Encoder::new(&scope.sub("encoder"), config),
            decoder: Decoder::new(&scope.sub("decoder"), config),
            pre_vq_conv: pointwise("pre_vq_conv", widest, config.latent_channels),
            codebook: Codebook::new(&scope.sub("codebook"), config.latent_channels, &config.codebook),
            post_vq_conv: pointwise("post_vq_conv", config.latent_channels, widest),
        }
    }

    /// x `[B, 3, F, H, W]` in [−1, 1] → the vectors `[B, C, F/ft, H/fh, W/fw]` for which the codebook has the nearest.
    pub fn encode_to_vectors(&self, x: &Tensor, statistics: Statistics) -> Tensor {
        self.pre_vq_conv.forward(&self.encoder.forward(&(x * 0.5), statistics)).contiguous()
    }

    fn decode_by(&self, z: &Tensor, statistics: Statistics) -> Tensor {
        let h = self.post_vq_conv.forward(&preferred_layout(z));
        self.decoder.forward(&h, statistics) * 2.0
    }

    /// The codebook between encoder and decoder.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }
}

impl VideoCodec for Vqgan {
    fn encode(&self, x: &Tensor) -> Encoded {
        self.codebook.quantize(&self.encode_to_vectors(x, Statistics::Running), false)
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        self.decode_by(z, Statistics::Running)
    }

    fn settings(&self) -> &dyn CodecSettings {
        &self.config
    }

    fn last_kernel(&self) -> Option<&Tensor> {
        Some(self.decoder.conv_last.weight())
    }

    fn vectors(&self, codes: &Tensor) -> Result<Tensor> {
        Ok(self.codebook.vectors(codes))
    }

    fn begin_training(&mut self, ranks: &Ranks, seed: u64) {
        let Vqgan { encoder, decoder, codebook, .. } = self;
        encoder.final_norm.synchronise(ranks);
        decoder.final_norm.synchronise(ranks);
        encoder.blocks.iter_mut().for_each(|(_, res)| res.synchronise(ranks));
        for (_, res1, res2) in &mut decoder.blocks {
            res1.synchronise(ranks);
            res2.synchronise(ranks);
        }
        codebook.begin_training(ranks, seed);
    }

    fn train_pass(&self, x: &Tensor, _noise: &Tensor, learns: bool) -> (Encoded, Tensor) {
        let statistics = if learns { Statistics::Followed } else { Statistics::Batch };
        let encoded = self.codebook.quantize(&self.encode_to_vectors(x, statistics), learns);
        let reconstruction = self.decode_by(encoded.mode(), statistics);
        (encoded, reconstruction)
    }

    fn after_passes(&self, step: i64) {
        self.codebook.update(step);
    }

    fn training_terms(&self, encoded: &Encoded) -> Vec<(&'static str, Tensor)> {
        let Encoded::Codes { indices, .. } = encoded else { return Vec::new() };
        vec![("perplexity", self.codebook.perplexity(indices)), ("dead_codes", self.codebook.dead())]
    }
}
