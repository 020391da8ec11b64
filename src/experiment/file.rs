//! Reading an experiment file: strict, overridable, with errors that name key, line and the nearest right key.

mod merge_keys;
mod overrides;

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};
use serde_path_to_error::Segment;
use serde_yaml::{Mapping, Value};

use self::{merge_keys::merge, overrides::Override};
use super::user_error::UserError;
use crate::text_file::{BYTE_ORDER_MARK, read_text};

/// Keys of the whole file that have an older name, which is read as well: in files, in overrides of either, and in
/// experiments that checkpoints hold (there by the `alias` of the field).
const OLDER_NAMES: [(&str, &str); 1] = [("unet", "network")];

/// Fills in what a file may leave out because something else in it says so.
pub type Complete = fn(&mut Value) -> Result<(), UserError>;

/// Reads `path` as a `T`, after replacing what `overrides` (`key.path=value`) say and filling in what `complete` knows.
///
/// # Errors
/// [`UserError`]: an unreadable file, bad YAML, an unknown key, a wrong type, a number that is not finite, an override of a
/// key that does not exist.
pub fn read<T: Serialize + DeserializeOwned>(
    path: &Path,
    overrides: &[String],
    complete: Complete,
) -> Result<T, UserError> {
    let name = path.display().to_string();
    let text = read_text(path).map_err(|error| UserError(format!("{name}: {error}")))?;
    parse(&name, &text, overrides, complete)
}

/// [`read`] for a text; `name` stands in errors.
///
/// # Errors
/// As [`read`].
pub fn parse<T: Serialize + DeserializeOwned>(
    name: &str,
    text: &str,
    overrides: &[String],
    complete: Complete,
) -> Result<T, UserError> {
    let not_yaml = |error| UserError(format!("{name}: not YAML: {error}"));
    let text = text.trim_start_matches(BYTE_ORDER_MARK);
    let mut file: Value = serde_yaml::from_str(text).map_err(not_yaml)?;
    merge(&mut file).map_err(|error| UserError(format!("{name}: `<<`: {error}")))?;
    if file.is_null() {
        file = Value::Mapping(Mapping::new());
    }
    let mut overrides: Vec<Override> = overrides.iter().map(|text| Override::parse(text)).collect::<Result<_, _>>()?;
    for (old, new) in OLDER_NAMES {
        let has = |key: &str| file.get(key).is_some();
        if has(old) && has(new) {
            let place = line_of(text, &[old.into()]).map_or(name.to_string(), |line| format!("{name}:{line}"));
            return Err(UserError(format!(
                "{place}: `{old}` is the older name of `{new}`, and the file has both: leave one out"
            )));
        }
        // all by one of the two: the file's own, else the one that is written first
        let first = overrides.iter().map(|o| o.path[0].as_str()).find(|key| [old, new].contains(key));
        let own = [old, new].into_iter().find(|key| has(key)).or(first).unwrap_or(new).to_string();
        for one in overrides.iter_mut().filter(|o| [old, new].contains(&o.path[0].as_str())) {
            one.path[0].clone_from(&own);
        }
    }
    let overridden = |readings: &[usize]| -> Result<Value, UserError> {
        let mut value = file.clone();
        for (one, &reading) in overrides.iter().zip(readings) {
            one.put_into(&mut value, reading)?;
        }
        complete(&mut value).map_err(|error| UserError(format!("{name}: {error}")))?;
        Ok(value)
    };
    let readings = overrides::choose(&overrides, |readings| {
        let value = overridden(readings)?;
        Ok(deserialize::<T>(&value).err().map(|(path, _)| path))
    })?;
    let value = overridden(&readings)?;
    let blamed =
        |o: &&Override, path: &[String]| !path.is_empty() && (path.starts_with(&o.path) || o.path.starts_with(path));
    let place = |path: &[String]| match overrides.iter().rev().find(|o| blamed(o, path)) {
        // what stands inside a value that was given, or is missing in the file
        Some(o) if path.starts_with(&o.path) || line_of(text, path).is_none() => {
            format!("override `{}`", o.written)
        }
        _ => match line_of(text, path) {
            Some(line) => format!("{name}:{line}"),
            None => name.to_string(),
        },
    };
    let typed: T = deserialize(&value).map_err(|(path, message)| {
        // a required key that is missing may stand there misspelt
        let misspelt = quoted(&message, "missing field `").and_then(|missing| {
            let Some(Value::Mapping(siblings)) = find(&value, &path) else { return None };
            let wrong = nearest(&missing, siblings.keys().filter_map(Value::as_str))?.to_string();
            (!is_read::<T>(&value, &path, &wrong)).then(|| (missing, [path.clone(), vec![wrong]].concat()))
        });
        if let Some((missing, path)) = misspelt {
            return UserError(format!("{}: unknown key `{}`; did you mean `{missing}`?", place(&path), path.join(".")));
        }
        let key = if path.is_empty() { String::new() } else { format!("`{}`: ", path.join(".")) };
        UserError(format!("{}: {key}{message}{}{}", place(&path), suggestion(&message), unsaid(&path, &message)))
    })?;
    // what the type wrote back is what it read: a key of the file that is missing there was not read
    let known = serde_yaml::to_value(&typed).map_err(|error| UserError(format!("{name}: {error}")))?;
    // nothing may be written back as nothing
    let is_nothing = |path: &[String], key: &str| is_read::<T>(&value, path, key);
    if let Some((path, candidates)) = unread(&value, &known, &is_nothing, &mut Vec::new()) {
        let key = path.last().cloned().unwrap_or_default();
        let near = nearest(&key, candidates.iter().map(String::as_str));
        let hint = match near {
            Some(near) => format!("; did you mean `{near}`?"),
            None => format!("; known here: {}", candidates.join(", ")),
        };
        return Err(UserError(format!("{}: unknown key `{}`{hint}", place(&path), path.join("."))));
    }
    if let Some((path, number)) = not_finite(&known, &mut Vec::new()) {
        return Err(UserError(format!("{}: `{}`: {number} is not a finite number", place(&path), path.join("."))));
    }
    Ok(typed)
}

/// The value as a `T`; else where it is wrong, as exactly as can be known, and how.
fn deserialize<T: DeserializeOwned>(value: &Value) -> Result<T, (Vec<String>, String)> {
    serde_path_to_error::deserialize(value.clone()).map_err(|error: serde_path_to_error::Error<serde_yaml::Error>| {
        let key = |segment: &Segment| match segment {
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Map { key } => Some(key.clone()),
            Segment::Enum { variant } => Some(variant.clone()),
            Segment::Unknown => None,
        };
        let path: Vec<String> = error.path().iter().filter_map(key).collect();
        let message = error.inner().to_string();
        (refine::<T>(value, path, &message), message)
    })
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
        let children = match find(value, &path) {
            Some(Value::Mapping(children)) => children,
            Some(Value::Sequence(list)) => {
                // the element in whose place another one would do
                let fits = |i: usize, other: &Value| {
                    let mut replaced = value.clone();
                    if let Some(Value::Sequence(list)) = find_mut(&mut replaced, &path) {
                        list[i] = other.clone();
                    }
                    serde_path_to_error::deserialize::<_, T>(replaced).is_ok()
                };
                match (0..list.len()).find(|&i| list.iter().any(|other| fits(i, other))) {
                    Some(index) => path.push(index.to_string()),
                    None => return path,
                }
                continue;
            }
            _ => return path,
        };
        // without its tag an enum complains of nothing else: it is asked last
        let (tag, others): (Vec<&str>, Vec<&str>) =
            children.keys().filter_map(Value::as_str).partition(|k| *k == "kind");
        let wrong_key = others.into_iter().chain(tag).find(|key| {
            let mut without = value.clone();
            if let Some(Value::Mapping(mapping)) = find_mut(&mut without, &path) {
                mapping.remove(key);
            }
            match serde_path_to_error::deserialize::<_, T>(without) {
                Ok(_) => true,
                Err(error) => error.inner().to_string() == format!("missing field `{key}`"),
            }
        });
        match wrong_key {
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
    path.iter().try_fold(value, |at, key| match at {
        Value::Sequence(list) => list.get(key.parse::<usize>().ok()?),
        at => at.get(key.as_str()),
    })
}

fn find_mut<'a>(value: &'a mut Value, path: &[String]) -> Option<&'a mut Value> {
    path.iter().try_fold(value, |at, key| match at {
        Value::Sequence(list) => list.get_mut(key.parse::<usize>().ok()?),
        at => at.get_mut(key.as_str()),
    })
}

/// The first key of `value` that `known` lacks, and what it could have been. A key that says `null` may be lacking if
/// `is_nothing` says so of it and of the keys that lead to it.
fn unread(
    value: &Value,
    known: &Value,
    is_nothing: &dyn Fn(&[String], &str) -> bool,
    path: &mut Vec<String>,
) -> Option<(Vec<String>, Vec<String>)> {
    if let (Value::Sequence(value), Value::Sequence(known)) = (value, known) {
        for (i, (child, other)) in value.iter().zip(known).enumerate() {
            path.push(i.to_string());
            if let Some(found) = unread(child, other, is_nothing, path) {
                return Some(found);
            }
            path.pop();
        }
    }
    let (Value::Mapping(value), Value::Mapping(known)) = (value, known) else { return None };
    let shown = |key: &Value| key.as_str().map_or_else(|| format!("{key:?}"), String::from);
    let older: Vec<(&str, &str)> = match path.is_empty() {
        true => OLDER_NAMES.into_iter().filter(|(_, new)| known.contains_key(*new)).collect(),
        false => Vec::new(),
    };
    let read = |key: &Value| {
        let renamed = || older.iter().find(|(old, _)| key.as_str() == Some(old)).map(|(_, new)| *new);
        known.get(key).or_else(|| known.get(renamed()?))
    };
    let nothing = |key: &Value, child: &Value| child.is_null() && is_nothing(path, key.as_str().unwrap_or_default());
    let is_unknown = |(key, child): &(&Value, &Value)| read(key).is_none() && !nothing(key, child);
    let unknown: Vec<String> = value.iter().filter(is_unknown).map(|(key, _)| shown(key)).collect();
    if let Some(first) = unknown.first() {
        let candidates = known.keys().filter_map(Value::as_str).chain(older.iter().map(|(old, _)| *old));
        let candidates: Vec<String> = candidates.map(String::from).collect();
        // where `kind` is misspelt, keys of that kind are unknown too: the one that is most like a known one is to blame
        let distance = |key: &String| {
            let near = nearest(key, candidates.iter().map(String::as_str))?;
            Some(strsim::damerau_levenshtein(key, near))
        };
        let blamed = unknown.iter().min_by_key(|key| distance(key).unwrap_or(usize::MAX)).unwrap_or(first);
        path.push(blamed.clone());
        return Some((path.clone(), candidates));
    }
    value.iter().find_map(|(key, child)| {
        path.push(shown(key));
        let found = read(key).and_then(|known| unread(child, known, is_nothing, path));
        path.pop();
        found
    })
}

/// The first number of `value` that is infinite or none at all, and how it is written.
fn not_finite(value: &Value, path: &mut Vec<String>) -> Option<(Vec<String>, String)> {
    let children: Vec<(String, &Value)> = match value {
        Value::Number(number) if !number.is_finite() => return Some((path.clone(), number.to_string())),
        Value::Sequence(list) => list.iter().enumerate().map(|(i, child)| (i.to_string(), child)).collect(),
        Value::Mapping(mapping) => {
            mapping.iter().map(|(key, child)| (key.as_str().unwrap_or_default().to_string(), child)).collect()
        }
        _ => return None,
    };
    children.into_iter().find_map(|(key, child)| {
        path.push(key);
        let found = not_finite(child, path);
        path.pop();
        found
    })
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

/// The line, from 1, on which the last key of a path stands: each key is looked for behind its parent. Of what stands in
/// a list, that of the list.
fn line_of(text: &str, path: &[String]) -> Option<usize> {
    let mut at = 0;
    if path.iter().any(String::is_empty) {
        return None;
    }
    for key in path.iter().take_while(|key| key.parse::<usize>().is_err()) {
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
    use super::{super::load::parse, *};
    use crate::{
        codecs::AutoencoderConfig,
        experiment::{AutoencoderExperiment, DiffusionExperiment},
    };

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
        let autoencoder = AutoencoderConfig { channels: 16, ..Default::default() };
        assert_eq!((experiment.autoencoder, experiment.trainer.batch), (autoencoder.into(), 2));
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

    fn root(given: &str) -> String {
        let overrides = [format!("data.dataset.root={given}"), "trainer.steps=7".to_string()];
        let experiment: AutoencoderExperiment =
            parse("x.yaml", GOOD, &overrides).unwrap_or_else(|error| panic!("{given}: {error}"));
        assert_eq!(experiment.trainer.steps, 7);
        let crate::data::DatasetConfig::Folder(crate::data::Folder { root }) = experiment.data.dataset else {
            panic!("no folder")
        };
        root.display().to_string()
    }

    /// A path or a text is what was typed, whatever it would be in YAML; quotes around the whole of it are not part of it.
    #[test]
    fn an_override_of_a_text_is_what_was_typed() {
        for given in [
            "vids #2", "2024", "1e-4", "true", "null", "~", "run: 3", "a: b: c", "x # y", " padded ", "[x]", "[x",
            "{x", "*x", "&x y", "!x y", "@x", "%x", "`x", "- x", "? x", "|", "> x", "x:", "--- x", "a\tb", "it's",
            "\"x", "vidéos", "12:30:05", "0x10", "",
        ] {
            assert_eq!(root(given), given);
        }
        for (given, is) in [("\"vids #2\"", "vids #2"), ("'it''s'", "it's"), ("'2024'", "2024"), ("\"a\\tb\"", "a\tb")]
        {
            assert_eq!(root(given), is, "{given}");
        }
    }

    /// Whatever is no text is YAML, as in the file; `null` takes away what may be absent.
    #[test]
    fn an_override_of_anything_else_is_yaml() {
        let with = |overrides: &[&str]| -> AutoencoderExperiment {
            let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
            parse("x.yaml", GOOD, &overrides).unwrap_or_else(|error| panic!("{overrides:?}: {error}"))
        };
        let found =
            with(&["data.dataset={kind: folder, root: 'a #b'}", "data.flip=true", "optimizer.betas=[0.5, 0.9]"]);
        assert_eq!(
            (found.data.dataset.path().to_str().unwrap(), found.data.flip, found.optimizer.betas),
            ("a #b", true, (0.5, 0.9))
        );
        let found =
            with(&["trainer.ema_decay=null", "optimizer.kind= adamw # that one", "optimizer.learning_rate=1e-3 "]);
        assert_eq!((found.trainer.ema_decay, found.optimizer.learning_rate), (None, 1e-3));
        // also where the file does not have it, and what is absent is not written
        let diffusion = "data: {dataset: {kind: folder, root: clips}, frames: 16, resolution: 64}\nautoencoder: pixels\n\
                         optimizer: {kind: adam, learning_rate: 1.0e-4}\ntrainer: {steps: 10, batch: 2}\n";
        let absent = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
            parse::<DiffusionExperiment>("x.yaml", diffusion, &overrides)
        };
        assert!(absent(&["labels=null", "conditioning=null", "text=~"]).unwrap().labels.is_none());
        for (given, words) in [("lables=null", "`lables`"), ("trainer.stepz=null", "`trainer.stepz`")] {
            let error = absent(&[given]).unwrap_err().0;
            assert!(error.contains("unknown key") && error.contains(words), "{error}");
        }
        // each by its own key, in whatever order they stand
        let found = with(&["trainer.steps=5", "data.dataset.root=2024", "trainer.batch=3", "trainer.device=cpu"]);
        assert_eq!(
            (found.trainer.steps, found.trainer.batch, found.data.dataset.path().to_str().unwrap()),
            (5, 3, "2024")
        );
        assert_eq!(with(&["data.dataset.root=a=b"]).data.dataset.path(), Path::new("a=b"));
    }

    #[test]
    fn an_override_reaches_into_a_list() {
        let text = GOOD.to_string() + "autoencoder:\n  factors: [2, 4, 4]\n";
        let with = |overrides: &[&str]| -> Result<AutoencoderExperiment, UserError> {
            parse("x.yaml", &text, &overrides.iter().map(|text| text.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(
            with(&["autoencoder.factors.1=8", "autoencoder.factors.2=2"]).unwrap().autoencoder,
            AutoencoderConfig { factors: [2, 8, 2], ..Default::default() }.into()
        );
        for (given, words) in [
            ("autoencoder.factors.3=8", "`autoencoder.factors` is a list of 3, counted from 0"),
            ("autoencoder.factors.last=8", "`autoencoder.factors` is a list of 3, counted from 0"),
            ("autoencoder.factors.0.x=8", "`autoencoder.factors.0` is 2, which has no keys"),
            ("trainer.steps.x=8", "`trainer.steps` is 10, which has no keys"),
            ("autoencoder.factors.1=many", "many"),
        ] {
            let error = with(&[given]).unwrap_err().0;
            let key = given.split('=').next().unwrap();
            assert!(error.starts_with(&format!("override `{key}`")) && error.contains(words), "{error}");
        }
        // of the file's own elements the list's line
        let error =
            parse::<AutoencoderExperiment>("x.yaml", &text.replace("[2, 4, 4]", "[2, x, 4]"), &[]).unwrap_err().0;
        assert!(error.starts_with("x.yaml:9: `autoencoder.factors.1`"), "{error}");
        // a list that is not in the file
        let error = mistake(GOOD, &["autoencoder.factors.0=8"]);
        assert!(error.starts_with("override `autoencoder.factors.0`"), "{error}");
    }

    #[test]
    fn merge_keys_stand_for_what_they_name_and_keys_that_are_written_win() {
        let merged = GOOD.replace(
            "  frames: 16\n  resolution: 64\n",
            "  <<: [&size {frames: 8, resolution: 64}, {frames: 9, workers: 3}]\n  resolution: 32\n",
        );
        let found: AutoencoderExperiment = parse("x.yaml", &merged, &[]).unwrap();
        assert_eq!((found.data.frames, found.data.resolution, found.data.workers), (8, 32, 3));
        let found: AutoencoderExperiment = parse("x.yaml", &merged, &["data.frames=4".into()]).unwrap();
        assert_eq!(found.data.frames, 4);
        let error = mistake(&merged.replace("workers", "wokers"), &[]);
        assert!(
            error.contains("`data.wokers`; did you mean `workers`?") || error.contains("did you mean `workers`"),
            "{error}"
        );
        // what is merged in merges something in itself
        let chain = GOOD.replace("{kind: folder, root: clips}", "{<<: {<<: {kind: folder, root: nope}, root: deep}}");
        let found: AutoencoderExperiment = parse("x.yaml", &chain, &[]).unwrap();
        assert_eq!(found.data.dataset.path(), Path::new("deep"));
        let error = mistake(&GOOD.replace("  frames: 16", "  <<: 16"), &[]);
        assert!(error.starts_with("x.yaml: `<<`: expected a mapping"), "{error}");
    }

    #[test]
    fn an_empty_key_is_unknown() {
        for text in [format!("\"\": 3\n{GOOD}"), GOOD.replace("  frames: 16", "  \"\": 3\n  frames: 16")] {
            let error = mistake(&text, &[]);
            assert!(error.contains("unknown") && error.contains("``") || error.contains("`data.`"), "{error}");
        }
        for given in [".seed=3", "data..frames=3", "data.=3", "=5"] {
            let error = mistake(GOOD, &[given]);
            assert!(error.contains(given) && error.contains("empty key"), "{error}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_file() {
        let found: AutoencoderExperiment = parse("x.yaml", &format!("\u{feff}{GOOD}"), &[]).unwrap();
        assert_eq!(found.data.frames, 16);
        let error = mistake(&format!("\u{feff}{}", GOOD.replace("frames: 16", "frames: many")), &[]);
        assert!(error.starts_with("x.yaml:4"), "{error}");
    }

    #[test]
    fn a_number_that_is_not_finite_is_refused() {
        for given in [
            "optimizer.learning_rate=.inf",
            "optimizer.weight_decay=.inf",
            "optimizer.betas=[0.9, .nan]",
            "trainer.minutes=.inf",
        ] {
            let (key, number) = given.split_once('=').unwrap();
            let error = mistake(GOOD, &[given]);
            let number = number.trim_start_matches("[0.9, ").trim_end_matches(']');
            assert!(
                error.starts_with(&format!("override `{key}`"))
                    && error.contains(&format!("{number} is not a finite number")),
                "{error}"
            );
        }
        let error = mistake(&GOOD.replace("1.0e-4", "-.inf"), &[]);
        assert!(error.contains("x.yaml:6: `optimizer.learning_rate`: -.inf is not a finite number"), "{error}");
    }
}
