//! A run → one file with the released names.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{Carried, Exported, Part, declared::Declared};
use crate::{
    autoencoder_loss::VIDEO_DISCRIMINATOR,
    checkpoint::{self, Checkpoint},
    exchange::{InferredUNet, Shapes},
    experiment::{AutoencoderExperiment, DiffusionExperiment, DiffusionSpace, Trained},
    run::{TEXT_ENCODER_TASK, last_and_averaged, run_of, weights},
    run_files::{AUTOENCODER_FILE, TEXT_ENCODER_FILE},
    safetensors::write_safetensors_atomically,
    text::TextEncoderConfig,
    weights::lvdm_checkpoint::{AVERAGED_UNET, DISCRIMINATOR, Export, FIRST_STAGE, TEXT_ENCODER, UNET},
};

/// Writes a run's networks under the released names.
///
/// # Errors
/// A folder that is not a run; damaged weights; a full disk.
pub fn export(run: &Path, out: &Path) -> Result<Vec<Part>> {
    let (path, found) = checkpoint::open(run)?;
    let mut export = Export { tensors: Vec::new() };
    let mut parts = Vec::new();
    let context = || path.display().to_string();
    let experiment = || format!("the experiment stored in {}", path.display());
    let exported = match found.task.as_str() {
        "autoencoder" => {
            let autoencoder: AutoencoderExperiment =
                serde_json::from_value(found.experiment.clone()).with_context(experiment)?;
            let network = Declared::codec(&*autoencoder.autoencoder);
            let average = autoencoder.trainer.ema_decay;
            parts.extend(export_network(&mut export, &network, "", "", &found, average).with_context(context)?);
            let mut discriminator = found.part("discriminator");
            // a released checkpoint has no place for a discriminator of whole clips
            discriminator.retain(|name, _| !name.starts_with(&format!("{VIDEO_DISCRIMINATOR}.")));
            if !discriminator.is_empty() {
                let network = Declared::discriminator(&autoencoder.loss.discriminator);
                network.parameters.check(&discriminator).with_context(context)?;
                export.network(DISCRIMINATOR, &discriminator, &[])?;
                parts.push(network.report());
            }
            let (scale, shift) = latent_constants(&found)?;
            Exported {
                progress: found.progress,
                scale,
                shift,
                autoencoder: found.experiment,
                diffusion: None,
                text_encoder: None,
            }
        }
        "diffusion" => {
            let diffusion: DiffusionExperiment =
                serde_json::from_value(found.experiment.clone()).with_context(experiment)?;
            ensure!(
                diffusion.autoencoder != DiffusionSpace::Pixels,
                "{} was trained on pixels, and a released checkpoint holds an autoencoder",
                run.display()
            );
            let folder = if run.is_dir() { run.to_path_buf() } else { run_of(&path) };
            let (first_path, first_stage) = checkpoint::open_averaged(&folder.join(AUTOENCODER_FILE))?;
            let mut first_stage = first_stage.expect("autoencoder", &first_path)?;
            let known: Carried =
                serde_json::from_value(first_stage.experiment.clone()).context("the carried autoencoder")?;
            let inferred = InferredUNet::from_shapes(&Shapes::from(&found.part("model"))).with_context(context)?;
            let data = &diffusion.data;
            let latent = known.autoencoder.latent_shape(data.frames, data.resolution, data.resolution)?;
            let ports = inferred.ports((latent[1] - 1) / diffusion.latent_stride + 1);
            let network = Declared::unet(diffusion.unet()?, &ports);
            let average = diffusion.trainer.ema_decay;
            parts.extend(
                export_network(&mut export, &network, UNET, AVERAGED_UNET, &found, average).with_context(context)?,
            );
            let network = Declared::codec(&*known.autoencoder);
            let frozen = weights(&mut first_stage)?;
            network.parameters.check(&frozen).with_context(|| first_path.display().to_string())?;
            export.network(FIRST_STAGE, &frozen, &network.parameters.aliases())?;
            parts.push(network.report());
            let mut text_encoder = None;
            if diffusion.network.takes().text.is_some() {
                let (part, config) = export_text_encoder(&mut export, &folder.join(TEXT_ENCODER_FILE))?;
                parts.push(part);
                text_encoder = Some(config);
            }
            let (scale, shift) = latent_constants(&first_stage)?;
            Exported {
                progress: found.progress,
                scale,
                shift,
                autoencoder: first_stage.experiment,
                // its adapters are merged
                diffusion: Some(DiffusionExperiment { trained: Trained::All, ..diffusion }),
                text_encoder,
            }
        }
        other => bail!("{} holds a training of `{other}`, which has no released names", path.display()),
    };
    write_safetensors_atomically(out, &export.tensors, &serde_json::to_value(exported)?)?;
    Ok(parts)
}

/// A run's trained network, and its average where there is one.
fn export_network(
    export: &mut Export,
    network: &Declared,
    prefix: &str,
    averaged_prefix: &str,
    found: &Checkpoint,
    decay: Option<f64>,
) -> Result<Vec<Part>> {
    let [model, average] = last_and_averaged(found)?;
    network.parameters.check(&model)?;
    let aliases = network.parameters.aliases();
    export.network(prefix, &model, &aliases)?;
    let mut parts = vec![network.report()];
    if !average.is_empty() {
        let decay = decay.unwrap_or(0.9999);
        export.average(averaged_prefix, &average, &aliases, decay, found.progress.ema_updates)?;
        let name = if prefix == UNET { "U-Net, average" } else { "autoencoder, average" };
        parts.push(Part { name, tensors: average.len(), ..network.report() });
    }
    Ok(parts)
}

fn export_text_encoder(export: &mut Export, path: &Path) -> Result<(Part, TextEncoderConfig)> {
    let found = Checkpoint::read(path)?.expect(TEXT_ENCODER_TASK, path)?;
    let known: TextEncoderConfig =
        serde_json::from_value(found.experiment.clone()).context("the carried text encoder")?;
    let network = Declared::text_encoder(&known.text_encoder);
    let tensors = found.part("model");
    network.parameters.check(&tensors).with_context(|| path.display().to_string())?;
    export.network(TEXT_ENCODER, &tensors, &[])?;
    Ok((network.report(), known))
}

pub(super) fn latent_constants(autoencoder: &Checkpoint) -> Result<(f64, f64)> {
    let measured = autoencoder.part("latent");
    let value = |name: &str| {
        measured.get(name).map(|t| t.double_value(&[])).with_context(|| format!("there is no `latent.{name}`"))
    };
    Ok((value("scale")?, value("shift")?))
}
