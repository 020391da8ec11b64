//! The shipped experiment files: they load, build their networks, and no key of theirs can be misspelt.

#[path = "../common/mod.rs"]
mod common;
mod comparisons;
mod keys;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use common::source;
use lvdm::{
    bench::BenchExperiment,
    codecs::{AutoencoderConfig, CodecConfig, ImageAutoencoderConfig, LatentSpace},
    commands::DemoData,
    data::DataConfig,
    experiment::{
        AutoencoderExperiment, CurveSource, DiffusionExperiment, DiffusionSpace, EvaluationExperiment, Generated,
        LongEvaluationExperiment, TransformerExperiment, UserError, parse, protocol,
    },
    metrics::ProtocolConfig,
    models,
    networks::UNetConfig,
    nn::Parameters,
};
use serde_yaml::Value;

/// What an experiment file is for, seen by what it says.
#[derive(Debug, PartialEq, Clone, Copy)]
enum Kind {
    Autoencoder,
    Diffusion,
    Transformer,
    Evaluation,
    LongEvaluation,
    Protocol,
    DemoData,
    Bench,
}

fn kind(value: &Value) -> Kind {
    if value.get("repeats").is_some() {
        Kind::Bench
    } else if value.get("generated").is_some() {
        Kind::Evaluation
    } else if value.get("curves").is_some() {
        Kind::LongEvaluation
    } else if value.get("clips").is_some() {
        Kind::Protocol
    } else if value.get("videos").is_some() {
        Kind::DemoData
    } else if value.get("network").is_some_and(|network| network.get("layers").is_some()) {
        Kind::Transformer
    } else if value.get("autoencoder").is_some_and(Value::is_string) {
        Kind::Diffusion
    } else {
        Kind::Autoencoder
    }
}

/// The clips of a training's file; videos of blocks have a length of their own.
fn trained(path: &Path) -> DataConfig {
    let text = fs::read_to_string(path).unwrap();
    if kind(&serde_yaml::from_str(&text).unwrap()) == Kind::Transformer {
        return parse::<TransformerExperiment>("transformer", &text, &[]).unwrap().data;
    }
    let DiffusionExperiment { mut data, blocks, .. } = parse("diffusion", &text, &[]).unwrap();
    data.frames = blocks.and_then(|blocks| blocks.video_frames).unwrap_or(data.frames);
    data
}

/// Reads a text as its kind says, and throws the result away.
fn check(kind: Kind, name: &str, text: &str) -> Result<(), UserError> {
    match kind {
        Kind::Autoencoder => parse::<AutoencoderExperiment>(name, text, &[]).map(drop),
        Kind::Diffusion => parse::<DiffusionExperiment>(name, text, &[]).map(drop),
        Kind::Transformer => parse::<TransformerExperiment>(name, text, &[]).map(drop),
        Kind::Evaluation => parse::<EvaluationExperiment>(name, text, &[]).map(drop),
        Kind::LongEvaluation => parse::<LongEvaluationExperiment>(name, text, &[]).map(drop),
        Kind::Protocol => parse::<ProtocolConfig>(name, text, &[]).map(drop),
        Kind::DemoData => parse::<DemoData>(name, text, &[]).map(drop),
        Kind::Bench => parse::<BenchExperiment>(name, text, &[]).map(drop),
    }
}

struct Shipped {
    path: PathBuf,
    name: String,
    text: String,
    value: Value,
    kind: Kind,
}

fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(yaml_files(&path));
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn shipped() -> Vec<Shipped> {
    let files: Vec<Shipped> = yaml_files(&source("experiments"))
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let value: Value = serde_yaml::from_str(&text).unwrap();
            let name = path.strip_prefix(source("")).unwrap().display().to_string();
            Shipped { name, kind: kind(&value), value, text, path }
        })
        .collect();
    let kinds = [
        Kind::Autoencoder,
        Kind::Diffusion,
        Kind::Transformer,
        Kind::Evaluation,
        Kind::LongEvaluation,
        Kind::Protocol,
        Kind::DemoData,
    ];
    for wanted in kinds {
        assert!(files.iter().any(|file| file.kind == wanted), "no experiment of kind {wanted:?}");
    }
    files
}

fn read<T: serde::Serialize + serde::de::DeserializeOwned>(file: &Shipped) -> T {
    parse(&file.name, &file.text, &[]).unwrap_or_else(|error| panic!("{error}"))
}

/// The shipped experiment of which `run` is the default run folder.
fn experiment_of(run: &Path) -> Option<PathBuf> {
    let file = source("experiments").join(run.strip_prefix("runs").ok()?).with_extension("yaml");
    file.exists().then_some(file)
}

/// The shipped experiment that makes a run, and the resolution of its clips: experiments/long/README.md trains those of
/// UCF-101 anew, smaller.
fn made_by(run: &Path) -> Option<(PathBuf, i64)> {
    let own = experiment_of(run).map(|path| (path.clone(), trained(&path).resolution));
    own.or_else(|| {
        let name = run.strip_prefix("runs/long/ucf101").ok()?;
        let path = source("experiments/ucf101").join(name).with_extension("yaml");
        let readme = fs::read_to_string(source("experiments/long/README.md")).unwrap();
        let side = readme.split("data.resolution=").nth(1)?.lines().next()?.parse().ok()?;
        path.exists().then_some((path, side))
    })
}

/// The latent that a shipped experiment's network sees, `[C, F, h, w]`.
fn latent_of(experiment: &DiffusionExperiment) -> [i64; 4] {
    let data = &experiment.data;
    let clip = match &experiment.autoencoder {
        DiffusionSpace::Pixels => {
            LatentSpace::pixels(tch::Device::Cpu).latent_shape(data.frames, data.resolution, data.resolution)
        }
        DiffusionSpace::Latents(run) => {
            let autoencoder: CodecConfig = match experiment_of(run) {
                None if experiment.text.is_some() => ImageAutoencoderConfig::default().into(),
                None => AutoencoderConfig::default().into(),
                Some(path) => {
                    let text = fs::read_to_string(&path).unwrap();
                    parse::<AutoencoderExperiment>("autoencoder", &text, &[]).unwrap().autoencoder
                }
            };
            autoencoder.latent_shape(data.frames, data.resolution, data.resolution)
        }
    };
    models::seen(clip.unwrap(), experiment).unwrap()
}

/// Each loads, says what it is for and how it is run, and its networks fit together.
#[test]
fn every_experiment_loads_and_builds() {
    for file in shipped() {
        let head = file.text.lines().next().unwrap();
        assert!(head.starts_with("# ") && head.contains("lvdm "), "{}: its head names no command", file.name);
        if head.contains(".yaml") {
            assert!(head.contains(&file.name), "{}: its head names another file", file.name);
        }
        match file.kind {
            Kind::Autoencoder => {
                let experiment: AutoencoderExperiment = read(&file);
                let data = &experiment.data;
                data.clip().unwrap();
                experiment.autoencoder.validate().unwrap();
                experiment.autoencoder.latent_shape(data.frames, data.resolution, data.resolution).unwrap();
                experiment.optimizer.validate().unwrap();
                experiment.trainer.validate().unwrap();
                let parameters = Parameters::unfilled(tch::Device::Cpu);
                experiment.autoencoder.build(&parameters.root());
                assert!(parameters.count() > 1000);
                let parameters = Parameters::unfilled(tch::Device::Cpu);
                experiment.loss.validate().unwrap();
                drop(experiment.loss.discriminators(&parameters.root()));
                assert!(parameters.count() > 1000);
            }
            Kind::Diffusion => {
                let experiment: DiffusionExperiment = read(&file);
                let latent = latent_of(&experiment);
                if let Some(conditioning) = &experiment.conditioning {
                    conditioning.validate(latent[1], experiment.schedule.build().unwrap().levels()).unwrap();
                }
                if experiment.text.is_some() {
                    let recompute = experiment.unet().unwrap().recompute.clone();
                    let imported = UNetConfig { recompute, ..UNetConfig::stable_diffusion() };
                    assert_eq!(experiment.unet().unwrap(), &imported, "{}: it starts from another network", file.name);
                } else if let Some(start) = &experiment.start_from {
                    let text = fs::read_to_string(experiment_of(start).expect("a shipped experiment")).unwrap();
                    let short: DiffusionExperiment = parse("start", &text, &[]).unwrap();
                    assert_eq!(
                        short.unet().unwrap(),
                        experiment.unet().unwrap(),
                        "{}: it starts from another network",
                        file.name
                    );
                }
                let multiples = experiment.network.multiple_of();
                let fits = latent[1..].iter().zip(multiples).all(|(size, multiple)| size % multiple == 0);
                assert!(fits, "{}: a latent of {latent:?} is no multiple of {multiples:?}", file.name);
                experiment.network.validate().unwrap();
                experiment.optimizer.validate().unwrap();
                experiment.trainer.validate().unwrap();
                let path = experiment.schedule.build().unwrap();
                experiment.objective.validate(&*path).unwrap();
                experiment.sampler.start(&*path).unwrap();
                let parameters = Parameters::unfilled(tch::Device::Cpu);
                experiment.network.build(&parameters.root(), &models::ports(&experiment, latent)).unwrap();
                assert!(parameters.count() > 10_000);
            }
            Kind::Transformer => {
                let experiment: TransformerExperiment = read(&file);
                experiment.data.clip().unwrap();
                experiment.network.validate().unwrap();
                experiment.optimizer.validate().unwrap();
                experiment.trainer.validate().unwrap();
                experiment.sampler.validate().unwrap();
                let codes = experiment_of(&experiment.autoencoder).expect("a shipped experiment");
                let codes: AutoencoderExperiment =
                    parse("autoencoder", &fs::read_to_string(codes).unwrap(), &[]).unwrap();
                assert!(codes.autoencoder.codebook().is_some(), "{}: its autoencoder makes no codes", file.name);
            }
            Kind::Evaluation => {
                let experiment: EvaluationExperiment = read(&file);
                experiment.protocol().unwrap_or_else(|error| panic!("{}: {error:#}", file.name));
                experiment.real.clip().unwrap();
                if let Generated::Run { run, .. } = &experiment.generated {
                    let path =
                        experiment_of(run).unwrap_or_else(|| panic!("{}: who makes {}?", file.name, run.display()));
                    let trained = trained(&path);
                    let shape = |data: &DataConfig| (data.frames, data.frame_stride, data.resolution);
                    assert_eq!(shape(&trained), shape(&experiment.real), "{}: clips of another shape", file.name);
                }
            }
            Kind::LongEvaluation => {
                let experiment: LongEvaluationExperiment = read(&file);
                experiment.protocol().unwrap_or_else(|error| panic!("{}: {error:#}", file.name));
                for curve in &experiment.curves {
                    let CurveSource::Sampled(long) = &curve.source else { continue };
                    for run in [Some(&long.prediction), long.interpolation.as_ref()].into_iter().flatten() {
                        let (path, resolution) = made_by(run).unwrap_or_else(|| panic!("who makes {}?", run.display()));
                        assert_eq!(resolution, experiment.real.resolution, "{}", file.name);
                        let text = fs::read_to_string(&path).unwrap();
                        if kind(&serde_yaml::from_str(&text).unwrap()) == Kind::Transformer {
                            continue;
                        }
                        let trained: DiffusionExperiment = parse("diffusion", &text, &[]).unwrap();
                        // a model that is given frames, its own past, or one that is led to them
                        if trained.blocks.is_none() {
                            long.guidance.validate(trained.conditioning.as_ref()).unwrap();
                        }
                        let own = trained.sampler;
                        let sampler = long.sampler.as_ref().map_or(own, |choice| choice.over(&own).unwrap());
                        sampler.start(&*trained.schedule.build().unwrap()).unwrap();
                    }
                }
            }
            Kind::Protocol => {
                let config: ProtocolConfig = read(&file);
                config.validate().unwrap();
                let name = file.path.file_stem().unwrap().to_str().unwrap();
                assert_eq!(config.name, name, "{}", file.name);
                assert_eq!(protocol(name).unwrap(), config, "{} is not built in", file.name);
            }
            Kind::Bench => {
                let bench: BenchExperiment = read(&file);
                lvdm::experiment::Experiment::validate(&bench).unwrap();
                assert!(bench.unet.is_some() || bench.autoencoder.is_some(), "{} times nothing", file.name);
            }
            Kind::DemoData => {
                let data: DemoData = read(&file);
                assert!(data.videos.train > 0 && data.videos.test > 1 && data.latent_clips > 0);
                assert!(file.path.parent().unwrap().join("evaluate.yaml").exists());
            }
        }
    }
}

/// All key paths of a tree.
fn paths(value: &Value, at: &[String], found: &mut Vec<Vec<String>>) {
    let Value::Mapping(mapping) = value else { return };
    for (key, child) in mapping {
        let path = [at, &[key.as_str().unwrap().to_string()]].concat();
        found.push(path.clone());
        paths(child, &path, found);
    }
}

/// The tree with the key at `path` renamed.
fn rename(value: &Value, path: &[String], new: &str) -> Value {
    let mut copy = value.clone();
    let mut at = &mut copy;
    for key in &path[..path.len() - 1] {
        at = at.get_mut(key.as_str()).unwrap();
    }
    let mapping = at.as_mapping_mut().unwrap();
    let child = mapping.remove(path.last().unwrap().as_str()).unwrap();
    mapping.insert(new.into(), child);
    copy
}

/// Two ways to mistype a word.
fn typos(key: &str) -> [String; 2] {
    let mut letters: Vec<char> = key.chars().collect();
    let last = letters.len() - 1;
    let doubled = format!("{key}{}", letters[last]);
    // the first pair of neighbours that differ
    if let Some(i) = (0..last).find(|&i| letters[i] != letters[i + 1]) {
        letters.swap(i, i + 1);
    }
    [letters.into_iter().collect(), doubled]
}

/// Any one key misspelt: refused, and the error names the misspelt key or the one that is missing.
#[test]
fn no_key_can_be_misspelt() {
    let (mut tried, mut different) = (0, BTreeSet::new());
    for file in shipped() {
        let whole = serde_yaml::to_string(&file.value).unwrap();
        check(file.kind, &file.name, &whole).unwrap();
        let mut found = Vec::new();
        paths(&file.value, &[], &mut found);
        for path in found {
            let key = path.last().unwrap();
            for typo in typos(key) {
                let text = serde_yaml::to_string(&rename(&file.value, &path, &typo)).unwrap();
                let Err(error) = check(file.kind, &file.name, &text) else {
                    panic!("{}: `{}` written as `{typo}` is not noticed", file.name, path.join("."))
                };
                let error = error.to_string();
                assert!(error.contains(&typo) || error.contains(&format!("`{key}`")), "`{typo}` for `{key}`: {error}");
                assert_eq!(error.lines().count(), 1, "{error}");
                tried += 1;
            }
            different.insert(key.clone());
        }
    }
    assert!(tried > 100 && different.len() > 30, "{tried} typos of {} keys", different.len());
}

/// Each step of a data set's chain that several processes can share is given them, under either spelling of its name.
#[test]
fn make_runs_a_chain_on_several_gpus() {
    for (goal, set) in [("ucf101", "ucf101"), ("sky-timelapse", "sky_timelapse"), ("sky_timelapse", "sky_timelapse")] {
        let said = |more: &[&str]| {
            let mut make = std::process::Command::new("make");
            make.current_dir(env!("CARGO_MANIFEST_DIR")).args(["-n", goal]).args(more);
            let output = make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").output().expect("make");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let several = said(&["NPROC=8"]);
        let steps: Vec<&str> = several
            .lines()
            .filter(|line| ["lvdm train", "lvdm sample", "lvdm evaluate"].iter().any(|verb| line.contains(verb)))
            .collect();
        assert_eq!(steps.len(), 8, "{several}");
        for step in steps {
            assert!(step.ends_with(" --nproc 8") && step.contains(set), "{step}");
        }
        assert!(!said(&[]).contains("--nproc"));
    }
}

/// What a GPU would otherwise decide for whoever runs it. The demo's figures are of float32.
#[test]
fn every_experiment_states_how_exactly_it_computes() {
    for Shipped { name, value, .. } in shipped() {
        let of_demo = name.contains("/demo/") || name.ends_with("/demo.yaml");
        let mut places = vec![value.get("trainer"), value.get("generated")];
        places.extend(value.get("curves").and_then(Value::as_sequence).into_iter().flatten().map(|c| c.get("source")));
        for place in places.into_iter().flatten() {
            let precision = place.get("precision").and_then(Value::as_str);
            let tf32 = place.get("tf32").and_then(Value::as_bool).unwrap_or(false);
            match (of_demo, precision) {
                (true, Some("f32")) => assert!(!tf32, "{name}"),
                (false, Some("bf16")) => {}
                (false, Some("f32")) => assert!(tf32, "{name}: float32 without TF32 is several times slower on a GPU"),
                _ => panic!("{name}: precision is {precision:?}"),
            }
        }
    }
}

/// `unet:` is the older name of `network:` and is read in files, in overrides of either name, and in checkpoints; errors
/// name the key that was written.
#[test]
fn unet_is_an_older_name_of_network() {
    let text = |network: &str| {
        format!(
            "data: {{dataset: {{kind: folder, root: clips}}, frames: 4, resolution: 32}}\nautoencoder: pixels\n{network}\n\
             optimizer: {{kind: adamw, learning_rate: 1.0e-4}}\ntrainer: {{steps: 1, batch: 1}}\n"
        )
    };
    let read = |network: &str, overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        parse::<DiffusionExperiment>("x.yaml", &text(network), &overrides)
    };
    let (old, new) = ("unet: {channels: 64, heads: 2}", "network: {kind: unet3d, channels: 64, heads: 2}");
    let wanted = UNetConfig { channels: 64, heads: 2, ..UNetConfig::default() };
    for network in [old, new] {
        assert_eq!(read(network, &[]).unwrap().unet().unwrap(), &wanted, "{network}");
        for key in ["unet", "network"] {
            let found = read(network, &[&format!("{key}.channels=96"), "network.blocks_per_level=1"]).unwrap();
            let unet = found.unet().unwrap();
            assert_eq!((unet.channels, unet.heads, unet.blocks_per_level), (96, 2, 1), "{network} {key}");
            let error = read(network, &[&format!("{key}.channels=wide")]).unwrap_err().0;
            assert!(error.starts_with(&format!("override `{key}.channels`: ")), "{error}");
        }
    }
    assert_eq!(read("", &["unet.channels=64", "network.heads=2"]).unwrap().unet().unwrap(), &wanted);
    for (network, words) in [
        ("unet: {chanels: 64}", "x.yaml:3: unknown key `unet.chanels`; did you mean `channels`?"),
        ("network: {chanels: 64}", "x.yaml:3: unknown key `network.chanels`; did you mean `channels`?"),
        ("network: {kind: unet3d, heads: many}", "x.yaml:3: `network.heads`: "),
        ("unet: {heads: many}", "x.yaml:3: `unet.heads`: "),
        ("network: {kind: unet3}", "did you mean `unet3d`?"),
        ("unte: {channels: 64}", "x.yaml:3: unknown key `unte`; did you mean `unet`?"),
        ("unet: {}\nnetwork: {}", "x.yaml:3: `unet` is the older name of `network`, and the file has both"),
    ] {
        let error = read(network, &[]).unwrap_err().0;
        assert!(error.contains(words), "{network}: {error}");
    }
    // as checkpoints hold it, and as they held it
    let now = serde_json::to_value(read(old, &[]).unwrap()).unwrap();
    assert_eq!((&now["network"]["kind"], &now["unet"]), (&"unet3d".into(), &serde_json::Value::Null));
    let mut before = now.clone();
    let mut unet = before.as_object_mut().unwrap().remove("network").unwrap();
    unet.as_object_mut().unwrap().remove("kind");
    before["unet"] = unet;
    let found: DiffusionExperiment = serde_json::from_value(before).unwrap();
    assert_eq!(serde_json::to_value(found).unwrap(), now);
}
