//! Stable Diffusion's image autoencoder (Rombach et al. 2022), applied to every frame of a video alone.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{CodecSettings, Encoded, LongDecoding, Posterior, VideoCodec};
use crate::nn::{Conv2d, GroupNorm, Init, Linear, Scope, attention, linear_flops};

/// What the image autoencoder looks like. The default is that of Stable Diffusion 1.x.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ImageAutoencoderConfig {
    /// Channels of each level; from one level to the next, height and width halve.
    pub widths: Vec<i64>,
    /// Residual blocks a level of the encoder; the decoder has one more.
    pub blocks_per_level: i64,
    /// C of a latent.
    pub latent_channels: i64,
    /// Groups of every group norm.
    pub norm_groups: i64,
    /// Attention over all positions at the deepest level.
    pub attention: bool,
}

impl Default for ImageAutoencoderConfig {
    fn default() -> Self {
        ImageAutoencoderConfig {
            widths: vec![128, 256, 512, 512],
            blocks_per_level: 2,
            latent_channels: 4,
            norm_groups: 32,
            attention: true,
        }
    }
}

impl ImageAutoencoderConfig {
    /// Pixels along a side for one of the latent.
    pub fn factor(&self) -> i64 {
        1 << (self.widths.len() - 1)
    }

    fn norm(&self, scope: &Scope, channels: i64) -> GroupNorm {
        GroupNorm::new(scope, self.norm_groups, channels, 1e-6)
    }
}

impl CodecSettings for ImageAutoencoderConfig {
    fn name(&self) -> &'static str {
        "image autoencoder"
    }

    fn validate(&self) -> Result<()> {
        ensure!(!self.widths.is_empty(), "widths: at least one level is needed");
        ensure!((1..=1000).contains(&self.blocks_per_level), "blocks_per_level must be from 1 to 1000");
        ensure!(self.latent_channels > 0, "latent_channels must be positive");
        for width in &self.widths {
            ensure!(
                *width > 0 && self.norm_groups > 0 && width % self.norm_groups == 0,
                "norm_groups = {} does not divide a width of {width} channels",
                self.norm_groups
            );
        }
        Ok(())
    }

    fn latent_channels(&self) -> i64 {
        self.latent_channels
    }

    /// `[C, F, H/f, W/f]`, where f divides height and width.
    fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        let factor = self.factor();
        ensure!(
            height % factor == 0 && width % factor == 0,
            "pictures of {height}x{width} do not divide by the image autoencoder's factor {factor}"
        );
        Ok([self.latent_channels, frames, height / factor, width / factor])
    }

    fn clip_shape(&self, [f, h, w]: [i64; 3]) -> [i64; 3] {
        [f, h * self.factor(), w * self.factor()]
    }

    fn long_decoding(&self) -> LongDecoding {
        LongDecoding::FrameByFrame { at_once: ImageAutoencoder::FRAMES_PER_PASS }
    }

    fn flops(&self, frames: i64, height: i64, width: i64) -> [i64; 2] {
        let deepest = self.widths.len() - 1;
        let places = |level: usize| frames * (height >> level) * (width >> level);
        let conv = |level: usize, inputs, outputs| linear_flops(places(level), 9 * inputs, outputs);
        let residual = |level: usize, inputs: i64, outputs: i64| {
            let shortcut = if inputs == outputs { 0 } else { linear_flops(places(level), inputs, outputs) };
            conv(level, inputs, outputs) + conv(level, outputs, outputs) + shortcut
        };
        // so many blocks of a level, the first of which changes the width
        let blocks = |level: usize, inputs: i64, count: i64| {
            let width = self.widths[level];
            residual(level, inputs, width) + (count - 1) * residual(level, width, width)
        };
        let last = self.widths[deepest];
        let attention = 4 * linear_flops(places(deepest), last, last)
            + 2 * linear_flops(places(deepest), last, places(deepest) / frames);
        let middle = 2 * residual(deepest, last, last) + if self.attention { attention } else { 0 };
        let moments = 2 * self.latent_channels;
        let pointwise = |channels: i64| linear_flops(places(deepest), channels, channels);

        let mut encoder = conv(0, 3, self.widths[0]) + middle + conv(deepest, last, moments) + pointwise(moments);
        let mut decoder = pointwise(self.latent_channels) + conv(deepest, self.latent_channels, last) + middle;
        for (level, &width) in self.widths.iter().enumerate() {
            encoder += blocks(level, self.widths[level.saturating_sub(1)], self.blocks_per_level);
            decoder += blocks(level, self.widths[deepest.min(level + 1)], self.blocks_per_level + 1);
            if level < deepest {
                encoder += conv(level + 1, width, width);
            }
            if level > 0 {
                decoder += conv(level - 1, width, width);
            }
        }
        [encoder, decoder + conv(0, self.widths[0], 3)]
    }

    fn build(&self, scope: &Scope) -> Box<dyn VideoCodec> {
        Box::new(ImageAutoencoder::new(scope, self))
    }
}

/// A convolution that keeps the size.
fn conv(scope: &Scope, inputs: i64, outputs: i64, kernel: i64) -> Conv2d {
    Conv2d::new(scope, inputs, outputs, kernel, 1, kernel / 2)
}

/// norm → SiLU → 3×3, twice, plus x.
struct ResidualBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl ResidualBlock {
    fn new(scope: &Scope, inputs: i64, outputs: i64, config: &ImageAutoencoderConfig) -> Self {
        ResidualBlock {
            norm1: config.norm(&scope.sub("norm1"), inputs),
            conv1: conv(&scope.sub("conv1"), inputs, outputs, 3),
            norm2: config.norm(&scope.sub("norm2"), outputs),
            conv2: conv(&scope.sub("conv2"), outputs, outputs, 3),
            shortcut: (inputs != outputs).then(|| conv(&scope.sub("nin_shortcut"), inputs, outputs, 1)),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let h = self.conv1.forward(&self.norm1.forward(x).silu());
        let h = self.conv2.forward(&self.norm2.forward(&h).silu());
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }
}

/// One head over all positions of an image, plus x.
struct Attention {
    norm: GroupNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    proj_out: Linear,
}

impl Attention {
    fn new(scope: &Scope, channels: i64, config: &ImageAutoencoderConfig) -> Self {
        let map = |name: &str| Linear::pointwise(&scope.sub(name), channels, channels, 2, Init::fan_in(channels));
        Attention {
            norm: config.norm(&scope.sub("norm"), channels),
            q: map("q"),
            k: map("k"),
            v: map("v"),
            proj_out: map("proj_out"),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let tokens = self.norm.forward(x).flatten(2, 3).transpose(1, 2); // [N, H·W, C]
        let h = attention(&self.q.forward(&tokens), &self.k.forward(&tokens), &self.v.forward(&tokens), 1);
        x + self.proj_out.forward(&h).transpose(1, 2).reshape(x.size())
    }
}

/// The deepest level's block, attention, block.
struct Middle {
    block_1: ResidualBlock,
    attn_1: Option<Attention>,
    block_2: ResidualBlock,
}

impl Middle {
    fn new(scope: &Scope, channels: i64, config: &ImageAutoencoderConfig) -> Self {
        let block = |name: &str| ResidualBlock::new(&scope.sub(name), channels, channels, config);
        Middle {
            block_1: block("block_1"),
            attn_1: config.attention.then(|| Attention::new(&scope.sub("attn_1"), channels, config)),
            block_2: block("block_2"),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let h = self.block_1.forward(x);
        self.block_2.forward(&match &self.attn_1 {
            Some(attention) => attention.forward(&h),
            None => h,
        })
    }
}

/// Residual blocks of one size, then a convolution to the next size (none at the last level).
struct Level {
    blocks: Vec<ResidualBlock>,
    resize: Option<Conv2d>,
}

impl Level {
    /// `count` blocks, the first of which changes the width.
    fn blocks(
        scope: &Scope,
        inputs: i64,
        width: i64,
        count: i64,
        config: &ImageAutoencoderConfig,
    ) -> Vec<ResidualBlock> {
        let scope = scope.sub("block");
        let block = |i| ResidualBlock::new(&scope.sub(i), if i == 0 { inputs } else { width }, width, config);
        (0..count).map(block).collect()
    }

    fn forward(&self, x: &Tensor, resize: impl Fn(&Conv2d, &Tensor) -> Tensor) -> Tensor {
        let h = self.blocks.iter().fold(x.shallow_clone(), |h, block| block.forward(&h));
        match &self.resize {
            Some(conv) => resize(conv, &h),
            None => h,
        }
    }
}

/// Images → moments.
struct Encoder {
    conv_in: Conv2d,
    /// From the largest size to the smallest.
    levels: Vec<Level>,
    mid: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(scope: &Scope, config: &ImageAutoencoderConfig) -> Self {
        let widths = &config.widths;
        let deepest = widths.len() - 1;
        let levels = (0..=deepest)
            .map(|level| {
                let scope = scope.sub("down").sub(level);
                let (inputs, width) = (widths[level.saturating_sub(1)], widths[level]);
                let down = || Conv2d::new(&scope.sub("downsample").sub("conv"), width, width, 3, 2, 0);
                Level {
                    blocks: Level::blocks(&scope, inputs, width, config.blocks_per_level, config),
                    resize: (level < deepest).then(down),
                }
            })
            .collect();
        Encoder {
            conv_in: conv(&scope.sub("conv_in"), 3, widths[0], 3),
            levels,
            mid: Middle::new(&scope.sub("mid"), widths[deepest], config),
            norm_out: config.norm(&scope.sub("norm_out"), widths[deepest]),
            conv_out: conv(&scope.sub("conv_out"), widths[deepest], 2 * config.latent_channels, 3),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        // zeros to the right and below only
        let down = |conv: &Conv2d, x: &Tensor| conv.forward(&x.constant_pad_nd([0, 1, 0, 1]));
        let h = self.levels.iter().fold(self.conv_in.forward(x), |h, level| level.forward(&h, down));
        self.conv_out.forward(&self.norm_out.forward(&self.mid.forward(&h)).silu())
    }
}

/// Latents → images.
struct Decoder {
    conv_in: Conv2d,
    mid: Middle,
    /// From the smallest size to the largest.
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(scope: &Scope, config: &ImageAutoencoderConfig) -> Self {
        let widths = &config.widths;
        let deepest = widths.len() - 1;
        let levels = (0..=deepest)
            .rev()
            .map(|level| {
                let scope = scope.sub("up").sub(level);
                let (inputs, width) = (widths[deepest.min(level + 1)], widths[level]);
                let up = || conv(&scope.sub("upsample").sub("conv"), width, width, 3);
                Level {
                    blocks: Level::blocks(&scope, inputs, width, config.blocks_per_level + 1, config),
                    resize: (level > 0).then(up),
                }
            })
            .collect();
        Decoder {
            conv_in: conv(&scope.sub("conv_in"), config.latent_channels, widths[deepest], 3),
            mid: Middle::new(&scope.sub("mid"), widths[deepest], config),
            levels,
            norm_out: config.norm(&scope.sub("norm_out"), widths[0]),
            conv_out: conv(&scope.sub("conv_out"), widths[0], 3, 3),
        }
    }

    fn forward(&self, z: &Tensor) -> Tensor {
        let up = |conv: &Conv2d, x: &Tensor| {
            let (_, _, h, w) = x.size4().expect("images [N, C, H, W]");
            conv.forward(&x.upsample_nearest2d([2 * h, 2 * w], None, None))
        };
        let h = self.mid.forward(&self.conv_in.forward(z));
        let h = self.levels.iter().fold(h, |h, level| level.forward(&h, up));
        self.conv_out.forward(&self.norm_out.forward(&h).silu())
    }
}

/// The image autoencoder, with the surface of the video autoencoder.
pub struct ImageAutoencoder {
    config: ImageAutoencoderConfig,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
}

impl ImageAutoencoder {
    /// Frames in the network at a time, so that memory does not grow with a video's length.
    pub const FRAMES_PER_PASS: i64 = 8;

    /// Declares the parameters under `scope`, with the released names.
    pub fn new(scope: &Scope, config: &ImageAutoencoderConfig) -> Self {
        let latent = config.latent_channels;
        ImageAutoencoder {
            config: config.clone(),
            encoder: Encoder::new(&scope.sub("encoder"), config),
            decoder: Decoder::new(&scope.sub("decoder"), config),
            quant_conv: conv(&scope.sub("quant_conv"), 2 * latent, 2 * latent, 1),
            post_quant_conv: conv(&scope.sub("post_quant_conv"), latent, latent, 1),
        }
    }

    /// x `[B, 3, F, H, W]` in [−1, 1] → the posterior of its latent, `[B, C, F, H/f, W/f]`.
    pub fn encode(&self, x: &Tensor) -> Posterior {
        let moments = frame_by_frame(x, |images| self.quant_conv.forward(&self.encoder.forward(images)));
        Posterior::from_moments(&moments)
    }

    /// z `[B, C, F, h, w]` → x `[B, 3, F, H, W]`, nominally in [−1, 1], not clamped.
    pub fn decode(&self, z: &Tensor) -> Tensor {
        frame_by_frame(z, |latents| self.decoder.forward(&self.post_quant_conv.forward(latents)))
    }
}

impl VideoCodec for ImageAutoencoder {
    fn encode(&self, x: &Tensor) -> Encoded {
        ImageAutoencoder::encode(self, x).into()
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        ImageAutoencoder::decode(self, z)
    }

    fn settings(&self) -> &dyn CodecSettings {
        &self.config
    }

    fn last_kernel(&self) -> Option<&Tensor> {
        Some(self.decoder.conv_out.weight())
    }
}

/// A network of images `[N, C, H, W]` on every frame of `[B, C, F, H, W]`, a few frames at a time.
fn frame_by_frame(video: &Tensor, network: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let (b, c, f, h, w) = video.size5().expect("a video [B, C, F, H, W]");
    let frames = video.transpose(1, 2).reshape([b * f, c, h, w]);
    let images: Vec<Tensor> = frames.split(ImageAutoencoder::FRAMES_PER_PASS, 0).iter().map(network).collect();
    let images = Tensor::cat(&images, 0);
    let (_, c, h, w) = images.size4().expect("images [B·F, C, H, W]");
    images.reshape([b, f, c, h, w]).transpose(1, 2) // [B, C, F, H, W]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: two levels, one block a level, 2 frames of 4×4.
    #[test]
    fn a_small_image_autoencoder_by_hand() {
        let config = ImageAutoencoderConfig {
            widths: vec![2, 4],
            blocks_per_level: 1,
            latent_channels: 1,
            norm_groups: 2,
            attention: true,
        };
        let [encoder, decoder] = config.flops(2, 4, 4);
        let conv = |places: i64, inputs: i64, outputs: i64| 2 * places * 9 * inputs * outputs;
        let map = |places: i64, inputs: i64, outputs: i64| 2 * places * inputs * outputs;
        // at the deepest level 2 frames of 2×2 places: q, k, v, the output, scores of 4 by 4 and sums of 4 values
        let middle = 4 * conv(8, 4, 4) + 4 * map(8, 4, 4) + 2 * map(8, 4, 4);
        let down = 2 * conv(32, 2, 2) + conv(8, 2, 2) + conv(8, 2, 4) + conv(8, 4, 4) + map(8, 2, 4);
        assert_eq!(encoder, conv(32, 3, 2) + down + middle + conv(8, 4, 2) + map(8, 2, 2));
        let up =
            4 * conv(8, 4, 4) + conv(32, 4, 4) + conv(32, 4, 2) + conv(32, 2, 2) + map(32, 4, 2) + 2 * conv(32, 2, 2);
        assert_eq!(decoder, map(8, 1, 1) + conv(8, 1, 4) + middle + up + conv(32, 2, 3));
    }
}
