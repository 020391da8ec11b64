use std::process::ExitCode;

use lvdm::{commands, torch};

fn main() -> ExitCode {
    // before anything asks LibTorch about CUDA; `doctor` says why it failed
    let _ = torch::load_cuda();
    commands::init_tracing();
    match commands::doctor::run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
