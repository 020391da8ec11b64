//! A transformer over codes: codes, one after the other → vectors of the codebook → decoder → u8.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use tch::{Device, Tensor, no_grad};

use super::model::{Accepts, Classes, ClipId, CodecBaselines, Given, KnownClasses, SampleId, VideoModel};
use crate::{
    autoregression::{CodeSampling, Vocabulary, fill_gap, numbers, slide},
    checkpoint::{self, Checkpoint},
    codecs::{CodecSettings, LatentSpace},
    data::{DataConfig, normalise, to_u8},
    diffusion::SamplerChoice,
    experiment::{ClassList, Numerics, TransformerExperiment},
    networks::{Gpt, Sequences},
    nn::Parameters,
    random::{Purpose, normal_batch},
    run::{open_latent_space, run_of, weights},
    run_files::AUTOENCODER_FILE,
    torch::{Readback, upload},
};

/// A transformer with the codec whose codes it makes.
pub struct CodeTransformer {
    /// With averaged weights where there are any.
    pub network: Gpt,
    /// What its tokens stand for.
    pub vocabulary: Vocabulary,
    /// Encodes and decodes.
    pub space: LatentSpace,
    /// The shape `[C, F, h, w]` of the latents of its videos. The network was trained on as many frames as `trained` says.
    pub latent: [i64; 4],
    /// Latent frames of a training sequence.
    pub trained: i64,
    /// Every n-th latent frame of a video is what the network makes.
    pub latent_stride: i64,
    /// How codes are drawn.
    pub sampling: CodeSampling,
    classes: Option<ClassList>,
    data: DataConfig,
    step: i64,
    pub(super) numerics: Numerics,
}

/// Of an experiment's transformer over the codes of a codec: what its tokens stand for, the shape `[C, F, h, w]` of the latents
/// that it sees of a clip, and its sequences.
///
/// # Errors
/// A codec without a codebook; clips that do not fit it, or have no gap to fill.
pub fn sequences(
    experiment: &TransformerExperiment,
    codec: &dyn CodecSettings,
) -> Result<(Vocabulary, [i64; 4], Sequences)> {
    let TransformerExperiment { data, labels, latent_stride, interpolation, .. } = experiment;
    let codes = codec
        .codebook()
        .with_context(|| format!("autoencoder: a {} has no codebook, so that a clip has no codes", codec.name()))?;
    let [c, frames, h, w] = codec.latent_shape(data.frames, data.resolution, data.resolution)?;
    let frames = (frames - 1) / latent_stride + 1;
    ensure!(
        frames >= if *interpolation { 3 } else { 1 },
        "interpolation: clips of {frames} latent frames have none between the first and the last"
    );
    let classes = labels.as_ref().and_then(|labels| labels.classes.as_ref()).map_or(0, ClassList::count);
    let vocabulary = Vocabulary { classes, codes };
    let unmasked = if *interpolation { h * w } else { 0 };
    Ok((vocabulary, [c, frames, h, w], Sequences { vocabulary: vocabulary.size(), length: frames * h * w, unmasked }))
}

impl CodeTransformer {
    /// Declares the network of an experiment in `parameters`.
    ///
    /// # Errors
    /// A codec without a codebook; settings that do not fit together.
    pub fn new(experiment: &TransformerExperiment, space: LatentSpace, parameters: &Parameters) -> Result<Self> {
        let TransformerExperiment { data, labels, latent_stride, network, sampler, .. } = experiment;
        network.validate().context("network")?;
        let (vocabulary, latent, sequences) = sequences(experiment, space.settings())?;
        let model = CodeTransformer {
            network: Gpt::new(&parameters.root(), network, sequences),
            vocabulary,
            space,
            latent,
            trained: latent[1],
            latent_stride: *latent_stride,
            sampling: *sampler,
            classes: labels.as_ref().and_then(|labels| labels.classes.clone()),
            data: data.clone(),
            step: 0,
            numerics: Numerics::default(),
        };
        model.check_sampling(sampler).context("sampler")?;
        Ok(model)
    }

    /// A run with its averaged weights.
    ///
    /// # Errors
    /// A folder that is not such a run; damaged or foreign weights.
    pub fn open(run: &Path, device: Device) -> Result<Self> {
        let parameters = Parameters::unfilled(device);
        let (mut model, path, mut found) = Self::declared(run, checkpoint::open_averaged, &parameters)?;
        model.step = found.progress.step;
        parameters.fill(weights(&mut found)?).with_context(|| path.display().to_string())?;
        parameters.freeze();
        Ok(model)
    }

    /// A run without its weights: it can be asked what it makes, and makes nothing.
    ///
    /// # Errors
    /// A folder that is not such a run.
    pub fn outline(run: &Path) -> Result<Self> {
        Ok(Self::declared(run, checkpoint::open_head, &Parameters::unfilled(Device::Cpu))?.0)
    }

    fn declared(
        run: &Path,
        open: fn(&Path) -> Result<(PathBuf, Checkpoint)>,
        parameters: &Parameters,
    ) -> Result<(Self, PathBuf, Checkpoint)> {
        let (path, found) = open(run)?;
        let found = found.expect("transformer", &path)?;
        let experiment: TransformerExperiment = serde_json::from_value(found.experiment.clone())
            .with_context(|| format!("the experiment stored in {}", path.display()))?;
        let folder = if run.is_dir() { run.to_path_buf() } else { run_of(&path) };
        let space = open_latent_space(&folder.join(AUTOENCODER_FILE), parameters.device())?;
        Ok((Self::new(&experiment, space, parameters)?, path, found))
    }

    /// Whether it fills gaps and makes no videos alone.
    pub fn fills_gaps(&self) -> bool {
        self.network.sequences().unmasked > 0
    }

    fn makes_videos(&self) -> Result<()> {
        ensure!(
            !self.fills_gaps(),
            "it was trained with `interpolation`: it fills the gaps between latent frames that another transformer makes, and \
             makes no videos alone"
        );
        Ok(())
    }

    /// Whether its codes can be drawn so.
    fn check_sampling(&self, sampling: &CodeSampling) -> Result<()> {
        sampling.validate()?;
        ensure!(
            self.fills_gaps() || sampling.window < self.trained.max(2),
            "window: {} latent frames and the next are more than the {} of training",
            sampling.window,
            self.trained
        );
        Ok(())
    }

    /// Tokens of a latent frame.
    fn frame(&self) -> i64 {
        self.latent[2] * self.latent[3]
    }

    /// What the sequences of videos begin with.
    fn start(&self, videos: usize, classes: Option<&[i64]>) -> Result<Tensor> {
        ensure!(
            classes.is_some() == self.classes.is_some(),
            "its sequences begin with a class where it was trained with `labels`, and only there"
        );
        let labels = classes.map(Tensor::from_slice);
        Ok(self.vocabulary.start(labels.as_ref(), videos as i64, self.space.device()))
    }

    /// The codes of the numbered clips, `[N, F, h, w]`, of so many latent frames, with the class of each where it knows classes.
    /// A clip depends on its numbers, its class and the codes `[N, k, h, w]` of its first latent frames where these are given,
    /// and on nothing else; a longer one begins as a shorter one does. `on_step(i, tokens)` is called at each token.
    ///
    /// # Errors
    /// A model that fills gaps; classes that it does not know.
    pub fn codes(
        &self,
        clips: &[ClipId],
        frames: i64,
        first: Option<&Tensor>,
        classes: Option<&[i64]>,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        self.makes_videos()?;
        let _numerics = self.numerics.begin(self.space.device());
        let start = self.start(clips.len(), classes)?;
        let first = first.map(|codes| self.vocabulary.tokens(&upload(codes, self.space.device())));
        let count = frames * self.frame() - first.as_ref().map_or(0, |first| first.size()[1]);
        let sizes = [frames, self.frame(), self.sampling.window];
        let mut draw = self.draws(clips, count, on_step);
        let tokens = no_grad(|| slide(&self.network, &start, first.as_ref(), sizes, &mut draw));
        Ok(self.vocabulary.codes(&tokens, [self.latent[2], self.latent[3]]))
    }

    /// Fills the gaps between the latent frames of codes `[N, 2, h, w]`: `[N, F, h, w]` with the two at its ends. `on_step` as in
    /// [`Self::codes`].
    ///
    /// # Errors
    /// A model that fills no gaps; classes that it does not know.
    pub fn filled(
        &self,
        clips: &[ClipId],
        ends: &Tensor,
        classes: Option<&[i64]>,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        ensure!(self.fills_gaps(), "it was trained without `interpolation`: it fills no gaps");
        let _numerics = self.numerics.begin(self.space.device());
        let start = self.start(clips.len(), classes)?;
        let tokens = self.vocabulary.tokens(&upload(ends, self.space.device())); // [N, 2·h·w]
        let [before, after] = [0, 1].map(|i| tokens.narrow(1, i * self.frame(), self.frame()));
        let mut draw = self.draws(clips, (self.trained - 2) * self.frame(), on_step);
        let between = no_grad(|| fill_gap(&self.network, &start, [&before, &after], self.sampling.form, &mut draw));
        Ok(self.vocabulary.codes(&Tensor::cat(&[&before, &between, &after], 1), [self.latent[2], self.latent[3]]))
    }

    /// Draws `count` tokens of each clip, one after the other, by numbers that are there before the first.
    fn draws<'a>(
        &'a self,
        clips: &[ClipId],
        count: i64,
        on_step: &'a mut dyn FnMut(usize, usize),
    ) -> impl FnMut(&Tensor) -> Tensor + 'a {
        let row = |id: &ClipId| numbers(id.seed, id.sample, id.clip, count);
        let numbers = Tensor::stack(&clips.iter().map(row).collect::<Vec<_>>(), 1); // [count, N]
        let numbers = upload(&numbers, self.space.device());
        let mut done = 0;
        move |logits| {
            let tokens = self.sampling.draw(logits, &numbers.get(done));
            done += 1;
            on_step(done as usize, count as usize);
            tokens
        }
    }

    /// Codes `[1, F, h, w]` of any length → the video in pieces, u8 `[3, f, H, W]` on the host, in order.
    ///
    /// # Errors
    /// Those of `hand_on` and of the device.
    pub fn decode_pieces(&self, codes: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let _numerics = self.numerics.begin(self.space.device());
        self.space
            .decode_long(&self.space.of_codes(codes)?, &mut |piece| hand_on(&Readback::of(&to_u8(piece))?.wait()?))
    }

    /// Codes `[N, F, h, w]` → u8 `[N, 3, F, H, W]` on the host, one video at a time in the decoder. The host waits once.
    ///
    /// # Errors
    /// Those of the device.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let _numerics = self.numerics.begin(self.space.device());
        let video = |i| {
            let mut pieces = Vec::new();
            self.space.decode_long(&self.space.of_codes(&codes.narrow(0, i, 1))?, &mut |piece| {
                pieces.push(Readback::of(&to_u8(piece))?);
                Ok(())
            })?;
            Ok(pieces)
        };
        let videos: Vec<Vec<Readback>> = (0..codes.size()[0]).map(video).collect::<Result<_>>()?;
        let whole = |pieces: &Vec<Readback>| {
            Ok(Tensor::cat(&pieces.iter().map(Readback::wait).collect::<Result<Vec<_>>>()?, 1))
        };
        Ok(Tensor::stack(&videos.iter().map(whole).collect::<Result<Vec<_>>>()?, 0))
    }
}

impl VideoModel for CodeTransformer {
    fn clip(&self) -> [i64; 4] {
        let [_, f, h, w] = self.latent;
        let [frames, height, width] = self.space.settings().clip_shape([f, h, w]);
        [3, frames, height, width]
    }

    fn accepts(&self) -> Accepts {
        let known = |list: &ClassList| KnownClasses { list: list.clone(), guidance: 1.0 };
        Accepts { text: None, classes: self.classes.as_ref().map(known) }
    }

    fn check(&self, given: &Given) -> Result<()> {
        self.makes_videos()?;
        ensure!(given.text.is_none(), "a transformer over codes cannot be given prompts");
        ensure!(given.first_frames.is_none(), "a transformer over codes cannot be given first frames");
        let Some(Classes { numbers, guidance }) = &given.classes else { return Ok(()) };
        let known = self.vocabulary.classes;
        ensure!(known > 0, "this transformer knows no classes: it cannot be given one");
        ensure!(*guidance == 1.0, "a transformer over codes has no guidance: it must be 1, not {guidance}");
        let foreign = numbers.iter().find(|number| !(0..known).contains(*number));
        ensure!(foreign.is_none(), "class {}: this transformer knows 0 to {}", foreign.unwrap_or(&-1), known - 1);
        Ok(())
    }

    fn videos(&self, samples: &[SampleId], given: &Given, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        given.check_count(samples.len())?;
        self.check(given)?;
        let classes = given.classes.as_ref().map(|classes| classes.numbers);
        let clips: Vec<ClipId> =
            samples.iter().map(|&SampleId { seed, sample }| ClipId { seed, sample, clip: 0 }).collect();
        self.decode(&self.codes(&clips, self.latent[1], None, classes, on_step)?)
    }

    fn describe(&self) -> String {
        format!("{}, {}", self.sampling.describe(), self.numerics.words())
    }

    fn sampling(&self) -> Value {
        serde_json::to_value(self.sampling).expect("settings are JSON")
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
        let mut all: Map<String, Value> = serde_json::from_value(self.sampling())?;
        let known = all.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        let SamplerChoice::Settings(settings) = choice else {
            anyhow::bail!("a transformer over codes has none of diffusion's samplers, but the settings {known}");
        };
        for (name, value) in settings {
            ensure!(all.contains_key(name), "`{name}` is no setting of a transformer over codes, which has {known}");
            all.insert(name.clone(), value.clone());
        }
        let sampling: CodeSampling = serde_json::from_value(Value::Object(all))?;
        self.check_sampling(&sampling)?;
        self.sampling = sampling;
        Ok(())
    }

    fn resize(&mut self, frames: Option<i64>, height: Option<i64>, width: Option<i64>) -> Result<()> {
        let side = self.data.resolution;
        let asked = [height, width].map(|asked| asked.unwrap_or(side));
        ensure!(asked == [side; 2], "this transformer makes videos of {side}x{side} alone");
        let [_, latent, ..] = self.space.latent_shape(frames.unwrap_or(self.data.frames), side, side)?;
        let frames = (latent - 1) / self.latent_stride + 1;
        ensure!(
            self.trained > 1 || frames == 1,
            "this transformer was trained on single latent frames, and goes on from none"
        );
        self.latent[1] = frames;
        Ok(())
    }

    fn codec_baselines(&self) -> Option<&dyn CodecBaselines> {
        Some(self)
    }
}

impl CodecBaselines for CodeTransformer {
    fn gaussian_videos(&self, samples: &[u64], seed: u64) -> Result<Tensor> {
        let _numerics = self.numerics.begin(self.space.device());
        let z_0 = upload(&normal_batch(seed, Purpose::GaussianLatents, samples, 0, &self.latent), self.space.device());
        let clip = |i| Readback::of(&to_u8(&self.space.decode(&z_0.narrow(0, i, 1))));
        let clips: Vec<Readback> = (0..z_0.size()[0]).map(clip).collect::<Result<_>>()?;
        Ok(Tensor::cat(&clips.iter().map(Readback::wait).collect::<Result<Vec<_>>>()?, 0))
    }

    fn reconstructed(&self, clips: &Tensor) -> Result<Option<Tensor>> {
        let x = normalise(&upload(clips, self.space.device()));
        Ok(Some(Readback::of(&to_u8(&self.space.reconstruct(&x)))?.wait()?))
    }
}
