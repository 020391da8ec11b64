//! Training of a denoiser.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    labels::LabelConditioning,
    superresolution::SuperResolution,
    training::{OptimizerConfig, TrainerConfig},
    validate::{Experiment, check_clip, check_data},
};
use crate::{
    data::DataConfig,
    diffusion::{
        BlockConditioning, FrameConditioning, NoisePathConfig, Objective, Reduction, SamplerConfig, ScheduleConfig,
    },
    networks::{NetworkConfig, NetworkSettings, UNetConfig},
    nn::Adapter,
};

/// The text that a network is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextConditioning {
    /// A run that carries a text encoder: `lvdm import stable-diffusion` makes one.
    pub encoder: PathBuf,
    /// Probability that a training sample goes without its caption, so that there is guidance.
    #[serde(default = "tenth")]
    pub drop: f64,
    /// Captions of the pictures in the log, one after the other.
    #[serde(default)]
    pub prompts: Vec<String>,
    /// Weight of guidance where nothing else is said: of those pictures, and of sampling.
    #[serde(default = "guidance")]
    pub guidance: f64,
}

impl TextConditioning {
    /// By the text encoder that a run carries, with the defaults.
    pub fn of(run: &Path) -> Self {
        TextConditioning { encoder: run.to_path_buf(), drop: tenth(), prompts: Vec::new(), guidance: guidance() }
    }
}

/// Which of the denoiser's parameters training moves.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Trained {
    /// Every parameter.
    #[default]
    All,
    /// Those over frames, of a network that names such: of the U-Net with `attention: text` the layers that an image model
    /// does not have, of Latte every second block. With `conditioning` also the first convolution, which gains
    /// the channel of given frames, and their noise levels.
    Temporal,
    /// Low-rank additions to the maps of every attention; the network itself stays.
    Adapters(Adapter),
}

impl Trained {
    /// Rank and α of the adapters, where they are what is trained.
    pub fn adapter(self) -> Option<Adapter> {
        match self {
            Trained::Adapters(adapter) => Some(adapter),
            Trained::All | Trained::Temporal => None,
        }
    }

    /// Whether training moves the parameter of this name of such a network.
    pub fn moves(self, name: &str, network: &dyn NetworkSettings) -> bool {
        match self {
            Trained::All => true,
            Trained::Temporal => network.is_temporal(name),
            Trained::Adapters(_) => Adapter::owns(name),
        }
    }
}

fn tenth() -> f64 {
    0.1
}

/// Weight of guidance by a text, where nothing else is said.
pub const TEXT_GUIDANCE: f64 = 7.5;

fn guidance() -> f64 {
    TEXT_GUIDANCE
}

/// What a denoiser works on. In a file the word `pixels`, or a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum DiffusionSpace {
    /// Clips as they are, `[3, F, H, W]` in [−1, 1]: what latents are compared with.
    Pixels,
    /// Latents of a run of `lvdm train autoencoder`, or one of its checkpoints, or a run that carries an autoencoder.
    Latents(PathBuf),
}

/// A folder of this name is `./pixels`.
const PIXELS: &str = "pixels";

impl From<PathBuf> for DiffusionSpace {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == PIXELS { DiffusionSpace::Pixels } else { DiffusionSpace::Latents(path) }
    }
}

impl From<DiffusionSpace> for PathBuf {
    fn from(space: DiffusionSpace) -> Self {
        match space {
            DiffusionSpace::Pixels => PIXELS.into(),
            DiffusionSpace::Latents(path) => path,
        }
    }
}

/// The task of the second stage of a cascade.
pub const SUPERRESOLUTION: &str = "superresolution";

/// Training of a denoiser on latents or pixels: `lvdm train diffusion FILE`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DiffusionExperiment {
    /// Seed of initial weights, crops, shuffles and noise.
    #[serde(default)]
    pub seed: u64,
    /// The clips to train on.
    pub data: DataConfig,
    /// Latents that `lvdm encode` wrote, used instead of decoding and encoding `data`.
    #[serde(default)]
    pub latents: Option<PathBuf>,
    /// A run whose latents are denoised, or `pixels`.
    pub autoencoder: DiffusionSpace,
    /// For a network that is given a text (`network.attention: text`).
    #[serde(default)]
    pub text: Option<TextConditioning>,
    /// For a network that is given class labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<LabelConditioning>,
    /// Every n-th latent frame of a clip is what the network sees: the sparse frames of hierarchical generation.
    #[serde(default = "one")]
    pub latent_stride: i64,
    /// For a prediction or interpolation model: which frames it is given.
    #[serde(default)]
    pub conditioning: Option<FrameConditioning>,
    /// For a network that takes the frames before and after a clip (`kind: mcvd`): how many of them there are, and how often they
    /// are given in training. Videos are then made block after block, each given the frames before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BlockConditioning>,
    /// Single frames of random videos that stand beside every clip in training and count as much as its frames: layers over
    /// frames are the identity for them (Ho et al. 2022, arXiv 2204.03458, section 4, "joint training").
    #[serde(default)]
    pub images: i64,
    /// For the second stage of a cascade, which makes another run's videos larger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub superresolution: Option<SuperResolution>,
    /// A diffusion run whose averaged weights are where training starts: a short-video model.
    #[serde(default)]
    pub start_from: Option<PathBuf>,
    /// Which parameters training moves.
    #[serde(default)]
    pub trained: Trained,
    /// The noise path: how much noise there is at each diffusion time.
    #[serde(default)]
    pub schedule: NoisePathConfig,
    /// The network; `unet:` is the older name of this key.
    #[serde(default, alias = "unet")]
    pub network: NetworkConfig,
    /// What it predicts, and by which loss it learns.
    #[serde(default)]
    pub objective: Objective,
    /// The optimizer of the parameters that are trained.
    pub optimizer: OptimizerConfig,
    /// Steps, batches, checkpoints, log.
    pub trainer: TrainerConfig,
    /// How samples are drawn where nothing else is said: for the pictures in the log, and by `lvdm sample` and `lvdm evaluate`.
    #[serde(default)]
    pub sampler: SamplerConfig,
}

impl Experiment for DiffusionExperiment {
    fn validate(&self) -> Result<()> {
        match &self.latents {
            Some(file) => ensure!(file.exists(), "latents: there is no {}", file.display()),
            None => check_data(&self.data)?,
        }
        match &self.autoencoder {
            DiffusionSpace::Pixels => ensure!(
                self.latents.is_none(),
                "latents: autoencoder is {PIXELS}, which has none (lvdm data pack makes a file of clips for `data`)"
            ),
            DiffusionSpace::Latents(run) => ensure!(
                run.exists(),
                "autoencoder: there is no {} (train it first: lvdm train autoencoder …; or write {PIXELS} for a \
                 denoiser without one)",
                run.display()
            ),
        }
        if let Some(text) = &self.text {
            ensure!(
                text.encoder.exists(),
                "text.encoder: there is no {} (lvdm import stable-diffusion makes such a run)",
                text.encoder.display()
            );
        }
        if let Some(SuperResolution { base, .. }) = &self.superresolution {
            ensure!(base.exists(), "superresolution.base: there is no {} (train it first)", base.display());
        }
        if let Some(run) = &self.start_from {
            ensure!(run.exists(), "start_from: there is no {} (train it first)", run.display());
        }
        self.check_settings()
    }
}

impl DiffusionExperiment {
    /// As [`Experiment::validate`], but for whether what it names is there.
    ///
    /// # Errors
    /// Names the key and the rule.
    pub fn check_settings(&self) -> Result<()> {
        check_clip(&self.data)?;
        ensure!(self.latent_stride >= 1, "latent_stride must be at least 1, not {}", self.latent_stride);
        ensure!(
            self.latent_stride <= self.data.frames,
            "latent_stride is {}, more than the {} frames of a clip",
            self.latent_stride,
            self.data.frames
        );
        self.check_inputs()?;
        self.check_images()?;
        self.check_text()?;
        self.check_trained()?;
        let path = self.schedule.build().context("schedule")?;
        self.objective.validate(&*path).context("objective")?;
        let walk = self.sampler.start(&*path).context("sampler")?;
        self.objective.predict.check(&*path, walk.times()).context("sampler")?;
        ensure!(
            self.conditioning.is_none() || path.input_scale(path.noisiest()) == 1.0,
            "conditioning: this schedule scales what the network sees by the noise of the clip, and given frames have \
             less: take another kind"
        );
        if let Some(settings) = &self.superresolution {
            self.check_superresolution(settings, path.levels()).context("superresolution")?;
        }
        self.network.validate().context("network")?;
        ensure!(
            !self.objective.learns_variance() || self.conditioning.is_none(),
            "objective: loss: learned_variance is for clips of which no frame is given, and there is `conditioning`"
        );
        if let Some(labels) = &self.labels {
            labels.validate()?;
        }
        self.optimizer.validate().context("optimizer")?;
        self.trainer.validate().context("trainer")
    }

    /// The settings of a U-Net, for what is about that network alone.
    ///
    /// # Errors
    /// Names the kind of another network.
    pub fn unet(&self) -> Result<&UNetConfig> {
        match &self.network {
            NetworkConfig::UNet3d(unet) => Ok(unet),
            other => bail!("the network is {}, and this is for unet3d", serde_json::to_value(other)?["kind"]),
        }
    }

    /// The settings of a schedule of β, for what is about that noise path alone.
    ///
    /// # Errors
    /// Names the kind of another one.
    pub fn betas(&self) -> Result<&ScheduleConfig> {
        match &self.schedule {
            NoisePathConfig::Betas(betas) => Ok(betas),
            other => bail!(
                "the schedule is {}, and this is for linear or scaled_linear",
                serde_json::to_value(other)?["kind"]
            ),
        }
    }

    /// Whether training moves the parameter of this name: what `trained` says, and what a network has because it is given
    /// frames.
    pub fn moves(&self, name: &str) -> bool {
        self.trained.moves(name, &*self.network)
            || (self.conditioning.is_some()
                && self.trained == Trained::Temporal
                && self.network.sees_given_frames(name))
    }

    /// That the network takes what the experiment gives it.
    ///
    /// # Errors
    /// Names the key, and what the network takes.
    pub fn check_inputs(&self) -> Result<()> {
        let takes = self.network.takes();
        match (&self.text, takes.text) {
            (None, Some(_)) => {
                bail!("network.attention is text: `text.encoder` must name a run that carries a text encoder")
            }
            (Some(_), None) => {
                bail!("text: this network attends to none; one that does is kind: unet3d with attention: text")
            }
            _ => {}
        }
        ensure!(
            self.blocks.is_none() || takes.around,
            "blocks: this network takes no frames before and after a clip; one that does is kind: mcvd"
        );
        ensure!(
            self.conditioning.is_none() || !takes.around,
            "conditioning: this network is given the frames around a clip, none within it: write blocks in its place"
        );
        ensure!(self.labels.is_none() || takes.labels, "labels: this network takes no class labels");
        ensure!(
            takes.levels || self.conditioning.as_ref().is_none_or(|given| given.levels().is_none()),
            "conditioning: this network is not told the noise level of given frames: give them clean (perturbation: null)"
        );
        Ok(())
    }

    /// The task that its checkpoints name.
    pub fn task(&self) -> &'static str {
        if self.superresolution.is_some() { SUPERRESOLUTION } else { "diffusion" }
    }

    fn check_images(&self) -> Result<()> {
        ensure!(self.images >= 0, "images must be at least 0, not {}", self.images);
        ensure!(self.images == 0 || self.network.takes().stills, "images: this network takes no single pictures");
        ensure!(
            self.images == 0 || (self.latents.is_none() && self.text.is_none()),
            "images: single frames come from `data` and have no captions: leave out `latents` and `text`"
        );
        ensure!(
            self.images == 0 || self.objective.reduction == Reduction::Mean,
            "images: with objective.reduction: sum a clip and a single frame do not weigh alike; leave reduction out"
        );
        Ok(())
    }

    fn check_superresolution(&self, settings: &SuperResolution, levels: i64) -> Result<()> {
        ensure!(self.autoencoder == DiffusionSpace::Pixels, "the network works on pixels: write autoencoder: {PIXELS}");
        ensure!(
            self.network.takes().concat_time,
            "this network is not told the noise of what it is given beside the clip; one that is: kind: unet3d"
        );
        ensure!(
            self.images == 0 && self.conditioning.is_none() && self.text.is_none() && self.latent_stride == 1,
            "beside it there are no `images`, `conditioning`, `text` or `latent_stride`"
        );
        settings.validate(self.data.frames, self.data.resolution, levels)
    }

    fn check_text(&self) -> Result<()> {
        let Some(text) = &self.text else { return Ok(()) };
        ensure!((0.0..=1.0).contains(&text.drop), "text.drop is a probability, not {}", text.drop);
        ensure!(text.guidance.is_finite(), "text.guidance is {}", text.guidance);
        ensure!(
            self.latents.is_some() || self.data.dataset.has_captions(),
            "data.dataset: its videos have no captions; kinds that have are webvid, captioned and packed"
        );
        Ok(())
    }

    fn check_trained(&self) -> Result<()> {
        if let Trained::Adapters(adapter) = &self.trained {
            ensure!(
                self.network.takes().text.is_some(),
                "trained: adapters belong to the attention of `network.attention: text`, which this network has not"
            );
            adapter.validate().context("trained")?;
            ensure!(
                self.conditioning.is_none(),
                "trained: adapters do not learn to see which frames are given (conditioning); take kind: temporal or all"
            );
        }
        ensure!(
            self.trained == Trained::All || self.start_from.is_some(),
            "trained: what is not trained must come from somewhere; name a run in start_from"
        );
        Ok(())
    }
}

fn one() -> i64 {
    1
}
