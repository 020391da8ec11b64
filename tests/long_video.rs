//! Long videos: decoding in chunks, and what a network given frames starts from.

mod common;

use std::{fs, path::Path};

use common::{contents, largest_difference, noise, relative_error, run_in, source, succeed_in, wake, write_packed};
use lvdm::{
    checkpoint,
    codecs::{AutoencoderConfig, Chunks, CodecSettings, LatentSpace, Normalization, VideoAutoencoder},
    data::VideoReader,
    diffusion::{
        Ddim, FrameMask, GuidanceConfig, NoiseSchedule, NoisyBatch, Objective, SamplerConfig, ScheduleConfig, Times,
    },
    experiment::{LongVideoConfig, Precision},
    models::{LongVideo, open_long},
    networks::{Inputs, Network as _, NetworkSettings, Ports, UNet3d, UNetConfig},
    nn::Parameters,
    safetensors::read_safetensors,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};

const CPU: Device = Device::Cpu;

fn autoencoder(norm_groups: i64) -> (AutoencoderConfig, VideoAutoencoder, Parameters) {
    let config = AutoencoderConfig { channels: 8, factors: [4, 4, 4], norm_groups, ..AutoencoderConfig::default() };
    config.validate().unwrap();
    let parameters = Parameters::new(CPU, 3);
    let autoencoder = VideoAutoencoder::new(&parameters.root(), &config);
    parameters.freeze();
    for (name, mut weight) in parameters.named() {
        if weight.dim() == 5 {
            // as they start, kernels shrink what passes, and distance with it; trained ones do not
            let grown = &weight * if name.contains("conv_blocks") { 2.5 } else { 1.0 };
            // and each frame of an upsampled group is a picture of its own; these agree
            let even = if name.contains("convt") { grown.mean_dim([2].as_slice(), true, None) } else { grown };
            no_grad(|| weight.copy_(&even.expand_as(&weight)));
        }
    }
    (config, autoencoder, parameters)
}

/// Latents that drift: each frame keeps most of the one before.
fn drifting(frames: i64) -> Tensor {
    let fresh = noise(0, &[1, 4, frames, 4, 4]);
    let mut rows = vec![fresh.narrow(2, 0, 1)];
    for f in 1..frames as usize {
        rows.push(&rows[f - 1] * 0.995 + fresh.narrow(2, f as i64, 1) * 0.09987);
    }
    Tensor::cat(&rows, 2)
}

fn in_chunks(chunks: &Chunks, autoencoder: &VideoAutoencoder, z: &Tensor) -> Tensor {
    let mut pieces = Vec::new();
    let keep = &mut |piece: &Tensor| {
        pieces.push(piece.copy());
        Ok(())
    };
    no_grad(|| chunks.decode(z, &mut |z| Ok(autoencoder.decode(z)), keep)).unwrap();
    Tensor::cat(&pieces, 1).unsqueeze(0)
}

/// Without group norms a decoded frame depends on a few neighbours only, and where an overlap is wide enough for
/// these, chunks give what the whole gives.
#[test]
fn without_norms_chunks_are_the_whole() {
    let (config, autoencoder, _parameters) = autoencoder(0);
    let (z, factor, reach) = (drifting(70), config.factors[0], config.decoder_reach());
    let overlap = 2 * reach.div_euclid(factor) + 3;
    let chunks = Chunks { length: overlap + 6, overlap, factor, reach, missing: 0 };
    assert!(chunks.starts(70).len() > 5);
    let whole = no_grad(|| autoencoder.decode(&z));
    let difference = largest_difference(&in_chunks(&chunks, &autoencoder, &z), &whole);
    let range = whole.abs().max().double_value(&[]);
    println!("largest difference {difference:.1e} at values up to {range:.2}");
    assert!(difference < 1e-5 * range.max(1.0), "{difference:e}");
    // and it is the overlap that does it
    let narrow = Chunks { overlap: 1, ..chunks };
    assert!(largest_difference(&in_chunks(&narrow, &autoencoder, &z), &whole) > 1e-3);
}

/// The reach is far enough: a frame beyond it does not feel the edge.
#[test]
fn no_edge_is_felt_beyond_the_reach() {
    let (config, autoencoder, _parameters) = autoencoder(0);
    let (z, factor, reach) = (drifting(40), config.factors[0], config.decoder_reach());
    let (cut, length) = (10, 30);
    let (whole, part) = no_grad(|| (autoencoder.decode(&z), autoencoder.decode(&z.narrow(2, cut, length))));
    let differs = |f: i64| largest_difference(&whole.narrow(2, cut * factor + f, 1), &part.narrow(2, f, 1)) > 1e-6;
    assert!(differs(0) && differs(reach / 2));
    let felt = (0..length * factor).filter(|&f| differs(f)).max().unwrap() + 1;
    println!("felt for {felt} frames, the reach is {reach}");
    assert!(felt <= reach && reach <= felt + 10, "{felt} {reach}");
}

/// Mean absolute differences of neighbouring frames: their mean at seams, and the median elsewhere.
fn seams(video: &Tensor, chunks: &Chunks, latents: i64) -> (f64, f64) {
    let frames = video.size()[2];
    let steps = (video.narrow(2, 1, frames - 1) - video.narrow(2, 0, frames - 1)).abs();
    let steps: Vec<f64> = steps.mean_dim([0, 1, 3, 4].as_slice(), false, Kind::Double).try_into().unwrap();
    let mut at_seam = vec![false; steps.len()];
    for (first, count) in chunks.seams(latents) {
        (first - 1..first + count).for_each(|i| at_seam[i as usize] = true);
    }
    let of = |wanted: bool| steps.iter().zip(&at_seam).filter(|(_, s)| **s == wanted).map(|(d, _)| *d).collect();
    let (seam, mut other): (Vec<f64>, Vec<f64>) = (of(true), of(false));
    other.sort_by(f64::total_cmp);
    (seam.iter().sum::<f64>() / seam.len() as f64, other[other.len() / 2])
}

/// Chunks of the training length, cross-faded: no jump where they meet. Put side by side they do jump.
#[test]
fn seams_do_not_show() {
    let (config, _, parameters) = autoencoder(8);
    let weights = parameters.named().into_iter().collect();
    let clip = 4;
    let space = LatentSpace::new(&config, weights, Normalization { scale: 2.0, shift: 0.5 }, clip, CPU).unwrap();
    let z = drifting(64);
    let mut pieces = Vec::new();
    space
        .decode_long(&z, &mut |piece| {
            assert!(piece.size()[1] <= clip * config.factors[0], "a piece is longer than a chunk");
            pieces.push(piece.copy());
            Ok(())
        })
        .unwrap();
    let video = Tensor::cat(&pieces, 1).unsqueeze(0);
    let (seam, elsewhere) = seams(&video, &space.chunks(), 64);
    let side_by_side: Vec<Tensor> = (0..16).map(|i| space.decode(&z.narrow(2, i * clip, clip))).collect();
    let hard = Chunks { overlap: 0, ..space.chunks() };
    let (hard_seam, hard_elsewhere) = seams(&Tensor::cat(&side_by_side, 2), &hard, 64);
    println!("cross-faded {:.2}, side by side {:.2}", seam / elsewhere, hard_seam / hard_elsewhere);
    assert!(seam <= 1.2 * elsewhere, "{seam} {elsewhere}");
    assert!(hard_seam > 1.2 * hard_elsewhere, "{hard_seam} {hard_elsewhere}");
}

/// A short model's weights in a network with a mask channel, levels and a longer or shorter clip: with an empty mask it computes
/// the same.
#[test]
fn a_grown_network_starts_as_the_short_one() {
    let config = UNetConfig {
        channels: 32,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![1, 2],
        ..UNetConfig::default()
    };
    let short = Ports::of([4, 4, 1, 1]);
    let parameters = Parameters::new(CPU, 1);
    let network = UNet3d::new(&parameters.root(), &config, &short);
    wake(&parameters);
    parameters.freeze();
    let t = Tensor::from_slice(&[10i64, 700]);
    for length in [3, 4, 6] {
        let ports = Ports { mask: true, frames: length, levels: Some(251), ..short.clone() };
        let mut weights = parameters.named().into_iter().collect();
        config.adopt(&mut weights, &ports);
        let grown_parameters = Parameters::new(CPU, 2);
        let grown = UNet3d::new(&grown_parameters.root(), &config, &ports);
        grown_parameters.load(&weights).unwrap();
        grown_parameters.freeze();
        let z = noise(1, &[2, 4, length, 8, 8]);
        let masked = |value: f64, level| Inputs {
            mask: Some(Tensor::full([2, 1, length, 8, 8], value, (Kind::Float, CPU))),
            level,
            ..Inputs::default()
        };
        let expected = network.forward(&z, &t, &Inputs::default());
        for level in [None, Some(Tensor::from_slice(&[0i64, 249]))] {
            let found = grown.forward(&z, &t, &masked(0.0, level));
            let difference = largest_difference(&found, &expected);
            assert!(difference < 1e-6, "{length} frames: {difference:e}");
        }
        // the mask channel is there to be learned: its kernel has a gradient
        let name = "input_blocks.0.0.weight";
        let (_, mut kernel) = grown_parameters.named().into_iter().find(|(n, _)| n == name).unwrap();
        let _ = kernel.requires_grad_(true);
        grown.forward(&z, &t, &masked(1.0, None)).square().mean(None).backward();
        assert!(kernel.grad().narrow(1, 4, 1).abs().max().double_value(&[]) > 0.0);
    }
}

/// Runs of next to no training, from packed clips: short, prediction (sparse), interpolation.
fn toy_runs(at: &Path) {
    write_packed(&at.join("clips.safetensors"), 6, 24, 16);
    let data = |frames: i64| {
        format!("data: {{dataset: {{kind: packed, file: clips.safetensors}}, frames: {frames}, resolution: 16}}\n")
    };
    let trainer = "optimizer: {kind: adamw, learning_rate: 1.0e-3}\n\
                   trainer: {steps: 2, batch: 2, log_every: 1, checkpoint_every: 2, picture_every: 2}\n";
    let autoencoder = "autoencoder: {channels: 8, factors: [2, 4, 4], norm_groups: 8}\n\
                       loss: {perceptual_weight: 0.0, adversarial_weight: 0.0}\n";
    let unet = "autoencoder: runs/autoencoder\n\
                unet: {channels: 32, multipliers: [1], blocks_per_level: 1, attention_factors: [1], heads: 2}\n\
                sampler: {kind: ddim, steps: 2, eta: 1.0}\n";
    let long = "start_from: runs/short\n";
    for (name, task, text) in [
        ("autoencoder", "autoencoder", [&data(8), autoencoder, trainer].concat()),
        ("short", "diffusion", [&data(8), unet, trainer].concat()),
        (
            "prediction",
            "diffusion",
            [&data(24), unet, trainer, long, "latent_stride: 3\nconditioning: {prediction: 0.8, prefixes: [1, 2]}\n"]
                .concat(),
        ),
        (
            "interpolation",
            "diffusion",
            [&data(8), unet, trainer, long, "conditioning: {interpolation: 0.9, masked_loss: true}\n"].concat(),
        ),
        (
            "continuation",
            "diffusion",
            [&data(8), unet, trainer, long, "conditioning: {prefixes: [2], perturbation: null}\n"].concat(),
        ),
    ] {
        let file = format!("{name}.yaml");
        std::fs::write(at.join(&file), text).unwrap();
        succeed_in(at, &["train", task, &file]);
    }
}

fn config(at: &Path) -> LongVideoConfig {
    LongVideoConfig {
        prediction: at.join("runs/prediction"),
        interpolation: Some(at.join("runs/interpolation")),
        overlap: 1,
        gap: None,
        guidance: GuidanceConfig::default(),
        sampler: Some(SamplerConfig::Ddim(Ddim { steps: 3, eta: 1.0 }).into()),
        batch: 6,
        precision: Precision::F32,
        tf32: false,
    }
}

/// From runs to videos and curves on the command line.
#[test]
fn long_videos_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    toy_runs(at);

    // the plan: 23 frames are 12 latent frames, sparse 0, 3 … 12
    let hierarchical = ["sample-long", "runs/prediction", "--interpolation", "runs/interpolation", "--frames", "23"];
    let with = |more: &[&'static str]| [&hierarchical, more].concat();
    let said = succeed_in(at, &with(&["--dry-run", "--json"]));
    let steps: Value = serde_json::from_str(&said.out).unwrap();
    let step =
        |model: &str, given: &[i64], written: &[i64]| json!({"model": model, "given": given, "written": written});
    assert_eq!(
        steps,
        json!([
            step("prediction", &[], &[0, 3, 6, 9]),
            step("prediction", &[9], &[12]),
            step("interpolation", &[0, 3], &[1, 2]),
            step("interpolation", &[3, 6], &[4, 5]),
            step("interpolation", &[6, 9], &[7, 8]),
            step("interpolation", &[9, 12], &[10, 11]),
        ])
    );
    let table = succeed_in(at, &with(&["--dry-run"])).out;
    assert!(table.contains("interpolation") && table.contains("6 clips make 12 latent frames"), "{table}");
    // no weights are read for it: damaged ones stop the videos alone
    let weights = lvdm::checkpoint::list(&at.join("runs/prediction")).unwrap().pop().unwrap();
    let whole = fs::read(&weights).unwrap();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&weights, damaged).unwrap();
    assert_eq!(succeed_in(at, &with(&["--dry-run"])).out, table);
    run_in(at, &with(&["--out", "none"])).error(1);
    fs::write(&weights, whole).unwrap();

    // videos; a second call finds them there, and other settings are refused
    let sample = with(&["--videos", "3", "--batch", "2", "--steps", "2", "--out", "long"]);
    succeed_in(at, &sample);
    let before = contents(&at.join("long"));
    assert_eq!(before.len(), 4, "{:?}", before.keys());
    for i in 0..3 {
        let video = VideoReader::open(&at.join(format!("long/{i:05}.mp4"))).unwrap();
        assert_eq!((video.frames(), video.width()), (23, 16));
    }
    succeed_in(at, &sample);
    assert!(contents(&at.join("long")) == before);
    let two = ["--out", "two", "--nproc", "2", "--device", "cpu"];
    succeed_in(at, &[&sample[..sample.len() - 2], &two].concat());
    assert!(contents(&at.join("two")).values().eq(before.values()), "two ranks make other videos");
    let half = ["--out", "half", "--precision", "bf16"];
    succeed_in(at, &[&sample[..sample.len() - 2], &half].concat());
    assert_eq!(VideoReader::open(&at.join("half/00000.mp4")).unwrap().frames(), 23);
    let other = run_in(at, &[&sample[..], &["--seed", "1"]].concat());
    assert!(other.error(2).contains("other settings"));

    // what does not fit is a mistake that says so
    let long = |rest: &[&'static str]| {
        [&["sample-long", "runs/prediction", "--interpolation", "runs/interpolation", "--dry-run"], rest].concat()
    };
    for (arguments, word) in [
        (vec!["sample-long", "runs/short", "--dry-run"], "conditioning"),
        (vec!["sample-long", "runs/prediction", "--dry-run"], "interpolation"),
        (vec!["sample-long", "runs/continuation", "--dry-run"], "clean"),
        (vec!["sample-long", "runs/continuation", "--clean", "--dry-run", "--overlap", "4"], "overlap"),
        (vec!["sample-long", "runs/none", "--dry-run"], "runs/none"),
        (vec!["sample-long", "runs/prediction", "--interpolation", "runs/interpolation", "--out", "x.npz"], "folder"),
        (long(&["--frames", "9223372036854775807"]), "frames must be a number from 1 to"),
        (long(&["--gap", "9223372036854775807"]), "gap must be a number from 1 to"),
        (long(&["--batch", "9223372036854775807"]), "batch must be a number from 1 to"),
        (long(&["--videos", "9223372036854775807"]), "--videos"),
    ] {
        let said = run_in(at, &arguments);
        assert!(said.error(2).contains(word), "{arguments:?}: {}", said.err);
    }

    // curves of two methods and of real videos
    let data = "{dataset: {kind: packed, file: clips.safetensors}, frames: 10, resolution: 16}";
    let ddim = "sampler: {kind: ddim, steps: 2, eta: 1.0}, batch: 2";
    let text = format!(
        "videos: 3\nframes: 23\nevaluation: {{clips: 4}}\nreal: {data}\ntrain: {data}\nout: curves\ncurves:\n\
         - {{name: \"hierarchical, w = 0.1\", source: {{kind: sampled, prediction: runs/prediction, interpolation: runs/interpolation, {ddim}}}}}\n\
         - {{name: autoregressive, source: {{kind: sampled, prediction: runs/continuation, overlap: 2, guidance: {{level: null}}, {ddim}}}}}\n\
         - {{name: real, source: {{kind: videos, data: {data}}}}}\n"
    );
    std::fs::write(at.join("long.yaml"), text).unwrap();
    let said = succeed_in(at, &["evaluate-long", "long.yaml"]);
    said.names_its_device_once();
    println!("{}", said.out);
    let lines = std::fs::read_to_string(at.join("curves/curves.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let frames: Vec<i64> = lines.iter().map(|line| line["first_frame"].as_i64().unwrap()).collect();
    assert_eq!(frames, [0, 10, 0, 10, 0, 10]);
    assert!(lines.iter().all(|line| line["fvd"].as_f64().unwrap() > 0.0 && line["kvd"].is_f64()));
    for (line, figure) in lines.iter().flat_map(|line| [(line, "fvd"), (line, "kvd")]) {
        let [low, high] = [0, 1].map(|end| line[format!("{figure}_interval")][end].as_f64().unwrap());
        assert!(((low + high) / 2.0 - line[figure].as_f64().unwrap()).abs() < 1e-6 && low < high, "{line}");
    }
    let figures: Value =
        serde_json::from_str(&std::fs::read_to_string(at.join("curves/figures.json")).unwrap()).unwrap();
    assert_eq!(figures["curves"][0]["windows"].as_array().unwrap().len(), 2);
    for file in ["fvd.svg", "fvd.png", "kvd.svg", "kvd.png", "hierarchical-w-0-1/00000.mp4", "autoregressive/00002.png"]
    {
        assert!(at.join("curves").join(file).exists(), "{file}");
    }
    for folder in ["hierarchical-w-0-1", "autoregressive", "real"] {
        assert_eq!(std::fs::read_dir(at.join("curves").join(folder).join("tensorboard")).unwrap().count(), 1);
    }
    assert_eq!(figures["floor"]["sets"], "trained");
    // without clips that were trained on, real clips alone give the real-vs-real baseline
    let text = format!(
        "videos: 3\nframes: 23\nevaluation: {{clips: 4}}\nreal: {data}\nout: untrained\ncurves:\n\
         - {{name: real, source: {{kind: videos, data: {data}}}}}\n"
    );
    std::fs::write(at.join("untrained.yaml"), text).unwrap();
    let alone = succeed_in(at, &["evaluate-long", "untrained.yaml"]);
    assert!(
        alone.out.contains("real against real at ") && alone.out.contains("95 % interval of a window"),
        "{}",
        alone.out
    );
    let text = std::fs::read_to_string(at.join("untrained/figures.json")).unwrap();
    let untrained: Value = serde_json::from_str(&text).unwrap();
    assert!(untrained["floor"]["fvd"].is_f64() && untrained["floor"]["sets"] != "trained", "{}", untrained["floor"]);
    assert!(std::fs::read_to_string(at.join("untrained/fvd.svg")).unwrap().contains("real against real"));
    // nothing is sampled again
    let windows = at.join("curves/autoregressive/windows-00000.safetensors");
    let time = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let before = time(&windows);
    let again = succeed_in(at, &["evaluate-long", "long.yaml"]);
    assert!(time(&windows) == before && again.out == said.out);
    // two ranks find the same
    let two = succeed_in(at, &["evaluate-long", "long.yaml", "out=two-ranks", "--nproc", "2", "--device", "cpu"]);
    assert_eq!(two.out.replace("two-ranks", "curves"), said.out);
    // a run that continues nothing makes each video in one piece, as `lvdm sample` does
    let whole = format!(
        "videos: 3\nframes: 20\nevaluation: {{clips: 4}}\nreal: {data}\nout: whole\ncurves:\n\
         - {{name: short, source: {{kind: run, run: runs/short, sampler: {{steps: 3}}, batch: 2}}}}\n"
    );
    std::fs::write(at.join("whole.yaml"), whole).unwrap();
    let said = succeed_in(at, &["evaluate-long", "whole.yaml"]);
    assert!(said.out.contains("short: neighbouring frames differ by") && !said.out.contains("seams"), "{}", said.out);
    let same =
        ["sample", "runs/short", "--frames", "20", "--videos", "3", "--batch", "3", "--steps", "3", "--out", "same"];
    succeed_in(at, &same);
    for video in ["00000.mp4", "00002.mp4"] {
        let read = |folder: &str| fs::read(at.join(folder).join(video)).unwrap();
        assert!(read("whole/short") == read("same"), "{video} is another one");
    }
    let said = run_in(at, &["evaluate-long", "whole.yaml", "frames=21"]);
    assert!(said.error(2).contains("runs/short: ") && said.err.contains("21"), "{}", said.err);
    // of which one says how far it is
    assert_eq!(two.err.matches("real: 3/3 in ").count(), 1, "{}", two.err);
}

/// Stopped in the middle, it goes on to the same latents; and they do not depend on what is sampled beside them.
#[test]
fn an_interrupted_long_video_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    toy_runs(at);
    let long = open_long(&config(at), 40, CPU).unwrap();
    let latents = |long: &LongVideo, samples: &[u64], state: &str| {
        long.latents(samples, 5, &at.join(state), &mut |_| {}).unwrap()
    };
    let whole = latents(&long, &[0, 1], "whole");
    assert_eq!(whole.size(), [2, 4, 20, 4, 4]);
    assert!(whole.isfinite().all().int64_value(&[]) == 1);
    // each pass has written what it added, and nothing was written twice
    let parts = contents(&at.join("whole"));
    let frames = parts.keys().map(|part| read_safetensors(part).unwrap().0["latents"].size()[2]).collect::<Vec<_>>();
    let made = long.plan.frames..=long.plan.extent;
    assert!(parts.len() > 2 && made.contains(&frames.iter().sum()), "{frames:?}, not {made:?}");
    for stop in 1..2 * long.plan.steps.len() as u64 {
        let state = at.join(format!("state-{stop}"));
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = long.latents(&[0, 1], 5, &state, &mut |clip| assert!(clip < stop, "stopped"));
        }));
        assert!(stopped.is_err());
        assert!(latents(&long, &[0, 1], &format!("state-{stop}")).equal(&whole), "stopped at clip {stop}");
        assert!(contents(&state).into_values().eq(parts.values().cloned()), "stopped at clip {stop}");
    }
    // alone, and with other passes of the networks
    let other = open_long(&LongVideoConfig { batch: 1, ..config(at) }, 40, CPU).unwrap();
    let error = largest_difference(&latents(&other, &[1], "alone").get(0), &whole.get(1));
    assert!(error < 1e-4, "{error:e}");
    // a state of another seed is refused
    let error = long.latents(&[0, 1], 6, &at.join("whole"), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("other settings"), "{error}");
}

/// All clips of a video are shown the video's class, and none is shown "no class".
#[test]
fn each_clip_of_a_long_video_is_of_its_class() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    toy_runs(at);
    let run = at.join("runs/continuation");
    // a table of two classes, and "no class" behind them, in which one row is another one
    let latents = |row: Option<i64>| {
        let table = noise(1, &[3, 128]);
        if let Some(row) = row {
            let _ = table.get(row).fill_(2.0);
        }
        let (path, mut found) = checkpoint::open_averaged(&run).unwrap();
        found.experiment["labels"] = json!({"classes": 2});
        for part in ["model", "ema"] {
            found.tensors.insert(format!("{part}.class_emb.weight"), table.copy());
        }
        found.write(&path).unwrap();
        let config = LongVideoConfig {
            prediction: run.clone(),
            interpolation: None,
            overlap: 2,
            guidance: GuidanceConfig { level: None, ..GuidanceConfig::default() },
            ..config(at)
        };
        let long = open_long(&config, 20, CPU).unwrap();
        long.latents(&[0, 1], 5, &at.join(format!("{row:?}")), &mut |_| {}).unwrap()
    };
    let whole = latents(None);
    let same = |row: i64| {
        let other = latents(Some(row));
        [0, 1].map(|video| other.get(video).equal(&whole.get(video)))
    };
    assert_eq!([same(0), same(1), same(2)], [[false, true], [true, false], [true, true]]);
}

/// The masked loss is the mean over frames that are made; the whole one counts given frames too, whose target is the
/// noise that was put on them.
#[test]
fn a_masked_loss_leaves_given_frames_out() {
    let config = UNetConfig {
        channels: 32,
        multipliers: vec![1],
        blocks_per_level: 1,
        attention_factors: vec![1],
        ..UNetConfig::default()
    };
    let ports = Ports { mask: true, levels: Some(11), ..Ports::of([4, 4, 1, 1]) };
    let parameters = Parameters::new(CPU, 4);
    let network = UNet3d::new(&parameters.root(), &config, &ports);
    wake(&parameters);
    parameters.freeze();
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let shape = [2, 4, 4, 4, 4];
    let (z_0, fresh) = (noise(0, &shape), noise(1, &shape));
    let (t, s) = (Tensor::from_slice(&[300i64, 900]), Tensor::from_slice(&[0i64, 9]));
    let mask = Tensor::cat(&[FrameMask::Prefix(1).tensor(4), FrameMask::Endpoints.tensor(4)], 0).unsqueeze(1);
    let given = Inputs { mask: Some(mask.shallow_clone()), level: Some(s.shallow_clone()), ..Inputs::default() };
    let [at_t, at_s] = [[300, 900], [0, 9]].map(|levels| Times::of_levels(&schedule, &levels, CPU));
    let loss = |made_only| {
        let batch =
            NoisyBatch { z_0: &z_0, noise: &fresh, times: &at_t, given: &given, given_times: Some(&at_s), made_only };
        Objective::default().loss(&network, &schedule, &batch).double_value(&[])
    };
    // the same by hand: frames as the network sees them, each with its own target
    let is_given = mask.expand([2, 4, 4, 4, 4], false).to_kind(Kind::Bool);
    let seen = at_s.add_noise(&z_0, &fresh).where_self(&is_given, &at_t.add_noise(&z_0, &fresh));
    let error = (network.forward(&seen, &t, &given) - &fresh).abs();
    let whole = error.mean(None).double_value(&[]);
    let made = error.masked_select(&is_given.logical_not()).mean(None).double_value(&[]);
    assert!((loss(false) - whole).abs() < 1e-5, "{} {whole}", loss(false));
    assert!((loss(true) - made).abs() < 1e-5, "{} {made}", loss(true));
    assert!((whole - made).abs() > 1e-3);
}

/// A run that was never given a frame continues a video by reconstruction guidance, with plain replacement as its weight 0;
/// without it, it is refused with what to write. The noise of given frames is that of the video alone.
#[test]
fn any_run_continues_a_video_by_reconstruction_guidance() {
    let folder = tempfile::tempdir().unwrap();
    let with = |reconstruction: Option<f64>| LongVideoConfig {
        prediction: source("tests/released_runs/runs/unconditional"),
        interpolation: None,
        guidance: GuidanceConfig { reconstruction, ..GuidanceConfig::default() },
        ..config(folder.path())
    };
    let error = open_long(&with(None), 12, CPU).err().unwrap().to_string();
    assert!(error.contains("released_runs/runs/unconditional") && error.contains("`reconstruction`"), "{error}");
    let latents = |weight: f64, samples: &[u64]| {
        let long = open_long(&with(Some(weight)), 12, CPU).unwrap();
        assert!(long.plan.steps.len() > 1, "{:?}", long.plan);
        let state = folder.path().join(format!("{weight}-{samples:?}"));
        long.latents(samples, 5, &state, &mut |_| {}).unwrap()
    };
    let (replaced, guided) = (latents(0.0, &[0, 1]), latents(2.0, &[0, 1]));
    // the first clip is given nothing
    let first = open_long(&with(Some(0.0)), 12, CPU).unwrap().plan.steps[0].written.len() as i64;
    assert!(replaced.narrow(2, 0, first).equal(&guided.narrow(2, 0, first)));
    assert!(relative_error(&replaced, &guided) > 1e-3);
    assert!(relative_error(&latents(2.0, &[1]), &guided.narrow(0, 1, 1)) < 1e-4);
}
