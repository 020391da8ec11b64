//! Denoising networks, one a file. Each reads bottom-up: configuration, blocks, network.

mod unet3d;

pub use unet3d::{
    AttentionKind, JointAttention, Recompute, SelfAttention, UNet3d, UNetCondition, UNetConfig, UNetPorts,
};
