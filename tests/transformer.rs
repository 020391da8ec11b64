//! Transformers over codes: trained, gone on with, and sampled in the codes of a codec that this crate does not know.

mod common;

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, ensure};
use common::{largest_difference, moving_clips, noise, run_in, same_checkpoint, succeed_in, write_packed};
use lvdm::{
    checkpoint::{self, Checkpoint},
    codecs::{CodecSettings, Encoded, EncodedKind, LatentSpace, LongDecoding, Normalization, VideoCodec},
    data::normalise,
    diffusion::SamplerChoice,
    distributed::Ranks,
    experiment::{ClassList, DiffusionExperiment, Numerics, SequenceLabels, TransformerExperiment, parse},
    models::{Asked, Assignment, Classes, ClipId, CodeTransformer, Given, SampleId, Seeds, VideoModel},
    nn::{Parameters, Scope},
    safetensors::read_safetensors,
    train::{DiffusionTask, LatentFile, Task, Trainer, TransformerTask, pack_latents, resume_point},
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
/// Frames and pixels of a side that have one code.
const FRAMES: i64 = 2;
const SIDE: i64 = 4;
const LEVELS: i64 = 6;

/// A codec whose codes are the grey levels of cubes.
#[derive(Debug, Clone, Copy)]
struct Levels;

impl CodecSettings for Levels {
    fn name(&self) -> &'static str {
        "codec of grey levels"
    }

    fn latent_channels(&self) -> i64 {
        1
    }

    fn codebook(&self) -> Option<i64> {
        Some(LEVELS)
    }

    fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        let whole = frames % FRAMES == 0 && height % SIDE == 0 && width % SIDE == 0;
        ensure!(whole, "a clip of {frames} frames of {width}x{height} does not divide into cubes");
        Ok([1, frames / FRAMES, height / SIDE, width / SIDE])
    }

    fn clip_shape(&self, [f, h, w]: [i64; 3]) -> [i64; 3] {
        [f * FRAMES, h * SIDE, w * SIDE]
    }

    fn long_decoding(&self) -> LongDecoding {
        LongDecoding::FrameByFrame { at_once: 3 }
    }

    fn encodes_to(&self) -> EncodedKind {
        EncodedKind::Exact
    }

    /// It computes nothing that is counted.
    fn flops(&self, _: i64, _: i64, _: i64) -> [i64; 2] {
        [0; 2]
    }

    fn build(&self, _: &Scope) -> Box<dyn VideoCodec> {
        Box::new(*self)
    }
}

impl VideoCodec for Levels {
    fn encode(&self, x: &Tensor) -> Encoded {
        let cube = [FRAMES, SIDE, SIDE];
        let grey = x.mean_dim([1].as_slice(), true, None).avg_pool3d(cube, cube, [0; 3], false, true, None::<i64>);
        let indices = ((grey.clamp(-1.0, 1.0) + 1.0) / 2.0 * (LEVELS - 1) as f64).round().to_kind(Kind::Int64);
        let indices = indices.squeeze_dim(1); // [B, F', h, w]
        let z = self.vectors(&indices).unwrap();
        let commitment = (&grey - &z).square().flatten(1, -1).mean_dim([-1].as_slice(), false, None);
        Encoded::Codes { indices, z, commitment }
    }

    fn vectors(&self, codes: &Tensor) -> Result<Tensor> {
        Ok(codes.to_kind(Kind::Float).unsqueeze(1) * (2.0 / (LEVELS - 1) as f64) - 1.0)
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        let z = z.expand([-1, 3, -1, -1, -1], false).repeat_interleave_self_int(FRAMES, 2, None);
        z.repeat_interleave_self_int(SIDE, 3, None).repeat_interleave_self_int(SIDE, 4, None)
    }

    fn settings(&self) -> &dyn CodecSettings {
        self
    }
}

fn space() -> LatentSpace {
    let normalization = Normalization { scale: 1.5, shift: 0.25 };
    LatentSpace::new(&Levels, BTreeMap::new(), normalization, 3, CPU).unwrap()
}

/// Clips of five latent frames of 2x2.
fn experiment(at: &Path, more: &[&str]) -> TransformerExperiment {
    let text = format!(
        "
data: {{dataset: {{kind: packed, file: {}}}, frames: 10, resolution: 8}}
autoencoder: none
network: {{layers: 2, heads: 2, width: 16}}
optimizer: {{kind: adamw, learning_rate: 3.0e-3, betas: [0.9, 0.95], weight_decay: 0.01}}
trainer: {{steps: 6, batch: 4, log_every: 1, checkpoint_every: 2, picture_every: 3}}
",
        at.display()
    );
    parse("here", &text, &more.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
}

fn clips(at: &Path, count: i64, frames: i64) -> std::path::PathBuf {
    let file = at.join("clips.safetensors");
    write_packed(&file, count, frames, 8);
    file
}

fn train(experiment: &TransformerExperiment, run: &Path) -> Trainer<TransformerTask> {
    let ranks = Ranks::alone();
    let resume = resume_point(run, "transformer", &ranks).unwrap();
    let position = resume.as_ref().map_or(0, |found| found.progress.position);
    let task = TransformerTask::new(experiment, space(), CPU, position, &ranks).unwrap();
    Trainer::new(task, run, &experiment.trainer, &experiment.optimizer, experiment, &ranks, resume).unwrap()
}

/// A transformer with random weights that are large enough to matter.
fn awake(experiment: &TransformerExperiment) -> CodeTransformer {
    let parameters = Parameters::new(CPU, 3);
    let model = CodeTransformer::new(experiment, space(), &parameters).unwrap();
    parameters.freeze();
    for (i, (_, mut tensor)) in parameters.named().into_iter().enumerate() {
        tensor += noise(i as u64, &tensor.size()) * 0.5;
    }
    model
}

fn with_classes(mut experiment: TransformerExperiment) -> TransformerExperiment {
    let names = ["down", "up"].map(String::from).to_vec();
    experiment.labels = Some(SequenceLabels { classes: Some(ClassList::Names(names)) });
    experiment
}

fn ids(samples: &[u64]) -> Vec<SampleId> {
    samples.iter().map(|&sample| SampleId { seed: 5, sample }).collect()
}

fn clip_ids(samples: &[u64], clip: u64) -> Vec<ClipId> {
    samples.iter().map(|&sample| ClipId { seed: 5, sample, clip }).collect()
}

/// Both kinds learn: the loss falls well below that of codes that are all equally likely. A training that was left goes on to
/// the bit, and there are pictures of it.
#[test]
fn a_transformer_trains_and_goes_on_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let file = clips(folder.path(), 4, 10);
    for kind in ["interpolation=false", "interpolation=true"] {
        let at = |run: &str| folder.path().join(format!("{kind}-{run}"));
        let whole = train(&experiment(&file, &[kind]), &at("whole")).train().unwrap();
        assert_eq!((whole.step, whole.position, whole.skipped_steps), (6, 24, 0));
        train(&experiment(&file, &[kind, "trainer.steps=2"]), &at("parts")).train().unwrap();
        train(&experiment(&file, &[kind]), &at("parts")).train().unwrap();
        let last = |run: &str| checkpoint::path(&at(run), 6);
        same_checkpoint(&last("parts"), &last("whole"));
        let metrics = std::fs::read_to_string(at("whole").join("metrics.jsonl")).unwrap();
        let losses: Vec<f64> = metrics
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap())
            .collect();
        let uniform = (LEVELS as f64).ln();
        assert!((losses[0] - uniform).abs() < 0.1 && losses[5] < losses[0], "{kind}: {losses:?}, at first {uniform}");
        let long = train(&experiment(&file, &[kind, "trainer.steps=60", "trainer.checkpoint_every=60"]), &at("long"));
        long.train().unwrap();
        let last = std::fs::read_to_string(at("long").join("metrics.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
        assert!(last["loss"].as_f64().unwrap() < 0.6 * uniform, "{kind}: {last}");
        let mut task = train(&experiment(&file, &[kind]), &at("whole")).task;
        let _batch = task.next_batch().unwrap();
        let [picture] = &task.pictures().unwrap()[..] else { panic!("one kind of picture") };
        assert_eq!(picture.clips.size(), [4, 3, 10, 8, 8], "{kind}: {}", picture.name);
    }
}

/// What is stored is what `optimizer` says, and the embeddings, which do not decay, move as without a decay.
#[test]
fn the_decay_leaves_embeddings_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = clips(folder.path(), 4, 10);
    let trained = |decay: &str| {
        let run = folder.path().join(decay);
        let more = ["trainer.steps=1", &format!("optimizer.weight_decay={decay}")];
        train(&experiment(&file, &more), &run).train().unwrap();
        Checkpoint::read(&checkpoint::path(&run, 1)).unwrap().part("model")
    };
    let (without, with) = (trained("0"), trained("0.5"));
    for (name, tensor) in &without {
        let is_map =
            name.ends_with(".weight") && (name.contains("attn") || name.contains("mlp") || name == "head.weight");
        assert_eq!(!tensor.equal(&with[name]), is_map, "{name}");
    }
}

/// Encoded once, codes are as many integers, and a task draws from the file what it would encode. Diffusion takes them as the
/// vectors that they stand for.
#[test]
fn codes_are_encoded_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = clips(folder.path(), 3, 10);
    let (out, ranks) = (folder.path().join("codes.safetensors"), Ranks::alone());
    let plain = experiment(&file, &["latent_stride=2", "trainer.batch=3"]);
    let numerics = Numerics::default();
    pack_latents(&space(), None, &plain.data, 3, 0, numerics, &out, &ranks, &mut |_| {}).unwrap();
    let (tensors, _) = read_safetensors(&out).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), ["codes"]);
    assert_eq!((tensors["codes"].size(), tensors["codes"].kind()), (vec![3, 5, 2, 2], Kind::Int64));
    let stored = LatentFile::open(&out, &space(), None, 3, 0, 0, &ranks).unwrap();
    assert!(stored.holds_codes() && stored.shape() == [1, 5, 2, 2]);

    let batch = |experiment: &TransformerExperiment| {
        TransformerTask::new(experiment, space(), CPU, 0, &ranks).unwrap().next_batch().unwrap().data
    };
    let of_file = batch(&TransformerExperiment { latents: Some(out.clone()), ..plain.clone() });
    let of_clips = batch(&plain);
    assert_eq!(of_file.size(), [3, 3, 2, 2]);
    // the order of a file is its own
    let sorted = |codes: &Tensor| {
        let mut rows: Vec<Vec<i64>> =
            (0..3).map(|i| codes.get(i).flatten(0, -1).contiguous().try_into().unwrap()).collect();
        rows.sort();
        rows
    };
    assert_eq!(sorted(&of_file), sorted(&of_clips));
    assert_eq!(sorted(&of_file), sorted(&tensors["codes"].slice(1, None, None, 2)));

    let text = format!(
        "
data: {{dataset: {{kind: packed, file: {}}}, frames: 10, resolution: 8}}
latents: {}
autoencoder: none
unet: {{channels: 8, multipliers: [1], blocks_per_level: 1, attention_factors: [], heads: 2, norm_groups: 4}}
optimizer: {{kind: adamw, learning_rate: 1.0e-4}}
trainer: {{steps: 1, batch: 3}}
",
        file.display(),
        out.display()
    );
    let diffusion: DiffusionExperiment = parse("here", &text, &[]).unwrap();
    let mut task = DiffusionTask::new(&diffusion, space(), None, CPU, 0, true, &ranks).unwrap();
    let latents = task.next_batch().unwrap().data;
    let codes = LatentFile::open(&out, &space(), None, 3, 0, 0, &ranks).unwrap().next_batch().unwrap().data;
    assert!(latents.equal(&space().vectors(&codes).unwrap()));
}

/// Videos depend on their numbers and classes alone, not on what is made beside them; a longer one begins as a shorter one
/// does; likelier codes and another window make others.
#[test]
fn videos_depend_on_their_numbers_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = awake(&with_classes(experiment(&clips(folder.path(), 1, 10), &[])));
    assert_eq!(model.clip(), [3, 10, 8, 8]);
    let made = |model: &CodeTransformer, samples: &[u64], numbers: &[i64]| {
        let classes = Some(Classes { numbers, guidance: 1.0 });
        model.videos(&ids(samples), &Given { classes, ..Given::default() }, &mut |_, _| {}).unwrap()
    };
    let all = made(&model, &[0, 1, 2], &[0, 1, 0]);
    assert_eq!((all.size(), all.kind()), (vec![3, 3, 10, 8, 8], Kind::Uint8));
    assert!(made(&model, &[2, 1], &[0, 1]).equal(&all.index_select(0, &Tensor::from_slice(&[2i64, 1]))));
    assert!(!made(&model, &[0], &[1]).equal(&all.narrow(0, 0, 1)));
    // each class in turn, where none is asked for
    let in_turn = Assignment::new(&model, Asked::default()).unwrap();
    let dealt = in_turn.videos(&model, &[0, 1, 2], &Seeds::One(5), &mut |_, _| {}).unwrap();
    assert!(dealt.equal(&all));
    let mut steps = Vec::new();
    let codes = model.codes(&clip_ids(&[0], 0), 5, None, Some(&[0]), &mut |i, n| steps.push((i, n))).unwrap();
    assert_eq!((steps.len(), steps[0], steps[19]), (20, (1, 20), (20, 20)));
    assert!(model.decode(&codes).unwrap().equal(&all.narrow(0, 0, 1)));

    // what is given of a clip is gone on from
    let rest = model.codes(&clip_ids(&[0], 1), 5, Some(&codes.narrow(1, 0, 2)), Some(&[0]), &mut |_, _| {}).unwrap();
    assert!(rest.narrow(1, 0, 2).equal(&codes.narrow(1, 0, 2)) && !rest.equal(&codes));

    model.resize(Some(16), None, None).unwrap();
    let longer = made(&model, &[0, 1, 2], &[0, 1, 0]);
    assert!(longer.size()[2] == 16 && longer.narrow(2, 0, 10).equal(&all));
    model.resize(Some(10), None, None).unwrap();
    for (settings, changes) in [
        (json!({"top_k": 1000, "top_p": 0.92}), false),
        (json!({"top_k": 1, "top_p": null}), true),
        (json!({"window": 3}), true),
    ] {
        let settings: SamplerChoice = serde_json::from_value(settings).unwrap();
        model.set_sampling(&settings).unwrap();
        assert_eq!(!made(&model, &[0, 1, 2], &[0, 1, 0]).equal(&all), changes, "{settings:?}");
    }
    // the likeliest code each time, whatever the number
    let greedy: SamplerChoice = serde_json::from_value(json!({"top_k": 1, "window": 1})).unwrap();
    model.set_sampling(&greedy).unwrap();
    let twins = made(&model, &[3, 4], &[1, 1]);
    assert!(twins.get(0).equal(&twins.get(1)) && model.describe().contains("top-k 1,"), "{}", model.describe());
}

/// A gap keeps its ends, whatever the form, and different gaps of a video are filled by different numbers. What a model
/// cannot do is said.
#[test]
fn gaps_are_filled_between_their_ends() {
    let folder = tempfile::tempdir().unwrap();
    let file = clips(folder.path(), 3, 10);
    let mut filler = awake(&experiment(&file, &["interpolation=true"]));
    let codes = space().encode(&normalise(&moving_clips(3, 10, 8))).codes().unwrap().shallow_clone();
    let quiet: &mut dyn FnMut(usize, usize) = &mut |_, _| {};
    let ends = codes.index_select(1, &Tensor::from_slice(&[0i64, 4]));
    let filled = filler.filled(&clip_ids(&[0, 1, 2], 0), &ends, None, quiet).unwrap();
    assert_eq!(filled.size(), [3, 5, 2, 2]);
    assert!(filled.index_select(1, &Tensor::from_slice(&[0i64, 4])).equal(&ends));
    assert!(!filler.filled(&clip_ids(&[0, 1, 2], 1), &ends, None, quiet).unwrap().equal(&filled));
    assert!(
        filler.filled(&clip_ids(&[1], 0), &ends.narrow(0, 1, 1), None, quiet).unwrap().equal(&filled.narrow(0, 1, 1))
    );
    filler.set_sampling(&serde_json::from_value(json!({"form": "released"})).unwrap()).unwrap();
    let released = filler.filled(&clip_ids(&[0, 1, 2], 0), &ends, None, quiet).unwrap();
    assert!(!released.equal(&filled) && released.index_select(1, &Tensor::from_slice(&[0i64, 4])).equal(&ends));

    let error = filler.videos(&ids(&[0]), &Given::default(), &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("makes no videos alone"), "{error}");
    let mut model = awake(&experiment(&file, &[]));
    let error = model.filled(&clip_ids(&[0], 0), &ends.narrow(0, 0, 1), None, quiet).unwrap_err().to_string();
    assert!(error.contains("without `interpolation`"), "{error}");
    let error = |choice| {
        let choice: SamplerChoice = serde_json::from_value(choice).unwrap();
        format!("{:#}", awake(&experiment(&file, &[])).set_sampling(&choice).unwrap_err())
    };
    assert!(error(json!({"kind": "ddim"})).contains("`top_k`"));
    assert!(error(json!({"steps": 9})).contains("`steps` is no setting of a transformer over codes"));
    let error = model.set_sampling(&serde_json::from_value(json!({"window": 5})).unwrap()).unwrap_err().to_string();
    assert!(error.contains("window: 5 latent frames and the next are more than the 5 of training"), "{error}");
    assert!(model.resize(None, Some(16), None).unwrap_err().to_string().contains("8x8 alone"));
    let classes = Some(Classes { numbers: &[0], guidance: 1.0 });
    let error = model.check(&Given { classes, ..Given::default() }).unwrap_err().to_string();
    assert!(error.contains("knows no classes"), "{error}");
    let classes = Some(Classes { numbers: &[2], guidance: 1.0 });
    let known = awake(&with_classes(experiment(&file, &[])));
    let error = known.check(&Given { classes, ..Given::default() }).unwrap_err().to_string();
    assert!(error.contains("class 2") && error.contains("0 to 1"), "{error}");
    let classes = Some(Classes { numbers: &[1], guidance: 2.0 });
    assert!(known.check(&Given { classes, ..Given::default() }).unwrap_err().to_string().contains("no guidance"));
    let error = TransformerTask::new(&experiment(&file, &[]), LatentSpace::pixels(CPU), CPU, 0, &Ranks::alone());
    let error = error.err().unwrap().to_string();
    assert!(error.contains("pixels has no codebook"), "{error}");
}

/// Reconstructions and Gaussian latents are those of the codec.
#[test]
fn baselines_are_the_codecs() {
    let folder = tempfile::tempdir().unwrap();
    let model = awake(&experiment(&clips(folder.path(), 1, 10), &[]));
    let clip = moving_clips(2, 10, 8);
    let baselines = model.codec_baselines().unwrap();
    let reconstructed = baselines.reconstructed(&clip).unwrap().unwrap();
    let own = model.decode(space().encode(&normalise(&clip)).codes().unwrap()).unwrap();
    assert!(largest_difference(&reconstructed.to_kind(Kind::Float), &own.to_kind(Kind::Float)) <= 1.0);
    let gaussian = baselines.gaussian_videos(&[0, 1, 2], 4).unwrap();
    assert_eq!((gaussian.size(), gaussian.kind()), (vec![3, 3, 10, 8, 8], Kind::Uint8));
    assert!(gaussian.narrow(0, 1, 2).equal(&baselines.gaussian_videos(&[1, 2], 4).unwrap()));
}

/// A workplace with an autoencoder that has a codebook, and the runs of three transformers over its codes: of neighbouring
/// latent frames, of every second one, and of the one between.
fn whole_runs(at: &Path) {
    write_packed(&at.join("clips.safetensors"), 4, 20, 16);
    let data = "data: {dataset: {kind: packed, file: clips.safetensors}, frames: 8, resolution: 16, workers: 1}";
    let trainer = "trainer: {steps: 2, batch: 2, device: cpu, log_every: 1, checkpoint_every: 1, picture_every: 9}";
    let autoencoder = format!(
        "{data}
autoencoder: {{kind: vqgan, channels: 4, factors: [2, 8, 8], latent_channels: 4, codebook: {{codes: 24}}}}
loss: {{kind: tats, perceptual_weight: 0.0, adversarial_start: 9, discriminator: {{channels: 4, layers: 1}}}}
optimizer: {{kind: adam, learning_rate: 1.0e-4}}
{trainer}
"
    );
    let transformer = format!(
        "{data}
autoencoder: runs/autoencoder
network: {{layers: 2, heads: 2, width: 32}}
optimizer: {{kind: adamw, learning_rate: 1.0e-2, weight_decay: 0.01}}
{trainer}
"
    );
    std::fs::write(at.join("autoencoder.yaml"), autoencoder).unwrap();
    std::fs::write(at.join("transformer.yaml"), transformer).unwrap();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "--run", "runs/autoencoder"]);
    let train = |run: &str, more: &[&str]| {
        succeed_in(at, &[&["train", "transformer", "transformer.yaml", "--run", run], more].concat());
    };
    train("runs/plain", &["trainer.steps=4"]);
    train("runs/sparse", &["data.frames=16", "latent_stride=2"]);
    train("runs/between", &["data.frames=6", "interpolation=true"]);
    // a run that was left goes on to the bit, and two ranks train as one with twice the batch
    train("runs/parts", &[]);
    train("runs/parts", &["trainer.steps=4"]);
    let last = |run: &str| checkpoint::path(&at.join(run), 4);
    same_checkpoint(&last("runs/parts"), &last("runs/plain"));
    train("runs/two", &["trainer.steps=4", "--nproc", "2", "trainer.batch=1"]);
    let part = |run: &str| Checkpoint::read(&last(run)).unwrap().part("model");
    let (one, two) = (part("runs/plain"), part("runs/two"));
    for (name, tensor) in &one {
        assert!(largest_difference(tensor, &two[name]) < 1e-4, "{name}");
    }
}

/// Runs are trained, gone on with and shared among ranks as any other. With the likeliest code each time, a long video that is
/// made clip by clip is the one that is made at once; one that was left goes on, and a hierarchical one keeps its sparse frames.
#[test]
fn runs_make_long_videos() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    whole_runs(at);
    let bytes = |path: &str| std::fs::read(at.join(path)).unwrap();
    let greedy = ["--top-k", "1", "--device", "cpu", "--videos", "2"];
    let long = |run: &[&str], out: &str| -> Vec<String> {
        let arguments = [&["sample-long"], run, &greedy, &["--frames", "20", "--batch", "2", "--out", out]].concat();
        arguments.iter().map(ToString::to_string).collect()
    };
    let run = |arguments: &[String]| succeed_in(at, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    succeed_in(at, &[&["sample", "runs/plain", "--frames", "20", "--out", "whole"], &greedy[..]].concat());
    run(&long(&["runs/plain"], "clips"));
    assert_eq!(bytes("whole/00000.mp4"), bytes("clips/00000.mp4"));
    assert_eq!(bytes("whole/00001.mp4"), bytes("clips/00001.mp4"));
    succeed_in(at, &["sample", "runs/plain", "--videos", "3", "--batch", "2", "--device", "cpu", "--out", "one.npz"]);
    let two = [
        "sample",
        "runs/plain",
        "--videos",
        "3",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--nproc",
        "2",
        "--out",
        "two.npz",
    ];
    succeed_in(at, &two);
    assert_eq!(bytes("one.npz"), bytes("two.npz"));

    let both = ["runs/sparse", "--interpolation", "runs/between"];
    let plan = succeed_in(at, &[&["sample-long"], &both[..], &["--frames", "20", "--dry-run"]].concat());
    assert!(plan.out.contains("make 10 latent frames") && plan.out.contains("interpolation"), "{}", plan.out);
    run(&long(&both, "hierarchical"));
    run(&long(&both, "again"));
    assert_eq!(bytes("hierarchical/00001.mp4"), bytes("again/00001.mp4"));
    for (arguments, words) in [
        (&["runs/between"][..], "fills the gaps of a video that another run begins"),
        (&["runs/sparse", "--interpolation", "runs/plain"], "does not fill gaps"),
        (&["runs/sparse"], "an interpolation run must fill the gaps"),
        (&["runs/plain", "--interpolation", "runs/between", "--gap", "3"], "gaps of 2 latent frames"),
        (&["runs/plain", "--guidance", "2"], "has none"),
        (&["runs/plain", "--steps", "3"], "`steps` is no setting"),
    ] {
        let arguments = long(arguments, "none");
        let said = run_in(at, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(said.error(2).contains(words), "{arguments:?}: {}", said.err);
    }
    // codes that are encoded once train as well
    let clips = ["--videos", "clips.safetensors", "--frames", "8", "--resolution", "16", "--out", "codes.safetensors"];
    succeed_in(at, &[&["encode", "runs/autoencoder"], &clips[..]].concat());
    let train = ["train", "transformer", "transformer.yaml", "--run", "runs/cached", "latents=codes.safetensors"];
    assert!(succeed_in(at, &train).out.contains("trained to step 2"));
}
