//! The figures of one set of clips, by metric, as code and as files have them.

use std::{collections::BTreeMap, fmt};

use anyhow::{Result, ensure};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, IgnoredAny, MapAccess, Visitor},
    ser::SerializeMap,
};
use tch::Tensor;

use super::{
    divisor::Divisor,
    estimate::{Interval, SUBSETS, about, extrapolated, jackknife, mean_and_std},
    registry::{Distances, Metric},
};

/// What one metric says of one set of clips against the real ones.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Estimate {
    /// The mean over runs.
    pub value: f64,
    /// The standard deviation over runs, divided by their number as the released code does; none of a single run.
    pub std: Option<f64>,
    /// 95 % by the jackknife about the mean of all runs: what other clips, real and generated, would move. None of fewer
    /// than three clips.
    pub interval: Option<Interval>,
    /// Only of a metric that is biased.
    pub extrapolation: Option<Extrapolation>,
}

/// A metric at infinitely many clips.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extrapolation {
    /// The mean over runs.
    pub value: f64,
    /// How many clips either set must have for the value to come near the limit. With fewer, features have more numbers
    /// than there are rows of them, and the value stays above the limit.
    pub least_clips: i64,
}

impl Estimate {
    /// One run for each pair of `[real, generated]` features, without an extrapolation.
    ///
    /// # Errors
    /// As [`VideoMetric::compute`](super::VideoMetric::compute); no runs.
    fn of(metric: Metric, pairs: &[[&Tensor; 2]], values: &[f64], divisor: Divisor) -> Result<Self> {
        let (value, std) = mean_and_std(values.iter().copied());
        let interval = jackknife(metric, pairs, divisor)?.map(|error| about(value, error));
        Ok(Estimate { value, std, interval, extrapolation: None })
    }
}

/// The figures of one set of clips against the real ones, by metric.
///
/// In `figures.json` the keys of a metric are its name and its name with an ending: `fvd`, `fvd_std`, `fvd_interval`,
/// `fvd_extrapolated`, `fvd_extrapolates_from`.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// By metric.
    pub estimates: BTreeMap<Metric, Estimate>,
    /// Every run.
    pub runs: Vec<Distances>,
    /// Real clips, and generated ones.
    pub clips: [i64; 2],
}

impl Figure {
    /// Of features `[N, …]` of real and of generated clips. One run for each pair of sets: where one of the two is not
    /// redrawn it has one set, which serves all runs. `seed` draws the subsets of extrapolations.
    ///
    /// # Errors
    /// As [`VideoMetric::compute`](super::VideoMetric::compute).
    pub fn of(metrics: &[Metric], real: &[Tensor], generated: &[Tensor], divisor: Divisor, seed: u64) -> Result<Self> {
        let mut figure = Self::without_extrapolation(metrics, real, generated, divisor)?;
        let pairs = pairs_of(real, generated)?;
        let subsets = SUBSETS.div_ceil(pairs.len() as u64);
        for (metric, estimate) in figure.estimates.iter_mut().filter(|(metric, _)| metric.is_biased()) {
            let values: Vec<f64> = (seed..)
                .zip(&pairs)
                .map(|(seed, [real, generated])| extrapolated(*metric, real, generated, divisor, subsets, seed))
                .collect::<Result<_>>()?;
            let value = mean_and_std(values.into_iter()).0;
            estimate.extrapolation = Some(Extrapolation { value, least_clips: least_clips(&real[0]) });
        }
        Ok(figure)
    }

    /// As [`Figure::of`] without the extrapolations, which take the most time.
    ///
    /// # Errors
    /// The same.
    pub fn without_extrapolation(
        metrics: &[Metric],
        real: &[Tensor],
        generated: &[Tensor],
        divisor: Divisor,
    ) -> Result<Self> {
        let pairs = pairs_of(real, generated)?;
        let mut runs = vec![Distances::default(); pairs.len()];
        let mut estimates = BTreeMap::new();
        for &metric in metrics {
            let values: Vec<f64> = pairs
                .iter()
                .map(|[real, generated]| metric.compute(real, generated, divisor))
                .collect::<Result<_>>()?;
            runs.iter_mut().zip(&values).for_each(|(run, value)| run.extend([(metric, *value)]));
            estimates.insert(metric, Estimate::of(metric, &pairs, &values, divisor)?);
        }
        Ok(Figure { estimates, runs, clips: [real[0].size()[0], generated[0].size()[0]] })
    }

    /// The figures of other metrics on the same clips are added to these.
    pub fn add(&mut self, other: Figure) {
        self.estimates.extend(other.estimates);
        self.runs.iter_mut().zip(&other.runs).for_each(|(run, other)| run.extend(other.iter()));
    }

    /// A metric's value, where it was measured.
    pub fn value(&self, metric: Metric) -> Option<f64> {
        self.estimates.get(&metric).map(|estimate| estimate.value)
    }

    /// Whether there are enough clips for a metric's extrapolation to come near the limit.
    pub fn reaches(&self, extrapolation: &Extrapolation) -> bool {
        self.clips.iter().all(|clips| *clips >= extrapolation.least_clips)
    }
}

/// Each run's pair of sets.
fn pairs_of<'a>(real: &'a [Tensor], generated: &'a [Tensor]) -> Result<Vec<[&'a Tensor; 2]>> {
    ensure!(!real.is_empty() && !generated.is_empty(), "there are no real or no generated clips");
    let count = real.len().max(generated.len());
    Ok((0..count).map(|run| [&real[run % real.len()], &generated[run % generated.len()]]).collect())
}

/// How many clips have as many rows of features as a row has numbers, of features `[N, D]` or `[N, rows, D]`.
fn least_clips(features: &Tensor) -> i64 {
    let size = features.size();
    let rows: i64 = size[1..size.len() - 1].iter().product();
    (size[size.len() - 1] as u64).div_ceil(rows.max(1) as u64) as i64
}

const STD: &str = "_std";
const INTERVAL: &str = "_interval";
const EXTRAPOLATED: &str = "_extrapolated";
const EXTRAPOLATES_FROM: &str = "_extrapolates_from";

/// What an extrapolation needs where a file of figures does not say it: the width of I3D's logits, which were the only
/// features then.
const LEAST_CLIPS_OF_I3D: i64 = 400;

impl Serialize for Figure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let key = |metric: &Metric, ending: &str| format!("{}{ending}", metric.name());
        for (metric, estimate) in &self.estimates {
            map.serialize_entry(metric, &estimate.value)?;
        }
        for (metric, estimate) in &self.estimates {
            map.serialize_entry(&key(metric, STD), &estimate.std)?;
        }
        map.serialize_entry("runs", &self.runs)?;
        for (metric, estimate) in &self.estimates {
            map.serialize_entry(&key(metric, INTERVAL), &estimate.interval)?;
        }
        for (metric, estimate) in &self.estimates {
            if let Some(Extrapolation { value, least_clips }) = &estimate.extrapolation {
                map.serialize_entry(&key(metric, EXTRAPOLATED), value)?;
                map.serialize_entry(&key(metric, EXTRAPOLATES_FROM), least_clips)?;
            }
        }
        map.serialize_entry("clips", &self.clips)?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for Figure {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Figure;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a figure: values by the names of metrics")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Figure, A::Error> {
                let mut values = BTreeMap::new();
                let mut estimates: BTreeMap<Metric, Estimate> = BTreeMap::new();
                let (mut runs, mut clips) = (None, None);
                let mut least: BTreeMap<Metric, i64> = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    let with = |ending| key.strip_suffix(ending).and_then(Metric::named);
                    if let Some(metric) = Metric::named(&key) {
                        values.insert(metric, map.next_value()?);
                    } else if let Some(metric) = with(STD) {
                        estimates.entry(metric).or_default().std = map.next_value()?;
                    } else if let Some(metric) = with(INTERVAL) {
                        estimates.entry(metric).or_default().interval = map.next_value()?;
                    } else if let Some(metric) = with(EXTRAPOLATED) {
                        let least_clips = LEAST_CLIPS_OF_I3D;
                        let extrapolation = Extrapolation { value: map.next_value()?, least_clips };
                        estimates.entry(metric).or_default().extrapolation = Some(extrapolation);
                    } else if let Some(metric) = with(EXTRAPOLATES_FROM) {
                        least.insert(metric, map.next_value()?);
                    } else if key == "runs" {
                        runs = Some(map.next_value()?);
                    } else if key == "clips" {
                        clips = Some(map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                let estimates = values.into_iter().map(|(metric, value)| {
                    let mut estimate = Estimate { value, ..estimates.remove(&metric).unwrap_or_default() };
                    if let (Some(extrapolation), Some(clips)) = (&mut estimate.extrapolation, least.get(&metric)) {
                        extrapolation.least_clips = *clips;
                    }
                    (metric, estimate)
                });
                Ok(Figure {
                    estimates: estimates.collect(),
                    runs: runs.ok_or_else(|| A::Error::missing_field("runs"))?,
                    clips: clips.ok_or_else(|| A::Error::missing_field("clips"))?,
                })
            }
        }

        deserializer.deserialize_map(Keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of the first release, and what it becomes: the same keys in the same order.
    #[test]
    fn figures_keep_the_keys_that_people_read() {
        let old = r#"{"fvd":678.5,"kvd":-1.5,"fvd_std":3.5,"kvd_std":0.5,"runs":[{"fvd":675.0,"kvd":-2.0},{"fvd":682.0,"kvd":-1.0}],"fvd_interval":[600.0,757.0],"kvd_interval":null,"fvd_extrapolated":500.25,"clips":[96,64]}"#;
        let figure: Figure = serde_json::from_str(old).unwrap();
        assert_eq!((figure.value(Metric::FVD), figure.clips), (Some(678.5), [96, 64]));
        let extrapolation = figure.estimates[&Metric::FVD].extrapolation.unwrap();
        assert_eq!((extrapolation.value, extrapolation.least_clips), (500.25, 400));
        let new = serde_json::to_string(&figure).unwrap();
        assert_eq!(new.replace(r#""fvd_extrapolates_from":400,"#, ""), old);
        assert_eq!(serde_json::from_str::<Figure>(&new).unwrap(), figure);
        // what is no metric is passed over; a value that is none is named
        let unknown = old.replace("{\"fvd\":678.5", "{\"fid\":\"?\",\"fvd\":678.5");
        assert_eq!(serde_json::from_str::<Figure>(&unknown).unwrap(), figure);
        assert!(serde_json::from_str::<Figure>(&old.replace("678.5", "\"much\"")).is_err());
    }

    /// Several rows a clip: so many clips have as many rows as a row has numbers.
    #[test]
    fn an_extrapolation_counts_rows() {
        let features = |size: &[i64]| Tensor::zeros(size, (tch::Kind::Float, tch::Device::Cpu));
        assert_eq!(
            [&[7, 400][..], &[7, 16, 512], &[7, 16, 500]].map(|size| least_clips(&features(size))),
            [400, 32, 32]
        );
    }
}
