//! What is imported: every layout of a Stable Diffusion becomes the same run, and a run is whole or not there.

use std::{fs, path::Path, process::Command};

use lvdm::{
    diffusion::{Ddim, Denoiser, Guidance, Guided, NetworkDenoiser, Predict, SamplerConfig, sample},
    models::{LatentConditions, LatentDiffusion, TextPrompts},
    networks::Inputs,
    random::{Purpose, normal},
    run::open_text_encoder,
    run_files::NAMES_FILE,
    weights::stable_diffusion::is_temporal,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    CPU,
    common::{
        self, FirstClips as _,
        pickle::write_checkpoint,
        relative_error, run_in,
        text_runs::{OPTIONS, import, networks, original, write_diffusers, write_tensors},
    },
    model_of, text,
};

/// Sampled with guidance from an import, each frame is what the image network makes of that frame's noise alone.
fn frames_are_images(run: &Path) {
    let (generator, _) = LatentDiffusion::open(run, CPU).unwrap();
    let prompts = ["a red cat".to_string(), "a dog".to_string()];
    let sampler = SamplerConfig::Ddim(Ddim { steps: 4, eta: 0.0 });
    let z_0 = generator.latents(&[0, 1], &text(&prompts, 7.5), sampler, 3, &mut |_, _| {}).unwrap();
    assert_eq!(z_0.size(), [2, 4, 4, 8, 8]);
    let encoder = generator.text.as_ref().unwrap();
    let denoiser = |prompts: &[&str]| NetworkDenoiser {
        network: &*generator.network,
        path: &*generator.path,
        predict: Predict::Noise,
        given: Inputs { text: Some(encoder.encode(prompts).unwrap()), ..Inputs::default() },
    };
    for clip in 0..2 {
        let start = normal(3, Purpose::SampleStart, clip, 0, &[4, 4, 8, 8]).unsqueeze(0);
        let video = generator.space.decode(&z_0.narrow(0, clip as i64, 1));
        for frame in 0..4 {
            let image = Guided {
                conditional: denoiser(&[&prompts[clip as usize]]),
                unconditional: denoiser(&["a dog"]),
                weight: 7.5,
                form: Guidance::Interpolate,
                path: &*generator.path,
            };
            let start = start.narrow(2, frame, 1);
            let none = |_| start.zeros_like();
            let alone = sample(&image, &*sampler, &*generator.path, &start, &none, &mut |_, _| {}).unwrap();
            let error = relative_error(&video.narrow(2, frame, 1), &generator.space.decode(&alone));
            assert!(error < 1e-4, "clip {clip}, frame {frame}: {error:e}");
        }
    }
    // both passes as one batch are the two passes
    let (a, b) = (denoiser(&["a cat", "a dog"]), denoiser(&["", "red"]));
    let z_t = normal(3, Purpose::SampleStart, 9, 0, &[2, 4, 4, 8, 8]);
    let (conditional, unconditional) = (a.predict(&z_t, 500.0).noise, b.predict(&z_t, 500.0).noise);
    let wanted = &unconditional + (conditional - &unconditional) * 3.0;
    let form = Guidance::Interpolate;
    let guided = Guided { conditional: a, unconditional: b, weight: 3.0, form, path: &*generator.path };
    assert!(relative_error(&guided.predict(&z_t, 500.0).noise, &wanted) < 1e-5);
    // the prompt and the negative prompt do something
    let with = |given: &LatentConditions| generator.latents(&[0, 1], given, sampler, 3, &mut |_, _| {}).unwrap();
    let other = TextPrompts { prompts: &prompts, negative: "", guidance: 7.5 };
    let other = LatentConditions { text: Some(other), ..LatentConditions::default() };
    assert!(relative_error(&with(&other), &z_0) > 1e-4);
    let swapped = [prompts[1].clone(), prompts[0].clone()];
    assert!(relative_error(&with(&text(&swapped, 1.0)), &with(&text(&prompts, 1.0))) > 1e-4);
    // beside another clip or alone
    let alone = generator.latents(&[1], &text(&prompts[1..], 7.5), sampler, 3, &mut |_, _| {}).unwrap();
    assert!(relative_error(&alone.get(0), &z_0.get(1)) < 1e-5);
}

/// The same three networks out of diffusers' folder and out of one original file of either kind.
#[test]
fn every_layout_becomes_the_same_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    let said = import(at, "sd", "run", &[]);
    assert_eq!(said.status, 0, "{}", said.err);
    let listed: Value = serde_json::from_str(&fs::read_to_string(at.join("run").join(NAMES_FILE)).unwrap()).unwrap();
    for ((network, parameters, _), part) in networks().iter().zip(["U-Net", "image autoencoder", "text encoder"]) {
        assert!(said.out.contains(part), "{}", said.out);
        let count = |key: &str| listed[part][key].as_array().unwrap().len();
        let names: Vec<String> = parameters.named().into_iter().map(|(name, _)| name).collect();
        let new = names.iter().filter(|name| network.diffusers_name(name).is_none()).count();
        assert_eq!((count("loaded"), count("new")), (names.len() - new, new), "{part}");
        assert_eq!(count("unused"), usize::from(part == "text encoder"));
    }
    let model = model_of(&at.join("run"));
    for (name, tensor) in networks()[0].1.named() {
        if is_temporal(&name) {
            let zero = model[&name].abs().max().double_value(&[]) == 0.0;
            assert_eq!(
                zero,
                name.contains(".to_") || name.ends_with("norm4.bias") || name.ends_with("norm5.bias"),
                "{name}"
            );
        } else {
            assert!(model[&name].equal(&tensor), "{name}");
        }
    }
    let (generator, experiment) = LatentDiffusion::open(&at.join("run"), CPU).unwrap();
    assert_eq!((generator.space.normalization.scale, generator.space.normalization.shift), (0.3, 0.0));
    assert_eq!((experiment.betas().unwrap().steps, experiment.betas().unwrap().beta_start), (900, 0.001));
    assert!(experiment.unet().unwrap().norm_per_frame);
    frames_are_images(&at.join("run"));

    // one original file: images' kernels under our names, amid what else lies there
    let mut original = original();
    original.insert("cond_stage_model.transformer.text_model.embeddings.position_ids".into(), Tensor::from(1i64));
    original.insert("model_ema.decay".into(), Tensor::from(0.9999f32));
    original.insert("betas".into(), Tensor::from_slice(&generator.path.discrete().unwrap().beta).to_kind(Kind::Float));
    original.insert("alphas_cumprod".into(), Tensor::zeros([900], (Kind::Float, CPU)));
    original.insert("scale_factor".into(), Tensor::from(0.3f32));
    write_tensors(&at.join("sd.safetensors"), &original);
    write_checkpoint(&at.join("sd.ckpt"), &original, &|_| {});
    for file in ["sd.safetensors", "sd.ckpt"] {
        let run = at.join(file).with_extension("").with_file_name(format!("run-{file}"));
        let said = import(at, file, run.to_str().unwrap(), &OPTIONS);
        assert_eq!(said.status, 0, "{}", said.err);
        let found = model_of(&run);
        assert_eq!(found.keys().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>());
        assert!(found.iter().all(|(name, tensor)| tensor.equal(&model[name])));
        let (other, found) = LatentDiffusion::open(&run, CPU).unwrap();
        assert_eq!(
            (found.unet().unwrap(), found.schedule.clone()),
            (experiment.unet().unwrap(), experiment.schedule.clone())
        );
        assert!((other.space.normalization.scale - 0.3).abs() < 1e-7);
        let encode = |run: &Path| open_text_encoder(run, CPU).unwrap().encode(&["a cat", ""]).unwrap();
        assert!(encode(&run).equal(&encode(&at.join("run"))));
    }

    // what is missing, unknown or not given
    assert!(import(at, "sd.ckpt", "x", &[]).error(2).contains("--tokenizer"));
    assert!(import(at, "sd", "x", &["--heads", "2"]).error(2).contains("config.json"));
    assert!(import(at, "none", "x", &[]).error(2).contains("there is no none"));
    assert!(import(at, "sd", "run", &[]).error(2).contains("there already"));
    let odd = ["import", "stable-diffusion", "sd", "--out", "x", "--resolution", "18"];
    assert!(run_in(at, &odd).error(2).contains("multiple of 4"));
    assert!(import(at, "sd.ckpt", "x", &["--tokenizer", "sd"]).error(2).contains("vocab.json"));
    original.insert("model.diffusion_model.more.weight".into(), Tensor::from(1.0f32));
    write_tensors(&at.join("sd.safetensors"), &original);
    assert!(import(at, "sd.safetensors", "x", &OPTIONS).error(1).contains("more.weight` is unknown"));
    fs::remove_file(at.join("sd/vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    assert!(import(at, "sd", "x", &[]).error(1).contains("sought were diffusion_pytorch_model.safetensors"));
    fs::remove_dir_all(at.join("sd/vae")).unwrap();
    assert!(import(at, "sd", "x", &[]).error(2).contains("vae/config.json"));
    assert!(!at.join("x").exists());
}

/// A disk that has room for the first files of a run and not for the last: nothing stays, and the same command goes on when
/// there is room. (A limit on the size of files stands for the disk.)
#[test]
fn an_import_that_cannot_be_written_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    let within = |blocks: &str| {
        let line = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &line, env!("CARGO_BIN_EXE_lvdm"), "import", "stable-diffusion", "sd", "--out", "run"]);
        command
            .args(["--frames", "4", "--resolution", "16"])
            .current_dir(at)
            .env_remove("LD_LIBRARY_PATH")
            .env("CUDA_VISIBLE_DEVICES", "");
        common::Said::from(command.output().unwrap())
    };
    assert_eq!(within("unlimited").status, 0);
    let size = |name: &str| fs::metadata(at.join("run").join(name)).unwrap().len();
    let (first, last) = (size("autoencoder.safetensors"), size("checkpoints/step-00000000.safetensors"));
    assert!(first + 4096 < last, "{first}, {last}");
    fs::remove_dir_all(at.join("run")).unwrap();
    // in blocks of 512 bytes
    let error = within(&(first / 512 + 4).to_string()).error(1).to_string();
    assert!(error.contains("run"), "{error}");
    assert!(!at.join("run").exists());
    assert_eq!(within("unlimited").status, 0);
}
