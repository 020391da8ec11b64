//! A network's settings are inferred from the names and shapes of its tensors.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use lvdm::{
    autoencoder_loss::{DiscriminatorConfig, PatchDiscriminator},
    codecs::{AutoencoderConfig, ImageAutoencoder, ImageAutoencoderConfig, VideoAutoencoder},
    exchange::{InferredAutoencoder, InferredUNet, Shapes},
    networks::{AttentionKind, Ports, UNet3d, UNetConfig},
    nn::Parameters,
    weights::LvdmCheckpoint,
};
use tch::{Device, Kind, Tensor};

use crate::{Tensors, common::source, small_unet};

/// Name → shape of a released network, without its prefix.
fn released(file: &str) -> BTreeMap<String, Vec<i64>> {
    let text = fs::read_to_string(source(&format!("tests/parity/names/{file}.json"))).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let prefix = json["prefix"].as_str().unwrap();
    let tensors: Vec<(String, Vec<i64>)> = serde_json::from_value(json["tensors"].clone()).unwrap();
    tensors.into_iter().map(|(name, shape)| (name.strip_prefix(prefix).unwrap().to_string(), shape)).collect()
}

/// The network that was inferred has exactly the released tensors.
fn agree(file: &str, declare: &dyn Fn(&Parameters)) {
    let parameters = Parameters::unfilled(Device::Cpu);
    declare(&parameters);
    let tensors: Tensors = released(file)
        .into_iter()
        .map(|(name, shape)| (name, Tensor::zeros([], (Kind::Float, Device::Cpu)).expand(shape, false)))
        .collect();
    parameters.check(&tensors).unwrap();
}

/// From names and shapes alone, without their memory, to the released configurations.
#[test]
fn released_networks_are_recognised() {
    let short = UNetConfig::default();
    let text = UNetConfig {
        channels: 320,
        multipliers: vec![1, 2, 4, 4],
        blocks_per_level: 2,
        attention_factors: vec![1, 2, 4],
        heads: 8,
        attention: AttentionKind::Text,
        adaptive_norm: false,
        ..UNetConfig::default()
    };
    for (file, config, inputs, length, classes) in [
        ("unet_short", &short, 4, 4, None),
        ("unet_prediction", &short, 5, 4, Some(251)),
        ("unet_interpolation", &short, 5, 5, Some(251)),
        ("unet_text", &text, 4, 16, None),
    ] {
        let found = InferredUNet::from_shapes(&released(file).into_iter().collect()).unwrap();
        assert_eq!(&found.config, config, "{file}");
        assert_eq!((found.heads, found.inputs, found.outputs), (Some(config.heads), inputs, 4), "{file}");
        assert_eq!((found.temporal_length, found.classes), (Some(length), classes), "{file}");
        agree(file, &|p| drop(UNet3d::new(&p.root(), &found.config, &found.ports(0))));
    }
    let found = InferredAutoencoder::from_shapes(&released("autoencoder_3d").into_iter().collect()).unwrap();
    assert_eq!(found.released(), Some(AutoencoderConfig::default()));
    agree("autoencoder_3d", &|p| drop(VideoAutoencoder::new(&p.root(), &found.released().unwrap())));
    let found = ImageAutoencoderConfig::from_shapes(&released("autoencoder_2d").into_iter().collect()).unwrap();
    assert_eq!(found, ImageAutoencoderConfig::default());
    agree("autoencoder_2d", &|p| drop(ImageAutoencoder::new(&p.root(), &found)));
    let found = DiscriminatorConfig::from_shapes(&released("patch_discriminator").into_iter().collect()).unwrap();
    assert_eq!(found, DiscriminatorConfig::default());
    agree("patch_discriminator", &|p| drop(PatchDiscriminator::new(&p.root(), 3, &found)));
}

/// Other networks than the released ones are recognised too, each by its own tensors.
#[test]
fn every_setting_leaves_a_trace() {
    let base = small_unet();
    for config in [
        base.clone(),
        UNetConfig { multipliers: vec![1, 1, 3], attention_factors: vec![1, 4], ..base.clone() },
        UNetConfig { blocks_per_level: 2, adaptive_norm: false, ..base.clone() },
        UNetConfig { attention: AttentionKind::Joint, ..base.clone() },
        UNetConfig { attention: AttentionKind::Text, context_width: 24, ..base.clone() },
        UNetConfig { attention_factors: vec![], heads: 8, ..base.clone() },
        UNetConfig { relative_position: false, heads: 1, ..base },
    ] {
        let parameters = Parameters::unfilled(Device::Cpu);
        let ports = Ports { outputs: 3, text: config.text_width(), levels: Some(9), ..Ports::of([5, 7, 1, 1]) };
        UNet3d::new(&parameters.root(), &config, &ports);
        let tensors: Tensors = parameters.named().into_iter().collect();
        let found = InferredUNet::from_shapes(&Shapes::from(&tensors)).unwrap();
        assert_eq!(found.config, config);
        assert_eq!(found.ports(7), ports);
        assert_eq!(found.heads, config.relative_position.then_some(config.heads));
    }
}

/// All released names together: each goes to its part, and no two averages share a name.
#[test]
fn a_released_checkpoint_is_sorted() {
    let small = || Tensor::zeros([1], (Kind::Float, Device::Cpu));
    for unet in ["unet_short", "unet_prediction", "unet_interpolation", "unet_text"] {
        let names = released(unet);
        let mut tensors = Tensors::new();
        let mut flat = BTreeSet::new();
        for (name, shape) in &names {
            let tensor = small().expand(shape, false);
            let averaged = format!("model_ema.{}", format!("diffusion_model.{name}").replace('.', ""));
            assert!(flat.insert(averaged.clone()), "{averaged} stands for two");
            tensors.insert(averaged, tensor.shallow_clone());
            tensors.insert(format!("model.diffusion_model.{name}"), tensor);
        }
        let autoencoder = released("autoencoder_3d");
        tensors.extend(autoencoder.iter().map(|(n, s)| (format!("first_stage_model.{n}"), small().expand(s, false))));
        let mut found = LvdmCheckpoint::sort(tensors).unwrap();
        assert_eq!((found.unet.len(), found.autoencoder.len()), (names.len(), 122));
        assert!(found.ignored.is_empty());
        let wanted: Vec<_> = names.keys().map(|name| (name.clone(), None)).collect();
        assert_eq!(found.averaged("diffusion_model.", &wanted).unwrap().len(), names.len());
    }
}
