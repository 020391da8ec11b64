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
    extractors::ExtractorConfig,
    metrics::Metric,
    run_files::{CARD_FILE, FIGURES_FILE},
    torch::DeviceName,
};

use print::print_card;
pub(super) use print::print_evaluation;
use reconstruction::Reconstruct;

/// Measure how far generated clips are from real ones: FVD, KVD and other metrics
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Evaluate {
    #[command(subcommand)]
    what: Option<What>,
    /// Experiment file (YAML)
    #[arg(required_unless_present_any = ["real", "generated", "protocols"])]
    file: Option<PathBuf>,
    /// Replaced settings of the file, key.path=value
    overrides: Vec<String>,
    /// Real videos, instead of a file: a folder of videos or of folders of pictures, an index (.jsonl), a numpy array
    /// (.npz, .npy: uint8 [N, F, H, W, 3]), a packed file
    #[arg(long, requires = "generated", conflicts_with = "file")]
    real: Option<PathBuf>,
    /// One split of the real videos, which are an index [default: all]
    #[arg(long, requires = "real")]
    split: Option<String>,
    /// Generated videos, in the same ways, or a diffusion run, which is sampled
    #[arg(long, requires = "real")]
    generated: Option<PathBuf>,
    /// lvdm16, stylegan-v-16, stylegan-v-128, or a YAML file; without one so many clips of the size given here
    #[arg(long, requires = "generated", conflicts_with_all = ["frames", "resolution"])]
    protocol: Option<String>,
    /// List the protocols that are known by name, and end
    #[arg(long, exclusive = true)]
    protocols: bool,
    /// Clips of each set [default: the protocol's, or as many as there are, at most 2048]
    #[arg(long, conflicts_with = "file")]
    clips: Option<i64>,
    /// Frames of a clip [default: 16, or the run's]
    #[arg(long, conflicts_with = "file")]
    frames: Option<i64>,
    /// Every n-th frame of the real videos [default: the protocol's, else 1]
    #[arg(long, conflicts_with = "file")]
    frame_stride: Option<i64>,
    /// Height and width of a clip before the extractor's own resize [default: 256, or the run's]
    #[arg(long, conflicts_with = "file")]
    resolution: Option<i64>,
    /// Whose features are compared: the name of an extractor, NAME=FILE with other weights, or a file of I3D weights in the
    /// packaged layout; the hash of the weights is part of every figure [default: the protocol's, else i3d]
    #[arg(long, conflicts_with = "file")]
    extractor: Option<ExtractorConfig>,
    /// Which metrics, separated by commas [default: fvd,kvd]
    #[arg(long, conflicts_with = "file", value_delimiter = ',')]
    metrics: Option<Vec<Metric>>,
    /// Measure under every known protocol, beside real against real, frozen, shuffled frames and Gaussian latents, and how
    /// each metric answers to real clips that are blurred, jittered, shuffled, reversed, frozen or sped up
    #[arg(long)]
    card: bool,
    /// Which real clips
    #[arg(long, conflicts_with = "file", default_value_t = 0)]
    seed: u64,
    /// Folder for the figures [default: one in runs/evaluation for these videos and these settings]
    #[arg(long, conflicts_with = "file")]
    out: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    precision: PrecisionOptions,
    #[command(flatten)]
    launch: Launch,
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
