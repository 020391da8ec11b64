//! Training on captioned clips, decoded or encoded before.

use std::{collections::BTreeSet, fs};

use lvdm::{
    checkpoint::{self, Checkpoint},
    data::VideoReader,
    experiment::Trained,
    models::LatentDiffusion,
    networks::{Inputs, Network as _, Ports, UNet3d, UNetConfig},
    nn::{Adapter, Parameters},
    run::{open_text_encoder, weights},
    safetensors::{read_safetensors, write_safetensors_atomically},
    weights::stable_diffusion::is_temporal,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    CPU,
    common::{
        noise, relative_error, run_in, succeed_in,
        text_runs::{BESIDE, CAPTIONS, TABLE, Tensors, experiment, import, write_diffusers, write_videos},
    },
    model_of,
};

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

    // evaluated, a run is prompted with what the real videos show
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
    let with_captions = fvd(&[]);
    assert_eq!(with_captions, fvd(&[]));
    assert_ne!(with_captions, fvd(&["generated.guidance=1.0"]));
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
    // of videos that were read in a former way, of which a warning speaks
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
    let captioned = train("captioned", &["text.drop=0"]);
    let silent = train("silent", &["text.drop=1"]);
    let table = fs::read_to_string(at.join("table.csv")).unwrap();
    fs::write(at.join("table.csv"), table.replace("a red cat", "a dog").replace("\"a dog\"", "\"something else\""))
        .unwrap();
    assert!(!same(&train("captioned-2", &["text.drop=0"]), &captioned));
    assert!(same(&train("silent-2", &["text.drop=1"]), &silent));
    assert!(!same(&captioned, &silent));
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
