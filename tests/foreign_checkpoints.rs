//! Checkpoints as other tools and trainings leave them: in half precision, with averages, wrapped, with what stands beside the
//! weights.

mod common;

use std::fs;

use common::{
    diffusers::model_of,
    noise,
    pickle::{Pickle, bytes, write_checkpoint, write_legacy_checkpoint, write_zip},
    run_in, same,
    text_runs::{OPTIONS, Tensors, import, original, write_tensors, write_tokenizer},
    wake,
};
use lvdm::{
    checkpoint,
    codecs::{AutoencoderConfig, VideoAutoencoder},
    experiment::DiffusionExperiment,
    nn::Parameters,
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// Everything in half precision, buffers too; CLIP's other tensors; averages; names that nobody knows.
#[test]
fn an_original_file_is_read_as_tools_leave_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_tokenizer(&at.join("sd/tokenizer"));
    let mut tensors = original();
    let betas = lvdm::diffusion::NoiseSchedule::new(&lvdm::diffusion::ScheduleConfig {
        beta_start: 0.00085,
        beta_end: 0.012,
        ..Default::default()
    });
    tensors.insert("betas".into(), Tensor::from_slice(&betas.unwrap().beta).to_kind(Kind::Float));
    for name in [
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.logit_scale",
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
        "cond_stage_model.transformer.visual_projection.weight",
    ] {
        tensors.insert(name.into(), noise(1, &[4]));
    }
    let run = |tensors: &Tensors, name: &str, more: &[&str]| {
        write_tensors(&at.join(name), tensors);
        let out = format!("run-{name}");
        let said = import(at, name, &out, &[&OPTIONS, more].concat());
        assert_eq!(said.status, 0, "{}", said.err);
        let (_, found) = checkpoint::open(&at.join(out)).unwrap();
        let experiment: DiffusionExperiment = serde_json::from_value(found.experiment.clone()).unwrap();
        let betas = experiment.betas().unwrap();
        let schedule = (betas.beta_start, betas.beta_end, betas.steps);
        assert_eq!(schedule, (0.00085, 0.012, 1000), "{name}");
        (found.part("model"), said)
    };
    let (plain, _) = run(&tensors, "plain", &[]);
    for kind in [Kind::Half, Kind::BFloat16] {
        let half: Tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(kind))).collect();
        let (found, _) = run(&half, &format!("{kind:?}"), &[]);
        let weight = "input_blocks.0.0.weight";
        assert!(found[weight].equal(&plain[weight].to_kind(kind).to_kind(Kind::Float)));
    }

    // the other import says whose it is
    let line = run_in(at, &["import", "lvdm", "plain", "--out", "x"]).error(1).to_string();
    assert!(line.contains("`lvdm import stable-diffusion`"), "{line}");

    // compiled: the same under other names, of which a note speaks
    let compiled: Tensors = tensors
        .iter()
        .map(|(name, tensor)| {
            (name.replace("model.diffusion_model.", "model.diffusion_model._orig_mod."), tensor.shallow_clone())
        })
        .collect();
    let (found, said) = run(&compiled, "compiled", &[]);
    same(&found, &plain);
    assert!(said.err.contains("without `_orig_mod`"), "{}", said.err);

    // averages: left out, with a note, or taken
    let mut averaged: Tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    let unet: Vec<&String> = tensors.keys().filter(|name| name.starts_with("model.diffusion_model.")).collect();
    for name in unet {
        let flat = name.trim_start_matches("model.").replace('.', "");
        averaged.insert(format!("model_ema.{flat}"), &tensors[name] * 3.0);
    }
    averaged.insert("model_ema.decay".into(), Tensor::from(0.9999f32));
    let (found, said) = run(&averaged, "raw", &[]);
    same(&found, &plain);
    assert!(said.err.contains("the raw ones are taken; --ema takes the averages"), "{}", said.err);
    let (found, _) = run(&averaged, "ema", &["--ema"]);
    let weight = "input_blocks.0.0.weight";
    assert!(found[weight].equal(&(&plain[weight] * 3.0)));
    let line = import(at, "plain", "x", &[&OPTIONS[..], &["--ema"]].concat()).error(2).to_string();
    assert!(line.contains("holds no averaged weights"), "{line}");

    // the factor of the latents is one number, in whatever shape
    let mut factor: Tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    factor.insert("scale_factor".into(), Tensor::from_slice(&[0.25f32]));
    run(&factor, "factor", &[]);
    factor.insert("scale_factor".into(), noise(4, &[2]));
    write_tensors(&at.join("factors"), &factor);
    let line = import(at, "factors", "x", &OPTIONS).error(1).to_string();
    assert!(line.contains("`scale_factor` has shape [2]"), "{line}");

    // numbers that no clip and no network has
    for wrong in ["--frames=1000000000", "--frames=0", "--resolution=1000000000", "--heads=0", "--heads=-3"] {
        let options: Vec<&str> =
            OPTIONS.into_iter().filter(|word| !(wrong.starts_with("--heads") && *word == "--heads")).collect();
        let options = if options.len() < OPTIONS.len() { vec!["--tokenizer", "sd/tokenizer"] } else { options };
        let all = [&["import", "stable-diffusion", "plain", "--out", "x"][..], &options, &[wrong]].concat();
        let line = run_in(at, &all).error(2).to_string();
        assert!(line.contains(wrong.split('=').next().unwrap()) && !at.join("x").exists(), "{line}");
    }

    let all = ["import", "lvdm", "plain", "--out", "x", "--frames=1000000000"];
    assert!(run_in(at, &all).error(2).contains("--frames"));

    // strict, but for what --ignore names
    let mut more: Tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    more.insert("embedding_manager.words".into(), noise(3, &[2]));
    write_tensors(&at.join("more"), &more);
    assert!(import(at, "more", "x", &OPTIONS).error(1).contains("`embedding_manager.words` is unknown"));
    same(&run(&more, "less", &["--ignore", "embedding_manager."]).0, &plain);
    let line = import(at, "more", "x", &[&OPTIONS[..], &["--ignore", "nothing."]].concat()).error(2).to_string();
    assert!(line.contains("--ignore nothing."), "{line}");

    // half an autoencoder
    let half: Tensors = tensors
        .iter()
        .filter(|(name, _)| !name.contains("first_stage_model.encoder."))
        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
        .collect();
    write_tensors(&at.join("half"), &half);
    assert!(import(at, "half", "x", &OPTIONS).error(1).contains("the encoder is missing"));

    // eight bits: refused by their type
    let header = json!({"model.diffusion_model.out.2.bias": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        "first_stage_model.encoder.conv_in.bias": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [4, 8]}});
    let header = header.to_string();
    fs::write(at.join("fp8"), [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat()).unwrap();
    let line = import(at, "fp8", "x", &OPTIONS).error(1).to_string();
    assert!(line.contains("F8_E4M3") && line.contains("half precision"), "{line}");

    // words that no tokenizer writes
    let table = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";
    let rows = format!("the text encoder has {} rows, the tokenizer 520 tokens", tensors[table].size()[0]);
    assert!(said.err.contains(&rows), "{}", said.err);

    // NaN: imported, with a warning
    more.remove("embedding_manager.words");
    let bad = "first_stage_model.quant_conv.bias";
    more.insert(bad.into(), &tensors[bad] * f64::NAN);
    let (_, said) = run(&more, "nan", &[]);
    assert!(said.err.contains("warning: image autoencoder: 1 tensors hold NaN"), "{}", said.err);
    assert!(!at.join("x").exists());
}

/// What trainings put around a network and beside it: compiled, data-parallel, DeepSpeed, Lightning in half precision,
/// before PyTorch 1.6. Each is imported to the bit; what nobody knows is still refused.
#[test]
fn checkpoints_of_other_trainings_are_imported() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let config = AutoencoderConfig { channels: 4, factors: [2, 4, 4], norm_groups: 4, ..AutoencoderConfig::default() };
    let parameters = Parameters::new(CPU, 3);
    VideoAutoencoder::new(&parameters.root(), &config);
    wake(&parameters);
    let tensors: Tensors = parameters.named().into_iter().map(|(name, tensor)| (name, tensor.detach())).collect();
    let renamed = |rename: &dyn Fn(&str) -> String| -> Tensors {
        tensors.iter().map(|(name, tensor)| (rename(name), tensor.shallow_clone())).collect()
    };
    let options = ["--temporal-factor", "2", "--norm-groups", "4", "--scale", "1", "--shift", "0"];
    let lvdm = |file: &str, out: &str, more: &[&str]| {
        run_in(at, &[&["import", "lvdm", file, "--out", out], &options[..], more].concat())
    };
    let imported = |file: &str, notes: &str| {
        let said = lvdm(file, &format!("run-{file}"), &[]);
        assert_eq!(said.status, 0, "{file}: {}", said.err);
        same(&model_of(&at.join(format!("run-{file}"))), &tensors);
        assert!(said.err.contains(notes) && said.out.lines().count() > 1, "{file}: {}", said.err);
    };
    write_checkpoint(&at.join("mixed.ckpt"), &tensors, &|pickle| {
        pickle.text("MixedPrecision");
        pickle.raw(b"}");
    });
    imported("mixed.ckpt", "");
    write_checkpoint(&at.join("compiled.ckpt"), &renamed(&|name| format!("_orig_mod.{name}")), &|_| {});
    imported("compiled.ckpt", "names are read without `_orig_mod`");
    write_checkpoint(&at.join("part.ckpt"), &renamed(&|name| name.replacen('.', "._orig_mod.", 1)), &|_| {});
    imported("part.ckpt", "names are read without `_orig_mod`");
    write_checkpoint(&at.join("parallel.ckpt"), &renamed(&|name| format!("module._orig_mod.{name}")), &|_| {});
    imported("parallel.ckpt", "names are read without `module.`");
    write_tensors(&at.join("parallel.safetensors"), &renamed(&|name| format!("module.{name}")));
    write_legacy_checkpoint(&at.join("old.ckpt"), &tensors);
    imported("old.ckpt", "");

    // the weights as they are, with a number among them
    let mut pickle = Pickle(b"\x80\x02}(".to_vec());
    pickle.text("epoch");
    pickle.int(7);
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        pickle.text(name);
        pickle.tensor(tensor, &i.to_string());
    }
    pickle.raw(b"u.");
    let storages = tensors.values().enumerate().map(|(i, tensor)| (format!("archive/data/{i}"), bytes(tensor)));
    let contents: Vec<(String, Vec<u8>)> =
        std::iter::once(("archive/data.pkl".into(), pickle.0)).chain(storages).collect();
    let borrowed: Vec<(&str, &[u8])> = contents.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    write_zip(&at.join("flat.pt"), &borrowed);
    imported("flat.pt", "");

    // DeepSpeed: the weights are called `module`
    let mut pickle = Pickle(b"\x80\x02}(".to_vec());
    for key in ["optimizer", "lr_scheduler"] {
        pickle.text(key);
        pickle.raw(b"N");
    }
    pickle.text("global_steps");
    pickle.int(60);
    pickle.text("module");
    pickle.raw(b"}(");
    let entries: Vec<_> = tensors.iter().enumerate().collect();
    for (i, (name, tensor)) in &entries {
        pickle.text(&format!("_forward_module.{name}"));
        pickle.tensor(tensor, &i.to_string());
    }
    pickle.raw(b"uu.");
    let contents: Vec<(String, Vec<u8>)> = std::iter::once(("archive/data.pkl".to_string(), pickle.0))
        .chain(entries.iter().map(|(i, (_, tensor))| (format!("archive/data/{i}"), bytes(tensor))))
        .collect();
    let borrowed: Vec<(&str, &[u8])> = contents.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    write_zip(&at.join("deepspeed.pt"), &borrowed);
    imported("deepspeed.pt", "names are read without `_forward_module`");
    assert_eq!(checkpoint::open(&at.join("run-deepspeed.pt")).unwrap().1.progress.step, 60);

    // and the folder that they lie in
    fs::create_dir_all(at.join("last.ckpt/checkpoint")).unwrap();
    fs::rename(at.join("deepspeed.pt"), at.join("last.ckpt/checkpoint/mp_rank_00_model_states.pt")).unwrap();
    fs::write(at.join("last.ckpt/latest"), "checkpoint").unwrap();
    imported("last.ckpt", "a folder of DeepSpeed");
    fs::create_dir(at.join("nothing")).unwrap();
    assert!(lvdm("nothing", "x", &[]).error(2).contains("is a folder"));

    // an entry and a tensor of nobody
    let mut more = renamed(&str::to_string);
    more.insert("sampler.weight".into(), noise(1, &[3]));
    write_checkpoint(&at.join("more.ckpt"), &more, &|pickle| {
        pickle.text("wandb_id");
        pickle.int(1);
    });
    assert!(lvdm("more.ckpt", "x", &[]).error(1).contains("`sampler.weight`"));
    assert!(lvdm("more.ckpt", "x", &["--ignore", "sampler."]).error(1).contains("`wandb_id`"));
    let said = lvdm("more.ckpt", "run-more", &["--ignore", "sampler.", "--ignore", "wandb_"]);
    assert_eq!(said.status, 0, "{}", said.err);
    let empty: Tensors = tensors.keys().map(|name| (name.clone(), Tensor::zeros([0], (Kind::Float, CPU)))).collect();
    write_checkpoint(&at.join("shared.ckpt"), &empty, &|_| {});
    assert!(lvdm("shared.ckpt", "x", &[]).error(1).contains("zero_to_fp32.py"));
    // twice one name without its wrapper
    let mut twice = renamed(&|name| format!("_orig_mod.{name}"));
    twice.insert("quant_conv.conv.bias".into(), noise(1, &[3]));
    write_checkpoint(&at.join("twice.ckpt"), &twice, &|_| {});
    assert!(lvdm("twice.ckpt", "x", &[]).error(1).contains("are both"), "{:?}", tensors.keys());
    assert!(!at.join("x").exists());
}
