//! The codecs that a file can name.

use anyhow::{Result, bail, ensure};
use serde::{Deserializer, de::Error};
use serde_yaml::{Mapping, Value};

use super::{AutoencoderConfig, CodecSettings, ImageAutoencoderConfig, VqganConfig};
use crate::registry::registry;

registry! {
    /// The settings of a codec, with the `kind` that tells them apart; those of the video autoencoder may leave it out.
    pub enum CodecConfig: CodecSettings, default "video_autoencoder" {
        /// The paper's video autoencoder.
        "video_autoencoder" => VideoAutoencoder(AutoencoderConfig),
        /// Stable Diffusion's image autoencoder, frame by frame.
        "image_autoencoder" => ImageAutoencoder(ImageAutoencoderConfig),
        /// TATS' video autoencoder with a codebook.
        "vqgan" => Vqgan(VqganConfig),
    }
}

impl Default for CodecConfig {
    fn default() -> Self {
        AutoencoderConfig::default().into()
    }
}

impl CodecConfig {
    /// The codec that a checkpoint stores. Checkpoints written before codecs had a `kind` are read too: in those the
    /// settings of the image autoencoder stand under the key `image`, and those without it are the video autoencoder's.
    /// There is at least one setting and none of another codec, so that the settings of a codec that is not known here
    /// are not read as the video autoencoder's defaults.
    ///
    /// # Errors
    /// Settings of no codec that is known here; names those that are.
    pub fn stored<'de, D: Deserializer<'de>>(settings: D) -> Result<Self, D::Error> {
        use serde::Deserialize;
        let settings = Mapping::deserialize(settings)?;
        tagged(settings)
            .and_then(|settings| Ok(serde_yaml::from_value(Value::Mapping(settings))?))
            .map_err(|error| D::Error::custom(format!("{error:#}; known are {}", Self::KINDS.join(", "))))
    }
}

/// Stored settings with their kind.
fn tagged(mut settings: Mapping) -> Result<Mapping> {
    if settings.contains_key("kind") {
        return Ok(settings);
    }
    let (kind, own) = match settings.remove("image") {
        None => ("video_autoencoder", settings),
        Some(Value::Mapping(image)) if settings.is_empty() => ("image_autoencoder", image),
        Some(_) => bail!("`image` holds all settings of the image autoencoder, and nothing stands beside it"),
    };
    ensure!(!own.is_empty(), "these are not the settings of a {}: there are none", kind.replace('_', " "));
    Ok([("kind".into(), kind.into())].into_iter().chain(own).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing, another codec's settings, also where a key of ours is among them, and a mixture are refused by name; a
    /// checkpoint from before there were kinds, or one that leaves keys out, stays what it was.
    #[test]
    fn another_codecs_settings_are_not_the_video_autoencoders_defaults() {
        let read = |text: &str| CodecConfig::stored(&mut serde_json::Deserializer::from_str(text));
        let video = CodecConfig::from(AutoencoderConfig { channels: 8, ..Default::default() });
        let image = CodecConfig::from(ImageAutoencoderConfig { widths: vec![32, 64], ..Default::default() });
        for (text, wanted) in [
            (r#"{"channels": 8}"#, &video),
            (r#"{"kind": "video_autoencoder", "channels": 8}"#, &video),
            (r#"{"image": {"widths": [32, 64]}}"#, &image),
            (r#"{"kind": "image_autoencoder", "widths": [32, 64]}"#, &image),
        ] {
            assert_eq!(read(text).unwrap(), *wanted, "{text}");
            assert_eq!(read(&serde_json::to_string(wanted).unwrap()).unwrap(), *wanted);
        }
        for (text, words) in [
            ("{}", "there are none"),
            (r#"{"codebook": 1024, "embedding": 256}"#, "unknown field `"),
            (r#"{"codebook": 1024, "channels": 32}"#, "unknown field `"),
            (r#"{"image": {}}"#, "there are none"),
            (r#"{"image": {"patch": 2}}"#, "unknown field `patch`"),
            (r#"{"image": {"widths": [32]}, "channels": 32}"#, "nothing stands beside it"),
            (r#"{"image": 3}"#, "nothing stands beside it"),
            (r#"{"kind": "vq", "channels": 32}"#, "unknown variant `vq`"),
            (r#"{"kind": "pixels"}"#, "unknown variant `pixels`"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("video_autoencoder, image_autoencoder"), "{text}: {error}");
        }
    }
}
