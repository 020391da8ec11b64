//! A sampler as one asks for it: a whole one, or some settings of the one that a run has.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use serde_json::{Map, Value, json};

use super::kinds::SamplerConfig;
use crate::autoregression::CodeSampling;

/// Which sampler, where a run has its own. In a file a mapping: with `kind` a whole sampler, without it settings that take the
/// place of the run's, be it a sampler of diffusion or how a transformer draws codes.
#[derive(Debug, Clone, PartialEq)]
pub enum SamplerChoice {
    /// `{kind: ddim, steps: 50, eta: 1.0}`; what is not said is the sampler's default.
    Whole(SamplerConfig),
    /// `{steps: 20}`.
    Settings(Map<String, Value>),
}

const KIND: &str = "kind";

/// The keys are those of a whole sampler.
impl schemars::JsonSchema for SamplerChoice {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        SamplerConfig::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        SamplerConfig::json_schema(generator)
    }
}

impl SamplerChoice {
    /// A sampler by the name of its kind, with these of its settings; hyphens in the name are underscores.
    ///
    /// # Errors
    /// A kind that there is not; a setting that the sampler does not have.
    pub fn named(name: &str, settings: Map<String, Value>) -> Result<Self> {
        let kind = Self::kind(name)?;
        let mut whole = Map::from_iter([(KIND.to_string(), kind.into())]);
        whole.extend(settings);
        let whole = serde_json::from_value(Value::Object(whole)).with_context(|| format!("the sampler {kind}"))?;
        Ok(SamplerChoice::Whole(whole))
    }

    /// The kind of sampler that a name on the command line stands for.
    ///
    /// # Errors
    /// Lists those that there are.
    pub fn kind(name: &str) -> Result<&'static str> {
        let written = name.replace('-', "_");
        let found = SamplerConfig::KINDS.iter().find(|kind| **kind == written);
        found.copied().with_context(|| format!("there is no sampler `{name}`, but {}", SamplerConfig::KINDS.join(", ")))
    }

    /// The sampler that is meant where a run's own is `own`.
    ///
    /// # Errors
    /// A setting that the run's sampler does not have, or that has another type.
    pub fn over(&self, own: &SamplerConfig) -> Result<SamplerConfig> {
        let settings = match self {
            SamplerChoice::Whole(whole) => return Ok(*whole),
            SamplerChoice::Settings(settings) => settings,
        };
        let mut all: Map<String, Value> = serde_json::from_value(serde_json::to_value(own)?)?;
        let kind = all[KIND].as_str().unwrap_or_default().to_string();
        for (name, value) in settings {
            let known: Vec<&String> = all.keys().filter(|key| *key != KIND).collect();
            ensure!(
                known.contains(&name),
                "`{name}` is no setting of the run's sampler, {kind}, which has {}; name a sampler that has it",
                known.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" and ")
            );
            all.insert(name.clone(), value.clone());
        }
        serde_json::from_value(Value::Object(all)).with_context(|| format!("the run's sampler, {kind}"))
    }
}

/// The names of the settings that there are, of all kinds, and of transformers over codes.
fn settings_of_all() -> BTreeSet<String> {
    let of_kind = |kind: &&str| {
        let whole = serde_json::from_value::<SamplerConfig>(json!({KIND: kind})).ok()?;
        serde_json::from_value::<Map<String, Value>>(serde_json::to_value(whole).ok()?).ok()
    };
    let all = SamplerConfig::KINDS.iter().filter_map(of_kind).flat_map(|settings| settings.into_iter());
    let of_codes = serde_json::to_value(CodeSampling::default()).and_then(serde_json::from_value::<Map<String, Value>>);
    all.chain(of_codes.unwrap_or_default()).map(|(name, _)| name).filter(|name| name != KIND).collect()
}

impl From<SamplerConfig> for SamplerChoice {
    fn from(whole: SamplerConfig) -> Self {
        SamplerChoice::Whole(whole)
    }
}

impl Serialize for SamplerChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            SamplerChoice::Whole(whole) => whole.serialize(serializer),
            SamplerChoice::Settings(settings) => settings.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for SamplerChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let given = Map::deserialize(deserializer)?;
        if !given.contains_key(KIND) {
            let known = settings_of_all();
            let foreign = given.keys().find(|name| !known.contains(*name));
            return match foreign {
                None => Ok(SamplerChoice::Settings(given)),
                Some(name) => Err(D::Error::custom(format!(
                    "unknown field `{name}`: no sampler has it; a sampler has a `kind`, and of {} what its kind has",
                    known.into_iter().map(|known| format!("`{known}`")).collect::<Vec<_>>().join(", ")
                ))),
            };
        }
        serde_json::from_value(Value::Object(given)).map(SamplerChoice::Whole).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Ddim, Ddpm, DpmSolver, RespacedDdpm, Variance};

    #[test]
    fn settings_take_the_place_of_the_run_s() {
        let read = |text: &str| serde_yaml::from_str::<SamplerChoice>(text);
        let own: SamplerConfig = RespacedDdpm { steps: 250 }.into();
        assert_eq!(read("{steps: 7}").unwrap().over(&own).unwrap(), RespacedDdpm { steps: 7 }.into());
        assert_eq!(read("{}").unwrap().over(&own).unwrap(), own);
        let whole = read("{kind: ddim, steps: 7, eta: 0.5}").unwrap();
        assert_eq!(whole, SamplerChoice::Whole(Ddim { steps: 7, eta: 0.5 }.into()));
        assert_eq!(whole.over(&own).unwrap(), Ddim { steps: 7, eta: 0.5 }.into());
        for (text, word) in [("{eta: 0.5}", "which has `steps`"), ("{steps: many}", "the run's sampler, respaced_ddpm")]
        {
            let error = format!("{:#}", read(text).unwrap().over(&own).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
        let error = read("{kind: ddmi}").unwrap_err().to_string();
        assert!(error.contains("`ddmi`") && error.contains("`ddim`"), "{error}");
        let error = read("{stesp: 7}").unwrap_err().to_string();
        assert!(
            error.contains("`stesp`")
                && error.contains("`eta`, ")
                && error.contains("`gamma`, ")
                && error.contains("`steps`, "),
            "{error}"
        );
        for text in ["{steps: 7}", "{top_k: 100, top_p: 0.8}", "{kind: ddim, steps: 7, eta: 0.5}"] {
            let choice = read(text).unwrap();
            assert_eq!(
                serde_json::from_value::<SamplerChoice>(serde_json::to_value(&choice).unwrap()).unwrap(),
                choice
            );
        }
    }

    /// Every kind of the registry can be named, in both spellings, and has defaults for all it needs.
    #[test]
    fn a_sampler_is_named_by_its_registry_line() {
        for kind in SamplerConfig::KINDS {
            for name in [kind.to_string(), kind.replace('_', "-")] {
                SamplerChoice::named(&name, Map::new()).unwrap();
            }
        }
        let named = |name: &str, setting: &str, value: Value| {
            SamplerChoice::named(name, Map::from_iter([(setting.to_string(), value)]))
        };
        assert_eq!(
            named("dpm-solver", "steps", 9.into()).unwrap(),
            SamplerChoice::Whole(DpmSolver { steps: 9 }.into())
        );
        let beta = named("ddpm", "variance", "beta".into()).unwrap();
        assert_eq!(beta, SamplerChoice::Whole(Ddpm { variance: Variance::Beta }.into()));
        let error = format!("{:#}", named("ddpm", "steps", 9.into()).unwrap_err());
        assert!(error.contains("the sampler ddpm") && error.contains("`steps`"), "{error}");
        assert!(SamplerChoice::named("pndm", Map::new()).unwrap_err().to_string().contains("unipc"));
    }
}
