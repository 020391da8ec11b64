//! Features of the windows of long videos, which are sampled or read a piece at a time.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::{Device, Tensor};

use super::{extraction::clips_at_once, metric_group::MetricGroup};
use crate::{
    data::{ClipSpec, DataConfig, VideoWriter, pictures},
    distributed::Ranks,
    experiment::{Curve, CurveSource, LongEvaluationExperiment, UserError},
    models::{LongVideo, forget, open_long, open_whole},
    safetensors::{read_safetensors, write_safetensors_atomically},
    train::progress::Progress,
};

/// So many videos of each curve are kept as mp4 and as a strip of pictures.
const SHOWN: u64 = 4;

/// The windows of one curve's videos.
pub struct Windows<'a> {
    /// What is measured.
    pub experiment: &'a LongEvaluationExperiment,
    /// Whose videos.
    pub curve: &'a Curve,
    /// The metrics and their extractors.
    pub groups: &'a [MetricGroup],
    /// Who share the videos.
    pub ranks: &'a Ranks,
    /// Where runs are sampled and extractors work.
    pub device: Device,
}

/// What was found of one curve's videos.
pub struct WindowFeatures {
    /// By group of metrics, `[N, windows, …]`.
    pub features: Vec<Tensor>,
    /// Mean absolute difference of neighbouring frames, in grey levels.
    pub motion: f64,
    /// The same where decoded chunks meet, over its median elsewhere; only of sampled videos.
    pub seam: Option<f64>,
    /// All that the videos depend on.
    pub settings: Value,
}

/// Takes a video in pieces, and gives the features of its windows and the differences of its frames.
struct Reader<'a> {
    groups: &'a [MetricGroup],
    window: i64,
    /// Windows that go through the extractors at once.
    at_once: usize,
    /// Windows that have not: `[3, window, H, W]`.
    waiting: Vec<Tensor>,
    /// `[3, f, H, W]`: frames that do not fill a window yet.
    pending: Option<Tensor>,
    last: Option<Tensor>,
    /// By group, then by what went through at once.
    features: Vec<Vec<Tensor>>,
    steps: Vec<Tensor>,
    /// The first frame of each window.
    firsts: Vec<Tensor>,
}

impl<'a> Reader<'a> {
    fn new(groups: &'a [MetricGroup], window: i64, device: Device) -> Self {
        Reader {
            groups,
            window,
            at_once: if device.is_cuda() { clips_at_once(device, window) as usize } else { 1 },
            waiting: Vec::new(),
            pending: None,
            last: None,
            features: groups.iter().map(|_| Vec::new()).collect(),
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
        for (group, features) in self.groups.iter().zip(&mut self.features) {
            features.push(group.extractor.features(&windows)?);
        }
        Ok(())
    }

    /// By group features `[windows, …]`, and last the mean differences of neighbouring frames, `[F − 1]`.
    fn finish(mut self) -> Result<Vec<Tensor>> {
        if !self.waiting.is_empty() {
            self.extract()?;
        }
        Ok(self.features.iter().chain([&self.steps]).map(|rows| Tensor::cat(rows, 0)).collect())
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

    /// Samples or reads the videos, and extracts the features of their windows. What is sampled a batch at a time is kept
    /// in files of the curve's folder, with which an interrupted evaluation goes on.
    ///
    /// # Errors
    /// Runs or videos that are not there; files of other settings; a full disk.
    pub fn measure(&self) -> Result<WindowFeatures> {
        match &self.curve.source {
            CurveSource::Sampled(config) => {
                self.sampled(&open_long(config, self.experiment.frames, self.device)?, config.batch)
            }
            CurveSource::Run(config) => {
                self.sampled(&open_whole(config, self.experiment.frames, self.device)?, config.batch)
            }
            CurveSource::Videos { data } => self.read(data),
        }
    }

    /// Sampled a batch at a time; what is measured of a batch is kept in a file. Batches are shared among ranks.
    fn sampled(&self, long: &LongVideo, batch: i64) -> Result<WindowFeatures> {
        let LongEvaluationExperiment { seed, videos, real, .. } = self.experiment;
        let _prepared = long.keep_prepared();
        let settings = long.settings(*seed);
        let batches: Vec<Vec<u64>> = (0..*videos)
            .step_by(batch as usize)
            .map(|first| (first..(first + batch as u64).min(*videos)).collect())
            .collect();
        let mut bar = Progress::new(&self.curve.name, videos * long.plan.steps.len() as u64, 0);
        bar = bar.shown(self.ranks.is_first());
        let names = self.tensor_names();
        let (features, steps) = self.share(batches.len(), |i| {
            let mut made_with = json!({"settings": settings, "samples": batches[i], "window": real.frames,
                "extractor": self.groups[0].extractor.weights_sha256()});
            if let Some(extractors) = self.extractors() {
                made_with["extractors"] = extractors;
            }
            let file = self.folder().join(format!("windows-{:05}.safetensors", batches[i][0]));
            if let Some(tensors) = measured_before(&file, &names, &made_with)? {
                return Ok(tensors);
            }
            let tensors = self.sample(long, &batches[i], &mut bar)?;
            let named: Vec<(&str, &Tensor)> = names.iter().map(String::as_str).zip(&tensors).collect();
            write_safetensors_atomically(&file, &named, &made_with)?;
            forget(&self.state(batches[i][0]))?;
            Ok(tensors)
        })?;
        bar.finish();
        let seam = seam(&steps, &long.seams())?;
        Ok(WindowFeatures { features, motion: steps.mean(None).double_value(&[]), seam, settings })
    }

    /// What features depend on besides the hash of the first extractor's weights, which says all of a single network.
    fn extractors(&self) -> Option<Value> {
        let is_single = self.groups.len() == 1 && self.groups[0].extractor.library().is_none();
        let one = |group: &MetricGroup| {
            let extractor = &group.extractor;
            json!([extractor.name(), extractor.weights_sha256(), extractor.preparation(), extractor.library()])
        };
        (!is_single).then(|| self.groups.iter().map(one).collect())
    }

    /// What the tensors of a file of measured windows are called: features by group, and last the differences.
    fn tensor_names(&self) -> Vec<String> {
        let name = |group| if group == 0 { "features".to_string() } else { format!("features-{group}") };
        (0..self.groups.len()).map(name).chain(["steps".to_string()]).collect()
    }

    /// Tensors whose first axis is that of videos, features by group and last differences: each piece measured by one
    /// rank, all known to all.
    fn share(
        &self,
        count: usize,
        mut measure: impl FnMut(usize) -> Result<Vec<Tensor>>,
    ) -> Result<(Vec<Tensor>, Tensor)> {
        let mut own: VecDeque<VecDeque<Tensor>> = VecDeque::new();
        let first = self.ranks.share(count, |i| {
            let mut tensors: VecDeque<Tensor> = measure(i)?.into();
            let first = tensors.pop_front().context("features of one extractor at least")?;
            own.push_back(tensors);
            Ok(first)
        })?;
        let mut shared = vec![Tensor::cat(&first, 0)];
        for _ in 0..self.groups.len() {
            let mut own = own.iter_mut();
            let next =
                self.ranks.share(count, |_| own.next().and_then(VecDeque::pop_front).context("measured above"))?;
            shared.push(Tensor::cat(&next, 0));
        }
        let steps = shared.pop().context("differences come last")?;
        Ok((shared, steps))
    }

    /// One batch: by group features `[n, windows, …]`, and last differences of neighbouring frames `[n, F − 1]`.
    fn sample(&self, long: &LongVideo, samples: &[u64], bar: &mut Progress) -> Result<Vec<Tensor>> {
        let LongEvaluationExperiment { seed, real, .. } = self.experiment;
        let (first, clips) = (samples[0], long.plan.steps.len() as u64);
        let end = (first + samples.len() as u64) * clips;
        let z = long.latents(samples, *seed, &self.state(first), &mut |clip| bar.step(first * clips + clip, ""))?;
        let mut videos = Vec::new();
        for (i, &sample) in samples.iter().enumerate() {
            bar.step(end, &format!("measuring video {sample}"));
            let mut reader = Reader::new(self.groups, real.frames, self.device);
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
            videos.push(reader.finish()?);
        }
        let stacked = |i| Tensor::stack(&videos.iter().map(|tensors| &tensors[i]).collect::<Vec<_>>(), 0);
        Ok((0..=self.groups.len()).map(stacked).collect())
    }

    /// The first frames of each of the first videos of a dataset. Ranks share the videos.
    fn read(&self, data: &DataConfig) -> Result<WindowFeatures> {
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
            let mut reader = Reader::new(self.groups, real.frames, self.device);
            for window in 0..frames / real.frames {
                let start = window * real.frames * spec.frame_stride;
                let pictures = source
                    .read(start, real.frames, spec.frame_stride)
                    .with_context(|| format!("{}: {frames} frames are measured", entry.name))?;
                reader.take(&Tensor::from_slice(&spec.fit(&pictures)).reshape([3, real.frames, side, side]))?;
            }
            let tensors = reader.finish()?;
            bar.step(i as u64 + 1, "");
            Ok(tensors.iter().map(|tensor| tensor.unsqueeze(0)).collect())
        })?;
        bar.finish();
        let motion = steps.mean(None).double_value(&[]);
        Ok(WindowFeatures { features, motion, seam: None, settings: serde_json::to_value(data)? })
    }
}

/// Frames a second of the videos that are kept.
const FPS: f64 = 8.0;

/// The tensors of these names in a file, if it is there.
fn measured_before(file: &Path, names: &[String], made_with: &Value) -> Result<Option<Vec<Tensor>>> {
    if !file.exists() {
        return Ok(None);
    }
    let (mut tensors, before) = read_safetensors(file)?;
    if before.as_ref() != Some(made_with) {
        let text =
            format!("{} was measured with other settings; delete its folder, or give another out", file.display());
        return Err(UserError(text).into());
    }
    let mut take = |name: &String| tensors.remove(name).with_context(|| format!("{} holds no {name}", file.display()));
    Ok(Some(names.iter().map(&mut take).collect::<Result<_>>()?))
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
