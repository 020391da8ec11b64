//! The command `lvdm`: verb → command.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use lvdm::{commands, torch};

/// Latent video diffusion models: train, sample, measure
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Verify(commands::Verify),
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Verify(verb) => verb.run(),
    }
}

fn main() -> ExitCode {
    // before anything asks LibTorch about CUDA; `doctor` says why it failed
    let _ = torch::load_cuda();
    match run(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<commands::Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
