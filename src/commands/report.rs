//! `lvdm report`: one page of finished runs, or a table of what they cost.

use std::path::PathBuf;

use anyhow::Result;

use super::out::check_ending;
use crate::{
    experiment::UserError,
    report::{Cost, efficiency_table, write_page},
    torch::DeviceName,
};

/// Write one HTML page about finished runs: playing samples, figures, curves and settings
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Report {
    #[command(subcommand)]
    what: Option<What>,
    /// Folders that lvdm wrote: runs, evaluations or samples; or folders that contain such, at most two levels deep
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// File to write; it includes videos and pictures and needs no other file
    #[arg(long, default_value = "report.html")]
    out: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Efficiency(Efficiency),
}

impl Report {
    /// # Errors
    /// [`UserError`] for folders that hold nothing of lvdm's; those of [`write_page`].
    pub fn run(self) -> Result<()> {
        if let Some(What::Efficiency(efficiency)) = self.what {
            return efficiency.run();
        }
        check_ending(&self.out, "html")?;
        let bytes = write_page(&self.runs, &self.out)?;
        say!("report: {} ({:.1} MB)", self.out.display(), bytes as f64 / 1e6);
        Ok(())
    }
}

/// Compare diffusion runs in one table: parameters, training time, sampling time, memory, FVD and KVD
#[derive(Debug, clap::Args)]
pub struct Efficiency {
    /// Run folders of `lvdm train diffusion`
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Videos to sample in one batch, to time sampling on this machine; 0 to measure nothing
    #[arg(long, default_value_t = 4)]
    videos: u64,
    /// Print one JSON object for each run instead of tables
    #[arg(long)]
    json: bool,
    /// Where to compute: auto (the first GPU, or the CPU where there is none), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceName,
}

impl Efficiency {
    /// # Errors
    /// [`UserError`] for a run that is not there; a folder that is not a diffusion run.
    pub fn run(self) -> Result<()> {
        if let Some(run) = self.runs.iter().find(|run| !run.is_dir()) {
            return Err(UserError(format!("there is no run {}", run.display())).into());
        }
        let device = self.device.open()?;
        let costs = self.runs.iter().map(|run| Cost::of(run, self.videos, device)).collect::<Result<Vec<_>>>()?;
        if self.json {
            for cost in &costs {
                say!("{}", cost.json(device)?);
            }
        } else {
            super::say::text(efficiency_table(&costs, device)?);
        }
        Ok(())
    }
}
