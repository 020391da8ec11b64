//! What an experiment file says: typed, strict, overridable.

mod evaluation;
mod file;
mod labels;
mod load;
mod mistake;
mod training;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub use evaluation::{EvaluationConfig, built_in_protocols, protocol};
pub use labels::{ClassList, LabelConditioning};
pub use load::{parse, read};
pub use mistake::Mistake;
pub use training::{Decay, Numerics, OptimizerConfig, OptimizerKind, Precision, TrainerConfig};

use crate::{
    autoencoder_loss::AutoencoderLossConfig,
    codecs::CodecConfig,
    data::DataConfig,
    diffusion::{FrameConditioning, GuidanceConfig, NoisePathConfig, Objective, SamplerConfig, ScheduleConfig},
    metrics::ProtocolConfig,
    networks::{NetworkConfig, NetworkSettings, UNetConfig},
    nn::Adapter,
};

/// An experiment that can be checked before anything is loaded.
pub trait Experiment: Serialize + serde::de::DeserializeOwned {
    /// # Errors
    /// Names the key and the rule.
    fn validate(&self) -> Result<()>;

    /// Reads, overrides and checks a file.
    ///
    /// # Errors
    /// [`Mistake`], with the file's name.
    fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let experiment: Self = read(path, overrides)?;
        experiment.validate().map_err(|error| Mistake(format!("{}: {error:#}", path.display())))?;
        Ok(experiment)
    }
}

fn check_data(data: &DataConfig) -> Result<()> {
    data.clip()?;
    ensure!(data.workers >= 1, "data.workers must be at least 1");
    ensure!(data.workers <= 1024, "data.workers must be at most 1024, not {}", data.workers);
    data.dataset.check().context("data.dataset")
}

/// The text that a network is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConditioning {
    /// A run that carries a text encoder: `lvdm import stable-diffusion` makes one.
    pub encoder: PathBuf,
    /// Probability that a training sample goes without its caption, so that there is guidance.
    #[serde(default = "tenth")]
    pub drop: f64,
    /// What the pictures in the log show.
    #[serde(default)]
    pub prompts: Vec<String>,
    /// Of those pictures.
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
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Trained {
    /// Every parameter.
    #[default]
    All,
    /// Those over frames, which an image model does not have; with `conditioning` also the first convolution, which gains
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

fn guidance() -> f64 {
    7.5
}

/// Training of an autoencoder: `lvdm train autoencoder FILE`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AutoencoderExperiment {
    /// Of initial weights, crops, shuffles and noise.
    #[serde(default)]
    pub seed: u64,
    /// The clips to train on.
    pub data: DataConfig,
    /// The network: the video autoencoder, or what `kind` says.
    #[serde(default)]
    pub autoencoder: CodecConfig,
    /// The paper's, with LPIPS and a discriminator.
    #[serde(default)]
    pub loss: AutoencoderLossConfig,
    /// Of both networks.
    pub optimizer: OptimizerConfig,
    /// Steps, batches, checkpoints, log.
    pub trainer: TrainerConfig,
}

impl Experiment for AutoencoderExperiment {
    fn validate(&self) -> Result<()> {
        check_data(&self.data)?;
        self.autoencoder.validate().context("autoencoder")?;
        ensure!(!self.autoencoder.is_exact(), "autoencoder: {} has nothing to train", self.autoencoder.name());
        self.autoencoder.latent_shape(self.data.frames, self.data.resolution, self.data.resolution).context("data")?;
        self.loss.validate().context("loss")?;
        self.optimizer.validate().context("optimizer")?;
        self.trainer.validate().context("trainer")
    }
}

/// What a denoiser works on. In a file the word `pixels`, or a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

/// Training of a denoiser on latents or pixels: `lvdm train diffusion FILE`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiffusionExperiment {
    /// Of initial weights, crops, shuffles and noise.
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
    /// A diffusion run whose averaged weights are where training starts: a short-video model.
    #[serde(default)]
    pub start_from: Option<PathBuf>,
    /// Which parameters.
    #[serde(default)]
    pub trained: Trained,
    /// Noise over diffusion time.
    #[serde(default)]
    pub schedule: NoisePathConfig,
    /// The network; `unet:` is the older name of this key.
    #[serde(default, alias = "unet")]
    pub network: NetworkConfig,
    /// What it predicts, and by which loss it learns.
    #[serde(default)]
    pub objective: Objective,
    /// Of the parameters that are trained.
    pub optimizer: OptimizerConfig,
    /// Steps, batches, checkpoints, log.
    pub trainer: TrainerConfig,
    /// How samples are drawn for the pictures in the log.
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
        ensure!(self.latent_stride >= 1, "latent_stride must be at least 1, not {}", self.latent_stride);
        ensure!(
            self.latent_stride <= self.data.frames,
            "latent_stride is {}, more than the {} frames of a clip",
            self.latent_stride,
            self.data.frames
        );
        self.check_text()?;
        if let Some(run) = &self.start_from {
            ensure!(run.exists(), "start_from: there is no {} (train it first)", run.display());
        }
        let path = self.schedule.build().context("schedule")?;
        self.objective.validate(&*path).context("objective")?;
        let walk = self.sampler.start(&*path).context("sampler")?;
        self.objective.predict.check(&*path, walk.times()).context("sampler")?;
        ensure!(
            self.conditioning.is_none() || path.input_scale(path.noisiest()) == 1.0,
            "conditioning: this schedule scales what the network sees by the noise of the clip, and given frames have \
             less: take another kind"
        );
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
}

impl DiffusionExperiment {
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

    fn check_text(&self) -> Result<()> {
        match (&self.text, self.network.text_width()) {
            (None, None) => {
                ensure!(self.trained == Trained::All, "trained: without `network.attention: text` only kind: all");
                return Ok(());
            }
            (None, Some(_)) => {
                bail!("network.attention is text: `text.encoder` must name a run that carries a text encoder")
            }
            (Some(_), None) => {
                bail!("text: the network attends to none (network.attention is not text)")
            }
            (Some(text), Some(_)) => {
                ensure!((0.0..=1.0).contains(&text.drop), "text.drop is a probability, not {}", text.drop);
                ensure!(text.guidance.is_finite(), "text.guidance is {}", text.guidance);
                ensure!(
                    text.encoder.exists(),
                    "text.encoder: there is no {} (lvdm import stable-diffusion makes such a run)",
                    text.encoder.display()
                );
            }
        }
        ensure!(
            self.latents.is_some() || self.data.dataset.has_captions(),
            "data.dataset: its videos have no captions; kinds that have are webvid, captioned and packed"
        );
        if let Trained::Adapters(adapter) = &self.trained {
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

/// How long videos are made: `lvdm sample-long`, and each sampled curve of `lvdm evaluate-long`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongVideoConfig {
    /// A diffusion run trained with `conditioning`: it begins the video and continues it.
    pub prediction: PathBuf,
    /// One that fills gaps: hierarchical generation. Without it generation is autoregressive.
    #[serde(default)]
    pub interpolation: Option<PathBuf>,
    /// Latent frames that a clip is given of the one before.
    #[serde(default = "one")]
    pub overlap: i64,
    /// Latent frames from one sparse frame to the next; the prediction run's `latent_stride` where it is not said.
    #[serde(default)]
    pub gap: Option<i64>,
    /// Weight, form and level of guidance.
    #[serde(default)]
    pub guidance: GuidanceConfig,
    /// Of every clip.
    #[serde(default)]
    pub sampler: SamplerConfig,
    /// Clips in one pass of the networks.
    #[serde(default = "batch")]
    pub batch: i64,
    /// Of the networks when they sample and decode.
    #[serde(default)]
    pub precision: Precision,
    /// On a GPU, what they compute in float32 is rounded to TF32.
    #[serde(default)]
    pub tf32: bool,
}

impl LongVideoConfig {
    /// How exactly the networks compute.
    pub fn numerics(&self) -> Numerics {
        Numerics { precision: self.precision, tf32: self.tf32 }
    }
}

/// What is measured against what: `lvdm evaluate FILE`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EvaluationExperiment {
    /// Draws real clips and noise.
    #[serde(default)]
    pub seed: u64,
    /// Protocol, or number of clips.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// Clips that nothing was trained on.
    pub real: DataConfig,
    /// What is measured.
    pub generated: Generated,
    /// Clips that the models were trained on: their distance from the real clips is a baseline.
    #[serde(default)]
    pub train: Option<DataConfig>,
    /// Where figures, videos and pictures are put.
    pub out: PathBuf,
}

/// Long videos measured window by window, as curves in one figure: `lvdm evaluate-long FILE`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LongEvaluationExperiment {
    /// Draws real clips and noise.
    #[serde(default)]
    pub seed: u64,
    /// Of each curve.
    pub videos: u64,
    /// Of each video.
    pub frames: i64,
    /// Protocol, or number of clips.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// Clips that nothing was trained on; a window is as long as one of them.
    pub real: DataConfig,
    /// Clips that the models were trained on: their distance from the real clips is a baseline.
    #[serde(default)]
    pub train: Option<DataConfig>,
    /// One a method, in the order of the legend.
    pub curves: Vec<Curve>,
    /// Where curves, videos and figures are put.
    pub out: PathBuf,
}

/// One curve.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Curve {
    /// In the legend.
    pub name: String,
    /// What the curve is measured on.
    pub source: CurveSource,
}

impl Curve {
    /// Its folder: the name in small letters, digits and hyphens.
    pub fn folder(&self) -> String {
        let letters = self.name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { ' ' });
        letters.collect::<String>().split_whitespace().collect::<Vec<_>>().join("-")
    }
}

/// Where a curve's videos come from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum CurveSource {
    /// Sampled from runs.
    Sampled(LongVideoConfig),
    /// The beginnings of a dataset's first videos; `frames` is not read.
    Videos {
        /// The dataset, with its stride and resolution.
        data: DataConfig,
    },
}

impl LongEvaluationExperiment {
    /// How each window is measured.
    ///
    /// # Errors
    /// A protocol that does not fit: one that has several runs or measures other windows.
    pub fn protocol(&self) -> Result<ProtocolConfig> {
        let protocol = self.evaluation.resolve(&self.real).context("evaluation")?;
        ensure!(
            protocol.runs == 1 && protocol.drop_partial_batch.is_none() && protocol.draw.is_endless(),
            "evaluation: the protocol {} is one of clips; windows are measured by lvdm1024 or by a number of clips",
            protocol.name
        );
        if let Some(whole) = protocol.windows_of {
            ensure!(whole == self.frames, "frames is {}, and the protocol {} says {whole}", self.frames, protocol.name);
        }
        Ok(protocol)
    }
}

impl Experiment for LongEvaluationExperiment {
    fn validate(&self) -> Result<()> {
        self.protocol()?;
        check_data(&self.real).context("real")?;
        if let Some(train) = &self.train {
            check_data(train).context("train")?;
        }
        ensure!(self.videos >= 2, "videos must be at least 2, not {}", self.videos);
        ensure!(self.videos <= 10_000_000, "videos must be at most 10,000,000, not {}", self.videos);
        ensure!(
            self.frames >= self.real.frames,
            "frames: {} make no window of real.frames = {}",
            self.frames,
            self.real.frames
        );
        ensure!(!self.curves.is_empty(), "curves: at least one is needed");
        let mut folders = std::collections::BTreeSet::new();
        for curve in &self.curves {
            let folder = curve.folder();
            ensure!(!folder.is_empty(), "curves: the name `{}` has no letter", curve.name);
            ensure!(folders.insert(folder), "curves: `{}` has the folder of another curve", curve.name);
            match &curve.source {
                CurveSource::Videos { data } => check_data(data).with_context(|| curve.name.clone())?,
                CurveSource::Sampled(config) => {
                    for run in [Some(&config.prediction), config.interpolation.as_ref()].into_iter().flatten() {
                        ensure!(run.exists(), "{}: there is no {} (train it first)", curve.name, run.display());
                    }
                }
            }
        }
        Ok(())
    }
}

/// Where generated clips come from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Generated {
    /// Sampled from a diffusion run.
    Run {
        /// Its folder, or one of its checkpoints.
        run: PathBuf,
        /// DDIM, 50 steps, η = 1 where it is not said.
        #[serde(default)]
        sampler: SamplerConfig,
        /// Clips in one pass of the network.
        #[serde(default = "batch")]
        batch: i64,
        /// Of the networks when they sample and decode.
        #[serde(default)]
        precision: Precision,
        /// On a GPU, what they compute in float32 is rounded to TF32. The extractor never is.
        #[serde(default)]
        tf32: bool,
        /// How strongly a text-to-video run follows the captions of the real videos.
        #[serde(default = "text_guidance")]
        guidance: f64,
    },
    /// Read from files.
    Clips {
        /// The dataset, with its stride and resolution.
        data: DataConfig,
    },
}

fn text_guidance() -> f64 {
    7.5
}

fn one() -> i64 {
    1
}

fn batch() -> i64 {
    16
}

impl EvaluationExperiment {
    /// How clips are measured.
    ///
    /// # Errors
    /// A protocol that does not fit the data, or one of long videos.
    pub fn protocol(&self) -> Result<ProtocolConfig> {
        let protocol = self.evaluation.resolve(&self.real).context("evaluation")?;
        ensure!(
            protocol.windows_of.is_none(),
            "evaluation: the protocol {} is a curve along long videos: `lvdm evaluate-long` draws it",
            protocol.name
        );
        if let Generated::Clips { data } = &self.generated {
            let own = DataConfig { frame_stride: protocol.frame_stride.unwrap_or(data.frame_stride), ..data.clone() };
            protocol.agrees_with(&own).context("generated.data")?;
        }
        Ok(protocol)
    }
}

impl Experiment for EvaluationExperiment {
    fn validate(&self) -> Result<()> {
        self.protocol()?;
        check_data(&self.real).context("real")?;
        if let Some(train) = &self.train {
            check_data(train).context("train")?;
        }
        match &self.generated {
            Generated::Clips { data } => check_data(data).context("generated"),
            Generated::Run { run, batch, .. } => {
                ensure!(*batch >= 1, "generated.batch must be at least 1");
                ensure!(run.exists(), "generated.run: there is no {}", run.display());
                Ok(())
            }
        }
    }
}
