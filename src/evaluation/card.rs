//! A card: one set of samples under every protocol, beside baselines.

use std::{collections::BTreeMap, io::Write, path::Path, time::Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::{
    evaluate::{Evaluation, FROM_FILES, open_model},
    extraction::Bar,
    generated_clips::{check_count, features_of_files},
    measurement::{Measurement, RealWork},
    metric_group::MetricGroup,
    real_clips::{Baselines, RealClips},
    sampled::Sampled,
    sensitivity::Sensitivity,
    warnings,
};
use crate::{
    atomic_file::write_atomically,
    data::{ClipStream, DataConfig, DatasetConfig, Packed, PackedWriter, decode_workers},
    distributed::Ranks,
    experiment::{EvaluationExperiment, Generated, built_in_protocols},
    metrics::ProtocolConfig,
    models::VideoModel,
    run_files::CARD_FILE,
    torch::device_name,
};

/// What a card found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Card {
    /// One a protocol.
    #[serde(rename = "reports")]
    pub evaluations: Vec<Evaluation>,
    /// How each metric answers to faults of videos, under the first protocol that is measured; none of fewer
    /// than four real clips.
    #[serde(default)]
    pub sensitivity: Option<Sensitivity>,
    /// Protocols under which the samples could not be measured, and why.
    pub not_measured: BTreeMap<String, String>,
}

/// Generated clips in files.
struct Files {
    samples: DataConfig,
    /// Decoded Gaussian latents of a run.
    gaussian: Option<DataConfig>,
    /// What they are, in a line.
    text: String,
    /// The same as settings.
    generated: Generated,
    /// Time of sampling.
    seconds: f64,
}

/// Samples of a run lie, as they are, in a file between sampling and measuring.
fn to_files(
    experiment: &EvaluationExperiment,
    model: Option<&dyn VideoModel>,
    real: &RealClips,
    count: i64,
) -> Result<Files> {
    let EvaluationExperiment { seed, generated, out, .. } = experiment;
    let begin = Instant::now();
    let (sampled, batch) = match (generated, model) {
        (Generated::Clips { data }, _) => {
            return Ok(Files {
                samples: data.clone(),
                gaussian: None,
                text: FROM_FILES.to_string(),
                generated: generated.clone(),
                seconds: 0.0,
            });
        }
        (Generated::Run { batch, .. }, Some(model)) => {
            (Sampled::new(model, generated, real, *seed)?.expect("a run is sampled"), *batch)
        }
        (Generated::Run { .. }, None) => unreachable!("a run has a model"),
    };
    let [_, frames, side, _] = sampled.model.clip();
    let _prepared = sampled.model.keep_prepared();
    let write = |name: &str, make: &dyn Fn(&[u64]) -> Result<Tensor>| -> Result<DataConfig> {
        let file = out.join(format!("{name}.safetensors"));
        let mut writer = PackedWriter::create(&file, count, frames, side, *seed)?;
        let mut bar = Bar::new(name, count, &Ranks::alone());
        for first in (0..count as u64).step_by(batch as usize) {
            let samples: Vec<u64> = (first..(first + batch as u64).min(count as u64)).collect();
            writer.push(&make(&samples)?)?;
            bar.advance(samples.len() as u64);
        }
        bar.finish();
        writer.finish()?;
        let dataset = DatasetConfig::Packed(Packed { file });
        Ok(DataConfig { dataset, frames, frame_stride: 1, resolution: side, flip: false, workers: decode_workers() })
    };
    let samples = write("samples", &|samples| sampled.videos(samples))?;
    let gaussian = sampled.model.codec_baselines();
    let gaussian =
        gaussian.map(|codec| write("gaussian", &|samples| codec.gaussian_videos(samples, *seed))).transpose()?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(Files { samples, gaussian, text: sampled.line(), generated: sampled.recorded(generated), seconds })
}

/// The frames of a data set's first video that can be opened.
fn frames_of(data: &DataConfig) -> Result<i64> {
    let videos = data.videos()?.videos;
    let mut opened = videos.iter().map(|video| Ok(video.source.open()?.frames()));
    opened.next().context("no generated videos")?
}

/// Measures under the experiment's own protocol and every known one, and writes the card into the experiment's folder.
/// A protocol that asks for more clips than there are is measured at as many as there are, and named so.
///
/// # Errors
/// Data or weights that are not there; a full disk.
pub fn card(experiment: &EvaluationExperiment, device: Device) -> Result<Card> {
    let EvaluationExperiment { seed, real, train, out, .. } = experiment;
    let own = experiment.protocol()?;
    if let Generated::Clips { data } = &experiment.generated {
        check_count(&own, data.videos()?.videos.len() as i64)?;
    }
    let real_clips = RealClips::new(real, &own, *seed)?;
    let groups = MetricGroup::open(&own, &experiment.evaluation.metrics(), device)?;
    warnings::of_inputs(real, &experiment.generated)?;
    let model = open_model(&experiment.generated, device)?;
    let Files { samples, gaussian, text, generated, seconds } =
        to_files(experiment, model.as_deref(), &real_clips, own.clips)?;
    // its memory is free for the features
    drop(model);
    let there = samples.videos()?.videos.len() as i64;
    let frames = frames_of(&samples)?;
    let alone = Ranks::alone();
    let known =
        built_in_protocols().into_iter().filter(|known| Some(known.name.as_str()) != own.name.split('@').next());
    let (mut evaluations, mut not_measured, mut sensitivity) = (Vec::new(), BTreeMap::new(), None);
    let first = ProtocolConfig { runs: if own.redraw.generated() { 1 } else { own.runs }, ..own.clone() };
    for protocol in std::iter::once(first).chain(known) {
        let clips = protocol.clips.min(there);
        let protocol = &ProtocolConfig { extractor: own.extractor.clone(), ..protocol }.at(clips);
        if let Some(why) = obstacle(protocol, real, frames, *seed) {
            not_measured.insert(protocol.name.clone(), why);
            continue;
        }
        let begin = Instant::now();
        let measurement = Measurement { protocol, groups: &groups, device, ranks: &alone, seed: *seed };
        let real_clips = RealClips::new(real, protocol, *seed)?;
        warnings::of_protocol(protocol, &real_clips, &Generated::Clips { data: samples.clone() }, None)?;
        let work = RealWork { baselines: Baselines { frozen: true, shuffled: true }, train: train.as_ref() };
        let sets = 1 + i64::from(gaussian.is_some());
        let work_in_all = measurement.real_work(&real_clips, work)
            + sets * clips
            + if evaluations.is_empty() { Sensitivity::work(measurement) } else { 0 };
        let mut bar = Bar::new(&protocol.name, work_in_all, &alone);
        let real_sets = measurement.real_sets(&real_clips, work, &mut bar)?;
        let mut figures = real_sets.baselines()?;
        for (name, data) in [("samples", Some(&samples)), ("gaussian", gaussian.as_ref())] {
            let Some(data) = data else { continue };
            let sets = features_of_files(protocol, data, &measurement.extractors(), &mut bar)?;
            figures.insert(name.to_string(), real_sets.figure(&sets)?);
        }
        figures.extend(real_sets.real_figure()?.map(|figure| ("real".to_string(), figure)));
        if evaluations.is_empty() {
            sensitivity = Sensitivity::measure(measurement, &real_clips, &mut bar)?;
        }
        bar.finish();
        let protocol = real_clips.protocol(&groups);
        evaluations.push(Evaluation {
            figures,
            generated: generated.clone(),
            generated_text: text.clone(),
            real_vs_real: real_sets.real_vs_real()?,
            psnr_db: None,
            psnr_of: None,
            protocol_hash: protocol.hash(),
            protocol_text: protocol.line(),
            protocol,
            device: device_name(device),
            sample_seconds: seconds,
            evaluate_seconds: begin.elapsed().as_secs_f64(),
        });
    }
    let card = Card { evaluations, sensitivity, not_measured };
    write(&card, &out.join(CARD_FILE))?;
    Ok(card)
}

fn write(card: &Card, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(card)?;
    write_atomically(path, |file| Ok(file.write_all(text.as_bytes())?))
}

/// Why samples of so many frames cannot be measured under a protocol, if so.
fn obstacle(protocol: &ProtocolConfig, real: &DataConfig, frames: i64, seed: u64) -> Option<String> {
    if let Some(whole) = protocol.windows_of {
        return Some(format!("it is a curve along videos of {whole} frames, which `lvdm evaluate-long` draws"));
    }
    if frames < protocol.frames {
        return Some(format!("it measures clips of {} frames, and the samples have {frames}", protocol.frames));
    }
    if let Err(error) = protocol.validate() {
        return Some(format!("{error:#}"));
    }
    let clip = ClipStream::new(&protocol.applied_to(real), protocol.draw, protocol.fit, seed);
    match clip.and_then(|mut clips| clips.next()) {
        Ok(Some(_)) => None,
        Ok(None) => Some(format!("no real video has {} frames", protocol.frames)),
        Err(error) => Some(format!("no real clip of it can be read: {error:#}")),
    }
}
