//! The run that an evaluation samples.

use std::path::PathBuf;

use anyhow::Result;
use tch::{Device, Tensor};

use super::real_clips::RealClips;
use crate::{
    data::DatasetConfig,
    diffusion::SamplerConfig,
    experiment::{Generated, Numerics, UserError},
    models::{Classes, LatentConditions, LatentDiffusion, TextPrompts},
};

/// A run, sampled in one way.
pub struct Sampled {
    pub generator: LatentDiffusion,
    run: PathBuf,
    /// The run's own data set.
    pub trained_on: DatasetConfig,
    /// What a text-to-video run shows: sample i the i-th caption, from the first again after the last. Else none.
    captions: Vec<String>,
    guidance: f64,
    /// Where it is not the run's own.
    class_guidance: Option<f64>,
    sampler: SamplerConfig,
    seed: u64,
}

impl Sampled {
    /// None where generated clips lie in files. A text-to-video run gets the captions of the real videos.
    ///
    /// # Errors
    /// Damaged or foreign weights; real videos without captions.
    pub fn open(generated: &Generated, real: &RealClips, seed: u64, device: Device) -> Result<Option<Self>> {
        let Generated::Run { run, sampler, precision, tf32, guidance, class_guidance, .. } = generated else {
            return Ok(None);
        };
        let (generator, trained) = LatentDiffusion::open(run, device)?;
        generator.check_sampler(&**sampler).map_err(|error| UserError(format!("generated.sampler: {error:#}")))?;
        if let (Some(guidance), labels) = (class_guidance, &generator.labels) {
            let labels = labels.as_ref().ok_or_else(|| {
                UserError(format!("generated.class_guidance: {} was trained without classes", run.display()))
            })?;
            labels
                .check_guidance(*guidance)
                .map_err(|error| UserError(format!("generated.class_guidance: {error:#}")))?;
        }
        let (generator, trained_on) =
            (generator.at(Numerics { precision: *precision, tf32: *tf32 }), trained.data.dataset);
        let captions = if generator.text.is_some() { real.captions()? } else { Vec::new() };
        Ok(Some(Sampled {
            generator,
            run: run.clone(),
            trained_on,
            captions,
            guidance: *guidance,
            class_guidance: *class_guidance,
            sampler: *sampler,
            seed,
        }))
    }

    /// What is sampled and how, in a line.
    pub fn line(&self) -> String {
        let guidance = match (&self.captions[..], &self.generator.labels) {
            ([_, ..], _) => format!(", guidance {}", self.guidance),
            ([], Some(labels)) => {
                format!(", each class in turn, guidance {}", self.class_guidance.unwrap_or(labels.guidance))
            }
            ([], None) => String::new(),
        };
        let numerics = self.generator.numerics.words();
        format!(
            "weights of {}, step {}, {}, {numerics}{guidance}",
            self.run.display(),
            self.generator.step,
            self.sampler.describe()
        )
    }

    /// The numbered samples, u8 `[N, 3, F, H, W]` on the host.
    ///
    /// # Errors
    /// A sampler that does not fit the schedule.
    pub fn videos(&self, samples: &[u64]) -> Result<Tensor> {
        let prompts: Vec<String> = match self.captions.len() as u64 {
            0 => Vec::new(),
            count => samples.iter().map(|&sample| self.captions[(sample % count) as usize].clone()).collect(),
        };
        let text = TextPrompts { prompts: &prompts, negative: "", guidance: self.guidance };
        let (numbers, weight) = self.generator.balanced_classes(samples).unzip();
        let classes = numbers
            .as_ref()
            .zip(weight)
            .map(|(numbers, guidance)| Classes { numbers, guidance: self.class_guidance.unwrap_or(guidance) });
        let given = LatentConditions { text: (!prompts.is_empty()).then_some(text), classes, frames: None };
        self.generator.videos(samples, &given, self.sampler, self.seed, &mut |_, _| {})
    }

    /// Decoded Gaussian latents, as [`Self::videos`].
    pub fn gaussian_videos(&self, samples: &[u64]) -> Result<Tensor> {
        self.generator.gaussian_videos(samples, self.seed)
    }
}
