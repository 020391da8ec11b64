//! Runs ↔ diffusers: what was imported goes back as a folder that diffusers opens.

mod common;

use std::{fs, io::Write, path::Path, process::Command};

use common::{
    run_in, source, succeed_in,
    text_runs::{TABLE, Tensors, experiment, import, write_diffusers, write_videos},
};
use lvdm::{
    checkpoint,
    generate::{open_text_encoder, weights},
    models::{TokenizerFiles, stable_diffusion},
    safetensors::read_safetensors,
    weights::stable_diffusion::is_temporal,
};
use serde_json::Value;
use tch::Device;

const CPU: Device = Device::Cpu;

/// The three networks' folders in diffusers, with the files that `write_diffusers` writes.
const PARTS: [(&str, &str, &str); 3] = [
    ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    ("vae", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.safetensors", "model.safetensors"),
];

fn tensors(path: &Path) -> Tensors {
    read_safetensors(path).unwrap().0
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn model_of(run: &Path) -> Tensors {
    weights(&mut checkpoint::open_averaged(run).unwrap().1).unwrap()
}

/// Folder of diffusers → run → folder: every tensor under its name to the bit, the same settings, schedule and tokens; and
/// what was trained since is in it.
#[test]
fn an_import_goes_back_to_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    let said = succeed_in(at, &["export", "stable-diffusion", "run", "--out", "back"]);
    assert!(said.out.contains("U-Net") && said.out.contains("back"), "{}", said.out);
    for (part, from, to) in PARTS {
        let (from, to) = (tensors(&at.join("sd").join(part).join(from)), tensors(&at.join("back").join(part).join(to)));
        let names = from.keys().filter(|name| !name.ends_with("position_ids"));
        assert_eq!(names.collect::<Vec<_>>(), to.keys().collect::<Vec<_>>(), "{part}");
        for (name, tensor) in &to {
            assert_eq!((tensor.size(), tensor.kind()), (from[name].size(), from[name].kind()), "{name}");
            assert!(tensor.equal(&from[name]), "{name}");
        }
    }
    let config = |folder: &str, part: &str| json(&at.join(folder).join(part).join("config.json"));
    assert_eq!(
        stable_diffusion::unet(&config("back", "unet")).unwrap(),
        stable_diffusion::unet(&config("sd", "unet")).unwrap()
    );
    let vae = |folder: &str| stable_diffusion::autoencoder(&config(folder, "vae")).unwrap();
    assert_eq!(vae("back"), vae("sd"));
    assert_eq!(config("back", "vae")["scaling_factor"], 0.3);
    let text = |folder: &str| stable_diffusion::text_encoder(&config(folder, "text_encoder")).unwrap();
    assert_eq!(text("back"), text("sd"));
    let schedule = json(&at.join("back/scheduler/scheduler_config.json"));
    assert_eq!((&schedule["num_train_timesteps"], &schedule["beta_start"]), (&900.into(), &0.001.into()));
    let bytes = fs::read(at.join("back/text_encoder/model.safetensors")).unwrap();
    let header = String::from_utf8_lossy(&bytes[8..80]).into_owned();
    assert!(header.starts_with(r#"{"__metadata__":{"format":"pt"}"#), "transformers asks for it: {header}");

    // the two files of the tokenizer are those that came, and the one says the same
    let file = |folder: &str, name: &str| fs::read_to_string(at.join(folder).join("tokenizer").join(name)).unwrap();
    assert_eq!(file("back", "merges.txt"), file("sd", "merges.txt"));
    assert_eq!(json(&at.join("back/tokenizer/vocab.json")), json(&at.join("sd/tokenizer/vocab.json")));
    fs::remove_file(at.join("back/tokenizer/tokenizer.json")).unwrap();
    TokenizerFiles::read(&at.join("back/tokenizer")).unwrap();
    assert_eq!(import(at, "back", "again", &[]).status, 0);
    let (run, again) = (model_of(&at.join("run")), model_of(&at.join("again")));
    assert_eq!(run.keys().collect::<Vec<_>>(), again.keys().collect::<Vec<_>>());
    assert!(run.iter().all(|(name, tensor)| tensor.equal(&again[name])));
    let encode = |run: &str| open_text_encoder(&at.join(run), CPU).unwrap().encode(&["a red cat", "a dog"]).unwrap();
    assert!(encode("run").equal(&encode("again")));

    // trained adapters are merged, layers over frames are left out, averages are what is written
    write_videos(at);
    fs::rename(at.join("run"), at.join("sd-run")).unwrap();
    let file = experiment(at, "adapters", TABLE, "trained: {kind: adapters, rank: 2, alpha: 4.0}\n");
    succeed_in(at, &["train", "diffusion", &file]);
    succeed_in(at, &["export", "stable-diffusion", "runs/adapters", "--out", "trained"]);
    assert_eq!(import(at, "trained", "trained-run", &[]).status, 0);
    let (trained, found) = (model_of(&at.join("runs/adapters")), model_of(&at.join("trained-run")));
    assert!(trained.iter().any(|(name, tensor)| !is_temporal(name) && !tensor.equal(&run[name])));
    for (name, tensor) in trained.iter().filter(|(name, _)| !is_temporal(name)) {
        assert!(tensor.equal(&found[name]), "{name}");
    }

    // nothing is written over, and nothing half
    let refused = |run: &str, out: &str| run_in(at, &["export", "stable-diffusion", run, "--out", out]);
    assert!(refused("sd-run", "back").error(2).contains("is there already"));
    assert!(refused("none", "x").error(2).contains("there is no run none"));
    fs::remove_file(at.join("again/text_encoder.safetensors")).unwrap();
    assert_eq!(refused("again", "x").status, 1);
    let left: Vec<_> = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name == "x" || name.to_string_lossy().ends_with(".partial")), "{left:?}");
}

/// Python with these modules: `PYTHON`, or python3 with what `make setup` installs. None is said aloud.
fn python(modules: &str) -> Option<Command> {
    let program = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let command = || {
        let mut command = Command::new(&program);
        command.env("PYTHONPATH", source(".python")).env("HF_HUB_OFFLINE", "1").env("PYTHONWARNINGS", "ignore");
        command
    };
    if command().args(["-c", &format!("import {modules}")]).output().is_ok_and(|output| output.status.success()) {
        return Some(command());
    }
    // past the harness, which hides what a test that passes says
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED: {program} has not all of {modules}; set PYTHON to one that has (pip install diffusers transformers peft)"
    );
    None
}

fn run_python(mut command: Command, script: &str, arguments: &[&Path]) -> String {
    let output = command.arg(source(script)).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}:\n{out}{err}");
    print!("{out}");
    out.into_owned()
}

/// diffusers opens the folder, and its pipeline makes the same pictures as one of the parts that were imported.
#[test]
fn diffusers_opens_an_export() {
    let Some(command) = python("torch, diffusers, transformers") else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    succeed_in(at, &["export", "stable-diffusion", "run", "--out", "back"]);
    let said = run_python(command, "tests/open_with_diffusers.py", &[&at.join("sd"), &at.join("back")]);
    assert!(said.contains("equal"), "{said}");
}
