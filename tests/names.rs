//! The networks' parameters have the released names and shapes, so weights travel both ways.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use common::source;
use lvdm::{
    autoencoder_loss::{DiscriminatorConfig, PatchDiscriminator},
    codecs::{AutoencoderConfig, ImageAutoencoder, ImageAutoencoderConfig, VideoAutoencoder},
    networks::{Latte, LatteConfig, Ports, UNet3d, UNetConfig},
    nn::Parameters,
};
use serde::Deserialize;

/// What a released checkpoint lists.
#[derive(Deserialize)]
struct Released {
    prefix: String,
    parameters: i64,
    tensors: Vec<(String, Vec<i64>)>,
}

/// Names without prefix → shapes must be the same on both sides, and so must the number of parameters.
fn agree(file: &str, parameters: &Parameters) {
    let text = fs::read_to_string(source(&format!("tests/parity/names/{file}.json"))).unwrap();
    let released: Released = serde_json::from_str(&text).unwrap();
    let theirs: BTreeMap<String, Vec<i64>> = released
        .tensors
        .into_iter()
        .map(|(name, shape)| (name.strip_prefix(&released.prefix).unwrap().to_string(), shape))
        .collect();
    let mut ours: BTreeMap<String, Vec<i64>> =
        parameters.named().into_iter().map(|(name, tensor)| (name, tensor.size())).collect();
    for (alias, name) in parameters.aliases() {
        let shape = ours[&name].clone();
        assert!(ours.insert(alias.clone(), shape).is_none(), "{alias} is a name of its own too");
    }
    let keys = |map: &BTreeMap<String, Vec<i64>>| map.keys().cloned().collect::<BTreeSet<_>>();
    let missing: Vec<_> = keys(&theirs).difference(&keys(&ours)).cloned().collect();
    let unknown: Vec<_> = keys(&ours).difference(&keys(&theirs)).cloned().collect();
    assert!(missing.is_empty() && unknown.is_empty(), "{file}: missing {missing:?}, unknown {unknown:?}");
    assert_eq!(ours, theirs, "{file}");
    assert_eq!(parameters.count(), released.parameters, "{file}");
}

fn unet(config: &UNetConfig, inputs: i64, temporal_length: i64, classes: Option<i64>) -> Parameters {
    let parameters = Parameters::unfilled(tch::Device::Cpu);
    config.validate().unwrap();
    UNet3d::new(
        &parameters.root(),
        config,
        &Ports { outputs: 4, levels: classes, ..Ports::of([inputs, temporal_length, 1, 1]) },
    );
    parameters
}

/// 19,446,759 parameters; ordinary convolutions' kernels under two names.
#[test]
fn autoencoder() {
    let parameters = Parameters::unfilled(tch::Device::Cpu);
    VideoAutoencoder::new(&parameters.root(), &AutoencoderConfig::default());
    agree("autoencoder_3d", &parameters);
    assert_eq!(parameters.count(), 19_446_759);
    assert!(parameters.aliases().iter().any(|(alias, name)| name == &alias.replace(".weight", ".conv.weight")));
}

/// Stable Diffusion's: 83,653,863 parameters.
#[test]
fn image_autoencoder() {
    let parameters = Parameters::unfilled(tch::Device::Cpu);
    ImageAutoencoder::new(&parameters.root(), &ImageAutoencoderConfig::default());
    agree("autoencoder_2d", &parameters);
    assert_eq!(parameters.count(), 83_653_863);
}

#[test]
fn discriminator() {
    let parameters = Parameters::unfilled(tch::Device::Cpu);
    PatchDiscriminator::new(&parameters.root(), 3, &DiscriminatorConfig::default());
    agree("patch_discriminator", &parameters);
}

/// 548,904,580 parameters.
#[test]
fn short_video_unet() {
    let parameters = unet(&UNetConfig::default(), 4, 4, None);
    agree("unet_short", &parameters);
    assert_eq!(parameters.count(), 548_904_580);
}

#[test]
fn frame_conditioned_unets() {
    agree("unet_prediction", &unet(&UNetConfig::default(), 5, 4, Some(251)));
    agree("unet_interpolation", &unet(&UNetConfig::default(), 5, 5, Some(251)));
}

/// 958,924,964 parameters.
#[test]
fn text_unet() {
    let parameters = unet(&UNetConfig::stable_diffusion(), 4, 16, None);
    agree("unet_text", &parameters);
    assert_eq!(parameters.count(), 958_924_964);
}

/// Latte-XL/2 on 16 frames of 256×256: 673,681,568 parameters, and with the classes of UCF-101 673,799,072.
#[test]
fn latte() {
    for (file, classes, count) in
        [("latte_xl2_unconditional", None, 673_681_568), ("latte_xl2_class", Some(101), 673_799_072)]
    {
        let parameters = Parameters::unfilled(tch::Device::Cpu);
        let ports = Ports { outputs: 8, classes, ..Ports::of([4, 16, 32, 32]) };
        Latte::new(&parameters.root(), &LatteConfig::default(), &ports);
        agree(file, &parameters);
        assert_eq!(parameters.count(), count);
    }
}

/// The comparison notices a network that is a little different.
#[test]
fn another_network_is_noticed() {
    let other = unet(&UNetConfig { blocks_per_level: 2, ..UNetConfig::default() }, 4, 4, None);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| agree("unet_short", &other))).is_err());
}
