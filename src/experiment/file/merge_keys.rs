//! YAML's merge keys: `<<`.

use serde_yaml::Value;

/// `<<: *anchor` stands for the anchor's keys; those that are written out win. From the inside out: what is merged in may
/// merge something in itself.
pub fn merge(value: &mut Value) -> serde_yaml::Result<()> {
    match value {
        Value::Mapping(children) => children.values_mut().try_for_each(merge)?,
        Value::Sequence(children) => children.iter_mut().try_for_each(merge)?,
        _ => return Ok(()),
    }
    value.apply_merge()
}
