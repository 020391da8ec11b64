//! A cascade as video diffusion models have it: a base trained with single frames beside its clips, a denoiser that makes
//! its videos larger, and both as one model.

mod common;

use std::{fs, path::Path};

use common::{largest_difference, relative_error, same_checkpoint, succeed_in, write_packed};
use lvdm::{
    checkpoint,
    diffusion::resized,
    models::{self, Given, SampleId, VideoModel},
    networks::{AttentionKind, Inputs, LatteConfig, NetworkConfig, Ports, UNetConfig},
    nn::Parameters,
};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

const BASE: &str = "\
seed: 4
data: {dataset: {kind: packed, file: low.safetensors}, frames: 4, resolution: 8, workers: 1}
images: 2
autoencoder: pixels
schedule: {kind: cosine_log_snr, told: log_snr}
network: {channels: 8, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 2, norm_groups: 4}
objective: {predict: noise, loss: l2}
optimizer: {kind: adam, learning_rate: 1.0e-3}
trainer: {steps: 4, batch: 2, device: cpu, log_every: 1, checkpoint_every: 2, picture_every: 4, ema_decay: 0.9}
sampler: {kind: ancestral, steps: 3, corrector: 0.1, clip: 1.0}
";

/// The base's file, for clips of twice the size.
fn superresolution() -> String {
    let text = BASE.replace("low.safetensors", "clips.safetensors").replace("resolution: 8", "resolution: 16");
    text.replace("images: 2", "superresolution: {base: runs/base, resolution: 8, noise: 500, level: 50, overlap: 2}")
}

/// A folder with clips of both sizes and both files.
fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 4, 6, 16);
    write_packed(&at.join("low.safetensors"), 4, 6, 8);
    fs::write(at.join("base.yaml"), BASE).unwrap();
    fs::write(at.join("superresolution.yaml"), superresolution()).unwrap();
    folder
}

fn train(at: &Path, file: &str, run: &str, more: &[&str]) {
    succeed_in(at, &[&["train", "diffusion", file, "--run", run], more].concat());
}

fn last(at: &Path, run: &str) -> std::path::PathBuf {
    checkpoint::path(&at.join(run), 4)
}

/// Left after two steps and taken up again, both stages end as if they had never been left.
#[test]
fn both_trainings_go_on_to_the_bit() {
    let folder = workplace();
    let at = folder.path();
    for (file, run) in [("base.yaml", "runs/base"), ("superresolution.yaml", "runs/superresolution")] {
        train(at, file, run, &[]);
        let parts = format!("{run}-parts");
        train(at, file, &parts, &["trainer.steps=2"]);
        train(at, file, &parts, &[]);
        same_checkpoint(&last(at, run), &last(at, &parts));
    }
    // the copy stays that with which it began
    train(at, "base.yaml", "runs/base", &["trainer.steps=5"]);
    let more = ["train", "diffusion", "superresolution.yaml", "--run", "runs/superresolution", "trainer.steps=5"];
    let said = succeed_in(at, &more).err;
    assert!(said.contains("runs/base now stands at step 5") && said.contains("(step 4)"), "{said}");
    let carried = checkpoint::open_head(&at.join("runs/superresolution/base")).unwrap().1;
    assert_eq!(carried.progress.step, 4);
}

/// Two ranks see the single frames that one with the doubled batch sees.
#[test]
fn two_ranks_train_with_images_as_one() {
    let folder = workplace();
    let at = folder.path();
    train(at, "base.yaml", "runs/one", &[]);
    train(at, "base.yaml", "runs/two", &["--nproc", "2", "trainer.batch=1"]);
    let weights = |run: &str| checkpoint::Checkpoint::read(&last(at, run)).unwrap().part("model");
    let (one, two) = (weights("runs/one"), weights("runs/two"));
    for (name, weight) in &one {
        assert!(largest_difference(weight, &two[name]) < 1e-5, "{name}");
    }
}

/// The single frames count in the loss as frames do, and move the weights.
#[test]
fn images_change_the_training() {
    let folder = workplace();
    let at = folder.path();
    let loss = |run: &str, more: &[&str]| {
        train(at, "base.yaml", run, &[&["trainer.steps=1"], more].concat());
        let text = fs::read_to_string(at.join(run).join("metrics.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        line["loss"].as_f64().unwrap()
    };
    // at its first step the network answers zero, so that the loss is the mean square of the noise, about 1 in any case
    let (with, without) = (loss("runs/with", &[]), loss("runs/without", &["images=0"]));
    assert!((with - without).abs() > 1e-6 && (with - 1.0).abs() < 0.1, "{with} and {without}");
    let error = common::run_in(at, &["train", "diffusion", "base.yaml", "images=-1"]).err;
    assert!(error.contains("images must be at least 0"), "{error}");
}

/// For single frames layers over frames are the identity: their weights do not matter, and several pictures in one batch are
/// answered as each alone.
#[test]
fn layers_over_frames_are_the_identity_for_stills() {
    let unet = UNetConfig {
        channels: 8,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![1],
        heads: 2,
        norm_groups: 4,
        ..UNetConfig::default()
    };
    let text = UNetConfig { attention: AttentionKind::Text, context_width: 8, ..unet.clone() };
    let latte = LatteConfig { depth: 4, hidden_size: 16, heads: 2, patch_size: 2, recompute: false };
    let normal = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, CPU));
    let (z, t) = (normal(&[3, 2, 1, 4, 4]), Tensor::from_slice(&[3.0f64, 50.0, 700.0]));
    for (settings, temporal) in [
        (NetworkConfig::from(unet), &["qkv_t", "norm_t", "proj_out_t", "relative_position"][..]),
        (text.into(), &["_tmp", "norm4", "norm5"]),
        (latte.into(), &["blocks.1.", "blocks.3.", "temp_embed"]),
    ] {
        assert!(settings.takes().stills, "{settings:?}");
        let width = settings.takes().text;
        let parameters = Parameters::new(CPU, 5);
        let ports = Ports { text: width, ..Ports::of([2, 4, 4, 4]) };
        let network = settings.build(&parameters.root(), &ports).unwrap();
        parameters.freeze();
        let shake = |chosen: &dyn Fn(&str) -> bool| {
            let named = parameters.named().into_iter().filter(|(name, _)| chosen(name));
            named.map(|(_, mut tensor)| tensor += normal(&tensor.size()) * 0.1).count()
        };
        let of_frames = |name: &str| temporal.iter().any(|part| name.contains(part));
        shake(&|_| true);
        let text = width.map(|width| Tensor::ones([1, 5, width], (Kind::Float, CPU)));
        let answer = |z: &Tensor, t: &Tensor, stills| {
            let text = text.as_ref().map(|text| text.expand([z.size()[0], -1, -1], false));
            network.forward(z, t, &Inputs { stills, text, ..Inputs::default() })
        };
        let before = answer(&z, &t, true);
        for i in 0..3 {
            let alone = answer(&z.narrow(0, i, 1), &t.narrow(0, i, 1), true);
            assert!(relative_error(&alone, &before.narrow(0, i, 1)) < 1e-5, "{settings:?}");
        }
        let is_unet = !matches!(settings, NetworkConfig::Latte(_));
        let as_clips = is_unet.then(|| answer(&z, &t, false));
        assert!(shake(&of_frames) > 2, "{settings:?}: no parameter over frames");
        assert!(answer(&z, &t, true).equal(&before), "{settings:?}");
        if let Some(as_clips) = as_clips {
            assert!(relative_error(&answer(&z, &t, false), &as_clips) > 1e-4, "{settings:?}: clips of one frame");
        }
        assert!(shake(&|name| !of_frames(name)) > 2 && !answer(&z, &t, true).equal(&before), "{settings:?}");
    }
}

fn videos(model: &dyn VideoModel, samples: &[u64]) -> Tensor {
    let samples: Vec<SampleId> = samples.iter().map(|&sample| SampleId { seed: 9, sample }).collect();
    model.videos(&samples, &Given::default(), &mut |_, _| {}).unwrap()
}

/// The run of the second stage carries the first, makes videos of the larger size, longer ones in windows, and each by its
/// number alone; sampling and evaluating know nothing of its parts.
#[test]
fn a_cascade_samples_as_one_model() {
    let folder = workplace();
    let at = folder.path();
    train(at, "base.yaml", "runs/base", &[]);
    train(at, "superresolution.yaml", "runs/superresolution", &[]);
    // what it needs it has
    fs::rename(at.join("runs/base"), at.join("runs/gone")).unwrap();
    let run = at.join("runs/superresolution");
    let mut cascade = models::open(&run, CPU).unwrap();
    let base = models::open(&at.join("runs/gone"), CPU).unwrap();
    assert_eq!((cascade.clip(), base.clip()), ([3, 4, 16, 16], [3, 4, 8, 8]));
    assert!(cascade.describe().contains("8x8 by ancestral 3 steps") && cascade.describe().contains("noise level 50"));
    let all = videos(&*cascade, &[0, 1, 2]);
    assert_eq!(all.size(), [3, 3, 4, 16, 16]);
    assert!(largest_difference(&videos(&*cascade, &[1]), &all.narrow(0, 1, 1)) <= 1.0);
    assert!(all.to_kind(Kind::Float).std(true).double_value(&[]) > 1.0);
    assert!(largest_difference(&all.get(0), &all.get(1)) > 10.0);

    let mut steps = Vec::new();
    let sample = [SampleId { seed: 9, sample: 0 }];
    let _ = cascade.videos(&sample, &Given::default(), &mut |i, n| steps.push((i, n))).unwrap();
    assert_eq!(steps, (1..=10).map(|i| (i, 10)).collect::<Vec<_>>());
    // windows at 0, 2 and 4, whose middles are cross-faded
    cascade.resize(Some(8), None, None).unwrap();
    steps.clear();
    let long = cascade.videos(&sample, &Given::default(), &mut |i, n| steps.push((i, n))).unwrap();
    assert_eq!((long.size(), steps.len(), steps.last()), (vec![1, 3, 8, 16, 16], 20, Some(&(20, 20))));
    assert!(cascade.resize(None, Some(32), None).unwrap_err().to_string().contains("16x16 alone"));

    let evaluation = "seed: 5\nevaluation: {clips: 2, metrics: [frame_distance]}\nreal: {dataset: {kind: packed, file: \
                      clips.safetensors}, frames: 4, resolution: 16}\ngenerated: {kind: run, run: \
                      runs/superresolution, sampler: {steps: 2}, batch: 2}\nout: out\n";
    fs::write(at.join("evaluate.yaml"), evaluation).unwrap();
    let out = ["sample", "runs/superresolution", "--videos", "2", "--steps", "2", "--out", "made.safetensors"];
    succeed_in(at, &out);
    let made = &lvdm::safetensors::read_safetensors(&at.join("made.safetensors")).unwrap().0["clips"];
    assert_eq!(made.size(), [2, 3, 4, 16, 16]);
    succeed_in(at, &["evaluate", "evaluate.yaml", "--device", "cpu"]);

    // a base of another size is refused before anything is trained
    let other = ["superresolution.base=runs/gone", "superresolution.resolution=4", "--run", "x"];
    let error = common::run_in(at, &[&["train", "diffusion", "superresolution.yaml"], &other[..]].concat());
    assert!(error.err.contains("makes videos of 8x8, and resolution is 4"), "{}", error.err);
}

/// Guidance leads what is made to what was given, made small again.
#[test]
fn reconstruction_guidance_keeps_to_the_low_resolution() {
    let folder = workplace();
    let at = folder.path();
    train(at, "base.yaml", "runs/base", &["trainer.steps=1"]);
    let more = ["trainer.steps=60", "trainer.batch=4", "trainer.picture_every=1000", "sampler.steps=12"];
    train(at, "superresolution.yaml", "runs/large", &[&more[..], &["sampler.corrector=0.0"]].concat());
    let run = at.join("runs/large");
    let guided = |weight: f64| {
        let (path, mut found) = checkpoint::open_averaged(&run).unwrap();
        found.experiment["superresolution"]["reconstruction"] = weight.into();
        found.write(&path).unwrap();
        let (cascade, base) = (models::open(&run, CPU).unwrap(), models::open(&run.join("base"), CPU).unwrap());
        let pixels = |model: &dyn VideoModel| videos(model, &[0, 1, 2, 3]).to_kind(Kind::Float);
        let missed = resized(&pixels(&*cascade), [8, 8]) - pixels(&*base);
        missed.square().mean(Kind::Double).double_value(&[])
    };
    let (plain, led) = (guided(0.0), guided(4.0));
    println!("mean squared distance from the given video: {plain:.1} without guidance, {led:.1} with it");
    assert!(led < 0.8 * plain, "{led} and {plain}");
}

/// A cascade costs what both of its stages cost.
#[test]
fn a_cascade_costs_both_stages() {
    let folder = workplace();
    let at = folder.path();
    train(at, "base.yaml", "runs/base", &["trainer.steps=2"]);
    train(at, "superresolution.yaml", "runs/superresolution", &["trainer.steps=1"]);
    let report = ["report", "efficiency", "runs/base", "runs/superresolution"];
    let said = succeed_in(at, &[&report[..], &["--json", "--videos", "1"]].concat()).out;
    let rows: Vec<serde_json::Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [base, cascade] = &rows[..] else { panic!("{said}") };
    let count = |run: &str| {
        let (_, found) = checkpoint::open_averaged(&at.join(run)).unwrap();
        found.part("ema").values().map(|weight| weight.numel() as i64).sum::<i64>()
    };
    let (first, both) = (count("runs/base"), count("runs/base") + count("runs/superresolution"));
    assert_eq!((base["parameters"].as_i64(), cascade["parameters"].as_i64()), (Some(first), Some(both)));
    assert!(cascade["training_seconds"].as_f64() > base["training_seconds"].as_f64());
    assert!(cascade["seconds_per_video"].as_f64().unwrap() > 0.0 && cascade["step_memory"].as_i64().unwrap() > 0);
    let said = succeed_in(at, &[&report[..], &["--videos", "0"]].concat()).out;
    assert!(said.contains("runs/superresolution is a cascade") && !said.contains("runs/base is a cascade"), "{said}");

    // another seed is another training of the same; a first stage of other settings is not
    let another = ["seed=5", "trainer.steps=1"];
    train(at, "superresolution.yaml", "runs/seed", &another);
    train(at, "base.yaml", "runs/alone", &["images=0", "trainer.steps=1"]);
    train(at, "superresolution.yaml", "runs/stage", &[&another[..], &["superresolution.base=runs/alone"]].concat());
    let evaluation = "evaluation: {clips: 2, metrics: [frame_distance]}\nreal: {dataset: {kind: packed, file: \
                      clips.safetensors}, frames: 4, resolution: 16}\ngenerated: {kind: run, run: x, sampler: {steps: \
                      2}}\nout: x\n";
    fs::write(at.join("evaluate.yaml"), evaluation).unwrap();
    let runs = ["runs/superresolution", "runs/seed", "runs/stage"];
    for run in runs {
        let [run, out] = [format!("generated.run={run}"), format!("out={run}/evaluation")];
        succeed_in(at, &["evaluate", "evaluate.yaml", "--device", "cpu", &run, &out]);
    }
    let said = succeed_in(at, &[&["report", "efficiency", "--videos", "0"], &runs[..]].concat()).out;
    let lines: Vec<&str> = said.lines().filter(|line| line.contains(" trainings: ")).collect();
    assert!(
        lines.len() == 1 && lines[0].ends_with(": runs/superresolution/evaluation, runs/seed/evaluation"),
        "{said}"
    );
}

/// A plan counts single frames as frames of the clip, and the enlarged video as channels.
#[test]
fn a_plan_counts_images_and_the_given_video() {
    let folder = workplace();
    let at = folder.path();
    let plan = |file: &str, more: &[&str]| {
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        lvdm::plan::of(&at.join(file), &more, &Default::default()).unwrap()
    };
    let (with, without) = (plan("base.yaml", &[]), plan("base.yaml", &["images=0"]));
    let grown = with.step as f64 / without.step as f64;
    // 6 frames in place of 4; attention over frames and the embedding of time do not grow so
    assert!((1.45..1.55).contains(&grown) && with.forward == without.forward, "{grown}");
    let kept = |plan: &lvdm::plan::Plan| plan.activations[0].kept;
    assert_ne!(kept(&with), kept(&without));
    let large = plan("superresolution.yaml", &[]);
    let ports = Ports { concat: 3, concat_time: true, ..Ports::of([3, 4, 16, 16]) };
    let unet = UNetConfig {
        channels: 8,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![2],
        heads: 2,
        norm_groups: 4,
        ..UNetConfig::default()
    };
    let parameters = Parameters::unfilled(CPU);
    let _network = NetworkConfig::from(unet).build(&parameters.root(), &ports).unwrap();
    assert_eq!(large.parameters, parameters.count());
}

/// What does not fit together is said before anything is read.
#[test]
fn settings_that_do_not_fit_are_refused() {
    let folder = workplace();
    let at = folder.path();
    fs::create_dir_all(at.join("runs/base")).unwrap();
    for (file, change, words) in [
        ("superresolution.yaml", "superresolution.resolution=16", "less than that of the clips"),
        ("superresolution.yaml", "superresolution.level=500", "trained below 500"),
        ("superresolution.yaml", "superresolution.noise=1001", "1 … 1000"),
        ("superresolution.yaml", "superresolution.overlap=4", "4 frames of clips of 4"),
        ("superresolution.yaml", "superresolution.reconstruction=-1.0", "at least 0"),
        ("superresolution.yaml", "superresolution.base=runs/none", "there is no runs/none"),
        ("superresolution.yaml", "autoencoder=runs/base", "autoencoder: pixels"),
        ("superresolution.yaml", "images=2", "there are no `images`"),
        ("superresolution.yaml", "network={kind: latte}", "not told the noise"),
        ("base.yaml", "latents=clips.safetensors", "latents"),
    ] {
        let said = common::run_in(at, &["train", "diffusion", file, change]);
        assert!(said.status == 2 && said.err.contains(words), "{change}: {}", said.err);
    }
}
