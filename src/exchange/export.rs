//! A run → one file with the released names.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Carried, Exported, Part, declared::Declared, mistake};
use crate::{
    autoencoder_loss::{CodecLossConfig, VIDEO_DISCRIMINATOR},
    checkpoint::{self, Checkpoint},
    codecs::CodecConfig,
    diffusion::{Objective, Predict},
    exchange::{InferredUNet, Shapes},
    experiment::{AutoencoderExperiment, DiffusionExperiment, DiffusionSpace, Trained},
    networks::NetworkConfig,
    run::{TEXT_ENCODER_TASK, last_and_averaged, run_of, weights},
    run_files::{AUTOENCODER_FILE, TEXT_ENCODER_FILE},
    safetensors::write_safetensors_atomically,
    text::TextEncoderConfig,
    weights::lvdm_checkpoint::{AVERAGED_UNET, DISCRIMINATOR, Export, FIRST_STAGE, TEXT_ENCODER, UNET},
};

/// Writes a run's networks under the released names.
///
/// # Errors
/// [`crate::experiment::UserError`] for a run of what the released code does not have; a folder that is not a run; damaged
/// weights; a full disk.
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
            check_codec(run, &autoencoder.autoencoder)?;
            let network = Declared::codec(&*autoencoder.autoencoder);
            let average = autoencoder.trainer.ema_decay;
            parts.extend(export_network(&mut export, &network, "", "", &found, average).with_context(context)?);
            let mut discriminator = found.part("discriminator");
            // a released checkpoint has no place for a discriminator of whole clips
            discriminator.retain(|name, _| !name.starts_with(&format!("{VIDEO_DISCRIMINATOR}.")));
            if !discriminator.is_empty() {
                let CodecLossConfig::Lvdm(loss) = &autoencoder.loss else {
                    return mistake(format!(
                        "{}: a checkpoint of LVDM has no place for the discriminators of other losses",
                        context()
                    ));
                };
                let network = Declared::discriminator(&loss.discriminator);
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
            check_place(run, &diffusion, "a checkpoint of LVDM")?;
            let folder = if run.is_dir() { run.to_path_buf() } else { run_of(&path) };
            let (first_path, first_stage) = checkpoint::open_averaged(&folder.join(AUTOENCODER_FILE))?;
            let mut first_stage = first_stage.expect("autoencoder", &first_path)?;
            let known: Carried =
                serde_json::from_value(first_stage.experiment.clone()).context("the carried autoencoder")?;
            check_codec(run, &known.autoencoder)?;
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

/// That the layout of another program has a place for all that a run's samples depend on: a file of its networks alone would
/// be sampled wrongly there, without a word.
///
/// # Errors
/// [`crate::experiment::UserError`]: what it has no place for.
pub(super) fn check_place(run: &Path, experiment: &DiffusionExperiment, layout: &str) -> Result<()> {
    let run = run.display();
    if let NetworkConfig::Latte(_) = experiment.network {
        return mistake(format!(
            "the network of {run} is a Latte, and {layout} holds a U-Net. The run's checkpoints are safetensors files that \
             hold Latte's released names already, behind `model.` and, averaged, `ema.`"
        ));
    }
    let path = experiment.schedule.build().context("schedule")?;
    let Objective { predict, .. } = experiment.objective;
    let lacking = if experiment.autoencoder == DiffusionSpace::Pixels {
        "was trained on pixels".to_string()
    } else if experiment.labels.is_some() {
        "knows class labels".to_string()
    } else if experiment.objective.learns_variance() {
        "has learned the variance of reverse steps".to_string()
    } else if path.discrete().is_none() {
        format!(
            "works on a noise path without steps (schedule: {})",
            serde_json::to_value(&experiment.schedule)?["kind"]
        )
    } else if matches!(predict, Predict::Flow | Predict::Edm) {
        format!("predicts {}", serde_json::to_value(predict)?)
    } else {
        return Ok(());
    };
    mistake(format!("{run} {lacking}, for which {layout} has no place: it is not exported"))
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

/// # Errors
/// [`crate::experiment::UserError`]: a codec that LVDM does not have.
fn check_codec(run: &Path, codec: &CodecConfig) -> Result<()> {
    if codec.codebook().is_some() {
        return mistake(format!("{}: a checkpoint of LVDM has no place for an {}", run.display(), codec.name()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::{UserError, parse};

    /// What the released code does not have is named, whatever else the run is.
    #[test]
    fn a_run_that_has_no_place_in_a_released_checkpoint_is_refused() {
        let text = "{data: {dataset: {kind: folder, root: none}, frames: 4, resolution: 8}, autoencoder: runs/a, \
                    optimizer: {kind: adamw, learning_rate: 1.0e-4}, trainer: {steps: 1, batch: 1}";
        let of = |more: &str| {
            let experiment = parse("here", &format!("{text}{more}}}"), &[]).unwrap();
            check_place(Path::new("runs/x"), &experiment, "a checkpoint of LVDM")
        };
        of("").unwrap();
        of(", objective: {predict: velocity}").unwrap();
        for (more, words) in [
            (", network: {kind: latte}", "the network of runs/x is a Latte"),
            (", labels: {drop: 0.1}", "runs/x knows class labels, for which a checkpoint of LVDM has no place"),
            (", schedule: {kind: rectified_flow}", "without steps (schedule: \"rectified_flow\")"),
            (", objective: {predict: flow}", "predicts \"flow\""),
            (", objective: {loss: learned_variance}", "learned the variance"),
        ] {
            let error = of(more).unwrap_err();
            assert!(error.is::<UserError>() && error.to_string().contains(words), "{more}: {error}");
        }
    }
}
