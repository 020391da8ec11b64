//! The metrics that are known by name. A new one is a file beside this one and a line in [`METRICS`].

use std::{collections::BTreeMap, fmt, ops::Deref};

use anyhow::Result;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, MapAccess, Visitor},
};

use super::{
    frame_distance::FrameDistance, frechet::Fvd, mmd::Kvd, motion_distance::MotionDistance, video_metric::VideoMetric,
};

/// Every metric under its name, in the order of tables. The name is its key in `figures.json` and in experiments.
const METRICS: &[(&str, &dyn VideoMetric)] =
    &[("fvd", &Fvd), ("kvd", &Kvd), ("frame_distance", &FrameDistance), ("motion_distance", &MotionDistance)];

/// A metric of the registry, ordered as there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Metric(usize);

impl Metric {
    /// The Fréchet video distance.
    pub const FVD: Self = Metric::of("fvd");
    /// The kernel video distance.
    pub const KVD: Self = Metric::of("kvd");

    /// What is measured where an experiment names no metrics. How these are computed is part of every protocol under which
    /// one of them is measured.
    pub const DEFAULT: [Self; 2] = [Self::FVD, Self::KVD];

    /// The metric of this name, while the program is compiled.
    const fn of(name: &str) -> Self {
        let mut row = 0;
        while row < METRICS.len() {
            let (known, wanted) = (METRICS[row].0.as_bytes(), name.as_bytes());
            let mut same = 0;
            while same < known.len() && same < wanted.len() && known[same] == wanted[same] {
                same += 1;
            }
            if same == known.len() && same == wanted.len() {
                return Metric(row);
            }
            row += 1;
        }
        panic!("no metric of this name")
    }

    /// Its key in `figures.json` and in experiments, in small letters and underscores: `fvd`.
    pub fn name(self) -> &'static str {
        METRICS[self.0].0
    }

    /// Whether it is one of [`Self::DEFAULT`].
    pub fn is_default(self) -> bool {
        Self::DEFAULT.contains(&self)
    }

    /// Every metric, in the order of tables.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..METRICS.len()).map(Metric)
    }

    /// The metric of this name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|metric| metric.name() == name)
    }
}

impl Deref for Metric {
    type Target = dyn VideoMetric;

    fn deref(&self) -> &Self::Target {
        METRICS[self.0].1
    }
}

impl fmt::Debug for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Metric {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::named(name).ok_or_else(|| {
            let known: Vec<String> = Self::all().map(|metric| format!("`{}`", metric.name())).collect();
            format!("unknown variant `{name}`, expected one of {}", known.join(", "))
        })
    }
}

impl schemars::JsonSchema for Metric {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Metric".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"enum": Metric::all().map(|metric| metric.name()).collect::<Vec<_>>()})
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Metric {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Values by metric: `{"fvd": 151.4, "kvd": 12.0}`. Keys that name no metric are passed over in reading.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(transparent)]
pub struct Distances(BTreeMap<Metric, f64>);

impl Distances {
    /// The value of one metric, where it was measured.
    pub fn get(&self, metric: Metric) -> Option<f64> {
        self.0.get(&metric).copied()
    }

    /// Every metric with its value, in the order of tables.
    pub fn iter(&self) -> impl Iterator<Item = (Metric, f64)> {
        self.0.iter().map(|(metric, value)| (*metric, *value))
    }
}

impl FromIterator<(Metric, f64)> for Distances {
    fn from_iter<I: IntoIterator<Item = (Metric, f64)>>(values: I) -> Self {
        Distances(values.into_iter().collect())
    }
}

impl Extend<(Metric, f64)> for Distances {
    fn extend<I: IntoIterator<Item = (Metric, f64)>>(&mut self, values: I) {
        self.0.extend(values);
    }
}

impl<'de> Deserialize<'de> for Distances {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByName;

        impl<'de> Visitor<'de> for ByName {
            type Value = Distances;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("values by the names of metrics")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Distances, A::Error> {
                let mut found = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    match Metric::named(&key) {
                        Some(metric) => _ = found.insert(metric, map.next_value()?),
                        None => _ = map.next_value::<serde::de::IgnoredAny>()?,
                    }
                }
                Ok(Distances(found))
            }
        }

        deserializer.deserialize_map(ByName)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_known_by_name() {
        assert_eq!([Metric::FVD.name(), Metric::KVD.name()], ["fvd", "kvd"]);
        for metric in Metric::all() {
            assert_eq!(metric.name().parse(), Ok(metric));
            // other keys of figures.json are made of it by an ending
            for ending in ["_std", "_interval", "_extrapolated", "_extrapolates_from"] {
                assert!(!metric.name().ends_with(ending), "{metric:?}");
            }
            assert!(!["runs", "clips", "sets"].contains(&metric.name()), "{metric:?}");
        }
        let error = "fid".parse::<Metric>().unwrap_err();
        assert!(error.contains("`fid`") && error.contains("`fvd`, `kvd`"), "{error}");
        let text = r#"{"fvd": 1.5, "clips": 16, "another": "?", "kvd": -2.0}"#;
        let found: Distances = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&found).unwrap(), r#"{"fvd":1.5,"kvd":-2.0}"#);
        assert_eq!((found.get(Metric::KVD), found.iter().count()), (Some(-2.0), 2));
    }
}
