//! Layers. A layer declares its parameters under the names of the released checkpoints.
//!
//! Video activations of the denoising U-Net are kept as [`Frames`]: `[B·F, C, H, W]` with channels
//! last in memory, so that space-only convolutions are 2D convolutions, a 1×1 convolution is a
//! linear layer over positions, and both kinds of group norm read the same memory, without copies.

mod attention;
mod conv;
mod frames;
mod linear;
mod norm;
mod parameters;
mod timestep;

pub use attention::{KeyTerm, RelativePosition, attention, causal_attention};
pub use conv::{Conv2d, Conv3d, Padding, SpatialConv, TransposedConv3d, channels_last, lies_channels_last};
pub use frames::Frames;
pub use linear::{Adapter, Linear, linear_flops};
pub use norm::{BatchNorm2d, GroupNorm, LayerNorm, Over, full_precision};
pub use parameters::{Entry, Init, Parameters, Scope, fnv1a64};
pub use timestep::timestep_embedding;
