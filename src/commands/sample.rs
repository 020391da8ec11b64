//! `lvdm sample`: a diffusion run → videos.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::value_parser;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use super::out::{Form, Out, check_mp4, remember};

use crate::{
    data::{DataConfig, frame_folder::read_picture},
    diffusion::{
        Ddim, Ddpm, DpmSolver, Euler, GuidanceConfig, Heun, RespacedDdim, RespacedDdpm, SamplerConfig, UniPc, Variance,
    },
    distributed::{self, Launch, Ranks},
    experiment::{Numerics, Precision, UserError},
    models::{Classes, ClipId, FramesOfClip, LatentConditions, LatentDiffusion, TextPrompts},
    run::weights_of,
    text_file::{read_text, trim},
    torch::{DeviceName, upload},
    train::progress::Progress,
};

/// No request is meant to be larger.
pub const MOST_VIDEOS: u64 = 10_000_000;
const MOST_FRAMES: i64 = 1_000_000;
const MOST_PIXELS: i64 = 1 << 16;

/// A number on the command line.
pub fn finite(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    if number.is_finite() { Ok(number) } else { Err("not a finite number".into()) }
}

/// Sample videos from a diffusion run
#[derive(Debug, clap::Args)]
pub struct Sample {
    /// Run folder of `lvdm train diffusion`, or one of its checkpoints
    run: PathBuf,
    /// How many [default: one a prompt, class, seed or first frame, whichever are most; without any 16]
    #[arg(long, value_parser = value_parser!(u64).range(1..=MOST_VIDEOS))]
    videos: Option<u64>,
    #[command(flatten)]
    text: TextOptions,
    /// Class to show, by its name or number, of a run trained with `labels`; given several times, video i is of class i, from
    /// the first again after the last [default: all classes in turn]
    #[arg(long = "class", value_name = "CLASS")]
    classes: Vec<String>,
    /// Frames of a video [default: as trained]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_FRAMES))]
    frames: Option<i64>,
    /// Pixels [default: as trained]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_PIXELS))]
    height: Option<i64>,
    /// Pixels [default: as trained]
    #[arg(long, value_parser = value_parser!(i64).range(1..=MOST_PIXELS))]
    width: Option<i64>,
    #[command(flatten)]
    sampler: SamplerOptions,
    /// Video i depends on the seed and i alone
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// One seed for each video instead of --seed, separated by commas. With more videos than seeds they are used again from
    /// the first. `--seeds 7,9` makes the first video of `--seed 7` and the first video of `--seed 9`
    #[arg(long, value_delimiter = ',', conflicts_with = "seed")]
    seeds: Vec<u64>,
    /// Picture (JPEG or PNG) that a video begins with; given several times, video i begins with picture i, from the first
    /// again after the last. For runs trained with `conditioning`
    #[arg(long = "first-frame", value_name = "FILE")]
    first_frames: Vec<PathBuf>,
    /// Videos in one pass of the network
    #[arg(long, default_value_t = 16, value_parser = value_parser!(u64).range(1..=MOST_VIDEOS))]
    batch: u64,
    /// Frames a second of the files
    #[arg(long, default_value_t = 8.0)]
    fps: f64,
    /// Folder of the files 00000.mp4, 00001.mp4, …, or NAME.mp4 for a single video, or one file for all, without loss: NAME.safetensors (a packed data
    /// set), NAME.npz (`arr_0`) or NAME.npy (uint8 [N, F, H, W, 3], which other projects' FVD takes)
    #[arg(long)]
    out: PathBuf,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    precision: PrecisionOptions,
    #[command(flatten)]
    launch: Launch,
}

/// What a text-to-video run is told.
#[derive(Debug, clap::Args)]
struct TextOptions {
    /// What to show; give it several times for several videos. Video i shows prompt i, from the first again after the last
    #[arg(long = "prompt")]
    prompts: Vec<String>,
    /// File of prompts, one a line
    #[arg(long = "prompts", conflicts_with = "prompts")]
    file: Option<PathBuf>,
    /// How strongly the prompt, or the class, is followed: 1 without guidance; 7.5 to 15 is usual for prompts [default: 7.5,
    /// of a class as the run's `labels.guidance` says]
    #[arg(long, value_parser = finite)]
    guidance: Option<f64>,
    /// What not to show
    #[arg(long)]
    negative: Option<String>,
}

impl TextOptions {
    fn prompts(&self) -> Result<Vec<String>> {
        let Some(file) = &self.file else { return Ok(self.prompts.clone()) };
        let text = read_text(file)
            .map_err(|error| UserError(format!("cannot read the prompts {}: {error}", file.display())))?;
        let prompts: Vec<String> = text.lines().map(trim).filter(|line| !line.is_empty()).map(String::from).collect();
        if prompts.is_empty() {
            return Err(UserError(format!("{} holds no prompts", file.display())).into());
        }
        Ok(prompts)
    }

    /// Whether what is told fits a run that attends to a text, or to none.
    fn check(&self, run: &Path, is_text: bool, has_classes: bool, prompts: &[String]) -> Result<()> {
        let given = !prompts.is_empty();
        let wrong = match (is_text, given) {
            (true, false) => format!("{} makes videos from text: give --prompt \"…\" or --prompts FILE", run.display()),
            (false, true) => format!("{} was not trained with text: it cannot be given prompts", run.display()),
            (false, false) if self.negative.is_some() => {
                "--negative is for runs that make videos from text".to_string()
            }
            (false, false) if self.guidance.is_some() && !has_classes => {
                "--guidance is for runs that make videos from text or of classes".to_string()
            }
            _ => return Ok(()),
        };
        Err(UserError(wrong).into())
    }
}

/// Which sampler, on the command line.
#[derive(Debug, clap::Args)]
pub struct SamplerOptions {
    /// ddim, ddpm, dpm-solver (DPM-Solver++ 2M), unipc, euler, heun, or on evenly kept steps respaced-ddpm (with the learned
    /// variance of networks that have one) or respaced-ddim
    #[arg(long, value_enum, default_value = "ddim")]
    sampler: SamplerName,
    /// Steps of all but DDPM
    #[arg(long, default_value_t = 50)]
    steps: i64,
    /// Noise of DDIM: 0 is deterministic, 1 as noisy as DDPM
    #[arg(long, default_value_t = 1.0, value_parser = finite)]
    eta: f64,
    /// Variance of DDPM
    #[arg(long, value_enum, default_value = "posterior")]
    variance: VarianceName,
}

/// How exactly networks compute, on the command line; what is not said stays as the experiment says, else float32.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct PrecisionOptions {
    /// Of the networks: bf16 is faster on a GPU, and a little less exact [default: f32]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// On a GPU, what is computed in float32 is rounded to TF32: faster, and a little less exact [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    tf32: Option<bool>,
}

impl PrecisionOptions {
    /// What is asked for, over what an experiment says.
    pub fn over(&self, Numerics { precision, tf32 }: Numerics) -> Numerics {
        Numerics { precision: self.precision.unwrap_or(precision), tf32: self.tf32.unwrap_or(tf32) }
    }

    /// Whether anything is asked for.
    pub fn are_given(&self) -> bool {
        self.precision.is_some() || self.tf32.is_some()
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum SamplerName {
    Ddim,
    Ddpm,
    DpmSolver,
    Unipc,
    Euler,
    Heun,
    RespacedDdpm,
    RespacedDdim,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum VarianceName {
    /// of q(z_{t-1} | z_t, z_0)
    Posterior,
    /// beta_t
    Beta,
}

impl SamplerOptions {
    pub fn config(&self) -> SamplerConfig {
        let SamplerOptions { sampler, steps, eta, variance } = *self;
        match sampler {
            SamplerName::Ddim => Ddim { steps, eta }.into(),
            SamplerName::DpmSolver => DpmSolver { steps }.into(),
            SamplerName::Unipc => UniPc { steps }.into(),
            SamplerName::Euler => Euler { steps }.into(),
            SamplerName::Heun => Heun { steps }.into(),
            SamplerName::RespacedDdpm => RespacedDdpm { steps }.into(),
            SamplerName::RespacedDdim => RespacedDdim { steps, eta }.into(),
            SamplerName::Ddpm => {
                let variance = match variance {
                    VarianceName::Posterior => Variance::Posterior,
                    VarianceName::Beta => Variance::Beta,
                };
                Ddpm { variance }.into()
            }
        }
    }
}

impl Sample {
    /// # Errors
    /// A folder that is not a run, a sampler that does not fit its schedule, a full disk.
    pub fn run(self) -> Result<()> {
        let prompts = self.text.prompts()?;
        let most = prompts.len().max(self.seeds.len()).max(self.first_frames.len()).max(self.classes.len()) as u64;
        let videos = self.videos.unwrap_or(if most == 0 { 16 } else { most });
        let form = Form::of(&self.out, videos)?;
        if form.is_video() {
            check_mp4(2, 2, self.fps)?;
        }
        if !self.run.exists() {
            return Err(UserError(format!("there is no run {}", self.run.display())).into());
        }
        distributed::run(&self.launch, self.device, |ranks, device| self.sample(&prompts, videos, form, ranks, device))
    }

    /// The numbers that a video's noise depends on.
    fn clip_id(&self, sample: u64) -> ClipId {
        match self.seeds.len() as u64 {
            0 => ClipId { seed: self.seed, sample, clip: 0 },
            count => ClipId { seed: self.seeds[(sample % count) as usize], sample: 0, clip: 0 },
        }
    }

    /// The numbers of the classes that are asked for.
    fn class_numbers(&self, generator: &LatentDiffusion) -> Result<Vec<i64>> {
        let Some(known) = generator.labels.as_ref().and_then(|labels| labels.classes.as_ref()) else {
            if self.classes.is_empty() {
                return Ok(Vec::new());
            }
            let text = format!("--class: {} was not trained with `labels`: it knows no classes", self.run.display());
            return Err(UserError(text).into());
        };
        let number = |told: &String| known.number(told).map_err(|error| UserError(format!("--class: {error}")).into());
        self.classes.iter().map(number).collect()
    }

    /// The latents of the first frames, `[n, C, 1, h, w]`, and how they are given.
    fn first_latents(&self, generator: &LatentDiffusion) -> Result<Option<(Tensor, GuidanceConfig)>> {
        if self.first_frames.is_empty() {
            return Ok(None);
        }
        let guidance = generator
            .first_frame_guidance(generator.text.is_some())
            .map_err(|error| UserError(format!("--first-frame: {}: {error}", self.run.display())))?;
        let latent = |path: &PathBuf| {
            let picture = read_picture(path).map_err(|error| UserError(format!("--first-frame: {error:#}")))?;
            Ok(generator.picture_latent(&picture))
        };
        let latents: Vec<Tensor> = self.first_frames.iter().map(latent).collect::<Result<_>>()?;
        Ok(Some((Tensor::cat(&latents, 0), guidance)))
    }

    /// Everything that a video depends on, besides its number.
    fn settings(&self, [_, frames, height, width]: [i64; 4], prompts: &[String]) -> Result<Value> {
        let Numerics { precision, tf32 } = self.precision.over(Numerics::default());
        let TextOptions { guidance, negative, .. } = &self.text;
        let mut settings = json!({
            "weights": weights_of(&self.run)?, "frames": frames, "height": height, "width": width,
            "sampler": self.sampler.config(), "seed": self.seed, "seeds": self.seeds, "first_frames": self.first_frames, "prompts": prompts, "guidance": guidance,
            "negative": negative, "precision": precision, "tf32": tf32, "fps": self.fps,
        });
        if !self.classes.is_empty() {
            settings["classes"] = json!(self.classes);
        }
        Ok(settings)
    }

    /// Whole batches are shared among ranks, and rank 0 writes: so the files do not depend on the number of ranks.
    fn sample(&self, prompts: &[String], videos: u64, form: Form, ranks: &Ranks, device: Device) -> Result<()> {
        let sampler = self.sampler.config();
        let (generator, experiment) = LatentDiffusion::open(&self.run, device)?;
        let mut generator = generator.at(self.precision.over(Numerics::default()));
        self.text.check(&self.run, generator.text.is_some(), generator.labels.is_some(), prompts)?;
        let told_classes = self.class_numbers(&generator)?;
        if self.frames.is_some() || self.height.is_some() || self.width.is_some() {
            let DataConfig { frames, resolution, .. } = experiment.data;
            let [height, width] = [self.height, self.width].map(|side| side.unwrap_or(resolution));
            let resized = generator.resize(self.frames.unwrap_or(frames), height, width);
            resized.map_err(|error| UserError(format!("{error:#}")))?;
            if form == Form::Packed && height != width {
                let text = format!("{width}x{height}: packed videos are square; give a folder or NAME.npz");
                return Err(UserError(text).into());
            }
        }
        if let Err(error) = generator.check_sampler(&*sampler) {
            return Err(UserError(format!("{error:#}")).into());
        }
        let first_frames = self.first_latents(&generator)?;
        let clip = generator.clip_size();
        if form.is_video() {
            check_mp4(clip[2], clip[3], self.fps)?;
        }
        if form == Form::Folder {
            ranks.on_first(|| remember(&self.out, &self.settings(clip, prompts)?))?;
        }
        let _prepared = generator.keep_prepared();
        let firsts: Vec<u64> = (0..videos).step_by(self.batch as usize).collect();
        let samples_of = |i: usize| (firsts[i]..(firsts[i] + self.batch).min(videos)).collect::<Vec<u64>>();
        let shown_in = |samples: &[u64]| -> Vec<String> {
            let shown = |&sample: &u64| prompts[(sample % prompts.len() as u64) as usize].clone();
            if prompts.is_empty() { Vec::new() } else { samples.iter().map(shown).collect() }
        };
        let mut out = match ranks.is_first() {
            true => Some(Out::create(form, &self.out, videos as i64, clip, self.fps, self.seed)?),
            false => None,
        };
        let bar = RefCell::new(Progress::new("sample", videos, 0).shown(ranks.is_first()));
        let make = |i: usize| {
            let samples = samples_of(i);
            let shown = shown_in(&samples);
            let text = (!shown.is_empty()).then(|| TextPrompts {
                prompts: &shown,
                negative: self.text.negative.as_deref().unwrap_or_default(),
                guidance: self.text.guidance.unwrap_or(7.5),
            });
            let first = first_frames.as_ref().map(|(latents, guidance)| {
                let rows: Vec<i64> = samples.iter().map(|sample| *sample as i64 % latents.size()[0]).collect();
                (latents.index_select(0, &upload(&Tensor::from_slice(&rows), latents.device())), *guidance)
            });
            let frames =
                first.as_ref().map(|(frames, guidance)| FramesOfClip { indices: &[0], frames, guidance: *guidance });
            let (numbers, guidance) = match told_classes.len() as u64 {
                0 => generator.balanced_classes(&samples).unzip(),
                count => {
                    let number = |sample: &u64| told_classes[(sample % count) as usize];
                    let guidance = generator.labels.as_ref().map(|labels| labels.guidance);
                    (Some(samples.iter().map(number).collect()), guidance)
                }
            };
            let classes = numbers.as_ref().zip(guidance).map(|(numbers, guidance): (&Vec<i64>, f64)| Classes {
                numbers,
                guidance: self.text.guidance.unwrap_or(guidance),
            });
            let given = LatentConditions { frames, text, classes };
            let ids: Vec<ClipId> = samples.iter().map(|&sample| self.clip_id(sample)).collect();
            let z_0 = generator.clips(&ids, generator.latent[1], &given, sampler, &mut |step, steps| {
                bar.borrow_mut().step(samples[0], &format!("step {step} of {steps}"));
            })?;
            if let Some((frames, _)) = &first {
                z_0.narrow(2, 0, 1).copy_(frames);
            }
            let clips = generator.decode(&z_0)?;
            Ok(vec![clips])
        };
        ranks.collect(firsts.len(), make, |i, made| {
            let samples = samples_of(i);
            if let (Some(out), [clips]) = (&mut out, &made[..]) {
                out.write(clips, &samples, &shown_in(&samples))?;
            }
            bar.borrow_mut().step(samples[0] + samples.len() as u64, "");
            Ok(())
        })?;
        bar.into_inner().finish();
        let Some(out) = out else { return Ok(()) };
        out.finish()?;
        say!("{} in {}", super::counted(videos, "video"), self.out.display());
        Ok(())
    }
}
