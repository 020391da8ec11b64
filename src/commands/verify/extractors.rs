//! I3D, LPIPS, and the metrics on them.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{Outputs, case::Case, scalar};
use crate::{
    extractors::{FeatureExtractor, I3d, Lpips, frames::Vgg16Frames},
    metrics::{frechet_distance, kernel_distance},
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
