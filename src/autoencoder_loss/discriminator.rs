//! PatchGAN (Isola et al. 2017) on single frames: which patches look real.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    distributed::Ranks,
    nn::{BatchNorm, Conv2d, Init, Scope, linear_flops},
};

/// The released setting: three strided layers, 64 filters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct DiscriminatorConfig {
    /// Filters of the first layer.
    pub channels: i64,
    /// Layers between the first and the last; all but the last of these halve height and width.
    pub layers: i64,
}

impl Default for DiscriminatorConfig {
    fn default() -> Self {
        DiscriminatorConfig { channels: 64, layers: 3 }
    }
}

impl DiscriminatorConfig {
    /// Filters of a layer.
    fn width(&self, layer: i64) -> i64 {
        self.channels * (1 << layer.min(3))
    }

    /// Floating-point operations over one image of three channels, two a multiply-add.
    pub fn flops(&self, height: i64, width: i64) -> i64 {
        let (mut size, mut inputs, mut total) = ([height, width], 3, 0);
        for layer in 0..=self.layers + 1 {
            // 4×4 with one place of zeros on every side
            size = size.map(|n| if layer < self.layers { (n - 2) / 2 + 1 } else { n - 1 });
            let outputs = if layer > self.layers { 1 } else { self.width(layer) };
            total += linear_flops(size[0] * size[1], 16 * inputs, outputs);
            inputs = outputs;
        }
        total
    }
}

/// What a discriminator makes of a batch.
pub struct Judged {
    /// The activations after each layer but the last, which feature matching compares.
    pub features: Vec<Tensor>,
    /// One a patch: how real it looks.
    pub logits: Tensor,
}

/// LeakyReLU of slope 0.2.
pub(super) fn leaky(x: Tensor) -> Tensor {
    x.maximum(&(&x * 0.2))
}

/// 4×4 convolutions, batch norm, LeakyReLU 0.2; the names count the released `Sequential`'s places.
pub struct PatchDiscriminator {
    first: Conv2d,
    middle: Vec<(Conv2d, BatchNorm)>,
    last: Conv2d,
}

impl PatchDiscriminator {
    /// For images of `inputs` channels.
    pub fn new(scope: &Scope, inputs: i64, config: &DiscriminatorConfig) -> Self {
        let scope = scope.sub("main");
        let width = |layer: i64| config.width(layer);
        let first = Conv2d::patch_gan(&scope.sub(0), inputs, config.channels, 4, 2, 1, true);
        let middle = (1..=config.layers)
            .map(|layer| {
                let stride = if layer < config.layers { 2 } else { 1 };
                let place = 3 * layer - 1;
                let conv = Conv2d::patch_gan(&scope.sub(place), width(layer - 1), width(layer), 4, stride, 1, false);
                (conv, BatchNorm::new(&scope.sub(place + 1), width(layer), Init::Normal(1.0, 0.02)))
            })
            .collect();
        let last = Conv2d::patch_gan(&scope.sub(3 * config.layers + 2), width(config.layers), 1, 4, 1, 1, true);
        PatchDiscriminator { first, middle, last }
    }

    /// From now on batch norm's batch is that of all ranks together.
    pub fn synchronise(&mut self, ranks: &Ranks) {
        self.middle.iter_mut().for_each(|(_, norm)| norm.synchronise(ranks));
    }

    /// `[N, C, H, W]` → logits `[N, 1, h, w]`, one a patch; batch norm by the batch's own statistics.
    pub fn forward(&self, images: &Tensor) -> Tensor {
        self.judge(images).logits
    }

    /// As [`PatchDiscriminator::forward`], with the activations on the way.
    pub fn judge(&self, images: &Tensor) -> Judged {
        let mut features = vec![leaky(self.first.forward(images))];
        for (conv, norm) in &self.middle {
            let h = features.last().expect("the first layer's");
            features.push(leaky(norm.forward(&conv.forward(h))));
        }
        let logits = self.last.forward(features.last().expect("the first layer's"));
        Judged { features, logits }
    }
}
