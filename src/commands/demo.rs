//! `lvdm demo`: the main job on procedural videos, from files to figures.

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    evaluate::print_evaluation,
    train::{run_folder, tell},
};
use crate::{
    atomic_file::write_atomically,
    checkpoint::Progress,
    data::demo::{self, DemoConfig},
    distributed::{OnSignal, Ranks, Stopped, catch_signals, rank, stop_is_asked},
    evaluation::{Evaluation, evaluate},
    experiment::{
        self, AutoencoderExperiment, DiffusionExperiment, EvaluationExperiment, Experiment, Numerics, TrainerConfig,
    },
    metrics::Metric,
    report::write_page,
    run::open_latent_space,
    run_files::{SUMMARY_FILE, TENSORBOARD_FOLDER},
    torch::DeviceName,
    train::{pack_latents, progress, train_autoencoder, train_diffusion},
};

/// Generate small videos, train an autoencoder and a denoiser on them, sample, and measure FVD and KVD
///
/// Everything is written to runs/demo, and runs/demo/report.html shows it. Ctrl-C (SIGINT), SIGTERM, SIGHUP and SIGUSR1
/// save what is trained and end the program with status 75; the same command then continues.
#[derive(Debug, clap::Args)]
pub struct Demo {
    /// Folder with data.yaml, autoencoder.yaml, diffusion.yaml and evaluate.yaml
    #[arg(default_value = "experiments/demo")]
    experiments: PathBuf,
    /// Where to compute: auto (the first GPU, or the CPU where there is none), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
}

/// The videos of the demo.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DemoData {
    /// What is drawn.
    pub videos: DemoConfig,
    /// Clips that are encoded once for the denoiser: several of each video.
    pub latent_clips: u64,
}

/// What the demo writes at its end.
#[derive(Debug, Serialize)]
struct Summary {
    /// Of reconstructed held-out clips.
    psnr_db: f64,
    /// By metric, then by set of clips.
    #[serde(flatten)]
    figures: BTreeMap<Metric, BTreeMap<String, f64>>,
    /// Of each set.
    clips: i64,
    protocol: Protocol,
    device: String,
    /// By stage.
    seconds: BTreeMap<&'static str, f64>,
}

#[derive(Debug, Serialize)]
struct Protocol {
    hash: String,
    text: String,
}

impl Demo {
    /// # Errors
    /// Those of its stages; ranks, of which each would do the whole.
    pub fn run(self) -> Result<()> {
        if rank().is_some() {
            let text = "the demo is one process: start it without torchrun, srun or mpirun";
            return Err(experiment::UserError(text.into()).into());
        }
        let _catching = catch_signals(OnSignal::Leave)?;
        let file = |name: &str| self.experiments.join(name);
        let device = [format!("trainer.device={}", self.device)];
        // all four are read before anything is made, so that a slip in the last one is not found at the end
        let data: DemoData = experiment::read(&file("data.yaml"), &[])?;
        experiment::read::<AutoencoderExperiment>(&file("autoencoder.yaml"), &device)?;
        let ahead: DiffusionExperiment = experiment::read(&file("diffusion.yaml"), &device)?;
        experiment::read::<EvaluationExperiment>(&file("evaluate.yaml"), &[])?;

        let alone = Ranks::alone();
        let mut seconds = BTreeMap::new();
        let stage = Instant::now();
        stage_line("videos", &data.videos.root);
        demo::write(&data.videos)?;
        seconds.insert("videos", stage.elapsed().as_secs_f64());

        let autoencoder_run = run_folder(&file("autoencoder.yaml"));
        stage_line("autoencoder", &autoencoder_run);
        let settings = AutoencoderExperiment::load(&file("autoencoder.yaml"), &device)?;
        let done = train_autoencoder(&settings, &autoencoder_run, false, &alone, self.device.open()?)?;
        seconds.insert("autoencoder", trained(done, &settings.trainer, &autoencoder_run)?);

        let stage = Instant::now();
        if let Some(latents) = ahead.latents.as_ref().filter(|file| !file.exists()) {
            stage_line("latents", latents);
            let space = open_latent_space(&autoencoder_run, self.device.open()?)?;
            let mut bar = progress::Progress::new("encode", data.latent_clips, 0);
            let (on_clip, numerics) = (&mut |done| bar.step(done, ""), Numerics::default());
            pack_latents(&space, None, &ahead.data, data.latent_clips, ahead.seed, numerics, latents, &alone, on_clip)?;
            bar.finish();
        }
        seconds.insert("latents", stage.elapsed().as_secs_f64());

        let diffusion_run = run_folder(&file("diffusion.yaml"));
        stage_line("diffusion", &diffusion_run);
        let settings = DiffusionExperiment::load(&file("diffusion.yaml"), &device)?;
        let done = train_diffusion(&settings, &diffusion_run, false, &alone, self.device.open()?)?;
        seconds.insert("diffusion", trained(done, &settings.trainer, &diffusion_run)?);

        let settings = EvaluationExperiment::load(&file("evaluate.yaml"), &[])?;
        stage_line("evaluation", &settings.out);
        let evaluation = evaluate(&settings, self.device.open()?, &alone)?;
        seconds.insert("sample", evaluation.sample_seconds);
        seconds.insert("evaluate", evaluation.evaluate_seconds);

        say!();
        print_evaluation(&evaluation);
        let times: Vec<String> = seconds.iter().map(|(stage, s)| format!("{stage} {s:.0} s")).collect();
        say!("time: {}", times.join(", "));
        say!();
        let summary_file = autoencoder_run.with_file_name(SUMMARY_FILE);
        let report_file = autoencoder_run.with_file_name("report.html");
        for (what, place) in [
            ("samples as mp4", settings.out.join("samples")),
            ("samples, frame by frame", settings.out.join("samples.png")),
            ("samples, moving", settings.out.join("samples.gif")),
            ("held-out clips above their reconstructions", settings.out.join("reconstructions.png")),
            ("TensorBoard, autoencoder", autoencoder_run.join(TENSORBOARD_FOLDER)),
            ("TensorBoard, diffusion", diffusion_run.join(TENSORBOARD_FOLDER)),
            ("these figures", summary_file.clone()),
            ("a page of it all, for a browser", report_file.clone()),
        ] {
            say!("{what:45} {}", place.display());
        }
        let text = serde_json::to_string_pretty(&summary(&evaluation, seconds)?)?;
        write_atomically(&summary_file, |file| Ok(file.write_all(text.as_bytes())?))?;
        let folder = report_file.parent().context("a run has a folder")?;
        write_page(&[folder.to_path_buf()], &report_file).map(|_| ())
    }
}

/// The seconds of a training, which must have come to its end for what builds on it; where it was asked to stop, its
/// steps are saved, and [`Stopped`] says so.
fn trained(Progress { step, seconds, .. }: Progress, trainer: &TrainerConfig, run: &Path) -> Result<f64> {
    if stop_is_asked() || !trainer.has_ended(step, seconds) {
        tell(trainer, step, seconds, run);
        return Err(Stopped.into());
    }
    Ok(seconds)
}

fn stage_line(stage: &str, place: &Path) {
    progress::tell(format!("== {stage}: {}\n", place.display()).as_bytes());
}

fn summary(evaluation: &Evaluation, seconds: BTreeMap<&'static str, f64>) -> Result<Summary> {
    let mut figures: BTreeMap<Metric, BTreeMap<String, f64>> = BTreeMap::new();
    for (set, figure) in &evaluation.figures {
        for (metric, estimate) in &figure.estimates {
            figures.entry(*metric).or_default().insert(set.clone(), estimate.value);
        }
    }
    Ok(Summary {
        psnr_db: evaluation.psnr_db.context("evaluate.yaml must evaluate a run")?,
        figures,
        clips: evaluation.protocol.settings.clips,
        protocol: Protocol { hash: evaluation.protocol_hash.clone(), text: evaluation.protocol_text.clone() },
        device: evaluation.device.clone(),
        seconds,
    })
}
