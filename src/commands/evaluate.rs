//! `lvdm evaluate`: generated clips against real ones, beside baselines.

mod print;
mod reconstruction;

use std::path::PathBuf;

use anyhow::Result;

use super::sample::PrecisionOptions;
use crate::{
    distributed::{self, Launch, rank},
    evaluation::{VideoPaths, card, evaluate},
    experiment::{EvaluationExperiment, Experiment, Generated, Numerics, UserError, built_in_protocols},
    extractors::{ExtractorConfig, ExtractorKind},
    metrics::{ComparedFeatures, Metric},
    run_files::{CARD_FILE, FIGURES_FILE},
    torch::DeviceName,
};

use print::print_card;
pub(super) use print::print_evaluation;
use reconstruction::Reconstruct;

/// Measure how far generated videos are from real ones: FVD, KVD and other metrics
///
/// Either with an experiment file, or with --real and --generated. Figures are printed with their protocol and a 95 %
/// confidence interval, beside the same figures of baselines, and written to a folder. docs/evaluation.md explains them.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Evaluate {
    #[command(subcommand)]
    what: Option<What>,
    /// Experiment file (YAML), such as experiments/demo/evaluate.yaml
    #[arg(required_unless_present_any = ["real", "generated", "protocols"])]
    file: Option<PathBuf>,
    /// Settings in place of the file's, each as KEY=VALUE: evaluation.clips=256
    overrides: Vec<String>,
    /// Real videos: a folder of video files or of folders of pictures, an index (.jsonl), a numpy array (.npz or .npy,
    /// uint8 [N, F, H, W, 3]), or a file that `lvdm data pack` wrote
    #[arg(long, requires = "generated", conflicts_with = "file")]
    real: Option<PathBuf>,
    /// Split of the index of real videos, such as test [default: all]
    #[arg(long, requires = "real")]
    split: Option<String>,
    /// Generated videos, in any of the same forms, or a diffusion run, from which clips are sampled
    #[arg(long, requires = "real")]
    generated: Option<PathBuf>,
    /// Protocol: a name from --protocols, or a YAML file [default: none; clips are taken as the next options say]
    #[arg(long, requires = "generated", conflicts_with_all = ["frames", "resolution"])]
    protocol: Option<String>,
    /// List the protocols that have a name, and do nothing else
    #[arg(long, exclusive = true)]
    protocols: bool,
    /// Number of clips in each set [default: the protocol's, or as many as there are, at most 2048]
    #[arg(long, conflicts_with = "file")]
    clips: Option<i64>,
    /// Frames in a clip [default: 16, or the run's]
    #[arg(long, conflicts_with = "file")]
    frames: Option<i64>,
    /// Take every n-th frame of the real videos [default: the protocol's, or 1]
    #[arg(long, conflicts_with = "file")]
    frame_stride: Option<i64>,
    /// Height and width of the clips in pixels, before the extractor resizes them itself [default: 256, or the run's]
    #[arg(long, conflicts_with = "file")]
    resolution: Option<i64>,
    #[arg(long, conflicts_with = "file", help = extractor_help())]
    extractor: Option<ExtractorConfig>,
    #[arg(long, conflicts_with = "file", value_delimiter = ',', help = metrics_help())]
    metrics: Option<Vec<Metric>>,
    /// Measure under every protocol that has a name, beside all baselines, and measure how strongly each metric responds to
    /// real clips that are blurred, jittered, shuffled, reversed, frozen or sped up
    #[arg(long)]
    card: bool,
    /// Seed of the random choice of real clips
    #[arg(long, conflicts_with = "file", default_value_t = 0)]
    seed: u64,
    /// Folder for the figures [default: a folder in runs/evaluation, named by the videos and the settings]
    #[arg(long, conflicts_with = "file")]
    out: Option<PathBuf>,
    /// Where to compute: auto (the first GPU, or the CPU where there is none), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    precision: PrecisionOptions,
    #[command(flatten)]
    launch: Launch,
}

fn extractor_help() -> String {
    // those of a metric of their own are not to be chosen
    let is_free = |kind: &ExtractorKind| Metric::all().all(|metric| metric.compares() != ComparedFeatures::Of(*kind));
    let names: Vec<String> = ExtractorKind::all().filter(is_free).map(|kind| kind.to_string()).collect();
    format!(
        "Network whose features FVD and KVD compare: {}; NAME=FILE for other weights of it; or a file of I3D weights. The \
         SHA-256 of the weights is part of the protocol [default: the protocol's, or i3d]",
        names.join(", ")
    )
}

fn metrics_help() -> String {
    let names: Vec<&str> = Metric::all().map(|metric| metric.name()).collect();
    format!("Metrics to measure, separated by commas: {} [default: fvd,kvd]", names.join(", "))
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Reconstruction(Reconstruct),
}

impl Evaluate {
    /// # Errors
    /// [`UserError`] for what the user wrote; data or weights that are not there.
    pub fn run(self) -> Result<()> {
        if let Some(What::Reconstruction(reconstruction)) = self.what {
            return reconstruction.run();
        }
        if self.protocols {
            built_in_protocols().iter().for_each(|known| say!("{}", known.line()));
            return Ok(());
        }
        if self.card && (self.launch.nproc.is_some_and(|ranks| ranks > 1) || rank().is_some()) {
            let text = "--card works in one process, and several were asked for: leave out --nproc, or measure under \
                        one protocol (--protocol), which is shared among them";
            return Err(UserError(text.into()).into());
        }
        let mut experiment = self.experiment()?;
        self.set_precision(&mut experiment.generated)?;
        if self.card {
            print_card(&card(&experiment, self.device.open()?)?);
            say!("figures: {}", experiment.out.join(CARD_FILE).display());
            return Ok(());
        }
        distributed::run(&self.launch, self.device, |ranks, device| {
            let evaluation = evaluate(&experiment, device, ranks)?;
            if ranks.is_first() {
                print_evaluation(&evaluation);
                say!("figures: {}", experiment.out.join(FIGURES_FILE).display());
            }
            Ok(())
        })
    }

    /// The precision that options ask for, in place of the experiment's.
    fn set_precision(&self, generated: &mut Generated) -> Result<()> {
        match generated {
            Generated::Run { precision, tf32, .. } => {
                let asked = self.precision.over(Numerics { precision: *precision, tf32: *tf32 });
                (*precision, *tf32) = (asked.precision, asked.tf32);
            }
            Generated::Clips { .. } if self.precision.are_given() => {
                let text =
                    "--precision and --tf32 are of a run that is sampled; clips from files are measured in float32";
                return Err(UserError(text.into()).into());
            }
            Generated::Clips { .. } => {}
        }
        Ok(())
    }

    fn experiment(&self) -> Result<EvaluationExperiment> {
        match (&self.file, &self.real, &self.generated) {
            (Some(file), _, _) => Ok(EvaluationExperiment::load(file, &self.overrides)?),
            (None, Some(real), Some(generated)) => VideoPaths {
                real: real.clone(),
                split: self.split.clone(),
                generated: generated.clone(),
                protocol: self.protocol.clone(),
                clips: self.clips,
                frames: self.frames,
                frame_stride: self.frame_stride,
                resolution: self.resolution,
                extractor: self.extractor.clone(),
                metrics: self.metrics.clone(),
                seed: self.seed,
                out: self.out.clone(),
            }
            .experiment(),
            _ => Err(UserError("give an experiment file, or --real and --generated".into()).into()),
        }
    }
}
