//! The 3D video autoencoder (paper, section 3.1): a light convolutional encoder and decoder whose
//! replicate padding makes latents move in time as the video does.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{CodecSettings, Encoded, LongDecoding, Posterior, VideoCodec};
use crate::nn::{
    Conv3d, GroupNorm, Padding, Scope, TransposedConv3d, channels_last, linear_flops, prefers_channels_last,
};

/// What the autoencoder looks like. The default is the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AutoencoderConfig {
    /// Channels after the first convolution (n); block i has n·2^(i+1).
    pub channels: i64,
    /// Downsampling of time, height and width: powers of two.
    pub factors: [i64; 3],
    /// Channels of the encoder's output (half of its moments).
    pub z_channels: i64,
    /// Channels of a latent.
    pub latent_channels: i64,
    /// Groups of every norm; 0 leaves the norms out, and long latents decode in chunks to exactly the whole.
    pub norm_groups: i64,
    /// What stands beyond the edges of a video.
    pub padding: Padding,
}

impl Default for AutoencoderConfig {
    fn default() -> Self {
        AutoencoderConfig {
            channels: 32,
            factors: [4, 8, 8],
            z_channels: 4,
            latent_channels: 4,
            norm_groups: 32,
            padding: Padding::Replicate,
        }
    }
}

impl AutoencoderConfig {
    /// The stride of each block.
    pub(crate) fn strides(&self) -> Vec<[i64; 3]> {
        strides(self.factors)
    }

    /// From how many frames away the edge of a latent shows in what the decoder makes of it. Group norms, which see
    /// everything, are not counted.
    pub fn decoder_reach(&self) -> i64 {
        decoder_reach(&self.strides())
    }
}

/// Downsampling is by powers of two.
pub(super) fn check_factors(factors: [i64; 3]) -> Result<()> {
    for factor in factors {
        ensure!(factor > 0 && factor & (factor - 1) == 0, "factors must be powers of two, not {factor}");
    }
    ensure!(factors.iter().any(|&f| f > 1), "factors: at least one must be 2 or more");
    Ok(())
}

/// The latent frames, height and width of a clip, which the factors divide.
pub(super) fn divided([ft, fh, fw]: [i64; 3], frames: i64, height: i64, width: i64) -> Result<[i64; 3]> {
    ensure!(
        frames % ft == 0 && height % fh == 0 && width % fw == 0,
        "a clip of {frames} frames of {height}x{width} does not divide by the autoencoder's factors {:?}",
        [ft, fh, fw]
    );
    Ok([frames / ft, height / fh, width / fw])
}

/// The stride of each block: two on every axis that has a factor of two left.
pub(super) fn strides(factors: [i64; 3]) -> Vec<[i64; 3]> {
    let blocks = factors.iter().map(|f| f.ilog2()).max().unwrap_or(0);
    (0..blocks).map(|i| factors.map(|f| if f.ilog2() > i { 2 } else { 1 })).collect()
}

/// From how many frames away the edge of a latent shows in what a decoder of such strides makes of it: kernels of 4 in each
/// block's transposed convolution, four of 3 in its residual blocks, one at the end.
pub(super) fn decoder_reach(strides: &[[i64; 3]]) -> i64 {
    strides.iter().fold(0, |reach, [stride, ..]| reach * stride + 3 + 4) + 1
}

impl CodecSettings for AutoencoderConfig {
    fn name(&self) -> &'static str {
        "autoencoder"
    }

    fn validate(&self) -> Result<()> {
        ensure!(self.channels > 0 && self.z_channels > 0 && self.latent_channels > 0, "channels must be positive");
        check_factors(self.factors)?;
        if self.norm_groups < 0 || (self.norm_groups > 0 && (2 * self.channels) % self.norm_groups != 0) {
            bail!("norm_groups = {} does not divide 2·channels = {}", self.norm_groups, 2 * self.channels);
        }
        Ok(())
    }

    fn latent_channels(&self) -> i64 {
        self.latent_channels
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
        LongDecoding::Overlapping { reach: self.decoder_reach() }
    }

    fn flops(&self, frames: i64, height: i64, width: i64) -> [i64; 2] {
        let (strides, z) = (self.strides(), self.z_channels);
        let ([encoder, decoder], latent) = stage_flops(self.channels, &strides, z, [frames, height, width]);
        let last = conv_flops(latent, 3, self.channels << strides.len(), 2 * z);
        let moments = conv_flops(latent, 1, 2 * z, 2 * self.latent_channels);
        [encoder + last + moments, decoder + conv_flops(latent, 1, self.latent_channels, z)]
    }

    fn build(&self, scope: &Scope) -> Box<dyn VideoCodec> {
        Box::new(VideoAutoencoder::new(scope, self))
    }
}

/// Operations of a convolution of `kernel`³ places.
pub(super) fn conv_flops(size: [i64; 3], kernel: i64, inputs: i64, outputs: i64) -> i64 {
    linear_flops(size.iter().product(), kernel.pow(3) * inputs, outputs)
}

/// Operations of the first convolution and the stages of an encoder of `channels`, and of the stages and the last convolution
/// of its decoder, whose stages begin with `inputs` channels, over a clip `[F, H, W]`; and the latent `[F', h, w]`.
pub(super) fn stage_flops(channels: i64, strides: &[[i64; 3]], inputs: i64, clip: [i64; 3]) -> ([i64; 2], [i64; 3]) {
    let (n, mut size) = (channels, clip);
    let mut encoder = conv_flops(size, 3, 3, n);
    for (i, stride) in strides.iter().enumerate() {
        size = [0, 1, 2].map(|axis| size[axis] / stride[axis]);
        encoder += conv_flops(size, 4, n << i, n << (i + 1)) + 2 * conv_flops(size, 3, n << (i + 1), n << (i + 1));
    }
    let latent = size;
    let (mut decoder, mut inputs) = (0, inputs);
    for (i, stride) in strides.iter().enumerate() {
        let outputs = n << (strides.len() - i);
        // each input meets the whole kernel
        decoder += conv_flops(size, 4, inputs, outputs);
        size = [0, 1, 2].map(|axis| size[axis] * stride[axis]);
        decoder += 4 * conv_flops(size, 3, outputs, outputs);
        inputs = outputs;
    }
    ([encoder, decoder + conv_flops(size, 3, inputs, 3)], latent)
}

fn norm(scope: &Scope, channels: i64, config: &AutoencoderConfig) -> Option<GroupNorm> {
    (config.norm_groups > 0).then(|| GroupNorm::new(scope, config.norm_groups, channels, 1e-6))
}

/// Norm, if there is one, and SiLU.
fn activated(norm: &Option<GroupNorm>, x: &Tensor) -> Tensor {
    norm.as_ref().map_or_else(|| x.silu(), |norm| norm.silu_of_video(x))
}

/// In the order of memory that 3D convolutions want.
pub(super) fn preferred_layout(x: &Tensor) -> Tensor {
    if prefers_channels_last(x.device()) { channels_last(x) } else { x.shallow_clone() }
}

/// GroupNorm → SiLU → 3×3×3, twice, plus x.
struct ResidualBlock {
    norm1: Option<GroupNorm>,
    conv1: Conv3d,
    norm2: Option<GroupNorm>,
    conv2: Conv3d,
}

impl ResidualBlock {
    fn new(scope: &Scope, channels: i64, config: &AutoencoderConfig) -> Self {
        let norm = |name: &str| norm(&scope.sub(name), channels, config);
        let conv = |name: &str| Conv3d::new(&scope.sub(name), channels, channels, 3, [1; 3], config.padding);
        ResidualBlock { norm1: norm("norm1"), conv1: conv("conv1"), norm2: norm("norm2"), conv2: conv("conv2") }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let h = self.conv1.forward(&activated(&self.norm1, x));
        x + self.conv2.forward(&activated(&self.norm2, &h))
    }
}

/// Clip → moments.
struct Encoder {
    conv_first: Conv3d,
    blocks: Vec<(Conv3d, ResidualBlock)>,
    final_norm: Option<GroupNorm>,
    final_conv: Conv3d,
}

impl Encoder {
    fn new(scope: &Scope, config: &AutoencoderConfig) -> Self {
        let n = config.channels;
        let conv_first = Conv3d::new(&scope.sub("conv_first"), 3, n, 3, [1; 3], config.padding);
        let blocks: Vec<_> = config
            .strides()
            .into_iter()
            .enumerate()
            .map(|(i, stride)| {
                let scope = scope.sub("conv_blocks").sub(i);
                let (inputs, outputs) = (n << i, n << (i + 1));
                let down = Conv3d::new(&scope.sub("down"), inputs, outputs, 4, stride, config.padding);
                (down, ResidualBlock::new(&scope.sub("res"), outputs, config))
            })
            .collect();
        let last = n << blocks.len();
        let scope = scope.sub("final_block");
        Encoder {
            conv_first,
            blocks,
            final_norm: norm(&scope.sub(0), last, config),
            final_conv: Conv3d::new(&scope.sub(2), last, 2 * config.z_channels, 3, [1; 3], config.padding),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut h = self.conv_first.forward(&preferred_layout(x));
        for (down, res) in &self.blocks {
            h = res.forward(&down.forward(&h));
        }
        self.final_conv.forward(&activated(&self.final_norm, &h))
    }
}

/// Latent → clip.
struct Decoder {
    blocks: Vec<(TransposedConv3d, ResidualBlock, ResidualBlock)>,
    conv_out: Conv3d,
}

impl Decoder {
    fn new(scope: &Scope, config: &AutoencoderConfig) -> Self {
        let strides = config.strides();
        let width = |i: usize| config.channels << (strides.len() - i); // block i's output
        let blocks = strides
            .iter()
            .enumerate()
            .map(|(i, &stride)| {
                let scope = scope.sub("conv_blocks").sub(i);
                let inputs = if i == 0 { config.z_channels } else { width(i - 1) };
                let up = TransposedConv3d::new(&scope.sub("up"), inputs, width(i), 4, stride, config.padding);
                let res = |name: &str| ResidualBlock::new(&scope.sub(name), width(i), config);
                (up, res("res1"), res("res2"))
            })
            .collect();
        let last = width(strides.len() - 1);
        Decoder { blocks, conv_out: Conv3d::new(&scope.sub("conv_out"), last, 3, 3, [1; 3], config.padding) }
    }

    fn forward(&self, z: &Tensor) -> Tensor {
        let mut h = preferred_layout(z);
        for (up, res1, res2) in &self.blocks {
            h = res2.forward(&res1.forward(&up.forward(&h)));
        }
        self.conv_out.forward(&h).contiguous()
    }
}

/// The video autoencoder.
pub struct VideoAutoencoder {
    config: AutoencoderConfig,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Conv3d,
    post_quant_conv: Conv3d,
}

impl VideoAutoencoder {
    /// Declares the parameters under `scope`, with the released names.
    pub fn new(scope: &Scope, config: &AutoencoderConfig) -> Self {
        let (z, latent) = (config.z_channels, config.latent_channels);
        let pointwise = |name: &str, i, o| Conv3d::new(&scope.sub(name), i, o, 1, [1; 3], config.padding);
        VideoAutoencoder {
            config: config.clone(),
            encoder: Encoder::new(&scope.sub("encoder"), config),
            decoder: Decoder::new(&scope.sub("decoder"), config),
            quant_conv: pointwise("quant_conv", 2 * z, 2 * latent),
            post_quant_conv: pointwise("post_quant_conv", latent, z),
        }
    }

    /// x `[B, 3, F, H, W]` in [−1, 1] → the posterior of its latent.
    pub fn encode(&self, x: &Tensor) -> Posterior {
        Posterior::from_moments(&self.quant_conv.forward(&self.encoder.forward(x)).contiguous())
    }

    /// z `[B, C, F/ft, H/fs, W/fs]` → x `[B, 3, F, H, W]`, nominally in [−1, 1], not clamped.
    pub fn decode(&self, z: &Tensor) -> Tensor {
        self.decoder.forward(&self.post_quant_conv.forward(z))
    }

    /// The kernel of the decoder's last convolution, `[3, n, 3, 3, 3]`: where the adaptive GAN weight is measured.
    pub fn last_kernel(&self) -> &Tensor {
        self.decoder.conv_out.weight()
    }
}

impl VideoCodec for VideoAutoencoder {
    fn encode(&self, x: &Tensor) -> Encoded {
        VideoAutoencoder::encode(self, x).into()
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        VideoAutoencoder::decode(self, z)
    }

    fn settings(&self) -> &dyn CodecSettings {
        &self.config
    }

    fn last_kernel(&self) -> Option<&Tensor> {
        Some(VideoAutoencoder::last_kernel(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: one block, stride 2 on each axis, no norm.
    #[test]
    fn a_small_autoencoder_by_hand() {
        let config = AutoencoderConfig {
            channels: 2,
            factors: [2, 2, 2],
            z_channels: 1,
            latent_channels: 1,
            norm_groups: 0,
            ..AutoencoderConfig::default()
        };
        let [encoder, decoder] = config.flops(2, 4, 4);
        let conv = |places: i64, k: i64, i: i64, o: i64| 2 * places * k * k * k * i * o;
        let down = conv(4, 4, 2, 4) + 2 * conv(4, 3, 4, 4);
        assert_eq!(encoder, conv(32, 3, 3, 2) + down + conv(4, 3, 4, 2) + conv(4, 1, 2, 2));
        let up = conv(4, 4, 1, 4) + 4 * conv(32, 3, 4, 4);
        assert_eq!(decoder, conv(4, 1, 1, 1) + up + conv(32, 3, 4, 3));
    }
}
