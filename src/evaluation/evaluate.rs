//! Generated clips against real ones, beside baselines: what `lvdm evaluate` does.

use std::{collections::BTreeMap, io::Write, time::Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::{
    extraction::Bar,
    generated_clips::{check_count, features_of_files, features_of_generator},
    measurement::{Measurement, RealWork},
    metric_group::MetricGroup,
    previews::{Previews, RECONSTRUCTED, Reconstructions},
    real_clips::{Baselines, RealClips},
    sampled::{Sampled, set_up},
    warnings,
};
use crate::{
    atomic_file::write_atomically,
    data::ClipStream,
    distributed::Ranks,
    experiment::{EvaluationExperiment, Generated, UserError},
    metrics::{Figure, Protocol, RealVsReal},
    models::{self, VideoModel},
    run_files::FIGURES_FILE,
    torch::device_name,
};

/// What generated clips are that no run was sampled for.
pub(super) const FROM_FILES: &str = "clips from files";

/// What an evaluation found: what `figures.json` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Evaluation {
    /// By set: `samples`, then the baselines `train`, `frozen`, `gaussian`; on a card `real` and `shuffled` too.
    pub figures: BTreeMap<String, Figure>,
    /// Whose samples they are of.
    pub generated: Generated,
    /// What they are of, at which step of its training, and how they were sampled, in a line.
    #[serde(default)]
    pub generated_text: String,
    /// The real-vs-real baseline: how far two sets of real clips are from each other.
    #[serde(rename = "floor")]
    pub real_vs_real: Option<RealVsReal>,
    /// Of reconstructed real clips, at most 64; only where a run was evaluated.
    pub psnr_db: Option<f64>,
    /// Which clips were reconstructed.
    #[serde(default)]
    pub psnr_of: Option<String>,
    /// What the figures depend on besides the generated clips.
    pub protocol: Protocol,
    /// Equal for protocols whose figures compare.
    pub protocol_hash: String,
    /// The protocol in a line.
    pub protocol_text: String,
    /// Where it was measured.
    pub device: String,
    /// Time of sampling.
    pub sample_seconds: f64,
    /// Time of all the rest.
    pub evaluate_seconds: f64,
}

/// The sets of an evaluation with their meaning, in the order of tables.
pub const SETS: [(&str, &str); 6] = [
    ("samples", "generated"),
    ("train", "real clips that were trained on: a real-vs-real baseline"),
    ("real", "real clips against other real clips: the real-vs-real baseline"),
    ("frozen", "real clips that stand still at their first frame"),
    ("shuffled", "real clips whose frames come in a random order"),
    ("gaussian", "decoded Gaussian latents: no diffusion learned"),
];

/// Measures, and writes `figures.json`, videos and pictures into the experiment's folder. Clips stream by: memory does not
/// grow with their number. Ranks share sampling and features; each sees all clips, and rank 0 writes.
///
/// # Errors
/// Data or weights that are not there; clips that do not fit the protocol; a full disk.
pub fn evaluate(experiment: &EvaluationExperiment, device: Device, ranks: &Ranks) -> Result<Evaluation> {
    let model = open_model(&experiment.generated, device)?;
    measure(experiment, model.as_deref(), device, ranks)
}

/// As [`evaluate`], of a model that is open already, perhaps of a family that this crate does not know: `generated` of the
/// experiment says how it is sampled, and its `run` what it is called.
///
/// # Errors
/// As [`evaluate`]; generated clips that lie in files.
pub fn evaluate_model(
    experiment: &EvaluationExperiment,
    model: &mut dyn VideoModel,
    device: Device,
    ranks: &Ranks,
) -> Result<Evaluation> {
    ensure!(
        matches!(experiment.generated, Generated::Run { .. }),
        "a model is evaluated where generated.kind is run, and here it is clips"
    );
    set_up(model, &experiment.generated)?;
    measure(experiment, Some(model), device, ranks)
}

/// The model of a run, which samples as `generated` says; none where generated clips lie in files.
pub(super) fn open_model(generated: &Generated, device: Device) -> Result<Option<Box<dyn VideoModel>>> {
    let Generated::Run { run, .. } = generated else { return Ok(None) };
    let mut model = models::open(run, device)?;
    set_up(&mut *model, generated)?;
    Ok(Some(model))
}

fn measure(
    experiment: &EvaluationExperiment,
    model: Option<&dyn VideoModel>,
    device: Device,
    ranks: &Ranks,
) -> Result<Evaluation> {
    let EvaluationExperiment { seed, real, generated, train, out, .. } = experiment;
    let config = &experiment.protocol()?;
    let start = Instant::now();
    let real_clips = RealClips::new(real, config, *seed)?;
    if let Generated::Clips { data } = generated {
        check_count(config, data.videos()?.videos.len() as i64)?;
    }
    let groups = MetricGroup::open(config, &experiment.evaluation.metrics(), device)?;
    let measurement = Measurement { protocol: config, groups: &groups, device, ranks, seed: *seed };

    let sampled = model.map(|model| Sampled::new(model, generated, &real_clips, *seed)).transpose()?.flatten();
    if let Some(Sampled { model, .. }) = &sampled {
        let [_, frames, ..] = model.clip();
        if frames < config.frames {
            let text =
                format!("the run makes {frames} frames, and the protocol {} measures {}", config.name, config.frames);
            return Err(UserError(text).into());
        }
    }
    let _prepared = sampled.as_ref().map(|sampled| sampled.model.keep_prepared());
    if ranks.is_first() {
        warnings::of_inputs(real, generated)?;
        warnings::of_protocol(config, &real_clips, generated, sampled.as_ref())?;
    }
    let is_run = sampled.is_some();
    let codec = sampled.as_ref().and_then(|sampled| sampled.model.codec_baselines());
    let baselines = Baselines { frozen: is_run, shuffled: false };
    let real_work = RealWork { baselines, train: train.as_ref() };
    let samples = config.generated_clips() * (config.generated_draws() + i64::from(codec.is_some()));
    let mut bar = Bar::new("evaluate", measurement.real_work(&real_clips, real_work) + samples, ranks);

    let real_sets = measurement.real_sets(&real_clips, real_work, &mut bar)?;
    let mut reconstructions = Reconstructions::default();
    if let Some(codec) = codec {
        let clips = config.applied_to(&experiment.real);
        let mut clips = ClipStream::new(&clips, config.draw, config.fit, *seed)?;
        for _ in 0..config.clips.min(RECONSTRUCTED) {
            let Some(clip) = clips.next()? else { break };
            // pixels are their own
            let Some(back) = codec.reconstructed(&clip)? else { break };
            reconstructions.take(&clip, back);
        }
    }

    let mut figures = real_sets.baselines()?;
    let mut sample_seconds = 0.0;
    let extractors = measurement.extractors();
    let sets = match (generated, &sampled) {
        (Generated::Run { batch, .. }, Some(sampled)) => {
            let [_, frames, side, _] = sampled.model.clip();
            let previews = || Previews::new(out, config.generated_clips(), frames, side, *seed);
            let mut previews = if ranks.is_first() { Some(previews()?) } else { None };
            let sets = features_of_generator(
                config,
                &extractors,
                config.generated_draws(),
                *batch,
                &mut bar,
                &mut |samples| {
                    let begin = Instant::now();
                    let clips = sampled.videos(samples);
                    sample_seconds += begin.elapsed().as_secs_f64();
                    clips
                },
                &mut |clips| previews.as_mut().map_or(Ok(()), |previews| previews.take(clips)),
            )?;
            let mut few: Option<Tensor> = None;
            if let Some(codec) = codec {
                let gaussian = features_of_generator(
                    config,
                    &extractors,
                    1,
                    *batch,
                    &mut bar,
                    &mut |samples| codec.gaussian_videos(samples, *seed),
                    &mut |clips| {
                        few.get_or_insert_with(|| clips.narrow(0, 0, clips.size()[0].min(4)).copy());
                        Ok(())
                    },
                )?;
                figures.insert("gaussian".to_string(), real_sets.figure(&gaussian)?);
            }
            previews.map_or(Ok(()), |previews| previews.finish(&reconstructions, few.as_ref()))?;
            sets
        }
        (Generated::Clips { data }, _) => features_of_files(config, data, &extractors, &mut bar)?,
        (Generated::Run { .. }, None) => unreachable!("opened above"),
    };
    bar.finish();
    figures.insert("samples".into(), real_sets.figure(&sets)?);
    let protocol = real_clips.protocol(&groups);
    let evaluation = Evaluation {
        figures,
        generated: sampled.as_ref().map_or_else(|| generated.clone(), |sampled| sampled.recorded(generated)),
        generated_text: sampled.as_ref().map_or(FROM_FILES.to_string(), Sampled::line),
        real_vs_real: real_sets.real_vs_real()?,
        psnr_db: reconstructions.psnr_db(),
        psnr_of: reconstructions.psnr_db().map(|_| {
            let trained = sampled.as_ref().is_some_and(|sampled| {
                sampled.model.data().is_some_and(|data| data.dataset == experiment.real.dataset)
            });
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
        let text = serde_json::to_string_pretty(&evaluation)?;
        write_atomically(&out.join(FIGURES_FILE), |file| Ok(file.write_all(text.as_bytes())?))?;
    }
    Ok(evaluation)
}
