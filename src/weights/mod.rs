//! Weights that come from elsewhere → our names.

pub mod numpy;
pub mod pickle;
pub mod released;
mod synthetic;
mod torch_zip;

pub use synthetic::synthesize;
pub use torch_zip::read_state_dict;
