//! `lvdm data`: the demo's videos, and packing.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    data::{DataConfig, DatasetConfig, demo, pack_clips},
    experiment::Mistake,
    generate::{open_latent_space, open_text_encoder},
    torch::DeviceName,
    train::{pack_latents, progress::Progress},
};

/// Make and pack data
#[derive(Debug, clap::Args)]
pub struct Data {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Write the procedural demo videos
    MakeDemo(MakeDemo),
    /// Pack clips, or their latents, into one safetensors file, from which everything trains without FFmpeg and OpenCV
    Pack(Pack),
}

#[derive(Debug, clap::Args)]
struct MakeDemo {
    /// Folder for train/ and test/
    #[arg(long, default_value = "data/demo")]
    out: PathBuf,
    /// Videos to train on
    #[arg(long, default_value_t = demo::DemoConfig::default().train)]
    train: u64,
    /// Videos held out
    #[arg(long, default_value_t = demo::DemoConfig::default().test)]
    test: u64,
    /// Frames of each
    #[arg(long, default_value_t = demo::DemoConfig::default().frames)]
    frames: i64,
    /// Width and height in pixels
    #[arg(long, default_value_t = demo::DemoConfig::default().size)]
    size: i64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, clap::Args)]
struct Pack {
    /// Folder of videos
    #[arg(long)]
    videos: PathBuf,
    /// The folder holds folders of pictures instead of video files
    #[arg(long)]
    frames_folders: bool,
    /// Each video has its caption beside it, in a text file of its name
    #[arg(long, conflicts_with = "frames_folders")]
    captions: bool,
    /// Table (CSV) of the videos with the columns videoid, name (the caption) and perhaps page_dir
    #[arg(long, conflicts_with_all = ["frames_folders", "captions"])]
    table: Option<PathBuf>,
    /// Frames of a clip
    #[arg(long, default_value_t = 16)]
    frames: i64,
    #[arg(long, default_value_t = 1)]
    frame_stride: i64,
    #[arg(long, default_value_t = 256)]
    resolution: i64,
    /// How many clips (default: --crops of each video)
    #[arg(long)]
    clips: Option<u64>,
    /// Clips of each video, each from another place (latents only)
    #[arg(long, default_value_t = 1, requires = "latents")]
    crops: u64,
    /// Half of the clips mirrored (latents only; of pixels training mirrors its own)
    #[arg(long, requires = "latents")]
    flip: bool,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Pack latents of this autoencoder run instead of pixels
    #[arg(long)]
    latents: Option<PathBuf>,
    /// Pack captions too, as the text encoder of this run makes them
    #[arg(long, requires = "latents")]
    text: Option<PathBuf>,
    /// The file
    #[arg(long)]
    out: PathBuf,
    /// auto, cpu, cuda or cuda:N (latents only)
    #[arg(long, default_value = "auto")]
    device: DeviceName,
}

impl Data {
    /// # Errors
    /// Videos that are not there; a full disk.
    pub fn run(self) -> Result<()> {
        match self.what {
            What::MakeDemo(options) => {
                let MakeDemo { out, train, test, frames, size, seed } = options;
                let config =
                    demo::DemoConfig { root: out, train, test, frames, size, seed, ..demo::DemoConfig::default() };
                demo::write(&config)?;
                println!("{train} videos to train on and {test} held out in {}", config.root.display());
                Ok(())
            }
            What::Pack(options) => options.run(),
        }
    }
}

impl Pack {
    fn run(self) -> Result<()> {
        if !self.videos.exists() {
            return Err(Mistake(format!("there is no folder {}", self.videos.display())).into());
        }
        let root = self.videos;
        let dataset = match self.table {
            Some(table) => DatasetConfig::Webvid { table, root },
            None if self.captions => DatasetConfig::Captioned { root },
            None if self.frames_folders => DatasetConfig::Frames { root },
            None => DatasetConfig::Folder { root },
        };
        dataset.check().map_err(|error| Mistake(format!("{error:#}")))?;
        if self.text.is_some() && !dataset.has_captions() {
            return Err(Mistake("--text: these videos have no captions; give --captions or --table".into()).into());
        }
        let data = DataConfig {
            dataset,
            frames: self.frames,
            frame_stride: self.frame_stride,
            resolution: self.resolution,
            flip: self.flip,
            workers: 2,
        };
        let count = match &self.latents {
            None => pack_clips(&data, self.clips, self.seed, &self.out)?,
            Some(run) => {
                let device = self.device.open()?;
                let space = open_latent_space(run, device)?;
                let text = self.text.as_ref().map(|run| open_text_encoder(run, device)).transpose()?;
                let count = match self.clips {
                    Some(count) => count,
                    None => self.crops * data.videos()?.videos.len() as u64,
                };
                let mut bar = Progress::new("encode", count, 0);
                pack_latents(&space, text.as_ref(), &data, count, self.seed, &self.out, &mut |done| {
                    bar.step(done, "")
                })?;
                bar.finish();
                count
            }
        };
        println!("{count} clips in {}", self.out.display());
        Ok(())
    }
}
