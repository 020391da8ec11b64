//! Denoising networks, one a file. Each reads bottom-up: configuration, blocks, network.

mod latte;
mod unet3d;

pub use latte::{Latte, LatteConfig, LattePorts, frame_embedding, place_embedding};
pub use unet3d::{
    AttentionKind, JointAttention, Recompute, SelfAttention, UNet3d, UNetCondition, UNetConfig, UNetPorts,
};
