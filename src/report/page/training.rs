//! What a page says of training runs: what they train, what their logs hold, in what their settings differ.

use serde_yaml::Value;

use super::model::Training;
use crate::report::Series;

impl Training {
    /// What is trained, as the run's checkpoint says.
    pub(super) fn task(&self) -> Option<&str> {
        self.trained.as_ref().map(|trained| trained.task.as_str())
    }

    /// The last step of the log.
    pub(super) fn steps(&self) -> Option<i64> {
        let last = |series: &Series| series.points.last().map(|(step, _)| *step as i64);
        self.metrics.iter().filter_map(last).max()
    }

    fn values(&self, metric: &str) -> Vec<f64> {
        let found = self.metrics.iter().filter(|series| series.name == metric).flat_map(|series| &series.points);
        let mut values: Vec<f64> = found.map(|(_, value)| *value).filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    pub(super) fn median(&self, metric: &str) -> Option<f64> {
        let values = self.values(metric);
        values.get(values.len() / 2).copied()
    }

    pub(super) fn most(&self, metric: &str) -> Option<f64> {
        self.values(metric).last().copied()
    }

    fn setting(&self, key: &str) -> Option<f64> {
        self.experiment.as_ref()?.1.get("trainer")?.get(key)?.as_f64()
    }
}

/// Every metric of the runs, in the order of the first run that has it.
pub(super) fn metric_names(runs: &[&Training]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for series in runs.iter().flat_map(|run| &run.metrics) {
        if !names.contains(&series.name) {
            names.push(series.name.clone());
        }
    }
    names
}

/// The runs in a list.
pub(super) fn names(runs: &[&Training]) -> String {
    runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// What a logged value is the mean of.
pub(super) fn averages(runs: &[&Training]) -> String {
    let every: Vec<(&str, f64)> =
        runs.iter().filter_map(|run| Some((run.name.as_str(), run.setting("log_every")?))).collect();
    let steps = match every.first() {
        None => String::new(),
        Some((_, first)) if every.iter().all(|(_, steps)| steps == first) => format!(" ({first} steps)"),
        Some(_) => {
            format!(
                " ({})",
                every.iter().map(|(run, steps)| format!("{steps} in {run}")).collect::<Vec<_>>().join(", ")
            )
        }
    };
    format!(
        "A logged value is the mean over the steps since the one before it{steps}; the learning rate is that of the last \
         step. Where a plot says that it shows means of several such values, a pale band goes from the least to the \
         greatest of them."
    )
}

/// The key paths whose values are not the same in all experiments, with the value of each.
pub(super) fn differences(runs: &[&Training]) -> Vec<(String, Vec<Option<String>>)> {
    let flat: Vec<Vec<(String, String)>> =
        runs.iter().filter_map(|run| run.experiment.as_ref()).map(|(_, value)| flattened(value)).collect();
    let mut keys: Vec<&String> = Vec::new();
    for (key, _) in flat.iter().flatten() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let of = |key: &String| flat.iter().map(|all| all.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone())).collect();
    let all = keys.into_iter().map(|key| (key.clone(), of(key)));
    all.filter(|(_, values): &(_, Vec<Option<String>>)| values.iter().any(|value| *value != values[0])).collect()
}

/// Key paths with their values, lists in one line.
fn flattened(value: &Value) -> Vec<(String, String)> {
    fn visit(path: &str, value: &Value, found: &mut Vec<(String, String)>) {
        match value {
            Value::Mapping(map) if !map.is_empty() => {
                for (key, value) in map {
                    let key = line(key);
                    visit(&if path.is_empty() { key } else { format!("{path}.{key}") }, value, found);
                }
            }
            value => found.push((path.to_string(), line(value))),
        }
    }
    fn line(value: &Value) -> String {
        match value {
            Value::String(text) => text.clone(),
            value => serde_json::to_string(value)
                .unwrap_or_else(|_| serde_yaml::to_string(value).unwrap_or_default().trim().to_string()),
        }
    }
    let mut found = Vec::new();
    visit("", value, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_differ_are_compared() {
        let a = Training::of("a", "{unet: {channels: 8, depths: [1, 2]}, seed: 0, start_from: null}");
        let b = Training::of("b", "{unet: {channels: 8, depths: [1, 3]}, seed: 0, prompt: 'x'}");
        let text = |value: &str| Some(value.to_string());
        let found = differences(&[&a, &b]);
        let wanted = [
            ("unet.depths", vec![text("[1,2]"), text("[1,3]")]),
            ("start_from", vec![text("null"), None]),
            ("prompt", vec![None, text("x")]),
        ];
        assert_eq!(found, wanted.map(|(key, values)| (key.to_string(), values)));
        assert!(differences(&[&a, &a]).is_empty() && differences(&[&a]).is_empty() && differences(&[]).is_empty());
    }

    #[test]
    fn a_log_says_the_median_and_the_most() {
        let mut run = Training::of("a", "{trainer: {log_every: 5}}");
        let points = [1.0, 100.0, 12.0].map(|value| (1.0, value)).to_vec();
        run.metrics = vec![Series { name: "peak_memory_gb".into(), points }];
        assert_eq!((run.median("peak_memory_gb"), run.most("peak_memory_gb")), (Some(12.0), Some(100.0)));
        assert!(averages(&[&run]).contains("(5 steps)"));
    }
}
