//! Long videos of latent diffusion (paper, section 3.3): autoregressive by a run that was trained with given frames, or
//! hierarchical with a second one that fills gaps.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{
    assignment::{Asked, Assignment},
    latent_diffusion::{FramesOfClip, LatentConditions, LatentDiffusion},
    long_video::{FittedClips, LongVideo, LongVideoModel},
    model::{Classes, VideoModel},
};
use crate::{
    data::to_u8,
    diffusion::{GuidanceConfig, LongVideoPlan},
    experiment::{LongVideoConfig, UserError},
    torch::Readback,
};

/// Frames of a video at most: its plan is made in memory.
const MOST: i64 = 10_000_000;

fn wrong<T>(text: String) -> Result<T> {
    Err(UserError(text).into())
}

/// Opens the runs, on a device with their weights, else as an outline by which nothing can be made, and plans a video of
/// `frames` frames.
///
/// # Errors
/// [`UserError`] for settings that do not fit the runs or each other; damaged or foreign weights.
pub(super) fn open(config: &LongVideoConfig, frames: i64, device: Option<Device>) -> Result<LongVideo> {
    let read = |run: &Path| match device {
        Some(device) => Ok(LatentDiffusion::open(run, device)?.0),
        None => LatentDiffusion::outline(run),
    };
    let open = |run: &PathBuf| {
        let mut generator = read(run)?;
        if generator.blocks.is_none() {
            let checked = config.guidance.validate(generator.conditioning.as_ref());
            checked.map_err(|error| UserError(format!("{}: guidance: {error:#}", run.display())))?;
        } else if config.guidance != GuidanceConfig::default() {
            return wrong(format!(
                "{}: guidance: a network that makes blocks is given the frames around them, and there is no guidance by them",
                run.display()
            ));
        }
        generator.set_numerics(config.numerics());
        if let Some(sampler) = &config.sampler {
            generator.set_sampling(sampler).map_err(|error| UserError(format!("sampler: {error:#}")))?;
        }
        Ok::<_, anyhow::Error>(generator)
    };
    let prediction = open(&config.prediction)?;
    if let Some(blocks) = &prediction.blocks {
        if config.interpolation.is_some() || config.gap.is_some() {
            return wrong(format!(
                "{} makes blocks that follow from each other: there is no gap, and nothing to interpolate",
                config.prediction.display()
            ));
        }
        let total = prediction.space.chunks().latent_frames_for(frames);
        let made = prediction.latent[1];
        let plan = LongVideoPlan::of_blocks(total, blocks.past, made, made + blocks.around())
            .map_err(|error| UserError(format!("{error:#}")))?;
        return LongVideo::new(Box::new(prediction), None, plan, frames, config);
    }
    let interpolation = config.interpolation.as_ref().map(open).transpose()?;
    if interpolation.as_ref().is_some_and(|run| run.blocks.is_some()) {
        return wrong("the interpolation run makes blocks that follow from each other, and fills no gaps".into());
    }
    let stride = prediction.latent_stride;
    let gap = match (&interpolation, config.gap) {
        (None, Some(gap)) => return wrong(format!("gap {gap}: nothing fills it without an interpolation run")),
        (None, None) if stride > 1 => {
            return wrong(format!(
                "{} makes every {stride}th latent frame: an interpolation run must fill the gaps",
                config.prediction.display()
            ));
        }
        (None, None) => 1,
        (Some(_), gap) => gap.unwrap_or(stride),
    };
    if let Some(interpolation) = &interpolation {
        let shape = |generator: &LatentDiffusion| {
            let ([c, _, h, w], normalization) = (generator.latent, generator.space.normalization);
            (c, h, w, normalization.scale, normalization.shift)
        };
        if shape(&prediction) != shape(interpolation) {
            return wrong("the prediction and the interpolation run live in different latent spaces".into());
        }
        if gap < 2 {
            return wrong(format!("a gap of {gap} between latent frames leaves nothing to interpolate"));
        }
        if gap != stride {
            tracing::warn!("a gap of {gap} latent frames; the prediction run was trained on {stride}");
        }
        let trained = interpolation.latent[1];
        if gap + 1 != trained && !interpolation.takes_other_clips {
            return wrong(format!(
                "with a gap of {gap} the interpolation run would make clips of {} latent frames, and its network takes \
                     those of its training alone, {trained}: give --gap {}",
                gap + 1,
                trained - 1
            ));
        }
        if gap + 1 != trained {
            tracing::warn!(
                "clips of {} latent frames fill a gap; the interpolation run was trained on {trained}",
                gap + 1
            );
        }
    }
    let trained = prediction.conditioning.as_ref().filter(|_| config.guidance.reconstruction.is_none());
    if let Some(prefixes) = trained.map(|trained| &trained.prefixes).filter(|known| !known.contains(&config.overlap)) {
        tracing::warn!("an overlap of {}; the prediction run was trained on {prefixes:?} given frames", config.overlap);
    }
    for (name, value) in [("frames", frames), ("batch", config.batch), ("gap", gap), ("overlap", config.overlap)] {
        let least = i64::from(name != "overlap");
        if !(least..=MOST).contains(&value) {
            return wrong(format!("{name} must be a number from {least} to {MOST}, not {value}"));
        }
    }
    let total = prediction.space.chunks().latent_frames_for(frames);
    let plan = LongVideoPlan::for_frames(total, prediction.latent[1], config.overlap, gap)
        .map_err(|error| UserError(format!("{error:#}")))?;
    let interpolation = interpolation.map(|model| Box::new(model) as Box<dyn LongVideoModel>);
    LongVideo::new(Box::new(prediction), interpolation, plan, frames, config)
}

impl LongVideoModel for LatentDiffusion {
    fn model(&self) -> &dyn VideoModel {
        self
    }

    fn frame(&self) -> ([i64; 3], Kind) {
        let [c, _, h, w] = self.latent;
        ([c, h, w], Kind::Float)
    }

    fn fitted(&self, asked: &FittedClips, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        let &FittedClips { clips, length, places, given, guidance } = asked;
        let frames = FramesOfClip { indices: places, frames: given, guidance };
        // all clips of a video are of its class; guidance is that of the given frames
        let in_turn = Assignment::within(&self.accepts(), Asked::default());
        let numbers = in_turn.classes(&clips.iter().map(|clip| clip.sample).collect::<Vec<_>>());
        let conditions = LatentConditions {
            frames: (!places.is_empty()).then_some(frames),
            classes: (!numbers.is_empty()).then_some(Classes { numbers: &numbers, guidance: 1.0 }),
            ..LatentConditions::default()
        };
        self.clips(clips, length, &conditions, self.sampler, on_step)
    }

    fn decode_long(&self, z_0: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let _numerics = self.numerics.begin(self.space.device());
        self.space.decode_long(z_0, &mut |piece| hand_on(&Readback::of(&to_u8(piece))?.wait()?))
    }

    fn seams(&self, frames: i64) -> Vec<(i64, i64)> {
        self.space.chunks().seams(frames)
    }
}
