//! Latent diffusion: noise → sampler × denoiser → z_0 → decoder → u8.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tch::{Device, Tensor, no_grad};

use super::model::{Accepts, Classes, ClipId, CodecBaselines, Given, KnownClasses, SampleId, TextPrompts, VideoModel};
use crate::{
    checkpoint::{self, Checkpoint},
    codecs::LatentSpace,
    data::{DataConfig, normalise, to_u8},
    diffusion::{
        BlockConditioning, FrameConditioning, GivenLabels, GivenLatents, GivenTexts, GivenToClips, GuidanceConfig,
        NoisePath, Observed, Predict, Reconstruction, Sampler, SamplerChoice, SamplerConfig, Times, conditioned,
        resized, sample,
    },
    distributed::rank,
    experiment::{DiffusionExperiment, LabelConditioning, Numerics, SuperResolution, TEXT_GUIDANCE, Trained},
    networks::{Network, Ports},
    nn::Parameters,
    random::{Purpose, normal, normal_batch},
    run::{open_text_encoder, run_of, space_of, warn_if_unfinished, weights},
    run_files::TEXT_ENCODER_FILE,
    text::TextEncoder,
    torch::{Readback, upload},
};

/// A denoiser with its noise path and latent space.
pub struct LatentDiffusion {
    /// With averaged weights.
    pub network: Box<dyn Network>,
    /// Of the training.
    pub path: Box<dyn NoisePath>,
    /// Encodes and decodes.
    pub space: LatentSpace,
    /// The shape of what the network makes, `[C, F, h, w]`.
    pub latent: [i64; 4],
    /// Every n-th latent frame of a video is what the network makes.
    pub latent_stride: i64,
    /// Of a network with a mask channel.
    pub conditioning: Option<FrameConditioning>,
    /// Of a network that makes blocks of a video from the frames before and after them.
    pub blocks: Option<BlockConditioning>,
    /// Of a network that attends to a text.
    pub text: Option<TextEncoder>,
    /// Latent frames of a video: more than the network's, where it makes a video block after block.
    pub(super) video_frames: i64,
    /// What the latents' frames, height and width must be multiples of.
    multiple_of: [i64; 3],
    /// Of a network that is given class labels.
    labels: Option<LabelConditioning>,
    /// Of a network that makes videos larger.
    superresolution: Option<SuperResolution>,
    pub(super) takes_other_clips: bool,
    predict: Predict,
    /// The run's own.
    pub(super) sampler: SamplerConfig,
    /// Weight of guidance by a text, where nobody says another.
    text_guidance: f64,
    /// What it was trained on.
    data: DataConfig,
    /// Of the training, at which the weights were stored; 0 in a training.
    step: i64,
    /// Of the networks when they sample and decode.
    pub(super) numerics: Numerics,
}

const NO_TEXT: &str = "this network attends to no text: it cannot be given prompts";

/// What the clips of a batch are given; by default nothing.
#[derive(Default)]
pub struct LatentConditions<'a> {
    /// To a network with a mask channel.
    pub frames: Option<FramesOfClip<'a>>,
    /// To a network with a text encoder; without a text it sees the empty prompt.
    pub text: Option<TextPrompts<'a>>,
    /// To a network with classes; without them it sees none.
    pub classes: Option<Classes<'a>>,
    /// To a network that makes videos larger, and never missing there: the clips at their lower resolution,
    /// `[N, 3, F, h', w']` in [−1, 1].
    pub low: Option<&'a Tensor>,
}

/// Frames that clips are made to fit.
pub struct FramesOfClip<'a> {
    /// Their places in the clip, the same in all clips.
    pub indices: &'a [i64],
    /// Normalised latents `[N, C, k, h, w]`.
    pub frames: &'a Tensor,
    /// Weight, form and noise level; given a text too, guidance is the text's, and weight and form are not read.
    pub guidance: GuidanceConfig,
}

impl LatentDiffusion {
    /// Declares the network of an experiment in `parameters`.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn new(
        experiment: &DiffusionExperiment,
        space: LatentSpace,
        text: Option<TextEncoder>,
        parameters: &Parameters,
    ) -> Result<Self> {
        let data = &experiment.data;
        let clip = space.latent_shape(data.frames, data.resolution, data.resolution)?;
        let latent = seen(clip, experiment)?;
        let video_frames = match &experiment.blocks {
            None => latent[1],
            Some(blocks) => blocks.video_frames.unwrap_or(latent[1] + blocks.around()),
        };
        experiment.network.validate()?;
        experiment.check_inputs()?;
        let multiple_of = experiment.network.multiple_of();
        for (size, (axis, of)) in latent[1..].iter().zip(["frames", "rows", "columns"].into_iter().zip(multiple_of)) {
            ensure!(size % of == 0, "latents of {size} {axis}: for this network it must be a multiple of {of}");
        }
        let path = experiment.schedule.build().context("schedule")?;
        if let Some(conditioning) = &experiment.conditioning {
            conditioning.validate(latent[1], path.levels()).context("conditioning")?;
        }
        if let (Some(text), Some(width)) = (&text, experiment.network.takes().text) {
            ensure!(
                text.width() == width,
                "the text encoder is {} wide, the network attends to texts {width} wide (context_width)",
                text.width()
            );
        }
        let scope = parameters.root().with_adapters(experiment.trained.adapter());
        Ok(LatentDiffusion {
            network: experiment.network.build(&scope, &ports(experiment, latent)).context("network")?,
            path,
            space,
            latent,
            latent_stride: experiment.latent_stride,
            conditioning: experiment.conditioning.clone(),
            blocks: experiment.blocks.clone(),
            video_frames,
            text,
            multiple_of,
            labels: experiment.labels.clone(),
            superresolution: experiment.superresolution.clone(),
            takes_other_clips: experiment.network.takes().other_clips,
            predict: experiment.objective.predict,
            sampler: experiment.sampler,
            text_guidance: experiment.text.as_ref().map_or(TEXT_GUIDANCE, |text| text.guidance),
            data: experiment.data.clone(),
            step: 0,
            numerics: Numerics::default(),
        })
    }

    /// A diffusion run with its averaged weights, and its experiment.
    ///
    /// # Errors
    /// A folder that is not such a run; damaged or foreign weights.
    pub fn open(run: &Path, device: Device) -> Result<(Self, DiffusionExperiment)> {
        Self::open_task(run, "diffusion", device)
    }

    /// As [`Self::open`], of a run whose checkpoints name this task.
    pub(super) fn open_task(run: &Path, task: &str, device: Device) -> Result<(Self, DiffusionExperiment)> {
        let parameters = Parameters::unfilled(device);
        let (mut generator, experiment, path, mut found) =
            Self::declared(run, task, checkpoint::open_averaged, &parameters)?;
        generator.step = found.progress.step;
        parameters.fill(weights(&mut found)?).with_context(|| path.display().to_string())?;
        parameters.freeze();
        Ok((generator, experiment))
    }

    /// A diffusion run without its weights: it can be asked what it makes, and makes nothing.
    ///
    /// # Errors
    /// A folder that is not such a run.
    pub fn outline(run: &Path) -> Result<Self> {
        Ok(Self::declared(run, "diffusion", checkpoint::open_head, &Parameters::unfilled(Device::Cpu))?.0)
    }

    fn declared(
        run: &Path,
        task: &str,
        open: fn(&Path) -> Result<(PathBuf, Checkpoint)>,
        parameters: &Parameters,
    ) -> Result<(Self, DiffusionExperiment, PathBuf, Checkpoint)> {
        let device = parameters.device();
        let (path, found) = open(run)?;
        let found = found.expect(task, &path)?;
        let experiment: DiffusionExperiment = serde_json::from_value(found.experiment.clone())
            .with_context(|| format!("the experiment stored in {}", path.display()))?;
        let folder = if run.is_dir() { run.to_path_buf() } else { run_of(&path) };
        let space = space_of(&experiment, &folder, device)?;
        let text = match experiment.network.takes().text {
            Some(_) => Some(open_text_encoder(&folder.join(TEXT_ENCODER_FILE), device)?),
            None => None,
        };
        // adapters are merged into what is loaded
        let merged = DiffusionExperiment { trained: Trained::All, ..experiment.clone() };
        let generator = LatentDiffusion::new(&merged, space, text, parameters)?;
        Ok((generator, experiment, path, found))
    }

    /// Normalised z_0 of one clip each, `[N, C, frames, h, w]`, which depends on the clip's numbers and on what it is given
    /// alone. A network with a mask channel can be given frames; what comes back in their places is the network's, not what was
    /// given. One that makes blocks can be given the frames of the past and of the future of its clips (past, block and
    /// future), which come back as they are. A text network that is given none sees the empty prompt.
    ///
    /// # Errors
    /// A sampler that does not fit the noise path; what the network cannot be given.
    pub fn clips(
        &self,
        clips: &[ClipId],
        frames: i64,
        given: &LatentConditions,
        sampler: SamplerConfig,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        match &self.blocks {
            None => self.made(clips, frames, given, None, sampler, on_step),
            Some(blocks) => self.clips_of_blocks(blocks, clips, frames, given, sampler, on_step),
        }
    }

    /// What the network makes of each clip, given the frames around it as they are, too.
    pub(super) fn made(
        &self,
        clips: &[ClipId],
        frames: i64,
        given: &LatentConditions,
        around: Option<Tensor>,
        sampler: SamplerConfig,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let _numerics = self.numerics.begin(self.space.device());
        let [c, _, h, w] = self.latent;
        let draw = |purpose, frames, step: u64| {
            let one = |id: &ClipId| normal(id.seed, purpose, id.sample, (id.clip << 32) | step, &[c, frames, h, w]);
            upload(&Tensor::stack(&clips.iter().map(one).collect::<Vec<_>>(), 0), self.space.device())
        };
        let start = draw(Purpose::SampleStart, frames, 0);
        let texts = self.texts(given.text.as_ref(), clips.len())?;
        let to_network = given.frames.as_ref().filter(|given| given.guidance.reconstruction.is_none());
        let noise = to_network.map(|given| draw(Purpose::Perturbation, given.indices.len() as i64, 0));
        let frames_given = to_network.zip(noise.as_ref()).map(|(given, noise)| {
            let FramesOfClip { indices, frames, guidance } = *given;
            GivenLatents { indices, frames, noise, guidance }
        });
        let labels = self.labels(given.classes.as_ref(), clips.len())?;
        ensure!(
            self.superresolution.is_some() == given.low.is_some(),
            "a network that makes videos larger is given one, and no other is"
        );
        let noisy = |(low, settings): (&Tensor, &SuperResolution)| {
            let times = Times::of_levels(&*self.path, &vec![settings.level; clips.len()], self.space.device());
            let enlarged = times.add_noise(&resized(low, [h, w]), &draw(Purpose::Perturbation, frames, 0));
            (enlarged, times.embedded().shallow_clone())
        };
        let of_low = given.low.zip(self.superresolution.as_ref());
        let to_clips = GivenToClips { frames: frames_given, around, texts, labels, concat: of_low.map(noisy) };
        self.check_sampler(&*sampler)?;
        let mut denoiser = conditioned(&*self.network, &*self.path, self.predict, &start, to_clips)?;
        if let Some((given, weight)) = given.frames.as_ref().and_then(|g| Some((g, g.guidance.reconstruction?))) {
            let noise = Box::new(|call| draw(Purpose::Replacement, frames, call));
            let observed = observed_frames(&start, given, noise)?;
            denoiser = Box::new(Reconstruction::new(denoiser, &*self.path, observed, weight));
        }
        if let Some((low, settings)) = of_low.filter(|(_, settings)| settings.reconstruction > 0.0) {
            let observed = Observed::LowResolution(low.shallow_clone());
            denoiser = Box::new(Reconstruction::new(denoiser, &*self.path, observed, settings.reconstruction));
        }
        let noise = |i: usize| draw(Purpose::SampleStep, frames, i as u64);
        sample(&*denoiser, &*sampler, &*self.path, &start, &noise, on_step)
    }

    /// # Errors
    /// A sampler that does not fit the noise path, or what the network predicts.
    pub fn check_sampler(&self, sampler: &dyn Sampler) -> Result<()> {
        self.predict.check(&*self.path, sampler.start(&*self.path)?.times())
    }

    /// The labels of so many clips, where classes are given.
    fn labels(&self, given: Option<&Classes>, clips: usize) -> Result<Option<GivenLabels>> {
        let Some(Classes { numbers, guidance }) = given else { return Ok(None) };
        ensure!(numbers.len() == clips, "{} classes for {clips} clips", numbers.len());
        self.check_classes(&Classes { numbers, guidance: *guidance })?;
        let labels = upload(&Tensor::from_slice(numbers), self.space.device());
        Ok(Some(GivenLabels { labels, guidance: (*guidance != 1.0).then_some(*guidance) }))
    }

    /// Whether the network knows these classes, and can be guided by them.
    fn check_classes(&self, Classes { numbers, guidance }: &Classes) -> Result<()> {
        let known = self.network.ports().classes.context("this network knows no classes: it cannot be given one")?;
        self.labels.as_ref().map_or(Ok(()), |labels| labels.check_guidance(*guidance))?;
        let foreign = numbers.iter().find(|number| !(0..known).contains(*number));
        ensure!(foreign.is_none(), "class {}: this network knows 0 to {}", foreign.copied().unwrap_or(-1), known - 1);
        Ok(())
    }

    /// Encoded texts of so many clips, the empty one where none is given; none for a network that attends to none.
    fn texts(&self, given: Option<&TextPrompts>, clips: usize) -> Result<Option<GivenTexts>> {
        let Some(given) = given else {
            let empty = vec![""; clips];
            let contexts = self.text.as_ref().map(|text| text.encode(&empty)).transpose()?;
            return Ok(contexts.map(|contexts| GivenTexts { contexts, guidance: None }));
        };
        let text = self.text.as_ref().context(NO_TEXT)?;
        ensure!(given.prompts.len() == clips, "{} prompts for {clips} clips", given.prompts.len());
        let guidance = match given.guidance {
            1.0 => None,
            weight => Some((text.encode(&vec![given.negative; clips])?, weight)),
        };
        Ok(Some(GivenTexts { contexts: text.encode(given.prompts)?, guidance }))
    }

    /// Normalised latents → u8 `[N, 3, F, H, W]` on the host, one at a time in the decoder.
    ///
    /// # Errors
    /// Those of the device.
    pub fn decode(&self, z_0: &Tensor) -> Result<Tensor> {
        let _numerics = self.numerics.begin(self.space.device());
        let clip = |i| Readback::of(&no_grad(|| to_u8(&self.space.decode(&z_0.narrow(0, i, 1)))));
        let clips: Vec<Readback> = (0..z_0.size()[0]).map(clip).collect::<Result<_>>()?;
        let clips: Vec<Tensor> = clips.iter().map(Readback::wait).collect::<Result<_>>()?;
        Ok(Tensor::cat(&clips, 0))
    }
}

impl VideoModel for LatentDiffusion {
    fn clip(&self) -> [i64; 4] {
        let [_, _, h, w] = self.latent;
        let [frames, height, width] = self.space.settings().clip_shape([self.video_frames, h, w]);
        [3, frames, height, width]
    }

    fn accepts(&self) -> Accepts {
        let known = |labels: &LabelConditioning| {
            Some(KnownClasses { list: labels.classes.clone()?, guidance: labels.guidance })
        };
        Accepts { text: self.text.as_ref().map(|_| self.text_guidance), classes: self.labels.as_ref().and_then(known) }
    }

    fn check(&self, given: &Given) -> Result<()> {
        let Given { text, classes, first_frames } = given;
        ensure!(text.is_none() || self.text.is_some(), NO_TEXT);
        if let Some(classes) = classes {
            self.check_classes(classes)?;
        }
        match (first_frames, &self.blocks) {
            (None, _) => Ok(()),
            (Some(_), Some(blocks)) => blocks.check_first_frame(),
            (Some(_), None) => self.first_frame_guidance().map(drop),
        }
    }

    fn videos(&self, samples: &[SampleId], given: &Given, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        given.check_count(samples.len())?;
        let clips: Vec<ClipId> =
            samples.iter().map(|&SampleId { seed, sample }| ClipId { seed, sample, clip: 0 }).collect();
        let Given { text, classes, first_frames } = *given;
        if let Some(blocks) = &self.blocks {
            return self.videos_of_blocks(blocks, samples, first_frames, on_step);
        }
        let first = match first_frames {
            Some(pictures) => Some((self.first_latents(pictures)?, self.first_frame_guidance()?)),
            None => None,
        };
        let frames =
            first.as_ref().map(|(frames, guidance)| FramesOfClip { indices: &[0], frames, guidance: *guidance });
        let given = LatentConditions { frames, text, classes, low: None };
        let z_0 = self.clips(&clips, self.latent[1], &given, self.sampler, on_step)?;
        if let Some((frames, _)) = &first {
            z_0.narrow(2, 0, 1).copy_(frames);
        }
        self.decode(&z_0)
    }

    fn describe(&self) -> String {
        format!("{}, {}", self.sampler.describe(), self.numerics.words())
    }

    fn sampling(&self) -> Value {
        serde_json::to_value(self.sampler).expect("a sampler's settings are JSON")
    }

    fn step(&self) -> i64 {
        self.step
    }

    fn device(&self) -> Device {
        self.space.device()
    }

    fn data(&self) -> Option<&DataConfig> {
        Some(&self.data)
    }

    fn set_numerics(&mut self, numerics: Numerics) {
        self.numerics = numerics;
    }

    fn set_sampling(&mut self, choice: &SamplerChoice) -> Result<()> {
        let sampler = choice.over(&self.sampler)?;
        self.check_sampler(&*sampler)?;
        self.sampler = sampler;
        Ok(())
    }

    fn resize(&mut self, frames: Option<i64>, height: Option<i64>, width: Option<i64>) -> Result<()> {
        let DataConfig { frames: trained, resolution, .. } = self.data;
        let [height, width] = [height, width].map(|side| side.unwrap_or(resolution));
        let frames = frames.unwrap_or(trained);
        ensure!(frames >= 1 && height >= 1 && width >= 1, "a clip of {frames} frames of {width}x{height}");
        let [c, f, h, w] = self.space.latent_shape(frames, height, width)?;
        let seen = (f - 1) / self.latent_stride + 1;
        if self.blocks.is_some() {
            ensure!(
                self.latent[2..] == [h, w],
                "{width}x{height}: this network makes videos of {resolution}x{resolution} alone, of any length"
            );
            self.video_frames = seen;
            return Ok(());
        }
        let [of_frames, of_height, of_width] = self.multiple_of;
        for (side, pixels, multiple) in [(h, height, of_height), (w, width, of_width)] {
            let factor = pixels / side * multiple;
            ensure!(side % multiple == 0, "{width}x{height}: {pixels} is not a multiple of {factor}");
        }
        ensure!(
            self.takes_other_clips || self.latent == [c, seen, h, w],
            "a clip of {frames} frames of {width}x{height}: this network makes clips of the length and size of its training \
             alone, {:?} (3, F, H, W)",
            self.clip()
        );
        ensure!(seen % of_frames == 0, "{frames} frames are {seen} of latents, which is not a multiple of {of_frames}");
        self.latent = [c, seen, h, w];
        self.video_frames = seen;
        Ok(())
    }

    fn codec_baselines(&self) -> Option<&dyn CodecBaselines> {
        Some(self)
    }
}

impl CodecBaselines for LatentDiffusion {
    fn gaussian_videos(&self, samples: &[u64], seed: u64) -> Result<Tensor> {
        let [c, _, h, w] = self.latent;
        let z_0 = normal_batch(seed, Purpose::GaussianLatents, samples, 0, &[c, self.video_frames, h, w]);
        self.decode(&upload(&z_0, self.space.device()))
    }

    fn reconstructed(&self, clips: &Tensor) -> Result<Option<Tensor>> {
        if self.space.settings().is_exact() {
            return Ok(None);
        }
        let x = normalise(&upload(clips, self.space.device()));
        Ok(Some(Readback::of(&to_u8(&self.space.reconstruct(&x)))?.wait()?))
    }
}

/// Given frames in clips of the shape of `like`, `[B, C, F, h, w]`.
fn observed_frames<'a>(
    like: &Tensor,
    given: &FramesOfClip,
    noise: Box<dyn Fn(u64) -> Tensor + 'a>,
) -> Result<Observed<'a>> {
    let places = upload(&Tensor::from_slice(given.indices), like.device());
    let frames =
        like.zeros_like().f_index_copy(2, &places, given.frames).context("given frames do not fit into the clip")?;
    let mask = Tensor::zeros([1, 1, like.size()[2], 1, 1], (like.kind(), like.device())).index_fill(2, &places, 1.0);
    Ok(Observed::Frames { frames, mask, noise })
}

/// What an experiment's network makes of a clip's latent: every n-th frame, and of these the block where there are `blocks`,
/// `[C, F, h, w]`.
///
/// # Errors
/// Blocks that leave nothing to make.
pub fn seen(clip: [i64; 4], experiment: &DiffusionExperiment) -> Result<[i64; 4]> {
    let [c, f, h, w] = clip;
    let frames = (f - 1) / experiment.latent_stride + 1;
    let Some(blocks) = &experiment.blocks else { return Ok([c, frames, h, w]) };
    blocks.validate(frames).context("blocks")?;
    Ok([c, frames - blocks.around(), h, w])
}

/// What enters and leaves an experiment's network, for clips of the shape that it sees.
pub fn ports(experiment: &DiffusionExperiment, latent: [i64; 4]) -> Ports {
    let conditioning = experiment.conditioning.as_ref();
    Ports {
        outputs: latent[0] * if experiment.objective.learns_variance() { 2 } else { 1 },
        mask: conditioning.is_some(),
        past: experiment.blocks.as_ref().map_or(0, |blocks| blocks.past),
        future: experiment.blocks.as_ref().map_or(0, |blocks| blocks.future),
        concat: if experiment.superresolution.is_some() { latent[0] } else { 0 },
        concat_time: experiment.superresolution.is_some(),
        levels: conditioning.and_then(FrameConditioning::levels),
        text: experiment.network.takes().text,
        classes: experiment.labels.as_ref().and_then(|labels| Some(labels.classes.as_ref()?.count())),
        ..Ports::of(latent)
    }
}

/// The averaged weights of a diffusion run, fitted to another experiment's network: a short model's to a
/// prediction model's.
///
/// # Errors
/// A folder that is not such a run.
pub fn starting_weights(
    run: &Path,
    experiment: &DiffusionExperiment,
    latent: [i64; 4],
) -> Result<BTreeMap<String, Tensor>> {
    let (path, found) = checkpoint::open_averaged(run)?;
    // a second stage can start from its own kind, or from a network that is given no video
    let task = if found.task == experiment.task() { experiment.task() } else { "diffusion" };
    let mut found = found.expect(task, &path)?;
    warn_if_unfinished("start_from", run, &found);
    let mut weights = weights(&mut found)?;
    let before: Option<LabelConditioning> =
        serde_json::from_value(found.experiment["labels"].clone()).context("the stored labels")?;
    match_classes(&mut weights, before.as_ref(), experiment)
        .with_context(|| format!("start_from: {}", run.display()))?;
    experiment.network.adopt(&mut weights, &ports(experiment, latent));
    Ok(weights)
}

/// The rows of a table of classes in the order of this experiment's classes, by name. A class that is new starts as no class.
fn match_classes(
    weights: &mut BTreeMap<String, Tensor>,
    before: Option<&LabelConditioning>,
    experiment: &DiffusionExperiment,
) -> Result<()> {
    let classes = |labels: Option<&LabelConditioning>| labels.and_then(|labels| labels.classes.clone());
    let Some(before) = classes(before) else { return Ok(()) };
    let Some(now) = classes(experiment.labels.as_ref()) else {
        bail!("it tells classes apart ({}): give this experiment labels too", before.line());
    };
    let Some(table) = experiment.network.class_table().and_then(|name| weights.get_mut(name)) else { return Ok(()) };
    let none = before.count();
    let rows = now.numbers_in(&before)?;
    let new = rows.iter().filter(|row| row.is_none()).count();
    if (new > 0 || rows.len() as i64 != none) && rank().is_none_or(|rank| rank == 0) {
        tracing::info!(
            "start_from: of {} classes {} are the run's, by name, and {new} are new and start as no class; {} of the run's \
             are not among them",
            rows.len(),
            rows.len() - new,
            none - (rows.len() - new) as i64
        );
    }
    let rows: Vec<i64> = rows.into_iter().map(|row| row.unwrap_or(none)).chain([none]).collect();
    *table = table.index_select(0, &Tensor::from_slice(&rows).to_device(table.device()));
    Ok(())
}
