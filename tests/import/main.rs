//! Released checkpoints become runs and come back under their names; what is damaged, hostile or foreign does not.

#[path = "../common/mod.rs"]
mod common;

mod inference;
mod refusals;
mod round_trip;
mod runs;
mod tats;

use std::{collections::BTreeMap, path::Path};

use common::{
    noise,
    pickle::{Pickle, bytes, write_checkpoint},
    run_in, wake,
};
use lvdm::{
    autoencoder_loss::{DiscriminatorConfig, PatchDiscriminator},
    checkpoint::{self, Checkpoint},
    codecs::{AutoencoderConfig, VideoAutoencoder},
    diffusion::{NoiseSchedule, ScheduleConfig},
    exchange::{ImportOptions, LatentPreset},
    networks::{Ports, UNet3d, UNetConfig},
    nn::Parameters,
};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

type Tensors = BTreeMap<String, Tensor>;

/// What stands beside the weights, as PyTorch Lightning writes it; a class is a dictionary's key.
fn beside(pickle: &mut Pickle) {
    pickle.text("epoch");
    pickle.int(12);
    pickle.text("global_step");
    pickle.int(3456);
    pickle.text("pytorch-lightning_version");
    pickle.text("1.4.2");
    pickle.text("callbacks");
    pickle.raw(b"}(cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}u");
    pickle.text("optimizer_states");
    pickle.raw(b"](}e");
    pickle.text("lr_schedulers");
    pickle.raw(b"]");
    pickle.text("hparams_name");
    pickle.text("kwargs");
}

/// A network's tensors with random values, under a prefix, aliases too.
fn network(prefix: &str, seed: u64, declare: &dyn Fn(&Parameters)) -> Tensors {
    let parameters = Parameters::new(Device::Cpu, seed);
    declare(&parameters);
    wake(&parameters);
    let own: Tensors = parameters.named().into_iter().map(|(n, t)| (n, t.detach())).collect();
    let aliased = parameters.aliases().into_iter().map(|(alias, name)| (alias, own[&name].shallow_clone()));
    own.iter()
        .map(|(n, t)| (n.clone(), t.shallow_clone()))
        .chain(aliased)
        .map(|(n, t)| (format!("{prefix}{n}"), t))
        .collect()
}

/// The average of a network, as released checkpoints name it; of two names of a tensor, the shorter.
fn averaged(prefix: &str, declare: &dyn Fn(&Parameters)) -> Tensors {
    let all = network(prefix, 77, declare);
    let mut tensors: Tensors = all
        .iter()
        .filter(|(name, _)| {
            !all.contains_key(&name.replace(".conv.weight", ".weight")) || !name.ends_with(".conv.weight")
        })
        .map(|(name, tensor)| (format!("model_ema.{}", name.replace('.', "")), tensor.shallow_clone()))
        .collect();
    tensors.insert("model_ema.decay".into(), Tensor::from(0.999f32));
    tensors.insert("model_ema.num_updates".into(), Tensor::from(3456i32));
    tensors
}

fn small_autoencoder() -> AutoencoderConfig {
    AutoencoderConfig { channels: 4, factors: [2, 4, 4], norm_groups: 4, ..AutoencoderConfig::default() }
}

fn small_unet() -> UNetConfig {
    UNetConfig {
        channels: 32,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![2],
        heads: 4,
        ..UNetConfig::default()
    }
}

const SHORT: Ports = Ports::of([4, 4, 1, 1]);
const MASKED: Ports = Ports { outputs: 4, levels: Some(251), ..Ports::of([5, 4, 1, 1]) };

/// The options that the small networks need.
const OPTIONS: [&str; 8] = ["--latents", "sky", "--temporal-factor", "2", "--norm-groups", "4", "--resolution", "16"];

fn import_options() -> ImportOptions {
    ImportOptions {
        latents: Some(LatentPreset::Sky),
        temporal_factor: Some(2),
        norm_groups: Some(4),
        resolution: Some(16),
        ..ImportOptions::default()
    }
}

fn first_stage() -> Tensors {
    network("first_stage_model.", 1, &|p| drop(VideoAutoencoder::new(&p.root(), &small_autoencoder())))
}

/// The tensors of a diffusion checkpoint.
fn diffusion(ports: Ports, config: &UNetConfig) -> Tensors {
    let declare = |p: &Parameters| drop(UNet3d::new(&p.root(), config, &ports));
    let mut tensors = network("model.diffusion_model.", 2, &declare);
    tensors.extend(averaged("diffusion_model.", &declare));
    tensors.extend(first_stage());
    let betas = NoiseSchedule::new(&ScheduleConfig::default()).unwrap().beta;
    let betas: Vec<f32> = betas.into_iter().map(|beta| beta as f32).collect();
    tensors.insert("betas".into(), Tensor::from_slice(&betas));
    tensors.insert("alphas_cumprod".into(), Tensor::from_slice(&betas).detach().copy());
    tensors.insert("logvar".into(), Tensor::zeros([1000], (Kind::Float, Device::Cpu)));
    tensors
}

/// The tensors of an autoencoder's own checkpoint.
fn autoencoder(with_average: bool) -> Tensors {
    let declare = |p: &Parameters| drop(VideoAutoencoder::new(&p.root(), &small_autoencoder()));
    let discriminator = DiscriminatorConfig { channels: 8, layers: 2 };
    let mut tensors = network("", 1, &declare);
    tensors.extend(network("loss.discriminator.", 4, &|p| {
        drop(PatchDiscriminator::new(&p.root(), 3, &discriminator));
    }));
    tensors.insert("loss.logvar".into(), Tensor::zeros([], (Kind::Float, Device::Cpu)));
    tensors.insert("loss.perceptual_loss.lin0.model.1.weight".into(), noise(1, &[1, 4, 1, 1]));
    if with_average {
        tensors.extend(averaged("", &declare));
    }
    tensors
}

/// A folder with a short-video checkpoint.
fn workplace() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(&folder.path().join("short.ckpt"), &diffusion(SHORT, &small_unet()), &beside);
    folder
}

fn import(folder: &Path, file: &str, out: &str, more: &[&str]) -> common::Said {
    run_in(folder, &[&["import", "lvdm", file, "--out", out], &OPTIONS[..], more].concat())
}

fn latest(run: &Path) -> Checkpoint {
    checkpoint::open(run).unwrap().1
}

/// To the bit.
fn same(a: &Tensors, b: &Tensors) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, tensor) in a {
        assert_eq!((tensor.kind(), tensor.size()), (b[name].kind(), b[name].size()), "{name}");
        assert!(bytes(tensor) == bytes(&b[name]), "{name}");
    }
}

fn under(prefix: &str, tensors: &Tensors) -> Tensors {
    let strip = |(n, t): (&String, &Tensor)| Some((n.strip_prefix(prefix)?.to_string(), t.shallow_clone()));
    tensors.iter().filter_map(strip).collect()
}
