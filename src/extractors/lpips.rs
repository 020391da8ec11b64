//! LPIPS, the perceptual distance of images (Zhang et al. 2018, arXiv 1801.03924), on VGG16.

use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::{Device, Kind, Tensor, no_grad};

use crate::torch::{Autocast, upload};
use crate::weights::{
    numpy::{Arrays, read_arrays},
    released::LPIPS_VGG16,
};

/// Output channels of VGG16's convolutions; a new group begins with a halving of the image and ends
/// with a comparison.
const GROUPS: [&[i64]; 5] = [&[64, 64], &[128, 128], &[256, 256, 256], &[512, 512, 512], &[512, 512, 512]];

/// Mean and standard deviation of a channel of the images in [-1, 1] that VGG16 learned from.
const SHIFT: [f64; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f64; 3] = [0.458, 0.448, 0.450];

/// Keeps the division by a feature vector's length defined.
const EPSILON: f64 = 1e-10;

/// A 3×3 convolution and a rectifier.
struct Conv {
    weight: Tensor,
    bias: Tensor,
}

impl Conv {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.conv2d(&self.weight, Some(&self.bias), [1, 1], [1, 1], [1, 1], 1).relu_()
    }
}

struct Group {
    convs: Vec<Conv>,
    /// How much a squared difference in each channel counts, `[C, 1, 1]`.
    head: Tensor,
}

/// VGG16 and the heads, frozen: gradients reach the images and nothing else.
pub struct Lpips {
    groups: Vec<Group>,
    shift: Tensor,
    scale: Tensor,
    sha256: String,
}

impl Lpips {
    /// Loads the released weights, or a user's own file of the same layout, in this precision.
    ///
    /// # Errors
    /// The file is not there, is damaged, or belongs to another network.
    pub fn load(path: Option<&Path>, device: Device, kind: Kind) -> Result<Lpips> {
        let file = LPIPS_VGG16.read(path)?;
        let place = file.path.display();
        let arrays = read_arrays(&file.bytes).with_context(|| format!("{place} is no pickle of arrays"))?;
        let mut arrays = arrays.to(device);
        no_grad(|| Lpips::build(&mut arrays, device, kind, file.sha256))
            .with_context(|| format!("{place} holds the weights of another network than LPIPS on VGG16"))
    }

    fn build(file: &mut Arrays, device: Device, kind: Kind, sha256: String) -> Result<Lpips> {
        let place = |t: &Tensor| t.to_kind(kind).to_device(device);
        let (mut index, mut width) = (0, 3);
        let mut groups = Vec::new();
        for (number, outputs) in GROUPS.into_iter().enumerate() {
            let mut convs = Vec::new();
            for &out in outputs {
                let weight = file.take(&format!("VGG16_0/Conv_{index}/kernel"))?;
                let bias = file.take(&format!("VGG16_0/Conv_{index}/bias"))?;
                if weight.size() != [3, 3, width, out] || bias.size() != [out] {
                    bail!("VGG16's convolution {index} has shape {:?}", weight.size());
                }
                // [kh, kw, in, out] → [out, in, kh, kw], in memory [out, kh, kw, in]
                let weight = place(&weight).permute([3, 0, 1, 2]).contiguous().permute([0, 3, 1, 2]);
                convs.push(Conv { weight, bias: place(&bias) });
                (index, width) = (index + 1, out);
            }
            let head = file.take(&format!("NetLinLayer_{number}/Conv_0/kernel"))?;
            if head.size() != [1, 1, width, 1] {
                bail!("head {number} of LPIPS has shape {:?}", head.size());
            }
            groups.push(Group { convs, head: place(&head.view([width, 1, 1])) });
        }
        file.all_taken()?;
        let constant = |values: [f64; 3]| place(&upload(&Tensor::from_slice(&values).view([3, 1, 1]), device));
        Ok(Lpips { groups, shift: constant(SHIFT), scale: constant(SCALE), sha256 })
    }

    /// The hash of the file that was loaded.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The distance `[N]` of images `[N, 3, H, W]` in [-1, 1], at least 16×16 large. Gradients flow to
    /// those of `a` and `b` that ask for them. Never in mixed precision: differences of like features drown in it.
    pub fn distance(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(a.device(), false);
        self.compare(self.features(a), self.features(b))
    }

    /// As [`Lpips::distance`], where the target is a constant: nothing of it is kept for a backward pass.
    pub fn distance_to(&self, target: &Tensor, b: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(b.device(), false);
        self.compare(no_grad(|| self.features(target)), self.features(b))
    }

    fn compare(&self, a: Vec<Tensor>, b: Vec<Tensor>) -> Tensor {
        let terms = self.groups.iter().zip(a.iter().zip(&b)).map(|(group, (a, b))| {
            let kind = a.kind();
            ((a - b).square() * &group.head).sum_dim_intlist([1i64].as_slice(), false, kind).mean_dim(
                [1i64, 2].as_slice(),
                false,
                kind,
            )
        });
        terms.reduce(|sum, term| sum + term).expect("five groups")
    }

    /// The activations at the end of each group, every pixel's vector of length 1.
    fn features(&self, images: &Tensor) -> Vec<Tensor> {
        let mut x = (images - &self.shift) / &self.scale;
        let mut features = Vec::with_capacity(GROUPS.len());
        for (number, group) in self.groups.iter().enumerate() {
            if number > 0 {
                x = x.max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
            }
            for conv in &group.convs {
                x = conv.forward(&x);
            }
            features.push(unit_length(&x));
        }
        features
    }
}

/// x / (‖x‖ + ε) over channels. Where a pixel's vector is 0 the root has no slope, and the result's
/// gradient must not become NaN for it: the square is kept above what a float can be the square of.
fn unit_length(x: &Tensor) -> Tensor {
    let square = x.square().sum_dim_intlist([1i64].as_slice(), true, x.kind());
    x / (square.clamp_min(1e-30).sqrt() + EPSILON)
}
