//! Latte and class labels, as a user has them: a released checkpoint becomes a run, and classes steer training and sampling.

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use common::{
    diffusers::{model_of, tensors},
    lvdm_in, moving_clips, run_in, same, source, succeed_in,
    text_runs::{Tensors, write_diffusers, write_tensors},
};
use lvdm::{
    checkpoint::{self, Checkpoint},
    data::write_video,
    safetensors::read_metadata,
    weights::read_state_dict,
};
use tch::Tensor;

/// A folder with a folder of two videos for each class.
fn write_classes(at: &Path, names: &[&str]) {
    let clips = moving_clips(2 * names.len() as i64, 12, 32);
    for (i, name) in names.iter().enumerate() {
        fs::create_dir_all(at.join("videos").join(name)).unwrap();
        for j in 0..2 {
            let path = at.join(format!("videos/{name}/{j}.mp4"));
            write_video(&path, &clips.get((2 * i + j) as i64), 8.0).unwrap();
        }
    }
}

fn checkpoint_of(run: &Path) -> Checkpoint {
    checkpoint::latest(run).unwrap().unwrap().1
}

fn clips(path: &Path) -> Tensor {
    tensors(path).remove("clips").unwrap()
}

/// The released layout: both networks come with their names and the average samples; training goes on from there, and what
/// is not a Latte is refused.
#[test]
fn a_released_checkpoint_becomes_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    let file = source("tests/parity/latte_checkpoint.pt");
    let import = |file: &Path, out: &str, more: &[&str]| {
        let given = ["import", "latte", file.to_str().unwrap(), "--vae", "sd", "--out", out];
        run_in(at, &[&given, more].concat())
    };
    // its width is none of the released ones
    assert!(import(&file, "run", &[]).error(2).contains("--heads"));
    assert!(!at.join("run").exists());
    let said = import(&file, "run", &["--heads", "2"]);
    assert_eq!(said.status, 0, "{}", said.err);
    let run = at.join("run");
    let found = checkpoint_of(&run);
    let under = |prefix: &str| -> Tensors {
        let own =
            |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.into(), tensor.shallow_clone()));
        found.tensors.iter().filter_map(own).collect()
    };
    let last = read_state_dict(&file).unwrap();
    same(&under("model."), &last);
    let average = under("ema.");
    assert_eq!(average.len() + 2, last.len(), "all but the fixed embeddings");
    assert!(average.iter().any(|(name, tensor)| !tensor.equal(&last[name])));
    let experiment = &found.experiment;
    assert_eq!(experiment["network"]["kind"], "latte");
    assert_eq!(experiment["labels"]["classes"], 10);
    assert_eq!(experiment["objective"]["loss"], "learned_variance");
    assert_eq!(experiment["data"]["resolution"], 16);

    // a bare state dict in wrappers is the same network; fixed embeddings of another kind are not
    let wrapped = |prefix: &str| -> Tensors {
        model_of(&run).into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect()
    };
    for (i, prefix) in ["", "module._orig_mod."].into_iter().enumerate() {
        let path = at.join("bare.safetensors");
        write_tensors(&path, &wrapped(prefix));
        let out = format!("bare-{i}");
        let said = import(&path, &out, &["--heads", "2"]);
        assert_eq!(said.status, 0, "{prefix}: {}", said.err);
        same(&model_of(&at.join(out)), &model_of(&run));
    }
    let path = at.join("foreign.safetensors");
    for (name, change, word) in [("pos_embed", 0.01, "not the sinusoidal"), ("temp_embed", f64::NAN, "temp_embed")] {
        let mut foreign: BTreeMap<String, Tensor> = wrapped("");
        let other = &foreign[name] + change;
        foreign.insert(name.into(), other);
        write_tensors(&path, &foreign);
        assert!(import(&path, "foreign", &["--heads", "2"]).error(1).contains(word));
    }
    let mut short = wrapped("");
    short.remove("blocks.1.mlp.fc2.bias");
    write_tensors(&path, &short);
    assert!(import(&path, "foreign", &["--heads", "2"]).error(1).contains("blocks.1.mlp.fc2.bias"));
    assert!(!at.join("foreign").exists());

    let sample = ["sample", "run", "--sampler", "respaced-ddpm", "--steps", "2", "--videos", "1", "--class"];
    succeed_in(at, &[&sample[..], &["3", "--out", "three.safetensors"]].concat());
    assert_eq!(clips(&at.join("three.safetensors")).size(), [1, 3, 2, 16, 16]);
    let error = run_in(at, &[&sample[..], &["10", "--out", "ten.safetensors"]].concat());
    assert!(error.error(2).contains("the 10 classes 0 to 9"));
    let longer = ["sample", "run", "--frames", "4", "--out", "long.safetensors"];
    assert!(run_in(at, &longer).error(2).contains("length and size of its training"));

    // the classes of the data get the numbers
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    write_classes(at, &names);
    let train =
        ["train", "diffusion", "run/experiment.yaml", "--run", "run", "data.dataset={kind: folder, root: videos}"];
    let once = ["trainer.steps=1", "trainer.batch=2", "trainer.device=cpu", "data.workers=1"];
    succeed_in(at, &[&train[..], &once].concat());
    let trained = checkpoint_of(&run);
    assert_eq!(trained.experiment["labels"]["classes"], serde_json::json!(names));
    assert_eq!((trained.progress.step, trained.progress.ema_updates), (1, 100_001));
}

const CLASSES: &str = "\
data: {dataset: {kind: folder, root: videos}, frames: 4, frame_stride: 2, resolution: 16, workers: 1}
autoencoder: pixels
labels: {drop: 0.2, guidance: 3.0}
schedule: {kind: linear, steps: 100, beta_start: 1.0e-3, beta_end: 0.2}
network: {kind: latte, depth: 2, hidden_size: 16, heads: 2, patch_size: 4}
objective: {predict: noise, loss: learned_variance}
optimizer: {kind: adamw, learning_rate: 3.0e-3}
trainer: {steps: 6, batch: 4, device: cpu, log_every: 1, ema_decay: 0.9}
sampler: {kind: respaced_ddpm, steps: 2}
";

/// Names become numbers, a run keeps them, and the same noise gives another video for another class.
#[test]
fn classes_steer_training_and_sampling() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["Swim", "Archery", "Run"]);
    fs::write(at.join("classes.yaml"), CLASSES).unwrap();
    succeed_in(at, &["train", "diffusion", "classes.yaml", "--run", "run"]);
    let experiment = checkpoint_of(&at.join("run")).experiment;
    assert_eq!(experiment["labels"]["classes"], serde_json::json!(["Archery", "Run", "Swim"]));
    let log = fs::read_to_string(at.join("run/metrics.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 6);
    assert!(!log.contains("\"loss\":null"), "{log}");

    let sample = |out: &str, more: &[&str]| {
        let given = ["sample", "run", "--sampler", "respaced-ddpm", "--steps", "3", "--seed", "5", "--out", out];
        succeed_in(at, &[&given, more].concat());
        clips(&at.join(out))
    };
    let one = |class: &str, out: &str| sample(out, &["--videos", "1", "--class", class]);
    let swim = one("Swim", "swim.safetensors");
    assert!(swim.equal(&one("2", "two.safetensors")));
    assert!(!swim.equal(&one("Run", "run.safetensors")));
    assert!(!swim.equal(&sample("plain.safetensors", &["--videos", "1", "--class", "Swim", "--guidance", "1"])));
    // without a class all in turn, as an evaluation has them
    let all = ["--class", "Archery", "--class", "Run", "--class", "Swim", "--videos", "4"];
    let in_turn = sample("turn.safetensors", &["--videos", "4"]);
    assert!(in_turn.equal(&sample("told.safetensors", &all)));
    let error = run_in(at, &["sample", "run", "--class", "swim", "--out", "x.safetensors"]);
    assert!(error.error(2).contains("Archery, Run, Swim"), "{}", error.err);

    // resumed and in one go are the same; a set without classes is refused
    succeed_in(at, &["train", "diffusion", "classes.yaml", "--run", "parts", "trainer.steps=3"]);
    succeed_in(at, &["train", "diffusion", "classes.yaml", "--run", "parts"]);
    common::same_checkpoint(&checkpoint::path(&at.join("parts"), 6), &checkpoint::path(&at.join("run"), 6));
    fs::copy(at.join("videos/Run/0.mp4"), at.join("videos/0.mp4")).unwrap();
    let error = run_in(at, &["train", "diffusion", "classes.yaml", "--run", "other"]);
    assert!(error.error(1).contains("not every video of videos has a class"), "{}", error.err);
}

/// Labels are drawn and dropped by the sample: two ranks learn what one does from as many clips.
#[test]
fn two_ranks_learn_classes_as_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["b", "a"]);
    fs::write(at.join("classes.yaml"), CLASSES).unwrap();
    let losses = |run: &str, more: &[&str]| -> Vec<f64> {
        succeed_in(at, &[&["train", "diffusion", "classes.yaml", "--run", run, "labels.drop=0.4"], more].concat());
        let log = fs::read_to_string(at.join(run).join("metrics.jsonl")).unwrap();
        let loss = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
        log.lines().map(loss).collect()
    };
    let (one, two) = (losses("one", &[]), losses("two", &["--nproc", "2", "trainer.batch=2"]));
    assert_eq!((one.len(), two.len()), (6, 6));
    for (one, two) in one.iter().zip(&two) {
        assert!((one / two - 1.0).abs() < 1e-4, "{one} {two}");
    }
    // rows that were learned, "no class" among them
    let table =
        |run: &str| checkpoint_of(&at.join(run)).part("model").remove("y_embedder.embedding_table.weight").unwrap();
    let (one, two) = (table("one"), table("two"));
    let start = losses("start", &["optimizer.learning_rate=1.0e-30", "trainer.steps=1"]);
    assert!(start[0].is_finite());
    let moved = (&one - table("start")).abs().amax([1].as_slice(), false);
    assert!(moved.min().double_value(&[]) > 1e-4, "{moved:?}");
    assert!((one - two).abs().max().double_value(&[]) < 1e-2 * moved.max().double_value(&[]));
}

/// From a run of other classes, another length and another size: classes keep their rows by name, new ones start as no
/// class, and positions are those of the new clips. Blocks over frames can be trained alone.
#[test]
fn a_training_starts_from_a_run_of_other_classes_and_clips() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["Swim", "Archery", "Run"]);
    fs::write(at.join("classes.yaml"), CLASSES).unwrap();
    succeed_in(
        at,
        &["train", "diffusion", "classes.yaml", "--run", "run", "trainer.steps=2", "trainer.ema_decay=null"],
    );
    fs::rename(at.join("videos/Archery"), at.join("videos/Walk")).unwrap();
    // a step that moves nothing
    let start = ["train", "diffusion", "classes.yaml", "start_from=run", "trainer.steps=1", "trainer.ema_decay=null"];
    let still = ["data.frames=6", "data.resolution=24", "optimizer.learning_rate=1.0e-30"];
    let said = succeed_in(at, &[&start[..], &still, &["--run", "other"]].concat());
    assert!(said.err.contains("of 3 classes 2 are the run's, by name, and 1 are new"), "{}", said.err);
    let part = |run: &str| checkpoint_of(&at.join(run)).part("model");
    let (before, now) = (part("run"), part("other"));
    let row = |tensors: &Tensors, row: i64| tensors["y_embedder.embedding_table.weight"].get(row);
    // Archery, Run, Swim → Run, Swim, Walk
    for (new, old) in [(0, 1), (1, 2), (2, 3), (3, 3)] {
        assert!(row(&now, new).equal(&row(&before, old)), "row {new}");
    }
    assert_eq!((now["pos_embed"].size(), now["temp_embed"].size()), (vec![1, 36, 16], vec![1, 6, 16]));
    // sinusoids over frames: a longer clip begins as a shorter one does
    assert!(now["temp_embed"].narrow(1, 0, 4).equal(&before["temp_embed"]));

    succeed_in(at, &[&start[..], &["trained={kind: temporal}", "--run", "temporal"]].concat());
    let now = part("temporal");
    for (name, tensor) in &before {
        let over_frames = name.starts_with("blocks.1.");
        assert!(now[name].equal(tensor) || over_frames || name.starts_with("y_embedder"), "{name}");
    }
    assert!(!now["blocks.1.attn.qkv.weight"].equal(&before["blocks.1.attn.qkv.weight"]));

    let refused = |more: &[&str], words: &str| {
        let said = run_in(at, &[&start[..], &["--run", "refused"], more].concat());
        assert!(said.status != 0 && said.err.contains(words), "{more:?}: {}", said.err);
    };
    fs::write(at.join("plain.yaml"), CLASSES.replace("labels: {drop: 0.2, guidance: 3.0}\n", "")).unwrap();
    let said = run_in(at, &["train", "diffusion", "plain.yaml", "start_from=run", "--run", "refused"]);
    let words = "start_from: run: it tells classes apart (Archery, Run, Swim): give this experiment labels too";
    assert!(said.error(1).contains(words), "{}", said.err);
    refused(&["trained={kind: adapters, rank: 2, alpha: 2.0}"], "belong to the attention of `network.attention: text`");
    refused(&["text={encoder: run}"], "text: this network attends to none");
    let noisy = "conditioning={prediction: 1.0, perturbation: 5}";
    refused(&["objective.loss=l2", noisy], "give them clean (perturbation: null)");
    let unet =
        "network={kind: unet3d, channels: 8, norm_groups: 4, multipliers: [1], attention_factors: [1], heads: 2}";
    let train = ["train", "diffusion", "classes.yaml", "--run", "unet", "trainer.steps=1", unet];
    succeed_in(at, &train);
    let said =
        run_in(at, &[&train[..3], &["--run", "none", unet, "start_from=unet", "trained={kind: temporal}"]].concat());
    assert!(said.error(1).contains("trained: this network names no parameters over frames"), "{}", said.err);

    // and none of it becomes a checkpoint of LVDM
    for (run, words) in [("run", "the network of run is a Latte"), ("unet", "unet was trained on pixels")] {
        let said = run_in(at, &["export", run, "--out", "export.safetensors"]);
        assert!(said.error(2).contains(words) && !at.join("export.safetensors").exists(), "{}", said.err);
    }
}

/// A network can be given a text and a class, of videos that have both; guidance has one weight then, the text's.
#[test]
fn a_text_and_a_class_are_given_together() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["b", "a"]);
    for (i, video) in ["a/0", "a/1", "b/0", "b/1"].iter().enumerate() {
        fs::write(at.join(format!("videos/{video}.txt")), ["a cat", "a red dog"][i % 2]).unwrap();
    }
    write_diffusers(&at.join("sd"));
    let size = ["--frames", "4", "--resolution", "16"];
    succeed_in(at, &[&["import", "stable-diffusion", "sd", "--out", "sd-run"][..], &size].concat());
    let keys = "data.dataset={kind: captioned, root: videos}";
    let train = ["train", "diffusion", "sd-run/experiment.yaml", "--run", "run", "start_from=sd-run", keys];
    let more =
        ["labels={drop: 0.5, guidance: 3.0}", "text.prompts=[a cat]", "trainer.steps=2", "trainer.picture_every=1"];
    let little =
        ["trainer.batch=2", "trainer.device=cpu", "trainer.ema_decay=null", "sampler.steps=2", "data.workers=1"];
    let said = succeed_in(at, &[&train[..], &more, &little].concat());
    assert!(!said.err.contains("picture"), "{}", said.err);
    let found = checkpoint_of(&at.join("run"));
    assert_eq!(found.experiment["labels"]["classes"], serde_json::json!(["a", "b"]));
    assert!(found.part("model")["class_emb.weight"].abs().max().double_value(&[]) > 0.0);

    let sample = |prompt: &str, class: &str| {
        let out = format!("{}.safetensors", [prompt, class].concat().replace(' ', ""));
        let given = ["sample", "run", "--steps", "2", "--videos", "1", "--seed", "5", "--out", &out];
        succeed_in(at, &[&given[..], &["--prompt", prompt, "--class", class]].concat());
        clips(&at.join(out))
    };
    let first = sample("a cat", "a");
    assert!(!first.equal(&sample("a red dog", "a")) && !first.equal(&sample("a cat", "b")));
}

/// Latents that were encoded once keep the classes of their clips; the U-Net takes them as Latte does.
#[test]
fn encoded_latents_keep_their_classes() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["b", "a"]);
    write_diffusers(&at.join("sd"));
    let import = ["import", "stable-diffusion", "sd", "--frames", "4", "--resolution", "16", "--out", "sd-run"];
    succeed_in(at, &import);
    let encode = ["encode", "sd-run", "--videos", "videos", "--frames", "4", "--resolution", "16", "--clips", "8"];
    succeed_in(at, &[&encode[..], &["--out", "latents.safetensors"]].concat());
    let path = at.join("latents.safetensors");
    let labels: Vec<i64> = tensors(&path).remove("label").unwrap().try_into().unwrap();
    assert_eq!(read_metadata(&path).unwrap().unwrap()["classes"], serde_json::json!(["a", "b"]));
    // 8 clips of 4 videos: each twice
    assert_eq!((labels.len(), labels.iter().sum::<i64>()), (8, 4));
    let unet = "network={kind: unet3d, channels: 8, norm_groups: 4, multipliers: [1, 2], blocks_per_level: 1, \
                attention_factors: [1], heads: 2}";
    fs::write(at.join("classes.yaml"), CLASSES.replace("pixels", "sd-run").replace("frame_stride: 2, ", "")).unwrap();
    for (run, network, loss) in
        [("latte", "network.patch_size=2", "objective.loss=learned_variance"), ("unet", unet, "objective.loss=l2")]
    {
        let train = ["train", "diffusion", "classes.yaml", "--run", run, "latents=latents.safetensors"];
        succeed_in(at, &[&train[..], &[network, loss, "trainer.steps=2"]].concat());
        let found = checkpoint_of(&at.join(run));
        assert_eq!(found.experiment["labels"]["classes"], serde_json::json!(["a", "b"]));
        let table = found
            .tensors
            .iter()
            .find(|(name, _)| name.contains("model.class_emb") || name.contains("model.y_embedder"));
        assert_eq!(table.unwrap().1.size()[0], 3);
    }
}

/// Samples that are measured are of each class in turn, by the run's guidance or the one that the evaluation says, and the
/// figure names it.
#[test]
fn an_evaluation_takes_each_class_in_turn() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["a", "b"]);
    fs::write(at.join("classes.yaml"), CLASSES.replace("frames: 4, frame_stride: 2", "frames: 10")).unwrap();
    succeed_in(at, &["train", "diffusion", "classes.yaml", "--run", "run"]);
    let evaluation = "evaluation: {clips: 3}\nreal: {dataset: {kind: folder, root: videos}, frames: 10, resolution: 16}\n\
                      generated: {kind: run, run: run, sampler: {kind: respaced_ddpm, steps: 2}}\nout: measured\n";
    fs::write(at.join("evaluate.yaml"), evaluation).unwrap();
    let measured = |more: &[&str], guidance: &str| {
        succeed_in(at, &[&["evaluate", "evaluate.yaml", "--device", "cpu"], more].concat());
        let text = fs::read_to_string(at.join("measured/figures.json")).unwrap();
        assert!(text.contains(&format!("each class in turn, guidance {guidance}")), "{text}");
        let figures: serde_json::Value = serde_json::from_str(&text).unwrap();
        figures["figures"]["samples"]["fvd"].as_f64().unwrap()
    };
    let own = measured(&[], "3");
    // without a sampler and guidance in the file they are the run's own
    assert_eq!(own, measured(&["generated={kind: run, run: run, guidance: 3.0}"], "3"));
    assert_ne!(own, measured(&["generated.guidance=1.0"], "1"));
    // what cannot be sampled, or measured, is refused before anything is
    for (set, word) in [
        ("generated.sampler.steps=5000", "generated.sampler: "),
        ("generated.sampler={kind: euler, steps: 0}", "generated.sampler: steps must be between"),
        ("evaluation.metrics=[]", "the list is empty"),
    ] {
        let said = run_in(at, &["evaluate", "evaluate.yaml", "--device", "cpu", set]);
        assert!(said.error(2).contains(word), "{set}: {}", said.err);
    }
}

/// `lvdm sample` takes the run's own sampler, or single settings of it, or another.
#[test]
fn a_run_is_sampled_by_its_own_sampler() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["a", "b"]);
    fs::write(at.join("classes.yaml"), CLASSES).unwrap();
    succeed_in(at, &["train", "diffusion", "classes.yaml", "--run", "run", "trainer.steps=1"]);
    let sample = |out: &'static str, more: &[&'static str]| {
        [&["sample", "run", "--videos", "1", "--device", "cpu", "--out", out], more].concat()
    };
    for (out, more, sampler) in [
        ("own", &[][..], r#"{"kind": "respaced_ddpm", "steps": 2}"#),
        ("steps", &["--steps", "3"], r#"{"kind": "respaced_ddpm", "steps": 3}"#),
        (
            "other",
            &["--sampler", "respaced-ddim", "--steps", "2"],
            r#"{"kind": "respaced_ddim", "steps": 2, "eta": 1.0}"#,
        ),
    ] {
        succeed_in(at, &sample(out, more));
        let text = fs::read_to_string(at.join(out).join("sampling.json")).unwrap();
        let said: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(said["sampler"], serde_json::from_str::<serde_json::Value>(sampler).unwrap(), "{out}");
    }
    for (more, word) in [
        (&["--eta", "0.5"][..], "`eta` is no setting of the run's sampler, respaced_ddpm, which has `steps`"),
        (&["--sampler", "ddpm", "--steps", "3"], "--sampler ddpm: "),
        (&["--sampler", "pndm"], "there is no sampler `pndm`, but ddpm, ddim"),
    ] {
        let said = run_in(at, &sample("none", more));
        assert!(said.error(2).contains(word), "{more:?}: {}", said.err);
    }
}

/// What does not fit together is said before anything is loaded.
#[test]
fn settings_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_classes(at, &["a"]);
    fs::write(at.join("classes.yaml"), CLASSES).unwrap();
    for (set, word) in [
        ("network.depth=3", "even number"),
        ("network.heads=3", "does not divide into 3 heads"),
        ("network.patch_size=5", "it must be a multiple of 5"),
        ("network.widht=5", "unknown field `widht`"),
        ("objective.predict=velocity", "learned_variance is for predict: noise"),
        ("conditioning={prediction: 1.0, perturbation: null}", "no frame is given"),
        ("labels.drop=1.5", "labels.drop is a probability"),
        ("labels.drop=0", "labels.guidance: with labels.drop 0"),
        ("labels.classes=[a, a]", "twice"),
        ("labels.classes=7", "labels.classes is 7, and videos has 1 classes"),
        ("labels.classes=[b]", "does not name `a`"),
    ] {
        let said = lvdm_in(at, &["train", "diffusion", "classes.yaml", "--run", "run", set]).output().unwrap();
        let err = String::from_utf8_lossy(&said.stderr);
        assert!(!said.status.success() && err.contains(word), "{set}: {err}");
    }
}
