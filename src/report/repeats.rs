//! Trainings that differ in their seed alone, and their figures together.

use std::{collections::BTreeMap, path::Path};

use anyhow::Result;
use serde_json::Value;

use crate::{
    checkpoint,
    metrics::{Figure, Metric},
    run_files::BASE_FOLDER,
};

/// A training's seed, and what else its samples depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct Seeded {
    seed: Value,
    /// The experiment without its seed; in place of the folder of a cascade's first stage the same of that stage.
    settings: Value,
}

impl Seeded {
    /// Of a run whose checkpoint holds this experiment.
    ///
    /// # Errors
    /// A cascade whose first stage cannot be read.
    pub(super) fn of(run: &Path, mut experiment: Value) -> Result<Self> {
        let seed = experiment.as_object_mut().and_then(|keys| keys.remove("seed")).unwrap_or_default();
        if let Some(stage) = experiment.get_mut("superresolution").filter(|stage| stage.is_object()) {
            let base = run.join(BASE_FOLDER);
            stage["base"] = Self::of(&base, checkpoint::open_head(&base)?.1.experiment)?.settings;
        }
        Ok(Seeded { seed, settings: experiment })
    }
}

/// What was measured of a training.
pub(super) struct Measured<'a> {
    /// Which evaluation it was.
    pub name: String,
    /// The training.
    pub training: &'a Seeded,
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
    /// All that the figure depends on besides the training's seed. Where the run lies says only which training it is.
    fn without_seed(&self) -> [Value; 3] {
        let mut generated = self.generated.clone();
        generated.as_object_mut().map(|keys| keys.remove("run"));
        [self.training.settings.clone(), generated, self.protocol_hash.as_str().into()]
    }
}

/// The trainings of which there are several, in the order in which they are first found. A seed counts once.
pub(super) fn repeats(found: &[Measured]) -> Vec<Repeats> {
    let mut groups: Vec<([Value; 3], Vec<&Measured>)> = Vec::new();
    for one in found {
        let of = one.without_seed();
        match groups.iter_mut().find(|(known, _)| *known == of) {
            Some((_, group)) if group.iter().all(|other| other.training.seed != one.training.seed) => {
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
        let trained = |seed: u64, steps: i64| {
            Seeded::of(Path::new("runs/x"), json!({"seed": seed, "trainer": {"steps": steps}})).unwrap()
        };
        let sampled = |run: &str, steps: i64| json!({"kind": "run", "run": run, "sampler": {"steps": steps}});
        let rows = [
            ("a", trained(0, 9), sampled("runs/0", 50), 10.0, "p"),
            ("b", trained(1, 9), sampled("runs/1", 50), 13.0, "p"),
            ("c", trained(2, 9), sampled("runs/2", 50), 16.0, "p"),
            ("the same seed again", trained(2, 9), sampled("runs/2", 50), 99.0, "p"),
            ("another training", trained(3, 8), sampled("runs/3", 50), 99.0, "p"),
            ("another sampler", trained(4, 9), sampled("runs/4", 20), 99.0, "p"),
            ("another protocol", trained(5, 9), sampled("runs/5", 50), 99.0, "q"),
        ];
        let figures = rows.each_ref().map(|row| figure(row.3));
        let found: Vec<Measured> = rows
            .iter()
            .zip(&figures)
            .map(|((name, training, generated, _, protocol_hash), figure)| Measured {
                name: (*name).into(),
                training,
                generated: generated.clone(),
                figure,
                protocol_hash: (*protocol_hash).into(),
            })
            .collect();
        let names = ["a", "b", "c"].map(String::from).into();
        let together = Repeats { names, protocol_hash: "p".into(), values: [(Metric::FVD, (13.0, 3.0))].into() };
        assert_eq!(repeats(&found), [together]);
        assert_eq!(repeats(&found[2..]), []);
    }
}
