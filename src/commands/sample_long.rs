//! `lvdm sample-long`: a prediction run, and perhaps an interpolation run → videos of any length.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::value_parser;

use super::{
    out::{check_folder, check_mp4, remember},
    sample::{MOST_VIDEOS, PrecisionOptions, SamplerOptions, finite},
};
use crate::{
    data::VideoWriter,
    diffusion::{Guidance, GuidanceConfig, LongVideoPlan, Role},
    distributed::{self, Launch, Ranks},
    experiment::{LongVideoConfig, Numerics, UserError},
    models::{LongVideo, forget, open_long, outline_long},
    torch::DeviceName,
    train::progress::Progress,
};

/// Sample long videos: autoregressive, or hierarchical with --interpolation; interrupted, it goes on
#[derive(Debug, clap::Args)]
pub struct SampleLong {
    /// Run of a prediction model (`lvdm train diffusion` with `conditioning` or `blocks`, with --reconstruction any; `lvdm train
    /// transformer`), or one of its checkpoints
    prediction: PathBuf,
    /// Run of an interpolation model, which fills the gaps between sparse frames
    #[arg(long)]
    interpolation: Option<PathBuf>,
    /// Frames of a video
    #[arg(long, default_value_t = 1024)]
    frames: i64,
    /// Latent frames that each clip is given of the one before
    #[arg(long, default_value_t = 1)]
    overlap: i64,
    /// Latent frames from one sparse frame to the next (default: the prediction run's latent_stride)
    #[arg(long)]
    gap: Option<i64>,
    /// Weight w of unconditional guidance
    #[arg(long, default_value_t = GuidanceConfig::default().weight, value_parser = finite)]
    guidance: f64,
    /// How w mixes the two predictions
    #[arg(long, value_enum, default_value = "cfg-original")]
    guidance_form: FormName,
    /// Noise level of given frames
    #[arg(long, default_value_t = 100)]
    level: i64,
    /// Given frames carry no noise
    #[arg(long, conflicts_with = "level")]
    clean: bool,
    /// Weight of reconstruction guidance, with which any run continues a video, whatever it was trained to be given; 0 is
    /// plain replacement. It takes the memory of a training step
    #[arg(long, value_parser = finite, conflicts_with_all = ["guidance", "guidance_form", "level", "clean"])]
    reconstruction: Option<f64>,
    /// How many videos
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u64).range(1..=MOST_VIDEOS))]
    videos: u64,
    #[command(flatten)]
    sampler: SamplerOptions,
    /// Video i depends on the seed and i alone
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Clips in one pass of the networks
    #[arg(long, default_value_t = 4)]
    batch: i64,
    /// Frames a second of the files
    #[arg(long, default_value_t = 8.0)]
    fps: f64,
    /// Folder of the files 00000.mp4, 00001.mp4, …
    #[arg(long, required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Only print the plan: which frames are made in which clip
    #[arg(long)]
    dry_run: bool,
    /// The plan as JSON: a list of steps with model, given and written latent frames
    #[arg(long, requires = "dry_run")]
    json: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    precision: PrecisionOptions,
    #[command(flatten)]
    launch: Launch,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FormName {
    /// ε_c + w (ε_c − ε_u), the paper's
    CfgOriginal,
    /// ε_u + w (ε_c − ε_u)
    Interpolate,
}

impl SampleLong {
    /// # Errors
    /// Runs that do not fit together or the request; a folder of videos of other settings; a full disk.
    pub fn run(self) -> Result<()> {
        for run in [Some(&self.prediction), self.interpolation.as_ref()].into_iter().flatten() {
            if !run.exists() {
                return Err(UserError(format!("there is no run {}", run.display())).into());
            }
        }
        if !self.dry_run && !cfg!(feature = "video") {
            let hint = "this binary was built without the feature `video` and cannot write mp4; \
                        `lvdm evaluate-long` measures long videos without writing them";
            return Err(UserError(hint.into()).into());
        }
        if let Some(out) = &self.out {
            check_folder(out)?;
        }
        let form = match self.guidance_form {
            FormName::CfgOriginal => Guidance::CfgOriginal,
            FormName::Interpolate => Guidance::Interpolate,
        };
        let Numerics { precision, tf32 } = self.precision.over(Numerics::default());
        let level = (!self.clean).then_some(self.level);
        let config = LongVideoConfig {
            prediction: self.prediction.clone(),
            interpolation: self.interpolation.clone(),
            overlap: self.overlap,
            gap: self.gap,
            guidance: GuidanceConfig { weight: self.guidance, form, level, reconstruction: self.reconstruction },
            sampler: self.sampler.choice()?,
            batch: self.batch,
            precision,
            tf32,
        };
        if let Some(out) = self.out.as_ref().filter(|_| !self.dry_run) {
            return distributed::run(&self.launch, self.device, |ranks, device| {
                self.sample(&open_long(&config, self.frames, device)?, out, ranks)
            });
        }
        print_plan(&outline_long(&config, self.frames)?.plan, self.json)
    }

    /// Batches are dealt out to ranks, each of which writes its own videos.
    fn sample(&self, long: &LongVideo, out: &Path, ranks: &Ranks) -> Result<()> {
        let [height, width] = long.size();
        check_mp4(height, width, self.fps)?;
        ranks.on_first(|| remember(out, &long.settings(self.seed)))?;
        let file = |sample: u64| out.join(format!("{sample:05}.mp4"));
        let there = (0..self.videos).filter(|&sample| file(sample).exists()).count();
        if there > 0 && ranks.is_first() {
            tracing::info!("{there} of {} videos are there already in {}", self.videos, out.display());
        }
        let _prepared = long.keep_prepared();
        let clips = long.plan.steps.len() as u64;
        let mut bar = Progress::new("sample", self.videos * clips, 0).shown(ranks.is_first());
        for first in (0..self.videos).step_by(self.batch as usize).skip(ranks.rank()).step_by(ranks.size()) {
            let samples: Vec<u64> = (first..(first + self.batch as u64).min(self.videos)).collect();
            if samples.iter().all(|&sample| file(sample).exists()) {
                continue;
            }
            let state = out.join(format!("unfinished-{first:05}"));
            let z = long.latents(&samples, self.seed, &state, &mut |clip| bar.step(first * clips + clip, ""))?;
            for (i, &sample) in samples.iter().enumerate().filter(|(_, sample)| !file(**sample).exists()) {
                bar.step((first + samples.len() as u64) * clips, &format!("writing {}", file(sample).display()));
                let mut writer = None;
                long.decode(&z.narrow(0, i as i64, 1), &mut |piece| {
                    VideoWriter::append(&mut writer, &file(sample), piece, self.fps)
                })?;
                writer.context("a video without frames")?.finish()?;
            }
            forget(&state)?;
        }
        bar.finish();
        ranks.meet()?;
        if ranks.is_first() {
            say!("{} videos of {} frames in {}", self.videos, self.frames, out.display());
        }
        Ok(())
    }
}

/// `0, 4, 8, 12` as `0 … 12 by 4`.
fn brief(frames: &[i64]) -> String {
    match frames {
        [] => "nothing".into(),
        [a] => a.to_string(),
        [a, b] => format!("{a}, {b}"),
        [a, b, .., last] if b - a == 1 => format!("{a} … {last}"),
        [a, b, .., last] => format!("{a} … {last} by {}", b - a),
    }
}

fn print_plan(plan: &LongVideoPlan, json: bool) -> Result<()> {
    if json {
        say!("{}", serde_json::to_string(&plan.steps)?);
        return Ok(());
    }
    say!("{:>5}  {:13}  {:>22}  {:>22}", "clip", "model", "given latent frames", "written");
    for (i, step) in plan.steps.iter().enumerate() {
        let model = match step.model {
            Role::Prediction => "prediction",
            Role::Interpolation => "interpolation",
        };
        say!("{i:5}  {model:13}  {:>22}  {:>22}", brief(&step.given), brief(&step.written));
    }
    say!("{} clips make {} latent frames", plan.steps.len(), plan.frames);
    Ok(())
}
