//! A picture as the first frame of clips: image to video.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::{latent_diffusion::LatentDiffusion, model::VideoModel};
use crate::{
    data::{RgbFrame, normalise},
    diffusion::GuidanceConfig,
    torch::upload,
};

impl LatentDiffusion {
    /// Normalised latent `[1, C, 1, h, w]` of a still picture: its middle, of the shape of the clips, resized as training
    /// does.
    pub fn picture_latent(&self, picture: &RgbFrame) -> Tensor {
        let [_, _, height, width] = self.clip();
        let (own_height, own_width) = (picture.height as f64, picture.width as f64);
        let factor = (height as f64 / own_height).max(width as f64 / own_width);
        let size = [own_height, own_width].map(|side| (side * factor).round() as i64);
        let x = picture.to_tensor().permute([2, 0, 1]).unsqueeze(0).to_kind(Kind::Float); // [1, 3, H, W]
        let x = x.internal_upsample_bilinear2d_aa(size, false, None, None);
        let x = x.narrow(2, (size[0] - height) / 2, height).narrow(3, (size[1] - width) / 2, width);
        let x = normalise(&x.round().clamp(0.0, 255.0).to_kind(Kind::Uint8)).unsqueeze(2);
        // as many frames as one latent frame stands for, all alike
        let [frames, _, _] = self.space.settings().clip_shape([1; 3]);
        let x = upload(&x.expand([1, 3, frames, height, width], false).contiguous(), self.space.device());
        let shape = [1, self.latent[0], 1, self.latent[2], self.latent[3]];
        self.space.sample(&self.space.encode(&x), &Tensor::zeros(shape, (Kind::Float, x.device())))
    }

    /// The latents of pictures, `[N, C, 1, h, w]`: of each picture that is there several times once made.
    pub(super) fn first_latents(&self, pictures: &[&RgbFrame]) -> Result<Tensor> {
        let mut made: Vec<(&RgbFrame, Tensor)> = Vec::new();
        let mut latents = Vec::new();
        for &picture in pictures {
            let before = made.iter().find(|(other, _)| std::ptr::eq(*other, picture));
            let latent = before.map_or_else(|| self.picture_latent(picture), |(_, latent)| latent.shallow_clone());
            latents.push(latent.shallow_clone());
            made.push((picture, latent));
        }
        Ok(Tensor::f_cat(&latents, 0)?)
    }

    /// How a first frame is given: with the noise level of the released script or the most that the network knows, and where
    /// the network is given a text too with no guidance but the text's.
    ///
    /// # Errors
    /// A network that was not trained to be given the first frame alone.
    pub(super) fn first_frame_guidance(&self) -> Result<GuidanceConfig> {
        let known = self.conditioning.as_ref().filter(|known| known.prediction > 0.0 && known.prefixes.contains(&1));
        ensure!(
            known.is_some(),
            "it was not trained to be given a first frame: train it with `conditioning: {{prediction: 0.5, prefixes: [1]}}`"
        );
        let GuidanceConfig { weight, form, level, .. } = GuidanceConfig::default();
        let most = known.and_then(|known| known.perturbation);
        let level = most.and_then(|most| level.map(|level| level.min(most - 1)));
        Ok(GuidanceConfig { weight: if self.text.is_some() { 0.0 } else { weight }, form, level, reconstruction: None })
    }
}
