//! `lvdm sample`: a run → videos.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::value_parser;
use serde_json::{Map, Value, json};
use tch::Device;

use super::out::{Form, Out, check_mp4, remember};

use crate::{
    data::{RgbFrame, frame_folder::read_picture},
    diffusion::{SamplerChoice, SamplerConfig},
    distributed::{self, Launch, Ranks},
    experiment::{Numerics, Precision, TEXT_GUIDANCE, UserError},
    models::{self, Asked, Assignment, KnownClasses, SamplingJob, Seeds, VideoModel},
    run::weights_of,
    text_file::{read_text, trim},
    torch::DeviceName,
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

/// Sample videos from a run
#[derive(Debug, clap::Args)]
pub struct Sample {
    /// Run folder of `lvdm train diffusion` or `transformer`, or one of its checkpoints
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

/// What a text-to-video run is given.
#[derive(Debug, clap::Args)]
struct TextOptions {
    /// What to show; give it several times for several videos. Video i shows prompt i, from the first again after the last
    #[arg(long = "prompt")]
    prompts: Vec<String>,
    /// File of prompts, one a line
    #[arg(long = "prompts", conflicts_with = "prompts")]
    file: Option<PathBuf>,
    /// How strongly the prompt, or the class, is followed: 1 without guidance; 7.5 to 15 is usual for prompts [default:
    /// the run's own, `text.guidance` or `labels.guidance` of its experiment]
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

    /// Whether what is given fits a run that attends to a text, or to none.
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

/// Which sampler, on the command line; what is not said is the run's own.
#[derive(Debug, clap::Args)]
pub struct SamplerOptions {
    #[arg(long, value_name = "NAME", value_parser = SamplerChoice::kind, help = sampler_help())]
    sampler: Option<&'static str>,
    /// Steps of the sampler; DDPM has none [default: the run's own; with --sampler 50]
    #[arg(long)]
    steps: Option<i64>,
    /// Noise of DDIM: 0 is deterministic, 1 as noisy as DDPM [default: the run's own; with --sampler 1]
    #[arg(long, value_parser = finite)]
    eta: Option<f64>,
    /// Of a transformer over codes: only the likeliest so many are drawn [default: the run's own]
    #[arg(long)]
    top_k: Option<i64>,
    /// Of a transformer over codes: of those only the likeliest that have so much probability together [default: the run's own]
    #[arg(long, value_parser = finite)]
    top_p: Option<f64>,
    /// Of a transformer over codes: latent frames that it sees when it makes the next [default: the run's own]
    #[arg(long)]
    window: Option<i64>,
    /// Variance of DDPM: posterior, of q(z_{t-1} | z_t, z_0), or beta, beta_t [default: the run's
    /// own; with --sampler posterior]
    #[arg(long)]
    variance: Option<String>,
}

/// How exactly networks compute, on the command line; what is not said stays as the experiment says, else float32.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct PrecisionOptions {
    /// Precision of the networks: bf16 is faster on a GPU and slightly less exact [default: f32]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// On a GPU, round float32 products to TF32: faster and slightly less exact [default: false]
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

fn sampler_help() -> String {
    let names = SamplerConfig::KINDS.join(", ");
    format!("{names}, with underscores or hyphens [default: the run's own, `sampler` of its experiment]")
}

impl SamplerOptions {
    /// What is asked for; none where that is nothing.
    ///
    /// # Errors
    /// [`UserError`]: a setting that the named sampler does not have.
    pub fn choice(&self) -> Result<Option<SamplerChoice>> {
        let SamplerOptions { sampler, steps, eta, variance, top_k, top_p, window } = self;
        let given = [
            ("steps", steps.map(Value::from)),
            ("eta", eta.map(Value::from)),
            ("variance", variance.clone().map(Value::from)),
            ("top_k", top_k.map(Value::from)),
            ("top_p", top_p.map(Value::from)),
            ("window", window.map(Value::from)),
        ];
        let settings: Map<String, Value> =
            given.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))).collect();
        match sampler {
            Some(kind) => {
                let named = SamplerChoice::named(kind, settings);
                Ok(Some(named.map_err(|error| UserError(format!("--sampler {kind}: {error:#}")))?))
            }
            None => Ok((!settings.is_empty()).then_some(SamplerChoice::Settings(settings))),
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

    /// The numbers of the classes that are asked for.
    fn class_numbers(&self, known: Option<&KnownClasses>) -> Result<Vec<i64>> {
        let number = |given: &String| match known {
            Some(known) => known.list.number(given).map_err(|error| UserError(format!("--class: {error}")).into()),
            None => {
                let run = self.run.display();
                let text = format!("--class: {run} was not trained with `labels`: it knows no classes");
                Err(UserError(text).into())
            }
        };
        self.classes.iter().map(number).collect()
    }

    /// The pictures of `--first-frame`.
    fn pictures(&self) -> Result<Vec<RgbFrame>> {
        let read =
            |path: &PathBuf| read_picture(path).map_err(|error| UserError(format!("--first-frame: {error:#}")).into());
        self.first_frames.iter().map(read).collect()
    }

    /// Everything that a video depends on, besides its number.
    fn settings(&self, model: &dyn VideoModel, prompts: &[String]) -> Result<Value> {
        let [_, frames, height, width] = model.clip();
        let Numerics { precision, tf32 } = self.precision.over(Numerics::default());
        let TextOptions { guidance, negative, .. } = &self.text;
        // folders that say nothing of it hold videos of the usual weight
        let guidance = guidance.or(model.accepts().text.filter(|own| *own != TEXT_GUIDANCE));
        let mut settings = json!({
            "weights": weights_of(&self.run)?, "frames": frames, "height": height, "width": width,
            "sampler": model.sampling(), "seed": self.seed, "seeds": self.seeds, "first_frames": self.first_frames, "prompts": prompts, "guidance": guidance,
            "negative": negative, "precision": precision, "tf32": tf32, "fps": self.fps,
        });
        if !self.classes.is_empty() {
            settings["classes"] = json!(self.classes);
        }
        Ok(settings)
    }

    /// The model as it is asked to sample, and what its videos are given.
    fn model(&self, prompts: &[String], form: Form, device: Device) -> Result<(Box<dyn VideoModel>, Assignment)> {
        let user = |error: anyhow::Error| anyhow::Error::from(UserError(format!("{error:#}")));
        let mut model = models::open(&self.run, device)?;
        model.set_numerics(self.precision.over(Numerics::default()));
        let accepts = model.accepts();
        self.text.check(&self.run, accepts.text.is_some(), accepts.classes.is_some(), prompts)?;
        let classes = self.class_numbers(accepts.classes.as_ref())?;
        if self.frames.is_some() || self.height.is_some() || self.width.is_some() {
            model.resize(self.frames, self.height, self.width).map_err(user)?;
        }
        let [_, _, height, width] = model.clip();
        if form == Form::Packed && height != width {
            let text = format!("{width}x{height}: packed videos are square; give a folder or NAME.npz");
            return Err(UserError(text).into());
        }
        if form.is_video() {
            check_mp4(height, width, self.fps)?;
        }
        if let Some(choice) = self.sampler.choice()? {
            model.set_sampling(&choice).map_err(user)?;
        }
        let asked = Asked {
            prompts: prompts.to_vec(),
            negative: self.text.negative.clone().unwrap_or_default(),
            classes,
            first_frames: self.pictures()?,
            guidance: self.text.guidance,
        };
        let assignment =
            Assignment::new(&*model, asked).map_err(|error| UserError(format!("{}: {error:#}", self.run.display())))?;
        Ok((model, assignment))
    }

    /// Rank 0 writes, so that the files do not depend on the number of ranks.
    fn sample(&self, prompts: &[String], videos: u64, form: Form, ranks: &Ranks, device: Device) -> Result<()> {
        let (model, assignment) = self.model(prompts, form, device)?;
        if form == Form::Folder {
            ranks.on_first(|| remember(&self.out, &self.settings(&*model, prompts)?))?;
        }
        let mut out = match ranks.is_first() {
            true => Some(Out::create(form, &self.out, videos as i64, model.clip(), self.fps, self.seed)?),
            false => None,
        };
        let seeds = if self.seeds.is_empty() { Seeds::One(self.seed) } else { Seeds::Each(self.seeds.clone()) };
        let job = SamplingJob { model: &*model, assignment: &assignment, seeds, videos, batch: self.batch };
        let bar = RefCell::new(Progress::new("sample", videos, 0).shown(ranks.is_first()));
        job.run(
            ranks,
            &mut |first, step, steps| bar.borrow_mut().step(first, &format!("step {step} of {steps}")),
            &mut |samples, clips| {
                let shown: Vec<&str> = samples.iter().filter_map(|&sample| assignment.prompt(sample)).collect();
                out.as_mut().map_or(Ok(()), |out| out.write(clips, samples, &shown))?;
                bar.borrow_mut().step(samples[0] + samples.len() as u64, "");
                Ok(())
            },
        )?;
        bar.into_inner().finish();
        let Some(out) = out else { return Ok(()) };
        out.finish()?;
        say!("{} in {}", super::counted(videos, "video"), self.out.display());
        Ok(())
    }
}
