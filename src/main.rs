//! The command `lvdm`: verb → command.

use std::{
    panic::{self, AssertUnwindSafe},
    process::ExitCode,
};

use anyhow::{Result, anyhow};
use clap::{Parser, Subcommand};
use lvdm::{commands, experiment::Mistake, torch};

/// Latent video diffusion models: train, sample, measure
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Train(commands::Train),
    Sample(commands::Sample),
    SampleLong(commands::SampleLong),
    Evaluate(commands::Evaluate),
    EvaluateLong(commands::EvaluateLong),
    Demo(commands::Demo),
    Data(commands::Data),
    Import(commands::Import),
    Export(commands::Export),
    Weights(commands::Weights),
    Verify(commands::Verify),
    Bench(commands::Bench),
    Doctor(commands::Doctor),
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Train(verb) => verb.run(),
        Verb::Sample(verb) => verb.run(),
        Verb::SampleLong(verb) => verb.run(),
        Verb::Evaluate(verb) => verb.run(),
        Verb::EvaluateLong(verb) => verb.run(),
        Verb::Demo(verb) => verb.run(),
        Verb::Data(verb) => verb.run(),
        Verb::Import(verb) => verb.run(),
        Verb::Export(verb) => verb.run(),
        Verb::Weights(verb) => verb.run(),
        Verb::Verify(verb) => verb.run(),
        Verb::Bench(verb) => verb.run(),
        Verb::Doctor(verb) => verb.run(),
    }
}

/// LibTorch's errors arrive as panics whose text goes on with a C++ backtrace: an error of one line instead.
fn without_panics(body: impl FnOnce() -> Result<()>) -> Result<()> {
    panic::set_hook(Box::new(|_| {}));
    panic::catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("a failure without a text");
        let text = text.split("\\n").next().unwrap_or(text).lines().next().unwrap_or(text);
        if text.contains("out of memory") || text.contains("can't allocate memory") {
            return Err(anyhow!(
                "out of memory: {text}. Lower trainer.batch (and raise trainer.accumulate), set unet.recompute=true, \
                 or trainer.precision=bf16"
            ));
        }
        Err(anyhow!("{text}"))
    })
}

fn main() -> ExitCode {
    // before anything asks LibTorch about CUDA; `doctor` says why it failed
    let _ = torch::load_cuda();
    torch::allow_tf32(false);
    commands::init_tracing();
    let verb = Cli::parse().verb;
    match without_panics(|| run(verb)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<Mistake>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
