//! `lvdm report`: what finished runs have come to.

use anyhow::Result;

use super::report_efficiency::Efficiency;

/// Read finished runs
#[derive(Debug, clap::Args)]
pub struct Report {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Efficiency(Efficiency),
}

impl Report {
    /// # Errors
    /// Those of what is reported.
    pub fn run(self) -> Result<()> {
        match self.what {
            What::Efficiency(efficiency) => efficiency.run(),
        }
    }
}
