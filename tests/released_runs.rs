//! Run folders, checkpoints and experiment files of lvdm 0.1.0, from before networks had kinds, are read as they were.
//!
//! `tests/released_runs/` was written by that release on the processor of [`WRITTEN_ON`]: five small runs, which learned for
//! two steps (`text` was imported), what they sampled then, and the log of a third step.

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use common::{FirstClips as _, relative_error, source, succeed_in};
use lvdm::{
    diffusion::{Ddim, DpmSolver, GuidanceConfig, SamplerConfig, UniPc},
    models::{FramesOfClip, LatentConditions, LatentDiffusion, TextPrompts},
    random::{Purpose, normal_batch},
    safetensors::read_safetensors,
    torch::{Vectors, processor},
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Family, model and stepping, as Linux numbers processors.
const WRITTEN_ON: [(&str, &str); 4] =
    [("vendor_id", "AuthenticAMD"), ("cpu family", "26"), ("model", "2"), ("stepping", "1")];

/// Whether results are those of 0.1.0 to the bit: other processors round in another order.
fn to_the_bit() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let says = |key: &str, value: &str| {
        cpuinfo.lines().filter_map(|line| line.split_once(':')).any(|(k, v)| k.trim() == key && v.trim() == value)
    };
    WRITTEN_ON.iter().all(|(key, value)| says(key, value)) && processor().vectors == Vectors::Avx512
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, to).unwrap();
        }
    }
}

#[test]
fn runs_sample_what_they_sampled() {
    let expected: BTreeMap<String, Tensor> =
        read_safetensors(&source("tests/released_runs/samples.safetensors")).unwrap().0;
    let samplers = [
        ("ddim", SamplerConfig::from(Ddim { steps: 4, eta: 1.0 })),
        ("dpm_solver", DpmSolver { steps: 4 }.into()),
        ("unipc", UniPc { steps: 4 }.into()),
    ];
    let prompts = ["a red cat".to_string(), "a dog".into()];
    let mut compared = 0;
    for name in ["unconditional", "prediction", "pixels", "text"] {
        let generator = LatentDiffusion::open(&source("tests/released_runs/runs").join(name), Device::Cpu).unwrap().0;
        let [c, _, h, w] = generator.latent;
        let frames = normal_batch(5, Purpose::GaussianLatents, &[0, 1], 0, &[c, 1, h, w]);
        let given = LatentConditions {
            text: (name == "text").then_some(TextPrompts { prompts: &prompts, negative: "", guidance: 7.5 }),
            frames: (name == "prediction").then_some(FramesOfClip {
                indices: &[0],
                frames: &frames,
                guidance: GuidanceConfig::default(),
            }),
            ..LatentConditions::default()
        };
        for (sampler, config) in samplers {
            let latents = generator.latents(&[0, 1], &given, config, 9, &mut |_, _| {}).unwrap();
            let was = &expected[&format!("{name}.{sampler}.latents")];
            let error = relative_error(&latents, was);
            println!("{name}, {sampler}: {error:.1e}");
            if to_the_bit() {
                assert!(latents.equal(was), "{name}, {sampler}: {error:e}");
            } else {
                assert!(error < 1e-5, "{name}, {sampler}: {error:e}");
            }
            compared += 1;
            if let Some(videos) = expected.get(&format!("{name}.{sampler}.videos")) {
                let now = generator.decode(&latents).unwrap();
                let most = if to_the_bit() { 0 } else { 1 };
                let difference = (now.to_kind(Kind::Int) - videos.to_kind(Kind::Int)).abs().max();
                assert!(difference.int64_value(&[]) <= most, "{name}, {sampler}: {}", difference.int64_value(&[]));
                compared += 1;
            }
        }
    }
    assert_eq!(compared, expected.len());
}

/// From their own files, whose network stands under `unet`, with overrides of that time.
#[test]
fn runs_go_on_as_they_would_have() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    copy(&source("tests/released_runs"), at);
    let text = fs::read_to_string(source("tests/released_runs/third_steps.json")).unwrap();
    let expected: BTreeMap<String, BTreeMap<String, f64>> = serde_json::from_str(&text).unwrap();
    for (name, expected) in expected {
        let verb = if name == "autoencoder" { "autoencoder" } else { "diffusion" };
        let (file, run) = (format!("{name}.yaml"), format!("runs/{name}"));
        let mut arguments = vec!["train", verb, &file, "--run", &run, "trainer.steps=3", "trainer.checkpoint_every=3"];
        arguments.extend((verb == "diffusion").then_some("unet.heads=2"));
        succeed_in(at, &arguments);
        let log = fs::read_to_string(at.join(run).join("metrics.jsonl")).unwrap();
        let third: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!(third["step"], 3);
        for (key, was) in expected {
            let now = third[&key].as_f64().unwrap();
            let error = ((now - was) / was).abs();
            println!("{name}, {key}: {error:.1e}");
            assert!(if to_the_bit() { now == was } else { error < 1e-5 }, "{name}, {key}: {now}, was {was}");
        }
    }
}
