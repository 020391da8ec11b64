//! Settings that are replaced on the command line: `key.path=value`.

use serde_yaml::{Mapping, Value};

use super::merge_keys::merge;
use crate::experiment::UserError;

/// One of them. What the value is depends on the type of its key, so there are several readings of it.
pub struct Override {
    /// The keys that lead to it.
    pub path: KeyPath,
    /// The same as they were written.
    pub written: String,
    /// At least one, the likeliest first.
    readings: Vec<Value>,
}

impl Override {
    pub fn parse(text: &str) -> Result<Self, UserError> {
        let Some((key, value)) = text.split_once('=') else {
            return Err(UserError(format!("`{text}` is not an override: write key.path=value")));
        };
        let path: KeyPath = key.split('.').map(String::from).collect();
        if path.iter().any(String::is_empty) {
            return Err(UserError(format!("override `{text}`: `{key}` has an empty key: write key.path=value")));
        }
        let as_typed = Value::String(value.to_string());
        let is_quoted = |mark: char| value.len() > 1 && value.starts_with(mark) && value.ends_with(mark);
        let readings = match serde_yaml::from_str::<Value>(value) {
            Ok(yaml @ Value::String(_)) if is_quoted('"') || is_quoted('\'') => vec![yaml],
            // of a text YAML takes away comments, marks and white space
            Ok(yaml @ (Value::String(_) | Value::Tagged(_))) if yaml != as_typed => vec![as_typed, yaml],
            Ok(yaml @ Value::String(_)) => vec![yaml],
            Ok(mut yaml) => match merge(&mut yaml) {
                Ok(()) => vec![yaml, as_typed],
                Err(_) => vec![as_typed],
            },
            Err(_) => vec![as_typed],
        };
        Ok(Override { path, written: key.to_string(), readings })
    }

    /// Puts one of its readings into the tree.
    pub fn put_into(&self, root: &mut Value, reading: usize) -> Result<(), UserError> {
        let mut at = root;
        for (depth, part) in self.path.iter().enumerate() {
            let wrong = |why: String| {
                UserError(format!("override `{}`: `{}` {why}", self.written, self.path[..depth].join(".")))
            };
            at = match at {
                Value::Null => {
                    *at = Value::Mapping(Mapping::new());
                    let Value::Mapping(mapping) = at else { unreachable!("made in the line above") };
                    mapping.entry(part.as_str().into()).or_insert(Value::Null)
                }
                Value::Mapping(mapping) => mapping.entry(part.as_str().into()).or_insert(Value::Null),
                Value::Sequence(list) => {
                    let count = list.len();
                    let element = part.parse::<usize>().ok().and_then(|i| list.get_mut(i));
                    element.ok_or_else(|| wrong(format!("is a list of {count}, counted from 0")))?
                }
                value => {
                    let text = serde_yaml::to_string(value).unwrap_or_default();
                    return Err(wrong(format!("is {}, which has no keys", text.trim())));
                }
            };
        }
        *at = self.readings[reading].clone();
        Ok(())
    }

    fn concerns(&self, path: &[String]) -> bool {
        !path.is_empty() && (path.starts_with(&self.path) || self.path.starts_with(path))
    }
}

/// The keys that lead to a value.
type KeyPath = Vec<String>;

/// Which reading of each override its key takes. `wrong` says where the tree with these readings is wrong, if it is: a
/// complaint of another key says nothing of this one, so all are looked at again until nothing changes.
pub fn choose(
    overrides: &[Override],
    mut wrong: impl FnMut(&[usize]) -> Result<Option<KeyPath>, UserError>,
) -> Result<Vec<usize>, UserError> {
    let mut chosen = vec![0; overrides.len()];
    for _ in 0..=overrides.len() {
        let before = chosen.clone();
        for (i, one) in overrides.iter().enumerate().filter(|(_, one)| one.readings.len() > 1) {
            let mut taken = None;
            for reading in 0..one.readings.len() {
                chosen[i] = reading;
                if !wrong(&chosen)?.is_some_and(|path| one.concerns(&path)) {
                    taken = Some(reading);
                    break;
                }
            }
            // where none is right, the first is what is complained of
            chosen[i] = taken.unwrap_or(0);
        }
        if chosen == before {
            break;
        }
    }
    Ok(chosen)
}
