//! `lvdm encode`: latents of clips, made once for all trainings of denoisers.

use std::path::PathBuf;

use anyhow::Result;
use clap::value_parser;
use tch::Device;

use super::{
    data::Clips,
    out::check_ending,
    sample::{MOST_VIDEOS, PrecisionOptions},
};
use crate::{
    data::DataConfig,
    distributed::{self, Launch, Ranks},
    experiment::{Numerics, UserError},
    run::{latent_space_to_build_on, open_text_encoder},
    torch::DeviceName,
    train::{pack_latents, progress::Progress},
};

/// Encode clips into a file of latents, from which denoisers then train without decoding videos
///
/// An experiment names the file as `latents`. With --nproc, the ranks share the clips; the file is the same for any number
/// of them.
#[derive(Debug, clap::Args)]
pub struct Encode {
    /// Run folder of the autoencoder
    autoencoder: PathBuf,
    #[command(flatten)]
    clips: Clips,
    /// Number of clips [default: --crops from each video]
    #[arg(long = "clips", value_parser = value_parser!(u64).range(..=MOST_VIDEOS))]
    count: Option<u64>,
    /// Clips from each video, each at a random place of its own
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u64).range(..=MOST_VIDEOS))]
    crops: u64,
    /// Mirror half of the clips, at random
    #[arg(long)]
    flip: bool,
    /// Text-to-video run whose text encoder encodes the videos' captions into the file as well
    #[arg(long)]
    text: Option<PathBuf>,
    /// File to write (.safetensors)
    #[arg(long)]
    out: PathBuf,
    /// Where to compute: auto (the first GPU, or the CPU where there is none), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
    #[command(flatten)]
    precision: PrecisionOptions,
    #[command(flatten)]
    launch: Launch,
}

impl Encode {
    /// # Errors
    /// Videos or a run that are not there; videos without captions where those are asked for; a full disk.
    pub fn run(self) -> Result<()> {
        check_ending(&self.out, "safetensors")?;
        let data = self.clips.data(self.flip)?;
        if self.text.is_some() && !data.dataset.has_captions() {
            return Err(UserError("--text: these videos have no captions; give --captions or --table".into()).into());
        }
        distributed::run(&self.launch, self.device, |ranks, device| self.encode(&data, ranks, device))
    }

    fn encode(&self, data: &DataConfig, ranks: &Ranks, device: Device) -> Result<()> {
        let space = latent_space_to_build_on(&self.autoencoder, device)?;
        let text = self.text.as_ref().map(|run| open_text_encoder(run, device)).transpose()?;
        let count = match self.count {
            Some(count) => count,
            None => self.crops * data.videos()?.videos.len() as u64,
        };
        let mut bar = Progress::new("encode", count, 0).shown(ranks.is_first());
        let numerics = self.precision.over(Numerics::default());
        let on_clip = &mut |done| bar.step(done, "");
        pack_latents(&space, text.as_ref(), data, count, self.clips.seed, numerics, &self.out, ranks, on_clip)?;
        bar.finish();
        if ranks.is_first() {
            say!("{} in {}", super::counted(count, "clip"), self.out.display());
        }
        Ok(())
    }
}
