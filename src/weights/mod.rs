//! Weights that come from elsewhere → our names.

mod file;
mod kind;
pub mod latte;
pub mod lora;
pub mod lvdm_checkpoint;
pub mod numpy;
pub mod open_clip;
pub mod pickle;
pub mod released;
pub mod stable_diffusion;
mod synthetic;
mod torch_file;
mod torch_legacy;

pub use file::{WeightsFile, read_state_dict};
pub use kind::{Layout, TensorShapes, WeightsKind, is_second};
pub use lvdm_checkpoint::LvdmCheckpoint;
pub use synthetic::synthesize;
