//! Low-rank changes ↔ runs: a LoRA of Stable Diffusion is merged into a run's weights; the adapters that a run has trained
//! become a folder of PEFT.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::{NewRun, Part, mistake, must_be_new, warn_of_infinities, with_prefix, write_run};
use crate::{
    atomic_file::{write_atomically, write_folder_atomically},
    checkpoint::{self, Checkpoint, Progress},
    experiment::{DiffusionExperiment, DiffusionSpace, Trained},
    file_format::read_json,
    nn::Adapter,
    run::{TEXT_ENCODER_TASK, run_of, weights},
    run_files::{AUTOENCODER_FILE, TEXT_ENCODER_FILE},
    safetensors::write_foreign_safetensors,
    weights::{WeightsFile, WeightsKind, lora::Lora, stable_diffusion::Network},
};

/// The names under which PEFT and diffusers write, in the order in which they are looked for in a folder.
const FILES: [&str; 4] =
    ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin"];
/// What PEFT writes beside them.
const CONFIGURATION: &str = "adapter_config.json";

/// Merges a LoRA, times `scale`, into the weights with which a run samples, and makes a new run of them; returns how many
/// maps of the denoiser and of the text encoder were changed.
///
/// # Errors
/// [`crate::experiment::UserError`] for what the user said; a file that is no LoRA, or one of other networks; a full disk.
pub fn import_lora(path: &Path, into: &Path, scale: f64, out: &Path) -> Result<[usize; 2]> {
    for given in [path, into] {
        if !given.exists() {
            return mistake(format!("there is no {}", given.display()));
        }
    }
    if !scale.is_finite() {
        return mistake(format!("--scale {scale}: a number is needed"));
    }
    let file = file_of(path)?;
    let lora = read(&file).with_context(|| file.display().to_string())?;
    let (from, found) = checkpoint::open_averaged(into)?;
    let mut found = found.expect("diffusion", &from)?;
    let mut experiment: DiffusionExperiment = serde_json::from_value(found.experiment.clone())
        .with_context(|| format!("the experiment stored in {}", from.display()))?;
    let folder = if into.is_dir() { into.to_path_buf() } else { run_of(&from) };
    ensure!(
        experiment.network.takes().text.is_some() && experiment.autoencoder != DiffusionSpace::Pixels,
        "{} is no network of Stable Diffusion's kind: a LoRA has no place in it",
        into.display()
    );
    let new = NewRun::begin(out)?;
    let mut unet = weights(&mut found)?;
    let text_path = folder.join(TEXT_ENCODER_FILE);
    let mut text = Checkpoint::read(&text_path)?.expect(TEXT_ENCODER_TASK, &text_path)?;
    let mut text_weights = text.take_part("model");
    let blocks = experiment.unet()?.blocks_per_level as usize;
    let counts = lora.merge(blocks, &mut unet, &mut text_weights, scale).with_context(|| file.display().to_string())?;
    warn_of_infinities("U-Net", &unet);
    warn_of_infinities("text encoder", &text_weights);

    text.tensors.extend(with_prefix("model", text_weights));
    text.write(&out.join(TEXT_ENCODER_FILE))?;
    write_atomically(&out.join(AUTOENCODER_FILE), |copy| {
        std::io::copy(&mut fs::File::open(folder.join(AUTOENCODER_FILE))?, copy)?;
        Ok(())
    })?;
    experiment.autoencoder = DiffusionSpace::Latents(out.join(AUTOENCODER_FILE));
    if let Some(text) = &mut experiment.text {
        text.encoder = out.to_path_buf();
    }
    experiment.trained = Trained::All;
    experiment.start_from = None;
    let note = format!("The weights of {}, with {} merged at a scale of {scale}.", into.display(), file.display());
    let progress = Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
    write_run(out, &note, "diffusion", &experiment, progress, with_prefix("model", unet).collect())?;
    new.finish();
    Ok(counts)
}

/// The file itself, or the one of a folder.
fn file_of(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    match FILES.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        Some(file) => Ok(file),
        None => mistake(format!("{} holds no LoRA; sought were {}", path.display(), FILES.join(", "))),
    }
}

/// The changes of a file, with what PEFT's configuration beside it or diffusers' note in it says.
fn read(path: &Path) -> Result<Lora> {
    let file = WeightsFile::open(path)?;
    match WeightsKind::of_shapes(file.shapes()) {
        WeightsKind::Lora(_) | WeightsKind::Unknown => {}
        kind => bail!("it holds {kind}, not a LoRA"),
    }
    let mut notes = json!({});
    let beside = path.with_file_name(CONFIGURATION);
    if beside.is_file() {
        notes = read_json(&beside)?;
    } else if let Some(note) = file.notes()?.get("lora_adapter_metadata") {
        notes = serde_json::from_str(note).context("its note `lora_adapter_metadata` is not JSON")?;
    }
    Lora::sort(file.read()?, &notes)
}

/// Writes the adapters that a run has trained (`trained: {kind: adapters}`), as last or, where there is one, averaged, as a
/// folder of PEFT: places are spelled as in diffusers, and those over frames, which an image network does not have, likewise.
///
/// # Errors
/// [`crate::experiment::UserError`] for a folder that is there already, or a run that has trained no adapters; a full disk.
pub fn export_lora(run: &Path, out: &Path) -> Result<Vec<Part>> {
    must_be_new(out, "an export makes a new folder")?;
    let (path, found) = checkpoint::open_averaged(run)?;
    let mut found = found.expect("diffusion", &path)?;
    let experiment: DiffusionExperiment = serde_json::from_value(found.experiment.clone())
        .with_context(|| format!("the experiment stored in {}", path.display()))?;
    let Trained::Adapters(adapter) = experiment.trained else {
        return mistake(format!(
            "{} has trained no adapters (`trained: {{kind: adapters, …}}`): there is nothing low-rank in it",
            run.display()
        ));
    };
    let network = Network::UNet { blocks_per_level: experiment.unet()?.blocks_per_level as usize };
    let mut all = found.take_part("model");
    all.extend(found.take_part("ema"));
    let (mut tensors, mut modules) = (Vec::new(), BTreeSet::new());
    for (name, tensor) in all {
        let Some((place, half)) = Adapter::half(&name) else { continue };
        let module =
            network.module_in_diffusers(place).with_context(|| format!("`{name}` has no place in diffusers"))?;
        // PEFT knows places by their last word, `to_q`, or last two, `to_out.0`
        let last = module.trim_end_matches(".0").rfind('.').map_or(0, |dot| dot + 1);
        modules.insert(module[last..].to_string());
        tensors.push((format!("base_model.model.{module}.{half}.weight"), tensor));
    }
    let configuration = json!({
        "peft_type": "LORA",
        "task_type": null,
        "base_model_name_or_path": null,
        "inference_mode": true,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "target_modules": modules,
    });
    write_folder_atomically(out, |out| {
        write_atomically(&out.join(CONFIGURATION), |file| Ok(serde_json::to_writer_pretty(file, &configuration)?))?;
        write_foreign_safetensors(&out.join(FILES[0]), &tensors)
    })?;
    let parameters = tensors.iter().map(|(_, tensor)| tensor.numel() as i64).sum();
    Ok(vec![Part { name: "adapters", tensors: tensors.len(), parameters }])
}
