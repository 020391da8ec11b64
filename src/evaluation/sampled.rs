//! The model that an evaluation samples.

use std::path::PathBuf;

use anyhow::Result;
use tch::Tensor;

use super::real_clips::RealClips;
use crate::{
    diffusion::SamplerChoice,
    distributed::rank,
    experiment::{Generated, Numerics, UserError},
    models::{Asked, Assignment, Seeds, VideoModel},
};

/// A model, sampled in one way.
pub struct Sampled<'a> {
    pub model: &'a dyn VideoModel,
    run: PathBuf,
    assignment: Assignment,
    seed: u64,
}

/// Lets a model sample as `generated` says: by its sampler, and as exactly.
///
/// # Errors
/// [`UserError`]: settings that the model does not have.
pub fn set_up(model: &mut dyn VideoModel, generated: &Generated) -> Result<()> {
    let Generated::Run { sampler, precision, tf32, .. } = generated else { return Ok(()) };
    model.set_numerics(Numerics { precision: *precision, tf32: *tf32 });
    match sampler {
        Some(choice) => {
            model.set_sampling(choice).map_err(|error| UserError(format!("generated.sampler: {error:#}")).into())
        }
        None => Ok(()),
    }
}

impl<'a> Sampled<'a> {
    /// None where generated clips lie in files. A model that makes videos from texts gets the captions of the real videos, one
    /// that knows classes all of them in turn.
    ///
    /// # Errors
    /// Real videos without captions; guidance that the model cannot have.
    pub fn new(model: &'a dyn VideoModel, generated: &Generated, real: &RealClips, seed: u64) -> Result<Option<Self>> {
        let Generated::Run { run, guidance, .. } = generated else { return Ok(None) };
        let accepts = model.accepts();
        let prompts = if accepts.text.is_some() { real.captions()? } else { Vec::new() };
        let follows = accepts.text.is_some() || accepts.classes.is_some();
        if guidance.is_some() && !follows && rank().is_none_or(|rank| rank == 0) {
            tracing::warn!(
                "generated.guidance is not read: {} makes videos neither from texts nor of classes",
                run.display()
            );
        }
        let asked = Asked { prompts, guidance: guidance.filter(|_| follows), ..Asked::default() };
        let assignment = Assignment::new(model, asked)
            .map_err(|error| UserError(format!("generated: {}: {error:#}", run.display())))?;
        Ok(Some(Sampled { model, run: run.clone(), assignment, seed }))
    }

    /// What is sampled and how, in a line.
    pub fn line(&self) -> String {
        let given = match self.assignment.describe() {
            given if given.is_empty() => given,
            given => format!(", {given}"),
        };
        format!("weights of {}, step {}, {}{given}", self.run.display(), self.model.step(), self.model.describe())
    }

    /// `generated` with the sampler that was used, so that figures say it in full; of a model that has none of this crate's
    /// samplers the line says it alone.
    pub fn recorded(&self, generated: &Generated) -> Generated {
        let mut recorded = generated.clone();
        if let Generated::Run { sampler, .. } = &mut recorded {
            *sampler = serde_json::from_value::<SamplerChoice>(self.model.sampling()).ok();
        }
        recorded
    }

    /// The numbered samples, u8 `[N, 3, F, H, W]` on the host.
    ///
    /// # Errors
    /// Those of the model.
    pub fn videos(&self, samples: &[u64]) -> Result<Tensor> {
        self.assignment.videos(self.model, samples, &Seeds::One(self.seed), &mut |_, _| {})
    }
}
