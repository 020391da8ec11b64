//! `lvdm bench`: how long the parts take on this machine, and how close that is to what it can do.

mod timing;

use std::{cell::RefCell, path::PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};

use self::timing::{Clock, Report};
use super::file_or_override;
use crate::{
    checkpoint::{self, Checkpoint, Progress},
    codecs::{AutoencoderConfig, VideoAutoencoder},
    data::{DataConfig, DatasetConfig, DemoConfig, Folder, Loader, decode_workers, demo, to_u8},
    diffusion::{NetworkDenoiser, NoiseSchedule, Predict, SamplerConfig, ScheduleConfig, sample},
    experiment::{Experiment, Precision, parse},
    extractors::I3d,
    flops,
    networks::{Inputs, NetworkConfig, Ports},
    nn::Parameters,
    random::{Purpose, normal},
    torch::{
        Adam, Autotune, DeviceName, FixedWeights, Readback, allow_tf32, backward, cuda_graphs, device_name, upload,
    },
    train::{Ema, Optimizer, Saver},
};

/// Time the networks, the loader and sampling on this machine
#[derive(Debug, clap::Args)]
pub struct Bench {
    /// What to time (experiments/bench/*.yaml); without a file, everything at sizes for a small machine
    file: Option<PathBuf>,
    /// key.path=value in place of what the file says
    overrides: Vec<String>,
    /// One JSON object a line instead of a table, first what is timed
    #[arg(long)]
    json: bool,
}

/// What is timed.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
    /// The video autoencoder.
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
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UNetBench {
    pub network: NetworkConfig,
    /// `[C, F, h, w]`
    pub latent: [i64; 4],
    #[serde(default = "one")]
    pub batch: i64,
    /// How long a checkpoint of this network, its average and its optimizer holds training up.
    #[serde(default)]
    pub checkpoint: bool,
    #[serde(default)]
    pub samplers: Vec<SamplerConfig>,
}

/// `encoder`, `decoder`, `autoencoder_forward_backward`; samples are decoded with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AutoencoderBench {
    pub network: AutoencoderConfig,
    pub frames: i64,
    pub resolution: i64,
    #[serde(default = "one")]
    pub batch: i64,
}

/// `i3d`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct I3dBench {
    pub videos: i64,
    pub frames: i64,
    pub resolution: i64,
}

/// `loader`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoaderBench {
    /// Without one, procedural videos are written to a temporary folder first.
    #[serde(default)]
    pub data: Option<DataConfig>,
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

/// Everything, at sizes that two cores can do.
const ALL: &str = "
unet:
  network: {channels: 64}
  latent: [4, 4, 32, 32]
  checkpoint: true
  samplers: [{kind: ddim, steps: 50, eta: 1.0}]
autoencoder: {network: {}, frames: 16, resolution: 64}
i3d: {videos: 4, frames: 16, resolution: 64}
loader: {batch: 8}
";

impl Bench {
    /// # Errors
    /// A file with mistakes, a device that is not there.
    pub fn run(self) -> Result<()> {
        let (file, overrides) = file_or_override(self.file, self.overrides);
        let experiment = match file {
            Some(path) => BenchExperiment::load(&path, &overrides)?,
            None => parse("bench", ALL, &overrides)?,
        };
        let device = experiment.device.parse::<DeviceName>()?.open()?;
        allow_tf32(experiment.tf32);
        let report = Report {
            json: self.json,
            device,
            precision: experiment.precision,
            tf32: experiment.tf32,
            title: title(device),
        };
        let clock = Clock { device, warmup: experiment.warmup, repeats: experiment.repeats };
        report.head(&experiment);
        let autoencoder = match &experiment.autoencoder {
            Some(bench) => Some(autoencoder(bench, &clock, &report)?),
            None => None,
        };
        if let Some(bench) = &experiment.unet {
            unet(bench, autoencoder.as_ref(), &clock, &report)?;
        }
        if let Some(bench) = &experiment.i3d {
            allow_tf32(false);
            match I3d::load(None, device) {
                Ok(network) => i3d(bench, &network, &clock, &report),
                Err(error) => report.left_out("i3d", &error),
            }
        }
        if let Some(bench) = &experiment.loader
            && let Err(error) = loader(bench, &clock, &report)
        {
            report.left_out("loader", &error);
        }
        Ok(())
    }
}

/// What is timed on, in words.
pub(super) fn title(device: Device) -> String {
    match device {
        Device::Cuda(_) => device_name(device),
        _ => format!("{} ({} threads)", device_name(device), tch::get_num_threads()),
    }
}

fn noise(shape: &[i64], device: Device) -> Tensor {
    normal(0, Purpose::Evaluation, 0, 0, shape).to_device(device)
}

fn unet(
    bench: &UNetBench,
    autoencoder: Option<&(VideoAutoencoder, AutoencoderConfig)>,
    clock: &Clock,
    report: &Report,
) -> Result<()> {
    let UNetBench { network, latent: [c, f, h, w], batch, .. } = bench;
    let (device, batch) = (clock.device, *batch);
    let ports = Ports { text: network.text_width(), ..Ports::of(bench.latent) };
    const TOKENS: i64 = 77;
    let parameters = Parameters::new(device, 0);
    let unet = network.build(&parameters.root(), &ports)?;
    let z = noise(&[batch, *c, *f, *h, *w], device);
    let target = noise(&[batch, *c, *f, *h, *w], device) * 0.5;
    let t = Tensor::full([batch], 500, (Kind::Int64, device));
    let text = network.text_width().map(|width| noise(&[batch, TOKENS, width], device));
    let given = Inputs { text, ..Inputs::default() };
    let flops = batch * network.flops(&ports, bench.latent, TOKENS);
    let shape = json!({"batch": batch});

    let timing = {
        let _weights = FixedWeights::new(); // as in sampling
        clock.time(|| {
            let _autocast = report.autocast();
            let _ = no_grad(|| unet.forward(&z, &t, &given));
            Ok(())
        })?
    };
    report.line("unet_forward", &timing, Some(flops), false, shape.clone());

    let mut optimizer = Optimizer::new(adamw(), &parameters);
    let autotune = Autotune::begin(); // as in training
    let timing = clock.time(|| {
        optimizer.zero_grad()?;
        let _autocast = report.autocast();
        let prediction = unet.forward(&z, &t, &given).to_kind(Kind::Float);
        backward(&prediction.l1_loss(&target, tch::Reduction::Mean));
        optimizer.step(&optimizer.gradients(), None)
    })?;
    let more = json!({"batch": batch, "recompute": serde_json::to_value(network)?["recompute"]});
    drop(autotune);
    report.line("unet_train_step", &timing, Some(3 * flops), false, more);

    if bench.checkpoint {
        let ema = Ema::new(0.9999, &parameters);
        let mut tensors: Vec<(String, Tensor)> =
            parameters.named().into_iter().map(|(n, t)| (format!("model.{n}"), t)).collect();
        tensors.extend(optimizer.state().into_iter().map(|(n, t)| (format!("optimizer.model.{n}"), t)));
        tensors.extend(ema.named().iter().map(|(n, t)| (format!("ema.{n}"), t.shallow_clone())));
        let bytes: usize = tensors.iter().map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes()).sum();
        let folder = Scratch::new("checkpoint")?;
        let saver = RefCell::new(Saver::new(&folder.0, 1)?);
        let save = || {
            let checkpoint = Checkpoint {
                task: "bench".into(),
                progress: Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 },
                experiment: Value::Null,
                tensors: tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect(),
            };
            saver.borrow_mut().save(checkpoint, checkpoint::path(&folder.0, 0))
        };
        // the disk is waited for, not timed: training goes on meanwhile
        let timing = clock.time_apart(save, || saver.borrow_mut().finish())?;
        report.line("checkpoint_stall", &timing, None, true, json!({"megabytes": bytes / 1_000_000}));
    }
    drop(optimizer);

    parameters.freeze();
    let schedule = NoiseSchedule::new(&ScheduleConfig::default())?;
    for config in &bench.samplers {
        let steps = config.start(&schedule)?.times().len();
        let denoiser =
            NetworkDenoiser { network: &*unet, path: &schedule, predict: Predict::Noise, given: given.clone() };
        // a walk is long, and all its steps are alike
        let clock = Clock { device, warmup: 1, repeats: clock.repeats.min(3) };
        let timing = clock.time(|| {
            let _autocast = report.autocast();
            let draw = |i: usize| upload(&normal(0, Purpose::SampleStep, 0, i as u64, &z.size()), device);
            let z_0 = sample(&denoiser, &**config, &schedule, &z, &draw, &mut |_, _| {})?;
            if let Some((autoencoder, _)) = autoencoder {
                let clip = |i| Readback::of(&no_grad(|| to_u8(&autoencoder.decode(&z_0.narrow(0, i, 1)))));
                let clips: Vec<Readback> = (0..batch).map(clip).collect::<Result<_>>()?;
                clips.iter().try_for_each(|clip| clip.wait().map(drop))?;
            }
            Ok(())
        })?;
        let decoding = autoencoder.map_or(0, |(_, config)| {
            let [ft, fh, fw] = config.factors;
            batch * config.flops(f * ft, h * fh, w * fw)[1]
        });
        let kind = serde_json::to_value(config)?;
        let more = json!({
            "sampler": kind["kind"], "steps": steps, "batch": batch, "decoded": autoencoder.is_some(),
            "videos_per_second": batch as f64 / timing.median, "cuda_graphs": cuda_graphs(),
        });
        report.line("sample", &timing, Some(steps as i64 * flops + decoding), false, more);
    }
    Ok(())
}

fn adamw() -> Adam {
    Adam { learning_rate: 1e-5, betas: (0.9, 0.999), weight_decay: 0.01, eps: 1e-8, decoupled: true }
}

fn autoencoder(
    bench: &AutoencoderBench,
    clock: &Clock,
    report: &Report,
) -> Result<(VideoAutoencoder, AutoencoderConfig)> {
    let AutoencoderBench { network, frames, resolution, batch } = bench;
    let (device, side) = (clock.device, *resolution);
    let parameters = Parameters::new(device, 0);
    let autoencoder = VideoAutoencoder::new(&parameters.root(), network);
    let x = noise(&[*batch, 3, *frames, side, side], device).clamp(-1.0, 1.0);
    let [c, f, h, w] = network.latent_shape(*frames, side, side)?;
    let z = noise(&[*batch, c, f, h, w], device);
    let [encoder, decoder] = network.flops(*frames, side, side).map(|flops| batch * flops);
    let shape = json!({"batch": batch, "frames": frames, "resolution": resolution});

    let timing = clock.time(|| {
        let _autocast = report.autocast();
        let _ = no_grad(|| autoencoder.encode(&x));
        Ok(())
    })?;
    report.line("encoder", &timing, Some(encoder), false, shape.clone());
    let timing = clock.time(|| {
        let _autocast = report.autocast();
        let _ = no_grad(|| autoencoder.decode(&z));
        Ok(())
    })?;
    report.line("decoder", &timing, Some(decoder), false, shape.clone());
    let posterior = noise(&[*batch, c, f, h, w], device);
    let _autotune = Autotune::begin(); // as in training
    let timing = clock.time(|| {
        parameters.zero_grad();
        let _autocast = report.autocast();
        let reconstruction = autoencoder.decode(&autoencoder.encode(&x).sample(&posterior)).to_kind(Kind::Float);
        backward(&reconstruction.l1_loss(&x, tch::Reduction::Mean));
        Ok(())
    })?;
    report.line("autoencoder_forward_backward", &timing, Some(3 * (encoder + decoder)), false, shape);
    parameters.freeze();
    Ok((autoencoder, network.clone()))
}

fn i3d(bench: &I3dBench, network: &I3d, clock: &Clock, report: &Report) {
    let I3dBench { videos, frames, resolution } = *bench;
    let bytes = noise(&[videos, frames, resolution, resolution, 3], Device::Cpu) * 60.0 + 128.0;
    let bytes = bytes.clamp(0.0, 255.0).to_kind(Kind::Uint8);
    let timed = clock.time(|| {
        let _ = network.logits(&bytes);
        Ok(())
    });
    match timed {
        Ok(timing) => {
            let more = json!({
                "videos": videos, "frames": frames, "resolution": resolution,
                "videos_per_second": videos as f64 / timing.median,
            });
            report.line("i3d", &timing, Some(videos * flops::i3d(frames)), true, more);
        }
        Err(error) => report.left_out("i3d", &error),
    }
}

fn loader(bench: &LoaderBench, clock: &Clock, report: &Report) -> Result<()> {
    let folder;
    let data = match &bench.data {
        Some(data) => data.clone(),
        None => {
            folder = Scratch::new("videos")?;
            let root = folder.0.clone();
            demo::write(&DemoConfig { root: root.clone(), train: 16, test: 1, ..DemoConfig::default() })?;
            DataConfig {
                dataset: DatasetConfig::Folder(Folder { root: root.join("train") }),
                frames: 16,
                frame_stride: 1,
                resolution: 64,
                flip: false,
                workers: decode_workers(),
            }
        }
    };
    let mut loader = Loader::new(&data, bench.batch, 0, 0)?;
    let timing = clock.time(|| loader.next().map(drop))?;
    let more = json!({
        "batch": bench.batch, "frames": data.frames, "resolution": data.resolution, "workers": data.workers,
        "clips_per_second": bench.batch as f64 / timing.median,
    });
    report.line("loader", &timing, None, true, more);
    Ok(())
}

/// A temporary folder of this process.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("lvdm-bench-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Scratch(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_a_sound_experiment() {
        parse::<BenchExperiment>("bench", ALL, &[]).unwrap().validate().unwrap();
    }
}
