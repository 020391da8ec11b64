//! `lvdm report`: one page of finished runs, or a table of what they cost.

mod collect;
mod efficiency;

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::out::check_ending;
use crate::atomic_file::write_atomically;
use efficiency::Efficiency;

/// Write one page of finished runs: videos, figures, curves, configurations
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Report {
    #[command(subcommand)]
    what: Option<What>,
    /// Folders that lvdm wrote: runs, evaluations, samples, or folders that hold such, up to two levels below
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The page, one HTML file that needs no other
    #[arg(long, default_value = "report.html")]
    out: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Efficiency(Efficiency),
}

impl Report {
    /// # Errors
    /// [`Mistake`](crate::experiment::Mistake) for folders that hold nothing of lvdm's; those of [`write`].
    pub fn run(self) -> Result<()> {
        if let Some(What::Efficiency(efficiency)) = self.what {
            return efficiency.run();
        }
        check_ending(&self.out, "html")?;
        let bytes = write(&self.runs, &self.out)?;
        say!("report: {} ({:.1} MB)", self.out.display(), bytes as f64 / 1e6);
        Ok(())
    }
}

/// Writes the page of what lies in `runs`, and returns its bytes.
///
/// # Errors
/// Files that are not what lvdm writes, by their names and lines; a full disk.
pub(super) fn write(runs: &[PathBuf], out: &Path) -> Result<usize> {
    let page = collect::collect(runs)?.html()?;
    write_atomically(out, |file| Ok(file.write_all(page.as_bytes())?))?;
    Ok(page.len())
}
