//! VideoMAE-v2 (Wang et al. 2023, arXiv 2303.16727), whose features the content-debiased FVD compares (Ge et al. 2024,
//! arXiv 2404.12391): an encoder that learned from masked videos weighs motion more than I3D, a classifier, does.
//!
//! As there: ViT-g/14 that was fine-tuned on Something-Something v2 (`vit_g_hybrid_pt_1200e_ssv2_ft.pth`), pixels in
//! [0, 1] without normalisation at 224², the mean of all tokens after the last block, then the layer norm before the
//! classifier. Other lengths than 16 frames get positions that are stretched over time. No package carries the weights.

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
    nn::Parameters,
    torch::{Autocast, upload},
};

/// The weights, which a user brings.
pub static VIDEO_MAE_V2: Brought = Brought {
    kind: "video_mae_v2",
    content: "VideoMAE-v2, the network of the content-debiased FVD",
    published: "the fine-tuned ViT-g/14 of VideoMAE-v2, vit_g_hybrid_pt_1200e_ssv2_ft.pth of OpenGVLab",
    state: None,
    check: |file| VideoMae::new(file, Device::Cpu).map(drop),
};

/// The network up to the classifier, frozen, in float32.
pub struct VideoMae {
    encoder: VideoTransformer,
    fc_norm: Norm,
    /// `[1, N, width]` of a clip of 16 frames.
    positions: Tensor,
    sha256: String,
}

impl VideoMae {
    /// Loads the weights that `lvdm weights add` put in their place, or a user's own file.
    ///
    /// # Errors
    /// The file is not there, is damaged, or belongs to another network.
    pub fn load(file: Option<&Path>, device: Device) -> Result<Self> {
        VIDEO_MAE_V2.open(file, |file| VideoMae::new(file, device))
    }

    /// Of the tensors of a released file.
    ///
    /// # Errors
    /// They belong to another network.
    pub fn new(mut file: BroughtFile, device: Device) -> Result<Self> {
        // of the classifier
        file.tensors.retain(|name, _| !name.starts_with("head."));
        let architecture = Architecture::from_shapes(&file.shapes(), Biases::QueriesAndValues)?;
        let parameters = Parameters::unfilled(device);
        let root = parameters.root();
        let encoder = VideoTransformer::new(&root, &architecture);
        let fc_norm = Norm::new(&root.sub("fc_norm"), architecture.width);
        parameters.fill(file.tensors)?;
        parameters.freeze();
        let [f, h, w] = architecture.grid(FRAMES);
        let places = Tensor::arange(f * h * w, (Kind::Double, Device::Cpu));
        let positions = sinusoids(&places, architecture.width, true).to_kind(Kind::Float).unsqueeze(0);
        let positions = upload(&positions, device);
        Ok(VideoMae { encoder, fc_norm, positions, sha256: file.sha256 })
    }

    fn forward(&self, videos: &Tensor) -> Tensor {
        let architecture = self.encoder.architecture();
        let (trained, [frames, ..]) = (architecture.grid(FRAMES), architecture.grid(videos.size()[1]));
        // the released code stretches by a little more, so that rounding cannot lose a step
        let ratio = (frames as f64 + 0.1) / trained[0] as f64;
        let positions = stretched(&self.positions, trained, frames, ratio);
        let tokens = self.encoder.tokens(videos, &positions, |x| x);
        self.fc_norm.forward(&tokens.mean_dim([1i64].as_slice(), false, Kind::Float))
    }
}

impl FeatureExtractor for VideoMae {
    fn name(&self) -> &str {
        "VideoMAE-v2 mean of tokens"
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
        ensure_videos("VideoMAE-v2", videos, self.least_frames())?;
        let _precision = Autocast::bfloat16(self.positions.device(), false);
        Ok(no_grad(|| self.encoder.in_pieces(videos, |videos| self.forward(videos))))
    }
}
