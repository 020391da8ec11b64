//! Weights that come from elsewhere → our names.

pub mod numpy;
pub mod pickle;
pub mod released;
mod synthetic;

pub use synthetic::synthesize;
