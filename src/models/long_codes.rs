//! Long videos of transformers over codes (Ge et al. 2022, section 3.3): autoregressive with a window that slides, or
//! hierarchical with a second transformer that fills the gaps between sparse frames.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::{
    assignment::{Asked, Assignment},
    code_transformer::CodeTransformer,
    long_video::{FittedClips, LongVideo, LongVideoModel},
    model::VideoModel,
};
use crate::{
    diffusion::{GuidanceConfig, LongVideoPlan},
    experiment::{LongVideoConfig, UserError},
};

/// Opens the runs, on a device with their weights, else as an outline by which nothing can be made, and plans a video of
/// `frames` frames.
///
/// # Errors
/// [`UserError`] for settings that do not fit the runs or each other; damaged or foreign weights.
pub(super) fn open(config: &LongVideoConfig, frames: i64, device: Option<Device>) -> Result<LongVideo> {
    plan(config, frames, device).map_err(|error| match error.is::<UserError>() {
        true => error,
        false => UserError(format!("{error:#}")).into(),
    })
}

fn plan(config: &LongVideoConfig, frames: i64, device: Option<Device>) -> Result<LongVideo> {
    let open = |run: &PathBuf, fills_gaps: bool| {
        let mut model = match device {
            Some(device) => CodeTransformer::open(run, device)?,
            None => CodeTransformer::outline(run)?,
        };
        check_role(run, &model, fills_gaps)?;
        model.set_numerics(config.numerics());
        config.sampler.as_ref().map_or(Ok(()), |sampler| model.set_sampling(sampler)).context("sampler")?;
        Ok::<_, anyhow::Error>(model)
    };
    let prediction = open(&config.prediction, false)?;
    let interpolation = config.interpolation.as_ref().map(|run| open(run, true)).transpose()?;
    ensure!(
        config.guidance == GuidanceConfig::default(),
        "guidance: a transformer over codes has none, neither its weight nor a noise level of given frames"
    );
    let stride = prediction.latent_stride;
    let gap = match &interpolation {
        None => {
            ensure!(
                config.gap.is_none(),
                "gap {}: nothing fills it without an interpolation run",
                config.gap.unwrap_or(0)
            );
            ensure!(
                stride == 1,
                "{} makes every {stride}th latent frame: an interpolation run must fill the gaps",
                config.prediction.display()
            );
            1
        }
        Some(filler) => {
            let gap = config.gap.unwrap_or(stride);
            ensure!(
                filler.latent_stride == 1,
                "the interpolation run was trained on every {}th latent frame, and a gap is filled frame by frame",
                filler.latent_stride
            );
            ensure!(
                filler.trained == gap + 1,
                "the interpolation run fills gaps of {} latent frames from one end to the other, and not of {gap}",
                filler.trained - 1
            );
            let codes = |model: &CodeTransformer| {
                let ([c, _, h, w], normalization) = (model.latent, model.space.normalization);
                (c, h, w, model.vocabulary, normalization.scale, normalization.shift)
            };
            ensure!(
                codes(&prediction) == codes(filler),
                "the prediction and the interpolation run have different codes or classes"
            );
            if gap != stride {
                tracing::warn!("a gap of {gap} latent frames; the prediction run was trained on {stride}");
            }
            gap
        }
    };
    let window = prediction.sampling.window;
    if config.overlap < window {
        tracing::warn!("an overlap of {}: the first frames of a clip do not see a window of {window}", config.overlap);
    }
    ensure!(
        config.overlap >= 1,
        "overlap must be at least 1, not {}: a video goes on from what is there",
        config.overlap
    );
    ensure!(config.batch >= 1, "batch must be at least 1, not {}", config.batch);
    ensure!((1..=10_000_000).contains(&frames), "frames must be a number from 1 to 10000000, not {frames}");
    let total = prediction.space.chunks().latent_frames_for(frames);
    let plan = LongVideoPlan::for_frames(total, prediction.trained, config.overlap, gap)?;
    let interpolation = interpolation.map(|model| Box::new(model) as Box<dyn LongVideoModel>);
    LongVideo::new(Box::new(prediction), interpolation, plan, frames, config)
}

fn check_role(run: &Path, model: &CodeTransformer, fills_gaps: bool) -> Result<()> {
    let run = run.display();
    match (fills_gaps, model.fills_gaps()) {
        (false, true) => Err(UserError(format!(
            "{run} was trained with `interpolation`: it fills the gaps of a video that another run begins (--interpolation)"
        ))
        .into()),
        (true, false) => Err(UserError(format!(
            "{run} was trained without `interpolation`: it does not fill gaps"
        ))
        .into()),
        _ => Ok(()),
    }
}

impl LongVideoModel for CodeTransformer {
    fn model(&self) -> &dyn VideoModel {
        self
    }

    fn frame(&self) -> ([i64; 3], Kind) {
        let [_, _, h, w] = self.latent;
        ([1, h, w], Kind::Int64)
    }

    fn fitted(&self, asked: &FittedClips, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        let &FittedClips { clips, length, places, given, .. } = asked;
        let given = given.squeeze_dim(1); // [N, k, h, w]
        // all clips of a video are of its class
        let in_turn = Assignment::within(&self.accepts(), Asked::default());
        let numbers = in_turn.classes(&clips.iter().map(|clip| clip.sample).collect::<Vec<_>>());
        let classes = (!numbers.is_empty()).then_some(&numbers[..]);
        let codes = if self.fills_gaps() {
            ensure!(places == [0, length - 1], "the places {places:?} of given frames are not the ends of {length}");
            self.filled(clips, &given, classes, on_step)?
        } else {
            ensure!(
                places.iter().zip(0..).all(|(&place, i)| place == i),
                "given frames {places:?} are not the first ones"
            );
            self.codes(clips, length, (!places.is_empty()).then_some(&given), classes, on_step)?
        };
        Ok(codes.unsqueeze(1))
    }

    fn decode_long(&self, codes: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        self.decode_pieces(&codes.squeeze_dim(1), hand_on)
    }

    fn seams(&self, frames: i64) -> Vec<(i64, i64)> {
        self.space.chunks().seams(frames)
    }
}
