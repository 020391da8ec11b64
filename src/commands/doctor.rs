//! `lvdm doctor`: can this machine do the job?

use anyhow::{Result, bail};

use crate::doctor::{Finding, Outcome, examine};

/// Say what this machine has, and whether it can do the job
#[derive(Debug, clap::Args)]
pub struct Doctor;

impl Doctor {
    /// Prints what is there and whether it works.
    ///
    /// # Errors
    /// Where the machine cannot do the job.
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
            bail!("this machine cannot do the job as it is: see the lines marked FAIL");
        }
        say!("This machine can do the job.");
        Ok(())
    }
}
