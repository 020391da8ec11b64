//! `lvdm evaluate-long`: FVD and KVD along long videos, window by window, as curves of several methods.

use std::{
    collections::VecDeque,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use super::{
    evaluate::{Bar, Real, RealClips, Shared, Yardsticks, piece},
    sample::PrecisionOptions,
};
use crate::{
    atomic_file::write_atomically,
    data::{ClipSpec, DataConfig, VideoWriter, pictures},
    distributed::{self, Launch, Ranks},
    experiment::{Curve, CurveSource, Experiment, LongEvaluationExperiment, LongVideoConfig, Mistake},
    extractors::FeatureExtractor,
    generate::{LongVideo, forget},
    metrics::{Figure, Metric, Protocol, RealVsReal},
    report::{Plot, Series},
    safetensors::{read_safetensors, write_safetensors_atomically},
    torch::{DeviceName, device_name},
    train::{logger::RunLogger, progress::Progress},
};

/// Measure long videos window by window and draw the curves; interrupted, it goes on
#[derive(Debug, clap::Args)]
pub struct EvaluateLong {
    /// Experiment file (YAML)
    file: PathBuf,
    /// Replaced settings, key.path=value
    overrides: Vec<String>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    precision: PrecisionOptions,
    #[command(flatten)]
    launch: Launch,
}

/// The file of all windows of all curves, one JSON object a line.
pub(super) const CURVES_FILE: &str = "curves.jsonl";
/// The protocol and what each curve was made with.
const FIGURES_FILE: &str = "figures.json";

/// So many videos of each curve are kept as mp4 and as a strip of pictures.
const SHOWN: u64 = 4;

/// What was measured of one curve.
#[derive(Debug, Serialize)]
struct Measured {
    name: String,
    /// Each window against the same real clips.
    windows: Vec<Figure>,
    /// Mean absolute difference of neighbouring frames, in grey levels.
    motion: f64,
    /// The same where decoded chunks meet, over its median elsewhere; only of sampled videos.
    seam: Option<f64>,
    /// All that the videos depend on.
    settings: Value,
}

impl Measured {
    /// Half the width of the interval of a window, which half of the windows exceed.
    fn half_width(&self, metric: Metric) -> Option<f64> {
        let interval = |window: &Figure| window.estimates.get(&metric)?.interval;
        let mut widths: Vec<f64> =
            self.windows.iter().filter_map(interval).map(|[low, high]| (high - low) / 2.0).collect();
        widths.sort_by(f64::total_cmp);
        widths.get(widths.len() / 2).copied()
    }

    /// How much worse the last quarter of the windows is than the first, in KVD.
    fn degradation(&self) -> f64 {
        let quarter = self.windows.len().div_ceil(4);
        let kvd = |windows: &[Figure]| windows.iter().filter_map(|window| window.value(Metric::KVD)).sum::<f64>();
        let mean = |windows: &[Figure]| kvd(windows) / windows.len() as f64;
        mean(&self.windows[self.windows.len() - quarter..]) - mean(&self.windows[..quarter])
    }
}

impl EvaluateLong {
    /// # Errors
    /// [`Mistake`] for what the user wrote; runs, data or weights that are not there; a full disk.
    pub fn run(self) -> Result<()> {
        let mut experiment = LongEvaluationExperiment::load(&self.file, &self.overrides)?;
        let sampled = experiment.curves.iter().any(|curve| matches!(curve.source, CurveSource::Sampled(_)));
        if self.precision.are_given() && !sampled {
            let text = "--precision and --tf32 are of runs that are sampled; videos from files are measured in float32";
            return Err(Mistake(text.into()).into());
        }
        for curve in &mut experiment.curves {
            if let CurveSource::Sampled(config) = &mut curve.source {
                let asked = self.precision.over(config.numerics());
                (config.precision, config.tf32) = (asked.precision, asked.tf32);
            }
        }
        distributed::run(&self.launch, self.device, |ranks, device| measure(&experiment, ranks, device))
    }
}

/// Measures all curves and writes them. Ranks share sampling and real clips; rank 0 writes.
fn measure(experiment: &LongEvaluationExperiment, ranks: &Ranks, device: Device) -> Result<()> {
    let LongEvaluationExperiment { seed, real, train, curves, out, .. } = experiment;
    let config = &experiment.protocol()?;
    let extractor = config.extractor.clone().unwrap_or_default().open(device)?;
    let extractor = &*extractor;
    let shared = Shared { extractor, device, ranks };
    let real_clips = RealClips::new(real, config, *seed)?;
    let work = real_clips.work(Yardsticks::default(), train.is_some()) + train.as_ref().map_or(0, |_| config.clips);
    let mut bar = Bar::new("real clips", work, ranks);
    let trained = match train {
        None => None,
        Some(train) => Some(RealClips::new(train, config, *seed)?.features(shared, &mut bar)?),
    };
    let Real { sets, floor, .. } = real_clips.measure(shared, Yardsticks::default(), trained.as_ref(), &mut bar)?;
    bar.finish();

    let mut measured = Vec::new();
    for curve in curves {
        let found = Windows { experiment, curve, extractor, ranks, device }.measure()?;
        let window = |i| {
            let features = [found.features.select(1, i)];
            Figure::without_extrapolation(&Metric::DEFAULT, &sets[..1], &features, config.covariance)
        };
        let windows = (0..found.features.size()[1]).map(window).collect::<Result<_>>()?;
        measured.push(Measured {
            name: curve.name.clone(),
            windows,
            motion: found.motion,
            seam: found.seam,
            settings: found.settings,
        });
    }
    let protocol = real_clips.protocol(extractor);
    if !ranks.is_first() {
        return Ok(());
    }
    write(experiment, &protocol, floor.as_ref(), &measured, device)?;
    print(experiment, &protocol, floor.as_ref(), &measured);
    say!("curves: {} and .png, {}", out.join("kvd.svg").display(), out.join("fvd.svg").display());
    Ok(())
}

/// The windows of one curve's videos.
struct Windows<'a> {
    experiment: &'a LongEvaluationExperiment,
    curve: &'a Curve,
    extractor: &'a dyn FeatureExtractor,
    ranks: &'a Ranks,
    device: Device,
}

/// Features and frame differences of some videos.
struct Found {
    /// `[N, windows, D]`
    features: Tensor,
    motion: f64,
    seam: Option<f64>,
    settings: Value,
}

/// Takes a video in pieces, and gives the features of its windows and the differences of its frames.
struct Reader<'a> {
    extractor: &'a dyn FeatureExtractor,
    window: i64,
    /// Windows that go through the extractor at once.
    at_once: usize,
    /// Windows that have not: `[3, window, H, W]`.
    waiting: Vec<Tensor>,
    /// `[3, f, H, W]`: frames that do not fill a window yet.
    pending: Option<Tensor>,
    last: Option<Tensor>,
    features: Vec<Tensor>,
    steps: Vec<Tensor>,
    /// The first frame of each window.
    firsts: Vec<Tensor>,
}

impl<'a> Reader<'a> {
    fn new(extractor: &'a dyn FeatureExtractor, window: i64, device: Device) -> Self {
        Reader {
            extractor,
            window,
            at_once: if device.is_cuda() { piece(device, window) as usize } else { 1 },
            waiting: Vec::new(),
            pending: None,
            last: None,
            features: Vec::new(),
            steps: Vec::new(),
            firsts: Vec::new(),
        }
    }

    /// A piece u8 `[3, f, H, W]`.
    fn take(&mut self, piece: &Tensor) -> Result<()> {
        let join = |before: &Option<Tensor>| match before {
            None => piece.shallow_clone(),
            Some(before) => Tensor::cat(&[before, piece], 1),
        };
        let chain = join(&self.last).to_kind(tch::Kind::Float);
        let pairs = chain.size()[1] - 1;
        let steps = (chain.narrow(1, 1, pairs) - chain.narrow(1, 0, pairs)).abs();
        self.steps.push(steps.mean_dim([0, 2, 3].as_slice(), false, tch::Kind::Double));
        self.last = Some(piece.narrow(1, piece.size()[1] - 1, 1).copy());
        let mut frames = join(&self.pending);
        while frames.size()[1] >= self.window {
            let window = frames.narrow(1, 0, self.window);
            self.firsts.push(window.narrow(1, 0, 1).copy());
            self.waiting.push(window.copy());
            if self.waiting.len() == self.at_once {
                self.extract()?;
            }
            frames = frames.narrow(1, self.window, frames.size()[1] - self.window);
        }
        self.pending = Some(frames.copy());
        Ok(())
    }

    /// The windows that wait.
    fn extract(&mut self) -> Result<()> {
        let windows = Tensor::stack(&std::mem::take(&mut self.waiting), 0).permute([0, 2, 3, 4, 1]);
        self.features.push(self.extractor.features(&windows)?);
        Ok(())
    }

    /// Features `[windows, D]`, and the mean differences of neighbouring frames, `[F − 1]`.
    fn finish(mut self) -> Result<(Tensor, Tensor)> {
        if !self.waiting.is_empty() {
            self.extract()?;
        }
        Ok((Tensor::cat(&self.features, 0), Tensor::cat(&self.steps, 0)))
    }
}

impl Windows<'_> {
    /// The folder of a batch that is not done yet, by its first sample.
    fn state(&self, first: u64) -> PathBuf {
        self.folder().join(format!("unfinished-{first:05}"))
    }

    fn folder(&self) -> PathBuf {
        self.experiment.out.join(self.curve.folder())
    }

    fn measure(&self) -> Result<Found> {
        match &self.curve.source {
            CurveSource::Sampled(config) => self.sampled(config),
            CurveSource::Videos { data } => self.read(data),
        }
    }

    /// Sampled a batch at a time; what is measured of a batch is kept in a file. Batches are shared among ranks.
    fn sampled(&self, config: &LongVideoConfig) -> Result<Found> {
        let LongEvaluationExperiment { seed, videos, frames, real, .. } = self.experiment;
        let long = LongVideo::open(config, *frames, self.device)?;
        let _prepared = long.keep_prepared();
        let settings = long.settings(*seed)?;
        let batches: Vec<Vec<u64>> = (0..*videos)
            .step_by(config.batch as usize)
            .map(|first| (first..(first + config.batch as u64).min(*videos)).collect())
            .collect();
        let mut bar = Progress::new(&self.curve.name, videos * long.plan.steps.len() as u64, 0);
        bar = bar.shown(self.ranks.is_first());
        let (features, steps) = self.share(batches.len(), |i| {
            let made_with = json!({"settings": settings, "samples": batches[i], "window": real.frames,
                "extractor": self.extractor.weights_sha256()});
            let file = self.folder().join(format!("windows-{:05}.safetensors", batches[i][0]));
            if let Some(kept) = measured_before(&file, &made_with)? {
                return Ok(kept);
            }
            let (features, steps) = self.sample(&long, &batches[i], &mut bar)?;
            write_safetensors_atomically(&file, &[("features", &features), ("steps", &steps)], &made_with)?;
            forget(&self.state(batches[i][0]))?;
            Ok((features, steps))
        })?;
        bar.finish();
        let seam = seam(&steps, &long.chunks().seams(long.plan.frames))?;
        Ok(Found { features, motion: steps.mean(None).double_value(&[]), seam, settings })
    }

    /// Pieces of features `[n, windows, D]` and of differences `[n, F − 1]`, each measured by one rank, all known to all.
    fn share(
        &self,
        count: usize,
        mut measure: impl FnMut(usize) -> Result<(Tensor, Tensor)>,
    ) -> Result<(Tensor, Tensor)> {
        let mut own_steps = VecDeque::new();
        let features = self.ranks.share(count, |i| {
            let (features, steps) = measure(i)?;
            own_steps.push_back(steps);
            Ok(features)
        })?;
        let steps = self.ranks.share(count, |_| own_steps.pop_front().context("measured above"))?;
        Ok((Tensor::cat(&features, 0), Tensor::cat(&steps, 0)))
    }

    /// One batch: features `[n, windows, D]`, differences of neighbouring frames `[n, F − 1]`.
    fn sample(&self, long: &LongVideo, samples: &[u64], bar: &mut Progress) -> Result<(Tensor, Tensor)> {
        let LongEvaluationExperiment { seed, real, .. } = self.experiment;
        let (first, clips) = (samples[0], long.plan.steps.len() as u64);
        let end = (first + samples.len() as u64) * clips;
        let z = long.latents(samples, *seed, &self.state(first), &mut |clip| bar.step(first * clips + clip, ""))?;
        let (mut features, mut steps) = (Vec::new(), Vec::new());
        for (i, &sample) in samples.iter().enumerate() {
            bar.step(end, &format!("measuring video {sample}"));
            let mut reader = Reader::new(self.extractor, real.frames, self.device);
            let mut writer = None;
            let path = self.folder().join(format!("{sample:05}.mp4"));
            long.decode(&z.narrow(0, i as i64, 1), &mut |piece| {
                if sample < SHOWN && cfg!(feature = "video") {
                    VideoWriter::append(&mut writer, &path, piece, FPS)?;
                }
                reader.take(piece)
            })?;
            writer.map_or(Ok(()), VideoWriter::finish)?;
            if sample < SHOWN {
                let strip = Tensor::stack(&[Tensor::cat(&reader.firsts, 1)], 0);
                pictures::write_png(&path.with_extension("png"), &pictures::grid(&strip, 1)?)?;
            }
            let (of_video, differences) = reader.finish()?;
            features.push(of_video);
            steps.push(differences);
        }
        Ok((Tensor::stack(&features, 0), Tensor::stack(&steps, 0)))
    }

    /// The first frames of each of the first videos of a dataset. Ranks share the videos.
    fn read(&self, data: &DataConfig) -> Result<Found> {
        let LongEvaluationExperiment { videos, frames, real, .. } = self.experiment;
        let entries = data.videos()?.videos;
        ensure!(
            entries.len() as u64 >= *videos,
            "{}: {} videos, and {videos} are asked for",
            self.curve.name,
            entries.len()
        );
        let spec = ClipSpec { frames: real.frames, ..data.clip()? };
        let side = spec.resolution;
        let mut bar = Progress::new(&self.curve.name, *videos, 0).shown(self.ranks.is_first());
        let (features, steps) = self.share(*videos as usize, |i| {
            let entry = &entries[i];
            let mut source = entry.source.open()?;
            let mut reader = Reader::new(self.extractor, real.frames, self.device);
            for window in 0..frames / real.frames {
                let start = window * real.frames * spec.frame_stride;
                let pictures = source
                    .read(start, real.frames, spec.frame_stride)
                    .with_context(|| format!("{}: {frames} frames are measured", entry.name))?;
                reader.take(&Tensor::from_slice(&spec.fit(&pictures)).reshape([3, real.frames, side, side]))?;
            }
            let (of_video, differences) = reader.finish()?;
            bar.step(i as u64 + 1, "");
            Ok((of_video.unsqueeze(0), differences.unsqueeze(0)))
        })?;
        bar.finish();
        let motion = steps.mean(None).double_value(&[]);
        Ok(Found { features, motion, seam: None, settings: serde_json::to_value(data)? })
    }
}

/// Frames a second of the videos that are kept.
const FPS: f64 = 8.0;

/// The features and differences in a file, if it is there.
fn measured_before(file: &Path, made_with: &Value) -> Result<Option<(Tensor, Tensor)>> {
    if !file.exists() {
        return Ok(None);
    }
    let (mut tensors, before) = read_safetensors(file)?;
    if before.as_ref() != Some(made_with) {
        let text =
            format!("{} was measured with other settings; delete its folder, or give another out", file.display());
        return Err(Mistake(text).into());
    }
    let mut take = |name| tensors.remove(name).with_context(|| format!("{} holds no {name}", file.display()));
    Ok(Some((take("features")?, take("steps")?)))
}

/// Mean difference of neighbouring frames at seams, over its median elsewhere; `[N, F − 1]` differences.
fn seam(steps: &Tensor, seams: &[(i64, i64)]) -> Result<Option<f64>> {
    let rows: Vec<f64> = steps.mean_dim([0].as_slice(), false, tch::Kind::Double).try_into()?;
    let mut touched = vec![false; rows.len()];
    for &(first, count) in seams {
        (first - 1..first + count).filter(|&i| (i as usize) < rows.len()).for_each(|i| touched[i as usize] = true);
    }
    let of =
        |wanted: bool| rows.iter().zip(&touched).filter(|(_, t)| **t == wanted).map(|(d, _)| *d).collect::<Vec<_>>();
    let (at, mut elsewhere) = (of(true), of(false));
    if at.is_empty() || elsewhere.is_empty() {
        return Ok(None);
    }
    elsewhere.sort_by(f64::total_cmp);
    Ok(Some(at.iter().sum::<f64>() / at.len() as f64 / elsewhere[elsewhere.len() / 2]))
}

/// The line under a figure and a table.
fn subtitle(experiment: &LongEvaluationExperiment, protocol: &Protocol) -> String {
    format!(
        "{} videos of {} frames a curve, against {}; protocol {}",
        experiment.videos,
        experiment.frames,
        protocol.line(),
        protocol.hash()
    )
}

/// Curves as figures, `curves.jsonl`, TensorBoard and `figures.json`.
fn write(
    experiment: &LongEvaluationExperiment,
    protocol: &Protocol,
    floor: Option<&RealVsReal>,
    measured: &[Measured],
    device: Device,
) -> Result<()> {
    let LongEvaluationExperiment { out, real, curves, .. } = experiment;
    let mut lines = String::new();
    for (curve, found) in curves.iter().zip(measured) {
        let mut log = RunLogger::open(&out.join(curve.folder()), None)?;
        for (i, window) in found.windows.iter().enumerate() {
            let frame = i as i64 * real.frames;
            let mut line = json!({"curve": found.name, "first_frame": frame});
            for (metric, estimate) in &window.estimates {
                line[metric.name()] = json!(estimate.value);
                line[format!("{}_interval", metric.name())] = json!(estimate.interval);
            }
            lines.push_str(&format!("{line}\n"));
            let named: Vec<(String, f64)> = window
                .estimates
                .iter()
                .map(|(metric, estimate)| (format!("window_{}", metric.name()), estimate.value))
                .collect();
            let scalars: Vec<(&str, f64)> = named.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            log.scalars(frame, &scalars);
        }
        log.finish();
    }
    write_atomically(&out.join(CURVES_FILE), |file| Ok(file.write_all(lines.as_bytes())?))?;
    let figures = json!({
        "experiment": experiment, "protocol": protocol, "protocol_hash": protocol.hash(), "floor": floor,
        "curves": measured, "device": device_name(device),
    });
    let text = serde_json::to_string_pretty(&figures)?;
    write_atomically(&out.join(FIGURES_FILE), |file| Ok(file.write_all(text.as_bytes())?))?;
    for metric in Metric::DEFAULT {
        let name = metric.title();
        let value = |window: &Figure| window.value(metric).unwrap_or(f64::NAN);
        let point = |(i, window): (usize, &Figure)| ((i as i64 * real.frames) as f64, value(window));
        let series = measured.iter().map(|found| Series {
            name: found.name.clone(),
            points: found.windows.iter().enumerate().map(point).collect(),
        });
        let plot = Plot {
            title: format!("{name} of {}-frame windows along {}-frame videos", real.frames, experiment.frames),
            subtitle: subtitle(experiment, protocol),
            x_label: "first frame of the window".into(),
            y_label: format!("{name} (lower is better)"),
            series: series.collect(),
            level: floor.and_then(|floor| {
                let level = floor.distances.get(metric)?;
                Some((format!("real against real, {} clips", floor.clips), level))
            }),
        };
        plot.write(&out.join(metric.name()))?;
    }
    Ok(())
}

fn print(
    experiment: &LongEvaluationExperiment,
    protocol: &Protocol,
    floor: Option<&RealVsReal>,
    measured: &[Measured],
) {
    let width = measured.iter().map(|found| found.name.chars().count()).fold(20, usize::max);
    let head = |text: fn(&Measured) -> &str| {
        measured.iter().map(|found| format!("  {:>width$}", text(found))).collect::<String>()
    };
    say!("{:11}{}", "", head(|found| &found.name));
    say!("{:>11}{}", "first frame", head(|_| "FVD       KVD"));
    for window in 0..measured.iter().map(|found| found.windows.len()).max().unwrap_or(0) {
        let cell = |found: &Measured| {
            let [fvd, kvd] =
                Metric::DEFAULT.map(|metric| found.windows.get(window).and_then(|window| window.value(metric)));
            let text = fvd.zip(kvd).map(|(fvd, kvd)| format!("{fvd:.1} {kvd:9.2}"));
            format!("  {:>width$}", text.unwrap_or_default())
        };
        let row: String = measured.iter().map(cell).collect();
        say!("{:>11}{row}", window as i64 * experiment.real.frames);
    }
    if let Some(floor) = floor {
        say!("{}", floor.line());
    }
    for found in measured {
        let seam = found.seam.map_or(String::new(), |seam| format!(", at seams {seam:.2} of the median elsewhere"));
        let Measured { name, motion, .. } = found;
        let widths = Metric::DEFAULT.map(|metric| found.half_width(metric));
        if let [Some(fvd), Some(kvd)] = widths {
            say!("{name}: 95 % interval of a window (jackknife, median): FVD ± {fvd:.1}, KVD ± {kvd:.2}");
        }
        say!("{name}: KVD of the last quarter minus that of the first {:+.2}", found.degradation());
        say!("{name}: neighbouring frames differ by {motion:.2} grey levels{seam}");
    }
    say!("{}", subtitle(experiment, protocol));
}
