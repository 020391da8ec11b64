//! `lvdm evaluate`: generated clips against real ones, beside yardsticks.

mod card;
mod kept;
mod measure;
mod notes;
mod reconstruction;
mod sampled;
mod shown;

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

use super::sample::PrecisionOptions;
use crate::{
    atomic_file::write_atomically,
    data::{ClipStream, DataConfig, DatasetConfig, decode_workers},
    distributed::{self, Launch, Ranks, rank},
    experiment::{
        DiffusionExperiment, EvaluationConfig, EvaluationExperiment, Experiment, Generated, Mistake, Numerics,
        Precision, built_in_protocols, protocol, read,
    },
    extractors::I3d,
    metrics::{Figure, Floor, Protocol, ProtocolConfig},
    report::FigureTable,
    torch::{DeviceName, device_name},
};

pub(super) use card::CARD_FILE;
use card::card;
pub use measure::{Bar, Real, RealClips, Shared, Yardsticks, piece};
use measure::{Extraction, enough, generated_sets, refit};
use reconstruction::Reconstruction;
pub(super) use reconstruction::{FIGURES_FILE as RECONSTRUCTION_FILE, Figures as ReconstructionFigures};
use sampled::Sampled;
use shown::{RECONSTRUCTED, Reconstructions, Shown};

/// Measure FVD and KVD of generated clips against real ones
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
    /// Another file of I3D weights in the packaged layout; its hash is part of every figure
    #[arg(long, conflicts_with = "file")]
    extractor: Option<PathBuf>,
    /// Measure under every known protocol, beside real against real, frozen, shuffled frames and Gaussian latents
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
    Reconstruction(Reconstruction),
}

impl Evaluate {
    /// # Errors
    /// [`Mistake`] for what the user wrote; data or weights that are not there.
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
            return Err(Mistake(text.into()).into());
        }
        let mut experiment = self.experiment()?;
        self.compute_so(&mut experiment.generated)?;
        if self.card {
            card(&experiment, self.device.open()?)?.print();
            say!("figures: {}", experiment.out.join(CARD_FILE).display());
            return Ok(());
        }
        distributed::run(&self.launch, self.device, |ranks, device| {
            let report = evaluate(&experiment, device, ranks)?;
            if ranks.is_first() {
                report.print();
                say!("figures: {}", experiment.out.join(FIGURES_FILE).display());
            }
            Ok(())
        })
    }

    /// The precision that options ask for, in place of the experiment's.
    fn compute_so(&self, generated: &mut Generated) -> Result<()> {
        match generated {
            Generated::Run { precision, tf32, .. } => {
                let asked = self.precision.over(Numerics { precision: *precision, tf32: *tf32 });
                (*precision, *tf32) = (asked.precision, asked.tf32);
            }
            Generated::Clips { .. } if self.precision.are_given() => {
                let text =
                    "--precision and --tf32 are of a run that is sampled; clips from files are measured in float32";
                return Err(Mistake(text.into()).into());
            }
            Generated::Clips { .. } => {}
        }
        Ok(())
    }

    fn experiment(&self) -> Result<EvaluationExperiment> {
        match (&self.file, &self.real, &self.generated) {
            (Some(file), _, _) => Ok(EvaluationExperiment::load(file, &self.overrides)?),
            (None, Some(real), Some(generated)) => {
                let experiment = self.of_paths(real, generated)?;
                experiment.validate().map_err(|error| Mistake(format!("{error:#}")))?;
                Ok(experiment)
            }
            _ => Err(Mistake("give an experiment file, or --real and --generated".into()).into()),
        }
    }

    /// The experiment that `--real` and `--generated` stand for.
    fn of_paths(&self, real: &Path, generated: &Path) -> Result<EvaluationExperiment> {
        let run = is_run(generated).then(|| read::<DiffusionExperiment>(&generated.join("experiment.yaml"), &[]));
        let run = run.transpose()?;
        let config = self.protocol.as_deref().map(protocol).transpose()?;
        let (frames, resolution) = match (&config, &run) {
            (Some(config), _) => (config.frames, config.resolution),
            (None, Some(run)) => (run.data.frames, run.data.resolution),
            (None, None) => (16, 256),
        };
        let asked = config.as_ref().and_then(|config| config.frame_stride);
        let stride = self.frame_stride.or(asked).or(run.as_ref().map(|run| run.data.frame_stride)).unwrap_or(1);
        let data = |path: &Path, frame_stride| -> Result<DataConfig> {
            Ok(DataConfig {
                dataset: DatasetConfig::at(path).map_err(|error| Mistake(format!("{error:#}")))?,
                frames: self.frames.unwrap_or(frames),
                frame_stride,
                resolution: self.resolution.unwrap_or(resolution),
                flip: false,
                workers: decode_workers(),
            })
        };
        let mut real = data(real, stride)?;
        if let Some(split) = &self.split {
            real.dataset = real.dataset.of_split(split).map_err(|error| Mistake(format!("{error:#}")))?;
        }
        let (generated, found) = match run {
            Some(run) => (
                Generated::Run {
                    run: generated.into(),
                    sampler: run.sampler,
                    batch: 16,
                    precision: Precision::default(),
                    tf32: false,
                    guidance: 7.5,
                },
                i64::MAX,
            ),
            None => {
                let data = data(generated, 1)?;
                let found = data.videos()?.videos.len() as i64;
                (Generated::Clips { data }, found)
            }
        };
        let clips = self.clips.or(config.is_none().then(|| found.min(2048)));
        let evaluation = EvaluationConfig { protocol: self.protocol.clone(), clips, extractor: self.extractor.clone() };
        let out = match &self.out {
            Some(out) => out.clone(),
            None => own_folder(&evaluation, &real, &generated, self.seed)?,
        };
        Ok(EvaluationExperiment { seed: self.seed, evaluation, real, generated, train: None, out })
    }
}

/// A folder that no other videos and no other settings have: figures never take the place of different ones.
fn own_folder(evaluation: &EvaluationConfig, real: &DataConfig, generated: &Generated, seed: u64) -> Result<PathBuf> {
    let (DataConfig { frames, frame_stride, resolution, .. }, real) = (real, real.videos()?.fingerprint()?);
    let protocol = evaluation.protocol.as_deref().map(protocol).transpose()?;
    let (path, generated) = match generated {
        Generated::Run { run, .. } => (run.as_path(), json!(generated)),
        Generated::Clips { data } => (data.dataset.path(), json!(data.videos()?.fingerprint()?)),
    };
    let asked = json!([protocol, evaluation, frames, frame_stride, resolution, real, generated, seed]);
    let hash = format!("{:x}", Sha256::digest(asked.to_string()));
    let name = path.file_stem().map_or("generated".into(), |name| name.to_string_lossy());
    Ok(Path::new("runs/evaluation").join(format!("{name}-{}", &hash[..8])))
}

/// Whether a path is the folder of a run.
fn is_run(path: &Path) -> bool {
    path.join("experiment.yaml").is_file() && path.join("checkpoints").is_dir()
}

/// What generated clips are that no run was sampled for.
const FROM_FILES: &str = "clips from files";

/// The file of figures in an evaluation's folder.
pub const FIGURES_FILE: &str = "figures.json";

/// What an evaluation found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// By set: `samples`, then the yardsticks `train`, `frozen`, `gaussian`; on a card `real` and `shuffled` too.
    pub figures: BTreeMap<String, Figure>,
    /// Whose samples they are of.
    pub generated: Generated,
    /// What they are of, at which step of its training, and how they were sampled, in a line.
    #[serde(default)]
    pub generated_text: String,
    /// What two sets of real clips are apart.
    pub floor: Option<Floor>,
    /// Of reconstructed real clips, at most 64; only where a run was evaluated.
    pub psnr_db: Option<f64>,
    /// Which clips were reconstructed.
    #[serde(default)]
    pub psnr_of: Option<String>,
    pub protocol: Protocol,
    pub protocol_hash: String,
    /// The protocol in a line.
    pub protocol_text: String,
    pub device: String,
    /// Time of sampling, and of all the rest.
    pub sample_seconds: f64,
    pub evaluate_seconds: f64,
}

/// Order and meaning of the sets in a table.
pub(super) const SETS: [(&str, &str); 6] = [
    ("samples", "generated"),
    ("train", "real clips that were trained on: the floor at this number of clips"),
    ("real", "real clips against other real clips: the floor"),
    ("frozen", "real clips that stand still at their first frame"),
    ("shuffled", "real clips whose frames come in a random order"),
    ("gaussian", "decoded Gaussian latents: no diffusion learned"),
];

impl Report {
    /// The table, with what it depends on.
    pub fn print(&self) {
        let mut table = FigureTable::new();
        for (set, meaning) in SETS {
            if let Some(figure) = self.figures.get(set) {
                table.row(set, figure, &self.protocol, meaning);
            }
        }
        crate::commands::say::text(&table);
        say!("samples: {}", self.generated_text);
        self.print_details();
        say!("protocol {}: {}; on {}", self.protocol_hash, self.protocol_text, self.device);
    }

    /// Runs, floor, extrapolation, PSNR: below the table.
    fn print_details(&self) {
        if let Some(figure) = self.figures.get("samples") {
            let ([real, _], asked) = (figure.clips, self.protocol.settings.clips);
            if real < asked {
                let draw = self.protocol.settings.draw.words();
                say!("{real} real clips where {asked} are asked for: drawn {draw}, there are no more");
            }
            let several = if figure.runs.len() > 1 { ", mean of all runs" } else { "" };
            if figure.runs.len() > 1 {
                let of = |value: fn(&crate::metrics::Distances) -> String| {
                    figure.runs.iter().map(value).collect::<Vec<_>>().join(" ")
                };
                say!("FVD of each run: {}", of(|run| format!("{:.2}", run.fvd)));
                say!("KVD of each run: {}", of(|run| format!("{:.3}", run.kvd)));
            }
            let bound = match figure.extrapolates(I3d::CLASSES) {
                true => String::new(),
                false => format!(" at most (a set has fewer than {} clips)", I3d::CLASSES),
            };
            say!("samples, extrapolated to infinitely many clips: FVD {:.2}{bound}{several}", figure.fvd_extrapolated);
        }
        if let Some(floor) = &self.floor {
            say!("{}", floor.line());
        }
        if let Some(psnr) = self.psnr_db {
            say!("reconstruction of {}: {psnr:.2} dB PSNR", self.psnr_of.as_deref().unwrap_or("real clips"));
        }
    }
}

/// Measures, writes figures, videos and pictures into the experiment's folder. Clips stream by: memory does not grow
/// with their number. Ranks share sampling and features; each sees all clips, and rank 0 writes.
///
/// # Errors
/// Data or weights that are not there; a full disk.
pub fn evaluate(experiment: &EvaluationExperiment, device: Device, ranks: &Ranks) -> Result<Report> {
    let EvaluationExperiment { seed, real, generated, train, out, .. } = experiment;
    let config = &experiment.protocol()?;
    let start = Instant::now();
    let real_clips = RealClips::new(real, config, *seed)?;
    if let Generated::Clips { data } = generated {
        enough(config, data.videos()?.videos.len() as i64)?;
    }
    let extractor = I3d::load(config.extractor.as_deref(), device)?;
    let shared = Shared { extractor: &extractor, device, ranks };
    let measured = Measurement { config, extractor: shared };

    let sampled = Sampled::open(generated, &real_clips, *seed, device)?;
    if let Some(Sampled { generator, .. }) = &sampled {
        let [_, frames, ..] = generator.clip_size();
        if frames < config.frames {
            let text =
                format!("the run makes {frames} frames, and the protocol {} measures {}", config.name, config.frames);
            return Err(Mistake(text).into());
        }
    }
    let _prepared = sampled.as_ref().map(|sampled| sampled.generator.keep_prepared());
    if ranks.is_first() {
        notes::of_inputs(real, generated)?;
        notes::of_protocol(config, &real_clips, generated, sampled.as_ref())?;
    }
    let is_run = sampled.is_some();
    let yardsticks = Yardsticks { frozen: is_run, shuffled: false };
    let samples = config.generated_clips() * (config.generated_draws() + i64::from(is_run));
    let trained = if train.is_some() { config.clips } else { 0 };
    let work = real_clips.work(yardsticks, train.is_some()) + samples + trained;
    let mut bar = Bar::new("evaluate", work, ranks);

    let trained = match train {
        None => None,
        Some(train) => Some(RealClips::new(train, config, *seed)?.features(shared, &mut bar)?),
    };
    let real = real_clips.measure(shared, yardsticks, trained.as_ref(), &mut bar)?;
    let mut reconstructions = Reconstructions::default();
    // pixels are their own
    if let Some(Sampled { generator, .. }) = sampled.as_ref().filter(|s| !s.generator.space.settings().is_exact()) {
        let clips = config.applied_to(&experiment.real);
        let mut clips = ClipStream::new(&clips, config.draw, config.fit, *seed)?;
        for _ in 0..config.clips.min(RECONSTRUCTED) {
            let Some(clip) = clips.next()? else { break };
            reconstructions.take(generator, &clip)?;
        }
    }

    let mut figures = BTreeMap::new();
    let mut sample_seconds = 0.0;
    let sets = match (generated, &sampled) {
        (Generated::Run { batch, .. }, Some(sampled)) => {
            let [_, frames, side, _] = sampled.generator.clip_size();
            let shown = || Shown::new(out, config.generated_clips(), frames, side, *seed);
            let mut shown = if ranks.is_first() { Some(shown()?) } else { None };
            let sets = measured.of_generator(
                config.generated_draws(),
                *batch,
                &mut bar,
                &mut |samples| {
                    let begin = Instant::now();
                    let clips = sampled.videos(samples);
                    sample_seconds += begin.elapsed().as_secs_f64();
                    clips
                },
                &mut |clips| shown.as_mut().map_or(Ok(()), |shown| shown.take(clips)),
            )?;
            let mut few = None;
            let gaussian = measured.of_generator(
                1,
                *batch,
                &mut bar,
                &mut |samples| sampled.gaussian_videos(samples),
                &mut |clips| {
                    few.get_or_insert_with(|| clips.narrow(0, 0, clips.size()[0].min(4)).copy());
                    Ok(())
                },
            )?;
            figures.insert("gaussian".to_string(), real.figure(config, &gaussian, *seed)?);
            shown.map_or(Ok(()), |shown| shown.finish(&reconstructions, few.as_ref()))?;
            sets
        }
        (Generated::Clips { data }, _) => generated_sets(config, data, shared, &mut bar, &mut |_| Ok(()))?,
        (Generated::Run { .. }, None) => unreachable!("opened above"),
    };
    bar.finish();
    figures.insert("samples".into(), real.figure(config, &sets, *seed)?);
    for (name, features) in real
        .yardsticks
        .iter()
        .map(|(name, features)| (name.as_str(), features))
        .chain(trained.iter().map(|t| ("train", t)))
    {
        figures.insert(name.to_string(), real.figure(config, std::slice::from_ref(features), *seed)?);
    }
    let protocol = real_clips.protocol(&extractor);
    let report = Report {
        figures,
        generated: generated.clone(),
        generated_text: sampled.as_ref().map_or(FROM_FILES.to_string(), Sampled::line),
        floor: real.floor,
        psnr_db: reconstructions.psnr_db(),
        psnr_of: reconstructions.psnr_db().map(|_| {
            let trained = sampled.as_ref().is_some_and(|sampled| sampled.trained_on == experiment.real.dataset);
            let trained = if trained { ", on which the run was trained" } else { "" };
            format!("{} clips of {}{trained}", reconstructions.psnr.len(), experiment.real.dataset.line())
        }),
        protocol_hash: protocol.hash(),
        protocol_text: protocol.line(),
        protocol,
        device: device_name(device),
        sample_seconds,
        evaluate_seconds: start.elapsed().as_secs_f64() - sample_seconds,
    };
    if ranks.is_first() {
        let text = serde_json::to_string_pretty(&report)?;
        write_atomically(&out.join(FIGURES_FILE), |file| Ok(file.write_all(text.as_bytes())?))?;
    }
    Ok(report)
}

/// What every measurement of an evaluation shares.
struct Measurement<'a> {
    config: &'a ProtocolConfig,
    extractor: Shared<'a>,
}

impl Measurement<'_> {
    /// Features of generated clips, one set a draw; `observe` sees those of the first.
    fn of_generator(
        &self,
        draws: i64,
        batch: i64,
        bar: &mut Bar,
        make: &mut dyn FnMut(&[u64]) -> Result<Tensor>,
        observe: &mut dyn FnMut(&Tensor) -> Result<()>,
    ) -> Result<Vec<Tensor>> {
        let clips = self.config.generated_clips() as u64;
        let mut sets = Vec::new();
        for draw in 0..draws as u64 {
            let mut extraction = Extraction::new(self.extractor);
            let end = (draw + 1) * clips;
            let ranks = self.extractor.ranks;
            let firsts: Vec<u64> = (draw * clips..end).step_by(batch as usize).collect();
            for round in firsts.chunks(ranks.size()) {
                // each batch on one rank
                let made = ranks.share(round.len(), |i| {
                    make(&(round[i]..(round[i] + batch as u64).min(end)).collect::<Vec<u64>>())
                })?;
                for made in &made {
                    if draw == 0 {
                        observe(made)?;
                    }
                    extraction.take(&refit(made, self.config)?)?;
                    bar.advance(made.size()[0] as u64);
                }
            }
            sets.push(extraction.finish()?);
        }
        Ok(sets)
    }
}
