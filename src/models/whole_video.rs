//! Long videos of any family, each made at once: as long as `lvdm sample --frames` makes them.

use anyhow::{Context, Result};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{
    assignment::{Asked, Assignment, Seeds},
    families,
    long_video::{FittedClips, LongVideo, LongVideoModel},
    model::VideoModel,
};
use crate::{
    diffusion::{GuidanceConfig, LongVideoPlan, PlanStep, Role},
    experiment::{UserError, WholeVideoConfig},
    run::weights_of,
};

/// Frames that are handed on together: a video is whole already, and whoever measures it copies what is handed on.
const PIECE: i64 = 16;

/// A model whose only clip is the video.
struct WholeVideos {
    model: Box<dyn VideoModel>,
    /// What its videos are given: where it knows classes, each in turn.
    assignment: Assignment,
}

/// A run of any family that makes videos of `frames` frames in one piece.
///
/// # Errors
/// [`UserError`] for a length or sampling settings that the model does not have, and for a model that makes videos from texts;
/// a path that is no run; damaged or foreign weights.
pub fn open_whole(config: &WholeVideoConfig, frames: i64, device: Device) -> Result<LongVideo> {
    let mut model = families::open(&config.run, device)?;
    let run = config.run.display();
    model.set_numerics(config.numerics());
    if let Some(sampler) = &config.sampler {
        model.set_sampling(sampler).map_err(|error| UserError(format!("sampler: {error:#}")))?;
    }
    if model.clip()[1] != frames {
        model.resize(Some(frames), None, None).map_err(|error| UserError(format!("{run}: {error:#}")))?;
    }
    let assignment =
        Assignment::new(&*model, Asked::default()).map_err(|error| UserError(format!("{run}: {error:#}")))?;
    let settings = json!({
        "run": weights_of(&config.run)?, "sampler": model.sampling(), "precision": config.precision, "tf32": config.tf32,
        "frames": frames,
    });
    let whole = PlanStep {
        model: Role::Prediction,
        given: Vec::new(),
        written: (0..frames).collect(),
        first: 0,
        spacing: 1,
        length: frames,
    };
    Ok(LongVideo {
        prediction: Box::new(WholeVideos { model, assignment }),
        interpolation: None,
        plan: LongVideoPlan { frames, extent: frames, steps: vec![whole] },
        frames,
        guidance: GuidanceConfig::default(),
        batch: config.batch,
        settings,
    })
}

impl LongVideoModel for WholeVideos {
    fn model(&self) -> &dyn VideoModel {
        &*self.model
    }

    fn frame(&self) -> ([i64; 3], Kind) {
        let [c, _, h, w] = self.model.clip();
        ([c, h, w], Kind::Uint8)
    }

    fn fitted(&self, asked: &FittedClips, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        let seed = asked.clips.first().context("a batch without clips")?.seed;
        let videos: Vec<u64> = asked.clips.iter().map(|clip| clip.sample).collect();
        self.assignment.videos(&*self.model, &videos, &Seeds::One(seed), on_step)
    }

    fn decode_long(&self, videos: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let video = videos.squeeze_dim(0); // [3, F, H, W]
        video.split(PIECE, 1).iter().try_for_each(hand_on)
    }

    fn seams(&self, _: i64) -> Vec<(i64, i64)> {
        Vec::new()
    }
}
