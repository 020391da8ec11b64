//! Keys of the store that the launching process and all ranks know, whatever attempt they belong to.

/// What stands before all keys.
pub(super) const PREFIX: &str = "lvdm";
/// Tells all ranks to save and leave. The launching process sets it.
pub(super) const STOP_KEY: &str = "stop";
/// Which rank ended by a fault of its own, and how. The launching process sets it.
pub(super) const FAILED_KEY: &str = "failed";
