//! A released MCVD → a run in pixels: the network with its moving average, and its schedule.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail, ensure};
use clap::value_parser;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{
    Imported, MOST_FRAMES, MOST_PIXELS, MOST_PLACES, NewRun, Part, Shapes, imported_from, mistake, warn_of_infinities,
    with_prefix, write_run,
};
use crate::{
    checkpoint::Progress,
    diffusion::{BlockConditioning, ReversedLinear},
    experiment::DiffusionExperiment,
    networks::{McvdConfig, NetworkSettings, Ports},
    nn::Parameters,
    weights::{WeightsFile, lvdm_checkpoint::Tensors, pickle::Value},
};

/// What the user says of a released MCVD.
#[derive(Debug, Clone, clap::Args)]
pub struct McvdOptions {
    /// Frames after a clip that the network is given, of those around it; the file tells how many there are before and after
    /// together
    #[arg(long, default_value_t = 0, value_parser = value_parser!(i64).range(0..=MOST_FRAMES))]
    pub future: i64,
    /// Channels of an attention head, which cannot be inferred from the file [default: those of the released network of this
    /// width]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_PLACES))]
    pub head_width: Option<i64>,
    /// Height and width of a video in pixels
    #[arg(long, default_value_t = 64, value_parser = value_parser!(i64).range(1..=MOST_PIXELS))]
    pub resolution: i64,
}

/// The released file is a list: weights, the optimizer, the epoch, the step, the moving average.
const WEIGHTS: &str = "0";
const STEP: &str = "3";
const AVERAGE: &str = "4";

/// Width of the first level and of a head, as trained on UCF-101 and as in the configuration file.
const RELEASED_HEADS: [(i64, i64); 2] = [(288, 288), (192, 96)];

/// Channels of a picture.
const COLOURS: i64 = 3;

/// What stands beside the parameters and follows from the schedule.
const BUFFERS: [&str; 4] = ["sigmas", "betas", "alphas", "alphas_prev"];

/// The tensors of one entry of the file without their prefix, those of the schedule, and the step where it is told.
struct Released {
    tensors: Tensors,
    buffers: Tensors,
    step: Option<i64>,
    has_average: bool,
}

impl Released {
    fn read(file: &Path, entry: &str) -> Result<Self> {
        let file = WeightsFile::open_state(file, Some(entry))?;
        let beside = |place: &str| file.beside().iter().find(|(name, _)| name == place).map(|(_, value)| value);
        let step = beside(STEP).and_then(Value::as_int);
        let has_average = beside(AVERAGE).is_some_and(|average| average.entries().is_some());
        let named = file.read()?.into_iter().map(|(name, tensor)| {
            let name = name.strip_prefix("unet.").unwrap_or(&name).to_string();
            (name, if tensor.is_floating_point() { tensor.to_kind(Kind::Float) } else { tensor })
        });
        let (buffers, tensors): (Tensors, Tensors) = named.partition(|(name, _)| BUFFERS.contains(&name.as_str()));
        // the last norm has lost a part of its name in older averages
        let last = layers(&tensors)?.len() as i64 - 2;
        let prefix = format!("all_modules.{last}.");
        let tensors = tensors.into_iter().map(|(name, tensor)| match name.strip_prefix(&prefix) {
            Some(rest) if !rest.starts_with("Norm_0.") => (format!("{prefix}Norm_0.{rest}"), tensor),
            _ => (name, tensor),
        });
        let tensors = tensors.collect();
        Ok(Released { tensors, buffers, step, has_average })
    }
}

/// One layer of a file, by the names that it has.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Found {
    Res { outputs: i64, resamples: bool },
    Attention,
    Other,
}

/// All layers in the order of their numbers.
fn layers(tensors: &Tensors) -> Result<Vec<Found>> {
    let mut names: BTreeMap<i64, ()> = BTreeMap::new();
    for name in tensors.keys() {
        let number = name.strip_prefix("all_modules.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match number {
            Some(number) => names.insert(number, ()),
            None => bail!("`{name}` is no tensor of MCVD, whose names begin with all_modules."),
        };
    }
    ensure!(
        names.len() >= 8,
        "there are {} layers of the name all_modules.N, and the smallest MCVD has 8",
        names.len()
    );
    let size = |name: String| tensors.get(&name).map(Tensor::size);
    let layer = |(i, number): (usize, &i64)| -> Result<Found> {
        ensure!(i as i64 == *number, "the layer all_modules.{i} is missing");
        if size(format!("all_modules.{i}.NIN_0.W")).is_some() {
            return Ok(Found::Attention);
        }
        let Some(kernel) = size(format!("all_modules.{i}.Conv_0.weight")) else { return Ok(Found::Other) };
        ensure!(kernel.len() == 4, "`all_modules.{i}.Conv_0.weight` is no kernel of images: {kernel:?}");
        let skips = size(format!("all_modules.{i}.Conv_2.weight")).is_some();
        Ok(Found::Res { outputs: kernel[0], resamples: skips && kernel[0] == kernel[1] })
    };
    names.keys().enumerate().map(layer).collect()
}

/// Settings and ports of a network, read off its tensors.
fn inferred(tensors: &Tensors, options: &McvdOptions) -> Result<(McvdConfig, Ports)> {
    let shapes = Shapes::from(tensors);
    let channels = shapes.axis("all_modules.0.weight", 1)?;
    let found = layers(tensors)?;
    let last = found.len() - 1;
    let outputs = shapes.axis(&format!("all_modules.{last}.weight"), 0)?;
    let inputs = shapes.axis("all_modules.2.weight", 1)?;
    let shared = "all_modules.3.actnorm0.Norm_0.mlp_shared.0.weight";
    let (spatin, around) = match shapes.has(shared) {
        true => (Some(shapes.axis(shared, 0)?), shapes.axis(shared, 1)?),
        false => (None, inputs - outputs),
    };
    ensure!(
        channels >= 1 && outputs >= COLOURS && outputs % COLOURS == 0 && around > 0 && around % COLOURS == 0,
        "a clip of {outputs} channels and {around} around it: frames have {COLOURS} each, and some are around a clip"
    );
    let resampling = found.iter().filter(|layer| matches!(layer, Found::Res { resamples: true, .. })).count();
    let plain = found.iter().filter(|layer| matches!(layer, Found::Res { resamples: false, .. })).count();
    let levels = resampling / 2 + 1;
    let blocks_per_level = plain.saturating_sub(2 + levels) / (2 * levels);
    let (mut multipliers, mut attention_factors, mut at) = (Vec::new(), Vec::new(), 3);
    for level in 0..levels {
        let Some(Found::Res { outputs, .. }) = found.get(at).copied() else {
            bail!("all_modules.{at} is no residual block, where the level {level} of the network begins");
        };
        multipliers.push(outputs / channels);
        let attends = found.get(at + 1) == Some(&Found::Attention) && blocks_per_level > 0;
        attention_factors.extend(attends.then_some(1 << level));
        at += blocks_per_level * if attends { 2 } else { 1 } + 1;
    }
    let released = RELEASED_HEADS.iter().find(|(width, _)| *width == channels).map(|(_, heads)| *heads);
    let Some(head_width) = options.head_width.or(released) else {
        return mistake(format!(
            "give --head-width N: the file does not tell how wide its attention heads are, and its width {channels} is none \
             of the released networks'"
        ));
    };
    let around = around / COLOURS;
    if options.future >= around {
        return mistake(format!(
            "--future {}: the network is given {around} frames around a clip, of which at least one is before it",
            options.future
        ));
    }
    let config = McvdConfig {
        channels,
        multipliers,
        blocks_per_level: blocks_per_level as i64,
        attention_factors,
        head_width,
        spatin,
        ..McvdConfig::default()
    };
    let ports = Ports {
        past: around - options.future,
        future: options.future,
        ..Ports::of([COLOURS, outputs / COLOURS, options.resolution, options.resolution])
    };
    Ok((config, ports))
}

/// The schedule whose β, from the most noise on, the file has; the released one where it has none.
fn schedule(buffers: &Tensors) -> Result<ReversedLinear> {
    let Some(betas) = buffers.get("betas") else { return Ok(ReversedLinear::default()) };
    let betas: Vec<f64> = betas.to_kind(Kind::Double).try_into().context("betas")?;
    let (Some(first), Some(last)) = (betas.first(), betas.last()) else { bail!("betas are none") };
    // float32 has seven digits
    let rounded = |beta: f64| format!("{beta:.6e}").parse::<f64>();
    let path = ReversedLinear { steps: betas.len() as i64, beta_start: rounded(*last)?, beta_end: rounded(*first)? };
    let ours = path.schedule().context("betas")?;
    let off = ours.beta.iter().rev().zip(&betas).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f64::max);
    ensure!(off < 1e-7, "betas do not fall evenly: they differ from a line by up to {off:.1e}");
    Ok(path)
}

/// Turns a released MCVD into a run of the diffusion.
///
/// # Errors
/// [`crate::experiment::UserError`] for what the user said; a file that is damaged, or holds another network.
pub fn import_mcvd(file: &Path, options: &McvdOptions, run: &Path) -> Result<Imported> {
    if !file.is_file() {
        return mistake(format!("there is no checkpoint {}", file.display()));
    }
    let new = NewRun::begin(run)?;
    let name = || file.display().to_string();
    let last = Released::read(file, WEIGHTS).with_context(name)?;
    let average = if last.has_average { Some(Released::read(file, AVERAGE).with_context(name)?) } else { None };
    let (config, ports) = inferred(&last.tensors, options).with_context(name)?;
    config.validate().with_context(name)?;
    let schedule = schedule(&last.buffers).with_context(name)?;

    let parameters = Parameters::unfilled(Device::Cpu);
    config.build(&parameters.root(), &ports)?;
    let mut parts = vec![Part { name: "MCVD", tensors: parameters.named().len(), parameters: parameters.count() }];
    parameters.check(&last.tensors).with_context(name)?;
    warn_of_infinities("MCVD", &last.tensors);
    let mut tensors: Tensors = with_prefix("model", last.tensors).collect();
    let is_averaged = average.is_some();
    if let Some(average) = average {
        parameters.check(&average.tensors).context("the moving average").with_context(name)?;
        warn_of_infinities("MCVD, average", &average.tensors);
        tensors.extend(with_prefix("ema", average.tensors));
        parts.push(Part { name: "MCVD, average", ..parts[0].clone() });
    }
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let frames = ports.past + ports.frames + ports.future;
    let blocks = BlockConditioning {
        past: ports.past,
        future: ports.future,
        mask_past: 0.5,
        mask_future: if ports.future > 0 { 0.5 } else { 0.0 },
        video_frames: None,
    };
    let mut experiment: DiffusionExperiment = serde_json::from_value(json!({
        "data": {
            "dataset": {"kind": "folder", "root": format!("data/{stem}")},
            "frames": frames,
            "resolution": options.resolution,
            "flip": true,
        },
        "autoencoder": "pixels",
        "blocks": blocks,
        "objective": {"predict": "noise", "loss": "l2", "reduction": "sum"},
        "optimizer": {"kind": "adam", "learning_rate": 1e-4, "warmup": 5000, "warmup_from_zero": true},
        "trainer": {"steps": 1_000_000, "batch": 8, "clip_gradient": 1.0, "ema_decay": is_averaged.then_some(0.999), "ema_warmup": false},
        "sampler": {"kind": "strided", "method": "ddpm", "steps": schedule.steps.min(100), "clip": true, "denoise": true},
    }))?;
    experiment.network = config.into();
    experiment.schedule = schedule.into();
    let ema_updates = if is_averaged { last.step.unwrap_or(1).max(1) } else { 0 };
    let progress = Progress { step: 0, position: 0, ema_updates, skipped_steps: 0, seconds: 0.0 };
    write_run(run, &imported_from(file), "diffusion", &experiment, progress, tensors)?;
    new.finish();
    Ok(Imported { task: "diffusion", step: 0, parts, ignored: Vec::new() })
}
