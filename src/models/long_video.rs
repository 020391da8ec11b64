//! Long videos (paper, section 3.3): the clips of a plan, each fitted to frames of earlier ones, then decoding
//! in chunks. What a family of models gives for it is a [`LongVideoModel`].

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::model::{ClipId, VideoModel};
use crate::{
    diffusion::{GuidanceConfig, LongVideoPlan, PlanStep, Role},
    experiment::LongVideoConfig,
    run::weights_of,
    safetensors::{read_safetensors, write_safetensors_atomically},
    torch::{FixedWeights, Readback, upload},
};

/// A model that makes the clips of a long video. What it makes them of is its own: normalised latents, codes, pixels. The
/// frames of a plan are frames of these.
pub trait LongVideoModel {
    /// The same model, as it makes single clips.
    fn model(&self) -> &dyn VideoModel;

    /// The shape `[C, h, w]` of a frame, and the kind of its numbers.
    fn frame(&self) -> ([i64; 3], Kind);

    /// One clip for each number, `[N, C, length, h, w]` where it computes, fitted to the given frames; what comes back in the
    /// places of these is not read. A clip depends on its numbers and on what it is given, and on nothing else.
    /// `on_step(i, steps)` is called at each step.
    ///
    /// # Errors
    /// What the model cannot be given; those of the device.
    fn fitted(&self, asked: &FittedClips, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor>;

    /// `[1, C, F, h, w]` of any length → the video in pieces, u8 `[3, f, H, W]`, in order.
    ///
    /// # Errors
    /// Those of `hand_on`.
    fn decode_long(&self, z: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()>;

    /// The frames of a video of so many frames of the plan at which one decoded chunk gives way to the next, as (first,
    /// count); none where it is decoded whole.
    fn seams(&self, frames: i64) -> Vec<(i64, i64)>;
}

/// The clips of one pass of a model.
pub struct FittedClips<'a> {
    /// Which clips.
    pub clips: &'a [ClipId],
    /// Frames of each.
    pub length: i64,
    /// The places of the given frames in each clip; none in a clip that begins a video.
    pub places: &'a [i64],
    /// The given frames `[N, C, k, h, w]`, where the model computes.
    pub given: &'a Tensor,
    /// Weight, form and noise level of guidance by the given frames, of models that have it.
    pub guidance: GuidanceConfig,
}

/// The models of a long video, and its plan.
pub struct LongVideo {
    pub(super) prediction: Box<dyn LongVideoModel>,
    pub(super) interpolation: Option<Box<dyn LongVideoModel>>,
    /// Which frames are made in which clip.
    pub plan: LongVideoPlan,
    /// Frames of the video.
    pub frames: i64,
    pub(super) guidance: GuidanceConfig,
    /// Clips in one pass of a model.
    pub(super) batch: i64,
    /// All that the videos depend on besides seed and number.
    pub(super) settings: Value,
}

/// What a file of unfinished latents says of itself: it holds the frames that one pass of a model added.
#[derive(Serialize, Deserialize)]
struct Standing {
    /// Steps of the plan that are done with it.
    steps: usize,
    settings: Value,
}

impl LongVideo {
    /// A video of `frames` frames by models that fit together and a plan for them. A plan with gaps needs an interpolation.
    ///
    /// # Errors
    /// A run that has gone.
    pub fn new(
        prediction: Box<dyn LongVideoModel>,
        interpolation: Option<Box<dyn LongVideoModel>>,
        plan: LongVideoPlan,
        frames: i64,
        config: &LongVideoConfig,
    ) -> Result<Self> {
        let weights = config.interpolation.as_deref().map(weights_of).transpose()?.flatten();
        let LongVideoConfig { overlap, gap, guidance, precision, tf32, .. } = config;
        let sampler = prediction.model().sampling();
        let mut settings = json!({
            "prediction": weights_of(&config.prediction)?, "interpolation": weights, "overlap": overlap, "gap": gap,
            "guidance": guidance, "sampler": sampler, "precision": precision, "tf32": tf32, "frames": frames,
        });
        let other = interpolation.as_ref().map(|model| model.model().sampling()).filter(|other| *other != sampler);
        if let Some(other) = other {
            settings["interpolation_sampler"] = other;
        }
        Ok(LongVideo { prediction, interpolation, plan, frames, guidance: *guidance, batch: config.batch, settings })
    }

    /// Everything that the videos of a seed depend on, besides their numbers.
    pub fn settings(&self, seed: u64) -> Value {
        let mut settings = self.settings.clone();
        settings["seed"] = json!(seed);
        settings
    }

    /// What the numbered videos are decoded from, `[N, C, F, h, w]` on the host. What is done is kept in the folder
    /// `state`, a file for each pass of a model, with which an interrupted call goes on; the caller deletes it
    /// ([`forget`]). `on_clip` counts clips: those of the plan, for each sample.
    /// Sample i depends on the seed and i alone.
    ///
    /// # Errors
    /// A state of other settings; a full disk.
    pub fn latents(&self, samples: &[u64], seed: u64, state: &Path, on_clip: &mut dyn FnMut(u64)) -> Result<Tensor> {
        let ([c, h, w], kind) = self.prediction.frame();
        let (count, steps) = (samples.len(), &self.plan.steps);
        let settings = json!({"settings": self.settings(seed), "samples": samples});
        let mut z = Tensor::zeros([count as i64, c, self.plan.extent, h, w], (kind, Device::Cpu));
        let mut done = 0;
        let part = |done: usize| state.join(format!("{done:05}.safetensors"));
        let frames_of = |pass: &[PlanStep]| pass.iter().flat_map(|step| step.written.clone()).collect::<Vec<i64>>();
        while done < steps.len() && part(done).exists() {
            let (mut tensors, standing) = read_safetensors(&part(done))?;
            let foreign = || format!("{} holds no unfinished latents", part(done).display());
            let standing: Standing = serde_json::from_value(standing.with_context(foreign)?).with_context(foreign)?;
            ensure!(
                standing.settings == settings,
                "{} was begun with other settings; delete it, or give another folder",
                state.display()
            );
            let pass = steps.get(done..standing.steps).filter(|pass| !pass.is_empty()).with_context(foreign)?;
            let kept = tensors.remove("latents").with_context(foreign)?;
            z = z.index_copy(2, &Tensor::from_slice(&frames_of(pass)), &kept);
            done = standing.steps;
        }
        while done < steps.len() {
            let role = steps[done].model;
            // clips of a prediction follow from each other; gaps do not
            let together = match role {
                Role::Prediction => 1,
                Role::Interpolation => (self.batch as usize / count).max(1),
            };
            let pass = &steps[done..(done + together).min(steps.len())];
            let model = match role {
                Role::Prediction => &self.prediction,
                Role::Interpolation => {
                    self.interpolation.as_ref().context("a plan with gaps, and nothing fills them")?
                }
            };
            let clips: Vec<ClipId> = (done..done + pass.len())
                .flat_map(|clip| samples.iter().map(move |&sample| ClipId { seed, sample, clip: clip as u64 }))
                .collect();
            let first = &pass[0];
            let given: Vec<Tensor> =
                pass.iter().map(|step| z.index_select(2, &Tensor::from_slice(&step.given))).collect();
            let given = upload(&Tensor::cat(&given, 0), model.model().device());
            let places = first.places(&first.given);
            let asked = FittedClips {
                clips: &clips,
                length: first.length,
                places: &places,
                given: &given,
                guidance: self.guidance,
            };
            let base = (done * count) as u64;
            let made = model.fitted(&asked, &mut |i, n| on_clip(base + (clips.len() * i / n) as u64))?;
            let made = Readback::of(&made)?.wait()?;
            let of_step = |(i, step): (usize, &PlanStep)| {
                let places = Tensor::from_slice(&step.places(&step.written));
                made.narrow(0, (i * count) as i64, count as i64).index_select(2, &places)
            };
            let added = Tensor::cat(&pass.iter().enumerate().map(of_step).collect::<Vec<_>>(), 2);
            z = z.index_copy(2, &Tensor::from_slice(&frames_of(pass)), &added);
            let standing = Standing { steps: done + pass.len(), settings: settings.clone() };
            write_safetensors_atomically(&part(done), &[("latents", &added)], &serde_json::to_value(standing)?)?;
            done += pass.len();
        }
        Ok(z.narrow(2, 0, self.plan.frames))
    }

    /// One video's `[1, C, F, h, w]` of [`Self::latents`] → the video in pieces, u8 `[3, f, H, W]` on the host, in order; together they are
    /// its frames.
    ///
    /// # Errors
    /// Those of `hand_on`.
    pub fn decode(&self, z_0: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let mut left = self.frames;
        self.prediction.decode_long(z_0, &mut |piece| {
            let count = piece.size()[1].min(left);
            left -= count;
            if count > 0 { hand_on(&piece.narrow(1, 0, count)) } else { Ok(()) }
        })
    }

    /// As [`VideoModel::keep_prepared`], of all its models.
    pub fn keep_prepared(&self) -> Option<FixedWeights> {
        self.prediction.model().keep_prepared()
    }

    /// Height and width in pixels.
    pub fn size(&self) -> [i64; 2] {
        let [_, _, height, width] = self.prediction.model().clip();
        [height, width]
    }

    /// The frames at which one decoded chunk gives way to the next, as (first, count).
    pub fn seams(&self) -> Vec<(i64, i64)> {
        self.prediction.seams(self.plan.frames)
    }
}

/// Deletes a state that is no longer needed.
///
/// # Errors
/// The disk's.
pub fn forget(state: &Path) -> Result<()> {
    fs::remove_dir_all(state).with_context(|| format!("cannot delete {}", state.display()))
}
