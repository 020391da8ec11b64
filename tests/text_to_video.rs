//! From a Stable Diffusion to videos: import, training on captioned clips, sampling from prompts.

mod common;

use std::{collections::BTreeSet, fs, path::Path};

use common::{
    noise,
    pickle::write_checkpoint,
    relative_error, run_in, succeed_in,
    text_runs::{
        BESIDE, CAPTIONS, TABLE, Tensors, experiment, import, networks, write_diffusers, write_tensors, write_videos,
    },
};
use lvdm::{
    checkpoint::{self, Checkpoint},
    data::VideoReader,
    diffusion::{Denoiser, Guidance, Guided, Predict, SamplerConfig, UNetDenoiser, sample},
    exchange::NAMES_FILE,
    experiment::Trained,
    generate::{Generator, Given, open_text_encoder, weights},
    models::{Recompute, UNet3d, UNetCondition, UNetConfig, UNetPorts},
    nn::{Adapter, Parameters},
    random::{Purpose, normal},
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

fn text<'a>(prompts: &'a [String], guidance: f64) -> Given<'a> {
    Given::Text { prompts, negative: "a dog", guidance }
}

/// Sampled with guidance from an import, each frame is what the image network makes of that frame's noise alone.
fn frames_are_images(run: &Path) {
    let (generator, _) = Generator::open(run, CPU).unwrap();
    let prompts = ["a red cat".to_string(), "a dog".to_string()];
    let sampler = SamplerConfig::Ddim { steps: 4, eta: 0.0 };
    let z_0 = generator.latents(&[0, 1], Some(&text(&prompts, 7.5)), sampler, 3, &mut |_, _| {}).unwrap();
    assert_eq!(z_0.size(), [2, 4, 4, 8, 8]);
    let encoder = generator.text.as_ref().unwrap();
    let told = |prompts: &[&str]| UNetDenoiser {
        unet: &generator.unet,
        schedule: &generator.schedule,
        predict: Predict::Noise,
        mask: None,
        given: UNetCondition { level: None, context: Some(encoder.encode(prompts).unwrap()) },
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
                schedule: &generator.schedule,
            };
            let start = start.narrow(2, frame, 1);
            let none = |_| start.zeros_like();
            let alone = sample(&image, &*sampler.build(), &generator.schedule, &start, &none, &mut |_, _| {}).unwrap();
            let error = relative_error(&video.narrow(2, frame, 1), &generator.space.decode(&alone));
            assert!(error < 1e-4, "clip {clip}, frame {frame}: {error:e}");
        }
    }
    // both passes as one batch are the two passes
    let (a, b) = (told(&["a cat", "a dog"]), told(&["", "red"]));
    let z_t = normal(3, Purpose::SampleStart, 9, 0, &[2, 4, 4, 8, 8]);
    let (conditional, unconditional) = (a.predict(&z_t, 500).noise, b.predict(&z_t, 500).noise);
    let apart = &unconditional + (conditional - &unconditional) * 3.0;
    let form = Guidance::Interpolate;
    let guided = Guided { conditional: a, unconditional: b, weight: 3.0, form, schedule: &generator.schedule };
    assert!(relative_error(&guided.predict(&z_t, 500).noise, &apart) < 1e-5);
    // the prompt and the negative prompt do something
    let with = |given: &Given| generator.latents(&[0, 1], Some(given), sampler, 3, &mut |_, _| {}).unwrap();
    let other = Given::Text { prompts: &prompts, negative: "", guidance: 7.5 };
    assert!(relative_error(&with(&other), &z_0) > 1e-4);
    let swapped = [prompts[1].clone(), prompts[0].clone()];
    assert!(relative_error(&with(&text(&swapped, 1.0)), &with(&text(&prompts, 1.0))) > 1e-4);
    // beside another clip or alone
    let alone = generator.latents(&[1], Some(&text(&prompts[1..], 7.5)), sampler, 3, &mut |_, _| {}).unwrap();
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
    let (generator, experiment) = Generator::open(&at.join("run"), CPU).unwrap();
    assert_eq!((generator.space.moments.scale, generator.space.moments.shift), (0.3, 0.0));
    assert_eq!((experiment.schedule.steps, experiment.schedule.beta_start), (900, 0.001));
    assert!(experiment.unet.norm_per_frame);
    frames_are_images(&at.join("run"));

    // one original file: images' kernels under our names, amid what else lies there
    let mut original = Tensors::new();
    for (network, parameters, place) in networks() {
        for (name, tensor) in parameters.named() {
            if network.diffusers_name(&name).is_some() {
                let tensor = if tensor.dim() == 5 { tensor.squeeze_dim(2) } else { tensor };
                original.insert(format!("{place}{name}"), tensor.detach());
            }
        }
    }
    original.insert("cond_stage_model.transformer.text_model.embeddings.position_ids".into(), Tensor::from(1i64));
    original.insert("model_ema.decay".into(), Tensor::from(0.9999f32));
    original.insert("betas".into(), Tensor::from_slice(&generator.schedule.beta).to_kind(Kind::Float));
    original.insert("alphas_cumprod".into(), Tensor::zeros([900], (Kind::Float, CPU)));
    original.insert("scale_factor".into(), Tensor::from(0.3f32));
    write_tensors(&at.join("sd.safetensors"), &original);
    write_checkpoint(&at.join("sd.ckpt"), &original, &|_| {});
    let told = ["--tokenizer", "sd/tokenizer", "--heads", "2", "--norm-groups", "16", "--text-heads", "2"];
    for file in ["sd.safetensors", "sd.ckpt"] {
        let run = at.join(file).with_extension("").with_file_name(format!("run-{file}"));
        let said = import(at, file, run.to_str().unwrap(), &told);
        assert_eq!(said.status, 0, "{}", said.err);
        let found = model_of(&run);
        assert_eq!(found.keys().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>());
        assert!(found.iter().all(|(name, tensor)| tensor.equal(&model[name])));
        let (other, found) = Generator::open(&run, CPU).unwrap();
        assert_eq!((found.unet, found.schedule), (experiment.unet.clone(), experiment.schedule.clone()));
        assert!((other.space.moments.scale - 0.3).abs() < 1e-7);
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
    assert!(import(at, "sd.safetensors", "x", &told).error(1).contains("more.weight` is unknown"));
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
    let (_, found) = checkpoint::open(&run).unwrap();
    let merged = weights(&found).unwrap();
    assert_eq!(merged.keys().collect::<Vec<_>>(), start.keys().collect::<Vec<_>>());
    let changed: Vec<&String> =
        merged.iter().filter(|(name, t)| !t.equal(&start[*name])).map(|(name, _)| name).collect();
    assert!(!changed.is_empty() && changed.iter().all(|name| name.contains(".to_")), "{changed:?}");
    let (generator, experiment_) = Generator::open(&run, CPU).unwrap();
    let whole = Parameters::new(CPU, 0);
    let scope = whole.root().with_adapters(experiment_.trained.adapter());
    let with = UNet3d::new(&scope, &experiment_.unet, &lvdm::generate::ports(&experiment_, generator.latent));
    let mut last = found.part("model");
    last.extend(found.part("ema"));
    whole.load(&last).unwrap();
    let (x, t) = (noise(1, &[1, 4, 4, 8, 8]), Tensor::from_slice(&[300i64]));
    let context = generator.text.as_ref().unwrap().encode(&["a cat"]).unwrap();
    let given = UNetCondition { level: None, context: Some(context) };
    let (a, b) = (with.forward(&x, &t, &given), generator.unet.forward(&x, &t, &given));
    assert!(relative_error(&a, &b) < 1e-5);
    let plain = Generator::open(&at.join("sd-run"), CPU).unwrap().0;
    assert!(relative_error(&plain.unet.forward(&x, &t, &given), &b) > 1e-5);
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
    assert_eq!(fs::read_dir(at.join("out")).unwrap().count(), 4);
    fs::write(at.join("prompts.txt"), "a cat\n\n a dog \n").unwrap();
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
    refused("x", BESIDE, "conditioning: {prediction: 0.5}\n", "not both");
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
    let ports = UNetPorts { inputs: 4, outputs: 4, temporal_length: 16, classes: None };
    // in GB with 2 and with 4 frames, as the table has them: without and with recomputation, each in float32 and bf16
    let told = [[[1.29, 2.58], [2.79, 3.76]], [[0.53, 0.60], [0.36, 0.42]]];
    for recompute in [false, true] {
        let parameters = Parameters::new(CPU, 0);
        let config = UNetConfig { recompute: Recompute::Everywhere(recompute), ..UNetConfig::stable_diffusion() };
        let unet = UNet3d::new(&parameters.root(), &config, &ports);
        for half in [false, true] {
            let peak = |frames: i64| {
                let (x, t) = (noise(1, &[1, 4, frames, 32, 32]), Tensor::from_slice(&[300i64]));
                let given = UNetCondition { level: None, context: Some(noise(2, &[1, 77, 768])) };
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
    let ports = UNetPorts { inputs: 4, outputs: 4, temporal_length: 16, classes: None };
    let counts =
        [Trained::All, Trained::Temporal, Trained::Adapters(Adapter { rank: 16, alpha: 16.0 })].map(|trained| {
            let parameters = Parameters::shapes_only();
            UNet3d::new(&parameters.root().with_adapters(trained.adapter()), &UNetConfig::stable_diffusion(), &ports);
            let moved = parameters.trainable().into_iter().filter(|(name, _)| trained.moves(name));
            moved.map(|(_, tensor)| tensor.numel() as i64).sum::<i64>()
        });
    assert_eq!(counts, [958_924_964, 99_404_000, 6_383_616]);
}
