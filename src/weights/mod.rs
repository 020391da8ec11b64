//! Other people's checkpoints.

pub mod numpy;
pub mod pickle;
pub mod released;
