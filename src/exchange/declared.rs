//! Networks without memory, against which the tensors of a file are held.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::{Part, warn_of_infinities};
use crate::{
    autoencoder_loss::{CodecLossSettings, DiscriminatorConfig, PatchDiscriminator},
    codecs::CodecSettings,
    networks::{Ports, UNet3d, UNetConfig},
    nn::Parameters,
    text::{ClipText, ClipTextConfig},
    weights::lvdm_checkpoint::{LvdmCheckpoint, Tensors},
};

/// A network that was declared without memory, to hold a checkpoint against.
pub(super) struct Declared {
    pub(super) part: &'static str,
    pub(super) parameters: Parameters,
}

impl Declared {
    pub(super) fn codec(settings: &dyn CodecSettings) -> Self {
        let parameters = Parameters::unfilled(Device::Cpu);
        settings.build(&parameters.root());
        Declared { part: settings.name(), parameters }
    }

    pub(super) fn text_encoder(config: &ClipTextConfig) -> Self {
        let parameters = Parameters::unfilled(Device::Cpu);
        ClipText::new(&parameters.root(), config);
        Declared { part: "text encoder", parameters }
    }

    pub(super) fn unet(config: &UNetConfig, ports: &Ports) -> Self {
        let parameters = Parameters::unfilled(Device::Cpu);
        UNet3d::new(&parameters.root(), config, ports);
        Declared { part: "U-Net", parameters }
    }

    pub(super) fn discriminator(config: &DiscriminatorConfig) -> Self {
        let parameters = Parameters::unfilled(Device::Cpu);
        PatchDiscriminator::new(&parameters.root(), 3, config);
        Declared { part: "discriminator", parameters }
    }

    pub(super) fn discriminators(loss: &dyn CodecLossSettings) -> Self {
        let parameters = Parameters::unfilled(Device::Cpu);
        drop(loss.discriminators(&parameters.root()));
        Declared { part: "discriminators", parameters }
    }

    /// The network's own tensors out of those of a file, in float32.
    pub(super) fn take(&self, tensors: &Tensors) -> Result<Tensors> {
        self.parameters.check(tensors).context(self.part)?;
        let aliases = self.parameters.aliases();
        for (alias, name) in &aliases {
            if let (Some(a), Some(b)) = (tensors.get(alias), tensors.get(name)) {
                ensure!(
                    a.data_ptr() == b.data_ptr() || a.equal(b),
                    "{}: `{alias}` and `{name}` are one tensor, but the file's differ",
                    self.part
                );
            }
        }
        let value = |name: &String| {
            let alias = || aliases.iter().find(|(_, own)| own == name).and_then(|(alias, _)| tensors.get(alias));
            tensors.get(name).or_else(alias).expect("checked above")
        };
        let own: Tensors =
            self.parameters.named().into_iter().map(|(name, _)| (name.clone(), single(value(&name)))).collect();
        warn_of_infinities(self.part, &own);
        Ok(own)
    }

    /// The averaged weights, if the file has any.
    pub(super) fn take_average(&self, found: &mut LvdmCheckpoint, prefix: &str) -> Result<Tensors> {
        if !found.has_average() {
            return Ok(Tensors::new());
        }
        let aliases = self.parameters.aliases();
        let alias = |name: &String| aliases.iter().find(|(_, own)| own == name).map(|(alias, _)| alias.clone());
        let trainable = self.parameters.trainable();
        let names: Vec<_> = trainable.iter().map(|(name, _)| (name.clone(), alias(name))).collect();
        let average = found.averaged(prefix, &names).context(self.part)?;
        for (name, declared) in &trainable {
            ensure!(
                average[name].size() == declared.size(),
                "{}: the average of `{name}` has shape {:?}, the network needs {:?}",
                self.part,
                average[name].size(),
                declared.size()
            );
        }
        Ok(average.into_iter().map(|(name, tensor)| (name, single(&tensor))).collect())
    }

    pub(super) fn report(&self) -> Part {
        Part { name: self.part, tensors: self.parameters.named().len(), parameters: self.parameters.count() }
    }
}

fn single(tensor: &Tensor) -> Tensor {
    if tensor.is_floating_point() { tensor.to_kind(Kind::Float) } else { tensor.shallow_clone() }
}
