//! What is exported is imported again to the bit, and is read by other programs.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use lvdm::{checkpoint::Checkpoint, experiment::DiffusionExperiment, safetensors::read_safetensors};
use sha2::{Digest, Sha256};
use tch::Kind;

use crate::{
    OPTIONS, SHORT,
    common::{pickle::bytes, source, succeed_in},
    diffusion, import, latest, same, small_unet, workplace,
};

/// Export gives the released names, each of an alias's two; import makes the same run of it, to the bit.
#[test]
fn export_and_import_are_inverse() {
    let folder = workplace();
    let at = folder.path();
    assert_eq!(import(at, "short.ckpt", "run", &[]).status, 0);
    let said = succeed_in(at, &["export", "run", "--out", "run.safetensors"]);
    assert!(said.out.contains("U-Net, average"), "{}", said.out);
    let (exported, _) = read_safetensors(&at.join("run.safetensors")).unwrap();
    let mut given = diffusion(SHORT, &small_unet());
    given.retain(|name, _| !["betas", "alphas_cumprod", "logvar"].contains(&name.as_str()));
    same(&exported, &given);

    // with the options again, and with none: the file tells
    succeed_in(at, &[&["import", "lvdm", "run.safetensors", "--out", "again"], &OPTIONS[..]].concat());
    succeed_in(at, &["import", "lvdm", "run.safetensors", "--out", "once-more"]);
    for other in ["again", "once-more"] {
        let (first, second) = (latest(&at.join("run")), latest(&at.join(other)));
        same(&first.tensors, &second.tensors);
        assert_eq!(first.progress, second.progress);
        let settings = |run: &Checkpoint| DiffusionExperiment {
            autoencoder: PathBuf::new().into(),
            ..serde_json::from_value(run.experiment.clone()).unwrap()
        };
        assert_eq!(serde_json::to_value(settings(&first)).unwrap(), serde_json::to_value(settings(&second)).unwrap());
        let carried = |run: &str| fs::read(at.join(run).join("autoencoder.safetensors")).unwrap();
        assert!(carried("run") == carried(other));
    }
    let script = ["sample", "--videos", "1", "--steps", "2", "--out"];
    succeed_in(at, &[&script[..], &["a.safetensors", "run"]].concat());
    succeed_in(at, &[&script[..], &["b.safetensors", "again"]].concat());
    let clips = |file: &str| read_safetensors(&at.join(file)).unwrap().0["clips"].shallow_clone();
    assert!(clips("a.safetensors").equal(&clips("b.safetensors")));
}

/// Python's own reader finds the same names, types, shapes and values in an exported file.
#[test]
fn python_reads_an_export() {
    let folder = workplace();
    let at = folder.path();
    assert_eq!(import(at, "short.ckpt", "run", &[]).status, 0);
    succeed_in(at, &["export", "run", "--out", "run.safetensors"]);
    let output = Command::new("python3")
        .arg(source("tests/read_safetensors.py"))
        .arg(at.join("run.safetensors"))
        .env("PYTHONPATH", source(".python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("Python 3 is needed: apt-get install python3");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "safetensors (`make setup` installs it into .python) says:\n{complaint}");
    let found: BTreeMap<String, (String, Vec<i64>, String)> = serde_json::from_slice(&output.stdout).unwrap();
    let (ours, _) = read_safetensors(&at.join("run.safetensors")).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>());
    for (name, (kind, shape, hash)) in found {
        let tensor = &ours[&name];
        let expected = if tensor.kind() == Kind::Float { "float32" } else { "int32" };
        let sum: String = Sha256::digest(bytes(tensor)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((kind.as_str(), shape, hash), (expected, tensor.size(), sum), "{name}");
    }
}
