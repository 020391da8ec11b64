//! What diffusion runs cost, beside how good their samples are.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};
use tch::Device;

use super::{
    FigureTable,
    number::fixed,
    repeats::{Measured, Repeats, Seeded, repeats},
    with_commas,
};
use crate::{
    checkpoint,
    diffusion::SamplerConfig,
    distributed::Ranks,
    evaluation::Evaluation,
    experiment::{DiffusionExperiment, Generated, Precision, SUPERRESOLUTION},
    models::{self, Given, SampleId, ports, seen},
    nn::Parameters,
    run::{open_text_encoder, space_of},
    run_files::{BASE_FOLDER, FIGURES_FILE, METRICS_FILE, TEXT_ENCODER_FILE},
    text_file::read_text,
    torch::{Autocast, peak_memory, processor_or_gpu},
    train::{DiffusionTask, SECONDS_PER_STEP, Task},
};

/// What a run cost, and what evaluations found.
#[derive(Debug, Serialize)]
pub struct Cost {
    run: PathBuf,
    /// Of the denoiser, and of the autoencoder whose latents it works on.
    parameters: i64,
    autoencoder_parameters: i64,
    /// Steps done and the time they took, over all starts.
    steps: i64,
    training_seconds: f64,
    /// The median of the run's log; none where it says nothing.
    seconds_per_step: Option<f64>,
    sampler: SamplerConfig,
    /// Sampled and decoded; none where nothing was measured.
    seconds_per_video: Option<f64>,
    /// Bytes of tensors at most in one forward and backward pass of the training, at the run's own batch, with
    /// gradients; on a GPU also all that was there before, as the weights. The optimizer's state and the average come
    /// on top: they are as large for equally many parameters.
    step_memory: Option<i64>,
    /// The same while one video is sampled and decoded.
    video_memory: Option<i64>,
    /// Of a cascade, parameters and time are those of all stages, and steps, their seconds and their memory of the last.
    second_stage: bool,
    #[serde(skip)]
    training: Seeded,
    /// Each with its folder.
    #[serde(skip)]
    evaluations: Vec<(PathBuf, Evaluation)>,
}

impl Cost {
    /// Opens a run, reads its log and the evaluations beside it, and, unless `videos` is 0, times sampling that many videos and
    /// measures the memory of sampling and of a training step.
    ///
    /// # Errors
    /// A folder that is not a diffusion run; a log or a checkpoint that cannot be read.
    pub fn of(run: &Path, videos: u64, device: Device) -> Result<Self> {
        let (path, found) = checkpoint::open_head(run)?;
        let task = if found.task == SUPERRESOLUTION { SUPERRESOLUTION } else { "diffusion" };
        let found = found.expect(task, &path)?;
        let experiment: DiffusionExperiment = serde_json::from_value(found.experiment.clone())
            .with_context(|| format!("the experiment stored in {}", path.display()))?;
        let (space, data) = (space_of(&experiment, run, device)?, &experiment.data);
        let latent = seen(space.latent_shape(data.frames, data.resolution, data.resolution)?, &experiment)?;
        let network = Parameters::unfilled(Device::Cpu);
        experiment.network.build(&network.root(), &ports(&experiment, latent))?;
        let mut cost = Cost {
            run: run.to_path_buf(),
            parameters: network.count(),
            autoencoder_parameters: space.parameters,
            steps: found.progress.step,
            training_seconds: found.progress.seconds,
            seconds_per_step: seconds_per_step(run)?,
            sampler: experiment.sampler,
            seconds_per_video: None,
            step_memory: None,
            video_memory: None,
            second_stage: experiment.superresolution.is_some(),
            training: Seeded::of(run, found.experiment)?,
            evaluations: evaluations(run)?,
        };
        if cost.second_stage {
            let base = Cost::of(&run.join(BASE_FOLDER), 0, device).context("the first stage of a cascade")?;
            cost.parameters += base.parameters;
            cost.autoencoder_parameters += base.autoencoder_parameters;
            cost.training_seconds += base.training_seconds;
        }
        drop(space);
        if videos > 0 {
            let model = models::open(run, device)?;
            let sample = |count: u64| {
                let samples: Vec<SampleId> = (0..count).map(|sample| SampleId { seed: 0, sample }).collect();
                model.videos(&samples, &Given::default(), &mut |_, _| {})
            };
            // videos end on the host, so the clock need not wait for the device
            let (first, bytes) = peak_memory(device, || sample(1).map(drop));
            first?;
            let start = Instant::now();
            let _ = sample(videos)?;
            cost.seconds_per_video = Some(start.elapsed().as_secs_f64() / videos as f64);
            cost.video_memory = Some(bytes);
            drop(model);
            match step_memory(run, &experiment, device) {
                Ok(bytes) => cost.step_memory = Some(bytes),
                Err(error) => tracing::warn!("{}: no training step can be measured: {error:#}", run.display()),
            }
        }
        Ok(cost)
    }

    /// All of it as JSON, with the device and the figures.
    ///
    /// # Errors
    /// Numbers that JSON cannot hold.
    pub fn json(&self, device: Device) -> Result<Value> {
        let mut object = serde_json::to_value(self)?;
        object["device"] = processor_or_gpu(device).into();
        let figure = |(folder, evaluation): &(PathBuf, Evaluation)| {
            json!({
                "evaluation": folder,
                "generated": evaluation.generated,
                "figure": evaluation.figures.get(SAMPLES),
                "protocol": evaluation.protocol.settings.name,
                "protocol_hash": evaluation.protocol_hash,
                "protocol_text": evaluation.protocol_text,
            })
        };
        object["figures"] = self.evaluations.iter().map(figure).collect();
        Ok(object)
    }

    fn row(&self) -> [String; COLUMNS.len()] {
        let or_not = |text: Option<String>| text.unwrap_or_else(|| "not measured".into());
        let megabytes = |bytes: Option<i64>| or_not(bytes.map(|bytes| format!("{:.0} MB", bytes as f64 / 1e6)));
        [
            self.run.display().to_string(),
            with_commas(self.parameters),
            with_commas(self.autoencoder_parameters),
            self.steps.to_string(),
            format!("{:.1} min", self.training_seconds / 60.0),
            or_not(self.seconds_per_step.map(|seconds| format!("{seconds:.3}"))),
            or_not(self.seconds_per_video.map(|seconds| format!("{seconds:.3}"))),
            megabytes(self.step_memory),
            megabytes(self.video_memory),
        ]
    }
}

const COLUMNS: [&str; 9] =
    ["", "network", "autoencoder", "steps", "trained", "s a step", "s a video", "memory, step", "memory, video"];

/// The set in an evaluation's figures that was sampled.
pub(super) const SAMPLES: &str = "samples";

/// Costs in rows, under them a table of the figures, and the protocols that these were measured under.
///
/// # Errors
/// Numbers that JSON cannot hold.
pub fn efficiency_table(costs: &[Cost], device: Device) -> Result<String> {
    let rows: Vec<_> = std::iter::once(COLUMNS.map(String::from)).chain(costs.iter().map(Cost::row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().enumerate().map(|(column, cell)| match column {
            0 => format!("{cell:0$}", width(0)),
            _ => format!("{cell:>0$}", width(column)),
        });
        text += &(cells.collect::<Vec<_>>().join("  ") + "\n");
    }
    let device = processor_or_gpu(device);
    text += &format!("s a step: the run's own log; s a video and memory: here, on {device}\n");
    for cost in costs.iter().filter(|cost| cost.seconds_per_video.is_some()) {
        text += &format!("{} was timed with {}\n", cost.run.display(), cost.sampler.describe());
    }
    for cost in costs.iter().filter(|cost| cost.second_stage) {
        text += &format!(
            "{} is a cascade: parameters and training time are of all stages; steps, their seconds and memory of the last\n",
            cost.run.display()
        );
    }
    text.push('\n');
    let mut figures = FigureTable::new();
    let mut protocols: Vec<String> = Vec::new();
    let mut measured = Vec::new();
    for cost in costs {
        for (folder, evaluation) in &cost.evaluations {
            if let Some(figure) = evaluation.figures.get(SAMPLES) {
                let (folder, sampled) = (folder.display().to_string(), &evaluation.generated_text);
                figures.row(&folder, figure, &evaluation.protocol, sampled);
                let Evaluation { protocol_hash, protocol_text, .. } = evaluation;
                protocols.push(format!("protocol {protocol_hash}: {protocol_text}\n"));
                let generated = serde_json::to_value(&evaluation.generated)?;
                measured.push(Measured {
                    name: folder,
                    training: &cost.training,
                    generated,
                    figure,
                    protocol_hash: protocol_hash.clone(),
                });
            }
        }
    }
    if !protocols.is_empty() {
        text += &figures.to_string();
    }
    protocols.sort();
    protocols.dedup();
    text.extend(protocols);
    text += &repeats_text(&repeats(&measured));
    for cost in costs.iter().filter(|cost| cost.evaluations.is_empty()) {
        let run = cost.run.display();
        text += &format!(
            "{run}: FVD and KVD not measured (no {FIGURES_FILE} in a folder inside or beside it is of this run)\n"
        );
    }
    Ok(text)
}

/// What trainings that differ in their seed alone have in common, a line each; nothing where there are none.
fn repeats_text(repeats: &[Repeats]) -> String {
    let mut text = String::new();
    for Repeats { names, values, .. } in repeats {
        let values: Vec<String> = values
            .iter()
            .map(|(metric, (mean, std))| {
                let [mean, std] = [*mean, *std].map(|value| fixed(value, metric.digits()));
                format!("{} {mean} ± {std}", metric.title())
            })
            .collect();
        text += &format!("{} over {} trainings: {}\n", values.join(", "), names.len(), names.join(", "));
    }
    if !repeats.is_empty() {
        text.insert_str(0, "\nMean ± standard deviation over trainings that differ in their seed alone:\n");
    }
    text
}

/// The median over the lines of a run's log.
fn seconds_per_step(run: &Path) -> Result<Option<f64>> {
    let Ok(text) = read_text(&run.join(METRICS_FILE)) else { return Ok(None) };
    let mut seconds = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| format!("{METRICS_FILE} in {}", run.display()))?;
        seconds.extend(line[SECONDS_PER_STEP].as_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds.get(seconds.len() / 2).copied())
}

/// What one pass of the run's training takes.
fn step_memory(run: &Path, experiment: &DiffusionExperiment, device: Device) -> Result<i64> {
    let text = experiment.text.as_ref().map(|_| open_text_encoder(&run.join(TEXT_ENCODER_FILE), device)).transpose()?;
    let space = space_of(experiment, run, device)?;
    let mut task = DiffusionTask::new(experiment, space, text, device, 0, false, &Ranks::alone())?;
    let batch = task.next_batch()?;
    let (done, bytes) = peak_memory(device, || {
        let _autocast = Autocast::bfloat16(device, experiment.trainer.precision == Precision::Bf16);
        let drawn = task.draw(0, &batch)?;
        task.gradients(0, (&batch, &drawn), 0, 1.0)
    });
    done.map(|_| bytes)
}

/// Whether a run that an evaluation names is the one in this folder, whose path is canonical.
pub(super) fn is_run(folder: &Path, named: &Path) -> bool {
    folder.ends_with(named) || named.canonicalize().is_ok_and(|named| named == folder)
}

/// Evaluations in folders inside the run or beside it that say they sampled it.
fn evaluations(run: &Path) -> Result<Vec<(PathBuf, Evaluation)>> {
    let own = run.canonicalize().with_context(|| run.display().to_string())?;
    let mut folders = Vec::new();
    // named as the run was
    for folder in [Some(run), run.parent()].into_iter().flatten() {
        let folder = if folder == Path::new("") { Path::new(".") } else { folder };
        let Ok(entries) = fs::read_dir(folder) else { continue };
        folders.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.join(FIGURES_FILE).is_file()));
    }
    folders.sort();
    let read = |folder: PathBuf| {
        let text = read_text(&folder.join(FIGURES_FILE)).ok()?;
        Some((folder, serde_json::from_str::<Evaluation>(&text).ok()?))
    };
    let is_own = |(_, evaluation): &(PathBuf, Evaluation)| match &evaluation.generated {
        Generated::Run { run, .. } => is_run(&own, run),
        Generated::Clips { .. } => false,
    };
    Ok(folders.into_iter().filter_map(read).filter(is_own).collect())
}
