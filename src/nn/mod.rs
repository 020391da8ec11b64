//! Layers. A layer declares its parameters under the names of the released checkpoints.
//!
//! Video activations of the denoising U-Net are kept as [`FrameStack`]: `[B·F, C, H, W]` with channels
//! last in memory, so that space-only convolutions are 2D convolutions, a 1×1 convolution is a
//! linear layer over positions, and both kinds of group norm read the same memory, without copies.

mod adapter;
mod attention;
mod batch_norm;
mod conv;
mod dropout;
mod frame_stack;
mod layer_norm;
mod linear;
mod memory_layout;
mod norm;
mod parameters;
mod precision;
mod timestep;

pub use adapter::Adapter;
pub use attention::{
    KeyTerm, RelativePosition, attends_in_place, attention, causal_attention, frames_in_place, masked_attention,
};
pub use batch_norm::{BatchNorm, Statistics};
pub use conv::{Conv2d, Conv3d, Padding, SpatialConv, TransposedConv3d};
pub use dropout::Dropout;
pub use frame_stack::FrameStack;
pub use layer_norm::{LayerNorm, ResidualStream};
pub use linear::{Linear, linear_flops};
pub use memory_layout::{channels_last, prefers_channels_last};
pub use norm::{GroupNorm, Over, normalize_frames};
pub use parameters::{Entry, Init, Parameters, Scope, fnv1a64};
pub use precision::{full_precision, full_sum, rounded};
pub use timestep::timestep_embedding;
