//! `lvdm evaluate`: generated clips against real ones, beside yardsticks.

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::{
    atomic_file::write_atomically,
    data::{DataConfig, DatasetConfig, fixed_clips, normalise, pack_generated, pictures, to_u8, write_video},
    distributed::{self, Launch, Ranks},
    experiment::{EvaluationExperiment, Experiment, Generated, Mistake},
    generate::Generator,
    metrics::{Distances, EvaluationConfig, FeatureExtractor, Protocol, psnr_db},
    models::I3d,
    torch::DeviceName,
    train::progress::Progress,
};

/// Measure FVD and KVD of generated clips against real ones
#[derive(Debug, clap::Args)]
pub struct Evaluate {
    /// Experiment file (YAML)
    #[arg(required_unless_present_all = ["real", "generated"])]
    file: Option<PathBuf>,
    /// Replaced settings of the file, key.path=value
    overrides: Vec<String>,
    /// Folder of real videos, instead of a file
    #[arg(long, requires = "generated", conflicts_with = "file")]
    real: Option<PathBuf>,
    /// Folder of generated videos
    #[arg(long, requires = "real")]
    generated: Option<PathBuf>,
    /// Clips of each set
    #[arg(long, default_value_t = 2048)]
    clips: i64,
    /// Frames of a clip
    #[arg(long, default_value_t = 16)]
    frames: i64,
    /// Every n-th frame of the real videos
    #[arg(long, default_value_t = 1)]
    frame_stride: i64,
    /// Height and width of a clip before the extractor's own resize
    #[arg(long, default_value_t = 256)]
    resolution: i64,
    /// Which real clips
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for the figures
    #[arg(long, default_value = "runs/evaluation")]
    out: PathBuf,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    launch: Launch,
}

impl Evaluate {
    /// # Errors
    /// [`Mistake`] for what the user wrote; data or weights that are not there.
    pub fn run(self) -> Result<()> {
        let experiment = match (&self.file, self.real, self.generated) {
            (Some(file), _, _) => EvaluationExperiment::load(file, &self.overrides)?,
            (None, Some(real), Some(generated)) => {
                let data = |root: PathBuf, frame_stride| DataConfig {
                    dataset: DatasetConfig::Folder { root },
                    frames: self.frames,
                    frame_stride,
                    resolution: self.resolution,
                    flip: false,
                    workers: 2,
                };
                let experiment = EvaluationExperiment {
                    seed: self.seed,
                    evaluation: EvaluationConfig { clips: self.clips, extractor: None },
                    real: data(real, self.frame_stride),
                    generated: Generated::Clips { data: data(generated, 1) },
                    train: None,
                    out: self.out,
                };
                experiment.validate().map_err(|error| Mistake(format!("{error:#}")))?;
                experiment
            }
            _ => return Err(Mistake("give an experiment file, or --real and --generated".into()).into()),
        };
        distributed::run(&self.launch, self.device, |ranks, device| {
            let report = evaluate(&experiment, device, ranks)?;
            if ranks.is_first() {
                report.print();
                println!("figures: {}", experiment.out.join(FIGURES_FILE).display());
            }
            Ok(())
        })
    }
}

/// The file of figures in an evaluation's folder.
pub const FIGURES_FILE: &str = "figures.json";

/// What an evaluation found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// By set: `samples`, then the yardsticks `train`, `frozen`, `gaussian`.
    pub figures: BTreeMap<String, Distances>,
    /// Of reconstructed real clips; only where a run was evaluated.
    pub psnr_db: Option<f64>,
    pub protocol: Protocol,
    pub protocol_hash: String,
    pub device: String,
    /// Time of sampling, and of all the rest.
    pub sample_seconds: f64,
    pub evaluate_seconds: f64,
}

/// Order and meaning of the sets in a table.
const SETS: [(&str, &str); 4] = [
    ("samples", "generated"),
    ("train", "real clips that were trained on: the floor at this number of clips"),
    ("frozen", "real clips that stand still at their first frame"),
    ("gaussian", "decoded Gaussian latents: no diffusion learned"),
];

impl Report {
    /// The table, with what it depends on.
    pub fn print(&self) {
        println!("{:10} {:>10} {:>10}", "", "FVD", "KVD");
        for (set, meaning) in SETS {
            if let Some(Distances { fvd, kvd }) = self.figures.get(set) {
                println!("{set:10} {fvd:10.2} {kvd:10.3}  {meaning}");
            }
        }
        if let Some(psnr) = self.psnr_db {
            println!("reconstruction of held-out clips: {psnr:.2} dB PSNR");
        }
        println!("protocol {}: {}; on {}", self.protocol_hash, self.protocol.line(), self.device);
    }
}

/// Clips `[N, 3, F, H, W]` → features, in bounded pieces.
pub fn features(
    extractor: &dyn FeatureExtractor,
    clips: &Tensor,
    bar: &mut Progress,
    done: &mut u64,
) -> Result<Tensor> {
    features_over(&Ranks::alone(), extractor, clips, bar, done)
}

/// As [`features`], shared among ranks.
fn features_over(
    ranks: &Ranks,
    extractor: &dyn FeatureExtractor,
    clips: &Tensor,
    bar: &mut Progress,
    done: &mut u64,
) -> Result<Tensor> {
    const PIECE: i64 = 4;
    let count = clips.size()[0];
    let before = *done;
    let rows = ranks.share((count as usize).div_ceil(PIECE as usize), |i| {
        let first = i as i64 * PIECE;
        let piece = clips.narrow(0, first, PIECE.min(count - first));
        let found = extractor.features(&piece.permute([0, 2, 3, 4, 1]))?;
        *done = before + (first + piece.size()[0]) as u64;
        bar.step(*done, "");
        Ok(found)
    })?;
    *done = before + count as u64;
    Ok(Tensor::cat(&rows, 0))
}

/// Every frame is the first.
fn frozen(clips: &Tensor) -> Tensor {
    clips.narrow(2, 0, 1).expand_as(clips)
}

/// Measures, writes figures, videos and pictures into the experiment's folder. Ranks share sampling and features, whose
/// pieces are the same on any number of them; each reads the real clips; rank 0 writes.
///
/// # Errors
/// Data or weights that are not there; a full disk.
pub fn evaluate(experiment: &EvaluationExperiment, device: Device, ranks: &Ranks) -> Result<Report> {
    let EvaluationExperiment { seed, evaluation, real, generated, train, out } = experiment;
    let start = Instant::now();
    let videos = real.videos()?.videos.len() as i64;
    if videos < evaluation.clips && ranks.is_first() {
        tracing::warn!("{} real clips out of {videos} videos: some videos give several", evaluation.clips);
    }
    let extractor = I3d::load(evaluation.extractor.as_deref(), device)?;
    let real_clips = fixed_clips(real, evaluation.clips, *seed)?;
    let count = real_clips.size()[0];
    let sets = 2 + u64::from(train.is_some()) + if matches!(generated, Generated::Run { .. }) { 2 } else { 0 };
    let mut bar = Progress::new("evaluate", sets * count as u64, 0).shown(ranks.is_first());
    let mut done = 0;
    let real_features = features_over(ranks, &extractor, &real_clips, &mut bar, &mut done)?;

    let mut figures = BTreeMap::new();
    let mut measure = |name: &str, clips: &Tensor| -> Result<()> {
        let found = features_over(ranks, &extractor, clips, &mut bar, &mut done)?;
        figures.insert(name.to_string(), Distances::between(&real_features, &found)?);
        Ok(())
    };
    let (mut sample_seconds, mut psnr) = (0.0, None);
    match generated {
        Generated::Clips { data } => {
            let found = data.videos()?.videos.len();
            if (found as i64) < evaluation.clips {
                let asked = evaluation.clips;
                return Err(Mistake(format!(
                    "{found} generated videos, and {asked} clips are asked for: the same clip twice would lower FVD; ask for {found}"
                ))
                .into());
            }
            measure("samples", &fixed_clips(data, evaluation.clips, *seed)?)?
        }
        Generated::Run { run, sampler, batch } => {
            let sampling = Instant::now();
            let (generator, _) = Generator::open(run, device)?;
            let samples = generate(ranks, "sample", count as u64, *batch as u64, |samples| {
                generator.videos(samples, None, *sampler, *seed, &mut |_, _| {})
            })?;
            sample_seconds = sampling.elapsed().as_secs_f64();
            measure("samples", &samples)?;
            let gaussian = generate(ranks, "gaussian", count as u64, *batch as u64, |samples| {
                Ok(generator.gaussian_videos(samples, *seed))
            })?;
            measure("gaussian", &gaussian)?;
            measure("frozen", &frozen(&real_clips))?;
            let reconstructed = reconstruct(ranks, &generator, &real_clips)?;
            psnr = Some(psnr_db(&real_clips, &reconstructed));
            if ranks.is_first() {
                show(out, *seed, &samples, &real_clips, &reconstructed, &gaussian)?;
            }
        }
    }
    if let Some(train) = train {
        measure("train", &fixed_clips(train, count, *seed)?)?;
    }
    bar.finish();
    let protocol = Protocol::new(evaluation, real, *seed, &extractor);
    let report = Report {
        figures,
        psnr_db: psnr,
        protocol_hash: protocol.hash(),
        protocol,
        device: format!("{device:?}").to_lowercase(),
        sample_seconds,
        evaluate_seconds: start.elapsed().as_secs_f64() - sample_seconds,
    };
    if ranks.is_first() {
        let text = serde_json::to_string_pretty(&report)?;
        write_atomically(&out.join(FIGURES_FILE), |file| Ok(file.write_all(text.as_bytes())?))?;
    }
    Ok(report)
}

/// Samples 0 … count−1, a batch at a time, each batch on one rank.
fn generate(
    ranks: &Ranks,
    label: &str,
    count: u64,
    batch: u64,
    mut make: impl FnMut(&[u64]) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut bar = Progress::new(label, count, 0).shown(ranks.is_first());
    let clips = ranks.share(count.div_ceil(batch) as usize, |i| {
        let first = i as u64 * batch;
        let samples: Vec<u64> = (first..(first + batch).min(count)).collect();
        let clips = make(&samples)?;
        bar.step(first + samples.len() as u64, "");
        Ok(clips)
    })?;
    bar.finish();
    Ok(Tensor::cat(&clips, 0))
}

fn reconstruct(ranks: &Ranks, generator: &Generator, clips: &Tensor) -> Result<Tensor> {
    let rows = ranks.share(clips.size()[0] as usize, |i| {
        let x = normalise(&clips.narrow(0, i as i64, 1).to_device(generator.space.device()));
        Ok(to_u8(&generator.space.reconstruct(&x)).to_device(Device::Cpu))
    })?;
    Ok(Tensor::cat(&rows, 0))
}

/// Videos of all samples (packed, where this binary cannot write mp4), and pictures of the first of each set.
fn show(
    out: &Path,
    seed: u64,
    samples: &Tensor,
    real: &Tensor,
    reconstructed: &Tensor,
    gaussian: &Tensor,
) -> Result<()> {
    if cfg!(feature = "video") {
        for i in 0..samples.size()[0] {
            let path = out.join(format!("samples/{i:05}.mp4"));
            write_video(&path, &samples.get(i), 8.0)?;
        }
    } else {
        pack_generated(samples, seed, &out.join("samples.safetensors"))?;
    }
    let first = |clips: &Tensor, count: i64| clips.narrow(0, 0, count.min(clips.size()[0]));
    let every = (samples.size()[2] / 8).max(1);
    let pairs = Tensor::stack(&[first(real, 4), first(reconstructed, 4)], 1).flatten(0, 1);
    for (name, clips) in [("samples", first(samples, 8)), ("reconstructions", pairs), ("gaussian", first(gaussian, 4))]
    {
        pictures::write_png(&out.join(format!("{name}.png")), &pictures::grid(&clips, every)?)?;
    }
    let gif = pictures::gif(&first(samples, 8), 8.0)?;
    write_atomically(&out.join("samples.gif"), |file| Ok(file.write_all(&gif)?))
}
