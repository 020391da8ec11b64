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

/// Encode clips once, into a file of latents from which denoisers train (`latents` of an experiment)
///
/// Ranks share the clips, and the file does not depend on how many there are.
#[derive(Debug, clap::Args)]
pub struct Encode {
    /// Run of the autoencoder
    autoencoder: PathBuf,
    #[command(flatten)]
    clips: Clips,
    /// How many clips (default: --crops of each video)
    #[arg(long = "clips", value_parser = value_parser!(u64).range(..=MOST_VIDEOS))]
    count: Option<u64>,
    /// Clips of each video, each from another place
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u64).range(..=MOST_VIDEOS))]
    crops: u64,
    /// Half of the clips mirrored
    #[arg(long)]
    flip: bool,
    /// Encode captions too, with the text encoder of this run
    #[arg(long)]
    text: Option<PathBuf>,
    /// The file (.safetensors)
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
