//! How much the frozen networks of losses and metrics compute, counted from shapes as everywhere in this project:
//! convolutions, linear maps and the two products of attention, two operations a multiply-add. Norms, activations and
//! relative positions are left out. A backward pass is counted as two forward passes. Denoisers and codecs count their own
//! ([`NetworkSettings::flops`](crate::networks::NetworkSettings::flops),
//! [`CodecSettings::flops`](crate::codecs::CodecSettings::flops)).

use crate::nn::linear_flops as product;

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

/// Floating-point operations of the convolutions of VGG16 over one image, as LPIPS looks at it.
pub fn vgg16(height: i64, width: i64) -> i64 {
    const GROUPS: [(i64, i64); 5] = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)];
    let (mut total, mut inputs) = (0, 3);
    for (group, (outputs, convolutions)) in GROUPS.into_iter().enumerate() {
        let places = (height >> group) * (width >> group);
        for _ in 0..convolutions {
            total += product(places, 9 * inputs, outputs);
            inputs = outputs;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Usually given as 15.3 billion multiply-adds for the convolutions of an image of 224×224.
    #[test]
    fn vgg16_has_the_usual_number() {
        let found = vgg16(224, 224) as f64 / 2e9;
        assert!((found / 15.35 - 1.0).abs() < 0.01, "{found}");
    }

    /// Usually given as 108 billion multiply-adds for 64 frames.
    #[test]
    fn i3d_has_the_usual_number() {
        let found = i3d(64) as f64 / 2e9;
        assert!((found / 108.0 - 1.0).abs() < 0.05, "{found}");
    }
}
