//! Convolutions of videos and of images.

use tch::Tensor;

use super::{FrameStack, Init, Scope, full_precision, prefers_channels_last};
use crate::torch::{
    cast_weight, composed_edges, fixed_conv, fuses, gpu_repeat_edges, has_gpu_kernels, repeat_edges, takes_gpu_path,
    transposed_conv,
};

/// What stands beyond the edge of a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// The edge repeated (the paper's): a shifted video gives shifted latents.
    Replicate,
    /// Nothing.
    Zeros,
}

impl Padding {
    /// Pads F, H, W of `[B, C, F, H, W]` by k − stride each, the larger half in front.
    fn apply(self, x: &Tensor, kernel: i64, stride: [i64; 3]) -> Tensor {
        let front = |s: i64| (kernel - s + 1) / 2;
        let back = |s: i64| (kernel - s) / 2;
        let [f, h, w] = stride;
        let pads = [front(w), back(w), front(h), back(h), front(f), back(f)];
        match self {
            Padding::Zeros => x.constant_pad_nd(pads),
            Padding::Replicate if fuses(x) && prefers_channels_last(x.device()) => repeat_edges(x, pads),
            Padding::Replicate if has_gpu_kernels(x.device()) && prefers_channels_last(x.device()) => {
                gpu_repeat_edges(x, pads)
            }
            Padding::Replicate if takes_gpu_path(x.device()) => composed_edges(x, pads),
            Padding::Replicate => x.replication_pad3d(pads),
        }
    }
}

/// A 3D convolution that keeps the size (divided by its stride).
pub struct Conv3d {
    weight: Tensor,
    bias: Tensor,
    kernel: i64,
    stride: [i64; 3],
    padding: Padding,
}

impl Conv3d {
    /// `[B, inputs, F, H, W]` → `[B, outputs, F/s, H/s, W/s]`
    pub fn new(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, stride: [i64; 3], padding: Padding) -> Self {
        let fan_in = inputs * kernel.pow(3);
        let shape = [outputs, inputs, kernel, kernel, kernel];
        let weight = scope.aliased("conv.weight", "weight", &shape, Init::fan_in(fan_in));
        if prefers_channels_last(scope.device()) {
            scope.store_channels_last("conv.weight");
        }
        Conv3d { weight, bias: scope.parameter("conv.bias", &[outputs], Init::fan_in(fan_in)), kernel, stride, padding }
    }

    /// `[B, inputs, F, H, W]` → `[B, outputs, F/s, H/s, W/s]`
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let x = if self.kernel == 1 { x.shallow_clone() } else { self.padding.apply(x, self.kernel, self.stride) };
        x.conv3d(&cast_weight(&self.weight), Some(&cast_weight(&self.bias)), self.stride, [0, 0, 0], [1, 1, 1], 1)
    }

    /// The kernel, `[outputs, inputs, k, k, k]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

/// The mirror of a strided [`Conv3d`]: multiplies the size by its stride.
pub struct TransposedConv3d {
    weight: Tensor,
    bias: Tensor,
    kernel: i64,
    stride: [i64; 3],
    padding: Padding,
}

impl TransposedConv3d {
    /// `[B, inputs, F, H, W]` → `[B, outputs, F·s, H·s, W·s]`
    pub fn new(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, stride: [i64; 3], padding: Padding) -> Self {
        // PyTorch takes the fan-in of a transposed kernel from its second axis
        let init = Init::fan_in(outputs * kernel.pow(3));
        TransposedConv3d {
            weight: scope.parameter("convt.weight", &[inputs, outputs, kernel, kernel, kernel], init),
            bias: scope.parameter("convt.bias", &[outputs], init),
            kernel,
            stride,
            padding,
        }
    }

    /// `[B, inputs, F, H, W]` → `[B, outputs, F·s, H·s, W·s]`
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.padding.apply(x, self.kernel, self.stride);
        let crop = self.kernel - 1;
        if fuses(&x) {
            return transposed_conv(&x, &self.weight, &self.bias, self.stride, crop);
        }
        let (weight, bias) = (cast_weight(&self.weight), cast_weight(&self.bias));
        x.conv_transpose3d(&weight, Some(&bias), self.stride, [crop; 3], [0, 0, 0], 1, [1, 1, 1])
    }
}

/// A space-only convolution of videos, 1×k×k in a checkpoint (of an image network k×k), run as a 2D convolution of all
/// frames.
pub struct SpatialConv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
}

impl SpatialConv {
    /// A square kernel, and a stride over H and W.
    pub fn new(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, stride: i64) -> Self {
        Self::with_init(scope, inputs, outputs, kernel, stride, Init::fan_in(inputs * kernel * kernel))
    }

    /// Starts as a map to zero, so that a residual block starts as the identity.
    pub fn zero(scope: &Scope, inputs: i64, outputs: i64, kernel: i64) -> Self {
        Self::with_init(scope, inputs, outputs, kernel, 1, Init::ZEROS)
    }

    fn with_init(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, stride: i64, init: Init) -> Self {
        let weight = scope.parameter("weight", &[outputs, inputs, 1, kernel, kernel], init);
        scope.store_channels_last("weight");
        SpatialConv { weight, bias: scope.parameter("bias", &[outputs], init), stride }
    }

    /// Of an image network: its kernel, `[outputs, inputs, k, k]` in a checkpoint, starts as `init` says, the bias at zero.
    pub fn of_images(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, init: Init) -> Self {
        let weight = scope.parameter("weight", &[outputs, inputs, kernel, kernel], init);
        scope.store_channels_last("weight");
        SpatialConv { weight, bias: scope.parameter("bias", &[outputs], Init::ZEROS), stride: 1 }
    }

    /// `[B·F, inputs, H, W]` → `[B·F, outputs, H/s, W/s]`, in mixed precision float32 again: what blocks add up.
    pub fn forward(&self, x: &FrameStack) -> FrameStack {
        let y = self.rounded(x);
        y.with(full_precision(&y.x))
    }

    /// As [`Self::forward`], in mixed precision bfloat16: for what is normalised next, or added to float32.
    pub fn rounded(&self, x: &FrameStack) -> FrameStack {
        let of_frame = |weight: &Tensor| if weight.dim() == 5 { weight.squeeze_dim(2) } else { weight.shallow_clone() };
        let weight = of_frame(&self.weight);
        let padding = weight.size()[2] / 2;
        let y = fixed_conv(&x.x, &weight, Some(&self.bias), self.stride, padding).unwrap_or_else(|| {
            let (weight, bias) = (of_frame(&cast_weight(&self.weight)), cast_weight(&self.bias));
            x.x.conv2d(&weight, Some(&bias), [self.stride; 2], [padding; 2], [1, 1], 1)
        });
        x.with(y)
    }
}

/// A 2D convolution with zero padding.
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: i64,
    padding: i64,
}

impl Conv2d {
    /// Starts as PyTorch does.
    pub fn new(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, stride: i64, padding: i64) -> Self {
        let init = Init::fan_in(inputs * kernel * kernel);
        Self::with_init(scope, [outputs, inputs, kernel, kernel], stride, padding, init, true)
    }

    /// Its kernel, `[outputs, inputs, k, k]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Weights start as N(0, 0.02) (the PatchGAN's initialisation), the bias as PyTorch's default.
    pub fn patch_gan(
        scope: &Scope,
        inputs: i64,
        outputs: i64,
        kernel: i64,
        stride: i64,
        padding: i64,
        bias: bool,
    ) -> Self {
        Self::with_init(scope, [outputs, inputs, kernel, kernel], stride, padding, Init::Normal(0.0, 0.02), bias)
    }

    fn with_init(scope: &Scope, shape: [i64; 4], stride: i64, padding: i64, init: Init, bias: bool) -> Self {
        let fan_in = shape[1] * shape[2] * shape[3];
        Conv2d {
            weight: scope.parameter("weight", &shape, init),
            bias: bias.then(|| scope.parameter("bias", &shape[..1], Init::fan_in(fan_in))),
            stride,
            padding,
        }
    }

    /// `[N, inputs, H, W]` → `[N, outputs, …]`
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (cast_weight(&self.weight), self.bias.as_ref().map(cast_weight));
        x.conv2d(&weight, bias.as_ref(), [self.stride; 2], [self.padding; 2], [1, 1], 1)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        nn::channels_last,
        random::{Purpose, normal},
    };

    #[test]
    fn a_transposed_convolution_and_its_gradients() {
        for stride in [[1, 2, 2], [2, 2, 2]] {
            let run = |kind: tch::Kind| {
                let parameters = crate::nn::Parameters::new(Device::Cpu, 3);
                let conv = TransposedConv3d::new(&parameters.root(), 6, 5, 4, stride, Padding::Replicate);
                parameters.to_kind(kind);
                let x = normal(1, Purpose::Evaluation, 0, 1, &[2, 6, 2, 3, 4]).to_kind(kind).set_requires_grad(true);
                let y = conv.forward(&channels_last(&x));
                (&y * normal(1, Purpose::Evaluation, 0, 2, &y.size()).to_kind(kind)).sum(None).backward();
                [y, x.grad(), conv.weight.grad(), conv.bias.grad()].map(|t| t.to_kind(tch::Kind::Double))
            };
            for (i, (found, wanted)) in run(tch::Kind::Float).iter().zip(&run(tch::Kind::Double)).enumerate() {
                let difference = (found - wanted).norm().double_value(&[]) / wanted.norm().double_value(&[]);
                assert!(difference < 1e-6, "stride {stride:?}, tensor {i}: {difference}");
            }
        }
    }

    /// A GPU's way, which any device can go, in float64 against LibTorch's own gradient; in half precision the sums are
    /// rounded once, where LibTorch rounds each.
    #[test]
    fn edges_of_a_gpu_and_their_gradient() {
        let shape = [2, 3, 4, 5, 6];
        for (pads, other) in [([1, 1, 1, 1, 1, 1], [2, 1, 2, 1, 2, 1]), ([0, 0, 2, 1, 0, 3], [0; 6])] {
            for pads in [pads, other] {
                let run = |kind: tch::Kind, edges: &dyn Fn(&Tensor) -> Tensor| {
                    let x = normal(1, Purpose::Evaluation, 0, 1, &shape).to_kind(kind).set_requires_grad(true);
                    let y = edges(&x);
                    let wanted = normal(1, Purpose::Evaluation, 0, 2, &y.size()).to_kind(tch::Kind::BFloat16);
                    (&y * wanted.to_kind(kind)).sum(None).backward();
                    [y, x.grad()].map(|t| t.to_kind(tch::Kind::Double))
                };
                let wanted = run(tch::Kind::Double, &|x| x.replication_pad3d(pads));
                let layouts: [&dyn Fn(&Tensor) -> Tensor; 2] = [&Tensor::shallow_clone, &channels_last];
                for layout in layouts {
                    for edges in [composed_edges, gpu_repeat_edges] {
                        let found = run(tch::Kind::Double, &|x| edges(&layout(x), pads));
                        for (found, wanted) in found.iter().zip(&wanted) {
                            assert!((found - wanted).abs().max().double_value(&[]) < 1e-12, "{pads:?}");
                        }
                    }
                }
                for edges in [composed_edges, gpu_repeat_edges] {
                    let last = edges(&channels_last(&normal(1, Purpose::Evaluation, 0, 1, &shape)), pads);
                    assert_eq!(last.stride()[1], 1, "channels are brought to the front");
                    let [_, half] = run(tch::Kind::BFloat16, &|x| edges(x, pads));
                    let once = wanted[1].to_kind(tch::Kind::BFloat16).to_kind(tch::Kind::Double);
                    let steps = ((half - &once) / once.abs().clamp_min(1e-3)).abs().max().double_value(&[]);
                    assert!(steps < 0.0079, "{pads:?}: off by more than one step of bfloat16, {steps}");
                }
            }
        }
    }

    /// float32 goes back through our kernel, float64 through LibTorch's.
    #[test]
    fn repeated_edges_and_their_gradient() {
        for (shape, kernel, stride) in [
            ([2, 3, 4, 5, 6], 3, [1, 1, 1]),
            ([1, 8, 1, 2, 7], 4, [1, 2, 2]),
            ([1, 2, 1, 1, 1], 4, [1, 1, 1]),
            ([2, 5, 3, 4, 1], 4, [2, 2, 2]),
        ] {
            let run = |kind: tch::Kind, is_channels_last: bool| {
                let x = normal(1, Purpose::Evaluation, 0, 1, &shape).to_kind(kind).set_requires_grad(true);
                let h = if is_channels_last { channels_last(&x) } else { x.shallow_clone() };
                let y = Padding::Replicate.apply(&h, kernel, stride);
                (&y * normal(1, Purpose::Evaluation, 0, 2, &y.size()).to_kind(kind)).sum(None).backward();
                [y, x.grad()].map(|t| t.to_kind(tch::Kind::Double))
            };
            let wanted = run(tch::Kind::Double, false);
            for is_channels_last in [false, true] {
                for (found, wanted) in run(tch::Kind::Float, is_channels_last).iter().zip(&wanted) {
                    let difference = (found - wanted).abs().max().double_value(&[]);
                    assert!(difference < 1e-5, "{shape:?}, kernel {kernel}, stride {stride:?}: {difference}");
                }
            }
        }
    }
}
