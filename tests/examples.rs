//! The programs of `examples/`, which `cargo test` builds: at most fifteen lines each, and they do what they say.

mod common;

use std::{env, fs, path::Path, process::Command};

use common::{moving_clips, source, write_npy};

/// Runs an example in a folder and gives what it prints.
fn run(at: &Path, name: &str, arguments: &[&str]) -> String {
    let text = fs::read_to_string(source(&format!("examples/{name}.rs"))).unwrap();
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with("//")).count();
    assert!(lines <= 15, "{name} has {lines} lines");
    let test = env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(program.exists(), "cargo test --examples builds {}", program.display());
    let output =
        Command::new(program).current_dir(at).args(arguments).env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn fifteen_lines_train_and_sample() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for file in ["pixels.yaml", "clips.safetensors"] {
        fs::copy(source("tests/released_runs").join(file), at.join(file)).unwrap();
    }
    run(at, "train", &["pixels.yaml", "run"]);
    assert!(at.join("run/checkpoints/step-00000002.safetensors").exists());
    run(at, "sample", &["run", "video.mp4"]);
    assert!(fs::metadata(at.join("video.mp4")).unwrap().len() > 500);
}

#[test]
fn fifteen_lines_evaluate() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (name, first) in [("real.npy", 0), ("generated.npy", 4)] {
        write_npy(&at.join(name), &moving_clips(8, 16, 32).narrow(0, first, 4));
    }
    let said = run(at, "evaluate", &["real.npy", "generated.npy"]);
    assert!(said.contains("I3D") && said.contains("fvd"), "{said}");
}
