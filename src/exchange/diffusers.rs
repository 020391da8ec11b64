//! A text-to-video run → a folder of diffusers: the image networks that the run was made from, as they are now. Layers over
//! frames are left out.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tch::Device;

use super::{
    Carried, Part,
    export::{check_place, latent_constants},
    must_be_new,
};
use crate::{
    atomic_file::{write_atomically, write_folder_atomically},
    checkpoint,
    codecs::{CodecConfig, CodecSettings, ImageAutoencoder},
    diffusion::{Predict, ScheduleConfig, ScheduleKind},
    exchange::diffusers_config as settings,
    experiment::{DiffusionExperiment, DiffusionSpace},
    models::{ports, seen},
    networks::{Ports, UNet3d},
    nn::Parameters,
    run::{TEXT_ENCODER_TASK, run_of, weights},
    run_files::{AUTOENCODER_FILE, TEXT_ENCODER_FILE},
    safetensors::write_foreign_safetensors,
    text::{ClipText, TextEncoderConfig, TokenizerFiles},
    weights::stable_diffusion::Network,
};

/// Writes the networks of single frames into a folder that diffusers opens as a `StableDiffusionPipeline`. What a network
/// has for frames (attention over frames, the channel of given frames, their noise levels) is left out: each picture is
/// what the run makes of a clip of one frame to which its layers over frames add nothing.
///
/// # Errors
/// [`crate::experiment::UserError`] for a folder that is there already; a run that is not made of a Stable Diffusion's parts;
/// a full disk, and then nothing is left.
pub fn export_stable_diffusion(run: &Path, out: &Path) -> Result<Vec<Part>> {
    must_be_new(out, "an export makes a new folder")?;
    write_folder_atomically(out, |out| write_folder(run, out))
}

fn write_folder(run: &Path, out: &Path) -> Result<Vec<Part>> {
    let (path, found) = checkpoint::open_averaged(run)?;
    let mut found = found.expect("diffusion", &path)?;
    let experiment: DiffusionExperiment = serde_json::from_value(found.experiment.clone())
        .with_context(|| format!("the experiment stored in {}", path.display()))?;
    let folder = if run.is_dir() { run.to_path_buf() } else { run_of(&path) };
    ensure!(
        experiment.network.takes().text.is_some() && experiment.autoencoder != DiffusionSpace::Pixels,
        "{} is no network of Stable Diffusion's kind: it attends to no text",
        run.display()
    );
    check_place(run, &experiment, "a StableDiffusionPipeline")?;
    let settings_of_unet = experiment.unet()?;
    let (first_path, first_stage) = checkpoint::open_averaged(&folder.join(AUTOENCODER_FILE))?;
    let mut first_stage = first_stage.expect("autoencoder", &first_path)?;
    let known: Carried = serde_json::from_value(first_stage.experiment.clone()).context("the carried autoencoder")?;
    let CodecConfig::ImageAutoencoder(image) = &known.autoencoder else {
        bail!("{} works on latents of a video autoencoder, which diffusers has no counterpart for", run.display())
    };
    let (scale, shift) = latent_constants(&first_stage)?;
    ensure!(shift == 0.0, "latents are shifted by {shift}, which a StableDiffusionPipeline does not undo");
    let (text_path, text) = checkpoint::open_averaged(&folder.join(TEXT_ENCODER_FILE))?;
    let mut text = text.expect(TEXT_ENCODER_TASK, &text_path)?;
    let known: TextEncoderConfig =
        serde_json::from_value(text.experiment.clone()).context("the carried text encoder")?;
    let tokenizer = known.tokenizer.as_ref().context("the run's text encoder came without a tokenizer")?;

    let data = &experiment.data;
    let latent = seen(image.latent_shape(data.frames, data.resolution, data.resolution)?, &experiment)?;
    let mut parts = Vec::new();
    let mut write = |(network, name): (Network, &'static str), file: &str, parameters: &Parameters, config: &Value| {
        let tensors = network.in_diffusers(parameters);
        let prefix = if network == Network::TextEncoder { "text_model." } else { "" };
        let tensors: Vec<_> = tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect();
        parts.push(Part {
            name,
            tensors: tensors.len(),
            parameters: tensors.iter().map(|(_, tensor)| tensor.numel() as i64).sum(),
        });
        let file = out.join(file).with_extension("safetensors");
        write_foreign_safetensors(&file, &tensors)?;
        write_json(&file.with_file_name("config.json"), config)
    };

    // of a network that can be given frames, what it sees when it is given none
    let image_ports = Ports { mask: false, levels: None, ..ports(&experiment, latent) };
    let mut unet = weights(&mut found)?;
    unet.remove("label_emb.weight");
    if let Some(kernel) = unet.get_mut("input_blocks.0.0.weight") {
        *kernel = kernel.narrow(1, 0, latent[0].min(kernel.size()[1]));
    }
    let parameters = Parameters::unfilled(Device::Cpu);
    UNet3d::new(&parameters.root(), settings_of_unet, &image_ports);
    parameters.fill(unet).with_context(|| path.display().to_string())?;
    let network = Network::UNet { blocks_per_level: settings_of_unet.blocks_per_level as usize };
    let config = settings::unet_in_diffusers(settings_of_unet, &image_ports, latent[2]);
    write((network, "U-Net"), "unet/diffusion_pytorch_model", &parameters, &config)?;
    drop(parameters);

    let parameters = Parameters::unfilled(Device::Cpu);
    ImageAutoencoder::new(&parameters.root(), image);
    parameters.fill(weights(&mut first_stage)?).with_context(|| first_path.display().to_string())?;
    let network = Network::Autoencoder { levels: image.widths.len() };
    let config = settings::autoencoder_in_diffusers(image, scale, data.resolution);
    write((network, "image autoencoder"), "vae/diffusion_pytorch_model", &parameters, &config)?;

    let parameters = Parameters::unfilled(Device::Cpu);
    ClipText::new(&parameters.root(), &known.text_encoder);
    parameters.fill(text.take_part("model")).with_context(|| text_path.display().to_string())?;
    let config = settings::text_encoder_in_diffusers(&known.text_encoder);
    write((Network::TextEncoder, "text encoder"), "text_encoder/model", &parameters, &config)?;

    write_tokenizer(&out.join("tokenizer"), tokenizer, known.text_encoder.positions)?;
    let config = scheduler(experiment.betas()?, experiment.objective.predict)?;
    write_json(&out.join("scheduler/scheduler_config.json"), &config)?;
    write_json(&out.join("model_index.json"), &pipeline())?;
    Ok(parts)
}

/// The schedule of the training, for DDIM as this program samples.
fn scheduler(schedule: &ScheduleConfig, predict: Predict) -> Result<Value> {
    ensure!(
        !schedule.zero_terminal_snr,
        "a schedule with zero_terminal_snr begins at another step in diffusers than here"
    );
    Ok(json!({
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": match schedule.kind {
            ScheduleKind::ScaledLinear => "scaled_linear",
            ScheduleKind::Linear => "linear",
        },
        "prediction_type": match predict {
            Predict::Noise => "epsilon",
            Predict::Z0 => "sample",
            Predict::Velocity => "v_prediction",
            Predict::Flow | Predict::Edm => bail!("DDIMScheduler has no word for a network that predicts {predict:?}"),
        },
        "clip_sample": false,
        "set_alpha_to_one": false,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }))
}

/// `model_index.json`: which class reads which folder.
fn pipeline() -> Value {
    json!({
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [null, null],
        "image_encoder": [null, null],
        "safety_checker": [null, null],
        "requires_safety_checker": false,
    })
}

/// The tokenizer in both forms: the one file that fast tokenizers read, and the two that the others do.
fn write_tokenizer(folder: &Path, files: &TokenizerFiles, length: i64) -> Result<()> {
    const START: &str = "<|startoftext|>";
    const END: &str = "<|endoftext|>";
    let padding = files.padding.as_deref().unwrap_or(END);
    let model = &files.contents["model"];
    let pair = |merge: &Value| match merge {
        Value::Array(pair) => pair.iter().map(Value::as_str).collect::<Option<Vec<_>>>().map(|pair| pair.join(" ")),
        merge => merge.as_str().map(str::to_string),
    };
    let merges: Option<Vec<String>> =
        model["merges"].as_array().context("the tokenizer has no merges")?.iter().map(pair).collect();
    let merges = merges.context("the tokenizer's merges are not pairs of words")?.join("\n");
    write_json(&folder.join("tokenizer.json"), &files.contents)?;
    write_json(&folder.join("vocab.json"), &model["vocab"])?;
    write_atomically(&folder.join("merges.txt"), |out| {
        use std::io::Write;
        Ok(writeln!(out, "#version: 0.2\n{merges}")?)
    })?;
    let special = json!({"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding});
    write_json(&folder.join("special_tokens_map.json"), &special)?;
    let mut config = special;
    config["tokenizer_class"] = json!("CLIPTokenizer");
    config["model_max_length"] = json!(length);
    config["add_prefix_space"] = json!(false);
    config["do_lower_case"] = json!(true);
    write_json(&folder.join("tokenizer_config.json"), &config)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_atomically(path, |out| Ok(serde_json::to_writer_pretty(out, value)?))
}
