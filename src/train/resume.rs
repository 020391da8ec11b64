//! Going on with a run: from which checkpoint, and with which settings.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    checkpoint::{self, Checkpoint},
    distributed::Ranks,
    experiment::{Experiment, UserError},
};

/// The checkpoint with which a run goes on, if there is one: rank 0 finds it, the others read the same.
///
/// # Errors
/// Where the run is another task's, or no checkpoint can be read.
pub fn resume_point(run: &Path, task: &str, ranks: &Ranks) -> Result<Option<Checkpoint>> {
    let found = if ranks.is_first() { checkpoint::latest(run)? } else { None };
    let step = ranks.of_first(found.as_ref().map_or(-1, |(_, found)| found.progress.step))?;
    let (path, found) = match found {
        Some(found) => found,
        None if step < 0 => return Ok(None),
        None => {
            let path = checkpoint::path(run, step);
            let found = Checkpoint::read(&path).with_context(|| {
                format!("rank 0 goes on from {}; all ranks must see the same folder", path.display())
            })?;
            (path, found)
        }
    };
    Ok(Some(found.expect(task, &path)?))
}

/// Settings that may change while a network is trained: how it learns, and what is shown of it.
const FREE: [&str; 13] = [
    "optimizer",
    "trainer",
    "sampler",
    "data.workers",
    "text.prompts",
    "text.guidance",
    "labels.guidance",
    "blocks.video_frames",
    "start_from",
    "superresolution.base",
    "superresolution.level",
    "superresolution.reconstruction",
    "superresolution.overlap",
];

/// What else may differ from an imported checkpoint: of how it was trained it says nothing.
const FREE_AFTER_IMPORT: [&str; 9] = [
    "seed",
    "data",
    "labels",
    "latents",
    "loss",
    "trained",
    "blocks.mask_past",
    "blocks.mask_future",
    "network.dropout",
];

/// One setting that is not what the checkpoint was trained with.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    key: String,
    /// What differs, in words.
    difference: String,
    is_free: bool,
}

/// What differs between the settings of a checkpoint and those with which its run is to go on.
#[derive(Debug, Default)]
pub struct SettingsChanges(Vec<Change>);

impl SettingsChanges {
    /// Since a checkpoint; none where training starts.
    ///
    /// # Errors
    /// An experiment that cannot be written as JSON.
    pub fn since(found: Option<&Checkpoint>, experiment: &impl Experiment) -> Result<Self> {
        let Some(found) = found else { return Ok(SettingsChanges::default()) };
        let is_imported = found.progress.seconds == 0.0;
        Ok(Self::between(with_defaults(&found.experiment, experiment), &serde_json::to_value(experiment)?, is_imported))
    }

    fn between(before: Value, now: &Value, is_imported: bool) -> Self {
        let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
        settings("", &before, &mut old);
        settings("", now, &mut new);
        let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
        keys.sort();
        keys.dedup();
        let shown = |value: Option<&&Value>| value.map_or("none".to_string(), |value| in_words(value));
        let changed = keys.into_iter().filter(|key| old.get(*key) != new.get(*key)).map(|key| Change {
            key: key.clone(),
            difference: match (old.get(key), new.get(key)) {
                (Some(Value::Array(before)), Some(Value::Array(now))) if before.len() + now.len() > MOST_SHOWN => {
                    of_lists(before, now)
                }
                (before, now) => format!("{} → {}", shown(before), shown(now)),
            },
            is_free: is_in(key, &FREE) || is_imported && is_in(key, &FREE_AFTER_IMPORT),
        });
        SettingsChanges(changed.collect())
    }

    /// Says what differs. What changes the meaning of what was learned (the data, the seed, the objective, the noise
    /// schedule, a network) must have been asked for.
    ///
    /// # Errors
    /// [`UserError`]: it was not.
    pub fn check(&self, run: &Path, asked_for: bool, ranks: &Ranks) -> Result<()> {
        let said = |changes: &mut dyn Iterator<Item = &Change>| {
            let one = |Change { key, difference, .. }: &Change| format!("{key}: {difference}");
            changes.map(one).collect::<Vec<_>>().join("; ")
        };
        if !asked_for && self.0.iter().any(|change| !change.is_free) {
            return Err(UserError(format!(
                "{} was trained with other settings: {}. Give another --run to start anew, or --change-settings to go \
                 on with the new ones",
                run.display(),
                said(&mut self.0.iter().filter(|change| !change.is_free))
            ))
            .into());
        }
        if !self.0.is_empty() && ranks.is_first() {
            tracing::info!("settings that differ from the checkpoint's: {}", said(&mut self.0.iter()));
        }
        Ok(())
    }
}

/// Of longer lists, both together, it is said in what they differ.
const MOST_SHOWN: usize = 16;

fn in_words(value: &Value) -> String {
    match value {
        Value::Null => "none".to_string(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

/// In what two lists differ: what one alone holds, or the first place where their order differs.
fn of_lists(before: &[Value], now: &[Value]) -> String {
    let beyond = |one: &[Value], other: &[Value]| -> Option<String> {
        let mut alone = one.iter().filter(|value| !other.contains(value)).map(in_words);
        let first: Vec<String> = alone.by_ref().take(5).collect();
        let more = alone.count();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!first.is_empty()).then(|| format!("{}{more}", first.join(", ")))
    };
    let mut said = vec![format!("{} → {} entries", before.len(), now.len())];
    said.extend(beyond(before, now).map(|gone| format!("without {gone}")));
    said.extend(beyond(now, before).map(|new| format!("with {new}")));
    if said.len() == 1 {
        let place = before.iter().zip(now).position(|(before, now)| before != now);
        said.extend(place.map(|place| {
            format!("in another order, first {} in place of {}", in_words(&now[place]), in_words(&before[place]))
        }));
    }
    said.join(", ")
}

fn is_in(key: &str, list: &[&str]) -> bool {
    list.iter().any(|name| key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// The stored experiment with what this program has settings for since, at their defaults.
fn with_defaults<T: Experiment>(stored: &Value, _of_kind: &T) -> Value {
    let read: Result<T, _> = serde_json::from_value(stored.clone());
    read.and_then(serde_json::to_value).unwrap_or_else(|_| stored.clone())
}

/// Every value that is no mapping, by the path of its keys.
fn settings<'a>(path: &str, value: &'a Value, found: &mut BTreeMap<String, &'a Value>) {
    match value {
        Value::Object(children) => {
            for (key, child) in children {
                settings(&if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, child, found);
            }
        }
        Value::Null => {}
        leaf => drop(found.insert(path.to_string(), leaf)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(before: Value, now: &Value, is_imported: bool, asked_for: bool) -> Result<()> {
        SettingsChanges::between(before, now, is_imported).check(Path::new("runs/x"), asked_for, &Ranks::alone())
    }

    /// Of 101 classes it is said which came and went.
    #[test]
    fn of_long_lists_the_difference_is_shown() {
        let names: Vec<String> = (0..101).map(|number| format!("class {number}")).collect();
        let with = |names: &[String]| json!({"labels": {"classes": names}});
        let message = |now: &[String]| check(with(&names), &with(now), false, false).unwrap_err().to_string();
        let mut other = names.clone();
        other[3] = "Archery".into();
        let said = message(&other);
        assert!(said.contains("labels.classes: 101 → 101 entries, without class 3, with Archery."), "{said}");
        let said = message(&names[..90]);
        assert!(
            said.contains("101 → 90 entries, without class 90, class 91, class 92, class 93, class 94 and 6 more.")
        );
        let mut other = names.clone();
        other.swap(4, 7);
        let said = message(&other);
        assert!(said.contains("in another order, first class 7 in place of class 4"), "{said}");
    }

    #[test]
    fn what_changes_the_meaning_of_weights_must_be_asked_for() {
        let now = json!({"seed": 3, "data": {"frames": 4, "workers": 2}, "objective": {"predict": "noise"},
            "optimizer": {"learning_rate": 1e-3}, "latents": null});
        let with = |path: &str, value: Value| {
            let mut before = now.clone();
            *before.pointer_mut(path).unwrap() = value;
            before
        };
        check(now.clone(), &now, false, false).unwrap();
        for (path, value, words) in [
            ("/seed", json!(4), "seed: 4 → 3"),
            ("/data/frames", json!(8), "data.frames: 8 → 4"),
            ("/objective/predict", json!("velocity"), "objective.predict: velocity → noise"),
            ("/objective", json!(null), "objective.predict: none → noise"),
            ("/latents", json!("a.safetensors"), "latents: a.safetensors → none"),
        ] {
            let before = with(path, value);
            let error = check(before.clone(), &now, false, false).unwrap_err();
            assert!(error.is::<UserError>() && error.to_string().contains(words), "{error}");
            assert!(error.to_string().contains("--change-settings") && error.to_string().contains("runs/x"), "{error}");
            check(before.clone(), &now, false, true).unwrap();
            // nothing was learned here yet from data and seed
            assert_eq!(check(before, &now, true, false).is_ok(), !path.starts_with("/objective"), "{path}");
        }
        for (path, value) in [("/optimizer/learning_rate", json!(1.0)), ("/data/workers", json!(9))] {
            check(with(path, value), &now, false, false).unwrap();
        }
    }
}
