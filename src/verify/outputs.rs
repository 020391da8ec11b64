//! What components compute, and how it is told in numbers.

use anyhow::{Result, bail};
use tch::{Device, Tensor};

/// What a component computed, by the names of the case's `out.*`.
pub(super) type Outputs = Vec<(&'static str, Tensor)>;

/// What a tensor holds, on the host.
pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::try_from(tensor.to_device(Device::Cpu).to_kind(tch::Kind::Double).flatten(0, -1))?)
}

/// A scalar result.
pub(super) fn scalar(value: f64) -> Tensor {
    Tensor::from(value).to_device(Device::Cpu)
}

/// L2 norm over the gradients of all parameters.
pub(super) fn gradient_norm(parameters: &crate::nn::Parameters) -> Tensor {
    let square = |p: &Tensor| {
        let gradient = p.grad();
        if gradient.defined() { gradient.to_kind(tch::Kind::Double).square().sum(None).double_value(&[]) } else { 0.0 }
    };
    scalar(parameters.trainable().iter().map(|(_, p)| square(p)).sum::<f64>().sqrt())
}

/// How far each named parameter went from where it was, in the order of `names` (aliases accepted).
pub(super) fn moved(
    parameters: &crate::nn::Parameters,
    before: &[(String, Tensor)],
    now: &[(String, Tensor)],
    names: &[String],
) -> Result<Tensor> {
    let aliases = parameters.aliases();
    let distances: Result<Vec<f64>> = names
        .iter()
        .map(|name| {
            let own = aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, own)| own);
            let of = |list: &[(String, Tensor)]| list.iter().find(|(n, _)| n == own).map(|(_, t)| t.shallow_clone());
            match (of(before), of(now)) {
                (Some(a), Some(b)) => Ok((a - b).square().sum(None).sqrt().double_value(&[])),
                _ => bail!("the case names a parameter `{name}` that the network does not have"),
            }
        })
        .collect();
    Ok(Tensor::from_slice(&distances?))
}
