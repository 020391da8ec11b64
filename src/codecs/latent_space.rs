//! A frozen autoencoder with the shift and scale that were measured on its latents; or none, and pixels are the latents.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor, no_grad};

use super::{AutoencoderConfig, Chunks, ImageAutoencoder, ImageAutoencoderConfig, Posterior, VideoAutoencoder};
use crate::{
    nn::{Parameters, full_precision},
    torch::{Autocast, upload},
};

/// Mean and spread of raw latents, as the affine map that normalises them: z ← scale·(z + shift).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentMoments {
    /// What a latent is multiplied by, after the shift.
    pub scale: f64,
    /// What is added to a latent before.
    pub shift: f64,
}

impl LatentMoments {
    /// What Stable Diffusion 1.x was trained with.
    pub const STABLE_DIFFUSION: LatentMoments = LatentMoments { scale: 0.18215, shift: 0.0 };

    /// Of raw latents of any shape: shift is minus their mean, scale one over their standard deviation.
    pub fn measure(latents: &Tensor) -> Self {
        let z = latents.to_kind(Kind::Double);
        let (mean, std) = (z.mean(None).double_value(&[]), z.std(true).double_value(&[]));
        LatentMoments { scale: 1.0 / std.max(1e-12), shift: -mean }
    }

    /// Raw → normalised, of any shape.
    pub fn normalise(&self, z: &Tensor) -> Tensor {
        (z + self.shift) * self.scale
    }

    fn restore(&self, z: &Tensor) -> Tensor {
        z / self.scale - self.shift
    }
}

/// Which autoencoder makes the latents. In a file the image autoencoder stands under the key `image`,
/// and without that key the settings are the video autoencoder's: one of them at least, and no others, so that those of an
/// autoencoder that is not known here are an error and not the video autoencoder's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, try_from = "Map<String, Value>")]
pub enum LatentSpaceConfig {
    /// Stable Diffusion's image autoencoder, frame by frame.
    Image {
        /// Widths and sizes of the network.
        image: ImageAutoencoderConfig,
    },
    /// The paper's video autoencoder.
    Video(AutoencoderConfig),
}

impl TryFrom<Map<String, Value>> for LatentSpaceConfig {
    type Error = anyhow::Error;

    fn try_from(mut settings: Map<String, Value>) -> Result<Self> {
        /// Settings with a default for each key, as `of`'s; no others.
        fn only<T: Serialize + DeserializeOwned + Default>(of: &str, settings: Map<String, Value>) -> Result<T> {
            let Value::Object(known) = serde_json::to_value(T::default())? else { unreachable!("a struct") };
            let list = |keys: Vec<&String>| keys.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            let (own, foreign): (Vec<_>, Vec<_>) = settings.keys().partition(|key| known.contains_key(*key));
            ensure!(
                foreign.is_empty() && !own.is_empty(),
                "these are not the settings of {of}, which has {}: {}",
                list(known.keys().collect()),
                if foreign.is_empty() { "there are none".into() } else { format!("it knows no {}", list(foreign)) }
            );
            Ok(serde_json::from_value(Value::Object(settings))?)
        }
        match settings.remove("image") {
            None => Ok(LatentSpaceConfig::Video(only("the video autoencoder", settings)?)),
            Some(Value::Object(image)) if settings.is_empty() => {
                Ok(LatentSpaceConfig::Image { image: only("the image autoencoder", image)? })
            }
            Some(_) => bail!("`image` holds all settings of the image autoencoder, and nothing stands beside it"),
        }
    }
}

impl From<AutoencoderConfig> for LatentSpaceConfig {
    fn from(config: AutoencoderConfig) -> Self {
        LatentSpaceConfig::Video(config)
    }
}

impl From<ImageAutoencoderConfig> for LatentSpaceConfig {
    fn from(image: ImageAutoencoderConfig) -> Self {
        LatentSpaceConfig::Image { image }
    }
}

impl LatentSpaceConfig {
    /// # Errors
    /// As the autoencoder's own.
    pub fn validate(&self) -> Result<()> {
        match self {
            LatentSpaceConfig::Image { image } => image.validate(),
            LatentSpaceConfig::Video(video) => video.validate(),
        }
    }

    /// The latent's shape `[C, F', h, w]` of a clip.
    ///
    /// # Errors
    /// Where the clip's size is not a multiple of the autoencoder's factors.
    pub fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        match self {
            LatentSpaceConfig::Image { image } => image.latent_shape(frames, height, width),
            LatentSpaceConfig::Video(video) => video.latent_shape(frames, height, width),
        }
    }
}

/// Either autoencoder, or the identity.
enum Autoencoder {
    Pixels,
    Image(Box<ImageAutoencoder>),
    Video(Box<VideoAutoencoder>),
}

impl Autoencoder {
    fn encode(&self, x: &Tensor) -> Posterior {
        match self {
            // of no variance: a sample of it is x to the bit
            Autoencoder::Pixels => Posterior { mean: x.shallow_clone(), logvar: x.full_like(f64::NEG_INFINITY) },
            Autoencoder::Image(image) => image.encode(x),
            Autoencoder::Video(video) => video.encode(x),
        }
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        match self {
            Autoencoder::Pixels => z.shallow_clone(),
            Autoencoder::Image(image) => image.decode(z),
            Autoencoder::Video(video) => video.decode(z),
        }
    }
}

/// Where diffusion happens: clips ↔ normalised latents, without gradients.
pub struct LatentSpace {
    autoencoder: Autoencoder,
    /// None where pixels are the latents.
    pub config: Option<LatentSpaceConfig>,
    /// Scale and shift that normalise latents.
    pub moments: LatentMoments,
    /// Latent frames of the clips on which the video autoencoder was trained, or of what goes through another at a
    /// time.
    pub clip: i64,
    /// How many parameters the autoencoder has.
    pub parameters: i64,
    device: Device,
}

impl LatentSpace {
    /// # Errors
    /// Settings that do not fit together; weights that belong to another architecture.
    pub fn new(
        config: &LatentSpaceConfig,
        weights: BTreeMap<String, Tensor>,
        moments: LatentMoments,
        clip: i64,
        device: Device,
    ) -> Result<Self> {
        config.validate()?;
        let parameters = Parameters::unfilled(device);
        let autoencoder = match config {
            LatentSpaceConfig::Image { image } => {
                Autoencoder::Image(Box::new(ImageAutoencoder::new(&parameters.root(), image)))
            }
            LatentSpaceConfig::Video(video) => {
                Autoencoder::Video(Box::new(VideoAutoencoder::new(&parameters.root(), video)))
            }
        };
        parameters.fill(weights)?;
        let count = parameters.count();
        parameters.freeze();
        Ok(LatentSpace { autoencoder, config: Some(config.clone()), moments, clip, parameters: count, device })
    }

    /// Diffusion on pixels: z_0 is the clip itself, its values in [−1, 1].
    pub fn pixels(device: Device) -> Self {
        LatentSpace {
            autoencoder: Autoencoder::Pixels,
            config: None,
            moments: LatentMoments { scale: 1.0, shift: 0.0 },
            clip: ImageAutoencoder::FRAMES_PER_PASS,
            parameters: 0,
            device,
        }
    }

    /// The latent's shape `[C, F', h, w]` of a clip.
    ///
    /// # Errors
    /// As [`LatentSpaceConfig::latent_shape`].
    pub fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        self.config.as_ref().map_or(Ok([3, frames, height, width]), |config| config.latent_shape(frames, height, width))
    }

    /// Clips `[B, 3, F, H, W]` in [−1, 1] → the raw posterior's mean and logvar, stacked: `[B, 2C, F/ft, H/fs, W/fs]`;
    /// never in half precision.
    pub fn moments_of(&self, x: &Tensor) -> Tensor {
        no_grad(|| {
            let posterior = self.autoencoder.encode(&upload(x, self.device));
            full_precision(&Tensor::cat(&[posterior.mean, posterior.logvar], 1))
        })
    }

    /// Stacked raw moments and the posterior's noise `[B, C, …]` → normalised z_0.
    pub fn sample(&self, moments: &Tensor, noise: &Tensor) -> Tensor {
        let halves = upload(moments, self.device).chunk(2, 1);
        let std = (&halves[1] * 0.5).exp();
        self.moments.normalise(&(&halves[0] + std * upload(noise, self.device)))
    }

    /// Normalised z_0 → clips `[B, 3, F, H, W]`, not clamped; never in half precision.
    pub fn decode(&self, z_0: &Tensor) -> Tensor {
        no_grad(|| full_precision(&self.autoencoder.decode(&self.moments.restore(&upload(z_0, self.device)))))
    }

    /// How a long latent is decoded: chunks of the length on which the autoencoder was trained, half of each
    /// shared; where frames are decoded one by one, chunks that share nothing.
    pub fn chunks(&self) -> Chunks {
        match &self.config {
            None | Some(LatentSpaceConfig::Image { .. }) => {
                Chunks { length: self.clip, overlap: 0, factor: 1, reach: 0 }
            }
            Some(LatentSpaceConfig::Video(video)) => Chunks {
                length: self.clip,
                overlap: self.clip / 2,
                factor: video.factors[0],
                reach: video.decoder_reach(),
            },
        }
    }

    /// Normalised z_0 `[1, C, F, h, w]` of any length → the video in pieces `[3, f, H, W]`, in order, not clamped.
    ///
    /// # Errors
    /// Those of `hand_on`.
    pub fn decode_long(&self, z_0: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        no_grad(|| self.chunks().decode(z_0, &|z| self.decode(z), hand_on))
    }

    /// Clips `[B, 3, F, H, W]` in [−1, 1] → their reconstruction through the posterior's mean, the same shape. Always in
    /// full precision: it is what figures of reconstruction are measured on, and those tell one autoencoder from another
    /// by less than the rounding of mixed precision.
    pub fn reconstruct(&self, x: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(self.device, false);
        no_grad(|| self.autoencoder.decode(&self.autoencoder.encode(&upload(x, self.device)).mean))
    }

    /// Frames of a clip for one of its latent, and pixels along a side.
    pub fn factors(&self) -> [i64; 2] {
        let [frames, side, _] = match &self.config {
            None => [1, 1, 1],
            Some(LatentSpaceConfig::Image { image }) => [1, image.factor(), image.factor()],
            Some(LatentSpaceConfig::Video(video)) => video.factors,
        };
        [frames, side]
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, normal};

    /// Nothing, another codec's settings, also where a key of ours is among them, and a mixture are refused by name; a
    /// file that leaves keys out stays what it was.
    #[test]
    fn another_codecs_settings_are_not_the_video_autoencoders_defaults() {
        let read = |text: &str| serde_json::from_str::<LatentSpaceConfig>(text);
        let video = |config: AutoencoderConfig| LatentSpaceConfig::Video(config);
        assert_eq!(read(r#"{"channels": 8}"#).unwrap(), video(AutoencoderConfig { channels: 8, ..Default::default() }));
        let LatentSpaceConfig::Image { image } = read(r#"{"image": {"widths": [32, 64]}}"#).unwrap() else { panic!() };
        assert_eq!(image, ImageAutoencoderConfig { widths: vec![32, 64], ..Default::default() });
        for (text, words) in [
            ("{}", "there are none"),
            (r#"{"codebook": 1024, "embedding": 256}"#, "it knows no codebook, embedding"),
            (r#"{"codebook": 1024, "channels": 32}"#, "it knows no codebook"),
            (r#"{"image": {}}"#, "there are none"),
            (r#"{"image": {"patch": 2}}"#, "it knows no patch"),
            (r#"{"image": {"widths": [32]}, "channels": 32}"#, "nothing stands beside it"),
            (r#"{"image": 3}"#, "nothing stands beside it"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        for config in [video(AutoencoderConfig::default()), ImageAutoencoderConfig::default().into()] {
            assert_eq!(read(&serde_json::to_string(&config).unwrap()).unwrap(), config);
        }
    }

    /// In mixed precision the networks run in bfloat16, and what they give is float32; a reconstruction, which is
    /// measured, is computed in float32 whatever surrounds it.
    #[test]
    fn mixed_precision_reaches_the_autoencoder_and_leaves_float32() {
        let config: AutoencoderConfig =
            serde_json::from_str(r#"{"channels": 4, "factors": [2, 4, 4], "norm_groups": 4}"#).unwrap();
        let weights = Parameters::new(Device::Cpu, 1);
        VideoAutoencoder::new(&weights.root(), &config);
        let moments = LatentMoments { scale: 1.0, shift: 0.0 };
        let space =
            LatentSpace::new(&config.into(), weights.named().into_iter().collect(), moments, 2, Device::Cpu).unwrap();
        let x = normal(0, Purpose::Evaluation, 0, 0, &[1, 3, 4, 16, 16]).clamp(-1.0, 1.0);
        let z_0 = normal(0, Purpose::Evaluation, 1, 0, &space.latent_shape(4, 16, 16).unwrap()).unsqueeze(0);
        let run = |half: bool| {
            let _precision = Autocast::bfloat16(Device::Cpu, half);
            [space.moments_of(&x), space.decode(&z_0), space.reconstruct(&x)]
        };
        let (half, full) = (run(true), run(false));
        assert!(half.iter().all(|t| t.kind() == Kind::Float));
        let [encoded, decoded, reconstructed]: [f64; 3] =
            std::array::from_fn(|i| ((&half[i] - &full[i]).norm() / full[i].norm()).double_value(&[]));
        println!("bf16 differs from float32 by {encoded:.1e} encoded, {decoded:.1e} decoded");
        // bfloat16 has 8 bits: where they show, it was computed in them
        for difference in [encoded, decoded] {
            assert!((1e-4..3e-2).contains(&difference), "{encoded:e} {decoded:e}");
        }
        assert_eq!(reconstructed, 0.0);
    }

    /// Through pixels a clip of any size comes back to the bit, whatever noise its posterior is given.
    #[test]
    fn pixels_are_their_own_latents() {
        let space = LatentSpace::pixels(Device::Cpu);
        let size = [1, 3, 19, 5, 7];
        let x = normal(0, Purpose::Evaluation, 0, 0, &size).clamp(-1.0, 1.0);
        let noise = normal(0, Purpose::Posterior, 0, 0, &size);
        let z_0 = space.sample(&space.moments_of(&x), &noise);
        assert!(z_0.equal(&x) && space.decode(&z_0).equal(&x) && space.reconstruct(&x).equal(&x));
        let mut pieces = Vec::new();
        space
            .decode_long(&z_0, &mut |piece| {
                pieces.push(piece.copy());
                Ok(())
            })
            .unwrap();
        assert!(pieces.len() > 1 && Tensor::cat(&pieces, 1).equal(&x.squeeze_dim(0)));
        assert_eq!(space.latent_shape(19, 5, 7).unwrap(), size[1..]);
        assert_eq!(space.factors(), [1, 1]);
    }
}
