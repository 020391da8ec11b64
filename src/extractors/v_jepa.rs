//! V-JEPA (Bardes et al. 2024, arXiv 2404.08471), an encoder that learned to predict features of hidden parts of a video.
//! Distances of its features need fewer clips than FVD does (JEDi, Luo et al. 2024, arXiv 2410.05203).
//!
//! As there, without the probe that was trained on labels: the target encoder (ViT-H/16 of `vith16.pth.tar`; ViT-L/16 is
//! the same code), pixels normalised by ImageNet's mean and deviation at 224², the mean of all tokens after the last
//! norm. Positions come from the file; other lengths than 16 frames get them stretched over time. No package carries the
//! weights.

use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    FeatureExtractor,
    brought::{Brought, BroughtFile},
    feature_extractor::ensure_videos,
    video_transformer::{Architecture, Biases, FRAMES, Norm, VideoTransformer, sinusoids, stretched},
};
use crate::{
    nn::{Init, Parameters},
    torch::{Autocast, upload},
};

/// The weights, which a user brings.
pub static V_JEPA: Brought = Brought {
    kind: "v_jepa",
    content: "V-JEPA, the network of JEDi",
    published: "the checkpoint vith16.pth.tar of V-JEPA (facebookresearch/jepa)",
    state: Some("target_encoder"),
    check: |file| VJepa::new(file, Device::Cpu).map(drop),
};

/// Mean and standard deviation of a channel in [0, 1], ImageNet's.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// The target encoder, frozen, in float32.
pub struct VJepa {
    encoder: VideoTransformer,
    norm: Norm,
    /// `[1, N, width]` of a clip of 16 frames.
    positions: Tensor,
    /// `[1, 3, 1, 1, 1]` each.
    mean: Tensor,
    deviation: Tensor,
    sha256: String,
}

impl VJepa {
    /// Loads the weights that `lvdm weights add` put in their place, or a user's own file.
    ///
    /// # Errors
    /// The file is not there, is damaged, or belongs to another network.
    pub fn load(file: Option<&Path>, device: Device) -> Result<Self> {
        V_JEPA.open(file, |file| VJepa::new(file, device))
    }

    /// Of the tensors of a released file.
    ///
    /// # Errors
    /// They belong to another network.
    pub fn new(mut file: BroughtFile, device: Device) -> Result<Self> {
        let architecture = Architecture::from_shapes(&file.shapes(), Biases::Joint)?;
        let grid = architecture.grid(FRAMES);
        // fixed, and in every released checkpoint
        file.tensors.entry("pos_embed".into()).or_insert_with(|| positions(grid, architecture.width));
        let parameters = Parameters::unfilled(device);
        let root = parameters.root();
        let encoder = VideoTransformer::new(&root, &architecture);
        let norm = Norm::new(&root.sub("norm"), architecture.width);
        let positions = root.parameter("pos_embed", &[1, grid.iter().product(), architecture.width], Init::ZEROS);
        parameters.fill(file.tensors)?;
        parameters.freeze();
        let constant = |values: [f32; 3]| upload(&Tensor::from_slice(&values).view([1, 3, 1, 1, 1]), device);
        let (mean, deviation) = (constant(MEAN), constant(DEVIATION));
        Ok(VJepa { encoder, norm, positions, mean, deviation, sha256: file.sha256 })
    }

    fn forward(&self, videos: &Tensor) -> Tensor {
        let architecture = self.encoder.architecture();
        let (trained, [frames, ..]) = (architecture.grid(FRAMES), architecture.grid(videos.size()[1]));
        let positions = stretched(&self.positions, trained, frames, frames as f64 / trained[0] as f64);
        let tokens = self.encoder.tokens(videos, &positions, |x| (x - &self.mean) / &self.deviation);
        self.norm.forward(&tokens).mean_dim([1i64].as_slice(), false, Kind::Float)
    }
}

/// The fixed table `[1, f·h·w, width]`: half of a token's numbers tell its time, a quarter its row, a quarter its column.
fn positions([f, h, w]: [i64; 3], width: i64) -> Tensor {
    let along = |axis: i64, length: i64, share: i64| {
        let mut shape = [1, 1, 1, width / share];
        shape[axis as usize] = length;
        let index = Tensor::arange(length, (Kind::Double, Device::Cpu));
        sinusoids(&index, width / share, false).view(shape).expand([f, h, w, width / share], false)
    };
    let table = Tensor::cat(&[along(0, f, 2), along(1, h, 4), along(2, w, 4)], 3);
    table.reshape([1, f * h * w, width]).to_kind(Kind::Float)
}

impl FeatureExtractor for VJepa {
    fn name(&self) -> &str {
        "V-JEPA mean of tokens"
    }

    fn weights_sha256(&self) -> &str {
        &self.sha256
    }

    fn width(&self) -> i64 {
        self.encoder.architecture().width
    }

    fn least_frames(&self) -> i64 {
        self.encoder.architecture().tube
    }

    fn preparation(&self) -> &str {
        "resized to 224×224, bilinear without antialiasing"
    }

    fn features(&self, videos: &Tensor) -> Result<Tensor> {
        ensure_videos("V-JEPA", videos, self.least_frames())?;
        let _precision = Autocast::bfloat16(self.positions.device(), false);
        Ok(no_grad(|| self.encoder.in_pieces(videos, |videos| self.forward(videos))))
    }
}
