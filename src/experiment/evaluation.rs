//! Which protocol an evaluation follows.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Mistake, parse, read};
use crate::{data::DataConfig, metrics::ProtocolConfig};

/// The protocols that are known by name, in the order in which people see them; each is a file that is shipped.
const BUILT_IN: [(&str, &str); 4] = [
    ("lvdm16", include_str!("../../experiments/protocols/lvdm16.yaml")),
    ("stylegan-v-16", include_str!("../../experiments/protocols/stylegan-v-16.yaml")),
    ("stylegan-v-128", include_str!("../../experiments/protocols/stylegan-v-128.yaml")),
    ("lvdm1024", include_str!("../../experiments/protocols/lvdm1024.yaml")),
];

/// The protocols that are known by name.
pub fn built_in_protocols() -> Vec<ProtocolConfig> {
    BUILT_IN.iter().map(|(name, text)| parse(name, text, &[]).expect("a shipped protocol")).collect()
}

/// A protocol by its name, or out of a YAML file.
///
/// # Errors
/// A name that is not known, a file that is not a protocol.
pub fn protocol(name: &str) -> Result<ProtocolConfig, Mistake> {
    let known = BUILT_IN.iter().find(|(known, _)| *known == name);
    let config: ProtocolConfig = match known {
        Some((name, text)) => parse(name, text, &[])?,
        None if name.ends_with(".yaml") || name.ends_with(".yml") => read(Path::new(name), &[])?,
        None => {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
            return Err(Mistake(format!(
                "there is no protocol `{name}`; known are {}, and a file that ends in .yaml",
                names.join(", ")
            )));
        }
    };
    config.validate().map_err(|error| Mistake(format!("{name}: {error:#}")))?;
    Ok(config)
}

/// How an evaluation measures: by a protocol, or simply so many clips.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationConfig {
    /// A name (`lvdm16`, `lvdm1024`, `stylegan-v-16`, `stylegan-v-128`) or a YAML file.
    pub protocol: Option<String>,
    /// Clips of each set; another number than the protocol's becomes part of its name. 2,048 without either.
    pub clips: Option<i64>,
    /// Another file of I3D weights in the packaged layout; its hash is part of every figure.
    pub extractor: Option<PathBuf>,
}

impl EvaluationConfig {
    /// So many clips, without a protocol.
    pub fn plain(clips: i64) -> Self {
        EvaluationConfig { clips: Some(clips), ..Self::default() }
    }

    /// The protocol in full. Without one it is a plain count of clips of the real data's own shape.
    ///
    /// # Errors
    /// A protocol that is not there or does not agree with itself or with the real data.
    pub fn resolve(&self, real: &DataConfig) -> Result<ProtocolConfig> {
        let mut config = match &self.protocol {
            None => ProtocolConfig::plain(self.clips.unwrap_or(2048), real),
            Some(name) => protocol(name)?,
        };
        if let Some(clips) = self.clips.filter(|_| self.protocol.is_some()) {
            config = config.at(clips);
        }
        config.extractor = self.extractor.clone().or(config.extractor);
        config.validate()?;
        config.agrees_with(real).context("real")?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DatasetConfig;

    fn real(frames: i64) -> DataConfig {
        let dataset = DatasetConfig::Folder { root: "videos".into() };
        DataConfig { dataset, frames, frame_stride: 1, resolution: 256, flip: false, workers: 1 }
    }

    #[test]
    fn names_and_numbers() {
        let named = |name: &str, clips| EvaluationConfig { protocol: Some(name.into()), clips, extractor: None };
        let lvdm = named("lvdm16", None).resolve(&real(16)).unwrap();
        assert_eq!((lvdm.name.as_str(), lvdm.clips, lvdm.runs, lvdm.generated_clips()), ("lvdm16", 2048, 10, 2048));
        let fewer = named("lvdm16", Some(100)).resolve(&real(16)).unwrap();
        assert_eq!((fewer.name.as_str(), fewer.clips, fewer.generated_clips()), ("lvdm16@100", 100, 96));
        let error = format!("{:#}", named("lvdm16", None).resolve(&real(8)).unwrap_err());
        assert!(error.contains("real: frames is 8") && error.contains("lvdm16"), "{error}");
        let error = format!("{:#}", named("fvd", None).resolve(&real(16)).unwrap_err());
        assert!(error.contains("`fvd`") && error.contains("stylegan-v-128"), "{error}");
        assert_eq!(EvaluationConfig::default().resolve(&real(16)).unwrap().clips, 2048);
        assert_eq!(EvaluationConfig::plain(7).resolve(&real(9)).unwrap().frames, 9);
        assert!(EvaluationConfig::plain(1).resolve(&real(9)).is_err());
    }

    #[test]
    fn every_built_in_protocol_is_sound() {
        let all = built_in_protocols();
        for (config, (name, _)) in all.iter().zip(BUILT_IN) {
            assert_eq!(config.name, name);
            config.validate().unwrap();
            let real = config.applied_to(&real(3));
            config.agrees_with(&real).unwrap();
        }
        assert_eq!(all.iter().filter(|config| config.windows_of.is_some()).count(), 1);
    }
}
