//! `lvdm plan`: what a training will need, before anything is loaded.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    codecs::CodecConfig,
    experiment::{AutoencoderExperiment, UserError, read},
    plan::{self, Card, PlanOptions},
    report::PlanTable,
};

/// What a training will need: parameters, operations, memory, hours, and which cards it fits
///
/// Nothing is loaded: neither videos nor weights need be there. The networks run for the shapes of their tensors alone, which says
/// what a training step keeps in memory and which kernels it starts on a GPU. Times are a roofline of these kernels on each
/// card: nothing is measured.
#[derive(Debug, clap::Args)]
pub struct PlanTraining {
    /// Experiment files of `lvdm train` (YAML), then replaced settings, key.path=value
    #[arg(required = true)]
    files: Vec<String>,
    /// Memory of another card, in GB (2^30 bytes); may be given several times
    #[arg(long, value_name = "GB", conflicts_with = "markdown")]
    device_memory: Vec<f64>,
    /// GPUs that train together
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..), conflicts_with = "markdown")]
    ranks: i64,
    /// Codec of a denoiser whose autoencoder run is neither there nor has an experiment: an experiment file of `lvdm train
    /// autoencoder`, or settings such as '{kind: image_autoencoder}'
    #[arg(long, value_name = "FILE|SETTINGS")]
    autoencoder: Option<String>,
    /// A row of a Markdown table for each file
    #[arg(long)]
    markdown: bool,
}

impl PlanTraining {
    /// # Errors
    /// [`UserError`] for what the user wrote; sizes that do not fit together.
    pub fn run(self) -> Result<()> {
        if let Some(given) = self.device_memory.iter().find(|gib| !(**gib > 0.0 && **gib < 1e6)) {
            return Err(UserError(format!("--device-memory is a number of GB, not {given}")).into());
        }
        let is_override = |text: &&String| text.contains('=') && !Path::new(text).exists();
        let (overrides, files): (Vec<&String>, Vec<&String>) = self.files.iter().partition(is_override);
        let overrides: Vec<String> = overrides.into_iter().cloned().collect();
        if files.is_empty() {
            return Err(UserError("no experiment file is given".into()).into());
        }
        let codec = self.autoencoder.as_deref().map(codec).transpose()?;
        let options = PlanOptions { codec };
        let cards: Vec<Card> =
            Card::known().into_iter().chain(self.device_memory.iter().map(|&gib| Card::of_memory(gib))).collect();
        let table = PlanTable { ranks: self.ranks, cards };
        if self.markdown {
            say!("{}", PlanTable::HEAD);
        }
        for file in files {
            let plan = plan::of(Path::new(file), &overrides, &options)?;
            if self.markdown {
                say!("{}", table.row(file, &plan));
            } else {
                say!("{}", table.text(file, &plan));
            }
        }
        Ok(())
    }
}

/// The codec that `--autoencoder` says.
fn codec(given: &str) -> Result<CodecConfig> {
    if Path::new(given).is_file() {
        return Ok(read::<AutoencoderExperiment>(&PathBuf::from(given), &[])?.autoencoder);
    }
    let wrong =
        |error| UserError(format!("--autoencoder {given}: neither a file nor the settings of a codec: {error}"));
    Ok(serde_yaml::from_str(given).map_err(wrong)?)
}
