//! A cascade: a model that makes videos of a low resolution, and a denoiser that makes them larger, as one.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tch::{Device, Tensor};

use super::{
    latent_diffusion::{LatentConditions, LatentDiffusion},
    model::{Accepts, Classes, ClipId, Given, SampleId, VideoModel},
};
use crate::{
    codecs::Chunks,
    data::{DataConfig, normalise},
    diffusion::SamplerChoice,
    experiment::{ClassList, Numerics, SUPERRESOLUTION, SuperResolution, UserError},
    run::run_of,
    run_files::BASE_FOLDER,
    torch::upload,
};

/// The run of a training with `superresolution`, with the model that it carries.
pub struct Cascade {
    base: Box<dyn VideoModel>,
    upsampler: LatentDiffusion,
    settings: SuperResolution,
}

impl Cascade {
    /// Of a run; `open` opens the model that it carries, of whatever family.
    ///
    /// # Errors
    /// A folder that is not such a run; damaged or foreign weights; a base that makes videos of another size than the network
    /// was trained to be given.
    pub fn open(
        run: &Path,
        device: Device,
        open: impl FnOnce(&Path, Device) -> Result<Box<dyn VideoModel>>,
    ) -> Result<Self> {
        let (upsampler, experiment) = LatentDiffusion::open_task(run, SUPERRESOLUTION, device)?;
        let settings = experiment.superresolution.context("the stored experiment has no `superresolution`")?;
        let folder = if run.is_dir() { run.to_path_buf() } else { run_of(run) };
        let base = open(&folder.join(BASE_FOLDER), device).context("superresolution.base")?;
        check_base(&*base, &settings, upsampler.accepts().classes.as_ref().map(|classes| &classes.list))?;
        Ok(Cascade { base, upsampler, settings })
    }

    /// Videos u8 `[N, 3, F, h, w]` of the base → u8 `[N, 3, F, H, W]`, window by window. `on_step` is called at each step.
    fn enlarged(&self, low: &Tensor, samples: &[SampleId], given: &Given, on_step: &mut dyn FnMut()) -> Result<Tensor> {
        let (n, c, f, h, w) = low.size5()?;
        let [_, _, height, width] = self.upsampler.clip();
        let low = normalise(&upload(low, self.upsampler.device()));
        // guidance by a class is the base's
        let classes = given.classes.filter(|_| self.upsampler.accepts().classes.is_some());
        let classes = classes.map(|classes| Classes { guidance: 1.0, ..classes });
        let mut window = 0;
        let mut enlarge = |low: &Tensor| {
            let frames = low.size()[2];
            let low = low.reshape([n, c, frames, h, w]);
            // of no other stage, nor of the base, whose clips are counted from 0
            let clip = (height as u64) << 16 | window;
            window += 1;
            let ids: Vec<ClipId> =
                samples.iter().map(|&SampleId { seed, sample }| ClipId { seed, sample, clip }).collect();
            let given = LatentConditions { low: Some(&low), classes, ..LatentConditions::default() };
            let sampler = self.upsampler.sampler;
            let z_0 = self.upsampler.clips(&ids, frames, &given, sampler, &mut |_, _| on_step())?;
            Ok(z_0.reshape([1, n * c, frames, height, width]))
        };
        let mut pieces = Vec::new();
        // all videos as channels of one
        self.windows().decode(&low.reshape([1, n * c, f, h, w]), &mut enlarge, &mut |piece| {
            pieces.push(piece.shallow_clone());
            Ok(())
        })?;
        self.upsampler.decode(&Tensor::cat(&pieces, 1).reshape([n, c, f, height, width]))
    }

    /// How a video that is longer than the clips of the training is cut.
    fn windows(&self) -> Chunks {
        let [_, length, ..] = self.upsampler.clip();
        Chunks { length, overlap: self.settings.overlap, factor: 1, reach: 0, missing: 0 }
    }

    /// Calls of the upsampling network for a video.
    fn calls(&self) -> Result<usize> {
        let steps = self.upsampler.sampler.start(&*self.upsampler.path)?.times().len();
        Ok(steps * self.windows().starts(self.base.clip()[1]).len())
    }
}

/// Whether a base fits the settings and the classes of the network that makes its videos larger.
///
/// # Errors
/// [`UserError`]: a base whose videos have another size than the settings say, or whose classes are others.
pub fn check_base(base: &dyn VideoModel, settings: &SuperResolution, classes: Option<&ClassList>) -> Result<()> {
    let ([_, _, h, w], side) = (base.clip(), settings.resolution);
    let wrong = |text: String| Err(UserError(format!("superresolution: {}{text}", settings.base.display())).into());
    if [h, w] != [side; 2] {
        return wrong(format!(" makes videos of {w}x{h}, and resolution is {side}"));
    }
    let (Some(own), Some(of_base)) = (classes, base.accepts().classes) else { return Ok(()) };
    // one number stands for a class in both stages
    let same = own.count() == of_base.list.count()
        && of_base.list.numbers_in(own)?.into_iter().zip(0..).all(|(found, number)| found == Some(number));
    if same {
        return Ok(());
    }
    wrong(format!(" tells apart {}, and this network {}", of_base.list.line(), own.line()))
}

impl VideoModel for Cascade {
    fn clip(&self) -> [i64; 4] {
        let ([_, f, ..], [c, _, h, w]) = (self.base.clip(), self.upsampler.clip());
        [c, f, h, w]
    }

    fn accepts(&self) -> Accepts {
        self.base.accepts()
    }

    fn check(&self, given: &Given) -> Result<()> {
        self.base.check(given)
    }

    fn videos(&self, samples: &[SampleId], given: &Given, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        let (more, mut done, mut all) = (self.calls()?, 0, 0);
        let low = self.base.videos(samples, given, &mut |i, steps| {
            (done, all) = (i, steps + more);
            on_step(done, all);
        })?;
        self.enlarged(&low, samples, given, &mut || {
            done += 1;
            on_step(done, all);
        })
    }

    fn describe(&self) -> String {
        let SuperResolution { level, reconstruction, .. } = self.settings;
        let guided = match reconstruction {
            0.0 => String::new(),
            weight => format!(", reconstruction guidance {weight}"),
        };
        let ([_, _, h, w], own) = (self.base.clip(), self.upsampler.describe());
        format!("{w}x{h} by {}; enlarged by {own}, noise level {level}{guided}", self.base.describe())
    }

    fn sampling(&self) -> Value {
        let (base, mut own) = (self.base.sampling(), self.upsampler.sampling());
        if base != own {
            own["base"] = base;
        }
        own
    }

    fn step(&self) -> i64 {
        self.upsampler.step()
    }

    fn device(&self) -> Device {
        self.upsampler.device()
    }

    fn data(&self) -> Option<&DataConfig> {
        self.upsampler.data()
    }

    fn set_numerics(&mut self, numerics: Numerics) {
        self.base.set_numerics(numerics);
        self.upsampler.set_numerics(numerics);
    }

    /// Both stages sample so.
    fn set_sampling(&mut self, choice: &SamplerChoice) -> Result<()> {
        self.base.set_sampling(choice).context("the base")?;
        self.upsampler.set_sampling(choice)
    }

    fn resize(&mut self, frames: Option<i64>, height: Option<i64>, width: Option<i64>) -> Result<()> {
        let [_, _, h, w] = self.clip();
        ensure!(
            height.is_none_or(|height| height == h) && width.is_none_or(|width| width == w),
            "this cascade makes videos of {w}x{h} alone"
        );
        self.base.resize(frames, None, None)
    }
}
