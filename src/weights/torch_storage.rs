//! What PyTorch's files of both kinds have in common.

use anyhow::{Result, anyhow, bail, ensure};
use tch::Kind;

use super::pickle::Value;

/// Longest pickle that is believed: names, shapes and settings of a checkpoint are a few megabytes.
pub(super) const MOST_PICKLE_BYTES: u64 = 1 << 28;

/// The type of the elements of a storage, by its class.
pub(super) fn storage_kind(value: &Value) -> Result<Kind> {
    let Value::Global(module, name) = value else { bail!("its storage's type is {}", value.kind()) };
    ensure!(&**module == "torch", "its storage's type is {module}.{name}");
    Ok(match &**name {
        "FloatStorage" => Kind::Float,
        "DoubleStorage" => Kind::Double,
        "HalfStorage" => Kind::Half,
        "BFloat16Storage" => Kind::BFloat16,
        "LongStorage" => Kind::Int64,
        "IntStorage" => Kind::Int,
        "ByteStorage" => Kind::Uint8,
        "BoolStorage" => Kind::Bool,
        other => return Err(anyhow!("a storage of type {other} is not read")),
    })
}
