//! `lvdm verify`: runs cases that independent implementations computed, and compares.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::{
    experiment::UserError,
    torch::DeviceName,
    verify::{Distance, Runnable, Verdict},
};

/// Compare the results of this build with those of reference implementations
///
/// A case is a file of inputs, weights and expected outputs of one component: a network, a loss, a sampler, a metric.
/// tests/parity holds the shipped ones. Prints the largest difference of each case and the bound that it must keep.
#[derive(Debug, clap::Args)]
pub struct Verify {
    /// Case files, such as tests/parity/*.safetensors
    #[arg(required = true)]
    cases: Vec<PathBuf>,
    /// Checkpoint for cases that name one [default: the file of that name in the folder of the case]
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Where to compute: cpu, cuda, cuda:N or auto
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Precision of networks, losses and samplers
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Dtype {
    /// float32 throughout
    F32,
    /// Products and convolutions in bfloat16, weights in float32
    Bf16,
}

impl Verify {
    /// Prints a row a case.
    ///
    /// # Errors
    /// [`UserError`] where a file is not a case or names an unknown component; another error where a case fails.
    pub fn run(self) -> Result<()> {
        let device = self.device.open()?;
        let width = self.cases.iter().map(|c| file_name(c).len()).max().unwrap_or(0).max(4);
        say!("{:width$}  {:22} {:>9} {:>9} {:>7}  ", "case", "component", "abs", "rel", "bound");
        let (mut failed, mut unusable) = (0, 0);
        for path in &self.cases {
            let name = file_name(path);
            let case = match Runnable::read(path, self.weights.as_deref(), device, self.dtype == Dtype::Bf16) {
                Ok(case) => case,
                Err(error) => {
                    unusable += 1;
                    say!("{name:width$}  not a case: {error:#}");
                    continue;
                }
            };
            let component = case.component();
            match case.run() {
                Ok(verdict) => {
                    failed += usize::from(!verdict.is_ok());
                    let word = if verdict.is_ok() { "ok" } else { "FAIL" };
                    let Verdict { worst: Distance { absolute, relative }, bound } = verdict;
                    say!("{name:width$}  {component:22} {absolute:9.2e} {relative:9.2e} {bound:7.0e}  {word}");
                }
                Err(error) => {
                    failed += 1;
                    say!("{name:width$}  {component:18} FAIL: {error:#}");
                }
            }
        }
        if unusable > 0 {
            return Err(UserError(format!("{unusable} of {} files cannot be verified", self.cases.len())).into());
        }
        if failed > 0 {
            bail!("{failed} of {} cases failed", self.cases.len());
        }
        Ok(())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
