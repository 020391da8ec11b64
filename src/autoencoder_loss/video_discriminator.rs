//! PatchGAN on whole clips: which patches of space and time look real (TATS, Ge et al. 2022, arXiv 2204.03638).

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::discriminator::{Judged, leaky};
use crate::{
    distributed::Ranks,
    nn::{BatchNorm, Init, Scope, linear_flops},
};

/// The default is TATS' setting.
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

impl VideoDiscriminatorConfig {
    /// Filters of a layer.
    fn width(&self, layer: i64) -> i64 {
        (0..layer).fold(self.channels, |width, _| (2 * width).min(WIDEST))
    }

    /// Floating-point operations over one clip of three channels, two a multiply-add.
    pub fn flops(&self, frames: i64, height: i64, width: i64) -> i64 {
        let (mut size, mut inputs, mut total) = ([frames, height, width], 3, 0);
        for layer in 0..=self.layers + 1 {
            size = size.map(|n| if layer < self.layers { n / 2 + 1 } else { n + 1 });
            let outputs = if layer > self.layers { 1 } else { self.width(layer) };
            total += linear_flops(size.iter().product(), 64 * inputs, outputs);
            inputs = outputs;
        }
        total
    }
}

/// Most filters of a layer.
const WIDEST: i64 = 512;

/// A convolution of 4×4×4 with 2 places of zeros on every side: n → ⌊n/2⌋ + 1 (stride 2), n + 1 (stride 1).
struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
}

impl Conv {
    fn new(scope: &Scope, inputs: i64, outputs: i64, stride: i64) -> Self {
        let start = Init::fan_in(inputs * 4 * 4 * 4);
        Conv {
            weight: scope.parameter("weight", &[outputs, inputs, 4, 4, 4], start),
            bias: scope.parameter("bias", &[outputs], start),
            stride,
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.conv3d(&self.weight, Some(&self.bias), [self.stride; 3], [2; 3], [1; 3], 1)
    }
}

/// Convolutions of 4×4×4, batch norm, LeakyReLU 0.2. Names and start are TATS', which are PyTorch's own.
pub struct VideoDiscriminator {
    first: Conv,
    middle: Vec<(Conv, BatchNorm)>,
    last: Conv,
}

impl VideoDiscriminator {
    /// For clips of `inputs` channels.
    pub fn new(scope: &Scope, inputs: i64, config: &VideoDiscriminatorConfig) -> Self {
        let block = |number: i64| scope.sub(format!("model{number}"));
        let width = |layer: i64| config.width(layer);
        let first = Conv::new(&block(0).sub(0), inputs, config.channels, 2);
        let middle = (1..=config.layers)
            .map(|layer| {
                let stride = if layer < config.layers { 2 } else { 1 };
                let conv = Conv::new(&block(layer).sub(0), width(layer - 1), width(layer), stride);
                (conv, BatchNorm::new(&block(layer).sub(1), width(layer), Init::ONES))
            })
            .collect();
        let last = Conv::new(&block(config.layers + 1).sub(0), width(config.layers), 1, 1);
        VideoDiscriminator { first, middle, last }
    }

    /// From now on batch norm's batch is that of all ranks together.
    pub fn synchronise(&mut self, ranks: &Ranks) {
        self.middle.iter_mut().for_each(|(_, norm)| norm.synchronise(ranks));
    }

    /// `[B, C, F, H, W]` → logits `[B, 1, f, h, w]`, one a patch, and the activations of all layers before; batch norm
    /// by the batch's own statistics.
    pub fn judge(&self, clips: &Tensor) -> Judged {
        let mut features = vec![leaky(self.first.forward(clips))];
        for (conv, norm) in &self.middle {
            let h = features.last().expect("the first layer's");
            features.push(leaky(norm.forward(&conv.forward(h))));
        }
        let logits = self.last.forward(features.last().expect("the first layer's"));
        Judged { features, logits }
    }
}
