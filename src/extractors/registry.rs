//! The feature extractors that are known by name. A new one is a file beside this one and a line in [`EXTRACTORS`].

use std::{
    convert::Infallible,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::Result;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};
use tch::Device;

use super::{
    FeatureExtractor, I3d,
    brought::Brought,
    frames::Vgg16Frames,
    motion::Motion,
    v_jepa::{V_JEPA, VJepa},
    video_mae::{VIDEO_MAE_V2, VideoMae},
};

/// Opens an extractor's own weight file, or the one that is given in its place.
type Open = fn(Option<&Path>, Device) -> Result<Box<dyn FeatureExtractor>>;

/// An extractor under the `kind` by which files name it.
struct Entry {
    kind: &'static str,
    open: Open,
    /// Weights that a user brings.
    brought: Option<&'static Brought>,
}

impl Entry {
    const fn new(kind: &'static str, open: Open) -> Self {
        Entry { kind, open, brought: None }
    }

    /// Of weights that a user brings, under their name.
    const fn brought(weights: &'static Brought, open: Open) -> Self {
        Entry { kind: weights.kind, open, brought: Some(weights) }
    }
}

/// Every extractor.
static EXTRACTORS: &[Entry] = &[
    Entry::new("i3d", |file, device| Ok(Box::new(I3d::load(file, device)?))),
    Entry::new("vgg16_frames", |file, device| Ok(Box::new(Vgg16Frames::load(file, device)?))),
    Entry::new("motion", |file, _| Ok(Box::new(Motion::new(file)?))),
    Entry::brought(&VIDEO_MAE_V2, |file, device| Ok(Box::new(VideoMae::load(file, device)?))),
    Entry::brought(&V_JEPA, |file, device| Ok(Box::new(VJepa::load(file, device)?))),
];

/// The extractors' weights that a user brings.
pub fn brought() -> impl Iterator<Item = &'static Brought> {
    EXTRACTORS.iter().filter_map(|entry| entry.brought)
}

/// The kind of an extractor: a name of the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExtractorKind(&'static str);

impl ExtractorKind {
    /// The one of FVD's definition.
    pub const I3D: Self = ExtractorKind("i3d");
    /// The one of the frame distance.
    pub const VGG16_FRAMES: Self = ExtractorKind("vgg16_frames");
    /// The one of the motion distance.
    pub const MOTION: Self = ExtractorKind("motion");

    /// Every kind, in the order of the registry.
    pub fn all() -> impl Iterator<Item = Self> {
        EXTRACTORS.iter().map(|entry| ExtractorKind(entry.kind))
    }

    /// The kind of this name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|kind| kind.0 == name)
    }
}

impl fmt::Display for ExtractorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl schemars::JsonSchema for ExtractorKind {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ExtractorKind".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"enum": EXTRACTORS.iter().map(|entry| entry.kind).collect::<Vec<&str>>()})
    }
}

impl Serialize for ExtractorKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0)
    }
}

impl<'de> Deserialize<'de> for ExtractorKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::named(&name).ok_or_else(|| {
            let known: Vec<String> = Self::all().map(|kind| format!("`{kind}`")).collect();
            D::Error::custom(format!("unknown variant `{name}`, expected one of {}", known.join(", ")))
        })
    }
}

/// An extractor as a file names it: `{kind: i3d, file: PATH}`, where `file` takes the place of the kind's own weights.
/// As one text it is a kind, `KIND=PATH`, or the path of a file of I3D's weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct ExtractorConfig {
    /// Which extractor.
    pub kind: ExtractorKind,
    /// A weight file in the layout of the kind's own; its hash is part of every figure.
    pub file: Option<PathBuf>,
}

impl Default for ExtractorConfig {
    /// I3D with its released weights.
    fn default() -> Self {
        ExtractorConfig { kind: ExtractorKind::I3D, file: None }
    }
}

impl From<ExtractorKind> for ExtractorConfig {
    fn from(kind: ExtractorKind) -> Self {
        ExtractorConfig { kind, file: None }
    }
}

impl ExtractorConfig {
    /// Loads the weights onto a device.
    ///
    /// # Errors
    /// A file that is not there, is damaged, or belongs to another network.
    pub fn open(&self, device: Device) -> Result<Box<dyn FeatureExtractor>> {
        let entry = EXTRACTORS.iter().find(|entry| entry.kind == self.kind.0).expect("a kind of the registry");
        (entry.open)(self.file.as_deref(), device)
    }
}

impl FromStr for ExtractorConfig {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let (name, file) = text.split_once('=').map_or((text, None), |(name, file)| (name, Some(file.into())));
        Ok(match ExtractorKind::named(name) {
            Some(kind) => ExtractorConfig { kind, file },
            None => ExtractorConfig { kind: ExtractorKind::I3D, file: Some(text.into()) },
        })
    }
}

impl<'de> Deserialize<'de> for ExtractorConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PathOrKind;

        impl<'de> Visitor<'de> for PathOrKind {
            type Value = ExtractorConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an extractor, {kind: NAME, file: PATH}, or the path of a file of I3D's weights")
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
                path.parse().map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Tagged {
                    kind: ExtractorKind,
                    #[serde(default)]
                    file: Option<PathBuf>,
                }
                let Tagged { kind, file } = Tagged::deserialize(MapAccessDeserializer::new(map))?;
                Ok(ExtractorConfig { kind, file })
            }
        }

        deserializer.deserialize_any(PathOrKind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extractor_is_a_kind_or_a_path() {
        let read = |text: &str| serde_yaml::from_str::<ExtractorConfig>(text);
        let file = Some(PathBuf::from("a/i3d.ckpt"));
        let path = read("a/i3d.ckpt").unwrap();
        assert_eq!(path, ExtractorConfig { kind: ExtractorKind::I3D, file });
        assert_eq!(read("{kind: i3d, file: a/i3d.ckpt}").unwrap(), path);
        for text in ["{kind: i3d}", "i3d"] {
            assert_eq!(read(text).unwrap(), ExtractorConfig::default());
        }
        assert_eq!(read("i3d=a/i3d.ckpt").unwrap(), path);
        // what is written is read again
        assert_eq!(read(&serde_yaml::to_string(&path).unwrap()).unwrap(), path);
        for (text, word) in
            [("{kind: i3e}", "expected one of `i3d`"), ("{kind: i3d, flie: x}", "`flie`"), ("7", "PATH")]
        {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
