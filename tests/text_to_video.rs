//! From a Stable Diffusion to videos: import, training on captioned clips, sampling from prompts.

mod common;

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use common::{
    noise,
    pickle::write_checkpoint,
    relative_error, run_in, succeed_in,
    text_runs::{
        BESIDE, CAPTIONS, TABLE, TOLD, Tensors, experiment, import, networks, original, write_diffusers,
        write_diffusers_of, write_tensors, write_videos,
    },
};
use lvdm::{
    checkpoint::{self, Checkpoint},
    data::{VideoReader, frame_folder::read_picture, pictures::write_png},
    diffusion::{
        Ddim, Denoiser, FrameMask, GivenLatents, GivenTexts, GivenToClips, Guidance, GuidanceConfig, Guided,
        NetworkDenoiser, Predict, SamplerConfig, Times, conditioned, sample,
    },
    exchange::{StableDiffusionOptions, import_stable_diffusion},
    experiment::Trained,
    models::{LatentConditions, LatentDiffusion, TextPrompts},
    networks::{Inputs, Network as _, Ports, Recompute, UNet3d, UNetConfig},
    nn::{Adapter, Parameters},
    random::{Purpose, normal},
    run::{open_text_encoder, weights},
    run_files::NAMES_FILE,
    safetensors::{read_safetensors, write_safetensors_atomically},
    torch::{Autocast, peak_host_memory},
    weights::stable_diffusion::is_temporal,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

fn model_of(run: &Path) -> Tensors {
    checkpoint::open(run).unwrap().1.part("model")
}

fn text<'a>(prompts: &'a [String], guidance: f64) -> LatentConditions<'a> {
    LatentConditions { text: Some(TextPrompts { prompts, negative: "a dog", guidance }), ..LatentConditions::default() }
}

/// Sampled with guidance from an import, each frame is what the image network makes of that frame's noise alone.
fn frames_are_images(run: &Path) {
    let (generator, _) = LatentDiffusion::open(run, CPU).unwrap();
    let prompts = ["a red cat".to_string(), "a dog".to_string()];
    let sampler = SamplerConfig::Ddim(Ddim { steps: 4, eta: 0.0 });
    let z_0 = generator.latents(&[0, 1], &text(&prompts, 7.5), sampler, 3, &mut |_, _| {}).unwrap();
    assert_eq!(z_0.size(), [2, 4, 4, 8, 8]);
    let encoder = generator.text.as_ref().unwrap();
    let told = |prompts: &[&str]| NetworkDenoiser {
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
                conditional: told(&[&prompts[clip as usize]]),
                unconditional: told(&["a dog"]),
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
    let (a, b) = (told(&["a cat", "a dog"]), told(&["", "red"]));
    let z_t = normal(3, Purpose::SampleStart, 9, 0, &[2, 4, 4, 8, 8]);
    let (conditional, unconditional) = (a.predict(&z_t, 500.0).noise, b.predict(&z_t, 500.0).noise);
    let apart = &unconditional + (conditional - &unconditional) * 3.0;
    let form = Guidance::Interpolate;
    let guided = Guided { conditional: a, unconditional: b, weight: 3.0, form, path: &*generator.path };
    assert!(relative_error(&guided.predict(&z_t, 500.0).noise, &apart) < 1e-5);
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
        let said = import(at, file, run.to_str().unwrap(), &TOLD);
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

    // what is missing, unknown or not told
    assert!(import(at, "sd.ckpt", "x", &[]).error(2).contains("--tokenizer"));
    assert!(import(at, "sd", "x", &["--heads", "2"]).error(2).contains("config.json"));
    assert!(import(at, "none", "x", &[]).error(2).contains("there is no none"));
    assert!(import(at, "sd", "run", &[]).error(2).contains("there already"));
    let odd = ["import", "stable-diffusion", "sd", "--out", "x", "--resolution", "18"];
    assert!(run_in(at, &odd).error(2).contains("multiple of 4"));
    assert!(import(at, "sd.ckpt", "x", &["--tokenizer", "sd"]).error(2).contains("vocab.json"));
    original.insert("model.diffusion_model.more.weight".into(), Tensor::from(1.0f32));
    write_tensors(&at.join("sd.safetensors"), &original);
    assert!(import(at, "sd.safetensors", "x", &TOLD).error(1).contains("more.weight` is unknown"));
    fs::remove_file(at.join("sd/vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    assert!(import(at, "sd", "x", &[]).error(1).contains("sought were diffusion_pytorch_model.safetensors"));
    fs::remove_dir_all(at.join("sd/vae")).unwrap();
    assert!(import(at, "sd", "x", &[]).error(2).contains("vae/config.json"));
    assert!(!at.join("x").exists());
}

/// Import → training of each kind on captioned clips → sampling with guidance, on the command line.
#[test]
fn from_images_to_videos() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let start = model_of(&at.join("sd-run"));
    let moved = |name: &str| -> BTreeSet<String> {
        let (_, found) = checkpoint::open(&at.join("runs").join(name)).unwrap();
        let now = found.part("model");
        now.into_iter()
            .filter(|(name, t)| start.get(name).is_none_or(|old| !t.equal(old)))
            .map(|(name, _)| name)
            .collect()
    };
    let skipped = |name: &str| {
        let lines = fs::read_to_string(at.join("runs").join(name).join("metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        assert!(last["loss"].as_f64().unwrap() > 0.0);
        last["skipped_videos"].as_f64().unwrap()
    };
    let train = |name: &str, dataset: &str, more: &str| {
        let said = succeed_in(at, &["train", "diffusion", &experiment(at, name, dataset, more)]);
        said.err
    };
    let said = train("all", BESIDE, "");
    assert!(said.contains("1 have no caption") && said.contains("is cut to 12"), "{said}");
    assert_eq!(skipped("all"), 1.0);
    // of the key's map nothing is seen as long as all other maps beside it are zero
    assert!(moved("all").len() > start.len() * 3 / 4);
    train("temporal", TABLE, "trained: {kind: temporal}\n");
    assert_eq!(skipped("temporal"), 2.0);
    assert!(!moved("temporal").is_empty() && moved("temporal").iter().all(|name| is_temporal(name)));
    train("adapters", TABLE, "trained: {kind: adapters, rank: 2, alpha: 4.0}\n");
    assert!(moved("adapters").iter().all(|name| name.contains(".adapter_")), "{:?}", moved("adapters"));

    // adapters are merged where a run is used: the network with them computes the same as the one without
    let run = at.join("runs/adapters");
    let merged = weights(&mut checkpoint::open_averaged(&run).unwrap().1).unwrap();
    let (_, found) = checkpoint::open(&run).unwrap();
    assert_eq!(merged.keys().collect::<Vec<_>>(), start.keys().collect::<Vec<_>>());
    let changed: Vec<&String> =
        merged.iter().filter(|(name, t)| !t.equal(&start[*name])).map(|(name, _)| name).collect();
    assert!(!changed.is_empty() && changed.iter().all(|name| name.contains(".to_")), "{changed:?}");
    let (generator, experiment_) = LatentDiffusion::open(&run, CPU).unwrap();
    let whole = Parameters::new(CPU, 0);
    let scope = whole.root().with_adapters(experiment_.trained.adapter());
    let with = UNet3d::new(&scope, experiment_.unet().unwrap(), &lvdm::models::ports(&experiment_, generator.latent));
    let mut last = found.part("model");
    last.extend(found.part("ema"));
    whole.load(&last).unwrap();
    let (x, t) = (noise(1, &[1, 4, 4, 8, 8]), Tensor::from_slice(&[300i64]));
    let context = generator.text.as_ref().unwrap().encode(&["a cat"]).unwrap();
    let given = Inputs { text: Some(context), ..Inputs::default() };
    let (a, b) = (with.forward(&x, &t, &given), generator.network.forward(&x, &t, &given));
    assert!(relative_error(&a, &b) < 1e-5);
    let plain = LatentDiffusion::open(&at.join("sd-run"), CPU).unwrap().0;
    assert!(relative_error(&plain.network.forward(&x, &t, &given), &b) > 1e-5);
    succeed_in(at, &["export", "runs/adapters", "--out", "exported.safetensors"]);
    let (exported, _) = read_safetensors(&at.join("exported.safetensors")).unwrap();
    assert!(exported.keys().all(|name| !name.contains("adapter_")));
    succeed_in(at, &["import", "lvdm", "exported.safetensors", "--out", "again"]);
    let sample = |run: &str, out: &str, more: &[&str]| {
        run_in(at, &[&["sample", run, "--steps", "2", "--device", "cpu", "--out", out], more].concat())
    };
    let prompt = ["--prompt", "a cat", "--guidance", "3"];
    for (run, out) in [("runs/adapters", "one.safetensors"), ("again", "two.safetensors")] {
        assert_eq!(sample(run, out, &prompt).status, 0);
    }
    let clips = |file: &str| read_safetensors(&at.join(file)).unwrap().0["clips"].to_kind(Kind::Float);
    assert!((clips("one.safetensors") - clips("two.safetensors")).abs().max().double_value(&[]) <= 1.0);

    // files: a prompt each, its text beside it, another length and size
    let more = ["--prompt", "a cat", "--prompt", "a dog", "--negative", "red", "--guidance", "7.5"];
    let size = ["--frames", "6", "--height", "24", "--width", "32"];
    let said = sample("runs/all", "out", &[&more[..], &size].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    let video = VideoReader::open(&at.join("out/00001.mp4")).unwrap();
    assert_eq!((video.frames(), video.height(), video.width()), (6, 24, 32));
    assert_eq!(fs::read_to_string(at.join("out/00001.txt")).unwrap(), "a dog\n");
    assert!(at.join("out/sampling.json").exists());
    assert_eq!(fs::read_dir(at.join("out")).unwrap().count(), 5);
    fs::write(at.join("prompts.txt"), "\u{feff}a cat\n\n a dog \n").unwrap();
    assert_eq!(sample("runs/all", "more", &["--prompts", "prompts.txt", "--videos", "3"]).status, 0);
    assert_eq!(fs::read_to_string(at.join("more/00002.txt")).unwrap(), "a cat\n");

    // evaluated, a run is told what the real videos show
    let file = experiment(at, "ten", BESIDE, "");
    let longer = ["data.frames=10", "trainer.steps=1", "trainer.checkpoint_every=1"];
    succeed_in(at, &[&["train", "diffusion", &file], &longer[..]].concat());
    let real = |dataset: &str| {
        format!(
            "evaluation: {{clips: 3}}\nreal: {{dataset: {dataset}, frames: 10, resolution: 16}}\n\
                 generated: {{kind: run, run: runs/ten, sampler: {{kind: ddim, steps: 2, eta: 1.0}}}}\nout: measured\n"
        )
    };
    fs::write(at.join("evaluate.yaml"), real(BESIDE)).unwrap();
    let fvd = |more: &[&str]| {
        succeed_in(at, &[&["evaluate", "evaluate.yaml", "--device", "cpu"], more].concat());
        let text = fs::read_to_string(at.join("measured/figures.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["figures"]["samples"]["fvd"].as_f64().unwrap()
    };
    let told = fvd(&[]);
    assert_eq!(told, fvd(&[]));
    assert_ne!(told, fvd(&["generated.guidance=1.0"]));
    let silent = run_in(at, &["evaluate", "evaluate.yaml", "real.dataset={kind: folder, root: videos}"]);
    assert!(silent.error(2).contains("caption"), "{}", silent.err);

    // mistakes
    assert!(sample("runs/all", "x", &[]).error(2).contains("--prompt"));
    assert!(sample("runs/all", "x", &["--prompt", "a", "--height", "18"]).error(2).contains("multiple of 4"));
    assert!(sample("runs/all", "x", &["--prompts", "none.txt"]).error(2).contains("none.txt"));
    let refused = |name: &str, dataset: &str, more: &str, word: &str| {
        let file = experiment(at, name, dataset, more);
        let said = run_in(at, &["train", "diffusion", &file]);
        assert!(said.error(2).contains(word), "{}", said.err);
    };
    refused("x", "{kind: folder, root: videos}", "", "have no captions");
    fs::write(at.join("bad.csv"), "id,name\n").unwrap();
    refused("x", "{kind: webvid, table: bad.csv, root: videos}", "", "lacks the column `videoid`");
    refused("x", BESIDE, "trained: {kind: adapters, rank: 0, alpha: 1.0}\n", "rank must be at least 1");
    let both = "trained: {kind: adapters, rank: 2, alpha: 1.0}\nconditioning: {prediction: 0.5}\n";
    refused("x", BESIDE, both, "do not learn");
}

/// A text network that is also given frames: what is new in it starts without a say, training moves it beside the layers over
/// frames, and a video begins with the picture that it is given and shows what it is told.
#[test]
fn a_video_begins_with_a_picture_and_shows_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let more = "trained: {kind: temporal}\nconditioning: {prediction: 0.7, perturbation: 20}\n";
    let train = |name: &str, steps: &str| {
        let file = experiment(at, name, TABLE, more);
        succeed_in(at, &["train", "diffusion", &file, steps, "trainer.checkpoint_every=1", "trainer.picture_every=2"]);
        at.join("runs").join(name)
    };
    let (start, run) = (model_of(&at.join("sd-run")), train("both", "trainer.steps=4"));
    let moved = model_of(&run);
    assert_eq!(
        (moved["input_blocks.0.0.weight"].size(), moved["label_emb.weight"].size()),
        (vec![32, 5, 1, 3, 3], vec![21, 128])
    );
    for (name, tensor) in &moved {
        match name.as_str() {
            "input_blocks.0.0.weight" => assert!(tensor.narrow(1, 4, 1).abs().max().double_value(&[]) > 0.0),
            "label_emb.weight" => assert!(tensor.abs().max().double_value(&[]) > 0.0),
            name if is_temporal(name) => {}
            name => assert!(tensor.equal(&start[name]), "{name} was not to be trained"),
        }
    }

    // the denoiser given both is the network with mask, level and text
    let (generator, _) = LatentDiffusion::open(&run, CPU).unwrap();
    let encoder = generator.text.as_ref().unwrap();
    let [told, negative] = ["a red cat", "a dog"].map(|prompt| encoder.encode(&[prompt]).unwrap());
    let (z_t, first) = (noise(5, &[1, 4, 4, 8, 8]), noise(6, &[1, 4, 1, 8, 8]));
    let guidance = GuidanceConfig { weight: 0.0, level: Some(7), ..GuidanceConfig::default() };
    let given = GivenLatents { indices: &[0], frames: &first, noise: &noise(7, &first.size()), guidance };
    let denoiser = |guidance| {
        let GivenLatents { indices, frames, noise, guidance: of_frames } = &given;
        let to_clips = GivenToClips {
            frames: Some(GivenLatents { indices, frames, noise, guidance: *of_frames }),
            texts: Some(GivenTexts { contexts: told.shallow_clone(), guidance }),
            labels: None,
        };
        let LatentDiffusion { network, path, .. } = &generator;
        conditioned(&**network, &**path, Predict::Noise, &z_t, to_clips).unwrap()
    };
    let seen = Times::of_levels(&*generator.path, &[7], CPU).add_noise(&first, given.noise);
    let seen = Tensor::cat(&[&seen, &z_t.narrow(2, 1, 3)], 2);
    let mask = FrameMask::Prefix(1).tensor(4).unsqueeze(0).expand([1, 1, 4, 8, 8], false);
    let by_hand = |context: &Tensor| {
        let given = Inputs {
            mask: Some(mask.shallow_clone()),
            text: Some(context.shallow_clone()),
            level: Some(Tensor::from_slice(&[7i64])),
            ..Inputs::default()
        };
        generator.network.forward(&seen, &Tensor::from_slice(&[500i64]), &given)
    };
    let (with, without) = (by_hand(&told), by_hand(&negative));
    assert!(relative_error(&denoiser(None).predict(&z_t, 500.0).noise, &with) < 1e-6);
    let wanted = &without + (&with - &without) * 3.0;
    let apart = relative_error(&denoiser(Some((negative, 3.0))).predict(&z_t, 500.0).noise, &wanted);
    assert!(apart < 1e-5, "{apart:e}");
    assert!(relative_error(&with, &without) > 1e-4);

    // four steps hardly move the layers over frames: here they say more
    let path = checkpoint::list(&run).unwrap().pop().unwrap();
    let mut found = Checkpoint::read(&path).unwrap();
    for (name, tensor) in found.tensors.iter_mut() {
        if (name.starts_with("model.") || name.starts_with("ema.")) && is_temporal(name) {
            *tensor = &*tensor + noise(8, &tensor.size()) * 0.3;
        }
    }
    found.write(&path).unwrap();

    // on the command line: two pictures of another size, two prompts
    let picture = |name: &str, shade: f64| {
        let x = Tensor::arange(40, (Kind::Float, CPU)).reshape([1, 40, 1]) * 5.0;
        let y = Tensor::arange(24, (Kind::Float, CPU)).reshape([24, 1, 1]) * 2.0;
        let image = ((x + y + Tensor::from_slice(&[0f32, 10.0, 20.0])) * shade).clamp(0.0, 255.0).to_kind(Kind::Uint8);
        write_png(&at.join(name), &image).unwrap();
    };
    picture("dark.png", 0.3);
    picture("light.png", 0.9);
    let sample = |out: &str, more: &[&str]| {
        let common = ["sample", "runs/both", "--steps", "3", "--guidance", "2", "--device", "cpu", "--out", out];
        let said = run_in(at, &[&common, more].concat());
        assert_eq!(said.status, 0, "{}", said.err);
        read_safetensors(&at.join(out)).unwrap().0["clips"].to_kind(Kind::Float) // [N, 3, F, H, W]
    };
    let pictures = ["--first-frame", "dark.png", "--first-frame", "light.png"];
    let made = sample("two.safetensors", &[&["--prompt", "a red cat"], &pictures[..], &["--seeds", "4"]].concat());
    assert_eq!(made.size(), [2, 3, 4, 16, 16]);
    for (i, name) in ["dark.png", "light.png"].into_iter().enumerate() {
        let latent = generator.picture_latent(&read_picture(&at.join(name)).unwrap());
        let wanted = lvdm::data::to_u8(&tch::no_grad(|| generator.space.decode(&latent))).to_kind(Kind::Float);
        let first = made.narrow(0, i as i64, 1).narrow(2, 0, 1);
        assert!((first - wanted).abs().max().double_value(&[]) <= 1.0, "{name}");
    }
    let rest = |clips: &Tensor, i| clips.get(i).narrow(1, 1, 3);
    let differ = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) > 1.0;
    assert!(differ(&rest(&made, 0), &rest(&made, 1)), "the frames that follow do not see the picture");
    let other = sample("other.safetensors", &["--prompt", "a dog", "--first-frame", "dark.png", "--seeds", "4"]);
    assert!(differ(&rest(&made, 0), &rest(&other, 0)), "the frames that follow do not see the text");
    assert_eq!(sample("none.safetensors", &["--prompt", "a dog"]).size()[0], 1);

    let refused = |run: &str, more: &[&str], word: &str| {
        let arguments = [&["sample", run, "--prompt", "a", "--out", "x"], more].concat();
        let said = run_in(at, &arguments);
        assert!(said.error(2).contains(word), "{}", said.err);
    };
    refused("sd-run", &["--first-frame", "dark.png"], "not trained to be given a first frame");
    refused("runs/both", &["--first-frame", "no.png"], "no.png");
}

/// With a seed of its own, a video depends on that and on its prompt alone: not on its number, nor on what is made beside it.
#[test]
fn each_video_has_its_own_seed() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    fs::write(at.join("prompts.txt"), "a cat\na dog\n").unwrap();
    let sample = |out: &str, more: &[&str]| {
        let common = ["sample", "run", "--steps", "2", "--device", "cpu", "--out", out];
        succeed_in(at, &[&common, more].concat());
        read_safetensors(&at.join(out)).unwrap().0["clips"].to_kind(Kind::Float)
    };
    let alike = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) <= 1.0;
    let all = sample("all.safetensors", &["--prompts", "prompts.txt", "--seeds", "7,9,7,9"]);
    assert_eq!(all.size()[0], 4);
    let cat = sample("cat.safetensors", &["--prompt", "a cat", "--seed", "7"]);
    let dog = sample("dog.safetensors", &["--prompt", "a dog", "--seeds", "9"]);
    assert!(alike(&all.get(0), &cat.get(0)) && alike(&all.get(1), &dog.get(0)));
    assert!(alike(&all.get(2), &cat.get(0)) && !alike(&all.get(1), &cat.get(0)));
    let batches = sample("one.safetensors", &["--prompts", "prompts.txt", "--seeds", "9,9", "--batch", "1"]);
    assert!(alike(&batches.get(1), &dog.get(0)));
    let both = ["sample", "run", "--prompt", "a", "--seed", "1", "--seeds", "2", "--out", "x"];
    assert_eq!(run_in(at, &both).status, 2);
}

/// Latents and texts encoded once: rows are what the encoders make, and training uses them.
#[test]
fn latents_and_texts_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let clips = ["--videos", "videos", "--frames", "4", "--resolution", "16"];
    let encode = |more: &[&str]| run_in(at, &[&["encode", "sd-run"], &clips[..], more].concat());
    let latents = ["--device", "cpu", "--clips", "5", "--out", "latents.safetensors"];
    let said = encode(&[&["--table", "table.csv", "--text", "sd-run"], &latents[..]].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    // as many clips as videos, which are listed twice: what is left out is said once
    let all = encode(&["--table", "table.csv", "--text", "sd-run", "--device", "cpu", "--out", "all.safetensors"]);
    assert_eq!((all.status, all.err.matches("are not there").count()), (0, 1), "{}", all.err);
    let (tensors, _) = read_safetensors(&at.join("latents.safetensors")).unwrap();
    assert_eq!((tensors["moments"].size(), tensors["context"].size()), (vec![5, 8, 4, 8, 8], vec![5, 12, 24]));
    let texts = open_text_encoder(&at.join("sd-run"), CPU).unwrap();
    let known = texts.encode(&CAPTIONS).unwrap();
    for row in 0..5 {
        assert!((0..3).any(|caption| known.get(caption).equal(&tensors["context"].get(row))), "row {row}");
    }
    assert!(tensors["context_empty"].equal(&texts.encode(&[""]).unwrap()));
    let train = |name: &str| {
        let file = experiment(at, name, "{kind: captioned, root: gone}", "latents: latents.safetensors\n");
        let said = succeed_in(at, &["train", "diffusion", &file]);
        said.err.matches("latents.safetensors was made when lvdm read every video as BT.601").count()
    };
    assert_eq!(train("kept"), 0);
    // of videos that were read in a former way, which is told
    let (tensors, mut origin) = read_safetensors(&at.join("latents.safetensors")).unwrap();
    origin.as_mut().unwrap().as_object_mut().unwrap().remove("reading").unwrap();
    let tensors: Vec<_> = tensors.into_iter().collect();
    write_safetensors_atomically(&at.join("latents.safetensors"), &tensors, &origin.unwrap()).unwrap();
    assert_eq!(train("kept-before"), 1);

    // packed clips carry their captions: the same training without video files
    succeed_in(at, &[&["data", "pack", "--captions", "--out", "clips.safetensors"], &clips[..]].concat());
    let file = experiment(at, "packed", "{kind: packed, file: clips.safetensors}", "");
    succeed_in(at, &["train", "diffusion", &file]);

    // without captions, or by another text encoder
    assert!(encode(&[&["--text", "sd-run"], &latents[..]].concat()).error(2).contains("have no captions"));
    assert_eq!(encode(&latents).status, 0);
    let file = experiment(at, "kept-2", BESIDE, "latents: latents.safetensors\n");
    assert!(run_in(at, &["train", "diffusion", &file]).error(2).contains("--text RUN"));
    let path = at.join("sd-run/text_encoder.safetensors");
    let mut encoder = Checkpoint::read(&path).unwrap();
    assert_eq!(encode(&[&["--captions", "--text", "sd-run"], &latents[..]].concat()).status, 0);
    for tensor in encoder.tensors.values_mut() {
        *tensor = &*tensor * 1.1;
    }
    encoder.write(&path).unwrap();
    // a run keeps the encoder that it started with
    let file = experiment(at, "kept-3", BESIDE, "latents: latents.safetensors\n");
    assert!(run_in(at, &["train", "diffusion", &file]).error(2).contains("another text encoder"));
}

/// Importing and sampling hold the weights once: not the file's beside the network's, nor random ones before those of the
/// file, nor a second copy in another order. Half precision in the file does not change that, nor do averages and adapters
/// in a checkpoint.
#[test]
fn weights_are_held_once_by_import_and_sample() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers_of(&at.join("sd"), 5);
    let file = at.join("sd/unet/diffusion_pytorch_model.safetensors");
    let halves: Tensors =
        read_safetensors(&file).unwrap().0.into_iter().map(|(name, t)| (name, t.to_kind(Kind::Half))).collect();
    write_tensors(&file, &halves);
    drop(halves);
    let told = StableDiffusionOptions { frames: 4, resolution: 16, ..StableDiffusionOptions::default() };
    let run = at.join("run");
    let (imported, peak) = peak_host_memory(|| import_stable_diffusion(&at.join("sd"), &told, &run).unwrap());
    let weights = 4 * imported.iter().map(|network| network.part.parameters).sum::<i64>();
    assert!(weights > 60_000_000, "{weights} bytes are too few to tell");
    println!("import: {:.2} times the weights", peak as f64 / weights as f64);
    assert!(peak as f64 <= 1.3 * weights as f64, "import holds {peak} bytes for weights of {weights}");

    let (opened, peak) = peak_host_memory(|| LatentDiffusion::open(&run, CPU).unwrap());
    drop(opened);
    println!("opened: {:.2} times the weights", peak as f64 / weights as f64);
    assert!(peak as f64 <= 1.3 * weights as f64, "opening holds {peak} bytes for weights of {weights}");

    // a checkpoint of training: weights, averages and adapters
    let path = checkpoint::list(&run).unwrap().pop().unwrap();
    let mut found = Checkpoint::read(&path).unwrap();
    let rank = 4;
    let maps: Vec<(String, Vec<i64>)> = found
        .tensors
        .iter()
        .filter(|(name, _)| name.contains(".to_") && name.ends_with(".weight"))
        .map(|(name, tensor)| (name.trim_end_matches("weight").to_string(), tensor.size()))
        .collect();
    assert!(maps.len() > 20);
    for (place, size) in maps {
        for (name, shape) in [("adapter_down", [rank, size[1]]), ("adapter_up", [size[0], rank])] {
            found.tensors.insert(format!("{place}{name}"), noise(7, &shape) * 0.01);
        }
    }
    found.experiment["trained"] = serde_json::json!({"kind": "adapters", "rank": rank, "alpha": 4.0});
    let averages: Vec<_> =
        found.tensors.iter().map(|(name, tensor)| (name.replacen("model.", "ema.", 1), tensor * 1.0)).collect();
    found.tensors.extend(averages);
    found.write(&path).unwrap();
    drop(found);
    let (opened, peak) = peak_host_memory(|| LatentDiffusion::open(&run, CPU).unwrap());
    drop(opened);
    println!("averages and adapters: {:.2} times the weights", peak as f64 / weights as f64);
    assert!(peak as f64 <= 1.3 * weights as f64, "opening holds {peak} bytes for weights of {weights}");
}

/// A dropped caption is the empty prompt: with all dropped, what the captions say makes no difference; with none, it does.
#[test]
fn captions_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let train = |name: &str, more: &[&str]| {
        let file = experiment(at, name, TABLE, "");
        succeed_in(at, &[&["train", "diffusion", &file, "trainer.steps=2"], more].concat());
        model_of(&at.join("runs").join(name))
    };
    let same = |a: &Tensors, b: &Tensors| a.iter().all(|(name, tensor)| tensor.equal(&b[name]));
    let told = train("told", &["text.drop=0"]);
    let silent = train("silent", &["text.drop=1"]);
    let table = fs::read_to_string(at.join("table.csv")).unwrap();
    fs::write(at.join("table.csv"), table.replace("a red cat", "a dog").replace("\"a dog\"", "\"something else\""))
        .unwrap();
    assert!(!same(&train("told-2", &["text.drop=0"]), &told));
    assert!(same(&train("silent-2", &["text.drop=1"]), &silent));
    assert!(!same(&told, &silent));
}

/// The figures in `experiments/webvid/README.md`: the most that one pass forward and back holds beyond weights and
/// gradients, for clips of few frames of the paper's size, and so what a frame adds. Other kernels need a little more or
/// less beside what they compute.
#[test]
#[ignore = "needs 16 GB of memory and many minutes"]
fn memory_of_the_papers_setting() {
    let ports = Ports::of([4, 16, 1, 1]);
    // in GB with 2 and with 4 frames, as the table has them: without and with recomputation, each in float32 and bf16
    let told = [[[1.29, 2.58], [2.79, 3.76]], [[0.53, 0.60], [0.36, 0.42]]];
    for recompute in [false, true] {
        let parameters = Parameters::new(CPU, 0);
        let config = UNetConfig { recompute: Recompute::Everywhere(recompute), ..UNetConfig::stable_diffusion() };
        let unet = UNet3d::new(&parameters.root(), &config, &ports);
        for half in [false, true] {
            let peak = |frames: i64| {
                let (x, t) = (noise(1, &[1, 4, frames, 32, 32]), Tensor::from_slice(&[300i64]));
                let given = Inputs { text: Some(noise(2, &[1, 77, 768])), ..Inputs::default() };
                parameters.named().iter_mut().for_each(|(_, tensor)| tensor.zero_grad());
                let (_, bytes) = peak_host_memory(|| {
                    let _autocast = Autocast::bfloat16(CPU, half);
                    unet.forward(&x, &t, &given).square().mean(Kind::Float).backward();
                });
                bytes as f64 / 1e9
            };
            // the first pass makes the gradients, which stay
            let first = peak(1);
            let (two, four) = (peak(2), peak(4));
            println!(
                "recompute {recompute}, bf16 {half}: {two:.2} GB with 2 frames, {four:.2} GB with 4; first {first:.2} GB"
            );
            for (found, told) in [two, four].into_iter().zip(told[usize::from(recompute)][usize::from(half)]) {
                let apart = f64::abs(found - told);
                assert!(apart < 0.2 * told + 0.05, "recompute {recompute}, bf16 {half}: {found:.2} GB, not {told}");
            }
        }
    }
}

/// How many parameters each choice of what is trained moves, in the paper's setting.
#[test]
fn what_is_trained_is_counted() {
    let ports = Ports::of([4, 16, 1, 1]);
    let counts =
        [Trained::All, Trained::Temporal, Trained::Adapters(Adapter { rank: 16, alpha: 16.0 })].map(|trained| {
            let parameters = Parameters::unfilled(CPU);
            UNet3d::new(&parameters.root().with_adapters(trained.adapter()), &UNetConfig::stable_diffusion(), &ports);
            let moved = parameters
                .trainable()
                .into_iter()
                .filter(|(name, _)| trained.moves(name, &UNetConfig::stable_diffusion()));
            moved.map(|(_, tensor)| tensor.numel() as i64).sum::<i64>()
        });
    assert_eq!(counts, [958_924_964, 99_404_000, 6_383_616]);
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
