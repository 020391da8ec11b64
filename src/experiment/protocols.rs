//! Which protocol an evaluation follows.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;

use super::{file, user_error::UserError};
use crate::{
    data::DataConfig,
    extractors::ExtractorConfig,
    metrics::{Metric, ProtocolConfig},
};

/// The protocols that are known by name, in the order in which people see them; each is a file that is shipped.
const BUILT_IN: [(&str, &str); 4] = [
    ("lvdm16", include_str!("../../experiments/protocols/lvdm16.yaml")),
    ("stylegan-v-16", include_str!("../../experiments/protocols/stylegan-v-16.yaml")),
    ("stylegan-v-128", include_str!("../../experiments/protocols/stylegan-v-128.yaml")),
    ("lvdm1024", include_str!("../../experiments/protocols/lvdm1024.yaml")),
];

/// The protocols that are known by name.
pub fn built_in_protocols() -> Vec<ProtocolConfig> {
    BUILT_IN.iter().map(|(name, text)| file::parse(name, text, &[], |_| Ok(())).expect("a shipped protocol")).collect()
}

/// A protocol by its name, or out of a YAML file.
///
/// # Errors
/// A name that is not known, a file that is not a protocol.
pub fn protocol(name: &str) -> Result<ProtocolConfig, UserError> {
    let known = BUILT_IN.iter().find(|(known, _)| *known == name);
    let config: ProtocolConfig = match known {
        Some((name, text)) => file::parse(name, text, &[], |_| Ok(()))?,
        None if name.ends_with(".yaml") || name.ends_with(".yml") => file::read(Path::new(name), &[], |_| Ok(()))?,
        None => {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
            return Err(UserError(format!(
                "there is no protocol `{name}`; known are {}, and a file that ends in .yaml",
                names.join(", ")
            )));
        }
    };
    config.validate().map_err(|error| UserError(format!("{name}: {error:#}")))?;
    // a known name says what was measured
    let known =
        built_in_protocols().into_iter().find(|known| Some(known.name.as_str()) == config.name.split('@').next());
    if let Some(known) = known.filter(|known| known.clone().at(config.clips) != config) {
        return Err(UserError(format!(
            "{name}: name: {} is a known protocol, and this one differs from it: give it a name of its own (lvdm \
             evaluate --protocols lists the known ones)",
            known.name
        )));
    }
    Ok(config)
}

/// Real and generated data of an experiment that follows a protocol take from it what they do not say themselves.
///
/// # Errors
/// As [`protocol`].
pub(super) fn complete(experiment: &mut Value) -> Result<(), UserError> {
    let named = experiment.get("evaluation").and_then(|evaluation| evaluation.get("protocol")).and_then(Value::as_str);
    let Some(named) = named else { return Ok(()) };
    let config = protocol(named).map_err(|error| UserError(format!("evaluation.protocol: {error}")))?;
    let fill = |data: Option<&mut Value>, stride: Option<i64>| {
        let Some(Value::Mapping(data)) = data else { return };
        let known =
            [("frames", Some(config.frames)), ("resolution", Some(config.resolution)), ("frame_stride", stride)];
        for (key, value) in known {
            if let Some(value) = value {
                data.entry(key.into()).or_insert(value.into());
            }
        }
    };
    for set in ["real", "train"] {
        fill(experiment.get_mut(set), config.frame_stride);
    }
    // generated videos lie frame by frame
    fill(experiment.get_mut("generated").and_then(|generated| generated.get_mut("data")), None);
    for curve in experiment.get_mut("curves").and_then(Value::as_sequence_mut).into_iter().flatten() {
        fill(curve.get_mut("source").and_then(|source| source.get_mut("data")), None);
    }
    Ok(())
}

/// How an evaluation measures: by a protocol, or simply so many clips.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct EvaluationConfig {
    /// A name (`lvdm16`, `lvdm1024`, `stylegan-v-16`, `stylegan-v-128`) or a YAML file.
    pub protocol: Option<String>,
    /// Clips of each set; another number than the protocol's becomes part of its name. 2,048 without either.
    pub clips: Option<i64>,
    /// Whose features are compared, `{kind: i3d, file: PATH}`: in place of the protocol's, else of I3D with its released
    /// weights. A path alone is a file of I3D's weights.
    pub extractor: Option<ExtractorConfig>,
    /// Which metrics; FVD and KVD (`[fvd, kvd]`) where it is not said.
    pub metrics: Option<Vec<Metric>>,
}

impl EvaluationConfig {
    /// So many clips, without a protocol.
    pub fn plain(clips: i64) -> Self {
        EvaluationConfig { clips: Some(clips), ..Self::default() }
    }

    /// The metrics, each once, in the order of tables.
    pub fn metrics(&self) -> Vec<Metric> {
        let asked = self.metrics.iter().flatten().copied().collect::<BTreeSet<Metric>>();
        if asked.is_empty() { Metric::DEFAULT.to_vec() } else { asked.into_iter().collect() }
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
        anyhow::ensure!(
            self.metrics.as_ref().is_none_or(|metrics| !metrics.is_empty()),
            "metrics: the list is empty; without it FVD and KVD are measured"
        );
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
    use super::{super::load::read, *};
    use crate::data::{DatasetConfig, Folder};

    fn real(frames: i64) -> DataConfig {
        let dataset = DatasetConfig::Folder(Folder { root: "videos".into() });
        DataConfig { dataset, frames, frame_stride: 1, resolution: 256, flip: false, workers: 1 }
    }

    #[test]
    fn names_and_numbers() {
        let named =
            |name: &str, clips| EvaluationConfig { protocol: Some(name.into()), clips, ..EvaluationConfig::default() };
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

    /// Whoever writes lvdm16 means lvdm16.
    #[test]
    fn a_known_name_is_not_given_to_another_protocol() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mine.yaml");
        let (_, text) = BUILT_IN[0];
        let of = |text: String| {
            std::fs::write(&file, text).unwrap();
            protocol(file.to_str().unwrap()).map(|config| config.name).map_err(|error| error.0)
        };
        assert_eq!(of(text.into()).unwrap(), "lvdm16");
        assert_eq!(of(text.replace("runs: 10", "runs: 9").replace("name: lvdm16", "name: nine")).unwrap(), "nine");
        for other in [text.replace("runs: 10", "runs: 9"), text.replace("name: lvdm16", "name: lvdm16@5")] {
            let error = of(other).unwrap_err();
            assert!(error.contains("name of its own"), "{error}");
        }
    }

    /// What a protocol says need not be said again; said otherwise it is a mistake.
    #[test]
    fn data_take_from_the_protocol_what_they_do_not_say() {
        let folder = tempfile::tempdir().unwrap();
        let text = "{evaluation: {protocol: stylegan-v-16}, real: {dataset: {kind: folder, root: a}}, out: o, \
                    train: {dataset: {kind: folder, root: b}, workers: 3}, \
                    generated: {kind: clips, data: {dataset: {kind: folder, root: c}}}}";
        let file = folder.path().join("evaluate.yaml");
        std::fs::write(&file, text).unwrap();
        let load = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
            read::<crate::experiment::EvaluationExperiment>(&file, &overrides)
        };
        let found = load(&[]).unwrap();
        let train = found.train.clone().unwrap();
        assert_eq!((found.real.frames, found.real.resolution, train.resolution, train.workers), (16, 256, 256, 3));
        found.protocol().unwrap();
        let other = load(&["evaluation.protocol=stylegan-v-128"]).unwrap();
        assert_eq!((other.real.frames, other.protocol().unwrap().frames), (128, 128));
        let error = format!("{:#}", load(&["real.resolution=32"]).unwrap().protocol().unwrap_err());
        assert!(error.contains("resolution is 32") && error.contains("says 256"), "{error}");
        let error = load(&["evaluation.protocol=null"]).unwrap_err().0;
        assert!(error.contains("missing field `frames`"), "{error}");
        let error = load(&["evaluation.protocol=fvd"]).unwrap_err().0;
        assert!(error.contains("evaluation.protocol: there is no protocol `fvd`"), "{error}");
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
