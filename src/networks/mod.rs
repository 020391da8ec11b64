//! Denoising networks, one a file. Each reads bottom-up: configuration, blocks, network.
//!
//! [`Gpt`], which sees codes instead of noise, stands beside them. A new denoiser implements [`Network`] and [`NetworkSettings`] and gets its line in [`NetworkConfig`].

mod gpt;
mod inputs;
mod latte;
mod mcvd;
mod network;
mod ports;
mod recompute;
mod unet3d;

use crate::registry::registry;

pub use gpt::{Cache, Gpt, GptConfig, Sees, Sequences};
pub use inputs::Inputs;
pub use latte::{Latte, LatteConfig};
pub use mcvd::{Mcvd, McvdConfig};
pub use network::{Network, NetworkSettings, Takes};
pub use ports::Ports;
pub use recompute::Recompute;
pub use unet3d::{AttentionKind, JointAttention, SelfAttention, UNet3d, UNetConfig};

registry! {
    /// A network's settings by `kind`; without one it is the U-Net.
    pub enum NetworkConfig: NetworkSettings, default "unet3d" {
        /// The paper's U-Net.
        "unet3d" => UNet3d(UNetConfig),
        /// A transformer whose blocks attend over places and over frames by turns.
        "latte" => Latte(LatteConfig),
        /// An image U-Net over the stacked frames of a clip and of those around it.
        "mcvd" => Mcvd(McvdConfig),
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        UNetConfig::default().into()
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::nn::Parameters;

    /// What each network says that it takes moves its answer: channels beside z and labels; a time for each frame where it
    /// takes such, which equal times make the time of the clip.
    #[test]
    fn networks_take_what_they_say() {
        let unet = UNetConfig {
            channels: 8,
            multipliers: vec![1],
            blocks_per_level: 1,
            attention_factors: vec![],
            heads: 2,
            norm_groups: 4,
            ..UNetConfig::default()
        };
        let latte = LatteConfig { depth: 2, hidden_size: 16, heads: 2, patch_size: 2, recompute: false };
        let ports = Ports { concat: 2, classes: Some(3), ..Ports::of([2, 3, 4, 4]) };
        let normal = |c: i64| Tensor::randn([2, c, 3, 4, 4], (Kind::Float, Device::Cpu));
        let (z, beside) = (normal(2), normal(2));
        for (settings, of_frames) in [(NetworkConfig::from(unet), false), (NetworkConfig::from(latte), true)] {
            let parameters = Parameters::new(Device::Cpu, 5);
            let network = settings.build(&parameters.root(), &ports).unwrap();
            // layers that start at zero answer nothing
            parameters.freeze();
            for (_, mut tensor) in parameters.named() {
                let noise = Tensor::randn_like(&tensor) * 0.1;
                tensor += noise;
            }
            let answer = |t: &Tensor, beside: &Tensor, label: [i64; 2]| {
                let label = Some(Tensor::from_slice(&label));
                network.forward(&z, t, &Inputs { concat: vec![beside.shallow_clone()], label, ..Inputs::default() })
            };
            let far = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
            let t = Tensor::from_slice(&[3.0f64, 7.0]);
            let found = answer(&t, &beside, [0, 2]);
            assert_eq!(found.size(), z.size());
            assert!(far(&answer(&t, &normal(2), [0, 2]), &found) > 1e-3, "{settings:?}: channels beside z");
            assert!(
                settings.takes().labels && far(&answer(&t, &beside, [1, 2]), &found) > 1e-4,
                "{settings:?}: labels"
            );
            assert_eq!(settings.takes().frame_times, of_frames, "{settings:?}");
            if of_frames {
                let each = t.unsqueeze(1).expand([2, 3], false).contiguous();
                assert!(far(&answer(&each, &beside, [0, 2]), &found) < 1e-5, "{settings:?}: equal times");
                let _ = each.get(0).get(2).fill_(500.0);
                assert!(far(&answer(&each, &beside, [0, 2]), &found) > 1e-4, "{settings:?}: another time for a frame");
            }
        }
    }
}
