//! Long videos (paper, section 3.3): the clips of a plan, each fitted to frames of earlier ones, then decoding
//! in chunks.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{
    assignment::{Asked, Assignment},
    latent_diffusion::{ClipId, FramesOfClip, LatentConditions, LatentDiffusion},
    model::{Classes, VideoModel},
};
use crate::{
    codecs::Chunks,
    data::to_u8,
    diffusion::{LongVideoPlan, PlanStep, Role},
    experiment::{LongVideoConfig, UserError},
    run::weights_of,
    safetensors::{read_safetensors, write_safetensors_atomically},
    torch::{FixedWeights, Readback, upload},
};

/// The networks of a long video, and its plan.
pub struct LongVideo {
    prediction: LatentDiffusion,
    interpolation: Option<LatentDiffusion>,
    config: LongVideoConfig,
    /// Which frames are made in which clip.
    pub plan: LongVideoPlan,
    /// Frames of the video.
    pub frames: i64,
}

/// Frames of a video at most: its plan is made in memory.
const MOST: i64 = 10_000_000;

/// What a file of unfinished latents says of itself: it holds the frames that one pass of a network added.
#[derive(Serialize, Deserialize)]
struct Standing {
    /// Steps of the plan that are done with it.
    steps: usize,
    settings: Value,
}

fn conditional(run: &Path, generator: LatentDiffusion) -> Result<LatentDiffusion> {
    if generator.conditioning.is_none() {
        let run = run.display();
        return Err(UserError(format!(
            "{run} was trained without given frames; a long video needs a run whose experiment has `conditioning`"
        ))
        .into());
    }
    Ok(generator)
}

impl LongVideo {
    /// Opens the networks and plans a video of `frames` frames.
    ///
    /// # Errors
    /// [`UserError`] for settings that do not fit the runs or each other; damaged or foreign weights.
    pub fn open(config: &LongVideoConfig, frames: i64, device: Device) -> Result<Self> {
        Self::of(config, frames, &|run| Ok(LatentDiffusion::open(run, device)?.0))
    }

    /// As [`Self::open`] without the networks' weights: a plan, by which nothing can be made.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn outline(config: &LongVideoConfig, frames: i64) -> Result<Self> {
        Self::of(config, frames, &LatentDiffusion::outline)
    }

    fn of(config: &LongVideoConfig, frames: i64, open: &dyn Fn(&Path) -> Result<LatentDiffusion>) -> Result<Self> {
        let wrong = |text: String| Err(UserError(text).into());
        let open = |run: &PathBuf| {
            let mut generator = conditional(run, open(run)?)?;
            generator.set_numerics(config.numerics());
            if let Some(sampler) = &config.sampler {
                generator.set_sampling(sampler).map_err(|error| UserError(format!("sampler: {error:#}")))?;
            }
            Ok::<_, anyhow::Error>(generator)
        };
        let prediction = open(&config.prediction)?;
        let interpolation = config.interpolation.as_ref().map(open).transpose()?;
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
        for generator in [Some(&prediction), interpolation.as_ref()].into_iter().flatten() {
            let conditioning = generator.conditioning.as_ref().expect("checked when opened");
            config.guidance.validate(conditioning).map_err(|error| UserError(format!("guidance: {error:#}")))?;
        }
        let prefixes = &prediction.conditioning.as_ref().expect("checked when opened").prefixes;
        if !prefixes.contains(&config.overlap) {
            tracing::warn!(
                "an overlap of {}; the prediction run was trained on {prefixes:?} given frames",
                config.overlap
            );
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
        Ok(LongVideo { prediction, interpolation, config: config.clone(), plan, frames })
    }

    /// Everything that the latents of a sample depend on, besides its number.
    ///
    /// # Errors
    /// A run that has gone.
    pub fn settings(&self, seed: u64) -> Result<Value> {
        let interpolation = self.config.interpolation.as_deref().map(weights_of).transpose()?.flatten();
        let LongVideoConfig { overlap, gap, guidance, precision, tf32, .. } = &self.config;
        let sampler = self.prediction.sampling();
        let mut settings = json!({
            "prediction": weights_of(&self.config.prediction)?, "interpolation": interpolation, "overlap": overlap,
            "gap": gap, "guidance": guidance, "sampler": sampler, "precision": precision, "tf32": tf32, "frames": self.frames, "seed": seed,
        });
        let other = self.interpolation.as_ref().map(VideoModel::sampling).filter(|other| *other != sampler);
        if let Some(other) = other {
            settings["interpolation_sampler"] = other;
        }
        Ok(settings)
    }

    /// Normalised latents of the numbered samples, `[N, C, F, h, w]` on the host. What is done is kept in the folder
    /// `state`, a file for each pass of a network, with which an interrupted call goes on; the caller deletes it
    /// ([`forget`]). `on_clip` counts clips: those of the plan, for each sample.
    /// Sample i depends on the seed and i alone.
    ///
    /// # Errors
    /// A state of other settings; a full disk.
    pub fn latents(&self, samples: &[u64], seed: u64, state: &Path, on_clip: &mut dyn FnMut(u64)) -> Result<Tensor> {
        let [c, _, h, w] = self.prediction.latent;
        let (count, steps) = (samples.len(), &self.plan.steps);
        let settings = json!({"settings": self.settings(seed)?, "samples": samples});
        let mut z = Tensor::zeros([count as i64, c, self.plan.extent, h, w], (Kind::Float, Device::Cpu));
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
                Role::Interpolation => (self.config.batch as usize / count).max(1),
            };
            let pass = &steps[done..(done + together).min(steps.len())];
            let generator = match role {
                Role::Prediction => &self.prediction,
                Role::Interpolation => self.interpolation.as_ref().expect("a plan with gaps has it"),
            };
            let clips: Vec<ClipId> = (done..done + pass.len())
                .flat_map(|clip| samples.iter().map(move |&sample| ClipId { seed, sample, clip: clip as u64 }))
                .collect();
            let first = &pass[0];
            let given: Vec<Tensor> =
                pass.iter().map(|step| z.index_select(2, &Tensor::from_slice(&step.given))).collect();
            let frames = upload(&Tensor::cat(&given, 0), generator.space.device());
            let indices = first.places(&first.given);
            let given = FramesOfClip { indices: &indices, frames: &frames, guidance: self.config.guidance };
            // all clips of a video are of its class; guidance is that of the given frames
            let in_turn = Assignment::within(&generator.accepts(), Asked::default());
            let numbers = in_turn.classes(&clips.iter().map(|clip| clip.sample).collect::<Vec<_>>());
            let classes = (!numbers.is_empty()).then_some(Classes { numbers: &numbers, guidance: 1.0 });
            let given = LatentConditions {
                frames: (!indices.is_empty()).then_some(given),
                classes,
                ..LatentConditions::default()
            };
            let base = (done * count) as u64;
            let made = generator.clips(&clips, first.length, &given, generator.sampler, &mut |i, n| {
                on_clip(base + (clips.len() * i / n) as u64);
            })?;
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

    /// Latents `[1, C, F, h, w]` → the video in pieces, u8 `[3, f, H, W]` on the host, in order; together they are
    /// its frames.
    ///
    /// # Errors
    /// Those of `hand_on`.
    pub fn decode(&self, z_0: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let mut left = self.frames;
        let _numerics = self.prediction.numerics.begin(self.prediction.space.device());
        self.prediction.space.decode_long(z_0, &mut |piece| {
            let count = piece.size()[1].min(left);
            left -= count;
            if count > 0 { hand_on(&Readback::of(&to_u8(&piece.narrow(1, 0, count)))?.wait()?) } else { Ok(()) }
        })
    }

    /// As [`VideoModel::keep_prepared`], of both networks.
    pub fn keep_prepared(&self) -> Option<FixedWeights> {
        self.prediction.keep_prepared()
    }

    /// Height and width in pixels.
    pub fn size(&self) -> [i64; 2] {
        let [_, _, height, width] = self.prediction.clip();
        [height, width]
    }

    /// How its latents are cut for decoding.
    pub fn chunks(&self) -> Chunks {
        self.prediction.space.chunks()
    }
}

/// Deletes a state that is no longer needed.
///
/// # Errors
/// The disk's.
pub fn forget(state: &Path) -> Result<()> {
    fs::remove_dir_all(state).with_context(|| format!("cannot delete {}", state.display()))
}
