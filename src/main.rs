//! The command `lvdm`: verb → command.

#![forbid(unsafe_code)]

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Parser, Subcommand};
use lvdm::{
    commands,
    distributed::{OnSignal, Stopped, catch_signals},
    experiment::UserError,
    text_file::printable,
    torch,
};

/// Train, sample and evaluate latent video diffusion models
///
/// `lvdm demo` goes through everything on small generated videos. docs/getting-started.md does the same with videos of
/// your own. `lvdm help COMMAND` explains a command and its options.
#[derive(Parser)]
#[command(version, propagate_version = true, after_long_help = EXIT_STATUS)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_STATUS: &str = "\
Exit status:
  0   done
  1   something failed
  2   a mistake in the command or in a file that it reads; the message says what was expected and where
  75  a signal ended the work; everything was saved, and the same command continues";

#[derive(Subcommand)]
enum Verb {
    Train(commands::Train),
    Plan(commands::PlanTraining),
    Sample(commands::Sample),
    SampleLong(commands::SampleLong),
    Evaluate(commands::Evaluate),
    EvaluateLong(commands::EvaluateLong),
    Report(commands::Report),
    Demo(commands::Demo),
    Data(commands::Data),
    Encode(commands::Encode),
    Import(commands::Import),
    Export(commands::Export),
    Weights(commands::Weights),
    Config(commands::Config),
    Verify(commands::Verify),
    Bench(commands::Bench),
    Doctor(commands::Doctor),
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Train(verb) => verb.run(),
        Verb::Plan(verb) => verb.run(),
        Verb::Sample(verb) => verb.run(),
        Verb::SampleLong(verb) => verb.run(),
        Verb::Evaluate(verb) => verb.run(),
        Verb::EvaluateLong(verb) => verb.run(),
        Verb::Report(verb) => verb.run(),
        Verb::Demo(verb) => verb.run(),
        Verb::Data(verb) => verb.run(),
        Verb::Encode(verb) => verb.run(),
        Verb::Import(verb) => verb.run(),
        Verb::Export(verb) => verb.run(),
        Verb::Weights(verb) => verb.run(),
        Verb::Config(verb) => verb.run(),
        Verb::Verify(verb) => verb.run(),
        Verb::Bench(verb) => verb.run(),
        Verb::Doctor(verb) => verb.run(),
    }
}

fn main() -> ExitCode {
    let verb = Cli::parse().verb;
    commands::init_tracing();
    lvdm::init();
    torch::locate_panics();
    // ended by a signal, it leaves no half-written files
    let _catching = catch_signals(OnSignal::End);
    match torch::caught(|| run(verb)).and_then(|()| commands::all_was_said()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Stopped>() => ExitCode::from(Stopped::STATUS),
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {}", printable(&format!("{error:#}")));
            if error.is::<UserError>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
