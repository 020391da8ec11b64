//! The convolutions of VGG16 (Simonyan & Zisserman 2015, arXiv 1409.1556), which learned from ImageNet: what LPIPS and the
//! frame distance look at. The file of weights is LPIPS's.

use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::{Device, Kind, Tensor, no_grad};

use crate::torch::{upload, without_memory};
use crate::weights::{
    numpy::{Arrays, read_arrays},
    released::LPIPS_VGG16,
};

/// Output channels of the convolutions; a new group begins with a halving of the image.
const GROUPS: [&[i64]; 5] = [&[64, 64], &[128, 128], &[256, 256, 256], &[512, 512, 512], &[512, 512, 512]];

/// Mean and standard deviation of a channel of the images in [-1, 1] that VGG16 learned from.
const SHIFT: [f64; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f64; 3] = [0.458, 0.448, 0.450];

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

/// The convolutions, frozen.
pub struct Vgg16 {
    groups: Vec<Vec<Conv>>,
    shift: Tensor,
    scale: Tensor,
}

/// What the file of weights holds.
pub struct Loaded {
    /// The convolutions.
    pub vgg: Vgg16,
    /// LPIPS's heads: how much a squared difference in each channel of a group counts, `[C, 1, 1]`.
    pub heads: Vec<Tensor>,
    /// The hash of the file.
    pub sha256: String,
}

impl Vgg16 {
    /// Channels of the last group's activations.
    pub const WIDTH: i64 = 512;

    /// Loads the released weights, or a user's own file of the same layout, in this precision.
    ///
    /// # Errors
    /// The file is not there, is damaged, or belongs to another network.
    pub fn load(path: Option<&Path>, device: Device, kind: Kind) -> Result<Loaded> {
        let file = LPIPS_VGG16.read(path)?;
        let place = file.path.display();
        let arrays = read_arrays(&file.bytes).with_context(|| format!("{place} is no pickle of arrays"))?;
        let mut arrays = arrays.to(device);
        let (vgg, heads) = no_grad(|| Vgg16::build(&mut arrays, device, kind))
            .with_context(|| format!("{place} holds the weights of another network than LPIPS on VGG16"))?;
        Ok(Loaded { vgg, heads, sha256: file.sha256 })
    }

    /// With weights that have shapes and no memory, and heads for [`Loaded::heads`] alike: so that what it does in training can be
    /// counted without its file ([`by_shapes`](crate::torch::by_shapes)).
    pub(super) fn unfilled() -> (Self, Vec<Tensor>) {
        let weights = |shape: &[i64]| without_memory(shape, Kind::Float);
        let mut inputs = 3;
        let mut conv = |outputs: i64| {
            let weight = weights(&[outputs, inputs, 3, 3]);
            inputs = outputs;
            Conv { weight, bias: weights(&[outputs]) }
        };
        let groups = GROUPS.iter().map(|group| group.iter().map(|&outputs| conv(outputs)).collect()).collect();
        let heads = GROUPS.iter().map(|group| weights(&[group[0], 1, 1])).collect();
        let constant = |values: [f64; 3]| Tensor::from_slice(&values).to_kind(Kind::Float).view([3, 1, 1]);
        (Vgg16 { groups, shift: constant(SHIFT), scale: constant(SCALE) }, heads)
    }

    /// How many numbers its weights are.
    pub fn parameters(&self) -> i64 {
        self.groups.iter().flatten().map(|conv| (conv.weight.numel() + conv.bias.numel()) as i64).sum()
    }

    fn build(file: &mut Arrays, device: Device, kind: Kind) -> Result<(Self, Vec<Tensor>)> {
        let place = |t: &Tensor| t.to_kind(kind).to_device(device);
        let (mut index, mut width) = (0, 3);
        let (mut groups, mut heads) = (Vec::new(), Vec::new());
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
            groups.push(convs);
            let head = file.take(&format!("NetLinLayer_{number}/Conv_0/kernel"))?;
            if head.size() != [1, 1, width, 1] {
                bail!("head {number} of LPIPS has shape {:?}", head.size());
            }
            heads.push(place(&head.view([width, 1, 1])));
        }
        file.all_taken()?;
        let constant = |values: [f64; 3]| place(&upload(&Tensor::from_slice(&values).view([3, 1, 1]), device));
        Ok((Vgg16 { groups, shift: constant(SHIFT), scale: constant(SCALE) }, heads))
    }

    /// What `each` makes of the activations at the end of each group, of images `[N, 3, H, W]` in [-1, 1], at least 16×16
    /// large.
    pub fn map_groups<T>(&self, images: &Tensor, mut each: impl FnMut(&Tensor) -> T) -> Vec<T> {
        let mut x = (images - &self.shift) / &self.scale;
        let mut made = Vec::with_capacity(GROUPS.len());
        for (number, convs) in self.groups.iter().enumerate() {
            if number > 0 {
                x = x.max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
            }
            for conv in convs {
                x = conv.forward(&x);
            }
            made.push(each(&x));
        }
        made
    }

    /// The activations `[N, 512, H/16, W/16]` at the end of the last group.
    pub fn last_group(&self, images: &Tensor) -> Tensor {
        let mut last = None;
        self.map_groups(images, |x| last = Some(x.shallow_clone()));
        last.expect("five groups")
    }
}
