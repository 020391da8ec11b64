//! `lvdm doctor`: has this machine what is needed?

use anyhow::{Result, bail};

use crate::doctor::{Finding, Outcome, examine};

/// Check what this machine has: LibTorch, GPU, FFmpeg, OpenCV, weights; and whether that is enough
#[derive(Debug, clap::Args)]
pub struct Doctor;

impl Doctor {
    /// Prints what is there and whether it works.
    ///
    /// # Errors
    /// Where something that is needed is missing or broken.
    pub fn run(self) -> Result<()> {
        let findings = examine();
        let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
        for Finding { outcome, name, detail } in &findings {
            let mark = match outcome {
                Outcome::Good => "ok  ",
                Outcome::Absent => "-   ",
                Outcome::Bad => "FAIL",
            };
            say!("{mark} {name:width$}  {detail}");
        }
        if findings.iter().any(|finding| finding.outcome == Outcome::Bad) {
            bail!("something that lvdm needs is missing or broken: see the lines marked FAIL");
        }
        say!("This machine has everything that lvdm needs.");
        Ok(())
    }
}
