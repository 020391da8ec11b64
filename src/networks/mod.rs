//! Denoising networks, one a file. Each reads bottom-up: configuration, blocks, network.
//!
//! A new one implements [`Network`] and [`NetworkSettings`] and gets its line in [`NetworkConfig`].

mod inputs;
mod latte;
mod network;
mod ports;
mod unet3d;

use crate::registry::registry;

pub use inputs::Inputs;
pub use latte::{Latte, LatteConfig};
pub use network::{Network, NetworkSettings, Takes};
pub use ports::Ports;
pub use unet3d::{AttentionKind, JointAttention, Recompute, SelfAttention, UNet3d, UNetConfig};

registry! {
    /// A network's settings by `kind`; without one it is the U-Net.
    pub enum NetworkConfig: NetworkSettings, default "unet3d" {
        /// The paper's U-Net.
        "unet3d" => UNet3d(UNetConfig),
        /// A transformer whose blocks attend over places and over frames by turns.
        "latte" => Latte(LatteConfig),
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        UNetConfig::default().into()
    }
}
