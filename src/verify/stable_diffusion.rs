//! The parts of Stable Diffusion, loaded through the import of their weights.

use anyhow::{Result, ensure};
use tch::{Tensor, no_grad};

use super::{case::Case, outputs::Outputs};
use crate::{
    codecs::ImageAutoencoder,
    exchange::diffusers_config,
    networks::{Inputs, Network as _, Ports, UNet3d},
    nn::Parameters,
    text::ClipText,
    torch::Autocast,
    weights::stable_diffusion::Network,
};

/// The video U-Net made from an image U-Net, on the case's frames.
pub fn unet(case: &Case) -> Result<Outputs> {
    let (config, [inputs, outputs]) = diffusers_config::unet(&case.config()?)?;
    let x = case.input("x")?;
    let (b, _, frames, h, w) = x.size5()?;
    let factor = 1 << (config.multipliers.len() - 1);
    ensure!(h % factor == 0 && w % factor == 0, "latents of {h}x{w} do not halve to the network's factor {factor}");
    let ports = Ports { outputs, text: config.text_width(), ..Ports::of([inputs, frames, h, w]) };
    let parameters = Parameters::new(case.device(), 0);
    let unet = UNet3d::new(&parameters.root(), &config, &ports);
    case.import(&parameters, Network::UNet { blocks_per_level: config.blocks_per_level as usize })?;
    let given = Inputs { text: Some(case.input("context")?), ..Inputs::default() };
    let t = case.input("t")?.expand([b], false);
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(vec![("eps", no_grad(|| unet.forward(&x, &t, &given)))])
}

/// The image autoencoder; the case's images are the frames of one video.
pub fn autoencoder(case: &Case) -> Result<Outputs> {
    let config = diffusers_config::autoencoder(&case.config()?)?;
    let parameters = Parameters::new(case.device(), 0);
    let autoencoder = ImageAutoencoder::new(&parameters.root(), &config);
    case.import(&parameters, Network::Autoencoder { levels: config.widths.len() })?;
    let (image, latent) = (video_of(&case.input("image")?), video_of(&case.input("latent")?));
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(no_grad(|| {
        let posterior = autoencoder.encode(&image);
        vec![
            ("mean", images_of(&posterior.mean)),
            ("logvar", images_of(&posterior.logvar)),
            ("decoded", images_of(&autoencoder.decode(&latent))),
        ]
    }))
}

/// `[N, C, H, W]` → `[1, C, N, H, W]`
fn video_of(images: &Tensor) -> Tensor {
    images.transpose(0, 1).unsqueeze(0)
}

fn images_of(video: &Tensor) -> Tensor {
    video.squeeze_dim(0).transpose(0, 1)
}

/// CLIP's text encoder.
pub fn text_encoder(case: &Case) -> Result<Outputs> {
    let config = diffusers_config::text_encoder(&case.config()?)?;
    let parameters = Parameters::new(case.device(), 0);
    let encoder = ClipText::new(&parameters.root(), &config);
    case.import(&parameters, Network::TextEncoder)?;
    let tokens = case.input("input_ids")?;
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    Ok(vec![("last_hidden_state", no_grad(|| encoder.forward(&tokens))?)])
}
