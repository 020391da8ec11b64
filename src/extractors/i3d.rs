//! I3D, the Inception network for videos that FVD is defined by (Carreira & Zisserman 2017,
//! arXiv 1705.07750), with the original weights of Kinetics-400.
//!
//! Inside, activations `[B, C, F, H, W]` lie in memory with channels last, which is what the CPU's
//! convolutions and poolings are several times faster with.

use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::{Device, Kind, Tensor, no_grad};

use super::{FeatureExtractor, feature_extractor::ensure_videos};
use crate::{
    torch::{Autocast, upload},
    weights::{
        numpy::{Arrays, read_arrays},
        released::I3D_KINETICS_400,
    },
};

/// Videos are resized to this height and width.
const SIDE: i64 = 224;

/// Frames that go through the network at once, which bounds its memory (4 MB a frame).
const FRAMES_AT_ONCE: i64 = 64;

/// Batch norm's, as in Sonnet.
const EPSILON: f64 = 1e-3;

/// A convolution with "SAME" padding and batch norm folded into it, then a rectifier.
struct Unit {
    weight: Tensor,
    bias: Tensor,
    kernel: i64,
    stride: i64,
}

impl Unit {
    fn load(file: &mut Arrays, name: &str, kernel: i64, stride: i64, device: Device) -> Result<Unit> {
        let weight = file.take(&format!("params/{name}/Conv_0/kernel"))?.to_kind(Kind::Double);
        let mut statistic =
            |path: String| -> Result<Tensor> { Ok(file.take(&path)?.to_kind(Kind::Double).flatten(0, -1)) };
        let shift = statistic(format!("params/{name}/BatchNorm_0/bias"))?;
        let mean = statistic(format!("batch_stats/{name}/BatchNorm_0/mean"))?;
        let variance = statistic(format!("batch_stats/{name}/BatchNorm_0/var"))?;
        let width = weight.size().last().copied().unwrap_or(0);
        if weight.dim() != 5 || weight.size()[..3] != [kernel; 3] {
            bail!("{name} needs a kernel of {kernel}×{kernel}×{kernel}, the file has shape {:?}", weight.size());
        }
        if [&shift, &mean, &variance].iter().any(|t| t.size() != [width]) {
            bail!("the batch norm of {name} is not {width} wide");
        }
        let scale = (variance + EPSILON).rsqrt();
        let bias = shift - mean * &scale;
        // [kt, kh, kw, in, out] → [out, in, kt, kh, kw]
        let weight = (weight * scale).permute([4, 3, 0, 1, 2]);
        let place = |t: &Tensor| t.to_kind(Kind::Float).to_device(device);
        Ok(Unit { weight: channels_last(&place(&weight)), bias: place(&bias), kernel, stride })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (_, _, f, h, w) = x.size5().expect("an activation [B, C, F, H, W]");
        let [t, h, w] = [f, h, w].map(|size| same_padding(size, self.kernel, self.stride));
        let stride = [self.stride; 3];
        let mut y = if [t, h, w].iter().all(|(before, after)| before == after) {
            x.conv3d(&self.weight, Some(&self.bias), stride, [t.0, h.0, w.0], [1; 3], 1)
        } else {
            let x = channels_last(&x.constant_pad_nd([w.0, w.1, h.0, h.1, t.0, t.1]));
            x.conv3d(&self.weight, Some(&self.bias), stride, [0; 3], [1; 3], 1)
        };
        y.relu_()
    }
}

/// Four branches over the same input, their channels one after the other.
struct Inception {
    branch_0: Unit,
    branch_1: [Unit; 2],
    branch_2: [Unit; 2],
    branch_3: Unit,
}

impl Inception {
    fn load(file: &mut Arrays, name: &str, device: Device) -> Result<Inception> {
        let mut unit = |unit: &str, kernel| Unit::load(file, &format!("{name}/{unit}"), kernel, 1, device);
        Ok(Inception {
            branch_0: unit("Branch_0/Conv3d_0a_1x1", 1)?,
            branch_1: [unit("Branch_1/Conv3d_0a_1x1", 1)?, unit("Branch_1/Conv3d_0b_3x3", 3)?],
            branch_2: [unit("Branch_2/Conv3d_0a_1x1", 1)?, unit("Branch_2/Conv3d_0b_3x3", 3)?],
            branch_3: unit("Branch_3/Conv3d_0b_1x1", 1)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let two = |[first, second]: &[Unit; 2]| second.forward(&first.forward(x));
        let pooled = max_pool(x, [3, 3, 3], [1, 1, 1]);
        let branches =
            [self.branch_0.forward(x), two(&self.branch_1), two(&self.branch_2), self.branch_3.forward(&pooled)];
        Tensor::cat(&branches, 1)
    }
}

/// One of the layers between input and average pooling.
enum Layer {
    Unit(Unit),
    /// Kernel and stride over (F, H, W).
    MaxPool([i64; 3], [i64; 3]),
    Inception(Inception),
}

impl Layer {
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Layer::Unit(unit) => unit.forward(x),
            Layer::MaxPool(kernel, stride) => max_pool(x, *kernel, *stride),
            Layer::Inception(inception) => inception.forward(x),
        }
    }
}

/// The network up to its logits, frozen, in float32.
pub struct I3d {
    layers: Vec<Layer>,
    /// [400, 1024]
    logits_weight: Tensor,
    logits_bias: Tensor,
    device: Device,
    sha256: String,
}

impl I3d {
    /// Width of the logits.
    pub const CLASSES: i64 = 400;

    /// Shorter videos leave nothing for the last pooling over two steps of time.
    pub const MIN_FRAMES: i64 = 9;

    /// Loads the released weights, or a user's own file of the same layout.
    ///
    /// # Errors
    /// The file is not there, is damaged, or belongs to another network.
    pub fn load(path: Option<&Path>, device: Device) -> Result<I3d> {
        let file = I3D_KINETICS_400.read(path)?;
        let place = file.path.display();
        let arrays = read_arrays(&file.bytes).with_context(|| format!("{place} is no pickle of arrays"))?;
        let mut arrays = arrays.to(device);
        no_grad(|| I3d::build(&mut arrays, device, file.sha256))
            .with_context(|| format!("{place} holds the weights of another network than I3D"))
    }

    fn build(file: &mut Arrays, device: Device, sha256: String) -> Result<I3d> {
        let mut layers = vec![
            Layer::Unit(Unit::load(file, "Conv3d_1a_7x7", 7, 2, device)?),
            Layer::MaxPool([1, 3, 3], [1, 2, 2]),
            Layer::Unit(Unit::load(file, "Conv3d_2b_1x1", 1, 1, device)?),
            Layer::Unit(Unit::load(file, "Conv3d_2c_3x3", 3, 1, device)?),
            Layer::MaxPool([1, 3, 3], [1, 2, 2]),
        ];
        for name in ["Mixed_3b", "Mixed_3c"] {
            layers.push(Layer::Inception(Inception::load(file, name, device)?));
        }
        layers.push(Layer::MaxPool([3, 3, 3], [2, 2, 2]));
        for name in ["Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"] {
            layers.push(Layer::Inception(Inception::load(file, name, device)?));
        }
        layers.push(Layer::MaxPool([2, 2, 2], [2, 2, 2]));
        for name in ["Mixed_5b", "Mixed_5c"] {
            layers.push(Layer::Inception(Inception::load(file, name, device)?));
        }
        let logits_weight = file.take("params/Logits/Conv3d_0c_1x1/Conv_0/kernel")?;
        let logits_bias = file.take("params/Logits/Conv3d_0c_1x1/Conv_0/bias")?;
        if logits_weight.size() != [1, 1, 1, 1024, I3d::CLASSES] || logits_bias.size() != [I3d::CLASSES] {
            bail!("the logits have shape {:?}", logits_weight.size());
        }
        file.all_taken()?;
        let place = |t: Tensor| t.to_kind(Kind::Float).to_device(device).contiguous();
        let logits_weight = place(logits_weight.reshape([1024, I3d::CLASSES]).tr());
        Ok(I3d { layers, logits_weight, logits_bias: place(logits_bias), device, sha256 })
    }

    /// The hash of the file that was loaded.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Logits `[N, 400]` in float32 of u8 videos `[N, F, H, W, 3]`, F ≥ 9, which may lie on any device;
    /// averaged over time. A video's logits do not depend on the others.
    pub fn logits(&self, videos: &Tensor) -> Tensor {
        let (n, f) = (videos.size()[0], videos.size()[1]);
        assert!(f >= I3d::MIN_FRAMES, "I3D needs {} frames, these videos have {f}", I3d::MIN_FRAMES);
        let at_once = (FRAMES_AT_ONCE / f).max(1);
        let _precision = Autocast::bfloat16(self.device, false);
        no_grad(|| {
            let chunks: Vec<Tensor> = (0..n)
                .step_by(at_once as usize)
                .map(|from| self.forward(&videos.narrow(0, from, at_once.min(n - from))))
                .collect();
            match chunks.is_empty() {
                true => Tensor::zeros([0, I3d::CLASSES], (Kind::Float, self.device)),
                false => Tensor::cat(&chunks, 0),
            }
        })
    }

    fn forward(&self, videos: &Tensor) -> Tensor {
        let mut x = prepare(&upload(videos, self.device));
        for layer in &self.layers {
            x = layer.forward(&x);
        }
        // windows of 2×7×7, then the mean over them; both are means, so the logits may come last
        let x = x.avg_pool3d([2, 7, 7], [1, 1, 1], [0; 3], false, true, None::<i64>); // [B, 1024, F', 1, 1]
        x.mean_dim([2i64, 3, 4].as_slice(), false, Kind::Float).linear(&self.logits_weight, Some(&self.logits_bias))
    }
}

impl FeatureExtractor for I3d {
    fn name(&self) -> &str {
        "I3D (Kinetics-400) logits"
    }

    fn weights_sha256(&self) -> &str {
        self.sha256()
    }

    fn width(&self) -> i64 {
        I3d::CLASSES
    }

    fn least_frames(&self) -> i64 {
        I3d::MIN_FRAMES
    }

    fn preparation(&self) -> &str {
        "clips to 224x224 bilinear without antialias"
    }

    fn features(&self, videos: &Tensor) -> Result<Tensor> {
        ensure_videos("I3D", videos, I3d::MIN_FRAMES)?;
        Ok(self.logits(videos))
    }
}

/// u8 `[B, F, H, W, 3]` to `[B, 3, F, 224, 224]` in [-1, 1], resized bilinearly without antialiasing.
fn prepare(videos: &Tensor) -> Tensor {
    let (b, f, h, w, c) = videos.size5().expect("videos [N, F, H, W, 3]");
    let x = videos.reshape([b * f, h, w, c]).to_kind(Kind::Float).permute([0, 3, 1, 2]);
    let x = match (h, w) {
        (SIDE, SIDE) => x,
        _ => x.upsample_bilinear2d([SIDE, SIDE], false, None, None),
    };
    let x = x / 127.5 - 1.0;
    // in memory [B, F, H, W, C]
    x.permute([0, 2, 3, 1]).contiguous().view([b, f, SIDE, SIDE, c]).permute([0, 4, 1, 2, 3])
}

/// TensorFlow's "SAME" padding, (before, after): the output has ⌈size / stride⌉ places, and what is
/// missing for that is split evenly, the odd one after.
fn same_padding(size: i64, kernel: i64, stride: i64) -> (i64, i64) {
    let places = (size + stride - 1) / stride;
    let total = ((places - 1) * stride + kernel - size).max(0);
    (total / 2, total - total / 2)
}

/// Maximum over windows with "SAME" padding: the even part of the padding is LibTorch's own, the odd place
/// at the end is a window that reaches over the edge, which the rounding up of the size allows.
fn max_pool(x: &Tensor, kernel: [i64; 3], stride: [i64; 3]) -> Tensor {
    let size = x.size();
    let padding: Vec<i64> = (0..3).map(|i| same_padding(size[i + 2], kernel[i], stride[i]).0).collect();
    x.max_pool3d(kernel, stride, padding, [1; 3], true)
}

/// The same tensor `[B, C, F, H, W]`, in memory `[B, F, H, W, C]`.
fn channels_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 4, 1]).contiguous().permute([0, 4, 1, 2, 3])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_padding_as_tensorflow_defines_it() {
        assert_eq!(same_padding(224, 7, 2), (2, 3));
        assert_eq!(same_padding(15, 7, 2), (3, 3));
        assert_eq!(same_padding(112, 3, 2), (0, 1));
        assert_eq!(same_padding(28, 3, 1), (1, 1));
        assert_eq!(same_padding(5, 2, 2), (0, 1));
        assert_eq!(same_padding(4, 2, 2), (0, 0));
        assert_eq!(same_padding(9, 1, 1), (0, 0));
    }

    /// Against padding by hand with values that never win, over even and odd sizes.
    #[test]
    fn max_pool_pads_like_a_padded_input() {
        for (kernel, stride) in
            [([3, 3, 3], [2, 2, 2]), ([1, 3, 3], [1, 2, 2]), ([2, 2, 2], [2, 2, 2]), ([3; 3], [1; 3])]
        {
            for size in 1..=9 {
                let x = Tensor::arange(2 * size * 6 * 7, (Kind::Float, Device::Cpu)).sin().view([1, 2, size, 6, 7]);
                let pads: Vec<(i64, i64)> =
                    (0..3).map(|i| same_padding(x.size()[i + 2], kernel[i], stride[i])).collect();
                let flat = [pads[2].0, pads[2].1, pads[1].0, pads[1].1, pads[0].0, pads[0].1];
                let padded = x.pad(flat, "constant", f64::NEG_INFINITY);
                let expected = padded.max_pool3d(kernel, stride, [0; 3], [1; 3], false);
                assert_eq!(max_pool(&x, kernel, stride), expected, "{kernel:?} {stride:?} {size} frames");
            }
        }
    }
}
