//! Weights that come from elsewhere → our names.

pub mod lvdm_checkpoint;
pub mod numpy;
pub mod pickle;
pub mod released;
pub mod stable_diffusion;
mod synthetic;
mod torch_zip;

pub use lvdm_checkpoint::LvdmCheckpoint;
pub use synthetic::synthesize;
pub use torch_zip::{TorchFile, read_state_dict, read_torch};
