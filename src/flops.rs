//! How much the networks compute, counted from shapes: convolutions, linear maps and the two products of attention,
//! two operations a multiply-add. Norms, activations and relative positions are left out.
//! A backward pass is counted as two forward passes.

use crate::codecs::AutoencoderConfig;
use crate::nn::linear_flops as product;

impl AutoencoderConfig {
    /// Floating-point operations of encoding and of decoding one clip.
    pub fn flops(&self, frames: i64, height: i64, width: i64) -> [i64; 2] {
        let n = self.channels;
        let conv = |rows: i64, kernel: i64, inputs, outputs| product(rows, kernel.pow(3) * inputs, outputs);
        let strides = self.strides();
        let shrink = |size: [i64; 3], stride: &[i64; 3]| [0, 1, 2].map(|axis| size[axis] / stride[axis]);
        let grow = |size: [i64; 3], stride: &[i64; 3]| [0, 1, 2].map(|axis| size[axis] * stride[axis]);
        let rows = |size: [i64; 3]| size.iter().product::<i64>();

        let mut size = [frames, height, width];
        let mut encoder = conv(rows(size), 3, 3, n);
        for (i, stride) in strides.iter().enumerate() {
            size = shrink(size, stride);
            encoder += conv(rows(size), 4, n << i, n << (i + 1)) + 2 * conv(rows(size), 3, n << (i + 1), n << (i + 1));
        }
        encoder += conv(rows(size), 3, n << strides.len(), 2 * self.z_channels);
        encoder += conv(rows(size), 1, 2 * self.z_channels, 2 * self.latent_channels);

        let mut decoder = conv(rows(size), 1, self.latent_channels, self.z_channels);
        let mut inputs = self.z_channels;
        for (i, stride) in strides.iter().enumerate() {
            let outputs = n << (strides.len() - i);
            // each input meets the whole kernel
            decoder += conv(rows(size), 4, inputs, outputs);
            size = grow(size, stride);
            decoder += 4 * conv(rows(size), 3, outputs, outputs);
            inputs = outputs;
        }
        [encoder, decoder + conv(rows(size), 3, inputs, 3)]
    }
}

/// Floating-point operations of I3D over one video, which it resizes to 224×224.
pub fn i3d(frames: i64) -> i64 {
    // widths of an Inception block: 1×1, 1×1 → 3×3×3, 1×1 → 3×3×3, 1×1 behind the pooling
    const BLOCKS: [([i64; 6], bool); 9] = [
        ([64, 96, 128, 16, 32, 32], false),
        ([128, 128, 192, 32, 96, 64], true),
        ([192, 96, 208, 16, 48, 64], false),
        ([160, 112, 224, 24, 64, 64], false),
        ([128, 128, 256, 24, 64, 64], false),
        ([112, 144, 288, 32, 64, 64], false),
        ([256, 160, 320, 32, 128, 128], true),
        ([256, 160, 320, 32, 128, 128], false),
        ([384, 192, 384, 48, 128, 128], false),
    ];
    let half = |x: i64| (x + 1) / 2;
    let mut f = half(frames);
    let mut total = product(f * 112 * 112, 343 * 3, 64);
    let mut side: i64 = 56;
    total += product(f * side * side, 64, 64) + product(f * side * side, 27 * 64, 192);
    side = 28;
    let mut inputs = 192;
    for ([a, b, b3, c, c3, d], pooled_after) in BLOCKS {
        let rows = f * side * side;
        total += product(rows, inputs, a + b + c + d) + product(rows, 27 * b, b3) + product(rows, 27 * c, c3);
        inputs = a + b3 + c3 + d;
        if pooled_after {
            (f, side) = (half(f), half(side));
        }
    }
    total + product(1, inputs, 400)
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

    /// Usually given as 108 billion multiply-adds for 64 frames.
    #[test]
    fn i3d_has_the_usual_number() {
        let found = i3d(64) as f64 / 2e9;
        assert!((found / 108.0 - 1.0).abs() < 0.05, "{found}");
    }
}
