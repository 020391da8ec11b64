//! Runs ↔ diffusers: what was imported goes back as a folder that diffusers opens; networks of several folders make one run.

mod common;

use std::fs;

use common::{
    diffusers::{PARTS, json, model_of, python, run_python, tensors},
    run_in, succeed_in,
    text_runs::{
        OPTIONS, TABLE, Tensors, experiment, import, networks, original, write_diffusers, write_tensors, write_videos,
    },
};
use lvdm::{
    exchange::diffusers_config, run::open_text_encoder, text::TokenizerFiles, weights::stable_diffusion::is_temporal,
};
use tch::Device;

const CPU: Device = Device::Cpu;

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
        diffusers_config::unet(&config("back", "unet")).unwrap(),
        diffusers_config::unet(&config("sd", "unet")).unwrap()
    );
    let vae = |folder: &str| diffusers_config::autoencoder(&config(folder, "vae")).unwrap();
    assert_eq!(vae("back"), vae("sd"));
    assert_eq!(config("back", "vae")["scaling_factor"], 0.3);
    let text = |folder: &str| diffusers_config::text_encoder(&config(folder, "text_encoder")).unwrap();
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

/// U-Net, image autoencoder and text encoder of other files and folders over a base, which need not have them all.
#[test]
fn networks_come_from_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_diffusers(&at.join("other"));
    for (part, file, _) in PARTS {
        let path = at.join("other").join(part).join(file);
        let larger = tensors(&path).into_iter().map(|(name, t)| match t.is_floating_point() {
            true => (name, t * 1.25),
            false => (name, t),
        });
        write_tensors(&path, &larger.collect());
    }
    let mut vae = json(&at.join("other/vae/config.json"));
    vae["scaling_factor"] = 0.5.into();
    fs::write(at.join("other/vae/config.json"), vae.to_string()).unwrap();
    // a file of the autoencoder alone in the original names, and a whole original file without an autoencoder
    let [_, (_, image, _), _] = networks();
    let alone: Tensors = image.named().into_iter().map(|(name, t)| (name, t.detach() * 1.25)).collect();
    write_tensors(&at.join("vae.safetensors"), &alone);
    let mut bare = original();
    bare.retain(|name, _| !name.starts_with("first_stage_model."));
    write_tensors(&at.join("bare.safetensors"), &bare);

    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    assert_eq!(import(at, "other", "other-run", &[]).status, 0);
    let of = |run: &str| {
        ["", "autoencoder.safetensors", "text_encoder.safetensors"].map(|file| model_of(&at.join(run).join(file)))
    };
    let (own, others) = (of("sd-run"), of("other-run"));
    let same = |a: &Tensors, b: &Tensors| {
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        a.iter().all(|(name, tensor)| tensor.equal(&b[name]))
    };
    let bare = [&["--vae", "vae.safetensors"][..], &OPTIONS[..]].concat();
    for (i, (base, more, replaced)) in [
        ("sd", vec!["--vae", "other/vae"], [false, true, false]),
        ("sd", vec!["--vae", "other"], [false, true, false]),
        ("sd", vec!["--vae", "vae.safetensors"], [false, true, false]),
        ("sd", vec!["--vae", "other/vae/diffusion_pytorch_model.fp16.safetensors"], [false, true, false]),
        ("sd", vec!["--unet", "other/unet"], [true, false, false]),
        ("sd", vec!["--unet", "other/unet/diffusion_pytorch_model.safetensors"], [true, false, false]),
        ("sd", vec!["--text-encoder", "other/text_encoder"], [false, false, true]),
        ("sd", vec!["--unet", "other", "--text-encoder", "other"], [true, false, true]),
        ("bare.safetensors", bare, [false, true, false]),
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run-{i}");
        let said = import(at, base, &run, &more);
        assert_eq!(said.status, 0, "{more:?}: {}", said.err);
        for (part, found) in of(&run).iter().enumerate() {
            let wanted = if replaced[part] { &others[part] } else { &own[part] };
            assert!(same(found, wanted), "{more:?}: part {part}");
        }
    }
    // of the base's own nothing is read that is replaced
    fs::rename(at.join("sd/unet/diffusion_pytorch_model.safetensors"), at.join("unet.safetensors")).unwrap();
    assert!(import(at, "sd", "x", &[]).error(1).contains("holds no weights"));
    let said = import(at, "sd", "run-without", &["--unet", "other/unet/diffusion_pytorch_model.safetensors"]);
    assert_eq!(said.status, 0, "{}", said.err);
    assert!(same(&of("run-without")[0], &others[0]));
    fs::rename(at.join("unet.safetensors"), at.join("sd/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let scale = |run: &str| lvdm::run::open_latent_space(&at.join(run), CPU).unwrap().normalization.scale;
    assert_eq!([scale("run-0"), scale("run-2"), scale("run-4")], [0.5, 0.3, 0.3]);

    let refused = |base: &str, more: &[&str], status: i32, word: &str| {
        let said = import(at, base, "x", more);
        assert!(said.error(status).contains(word), "{}", said.err);
        assert!(!at.join("x").exists());
    };
    refused("sd", &["--vae", "other/unet"], 1, "not the image autoencoder");
    refused("sd", &["--unet", "vae.safetensors"], 1, "not the U-Net");
    refused("sd", &["--vae", "none"], 2, "there is no none");
    refused("sd", &["--vae", "sd/tokenizer"], 2, "config.json");
    refused("bare.safetensors", &OPTIONS, 1, "--vae");
}
