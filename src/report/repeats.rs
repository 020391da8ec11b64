//! Trainings that differ in their seed alone, and their figures together.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::metrics::{Figure, Metric};

/// What was measured of a training.
pub(super) struct Measured<'a> {
    /// Which evaluation it was.
    pub name: String,
    /// Of the training.
    pub experiment: Value,
    /// How its samples were made, as an evaluation says it.
    pub generated: Value,
    /// Of the samples.
    pub figure: &'a Figure,
    /// The protocol that it was measured under.
    pub protocol_hash: String,
}

/// Several trainings, each with a seed of its own.
#[derive(Debug, PartialEq)]
pub(super) struct Repeats {
    /// Their evaluations.
    pub names: Vec<String>,
    /// The protocol of all of them.
    pub protocol_hash: String,
    /// Mean and standard deviation (divided by their number less one) over the trainings, by metric.
    pub values: BTreeMap<Metric, (f64, f64)>,
}

impl Measured<'_> {
    /// All that the figure depends on besides the training's seed. Where run folders lie, and that of a cascade's first
    /// stage, says nothing else than which training it is.
    fn without_seed(&self) -> [Value; 3] {
        let without = |value: &mut Value, key: &str| {
            value.as_object_mut().map(|keys| keys.remove(key));
        };
        let (mut experiment, mut generated) = (self.experiment.clone(), self.generated.clone());
        without(&mut experiment, "seed");
        if let Some(superresolution) = experiment.get_mut("superresolution") {
            without(superresolution, "base");
        }
        without(&mut generated, "run");
        [experiment, generated, self.protocol_hash.as_str().into()]
    }
}

/// The trainings of which there are several, in the order in which they are first found. A seed counts once.
pub(super) fn repeats(found: &[Measured]) -> Vec<Repeats> {
    let mut groups: Vec<([Value; 3], Vec<&Measured>)> = Vec::new();
    for one in found {
        let of = one.without_seed();
        match groups.iter_mut().find(|(known, _)| *known == of) {
            Some((_, group)) if group.iter().all(|other| other.experiment["seed"] != one.experiment["seed"]) => {
                group.push(one);
            }
            Some(_) => {}
            None => groups.push((of, vec![one])),
        }
    }
    groups.iter().filter(|(_, group)| group.len() > 1).map(|(_, group)| together(group)).collect()
}

fn together(group: &[&Measured]) -> Repeats {
    let count = group.len() as f64;
    let of_metric = |metric: &Metric| {
        let values = group.iter().map(|one| one.figure.estimates.get(metric).map(|estimate| estimate.value));
        let values: Vec<f64> = values.collect::<Option<_>>()?;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
        Some((*metric, (mean, variance.sqrt())))
    };
    Repeats {
        names: group.iter().map(|one| one.name.clone()).collect(),
        protocol_hash: group[0].protocol_hash.clone(),
        values: group[0].figure.estimates.keys().filter_map(of_metric).collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::metrics::Estimate;

    fn figure(fvd: f64) -> Figure {
        let estimate = Estimate { value: fvd, ..Estimate::default() };
        Figure { estimates: [(Metric::FVD, estimate)].into(), runs: Vec::new(), clips: [4, 4] }
    }

    #[test]
    fn trainings_that_differ_in_their_seed_alone_stand_together() {
        let trained = |seed: u64, base: &str, steps: i64| json!({"seed": seed, "superresolution": {"base": base, "noise": 400}, "trainer": {"steps": steps}});
        let sampled = |run: &str, steps: i64| json!({"kind": "run", "run": run, "sampler": {"steps": steps}});
        let rows = [
            ("a", trained(0, "runs/base-0", 9), sampled("runs/0", 50), 10.0, "p"),
            ("b", trained(1, "runs/base-1", 9), sampled("runs/1", 50), 13.0, "p"),
            ("c", trained(2, "runs/base-2", 9), sampled("runs/2", 50), 16.0, "p"),
            ("the same seed again", trained(2, "runs/base-2", 9), sampled("runs/2", 50), 99.0, "p"),
            ("another training", trained(3, "runs/base-3", 8), sampled("runs/3", 50), 99.0, "p"),
            ("another sampler", trained(4, "runs/base-4", 9), sampled("runs/4", 20), 99.0, "p"),
            ("another protocol", trained(5, "runs/base-5", 9), sampled("runs/5", 50), 99.0, "q"),
        ];
        let figures = rows.each_ref().map(|row| figure(row.3));
        let found: Vec<Measured> = rows
            .iter()
            .zip(&figures)
            .map(|((name, experiment, generated, _, protocol_hash), figure)| Measured {
                name: (*name).into(),
                experiment: experiment.clone(),
                generated: generated.clone(),
                figure,
                protocol_hash: (*protocol_hash).into(),
            })
            .collect();
        let names = ["a", "b", "c"].map(String::from).into();
        assert_eq!(
            repeats(&found),
            [Repeats { names, protocol_hash: "p".into(), values: [(Metric::FVD, (13.0, 3.0))].into() }]
        );
        assert_eq!(repeats(&found[2..]), []);
    }
}
