//! How long the parts take on this machine, and how close that is to what it can do.

mod settings;
mod timing;

use std::{cell::RefCell, path::PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};

pub use self::settings::{ALL, AutoencoderBench, BenchExperiment, I3dBench, LoaderBench, UNetBench};
use self::timing::{BenchTable, Clock};
use crate::{
    checkpoint::{self, Checkpoint, Progress},
    codecs::VideoCodec,
    data::{DataConfig, DatasetConfig, DemoConfig, Folder, Loader, decode_workers, demo, to_u8},
    diffusion::{NetworkDenoiser, NoiseSchedule, Predict, ScheduleConfig, sample},
    extractors::I3d,
    flops,
    networks::{Inputs, Ports},
    nn::Parameters,
    random::{Purpose, normal},
    torch::{
        Adam, Autotune, DeviceName, FixedWeights, Readback, RoundedWeights, StepGraphs, StepInputs, allow_tf32,
        backward, cuda_graphs, processor_or_gpu, upload,
    },
    train::{Ema, Optimizer, Saver, StepAround},
};

/// Times what `experiment` says, and gives each line to `say` as it is known: a table, or with `json` an object a line.
///
/// # Errors
/// A device that is not there; LibTorch's own.
pub fn bench(experiment: &BenchExperiment, json: bool, say: &dyn Fn(String)) -> Result<()> {
    let device = experiment.device.parse::<DeviceName>()?.open()?;
    allow_tf32(experiment.tf32);
    let table = BenchTable {
        say,
        json,
        device,
        precision: experiment.precision,
        tf32: experiment.tf32,
        title: processor_or_gpu(device),
    };
    let clock = Clock { device, warmup: experiment.warmup, repeats: experiment.repeats };
    table.head(experiment);
    let autoencoder = match &experiment.autoencoder {
        Some(bench) => Some(autoencoder(bench, &clock, &table)?),
        None => None,
    };
    if let Some(bench) = &experiment.unet {
        unet(bench, autoencoder.as_deref(), &clock, &table)?;
    }
    if let Some(bench) = &experiment.i3d {
        allow_tf32(false);
        match I3d::load(None, device) {
            Ok(network) => i3d(bench, &network, &clock, &table),
            Err(error) => table.left_out("i3d", &error),
        }
    }
    if let Some(bench) = &experiment.loader
        && let Err(error) = loader(bench, &clock, &table)
    {
        table.left_out("loader", &error);
    }
    Ok(())
}

fn noise(shape: &[i64], device: Device) -> Tensor {
    normal(0, Purpose::Evaluation, 0, 0, shape).to_device(device)
}

/// What is another tensor in each step of a training.
struct OneInput(Tensor);

impl StepInputs for OneInput {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        vec![&mut self.0]
    }
}

fn unet(bench: &UNetBench, autoencoder: Option<&dyn VideoCodec>, clock: &Clock, table: &BenchTable) -> Result<()> {
    let UNetBench { network, latent: [c, f, h, w], batch, .. } = bench;
    let (device, batch) = (clock.device, *batch);
    let ports = Ports { text: network.takes().text, ..Ports::of(bench.latent) };
    const TOKENS: i64 = 77;
    let parameters = Parameters::new(device, 0);
    let unet = network.build(&parameters.root(), &ports)?;
    let z = noise(&[batch, *c, *f, *h, *w], device);
    let target = noise(&[batch, *c, *f, *h, *w], device) * 0.5;
    let t = Tensor::full([batch], 500, (Kind::Int64, device));
    let text = network.takes().text.map(|width| noise(&[batch, TOKENS, width], device));
    let given = Inputs { text, ..Inputs::default() };
    let flops = batch * network.flops(&ports, bench.latent, TOKENS);
    let shape = json!({"batch": batch});

    let timing = {
        let _weights = FixedWeights::new(); // as in sampling
        clock.time(|| {
            let _autocast = table.autocast();
            let _ = no_grad(|| unet.forward(&z, &t, &given));
            Ok(())
        })?
    };
    table.line("unet_forward", &timing, Some(flops), false, shape.clone());

    let mut optimizer = Optimizer::new(adamw(), &parameters);
    let autotune = Autotune::begin(); // as in training
    let (mut weights, mut graphs) = (RoundedWeights::new(), StepGraphs::default());
    let mut step = |noisy: &OneInput| {
        let _autocast = table.autocast();
        let _weights = weights.pass(device);
        let prediction = unet.forward(&noisy.0, &t, &given).to_kind(Kind::Float);
        let loss = prediction.l1_loss(&target, tch::Reduction::Mean);
        backward(&loss);
        optimizer.step(&optimizer.gradients(), StepAround::default())?;
        optimizer.zero_grad()?;
        Ok(loss.detach())
    };
    let timing = clock.time(|| graphs.run(0, &mut OneInput(z.shallow_clone()), &mut step).map(drop))?;
    let more = json!({"batch": batch, "recompute": serde_json::to_value(network)?["recompute"]});
    drop(autotune);
    table.line("unet_train_step", &timing, Some(3 * flops), false, more);

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
        table.line("checkpoint_stall", &timing, None, true, json!({"megabytes": bytes / 1_000_000}));
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
            let _autocast = table.autocast();
            let draw = |i: usize| upload(&normal(0, Purpose::SampleStep, 0, i as u64, &z.size()), device);
            let z_0 = sample(&denoiser, &**config, &schedule, &z, &draw, &mut |_, _| {})?;
            if let Some(autoencoder) = autoencoder {
                let clip = |i| Readback::of(&no_grad(|| to_u8(&autoencoder.decode(&z_0.narrow(0, i, 1)))));
                let clips: Vec<Readback> = (0..batch).map(clip).collect::<Result<_>>()?;
                clips.iter().try_for_each(|clip| clip.wait().map(drop))?;
            }
            Ok(())
        })?;
        let decoding = autoencoder.map_or(0, |codec| {
            let [frames, height, width] = codec.settings().clip_shape([*f, *h, *w]);
            batch * codec.settings().flops(frames, height, width)[1]
        });
        let kind = serde_json::to_value(config)?;
        let more = json!({
            "sampler": kind["kind"], "steps": steps, "batch": batch, "decoded": autoencoder.is_some(),
            "videos_per_second": batch as f64 / timing.median, "cuda_graphs": cuda_graphs(),
        });
        table.line("sample", &timing, Some(steps as i64 * flops + decoding), false, more);
    }
    Ok(())
}

fn adamw() -> Adam {
    Adam { learning_rate: 1e-5, betas: (0.9, 0.999), weight_decay: 0.01, eps: 1e-8, decoupled: true }
}

fn autoencoder(bench: &AutoencoderBench, clock: &Clock, table: &BenchTable) -> Result<Box<dyn VideoCodec>> {
    let AutoencoderBench { network, frames, resolution, batch } = bench;
    let (device, side) = (clock.device, *resolution);
    let parameters = Parameters::new(device, 0);
    let autoencoder = network.build(&parameters.root());
    let x = noise(&[*batch, 3, *frames, side, side], device).clamp(-1.0, 1.0);
    let [c, f, h, w] = network.latent_shape(*frames, side, side)?;
    let z = noise(&[*batch, c, f, h, w], device);
    let [encoder, decoder] = network.flops(*frames, side, side).map(|flops| batch * flops);
    let shape = json!({"batch": batch, "frames": frames, "resolution": resolution});

    let timing = clock.time(|| {
        let _autocast = table.autocast();
        let _ = no_grad(|| autoencoder.encode(&x));
        Ok(())
    })?;
    table.line("encoder", &timing, Some(encoder), false, shape.clone());
    let timing = clock.time(|| {
        let _autocast = table.autocast();
        let _ = no_grad(|| autoencoder.decode(&z));
        Ok(())
    })?;
    table.line("decoder", &timing, Some(decoder), false, shape.clone());
    let posterior = noise(&[*batch, c, f, h, w], device);
    let _autotune = Autotune::begin(); // as in training
    let timing = clock.time(|| {
        parameters.zero_grad();
        let _autocast = table.autocast();
        let reconstruction = autoencoder.decode(&autoencoder.encode(&x).sample(&posterior)).to_kind(Kind::Float);
        backward(&reconstruction.l1_loss(&x, tch::Reduction::Mean));
        Ok(())
    })?;
    table.line("autoencoder_forward_backward", &timing, Some(3 * (encoder + decoder)), false, shape);
    parameters.freeze();
    Ok(autoencoder)
}

fn i3d(bench: &I3dBench, network: &I3d, clock: &Clock, table: &BenchTable) {
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
            table.line("i3d", &timing, Some(videos * flops::i3d(frames)), true, more);
        }
        Err(error) => table.left_out("i3d", &error),
    }
}

fn loader(bench: &LoaderBench, clock: &Clock, table: &BenchTable) -> Result<()> {
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
    table.line("loader", &timing, None, true, more);
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
    use crate::experiment::{Experiment, parse};

    #[test]
    fn everything_is_a_sound_experiment() {
        parse::<BenchExperiment>("bench", ALL, &[]).unwrap().validate().unwrap();
    }
}
