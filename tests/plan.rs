//! `lvdm plan`: what it says of a training is what the training's networks are, and what a step of them takes.

mod common;

use std::path::Path;

use common::{run_in, source, succeed_in};
use lvdm::{
    autoencoder_loss::TrainPass,
    autoregression::loss,
    codecs::{CodecConfig, ImageAutoencoderConfig},
    distributed::Ranks,
    experiment::{AutoencoderExperiment, DiffusionExperiment, Precision, ReduceDtype, TransformerExperiment, read},
    networks::{Gpt, GptConfig, Inputs, Ports, Sequences},
    nn::Parameters,
    plan::{Card, Plan, PlanOptions, Rates},
    random::{Purpose, normal},
    torch::{Autocast, Bfloat16, as_on_gpu, backward, peak_host_memory, processor},
};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

fn plan(file: &str, overrides: &[&str]) -> Plan {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    let options = PlanOptions { codec: Some(ImageAutoencoderConfig::default().into()) };
    lvdm::plan::of(&source("experiments").join(file), &overrides, &options)
        .unwrap_or_else(|error| panic!("{file}: {error:#}"))
}

fn diffusion(file: &str) -> DiffusionExperiment {
    read(&source("experiments").join(file), &[]).unwrap()
}

fn noise(sample: u64, shape: &[i64]) -> Tensor {
    normal(0, Purpose::Evaluation, sample, 0, shape)
}

/// Those of networks that are built with all their weights, and the numbers of the released ones.
#[test]
fn parameters_are_those_of_the_built_networks() {
    let built = |declare: &dyn Fn(&Parameters)| {
        let parameters = Parameters::new(CPU, 0);
        declare(&parameters);
        parameters.count()
    };
    // the demo's latents are [4, 8, 8, 8]; Latte also predicts a variance
    for (file, outputs) in [("demo/diffusion.yaml", 4), ("latte/demo.yaml", 8)] {
        let ports = Ports { outputs, ..Ports::of([4, 8, 8, 8]) };
        let network = diffusion(file).network;
        let count = built(&|parameters| drop(network.build(&parameters.root(), &ports).unwrap()));
        let plan = plan(file, &[]);
        assert_eq!((plan.parameters, plan.trained, plan.averaged), (count, count, count), "{file}");
        assert_eq!(plan.forward, network.flops(&ports, [4, 8, 8, 8], 0), "{file}");
        // latents are encoded before
        assert_eq!(plan.step, 3 * plan.forward, "{file}");
    }
    let demo: AutoencoderExperiment = read(&source("experiments/demo/autoencoder.yaml"), &[]).unwrap();
    let discriminator = built(&|parameters| drop(demo.loss.discriminators(&parameters.root())));
    for codec in [demo.autoencoder.clone(), small_image_autoencoder()] {
        let count = built(&|parameters| drop(codec.build(&parameters.root())));
        let settings = format!("autoencoder={}", serde_json::to_string(&codec).unwrap());
        let plan = plan("demo/autoencoder.yaml", &[&settings]);
        assert_eq!(plan.parameters, count + discriminator, "{settings}");
        assert_eq!(plan.forward, codec.flops(16, 32, 32).iter().sum::<i64>(), "{settings}");
    }
}

fn small_image_autoencoder() -> CodecConfig {
    let config = ImageAutoencoderConfig { widths: vec![32, 64], norm_groups: 8, ..ImageAutoencoderConfig::default() };
    config.into()
}

/// What is said of an experiment beside its own network: its codec, its classes, what it recomputes.
#[test]
fn codec_classes_and_recomputation() {
    let names = |plan: &Plan| plan.activations.iter().map(|v| v.recompute.clone()).collect::<Vec<_>>();
    let usual = plan("demo/diffusion.yaml", &[]);
    // `make demo` leaves a trained codec
    let trained = Path::new("runs/demo/autoencoder").exists();
    let codec = if trained { "not --autoencoder" } else { "experiments/demo/autoencoder.yaml" };
    assert!(usual.notes[0].contains(codec), "{:?}", usual.notes);
    assert_eq!(usual.clips(8), 64, "batch 8, one pass, 8 GPUs");
    let again = plan("demo/diffusion.yaml", &["network.recompute=[1]", "trainer.accumulate=2"]);
    assert_eq!(
        (names(&usual), names(&again)),
        (vec!["false".into(), "true".into()], vec!["[1]".into(), "false".into()])
    );
    // what is recomputed is one pass more
    assert_eq!([usual.step, again.step], [3, 4].map(|passes| passes * usual.forward));
    // no gradient is computed of weights that stand still; narrower than the file's network, which only takes longer
    let narrow = ["unet.channels=32", "unet.multipliers=[1, 2]", "unet.attention_factors=[1]"];
    let adapters = plan("webvid/adapters.yaml", &narrow);
    let encoding = adapters.step - plan("webvid/adapters.yaml", &[&narrow[..], &["latents=x"]].concat()).step;
    let to_weights = (adapters.forward as f64 * adapters.trained as f64 / adapters.parameters as f64) as i64;
    // forward, backward, and what is recomputed
    assert!(encoding > 0 && adapters.trained < adapters.parameters / 5, "{adapters:?}");
    assert!((adapters.step - encoding - 3 * adapters.forward - to_weights).abs() < 10, "{adapters:?}");
    assert_eq!(again.clips(1), 16);
    // the number that Latte's authors give, with 101 classes; Stable Diffusion's image autoencoder is frozen
    let released = diffusion("latte/ucf101.yaml").network;
    let ports = Ports { outputs: 8, classes: Some(101), ..Ports::of([4, 16, 32, 32]) };
    let parameters = Parameters::unfilled(CPU);
    let _network = released.build(&parameters.root(), &ports).unwrap();
    assert_eq!(parameters.count(), 673_799_072);
    let [plain, latte] = [vec![], vec!["labels.classes=101"]]
        .map(|classes| plan("latte/ucf101.yaml", &[&["network.depth=2"][..], &classes].concat()));
    // a row for each class and one for none; 1152 wide
    assert_eq!((latte.parameters - plain.parameters, latte.frozen), (102 * 1152, 83_653_863));
    let unknown = plan("latte/demo.yaml", &["labels={}"]);
    assert!(unknown.notes.iter().any(|note| note.contains("labels.classes=N")), "{:?}", unknown.notes);
}

/// Numbers that follow from others by arithmetic alone.
#[test]
fn memory_and_hours_by_hand() {
    let mut plan = plan("demo/diffusion.yaml", &[]);
    let count = plan.parameters;
    assert_eq!(plan.state(1).map(|(_, bytes)| bytes)[..4], [4 * count, 4 * count, 8 * count, 4 * count]);
    assert_eq!((plan.state(1)[5].1, plan.state(8)[5].1), (0, 4 * count));
    (plan.trainer.shard_optimizer, plan.trainer.reduce_dtype) = (true, ReduceDtype::Bf16);
    let share = (count + 3) / 4;
    assert_eq!(plan.state(4).map(|(_, bytes)| bytes)[2..], [8 * share, 4 * share, 4 * plan.frozen, 2 * count]);
    assert_eq!(plan.state(1)[2].1, 8 * count);
    let kept = plan.activations[0].kept;
    let card = |bytes: i64, peak: f64, bandwidth: f64| Card {
        name: "x".into(),
        memory: bytes,
        rates: Some(Rates { peaks: [0.0, 8.0 * peak, peak], bandwidth }),
    };
    let room = |batch: i64| ((plan.state_bytes(1) + kept.bytes(batch)) as f64 / Card::USABLE).ceil() as i64 + 8;
    assert_eq!([0, 1, 7].map(|batch| plan.fits(&card(room(batch), 1.0, 1.0), 1, &kept)), [0, 1, 7]);

    // the demo trains in float32: on a card that moves bytes in no time its products alone count, and so on
    let near = |found: f64, wanted: f64| assert!((found / wanted - 1.0).abs() < 1e-9, "{found}, not {wanted}");
    let slow = plan.step_on(&card(1, 1e6, f64::INFINITY)).unwrap();
    near(slow.products, plan.kernels.flops() as f64 / (1e6 * Card::PEAK_REACHED));
    let narrow = plan.step_on(&card(1, f64::INFINITY, 1.0)).unwrap();
    near(narrow.memory, plan.kernels.bytes() as f64 / Card::BANDWIDTH_REACHED);
    let endless = plan.step_on(&card(1, f64::INFINITY, f64::INFINITY)).unwrap();
    near(endless.seconds(), plan.kernels.kernels() as f64 * Card::KERNEL);
    assert!(slow.memory == 0.0 && narrow.products == 0.0 && endless.starts == endless.seconds());
    let hours = |plan: &Plan| plan.hours(&card(1, 1e6, f64::INFINITY)).unwrap();
    near(hours(&plan), slow.seconds() * plan.trainer.steps as f64 / 3600.0);
    plan.trainer.tf32 = true;
    near(plan.step_on(&card(1, 1e6, f64::INFINITY)).unwrap().products, slow.products / 8.0);
    plan.trainer.minutes = Some(90.0);
    assert_eq!(hours(&plan), 1.5);
    assert_eq!(plan.hours(&Card::of_memory(16.0)), None);
}

/// The products of the kernels are those that the networks count from their settings; what is computed again is counted again,
/// and a second pass of a step is one more.
#[test]
fn kernels_compute_what_networks_count() {
    let near = |what: &str, found: i64, wanted: i64, within: f64| {
        let ratio = found as f64 / wanted as f64;
        println!("{what}: {found} of kernels, {wanted} of settings, {ratio:.4}");
        assert!((ratio - 1.0).abs() < within, "{what}: kernels compute {found}, the network says {wanted}");
    };
    for (file, overrides) in [
        ("demo/diffusion.yaml", vec![]),
        ("demo/diffusion.yaml", vec!["trainer.precision=bf16", "trainer.accumulate=2"]),
        ("demo/diffusion.yaml", vec!["network.recompute=true"]),
        ("latte/demo.yaml", vec![]),
        ("mcvd/demo.yaml", vec![]),
        ("tats/demo/transformer.yaml", vec!["latents=x"]),
    ] {
        let planned = plan(file, &overrides);
        let what = format!("{file} {overrides:?}");
        // the gradient by a network's own input is not computed, and attention's scores are once more on the way back
        near(&what, planned.kernels.flops(), planned.step * planned.clips(1), 0.05);
        if let Some(sampling) = &planned.sampling {
            near(&what, sampling.call.flops(), planned.trainer.batch * planned.forward, 0.01);
        }
        assert!(planned.kernels.kernels() > 100 && planned.kernels.bytes() > 20 * planned.parameters, "{what}");
    }
    // a bfloat16 pass moves fewer bytes
    let bytes = |overrides: &[&str]| plan("ucf101/diffusion.yaml", overrides).kernels.bytes();
    assert!(bytes(&["trainer.batch=32"]) < bytes(&["trainer.batch=32", "trainer.precision=f32"]) * 2 / 3);
    // with guidance the network sees twice the clips
    let [plain, guided] = ["labels.guidance=1", "labels.guidance=4"]
        .map(|labels| plan("latte/demo.yaml", &["labels.classes=8", labels]).sampling.unwrap());
    near("guidance", guided.call.flops(), 2 * plain.call.flops(), 0.02);
    assert_eq!(guided.whole().flops(), guided.calls * guided.call.flops() + guided.decoding.flops());
}

/// Times that were measured on an H200 and an H100 (experiments/bench), in milliseconds, of a step without clipping and average:
/// the roofline is not above them by more than 5 %, and not below three quarters of them. Latte was measured when its attention
/// over frames was LibTorch's, and U-Nets when their blocks added up in bfloat16, of which the roofline was 6 % more at batch 2
/// and 4 to 5 % less at batch 64.
#[test]
fn rooflines_are_near_what_was_measured() {
    const STEP: [&str; 4] =
        ["latents=x", "trainer.accumulate=1", "trainer.ema_decay=null", "trainer.clip_gradient=null"];
    let four_frames = ["data.frames=4", "trainer.batch=4"];
    let batches = ["2", "8", "16", "32", "64"].map(|batch| format!("trainer.batch={batch}"));
    let unets = batches.iter().zip([[21.6, 25.3], [35.9, 41.3], [57.2, f64::NAN], [98.9, 112.2], [184.8, 205.1]]);
    let mut cases: Vec<(&str, Vec<&str>, [f64; 2])> =
        unets.map(|(batch, measured)| ("ucf101/diffusion.yaml", vec![batch.as_str()], measured)).collect();
    cases.push(("latte/ucf101.yaml", four_frames.to_vec(), [51.4, 54.8]));
    for (file, overrides, measured) in cases {
        let planned = plan(file, &[&STEP[..], &overrides].concat());
        for (name, measured) in ["H200", "H100"].into_iter().zip(measured) {
            if measured.is_nan() {
                continue;
            }
            let card = Card::known().into_iter().find(|card| card.name == name).unwrap();
            let found = 1e3 * planned.step_on(&card).unwrap().seconds();
            println!("{file} {overrides:?}, {name}: {found:.1} ms by the roofline, {measured} measured");
            assert!(
                (0.75..1.05).contains(&(found / measured)),
                "{file} {overrides:?}: {found} ms, measured {measured}"
            );
        }
    }
}

/// What a backward pass adds to what its forward pass kept: the gradients that are on their way, at most as much again where
/// a network is small. Less than what was kept cannot be.
fn check(what: &str, plan: &Plan, batch: i64, measured: i64, most: f64) {
    let planned = plan.activations[0].kept.bytes(batch);
    println!("{what}: planned {planned}, measured {measured}, {:.3} times", measured as f64 / planned as f64);
    let ratio = measured as f64 / planned as f64;
    assert!((0.98..most).contains(&ratio), "{what}: {measured} bytes were measured, {planned} planned: {ratio}");
}

/// The gradients are there before, so that only what a step keeps besides counts.
fn with_gradients(parameters: &Parameters) {
    for (_, parameter) in parameters.trainable() {
        (parameter.sum(None) * 0.0).backward();
    }
    parameters.zero_grad();
}

#[test]
fn activations_are_those_of_a_step_of_denoisers() {
    const BF16: &str = "trainer.precision=bf16";
    const RECOMPUTE: &str = "network.recompute=true";
    for (file, overrides) in ["demo/diffusion.yaml", "latte/demo.yaml"].into_iter().flat_map(|file| {
        [vec![], vec![RECOMPUTE], vec![BF16], vec![BF16, RECOMPUTE]].map(|overrides| (file, overrides))
    }) {
        let overrides: Vec<String> = overrides.into_iter().map(String::from).collect();
        let experiment: DiffusionExperiment = read(&source("experiments").join(file), &overrides).unwrap();
        let outputs = if experiment.objective.learns_variance() { 8 } else { 4 };
        let ports = Ports { outputs, ..Ports::of([4, 8, 8, 8]) };
        let parameters = Parameters::new(CPU, 0);
        let network = experiment.network.build(&parameters.root(), &ports).unwrap();
        with_gradients(&parameters);
        let (z_t, t) = (noise(0, &[8, 4, 8, 8, 8]), Tensor::full([8], 500.0, (Kind::Float, CPU)));
        let half = experiment.trainer.precision == Precision::Bf16;
        let step = || {
            let _precision = Autocast::bfloat16(CPU, half);
            backward(&network.forward(&z_t, &t, &Inputs::default()).square().mean(Kind::Float));
        };
        let ((), measured) = as_on_gpu(|| peak_host_memory(step));
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        // what is on its way is as much where little is kept; where bfloat16 is emulated, float32 copies come on top
        let emulated = processor().bfloat16 != Bfloat16::Native;
        let most = match half && overrides.contains(&RECOMPUTE) {
            true if emulated => 2.5,
            true => 1.7,
            false => 1.25,
        };
        check(&format!("{file} {overrides:?}"), &plan(file, &overrides), 8, measured, most);
    }
}

#[test]
fn activations_are_those_of_a_step_of_autoencoders() {
    const DEMO: &str = "demo/autoencoder.yaml";
    for (file, codec) in [(DEMO, None), (DEMO, Some(small_image_autoencoder())), ("tats/demo/autoencoder.yaml", None)] {
        let mut overrides = vec!["loss.adversarial_start=0".to_string()];
        overrides.extend(codec.map(|codec| format!("autoencoder={}", serde_json::to_string(&codec).unwrap())));
        let experiment: AutoencoderExperiment = read(&source(&format!("experiments/{file}")), &overrides).unwrap();
        let parameters = Parameters::new(CPU, 0);
        let codec = as_on_gpu(|| experiment.autoencoder.build(&parameters.root()));
        let loss = experiment.loss.build(CPU, Kind::Float, 0, &Ranks::alone());
        let loss = loss.unwrap_or_else(|error| panic!("{error:#}"));
        with_gradients(&parameters);
        let x = noise(0, &[2, 3, 16, 32, 32]).clamp(-1.0, 1.0);
        let latent = experiment.autoencoder.latent_shape(16, 32, 32).unwrap();
        let z = noise(1, &[&[2], &latent[..]].concat());
        let step = || {
            let (encoded, reconstruction) = codec.train_pass(&x, &z, true);
            loss.backward_autoencoder(&TrainPass {
                x: &x,
                reconstruction: &reconstruction,
                encoded: &encoded,
                last_kernel: codec.last_kernel().unwrap(),
                samples: &[0, 1],
                step: 0,
                scale: 1.0,
            });
        };
        let ((), measured) = as_on_gpu(|| peak_host_memory(step));
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        check(experiment.autoencoder.name(), &plan(file, &overrides), 2, measured, 1.35);
    }
}

#[test]
fn activations_are_those_of_a_step_of_transformers() {
    const FILE: &str = "tats/demo/transformer.yaml";
    for overrides in [vec![], vec!["network.recompute=true"], vec!["trainer.precision=bf16"]] {
        let strings: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        let experiment: TransformerExperiment = read(&source("experiments").join(FILE), &strings).unwrap();
        let planned = plan(FILE, &overrides);
        // 16 frames of 32x32 are 4x8x8 codes of 256
        let sequences = Sequences { vocabulary: 256, length: 256, unmasked: 0 };
        let parameters = Parameters::new(CPU, 0);
        let network = Gpt::new(&parameters.root(), &experiment.network, sequences);
        assert_eq!((planned.parameters, planned.forward), (parameters.count(), experiment.network.flops(sequences)));
        let encoding = planned.step - plan(FILE, &[&overrides[..], &["latents=x"]].concat()).step;
        let passes = if experiment.network.recompute { 4 } else { 3 };
        assert!(encoding > 0 && planned.step - encoding == passes * planned.forward);
        with_gradients(&parameters);
        let [start, tokens] = [vec![8], vec![8, 256]].map(|shape| Tensor::zeros(shape, (Kind::Int64, CPU)));
        let half = experiment.trainer.precision == Precision::Bf16;
        let step = || {
            let _precision = Autocast::bfloat16(CPU, half);
            backward(&loss(&network, &start, &tokens).1);
        };
        let ((), measured) = as_on_gpu(|| peak_host_memory(step));
        check(&format!("{FILE} {overrides:?}"), &planned, 8, measured, 1.35);
    }
    let unknown = plan(FILE, &["labels={}"]);
    assert!(unknown.notes.iter().any(|note| note.contains("labels.classes=N")), "{:?}", unknown.notes);
    assert_eq!(plan("tats/transformer.yaml", &["labels.classes=101", "network.layers=1"]).forward, {
        let sequences = Sequences { vocabulary: 16_384 + 101, length: 1024, unmasked: 0 };
        GptConfig { layers: 1, ..GptConfig::default() }.flops(sequences)
    });
}

/// Attention over all places of all frames at once is counted as it is: its scores grow with the square of a clip, and no kernel
/// keeps them.
#[test]
fn what_grows_faster_than_clips_is_counted() {
    let network = "network={channels: 32, multipliers: [1], blocks_per_level: 1, attention_factors: [1], heads: 4, \
                   attention: joint}";
    let [short, long] =
        ["data.frames=16", "data.frames=64"].map(|frames| plan("demo/diffusion.yaml", &[network, frames]));
    for plan in [&short, &long] {
        assert!((plan.kernels.flops() as f64 / (plan.step * plan.clips(1)) as f64 - 1.0).abs() < 0.3, "{plan:?}");
    }
    assert!(long.forward > 6 * short.forward && long.kernels.flops() > 6 * short.kernels.flops());
}

/// On the command line: nothing but the file need be there, and what is missing is said.
#[test]
fn plan_needs_no_data() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let write = |name: &str, text: &str| std::fs::write(at.join(name), text).unwrap();
    let training = "data: {dataset: {kind: folder, root: nowhere}, frames: 16, resolution: 32}\n\
                    optimizer: {kind: adam, learning_rate: 1.0e-3}\ntrainer: {steps: 100, batch: 2}\n";
    let unet = "unet: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 4}\n";
    write("pixels.yaml", &[training, unet, "autoencoder: pixels\n"].concat());
    let said = succeed_in(at, &["plan", "pixels.yaml", "trainer.batch=4", "--device-memory", "12", "--ranks", "2"]);
    println!("{}", said.out);
    for words in [
        "of latents [3, 16, 32, 32] of the pixels",
        "8 clips (batch 4",
        "RTX 4090",
        "12 GB",
        "recompute: true",
        "a training step",
    ] {
        assert!(said.out.contains(words), "{words}: {}", said.out);
    }
    write("latents.yaml", &[training, unet, "autoencoder: runs/mine\n"].concat());
    let missing = run_in(at, &["plan", "latents.yaml"]);
    assert!(
        missing.error(2).contains("there is no runs/mine") && missing.err.contains("--autoencoder"),
        "{}",
        missing.err
    );
    let codec = "{kind: video_autoencoder, channels: 8, factors: [2, 4, 4], norm_groups: 8}";
    let said = succeed_in(at, &["plan", "latents.yaml", "--autoencoder", codec, "--markdown"]).out;
    assert_eq!(said.lines().count(), 3, "{said}");
    for (file, words) in [("data: {}\n", "for `lvdm train`"), ("trainer: {steps: x}\n", "latents.yaml")] {
        write("latents.yaml", file);
        let said = run_in(at, &["plan", "latents.yaml"]);
        assert!(said.error(2).contains(words), "{}", said.err);
    }
}

/// The table of docs/gpus.md is what the command above it prints. What LibTorch keeps in passes on a CPU may differ a little
/// from one processor to another; all else is exact.
#[test]
fn the_table_of_the_docs_is_what_the_command_prints() {
    let page = std::fs::read_to_string(source("docs/gpus.md")).unwrap();
    let block = page.split("```sh\n").find(|block| block.starts_with("lvdm plan --markdown")).expect("the command");
    let (command, rest) = block.split_once("```").unwrap();
    let words = words(&command.replace("\\\n", " "));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let said = succeed_in(Path::new(env!("CARGO_MANIFEST_DIR")), &words[1..]).out;
    let table = |text: &str| -> Vec<Vec<String>> {
        let rows = text.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
        rows.map(|row| row.split('|').map(|cell| cell.trim().to_string()).collect()).collect()
    };
    // released numbers: the paper's network, Latte without classes, Stable Diffusion's with temporal layers, its adapters
    for number in ["548,904,580", "673,681,568", "958,924,964", "99,404,000", "6,383,616"] {
        assert!(said.contains(&format!("| {number} |")), "{number}: {said}");
    }
    let (found, shown) = (table(&said), table(rest));
    assert_eq!(found.len(), shown.len(), "{said}");
    for (found, shown) in found.iter().zip(&shown) {
        for (column, (found, shown)) in found.iter().zip(shown).enumerate() {
            let numbers = |cell: &str| -> Vec<f64> {
                let parts = cell.replace(',', "").replace("none", "0");
                parts.split([' ', '(', ')', '/']).filter_map(|word| word.parse().ok()).collect()
            };
            let (a, b) = (numbers(found), numbers(shown));
            // memory, and the batch that follows from it
            let counted = matches!(column, 5 | 6 | 8);
            let near = a.len() == b.len()
                && a.iter()
                    .zip(&b)
                    .all(|(a, b)| (a - b).abs() <= 0.05 * a.max(*b) + if column == 8 { 1.0 } else { 0.01 });
            assert!(found == shown || counted && near, "docs/gpus.md says {shown}, the command {found}: {said}");
        }
    }
}

/// The words of a shell command, of which some are quoted.
fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (i, part) in command.split('\'').enumerate() {
        match i % 2 {
            0 => words.extend(part.split_whitespace().map(String::from)),
            _ => words.push(part.to_string()),
        }
    }
    words
}
