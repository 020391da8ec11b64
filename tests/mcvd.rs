//! MCVD: one network that predicts, generates and interpolates blocks of frames, in pixels and in latents; videos block after
//! block; trainings that go on to the bit and do not depend on the number of ranks.

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use common::{
    largest_difference, noise, pickle::write_listed_checkpoint, relative_error, run_in, same, same_checkpoint,
    succeed_in, write_packed,
};
use lvdm::{
    checkpoint::{self, Checkpoint},
    data::{RgbFrame, VideoReader},
    diffusion::{GuidanceConfig, Objective, SamplerConfig, Strided},
    models::{self, ClipId, FramesOfClip, Given, LatentConditions, LatentDiffusion, SampleId},
    networks::{Inputs, McvdConfig, NetworkConfig, NetworkSettings, Ports},
    nn::Parameters,
    safetensors::read_safetensors,
};
use tch::{Device, Kind, Tensor, no_grad};

const CPU: Device = Device::Cpu;

/// Of clips of six frames two are given at the beginning and one at the end.
const EXPERIMENT: &str = "\
seed: 5
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 6, resolution: 16, workers: 1}
autoencoder: pixels
blocks: {past: 2, future: 1, mask_past: 0.5, mask_future: 0.5}
schedule: {kind: reversed_linear, steps: 20, beta_start: 0.01, beta_end: 0.3}
network: {kind: mcvd, channels: 16, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], head_width: 16, dropout: 0.2}
objective: {predict: noise, loss: l2, reduction: sum}
optimizer: {kind: adam, learning_rate: 1.0e-3, warmup: 2, warmup_from_zero: true}
trainer: {steps: 4, batch: 2, device: cpu, log_every: 1, checkpoint_every: 100, picture_every: 1000, ema_decay: 0.9, ema_warmup: false, clip_gradient: 1.0}
sampler: {kind: strided, steps: 3, clip: true}
";

fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_packed(&folder.path().join("clips.safetensors"), 4, 8, 16);
    fs::write(folder.path().join("mcvd.yaml"), EXPERIMENT).unwrap();
    folder
}

fn train(at: &Path, run: &str, more: &[&str]) {
    succeed_in(at, &[&["train", "diffusion", "mcvd.yaml", "--run", run], more].concat());
}

/// What the paper's authors trained on UCF-101, by the counts of their own code.
#[test]
fn the_released_networks_have_their_parameters() {
    let ports = Ports { past: 4, ..Ports::of([3, 4, 64, 64]) };
    let count = |config: &McvdConfig| {
        let parameters = Parameters::unfilled(CPU);
        config.build(&parameters.root(), &ports).unwrap();
        parameters.count()
    };
    let released = McvdConfig::default();
    assert_eq!(count(&released), 564_990_060);
    assert_eq!(count(&McvdConfig { spatin: Some(192), ..released.clone() }), 739_438_572);
    assert_eq!(count(&McvdConfig { channels: 192, head_width: 96, ..released }), 251_174_988);
}

/// The frames around a clip move the prediction, whichever way they enter; frames that are absent are zeros; what is dropped
/// follows the keys; and computing again in the backward pass changes neither loss nor gradients, dropout included.
#[test]
fn the_network_sees_the_frames_around_a_clip() {
    let ports = Ports { past: 2, future: 1, ..Ports::of([3, 2, 8, 8]) };
    for spatin in [None, Some(8)] {
        let config = |recompute: &str| -> McvdConfig {
            let settings = format!(
                "{{channels: 16, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [1], head_width: 16, \
                 dropout: 0.3, recompute: {recompute}}}"
            );
            McvdConfig { spatin, ..serde_yaml::from_str(&settings).unwrap() }
        };
        let built = |recompute: &str| {
            let parameters = Parameters::new(CPU, 3);
            let network = config(recompute).build(&parameters.root(), &ports).unwrap();
            no_grad(|| {
                // layers that start at zero answer nothing
                parameters.trainable().iter().for_each(|(name, tensor)| {
                    let i = name.len() as u64;
                    let _ = tensor.shallow_clone().g_add_(&(noise(i, &tensor.size()) * 0.05));
                });
            });
            (network, parameters)
        };
        let (z, around, t) =
            (noise(1, &[2, 3, 2, 8, 8]), noise(2, &[2, 3, 3, 8, 8]), Tensor::from_slice(&[3.0, 900.0]));
        let given = |around: Option<&Tensor>, key: Option<i64>| Inputs {
            around: around.map(Tensor::shallow_clone),
            dropout: key.map(|key| Tensor::from_slice(&[key, key + 1])),
            ..Inputs::default()
        };
        let (network, parameters) = built("false");
        let answer = |given: &Inputs| no_grad(|| network.forward(&z, &t, given));
        let plain = answer(&given(Some(&around), None));
        assert_eq!(plain.size(), z.size());
        for frame in 0..3 {
            let other = around.copy();
            let _ = other.narrow(2, frame, 1).fill_(0.5);
            let moved = largest_difference(&answer(&given(Some(&other), None)), &plain);
            assert!(moved > 1e-3, "spatin {spatin:?}: frame {frame} around the clip moves it by {moved}");
        }
        let zeros = around.zeros_like();
        assert_eq!(largest_difference(&answer(&given(None, None)), &answer(&given(Some(&zeros), None))), 0.0);
        let dropped = answer(&given(Some(&around), Some(7)));
        assert!(largest_difference(&dropped, &plain) > 1e-3);
        assert_eq!(largest_difference(&answer(&given(Some(&around), Some(7))), &dropped), 0.0);
        assert!(largest_difference(&answer(&given(Some(&around), Some(70))), &dropped) > 1e-3);

        let gradients = |network: &dyn lvdm::networks::Network, parameters: &Parameters| {
            let loss = network.forward(&z, &t, &given(Some(&around), Some(7))).square().sum(None);
            loss.backward();
            let flat = |(_, tensor): (String, Tensor)| tensor.grad().flatten(0, -1);
            Tensor::cat(&parameters.trainable().into_iter().map(flat).collect::<Vec<_>>(), 0)
        };
        let kept = gradients(&*network, &parameters);
        let (again, others) = built("true");
        // summed in another order
        let off = relative_error(&gradients(&*again, &others), &kept);
        assert!(off < 1e-6, "spatin {spatin:?}: gradients differ by {off:e}");
    }
}

/// Files that do not ask for a sum do not name it, and a learned variance has none. What the sum is, the case `mcvd_loss` says.
#[test]
fn a_sum_is_asked_for() {
    let mean: Objective = serde_yaml::from_str("{loss: l2}").unwrap();
    assert!(!serde_yaml::to_string(&mean).unwrap().contains("reduction"), "old files stay as they are");
    let learned: Objective = serde_yaml::from_str("{loss: learned_variance, reduction: sum}").unwrap();
    let path = lvdm::diffusion::NoisePathConfig::default().build().unwrap();
    assert!(learned.validate(&*path).unwrap_err().to_string().contains("learned_variance is a mean"));
}

/// Interrupted and gone on with, and on two ranks with half the batch each; activations are dropped in all of them.
#[test]
fn a_training_goes_on_to_the_bit_and_over_ranks() {
    let folder = workplace();
    let at = folder.path();
    let last = |run: &str| checkpoint::path(&at.join(run), 4);
    train(at, "whole", &[]);
    train(at, "parts", &["trainer.steps=2"]);
    train(at, "parts", &[]);
    same_checkpoint(&last("whole"), &last("parts"));
    train(at, "undropped", &["network.dropout=0.0"]);
    train(at, "two", &["trainer.batch=1", "--nproc", "2"]);
    let of = |run: &str| Checkpoint::read(&last(run)).unwrap().part("model");
    let distance = |run: &str| -> f64 {
        let (a, b) = (of("whole"), of(run));
        a.iter().map(|(name, tensor)| largest_difference(tensor, &b[name])).fold(0.0, f64::max)
    };
    let (two, undropped) = (distance("two"), distance("undropped"));
    println!("two ranks differ by {two:.1e}, without dropout by {undropped:.1e}");
    assert!(two < 2e-5 && undropped > 1e-3, "two ranks differ by {two:e}, without dropout by {undropped:e}");
    // the first step of the warm-up changes nothing, and the average follows without a warm-up of its own
    train(at, "first", &["trainer.steps=1"]);
    let first = Checkpoint::read(&checkpoint::path(&at.join("first"), 1)).unwrap();
    let (weights, average) = (first.part("model"), first.part("ema"));
    assert!(average.iter().all(|(name, tensor)| tensor.equal(&weights[name])));
    train(at, "second", &["trainer.steps=2"]);
    let second = Checkpoint::read(&checkpoint::path(&at.join("second"), 2)).unwrap();
    let (now, average) = (second.part("model"), second.part("ema"));
    for (name, tensor) in &average {
        let wanted = &weights[name] * 0.9 + &now[name] * 0.1;
        assert!(largest_difference(tensor, &wanted) < 1e-6, "{name}: the average at its second update");
    }
}

/// Of any length, block after block: a longer video begins as the shorter one, and no video depends on the others of its
/// batch.
#[test]
fn videos_are_made_block_after_block() {
    let folder = workplace();
    let at = folder.path();
    train(at, "run", &[]);
    let sample = |out: &str, more: &[&str]| {
        let sample = ["sample", "run", "--device", "cpu", "--out", out];
        succeed_in(at, &[&sample[..], more].concat());
        read_safetensors(&at.join(out)).unwrap().0.remove("clips").unwrap()
    };
    let usual = sample("usual.safetensors", &["--videos", "3"]);
    assert_eq!(usual.size(), [3, 3, 6, 16, 16]);
    let long = sample("long.safetensors", &["--videos", "3", "--batch", "2", "--frames", "11"]);
    assert_eq!(long.size(), [3, 3, 11, 16, 16]);
    let most = largest_difference(&long.narrow(2, 0, 6), &usual);
    assert!(most <= 1.0, "the first frames differ by {most}");
    assert!(largest_difference(&long.narrow(2, 0, 3), &long.narrow(2, 3, 3)) > 10.0, "blocks are alike");
    let error = run_in(at, &["sample", "run", "--height", "32", "--width", "32", "--out", "wide.safetensors"]);
    assert!(error.error(2).contains("16x16 alone, of any length"));

    // a long video is the same video
    let video = |of: &[&str], out: &str| -> Vec<u8> {
        let more = ["--videos", "1", "--frames", "11", "--device", "cpu", "--out", out];
        succeed_in(at, &[of, &more[..]].concat());
        let mut reader = VideoReader::open(&at.join(out).join("00000.mp4")).unwrap();
        reader.read(0, 11, 1).unwrap().into_iter().flat_map(|frame| frame.pixels).collect()
    };
    assert!(video(&["sample", "run"], "videos") == video(&["sample-long", "run"], "long"), "a long video is another");
    let gaps = run_in(at, &["sample-long", "run", "--frames", "11", "--gap", "2", "--out", "gaps"]);
    assert!(gaps.error(2).contains("there is no gap"));

    let model = LatentDiffusion::open(&at.join("run"), CPU).unwrap().0;
    let mut opened = models::open(&at.join("run"), CPU).unwrap();
    opened.resize(Some(4), None, None).unwrap();
    assert_eq!(opened.clip(), [3, 4, 16, 16]);
    let samples = [SampleId { seed: 9, sample: 1 }];
    assert_eq!(opened.videos(&samples, &Given::default(), &mut |_, _| {}).unwrap().size(), [1, 3, 4, 16, 16]);

    // prediction and interpolation: given frames come back, and each of them moves the block
    let sampler: SamplerConfig = Strided { steps: 3, clip: true, ..Strided::default() }.into();
    let block = |indices: &[i64], frames: &Tensor| {
        let guidance = GuidanceConfig { level: None, ..GuidanceConfig::default() };
        let frames = (!indices.is_empty()).then_some(FramesOfClip { indices, frames, guidance });
        let given = LatentConditions { frames, ..LatentConditions::default() };
        let clips = [ClipId { seed: 9, sample: 0, clip: 0 }];
        model.clips(&clips, 6, &given, sampler, &mut |_, _| {})
    };
    let frames = noise(4, &[1, 3, 3, 16, 16]) * 0.5;
    let both = block(&[0, 1, 5], &frames).unwrap();
    for (place, i) in [(0, 0), (1, 1), (5, 2)] {
        assert!(both.narrow(2, place, 1).equal(&frames.narrow(2, i, 1)), "the frame at {place} is not what was given");
    }
    let made = |clip: &Tensor| clip.narrow(2, 2, 3);
    let predicted = block(&[0, 1], &frames.narrow(2, 0, 2)).unwrap();
    assert_eq!(predicted.narrow(2, 5, 1).abs().max().double_value(&[]), 0.0);
    let generated = block(&[], &frames).unwrap();
    for (name, a, b) in [("the future", &both, &predicted), ("the past", &predicted, &generated)] {
        let moved = largest_difference(&made(a), &made(b));
        assert!(moved > 1e-4, "{name} moves the block by {moved}");
    }
    assert!(block(&[3], &frames.narrow(2, 0, 1)).unwrap_err().to_string().contains("makes those from 2 to 4"));
}

/// A past of one frame can be a picture; one of several cannot.
#[test]
fn a_first_frame_is_the_past_of_the_first_block() {
    let folder = workplace();
    let at = folder.path();
    let small = ["trainer.steps=1", "network.multipliers=[1]", "network.attention_factors=[]"];
    train(at, "one", &[&small[..], &["blocks={past: 1}"]].concat());
    train(at, "two", &[&small[..], &["blocks={past: 2}"]].concat());
    let picture = RgbFrame { width: 16, height: 16, pixels: (0..16 * 16 * 3).map(|i| (i % 251) as u8).collect() };
    let model = models::open(&at.join("one"), CPU).unwrap();
    let frames = [&picture];
    let given = Given { first_frames: Some(&frames), ..Given::default() };
    let samples = [SampleId { seed: 9, sample: 1 }];
    let videos = model.videos(&samples, &given, &mut |_, _| {}).unwrap();
    assert_eq!(videos.size(), [1, 3, 6, 16, 16]);
    let first = videos.get(0).narrow(1, 0, 1).squeeze_dim(1);
    let off = largest_difference(&first, &picture.to_tensor().permute([2, 0, 1]));
    assert!(off <= 1.0, "the first frame is off by {off}");
    let free = model.videos(&samples, &Given::default(), &mut |_, _| {}).unwrap();
    assert!(!free.narrow(2, 1, 3).equal(&videos.narrow(2, 1, 3)), "the first frame changes nothing");
    let two = models::open(&at.join("two"), CPU).unwrap();
    assert!(two.check(&given).unwrap_err().to_string().contains("given 2 frames before a block"));
}

/// In the latents of an autoencoder, with blocks of latent frames, and out of a file of latents.
#[test]
fn blocks_of_latents() {
    let folder = workplace();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 4, 14, 16);
    let autoencoder = "\
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 12, resolution: 16, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {pixel: l1, perceptual_weight: 0.0, adversarial_weight: 0.0, discriminator: {channels: 4, layers: 1}}
optimizer: {kind: adam, learning_rate: 1.0e-4}
trainer: {steps: 1, batch: 2, device: cpu}
";
    fs::write(at.join("autoencoder.yaml"), autoencoder).unwrap();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "--run", "autoencoder"]);
    let of_latents = [
        "data.frames=12",
        "autoencoder=autoencoder",
        "network.multipliers=[1]",
        "network.attention_factors=[]",
        "sampler={kind: strided, steps: 3}",
        "trainer.steps=1",
    ];
    train(at, "latents", &of_latents);
    let model = models::open(&at.join("latents"), CPU).unwrap();
    assert_eq!(model.clip(), [3, 12, 16, 16]);
    let sample =
        ["sample", "latents", "--videos", "1", "--frames", "26", "--device", "cpu", "--out", "long.safetensors"];
    succeed_in(at, &sample);
    let clips = read_safetensors(&at.join("long.safetensors")).unwrap().0.remove("clips").unwrap();
    assert_eq!((clips.size(), clips.kind()), (vec![1, 3, 26, 16, 16], Kind::Uint8));
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = workplace();
    let at = folder.path();
    let refused = |more: &[&str]| {
        let said = run_in(at, &[&["train", "diffusion", "mcvd.yaml", "--run", "refused"], more].concat());
        assert_ne!(said.status, 0);
        said.err
    };
    for (change, word) in [
        ("blocks.past=5", "leave nothing to make of a clip of 6"),
        ("blocks.past=0", "blocks follow from each other"),
        ("blocks.mask_past=1.5", "mask_past is a probability"),
        ("conditioning={prediction: 0.5, perturbation: null}", "write blocks in its place"),
        ("network.head_width=12", "do not divide into heads of 12"),
        ("network.attention_factors=[4]", "4 is not one of this network's downsampling factors"),
        ("sampler.steps=21", "between 1 and the schedule's 20"),
    ] {
        let error = refused(&[change]);
        assert!(error.contains(word), "{change}: {error}");
    }
    let unet = refused(&["network={kind: unet3d, channels: 32, multipliers: [1], attention_factors: []}"]);
    assert!(unet.contains("one that does is kind: mcvd"), "{unet}");
    let alone = EXPERIMENT.lines().filter(|line| !line.starts_with("blocks")).collect::<Vec<_>>().join("\n");
    fs::write(at.join("mcvd.yaml"), alone).unwrap();
    assert!(refused(&["network.spatin=8"]).contains("give the experiment `blocks`"));
}

/// The released list: both sets of weights come with their names, settings and schedule are read off the file, and the average
/// samples. A file without an average, one with SPATIN, and what does not fit.
#[test]
fn a_released_checkpoint_becomes_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let plain = McvdConfig {
        channels: 16,
        multipliers: vec![1, 2, 2],
        blocks_per_level: 2,
        attention_factors: vec![2, 4],
        head_width: 16,
        ..McvdConfig::default()
    };
    let spatin = McvdConfig { spatin: Some(8), multipliers: vec![1], attention_factors: vec![1], ..plain.clone() };
    let betas = |first: f64, last: f64| Tensor::linspace(first, last, 50, (Kind::Float, CPU));
    let weights = |config: &McvdConfig, seed: u64| -> BTreeMap<String, Tensor> {
        let parameters = Parameters::new(CPU, seed);
        let ports = Ports { past: 3, future: 1, ..Ports::of([3, 2, 16, 16]) };
        config.build(&parameters.root(), &ports).unwrap();
        parameters.named().into_iter().collect()
    };
    let under = |prefix: &str, tensors: &BTreeMap<String, Tensor>| -> BTreeMap<String, Tensor> {
        tensors.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.shallow_clone())).collect()
    };
    let import = |file: &str, out: &str, more: &[&str]| {
        let given = ["import", "mcvd", file, "--out", out, "--future", "1", "--resolution", "16"];
        run_in(at, &[&given[..], more].concat())
    };
    let (last, average) = (weights(&plain, 1), weights(&plain, 2));
    let mut listed = under("module.unet.", &last);
    listed.insert("module.unet.betas".into(), betas(0.02, 1e-4));
    listed.insert("module.unet.alphas".into(), betas(0.02, 1e-4));
    // an old average: its last norm has a shorter name
    let old = under("unet.", &average).into_iter().map(|(name, tensor)| (name.replace(".Norm_0.", "."), tensor));
    write_listed_checkpoint(&at.join("mcvd.pt"), &listed, 123, Some(&old.collect()));
    assert!(import("mcvd.pt", "run", &[]).error(2).contains("give --head-width N"));
    assert!(import("mcvd.pt", "run", &["--head-width", "16", "--future", "4"]).status != 0 && !at.join("run").exists());
    let said = import("mcvd.pt", "run", &["--head-width", "16"]);
    assert_eq!(said.status, 0, "{}", said.err);
    let found = checkpoint::latest(&at.join("run")).unwrap().unwrap().1;
    same(&found.part("model"), &last);
    same(&found.part("ema"), &average);
    assert_eq!(found.progress.ema_updates, 123);
    let network: NetworkConfig = serde_json::from_value(found.experiment["network"].clone()).unwrap();
    assert_eq!(network, plain.clone().into());
    let of = |path: &str| found.experiment.pointer(path).cloned().unwrap();
    assert_eq!(
        (of("/schedule/steps"), of("/schedule/beta_start"), of("/schedule/beta_end")),
        (50.into(), 1e-4.into(), 0.02.into())
    );
    assert_eq!((of("/blocks/past"), of("/blocks/future"), of("/data/frames")), (3.into(), 1.into(), 6.into()));
    let sample = ["sample", "run", "--videos", "1", "--steps", "2", "--frames", "5", "--device", "cpu", "--out"];
    succeed_in(at, &[&sample[..], &["one.safetensors"]].concat());
    // training goes on from there
    write_packed(&at.join("clips.safetensors"), 4, 8, 16);
    let data = "data.dataset={kind: packed, file: clips.safetensors}";
    let more = ["data.flip=false", "trainer.steps=1", "trainer.batch=1", "trainer.device=cpu", "data.workers=1"];
    let go_on = ["train", "diffusion", "run/experiment.yaml", "--run", "run", data];
    succeed_in(at, &[&go_on[..], &more].concat());

    let steered = weights(&spatin, 3);
    write_listed_checkpoint(&at.join("spatin.pt"), &under("module.unet.", &steered), 5, None);
    let said = import("spatin.pt", "spatin", &["--head-width", "16"]);
    assert_eq!(said.status, 0, "{}", said.err);
    let found = checkpoint::latest(&at.join("spatin")).unwrap().unwrap().1;
    assert!(found.part("ema").is_empty());
    assert_eq!(serde_json::from_value::<NetworkConfig>(found.experiment["network"].clone()).unwrap(), spatin.into());

    let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut changed = listed.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        change(&mut changed);
        write_listed_checkpoint(&at.join("changed.pt"), &changed, 5, None);
        let said = import("changed.pt", "changed", &["--head-width", "16"]);
        assert!(said.status != 0 && !at.join("changed").exists());
        said.err
    };
    let curved = betas(0.02, 1e-4).square();
    let error = refused(&|tensors| drop(tensors.insert("module.unet.betas".into(), curved.shallow_clone())));
    assert!(error.contains("betas do not fall evenly"), "{error}");
    let error = refused(&|tensors| drop(tensors.remove("module.unet.all_modules.7.NIN_1.b")));
    assert!(error.contains("`all_modules.7.NIN_1.b` is missing"), "{error}");
    let error = refused(&|tensors| drop(tensors.insert("module.unet.other".into(), betas(0.0, 1.0))));
    assert!(error.contains("`other` is no tensor of MCVD"), "{error}");
}
