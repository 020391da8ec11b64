//! Layers.

mod parameters;

pub use parameters::{Entry, Init, Parameters, Scope, fnv1a64};
