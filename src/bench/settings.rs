//! What is timed, and at which sizes.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    codecs::CodecConfig,
    data::DataConfig,
    diffusion::{NoiseSchedule, SamplerConfig, ScheduleConfig},
    experiment::{Experiment, Precision},
    extractors::I3d,
    networks::NetworkConfig,
    torch::DeviceName,
};

/// Everything, at sizes that two cores can do.
pub const ALL: &str = "
unet:
  network: {channels: 64}
  latent: [4, 4, 32, 32]
  checkpoint: true
  samplers: [{kind: ddim, steps: 50, eta: 1.0}]
autoencoder: {network: {}, frames: 16, resolution: 64}
i3d: {videos: 4, frames: 16, resolution: 64}
loader: {batch: 8}
";

/// What is timed.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct BenchExperiment {
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// Of the networks; I3D is float32 in any case.
    #[serde(default)]
    pub precision: Precision,
    /// On a GPU, float32 products are rounded to TF32.
    #[serde(default)]
    pub tf32: bool,
    /// Calls before the first that is timed.
    #[serde(default = "two")]
    pub warmup: usize,
    /// Calls that are timed.
    #[serde(default = "seven")]
    pub repeats: usize,
    /// The denoising U-Net; left out where there is none, as each part below.
    #[serde(default)]
    pub unet: Option<UNetBench>,
    /// The codec.
    #[serde(default)]
    pub autoencoder: Option<AutoencoderBench>,
    /// Features of FVD.
    #[serde(default)]
    pub i3d: Option<I3dBench>,
    /// Clips from files.
    #[serde(default)]
    pub loader: Option<LoaderBench>,
}

/// `unet_forward`, `unet_train_step`, `checkpoint_stall`, `sample`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct UNetBench {
    /// The settings of the denoiser.
    pub network: NetworkConfig,
    /// `[C, F, h, w]`
    pub latent: [i64; 4],
    /// Clips at a time.
    #[serde(default = "one")]
    pub batch: i64,
    /// How long a checkpoint of this network, its average and its optimizer holds training up.
    #[serde(default)]
    pub checkpoint: bool,
    /// Each is run once from noise to latents.
    #[serde(default)]
    pub samplers: Vec<SamplerConfig>,
}

/// `encoder`, `decoder`, `autoencoder_forward_backward`; samples are decoded with it.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AutoencoderBench {
    /// The settings of the codec.
    pub network: CodecConfig,
    /// Frames of a clip.
    pub frames: i64,
    /// Height and width of a clip.
    pub resolution: i64,
    /// Clips at a time.
    #[serde(default = "one")]
    pub batch: i64,
}

/// `i3d`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct I3dBench {
    /// Videos at a time.
    pub videos: i64,
    /// Frames of a clip.
    pub frames: i64,
    /// Height and width of a clip.
    pub resolution: i64,
}

/// `loader`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LoaderBench {
    /// Without one, procedural videos are written to a temporary folder first.
    #[serde(default)]
    pub data: Option<DataConfig>,
    /// Clips at a time.
    pub batch: i64,
}

fn auto() -> String {
    "auto".to_string()
}
fn one() -> i64 {
    1
}
fn two() -> usize {
    2
}
fn seven() -> usize {
    7
}

impl Experiment for BenchExperiment {
    fn validate(&self) -> Result<()> {
        self.device.parse::<DeviceName>()?;
        ensure!(self.repeats >= 1, "repeats must be at least 1");
        if let Some(UNetBench { network, latent, batch, samplers, .. }) = &self.unet {
            network.validate().context("unet.network")?;
            ensure!(*batch >= 1 && latent.iter().all(|&n| n >= 1), "unet.batch and unet.latent must be positive");
            let multiples = network.multiple_of();
            ensure!(
                latent[1..].iter().zip(multiples).all(|(size, of)| size % of == 0),
                "unet.latent: frames, height and width of {latent:?} are no multiples of the network's {multiples:?}"
            );
            let schedule = NoiseSchedule::new(&ScheduleConfig::default())?;
            for sampler in samplers {
                sampler.start(&schedule).context("unet.samplers")?;
            }
        }
        if let Some(AutoencoderBench { network, frames, resolution, batch }) = &self.autoencoder {
            network.validate().context("autoencoder.network")?;
            ensure!(!network.is_exact(), "autoencoder.network: {} computes nothing", network.name());
            ensure!(*batch >= 1, "autoencoder.batch must be at least 1");
            network.latent_shape(*frames, *resolution, *resolution).context("autoencoder")?;
        }
        if let Some(I3dBench { videos, frames, resolution }) = &self.i3d {
            ensure!(*videos >= 1 && *resolution >= 1, "i3d.videos and i3d.resolution must be positive");
            ensure!(*frames >= I3d::MIN_FRAMES, "i3d.frames must be at least {}", I3d::MIN_FRAMES);
        }
        if let Some(LoaderBench { data, batch }) = &self.loader {
            ensure!(*batch >= 1, "loader.batch must be at least 1");
            if let Some(data) = data {
                data.clip().context("loader.data")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::experiment::read;

    /// `peers.py` refuses settings that it does not know, so that it never times other networks than those of the file.
    #[test]
    fn the_peers_in_pytorch_know_each_setting() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments/bench");
        let peers = fs::read_to_string(folder.join("peers.py")).unwrap();
        let known: Vec<&str> =
            peers.split("only(bench[\"network\"],").skip(1).map(|call| call.split(')').next().unwrap()).collect();
        let [unet, autoencoder, text] = known[..] else { panic!("{known:?}") };
        for (file, of_unet) in [("unet_c64", unet), ("ucf101", unet), ("clip64", unet), ("text_c160", text)] {
            let read: BenchExperiment = read(&folder.join(file).with_extension("yaml"), &[]).unwrap();
            let networks = [
                (read.unet.map(|bench| serde_json::to_value(bench.network).unwrap()), of_unet),
                (read.autoencoder.map(|bench| serde_json::to_value(bench.network).unwrap()), autoencoder),
            ];
            for (network, known) in networks.into_iter().filter_map(|(network, known)| Some((network?, known))) {
                for (key, _) in network.as_object().unwrap().iter().filter(|(_, value)| !value.is_null()) {
                    assert!(known.contains(&format!(" {key}=")), "{file}: {key} is not among{known}");
                }
            }
        }
    }
}
