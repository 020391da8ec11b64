//! Weights that come from elsewhere → our names.

pub mod numpy;
pub mod pickle;
pub mod released;
pub mod stable_diffusion;
mod synthetic;
mod torch_zip;

pub use synthetic::synthesize;
pub use torch_zip::read_state_dict;
