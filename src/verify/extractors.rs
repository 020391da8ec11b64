//! I3D, LPIPS, and the metrics on them.

use anyhow::Result;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::{
    case::Case,
    outputs::{Outputs, scalar},
};
use crate::{
    extractors::{BroughtFile, FeatureExtractor, I3d, Lpips, frames::Vgg16Frames, v_jepa::VJepa, video_mae::VideoMae},
    metrics::{frechet_distance, kernel_distance},
    weights::synthesize,
};

pub fn i3d(case: &Case) -> Result<Outputs> {
    let network = I3d::load(None, case.device())?;
    Ok(vec![("logits", network.features(&case.input("video")?)?)])
}

pub fn lpips(case: &Case) -> Result<Outputs> {
    let network = Lpips::load(None, case.device(), Kind::Float)?;
    Ok(vec![(
        "distance",
        tch::no_grad(|| Ok::<Tensor, anyhow::Error>(network.distance(&case.input("a")?, &case.input("b")?)))?,
    )])
}

pub fn vgg16_frames(case: &Case) -> Result<Outputs> {
    let network = Vgg16Frames::load(None, case.device())?;
    let features = |name: &str| network.features(&case.input(name)?);
    Ok(vec![("features", features("video")?), ("features_large", features("large")?)])
}

pub fn video_metrics(case: &Case) -> Result<Outputs> {
    let network = I3d::load(None, case.device())?;
    distances(&network.features(&case.input("real")?)?, &network.features(&case.input("fake")?)?)
}

pub fn feature_metrics(case: &Case) -> Result<Outputs> {
    distances(&case.input("real")?, &case.input("fake")?)
}

fn distances(real: &Tensor, fake: &Tensor) -> Result<Outputs> {
    Ok(vec![("fvd", scalar(frechet_distance(real, fake)?)), ("kvd", scalar(kernel_distance(real, fake)?))])
}

/// The released names and shapes of an encoder that a user brings the weights of.
#[derive(Deserialize)]
struct Encoder {
    tensors: Vec<(String, Vec<i64>)>,
}

fn encoder(case: &Case, open: fn(BroughtFile, Device) -> Result<Box<dyn FeatureExtractor>>) -> Result<Outputs> {
    let Encoder { tensors } = case.config()?;
    let unfilled = |shape: &[i64]| Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false);
    let named: Vec<_> = tensors.iter().map(|(name, shape)| (name.clone(), unfilled(shape))).collect();
    let file = BroughtFile { tensors: synthesize(&named, ""), sha256: String::new() };
    let network = open(file, case.device())?;
    let features = |name: &str| network.features(&case.input(name)?);
    Ok(vec![
        ("features", features("video")?),
        ("features_short", features("short")?),
        ("features_long", features("long")?),
    ])
}

pub fn video_mae_v2(case: &Case) -> Result<Outputs> {
    encoder(case, |file, device| Ok(Box::new(VideoMae::new(file, device)?)))
}

pub fn v_jepa(case: &Case) -> Result<Outputs> {
    encoder(case, |file, device| Ok(Box::new(VJepa::new(file, device)?)))
}
