//! What every family of models gives: numbered videos, what they can be given, and what is said of them.

use anyhow::{Result, bail, ensure};
use serde_json::Value;
use tch::{Device, Tensor};

use crate::{
    data::{DataConfig, RgbFrame},
    diffusion::SamplerChoice,
    experiment::{ClassList, Numerics},
    torch::FixedWeights,
};

/// One video: all its random numbers are functions of these two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleId {
    /// Of all random numbers.
    pub seed: u64,
    /// The video's number.
    pub sample: u64,
}

/// One clip to sample: its noise is a function of these numbers alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipId {
    /// Of all noise.
    pub seed: u64,
    /// The video's number.
    pub sample: u64,
    /// The clip's number in a video of several.
    pub clip: u64,
}

/// What the videos of a batch are to show and to begin with: any of these together; by default nothing.
#[derive(Default)]
pub struct Given<'a> {
    /// Texts, one a video.
    pub text: Option<TextPrompts<'a>>,
    /// Classes, one a video.
    pub classes: Option<Classes<'a>>,
    /// Pictures of any size, one a video, which is its first frame.
    pub first_frames: Option<&'a [&'a RgbFrame]>,
}

/// Of which class videos are to be.
#[derive(Debug, Clone, Copy)]
pub struct Classes<'a> {
    /// The class's number, one a video.
    pub numbers: &'a [i64],
    /// w in ε_u + w (ε_c − ε_u); 1 is without guidance. Given a text with guidance too, the weight is the text's.
    pub guidance: f64,
}

/// What videos are to show.
#[derive(Debug, Clone, Copy)]
pub struct TextPrompts<'a> {
    /// One a video.
    pub prompts: &'a [String],
    /// What guidance leads away from.
    pub negative: &'a str,
    /// w in ε_u + w (ε_c − ε_u); 1 is without guidance.
    pub guidance: f64,
}

/// What a model takes, and how strongly it follows it where nobody says so.
#[derive(Debug, Clone, Default)]
pub struct Accepts {
    /// Of a model that makes videos from texts, the weight of guidance.
    pub text: Option<f64>,
    /// Of a model that takes a class.
    pub classes: Option<KnownClasses>,
}

/// The classes of a model.
#[derive(Debug, Clone)]
pub struct KnownClasses {
    /// Their names, or how many they are.
    pub list: ClassList,
    /// The weight of guidance.
    pub guidance: f64,
}

/// A trained model that makes videos, of whatever family. It is opened with the sampling settings of its own run.
pub trait VideoModel {
    /// The shape `[3, F, H, W]` of its videos.
    fn clip(&self) -> [i64; 4];

    /// What it can be given besides first frames.
    fn accepts(&self) -> Accepts;

    /// Whether it can be given all of this, asked before sampling begins.
    ///
    /// # Errors
    /// Names what it cannot be given, and why.
    fn check(&self, given: &Given) -> Result<()>;

    /// The numbered videos, u8 `[N, 3, F, H, W]` on the host. Each depends on its numbers and on what it is given, and on
    /// nothing else. `on_step(i, steps)` is called at each step.
    ///
    /// # Errors
    /// As [`Self::check`]; those of the device.
    fn videos(&self, samples: &[SampleId], given: &Given, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor>;

    /// How it samples and how exactly it computes, in words, as a figure tells it.
    fn describe(&self) -> String;

    /// The same as settings: of its sampler, as a file gives them.
    fn sampling(&self) -> Value;

    /// The step of its training at which its weights were stored.
    fn step(&self) -> i64;

    /// Where it computes.
    fn device(&self) -> Device;

    /// The clips that it was trained on, where that is known.
    fn data(&self) -> Option<&DataConfig>;

    /// Samples and decodes so from here on; a model is opened in float32.
    fn set_numerics(&mut self, numerics: Numerics);

    /// Samples by these settings from here on.
    ///
    /// # Errors
    /// Settings that the model does not have, or that do not fit its training.
    fn set_sampling(&mut self, choice: &SamplerChoice) -> Result<()>;

    /// Makes videos of another length and size from here on; what is not said stays as trained.
    ///
    /// # Errors
    /// Names the number of which a side must be a multiple.
    fn resize(&mut self, frames: Option<i64>, height: Option<i64>, width: Option<i64>) -> Result<()> {
        let [_, f, h, w] = self.clip();
        let asked = [frames.unwrap_or(f), height.unwrap_or(h), width.unwrap_or(w)];
        ensure!(asked == [f, h, w], "this model makes videos of {f} frames of {w}x{h} alone");
        Ok(())
    }

    /// Baselines of its samples, of a model that works in the space of a codec.
    fn codec_baselines(&self) -> Option<&dyn CodecBaselines> {
        None
    }

    /// While the answer lives, what a GPU prepares for sampling is kept from one batch to the next: weights in half
    /// precision, and graphs.
    fn keep_prepared(&self) -> Option<FixedWeights> {
        self.device().is_cuda().then(FixedWeights::new)
    }
}

/// What a codec alone makes, with which a model's samples are compared.
pub trait CodecBaselines {
    /// Decoded Gaussian latents, u8 `[N, 3, F, H, W]` on the host: what one gets without learning anything but the codec.
    ///
    /// # Errors
    /// Those of the device.
    fn gaussian_videos(&self, samples: &[u64], seed: u64) -> Result<Tensor>;

    /// Clips u8 `[N, 3, F, H, W]` through the codec and back, on the host; none where nothing is lost.
    ///
    /// # Errors
    /// Those of the device.
    fn reconstructed(&self, clips: &Tensor) -> Result<Option<Tensor>>;
}

impl Given<'_> {
    /// That there is as much of everything as there are videos.
    ///
    /// # Errors
    /// Names what there is another number of.
    pub fn check_count(&self, videos: usize) -> Result<()> {
        let counts = [
            ("prompts", self.text.as_ref().map(|text| text.prompts.len())),
            ("classes", self.classes.as_ref().map(|classes| classes.numbers.len())),
            ("first frames", self.first_frames.map(<[_]>::len)),
        ];
        for (name, count) in counts {
            if let Some(count) = count.filter(|&count| count != videos) {
                bail!("{count} {name} for {videos} videos");
            }
        }
        Ok(())
    }
}
