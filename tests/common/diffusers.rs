//! Folders of diffusers beside runs, and Python's own libraries as witnesses.

use std::{fs, path::Path, process::Command};

use lvdm::{checkpoint, run::weights, safetensors::read_safetensors};
use serde_json::Value;

use super::{skip, source, text_runs::Tensors};

/// The three networks' folders in diffusers, with the files that `write_diffusers` writes.
pub const PARTS: [(&str, &str, &str); 3] = [
    ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    ("vae", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.safetensors", "model.safetensors"),
];

pub fn tensors(path: &Path) -> Tensors {
    read_safetensors(path).unwrap().0
}

pub fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

pub fn model_of(run: &Path) -> Tensors {
    weights(&mut checkpoint::open_averaged(run).unwrap().1).unwrap()
}

/// Python with these modules: `PYTHON`, or python3 with what `make setup` installs. None is said aloud.
pub fn python(modules: &str) -> Option<Command> {
    let program = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let command = || {
        let mut command = Command::new(&program);
        command.env("PYTHONPATH", source(".python")).env("HF_HUB_OFFLINE", "1").env("PYTHONWARNINGS", "ignore");
        command
    };
    if command().args(["-c", &format!("import {modules}")]).output().is_ok_and(|output| output.status.success()) {
        return Some(command());
    }
    skip(
        &format!(
            "{program} has not all of {modules}; set PYTHON to one that has (pip install diffusers transformers peft)"
        ),
        false,
    );
    None
}

pub fn run_python(mut command: Command, script: &str, arguments: &[&Path]) -> String {
    let output = command.arg(source(script)).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}:\n{out}{err}");
    print!("{out}");
    out.into_owned()
}
