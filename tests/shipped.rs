//! Every shipped experiment is run, for two steps and at a reduced size, in the way that its head says.

mod common;

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::Mutex,
    time::Instant,
};

use common::{
    contents, moving_clips, source, succeed_in,
    text_runs::{import, write_diffusers},
};
use lvdm::data::{
    index::{IndexEntry, write_index},
    write_video,
};

/// Trainings: two steps of one clip.
const STEPS: &str = "trainer.steps=2 trainer.batch=1 trainer.accumulate=1 trainer.log_every=1 trainer.checkpoint_every=2 \
                     trainer.device=cpu data.workers=1";
/// U-Nets keep their levels and blocks.
const THIN: &str = "unet.channels=8 unet.norm_groups=4 sampler.steps=2";
/// Transformers keep their patches.
const SHALLOW: &str = "network.depth=2 network.hidden_size=16 network.heads=2 sampler.steps=2";
/// Evaluations: the fewest clips that there can be.
const FEW: &str = "evaluation={clips: 2} real.workers=1";

/// One call of `lvdm`: the verb, a file below `experiments/` without its ending, and what is replaced in it.
type Call = (&'static str, String, String);

fn call(verb: &'static str, file: impl Into<String>, overrides: &[&str]) -> Call {
    (verb, file.into(), overrides.join(" "))
}

/// The files of one data set, each behind those that it builds on.
fn chain_of(set: &str) -> Vec<Call> {
    let of_demo = set == "demo";
    // factors of 8 and four levels leave one place of 64 pixels
    let side = if of_demo { 32 } else { 64 };
    let size = format!("data.resolution={side}");
    let real = format!("real.frames=16 real.resolution={side}");
    let curves = |names: &[&str]| -> String {
        let of = |i: usize| format!("curves.{i}.source.sampler.steps=2 curves.{i}.source.batch=2");
        (0..names.len()).map(of).collect::<Vec<_>>().join(" ")
    };
    let file = |name: &str| format!("{set}/{name}");
    let denoiser = |name: &str, more: &str| call("train diffusion", file(name), &[STEPS, THIN, &size, more]);
    let short = "videos=2 frames=16";
    let mut calls = vec![call(
        "train autoencoder",
        file("autoencoder"),
        &[
            STEPS,
            "data.resolution=32",
            "autoencoder.channels=4 autoencoder.norm_groups=4 loss.adversarial_start=1 loss.discriminator.channels=4",
        ],
    )];
    calls.extend([
        denoiser("diffusion", ""),
        denoiser("continuation", ""),
        denoiser("continuation_clean", ""),
        denoiser("prediction", "data.frame_stride=1"),
        denoiser("interpolation", "data.frame_stride=1"),
        call("evaluate", file("evaluate"), &[FEW, &real, "generated.sampler.steps=2 generated.batch=2"]),
        call("evaluate-long", file("long_ablation"), &[FEW, &real, short, &curves(&["clean", "0", "0.1", "0.5"])]),
    ]);
    if !of_demo {
        calls.push(call(
            "evaluate-long",
            file("long"),
            &[FEW, &real, short, &curves(&["autoregressive", "hierarchical"])],
        ));
    }
    let small = [STEPS, THIN, &size];
    let evaluation = [FEW, &real, "generated.sampler.steps=2 generated.batch=2"];
    if of_demo {
        for name in ["factorized", "joint"] {
            calls.push(call("train diffusion", format!("ablation/demo/{name}"), &small));
            calls.push(call("evaluate", format!("ablation/demo/evaluate_{name}"), &evaluation));
        }
    }
    let blocks = [STEPS, "network.channels=8 network.head_width=8 sampler.steps=2", &size];
    if of_demo || set == "ucf101" {
        let of = |name: &str| format!("efficiency/{set}/{name}");
        calls.push(call("train diffusion", of("latents"), &small));
        calls.push(call("train diffusion", of("pixels"), &[&small[..], &["data.resolution=16"]].concat()));
        calls.extend(cascade([&of("cascade_base"), &of("cascade")]));
        calls.push(call("train diffusion", of("mcvd"), &blocks));
        calls.push(call("evaluate", of("evaluate"), &evaluation));
        calls.push(call("train diffusion", if of_demo { "mcvd/demo" } else { "mcvd/ucf101" }, &blocks));
    }
    if of_demo {
        calls.push(call("evaluate", "mcvd/demo/evaluate", &[FEW, &real, "generated.batch=2"]));
        calls.push(call("train diffusion", "latte/demo", &[STEPS, SHALLOW, &size]));
        let thin = THIN.replace("unet.", "network.");
        for run in ["unet_noise", "unet_velocity", "unet_flow", "latte", "latte_flow", "unet_class"] {
            let network = if run.starts_with("unet") { &thin } else { SHALLOW };
            calls.push(call("train diffusion", format!("comparison/demo/{run}"), &[STEPS, network, &size]));
            calls.push(call("evaluate", format!("comparison/demo/evaluate_{run}"), &evaluation));
        }
        calls.push(call("evaluate", "comparison/demo/evaluate_unet_class_guided", &evaluation));
        calls.extend(tats("tats/demo"));
        calls.push(call("evaluate", "tats/demo/evaluate", &[FEW, &real, "generated.batch=2"]));
        let quick = "curves.0.source.sampler.steps=2 curves.1.source.sampler.steps=2 curves.4.source.sampler.steps=2 \
                     curves.5.source.sampler.steps=2";
        calls.push(call("evaluate-long", "long/demo", &[FEW, &real, short, quick]));
    }
    if set == "ucf101" {
        let thin = THIN.replace("unet.", "network.");
        for path in ["class", "flow", "edm"] {
            calls.push(call("train diffusion", format!("ucf101/diffusion_{path}"), &[STEPS, &thin, &size]));
        }
        calls.push(call("train diffusion", "ablation/ucf101/joint", &small));
        calls.push(call("evaluate", "ablation/ucf101/evaluate_joint", &evaluation));
        calls.extend(tats("tats"));
        let autoencoder = "autoencoder=runs/ucf101/autoencoder";
        calls.push(call("train diffusion", "mcvd/latents", &[&blocks[..], &[autoencoder]].concat()));
        // the runs of the resolution of this test
        let runs = "curves.0.source.prediction=runs/ucf101/continuation curves.1.source.prediction=runs/ucf101/prediction \
                    curves.1.source.interpolation=runs/ucf101/interpolation curves.5.source.prediction=runs/ucf101/diffusion";
        let quick = "curves.0.source.sampler.steps=2 curves.1.source.sampler.steps=2 curves.5.source.sampler.steps=2 \
                     evaluation={clips: 2}";
        calls.push(call("evaluate-long", "long/ucf101", &[FEW, &real, short, runs, quick]));
    }
    calls
}

fn webvid() -> Vec<Call> {
    let network = "data.frames=4 data.frame_stride=1 data.resolution=16 unet.channels=32 unet.multipliers=[1,2] \
                   unet.blocks_per_level=1 unet.attention_factors=[1] unet.heads=2 unet.norm_groups=16 \
                   unet.context_width=24 sampler.steps=2";
    ["diffusion", "temporal", "adapters"]
        .map(|name| call("train diffusion", format!("webvid/{name}"), &[STEPS, network]))
        .into()
}

/// TATS: the autoencoder with a codebook, and the transformers over its codes.
fn tats(at: &str) -> Vec<Call> {
    let small = "data.resolution=32 autoencoder.channels=4 autoencoder.codebook.codes=16 loss.adversarial_start=1 \
                 loss.discriminator.channels=4";
    // factors of 8 leave few codes
    let thin = "data.resolution=32 network.layers=1 network.heads=2 network.width=8";
    let autoencoder = call("train autoencoder", format!("{at}/autoencoder"), &[STEPS, small]);
    let transformer = |name: &str| call("train transformer", format!("{at}/{name}"), &[STEPS, thin]);
    [autoencoder].into_iter().chain(["transformer", "sparse", "interpolation"].map(transformer)).collect()
}

/// In the latents of Stable Diffusion's image autoencoder.
fn latte() -> Vec<Call> {
    let small = "data.resolution=16 data.frames=4";
    ["ucf101", "sky_timelapse", "taichi"]
        .map(|name| call("train diffusion", format!("latte/{name}"), &[STEPS, SHALLOW, small]))
        .into()
}

/// Both stages of a cascade, with the base that is trained here.
fn cascade([base, second]: [&str; 2]) -> [Call; 2] {
    let network = "network.channels=8 network.norm_groups=4 network.head_width=null network.heads=2 sampler.steps=2";
    let [low, high] = ["data.resolution=8", "data.resolution=16"];
    [
        call("train diffusion", base, &[STEPS, network, low, "images=2"]),
        call("train diffusion", second, &[STEPS, network, high, "superresolution.resolution=8"]),
    ]
}

/// The published one, and the two stages as one model.
fn vdm() -> Vec<Call> {
    let few = "generated.sampler.steps=2 generated.batch=2 evaluation.metrics=[frame_distance]";
    let evaluate = call("evaluate", "vdm/evaluate", &[FEW, "real.frames=16 real.resolution=16", few]);
    cascade(["vdm/base", "vdm/superresolution"]).into_iter().chain([evaluate]).collect()
}

fn bench() -> Vec<Call> {
    let once = "device=cpu warmup=0 repeats=1";
    let unet = "unet.network.channels=8 unet.network.norm_groups=4 unet.latent=[4,4,8,8]";
    let autoencoder = "autoencoder.network.channels=4 autoencoder.network.norm_groups=4 autoencoder.resolution=32";
    vec![
        call("bench", "bench/clip64", &[once, autoencoder]),
        call("bench", "bench/unet_c64", &[once, unet]),
        call("bench", "bench/text_c160", &[once, unet]),
        call("bench", "bench/latte", &[once, "unet.network.depth=2 unet.network.hidden_size=32 unet.latent=[4,4,8,8]"]),
        call(
            "bench",
            "bench/ucf101",
            &[
                once,
                unet,
                autoencoder,
                "unet.samplers.0.steps=2 unet.samplers.1.steps=2 unet.samplers.2.steps=2 i3d.videos=1 i3d.resolution=32 \
                 loader.batch=1",
            ],
        ),
    ]
}

/// What is not run here.
const ELSEWHERE: [&str; 5] = [
    // `lvdm demo`: tests/demo.rs
    "demo/data",
    // what makes them protocols is their size, hundreds of clips or frames: tests/evaluation.rs, tests/long_video.rs
    "protocols/lvdm16",
    "protocols/lvdm1024",
    "protocols/stylegan-v-16",
    "protocols/stylegan-v-128",
];

/// Videos for each data set, where its experiments look for them.
fn write_data(at: &Path) {
    let clips = moving_clips(3, 64, 32);
    let mut entries = Vec::new();
    let mut table = "videoid,name\n".to_string();
    for i in 0..3 {
        for folder in ["data/demo/train", "data/demo/test", "data/webvid/videos"] {
            write_video(&at.join(format!("{folder}/{i}.mp4")), &clips.get(i), 8.0).unwrap();
        }
        table += &format!("{i},a red cat\n");
        let path = at.join(format!("data/demo/train/{i}.mp4"));
        let (class, split) = (Some("Cats".into()), Some("train".into()));
        entries.push(IndexEntry { path, frames: 64, width: 32, height: 32, fps: Some(8.0), class, split });
    }
    fs::write(at.join("data/webvid/train.csv"), table).unwrap();
    for set in ["demo", "ucf101", "sky_timelapse", "taichi"] {
        write_index(&at.join(format!("data/{set}/index.jsonl")), &entries).unwrap();
    }
}

fn run(at: &Path, (verb, file, overrides): &Call) {
    let began = Instant::now();
    let path = format!("experiments/{file}.yaml");
    let head = fs::read_to_string(at.join(&path)).unwrap();
    let command = format!("lvdm {verb} {path}");
    assert!(head.lines().next().unwrap().ends_with(&command), "{path}: its head does not say `{command}`");
    // a value may have spaces: an override begins with its key
    let mut arguments: Vec<String> = verb.split(' ').map(String::from).collect();
    arguments.push(path);
    for word in overrides.split(' ').filter(|word| !word.is_empty()) {
        match word.split_once('=') {
            Some(_) => arguments.push(word.into()),
            None => *arguments.last_mut().unwrap() += &format!(" {word}"),
        }
    }
    let said = succeed_in(at, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    if verb.starts_with("train") {
        assert!(said.out.contains("trained to step 2 "), "{file}: {}", said.out);
        let metrics = fs::read_to_string(at.join(format!("runs/{file}/metrics.jsonl"))).unwrap();
        assert!(metrics.lines().count() == 2 && !metrics.contains("\"loss\":null"), "{file}: {metrics}");
    }
    println!("{:5.1} s  {verb} {file}", began.elapsed().as_secs_f64());
}

/// Not only read: a file that loads may die at its first step.
#[test]
fn every_shipped_experiment_runs() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    symlink(source("experiments"), at.join("experiments")).unwrap();
    write_data(at);
    write_diffusers(&at.join("sd"));
    let imported = import(at, "sd", "runs/stable-diffusion", &[]);
    assert_eq!(imported.status, 0, "{}", imported.err);

    let demo = chain_of("demo");
    let others = ["ucf101", "sky_timelapse", "taichi"].map(chain_of);
    let more = [webvid(), latte(), vdm(), bench()];
    let chains: Vec<Vec<Call>> = [demo].into_iter().chain(others).chain(more).collect();
    let ran: BTreeSet<String> = chains.iter().flatten().map(|(_, file, _)| file.clone()).collect();
    let shipped: BTreeSet<String> = contents(&source("experiments"))
        .into_keys()
        .filter(|path| path.extension().is_some_and(|ending| ending == "yaml"))
        .map(|path| path.with_extension("").strip_prefix(source("experiments")).unwrap().display().to_string())
        .collect();
    let all = ran.iter().cloned().chain(ELSEWHERE.map(String::from)).collect();
    assert_eq!(shipped, all, "an experiment is not run here, or is no more");

    let waiting = Mutex::new(VecDeque::from(chains));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(chain) = waiting.lock().unwrap().pop_front() else { break };
                    for call in &chain {
                        run(at, call);
                        // latents of the demo's clips, as `lvdm demo`, `make long` and `make comparison` encode them
                        if call.1 == "demo/autoencoder" {
                            let encode = |videos: &str, frames: &str, out: &str| {
                                let clips = ["--videos", videos, "--frames", frames, "--resolution", "32"];
                                let out = format!("runs/{out}.safetensors");
                                let encode = ["encode", "runs/demo/autoencoder", "--out", &out];
                                succeed_in(at, &[&encode[..], &clips].concat());
                            };
                            for (frames, name) in [("16", "latents"), ("10", "latents-10"), ("48", "latents-48")] {
                                encode("data/demo/train", frames, &format!("demo/{name}"));
                            }
                            encode("data/demo/index.jsonl", "16", "comparison/demo/latents");
                        }
                    }
                }
            });
        }
    });
}
