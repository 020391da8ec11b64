//! Reading an experiment file: strict, overridable, with errors that name key, line and the nearest right key.

use std::{fs, path::Path};

use serde::{Serialize, de::DeserializeOwned};
use serde_yaml::{Mapping, Value};

use super::Mistake;

/// Reads `path` as a `T`, after replacing what `overrides` (`key.path=value`) say.
///
/// # Errors
/// [`Mistake`]: an unreadable file, bad YAML, an unknown key, a wrong type, an override of a key that does not exist.
pub fn read<T: Serialize + DeserializeOwned>(path: &Path, overrides: &[String]) -> Result<T, Mistake> {
    let name = path.display().to_string();
    let text = fs::read_to_string(path).map_err(|error| Mistake(format!("{name}: {error}")))?;
    parse(&name, &text, overrides)
}

/// [`read`] for a text; `name` stands in errors.
///
/// # Errors
/// As [`read`].
pub fn parse<T: Serialize + DeserializeOwned>(name: &str, text: &str, overrides: &[String]) -> Result<T, Mistake> {
    let mut value: Value = serde_yaml::from_str(text).map_err(|error| Mistake(format!("{name}: not YAML: {error}")))?;
    if value.is_null() {
        value = Value::Mapping(Mapping::new());
    }
    let mut overridden = Vec::new();
    for text in overrides {
        overridden.push(replace(&mut value, text)?);
    }
    super::evaluation::complete(&mut value)
        .map_err(|error| Mistake(format!("{name}: evaluation.protocol: {error}")))?;
    let blamed = |o: &&Vec<String>, path: &[String]| !path.is_empty() && (path.starts_with(o) || o.starts_with(path));
    let place = |path: &[String]| match overridden.iter().find(|o| blamed(o, path)) {
        Some(key) if line_of(text, path).is_none() || path == key.as_slice() => format!("override `{}`", key.join(".")),
        _ => match line_of(text, path) {
            Some(line) => format!("{name}:{line}"),
            None => name.to_string(),
        },
    };
    let typed: T = serde_path_to_error::deserialize(value.clone()).map_err(|error| {
        // the path of the whole file is "."
        let path: Vec<String> =
            error.path().to_string().split('.').filter(|p| !p.is_empty()).map(String::from).collect();
        let message = error.inner().to_string();
        let path = refine::<T>(&value, path, &message);
        // a required key that is missing may stand there misspelt
        let misspelt = quoted(&message, "missing field `").and_then(|missing| {
            let Some(Value::Mapping(siblings)) = find(&value, &path) else { return None };
            let wrong = nearest(&missing, siblings.keys().filter_map(Value::as_str))?.to_string();
            (!is_read::<T>(&value, &path, &wrong)).then(|| (missing, [path.clone(), vec![wrong]].concat()))
        });
        if let Some((missing, path)) = misspelt {
            return Mistake(format!("{}: unknown key `{}`; did you mean `{missing}`?", place(&path), path.join(".")));
        }
        let key = if path.is_empty() { String::new() } else { format!("`{}`: ", path.join(".")) };
        Mistake(format!("{}: {key}{message}{}{}", place(&path), suggestion(&message), unsaid(&path, &message)))
    })?;
    // what the type wrote back is what it read: a key of the file that is missing there was not read
    let known = serde_yaml::to_value(&typed).map_err(|error| Mistake(format!("{name}: {error}")))?;
    if let Some((path, candidates)) = unread(&value, &known, &mut Vec::new()) {
        let key = path.last().cloned().unwrap_or_default();
        let near = nearest(&key, candidates.iter().map(String::as_str));
        let hint = match near {
            Some(near) => format!("; did you mean `{near}`?"),
            None => format!("; known here: {}", candidates.join(", ")),
        };
        return Err(Mistake(format!("{}: unknown key `{}`{hint}", place(&path), path.join("."))));
    }
    Ok(typed)
}

/// Puts an override into the tree and returns its path.
fn replace(root: &mut Value, text: &str) -> Result<Vec<String>, Mistake> {
    let Some((key, new)) = text.split_once('=') else {
        return Err(Mistake(format!("`{text}` is not an override: write key.path=value")));
    };
    let new: Value = serde_yaml::from_str(new)
        .map_err(|error| Mistake(format!("override `{text}`: the value is not YAML: {error}")))?;
    let path: Vec<String> = key.split('.').map(String::from).collect();
    let mut at = root;
    for part in &path {
        if !at.is_mapping() {
            *at = Value::Mapping(Mapping::new());
        }
        let Value::Mapping(mapping) = at else { unreachable!("made one above") };
        at = mapping.entry(Value::String(part.clone())).or_insert(Value::Null);
    }
    *at = new;
    Ok(path)
}

/// Serde loses the way inside tagged enums. The child without which the complaint goes away is its cause.
fn refine<T: DeserializeOwned>(value: &Value, mut path: Vec<String>, message: &str) -> Vec<String> {
    if let Some(key) = quoted(message, "unknown field `") {
        if path.last().map(String::as_str) != Some(&key) {
            path.push(key);
        }
        return path;
    }
    if message.starts_with("missing field") {
        return path;
    }
    loop {
        let Some(Value::Mapping(children)) = find(value, &path) else { return path };
        // without its tag an enum complains of nothing else: it is asked last
        let (tag, others): (Vec<&str>, Vec<&str>) =
            children.keys().filter_map(Value::as_str).partition(|k| *k == "kind");
        let culprit = others.into_iter().chain(tag).find(|key| {
            let mut without = value.clone();
            if let Some(Value::Mapping(mapping)) = find_mut(&mut without, &path) {
                mapping.remove(key);
            }
            match serde_path_to_error::deserialize::<_, T>(without) {
                Ok(_) => true,
                Err(error) => error.inner().to_string() == format!("missing field `{key}`"),
            }
        });
        match culprit {
            Some(key) => path.push(key.to_string()),
            None => return path,
        }
    }
}

/// Whether the type reads the key: another value in its place is then complained of, as a wrong type.
fn is_read<T: DeserializeOwned>(value: &Value, path: &[String], key: &str) -> bool {
    let mut with_nonsense = value.clone();
    if let Some(Value::Mapping(mapping)) = find_mut(&mut with_nonsense, path) {
        mapping.insert(key.into(), Value::Sequence(vec![Value::Null; 9]));
    }
    let complaint =
        serde_path_to_error::deserialize::<_, T>(with_nonsense).err().map(|error| error.inner().to_string());
    complaint.is_some_and(|message| !message.starts_with("missing field"))
}

fn find<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |at, key| at.get(key.as_str()))
}

fn find_mut<'a>(value: &'a mut Value, path: &[String]) -> Option<&'a mut Value> {
    path.iter().try_fold(value, |at, key| at.get_mut(key.as_str()))
}

/// The first key of `value` that `known` lacks, and what it could have been.
fn unread(value: &Value, known: &Value, path: &mut Vec<String>) -> Option<(Vec<String>, Vec<String>)> {
    let (Value::Mapping(value), Value::Mapping(known)) = (value, known) else { return None };
    for (key, child) in value {
        let text = key.as_str().map_or_else(|| format!("{key:?}"), String::from);
        path.push(text);
        match known.get(key) {
            None => {
                let candidates = known.keys().filter_map(Value::as_str).map(String::from).collect();
                return Some((path.clone(), candidates));
            }
            Some(other) => {
                if let Some(found) = unread(child, other, path) {
                    return Some(found);
                }
            }
        }
        path.pop();
    }
    None
}

/// The text between `before` and the next backquote.
fn quoted(message: &str, before: &str) -> Option<String> {
    let rest = &message[message.find(before)? + before.len()..];
    Some(rest[..rest.find('`')?].to_string())
}

/// For serde's own "unknown field/variant `x`, expected …": the nearest of what it expected.
fn suggestion(message: &str) -> String {
    let wrong = quoted(message, "unknown field `").or_else(|| quoted(message, "unknown variant `"));
    let Some(wrong) = wrong else { return String::new() };
    let expected = message.split_once("expected").map_or("", |(_, rest)| rest);
    match nearest(&wrong, expected.split('`').skip(1).step_by(2)) {
        Some(near) => format!("; did you mean `{near}`?"),
        None => String::new(),
    }
}

/// For data of an evaluation that lack what a protocol would say.
fn unsaid(path: &[String], message: &str) -> &'static str {
    let of_evaluation =
        path.first().is_some_and(|key| matches!(key.as_str(), "real" | "train" | "generated" | "curves"));
    let missing = quoted(message, "missing field `");
    match of_evaluation && missing.is_some_and(|key| matches!(key.as_str(), "frames" | "resolution")) {
        true => "; no `protocol` of `evaluation` says it either",
        false => "",
    }
}

/// The most similar candidate, if it is similar at all.
fn nearest<'a>(wrong: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|c| (strsim::damerau_levenshtein(wrong, c), c))
        .filter(|(distance, c)| *distance <= wrong.len().max(c.len()).div_ceil(2))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, c)| c)
}

/// The line, from 1, on which the last key of a path stands: each key is looked for behind its parent.
fn line_of(text: &str, path: &[String]) -> Option<usize> {
    let mut at = 0;
    for key in path {
        at = loop {
            let found = at + text[at..].find(key.as_str())?;
            let end = found + key.len();
            let line_start = text[..found].rfind('\n').map_or(0, |i| i + 1);
            let comment = text[line_start..found].contains('#');
            let starts = text[..found].chars().next_back().is_none_or(|c| c.is_whitespace() || "{,\"'".contains(c));
            let ends = text[end..].trim_start_matches(['"', '\'', ' ']).starts_with(':');
            if starts && ends && !comment {
                break end;
            }
            at = end;
        };
    }
    (!path.is_empty()).then(|| text[..at].matches('\n').count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::AutoencoderExperiment;

    const GOOD: &str = "\
# a comment with resolution: 3
data:
  dataset: {kind: folder, root: clips}
  frames: 16
  resolution: 64
optimizer: {kind: adam, learning_rate: 1.0e-4}
trainer: {steps: 10, batch: 2}
";

    fn mistake(text: &str, overrides: &[&str]) -> String {
        let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
        parse::<AutoencoderExperiment>("x.yaml", text, &overrides).unwrap_err().0
    }

    #[test]
    fn a_good_file_is_read_and_overridden() {
        let overrides = ["autoencoder.channels=16".to_string(), "data.dataset.root=other".to_string()];
        let experiment: AutoencoderExperiment = parse("x.yaml", GOOD, &overrides).unwrap();
        assert_eq!((experiment.autoencoder.channels, experiment.trainer.batch), (16, 2));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_its_neighbour() {
        let error = mistake(&GOOD.replace("  resolution", "  resolutoin"), &[]);
        assert!(
            error.contains("x.yaml:5") && error.contains("`data.resolutoin`") && error.contains("`resolution`"),
            "{error}"
        );
        let error = mistake(&GOOD.replace("steps: 10", "steps: 10, stepz: 3"), &[]);
        assert!(
            error.contains("x.yaml:7") && error.contains("`trainer.stepz`") && error.contains("`steps`"),
            "{error}"
        );
    }

    #[test]
    fn inside_a_tagged_enum_too() {
        let error = mistake(&GOOD.replace("root: clips", "rooot: clips"), &[]);
        assert!(error.contains("x.yaml:3") && error.contains("data.dataset"), "{error}");
        let error = mistake(&GOOD.replace("root: clips", "root: [1]"), &[]);
        assert!(error.contains("x.yaml:3") && error.contains("`data.dataset.root`"), "{error}");
        let error = mistake(&GOOD.replace("kind: folder", "kind: foldr"), &[]);
        assert!(error.contains("x.yaml:3") && error.contains("did you mean `folder`"), "{error}");
    }

    #[test]
    fn a_wrong_type_is_named_with_its_line() {
        let error = mistake(&GOOD.replace("frames: 16", "frames: many"), &[]);
        assert!(error.contains("x.yaml:4") && error.contains("`data.frames`") && error.contains("many"), "{error}");
    }

    #[test]
    fn a_missing_key_of_the_whole_file_is_named() {
        let without = GOOD.replace("optimizer: {kind: adam, learning_rate: 1.0e-4}\n", "");
        assert_eq!(mistake(&without, &[]), "x.yaml: missing field `optimizer`");
    }

    #[test]
    fn a_required_key_that_is_misspelt_is_named() {
        let error = mistake(&GOOD.replace("optimizer:", "optimiser:"), &[]);
        assert!(error.contains("x.yaml:6") && error.contains("`optimiser`; did you mean `optimizer`?"), "{error}");
        let error = mistake(&GOOD.replace("steps: 10", "stesp: 10"), &[]);
        assert!(error.contains("x.yaml:7") && error.contains("`trainer.stesp`; did you mean `steps`?"), "{error}");
    }

    #[test]
    fn an_override_of_nothing_is_named() {
        let error = mistake(GOOD, &["trainer.stps=3"]);
        assert!(error.contains("override `trainer.stps`") && error.contains("`steps`"), "{error}");
        let error = mistake(GOOD, &["trainer.steps=three"]);
        assert!(error.contains("override `trainer.steps`"), "{error}");
        let error = mistake(GOOD, &["trainer.steps"]);
        assert!(error.contains("key.path=value"), "{error}");
    }
}
