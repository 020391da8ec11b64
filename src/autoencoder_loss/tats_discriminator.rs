//! TATS' PatchGANs (Ge et al. 2022, arXiv 2204.03638): which patches of a frame, or of space and time, look real.

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::discriminator::{Judged, leaky};
use crate::{
    distributed::Ranks,
    nn::{BatchNorm, Init, Scope, linear_flops},
    torch::Autocast,
};

/// A discriminator of whole clips. The default is TATS' setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct VideoDiscriminatorConfig {
    /// Filters of the first layer.
    pub channels: i64,
    /// Layers that halve frames, height and width; two more follow that keep them.
    pub layers: i64,
    /// Weight of its term beside the image discriminator's, in the updates of both networks.
    pub weight: f64,
}

impl Default for VideoDiscriminatorConfig {
    fn default() -> Self {
        VideoDiscriminatorConfig { channels: 64, layers: 3, weight: 1.0 }
    }
}

/// Most filters of a layer.
const WIDEST: i64 = 512;

/// Filters of a layer, of which the first has so many.
fn width(channels: i64, layer: i64) -> i64 {
    (0..layer).fold(channels, |width, _| (2 * width).min(WIDEST))
}

/// A convolution of 4 places on every axis with 2 places of zeros on every side: n → ⌊n/2⌋ + 1 (stride 2), n + 1 (stride 1).
struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
}

impl Conv {
    fn new(scope: &Scope, axes: usize, inputs: i64, outputs: i64, stride: i64) -> Self {
        let start = Init::fan_in(inputs * 4i64.pow(axes as u32));
        let shape = [&[outputs, inputs], &[4, 4, 4][..axes]].concat();
        Conv {
            weight: scope.parameter("weight", &shape, start),
            bias: scope.parameter("bias", &[outputs], start),
            stride,
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        match x.dim() {
            4 => x.conv2d(&self.weight, Some(&self.bias), [self.stride; 2], [2; 2], [1; 2], 1),
            // the gradient of oneDNN's padded bf16 kernel reads what nobody wrote where clips have few frames
            _ if x.device() == Device::Cpu && Autocast::is_on(Device::Cpu) => {
                let padded = x.constant_pad_nd([2; 6]);
                padded.conv3d(&self.weight, Some(&self.bias), [self.stride; 3], [0; 3], [1; 3], 1)
            }
            _ => x.conv3d(&self.weight, Some(&self.bias), [self.stride; 3], [2; 3], [1; 3], 1),
        }
    }
}

/// Convolutions of 4 places on each axis, batch norm, LeakyReLU 0.2. Names and start are TATS', which are PyTorch's own.
pub struct TatsDiscriminator {
    first: Conv,
    middle: Vec<(Conv, BatchNorm)>,
    last: Conv,
}

impl TatsDiscriminator {
    /// Of frames `[N, inputs, H, W]`; all but the last two of its `layers + 2` halve height and width.
    pub fn of_frames(scope: &Scope, inputs: i64, channels: i64, layers: i64) -> Self {
        Self::new(scope, 2, inputs, channels, layers)
    }

    /// Of clips `[B, inputs, F, H, W]`; all but the last two of its `layers + 2` halve frames, height and width.
    pub fn of_clips(scope: &Scope, inputs: i64, channels: i64, layers: i64) -> Self {
        Self::new(scope, 3, inputs, channels, layers)
    }

    fn new(scope: &Scope, axes: usize, inputs: i64, channels: i64, layers: i64) -> Self {
        let block = |number: i64| scope.sub(format!("model{number}"));
        let width = |layer: i64| width(channels, layer);
        let first = Conv::new(&block(0).sub(0), axes, inputs, channels, 2);
        let middle = (1..=layers)
            .map(|layer| {
                let stride = if layer < layers { 2 } else { 1 };
                let conv = Conv::new(&block(layer).sub(0), axes, width(layer - 1), width(layer), stride);
                (conv, BatchNorm::new(&block(layer).sub(1), width(layer), Init::ONES))
            })
            .collect();
        let last = Conv::new(&block(layers + 1).sub(0), axes, width(layers), 1, 1);
        TatsDiscriminator { first, middle, last }
    }

    /// Floating-point operations over one image `[H, W]` or clip `[F, H, W]` of three channels, two a multiply-add.
    pub fn flops(size: &[i64], channels: i64, layers: i64) -> i64 {
        let (mut size, mut inputs, mut total) = (size.to_vec(), 3, 0);
        for layer in 0..=layers + 1 {
            size.iter_mut().for_each(|n| *n = if layer < layers { *n / 2 + 1 } else { *n + 1 });
            let outputs = if layer > layers { 1 } else { width(channels, layer) };
            total += linear_flops(size.iter().product(), 4i64.pow(size.len() as u32) * inputs, outputs);
            inputs = outputs;
        }
        total
    }

    /// From now on batch norm's batch is that of all ranks together.
    pub fn synchronise(&mut self, ranks: &Ranks) {
        self.middle.iter_mut().for_each(|(_, norm)| norm.synchronise(ranks));
    }

    /// `[N, C, H, W]` or `[B, C, F, H, W]` → one logit a patch, `[N, 1, h, w]` or `[B, 1, f, h, w]`, and the activations of all
    /// layers before; batch norm by the batch's own statistics.
    pub fn judge(&self, x: &Tensor) -> Judged {
        let mut features = vec![leaky(self.first.forward(x))];
        for (conv, norm) in &self.middle {
            let h = features.last().expect("the first layer's");
            features.push(leaky(norm.forward(&conv.forward(h))));
        }
        let logits = self.last.forward(features.last().expect("the first layer's"));
        Judged { features, logits }
    }
}
