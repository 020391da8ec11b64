//! Whole commands: two ranks do what one does.

use std::fs;

use lvdm::{
    checkpoint::{self, Checkpoint},
    safetensors::read_safetensors,
    torch::device_name,
};
use serde_json::{Value, json};
use tch::Device;

use crate::{
    AUTOENCODER, DIFFUSION,
    common::{self, run_in, same_checkpoint, succeed_in, write_packed},
    log_difference, metrics, workplace,
};

/// TATS' autoencoder and losses in place of LVDM's. The codebook starts from the vectors of both ranks, and unused entries
/// become others of them. Without its absolute values, at whose kinks rounding decides about a gradient; `gradients` has them,
/// in float64.
fn vqgan() -> String {
    let codec = "autoencoder: {kind: vqgan, channels: 4, factors: [2, 4, 4], latent_channels: 4, codebook: {codes: 24, restart: true}}";
    let loss = "loss: {kind: tats, pixel_weight: 0.0, perceptual_weight: 0.0, matching_weight: 0.0, adversarial_start: 0, \
                discriminator: {channels: 4, layers: 1}}";
    let line = |line: &str| match line.split(':').next() {
        Some("autoencoder") => codec.to_string(),
        Some("loss") => loss.to_string(),
        Some("trainer") => line.replace(", ema_decay: 0.99", ""),
        _ => line.to_string(),
    };
    AUTOENCODER.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Two ranks train as one with the doubled batch does, accumulation included; a run goes on to the bit, and on another
/// number of ranks with the same samples. Samples and figures do not depend on the number of ranks.
#[test]
fn two_ranks_do_what_one_does() {
    let folder = workplace();
    let at = folder.path();
    let train_file = |kind: &str, file: &str, run: &str, more: &[&str]| {
        let file = format!("{file}.yaml");
        succeed_in(at, &[&["train", kind, &file, "--run", run], more].concat())
    };
    let two = ["--nproc", "2"];
    fs::write(at.join("vqgan.yaml"), vqgan()).unwrap();
    for (kind, file) in [("autoencoder", "autoencoder"), ("autoencoder", "vqgan"), ("diffusion", "diffusion")] {
        let train = |kind: &str, run: &str, more: &[&str]| train_file(kind, file, run, more);
        let run = |name: &str| format!("runs/{file}{name}");
        let last = |name: &str, step: i64| checkpoint::path(&at.join(run(name)), step);
        train(kind, &run(""), &["trainer.accumulate=2"]);
        let halves = ["trainer.batch=2", "trainer.accumulate=2"];
        let said = train(kind, &run("-two"), &[&two[..], &halves].concat());
        assert_eq!(said.out.matches("trained to step 6").count(), 1, "one rank speaks: {}", said.out);
        let difference = log_difference(&at.join(run("")), &at.join(run("-two")));
        println!("{file}: the logs differ by {difference:.1e}");
        assert!(difference < 1e-4, "{file}: {difference:e}");
        assert_eq!(Checkpoint::read(&last("-two", 6)).unwrap().progress.position, 6 * 8);
        // a group of one
        train(kind, &run("-one"), &["--nproc", "1", "trainer.accumulate=2"]);
        same_checkpoint(&last("", 6), &last("-one", 6));
        // interrupted after step 3
        let stop = ["trainer.steps=3"];
        train(kind, &run("-parts"), &[&two[..], &halves, &stop].concat());
        train(kind, &run("-parts"), &[&two[..], &halves].concat());
        same_checkpoint(&last("-two", 6), &last("-parts", 6));
        // on two ranks, then on one
        train(kind, &run("-mixed"), &[&two[..], &halves, &stop].concat());
        train(kind, &run("-mixed"), &["trainer.accumulate=2"]);
        let difference = log_difference(&at.join(run("")), &at.join(run("-mixed")));
        assert!(difference < 1e-4, "{file}: {difference:e}");
    }
    let sample = |out: &str, more: &[&str]| {
        let sample = ["sample", "runs/diffusion", "--videos", "5", "--batch", "2", "--steps", "3", "--device", "cpu"];
        succeed_in(at, &[&sample[..], &["--out", out], more].concat());
        fs::read(at.join(out)).unwrap()
    };
    assert!(sample("one.safetensors", &[]) == sample("two.safetensors", &two), "samples differ");
}

/// Two ranks that train from one file of latents have each its own rows of it, and train as one rank with all of them
/// does. The first one sees that the file is not damaged.
#[cfg(feature = "video")]
#[test]
fn ranks_read_their_own_rows_of_a_latent_file() {
    let folder = workplace();
    let at = folder.path();
    fs::create_dir(at.join("videos")).unwrap();
    for i in 0..5 {
        let clip = common::moving_clips(5, 6, 32).get(i);
        lvdm::data::write_video(&at.join(format!("videos/{i}.mp4")), &clip, 8.0).unwrap();
    }
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "trainer.steps=1"]);
    let clips = ["--videos", "videos", "--frames", "4", "--resolution", "32", "--device", "cpu"];
    succeed_in(at, &[&["encode", "runs/autoencoder", "--out", "latents.safetensors"], &clips[..]].concat());
    let train = ["train", "diffusion", "diffusion.yaml", "latents=latents.safetensors", "--run"];
    succeed_in(at, &[&train[..], &["runs/one"]].concat());
    succeed_in(at, &[&train[..], &["runs/two", "trainer.batch=2", "--nproc", "2"]].concat());
    let difference = log_difference(&at.join("runs/one"), &at.join("runs/two"));
    assert!(difference < 1e-4, "{difference:e}");
    let mut bytes = fs::read(at.join("latents.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(at.join("latents.safetensors"), bytes).unwrap();
    let said = run_in(at, &[&train[..], &["runs/three", "--nproc", "2"]].concat());
    assert!(said.status == 1 && said.err.contains("latents.safetensors is damaged"), "{}", said.err);
}

/// `skipped_videos` of the log is the number of videos that could not be used, each once: one that the table names and
/// that is not there, which every rank knows, and two that ranks come across, both of them in time. It is the same for
/// either kind of training and on any number of ranks.
#[cfg(feature = "video")]
#[test]
fn skipped_videos_are_counted_once_over_ranks() {
    let folder = workplace();
    let at = folder.path();
    fs::create_dir(at.join("videos")).unwrap();
    let mut table = "videoid,name\nnowhere,a\n".to_string();
    for i in 0..5 {
        // the last two are too short
        let clip = common::moving_clips(5, 6, 32).get(i).narrow(1, 0, if i < 3 { 6 } else { 2 });
        lvdm::data::write_video(&at.join(format!("videos/{i}.mp4")), &clip, 8.0).unwrap();
        table += &format!("{i},a\n");
    }
    fs::write(at.join("table.csv"), table).unwrap();
    let counts = |kind: &str, run: &str, more: &[&str]| -> Vec<f64> {
        let videos = "data.dataset={kind: webvid, table: table.csv, root: videos}";
        let file = format!("{kind}.yaml");
        let train = ["train", kind, &file, "--run", run, videos, "data.resolution=16", "trainer.steps=8"];
        succeed_in(at, &[&train[..], more].concat());
        metrics(&at.join(run)).iter().map(|line| line["skipped_videos"]).collect()
    };
    let one = counts("autoencoder", "runs/one", &["trainer.batch=2"]);
    let two = ["--nproc", "2", "trainer.batch=1"];
    assert_eq!(counts("autoencoder", "runs/two", &two), one);
    let pixels = ["autoencoder=pixels", "unet.channels=32", "unet.attention_factors=[]"];
    assert_eq!(counts("diffusion", "runs/pixels", &[&two[..], &pixels].concat()).last(), Some(&3.0));
    assert!(one[0] >= 1.0 && one.is_sorted() && one.last() == Some(&3.0), "{one:?}");
}

/// FVD, KVD and PSNR, to the last digit, on one rank and on two.
#[test]
fn figures_do_not_depend_on_the_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("clips.safetensors"), 6, 10, 32);
    fs::write(
        at.join("autoencoder.yaml"),
        AUTOENCODER.replace("frames: 4", "frames: 10").replace("steps: 6", "steps: 1"),
    )
    .unwrap();
    fs::write(at.join("diffusion.yaml"), DIFFUSION.replace("frames: 4", "frames: 10").replace("steps: 6", "steps: 1"))
        .unwrap();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "--run", "runs/autoencoder"]);
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "--run", "runs/diffusion"]);
    fs::write(
        at.join("evaluate.yaml"),
        "\
evaluation: {clips: 6}
real: {dataset: {kind: packed, file: clips.safetensors}, frames: 10, resolution: 32}
generated: {kind: run, run: runs/diffusion, sampler: {kind: ddim, steps: 2, eta: 0.0}, batch: 4}
out: evaluation
",
    )
    .unwrap();
    let figures = |more: &[&str]| -> Value {
        succeed_in(at, &[&["evaluate", "evaluate.yaml", "--device", "cpu"], more].concat());
        let report: Value = serde_json::from_slice(&fs::read(at.join("evaluation/figures.json")).unwrap()).unwrap();
        json!([report["figures"], report["psnr_db"]])
    };
    let one = figures(&[]);
    assert!(one[0]["samples"]["fvd"].as_f64().unwrap() > 0.0);
    fs::remove_dir_all(at.join("runs/features")).unwrap();
    assert_eq!(one, figures(&["--nproc", "2"]));
}

/// What several ranks keep of real clips they find again, and so does one: the key holds the kind of the devices and
/// nothing that differs from rank to rank. Figures name that kind.
#[test]
fn features_that_two_ranks_keep_are_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("real.safetensors"), 4, 10, 32);
    write_packed(&at.join("generated.safetensors"), 5, 10, 32);
    let device = device_name(Device::Cpu);
    let evaluate = |more: &[&str]| {
        let files = ["evaluate", "--real", "real.safetensors", "--generated", "generated.safetensors"];
        let size = ["--frames", "10", "--resolution", "32", "--clips", "4", "--device", "cpu", "--out", "out"];
        succeed_in(at, &[&files[..], &size, more].concat());
        let report: Value = serde_json::from_slice(&fs::read(at.join("out/figures.json")).unwrap()).unwrap();
        assert_eq!(report["device"], device.as_str());
        let kept: Vec<_> = fs::read_dir(at.join("runs/features")).unwrap().map(|file| file.unwrap().path()).collect();
        let [file] = &kept[..] else { panic!("{kept:?}") };
        // a file that is written anew is another one
        (report["figures"].clone(), std::os::unix::fs::MetadataExt::ino(&fs::metadata(file).unwrap()), file.clone())
    };
    let first = evaluate(&["--nproc", "2"]);
    assert_eq!(evaluate(&["--nproc", "2"]), first);
    assert_eq!(evaluate(&[]), first);
    let (_, key) = read_safetensors(&first.2).unwrap();
    assert_eq!(key.unwrap()["devices"], json!([device]));
}

/// Latents and packed clips are the same to the byte on one rank and on two, videos that cannot be used among them; so
/// are samples in one file.
#[test]
fn what_is_encoded_and_packed_does_not_depend_on_the_number_of_ranks() {
    let folder = workplace();
    let at = folder.path();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml", "trainer.steps=1"]);
    fs::create_dir(at.join("videos")).unwrap();
    for i in 0..5 {
        let clip = common::moving_clips(5, 6, 32).get(i);
        lvdm::data::write_video(&at.join(format!("videos/{i}.mp4")), &clip, 8.0).unwrap();
        fs::write(at.join(format!("videos/{i}.txt")), format!("video {i}, a caption of its own\n")).unwrap();
    }
    fs::write(at.join("videos/2.mp4"), "damaged").unwrap();
    let two = ["--nproc", "2"];
    let clips = ["--videos", "videos", "--frames", "4", "--resolution", "32"];
    let encode = ["encode", "runs/autoencoder", "--device", "cpu", "--flip", "--clips", "21"];
    for (name, verb, last) in [
        ("latents", &encode[..], "21 clips"),
        ("packed", &["data", "pack", "--captions"], "4 clips"),
        ("more", &["data", "pack", "--clips", "7"], "7 clips"),
    ] {
        let make = |ranks: usize, launch: &[&str]| {
            let file = format!("{name}-{ranks}.safetensors");
            let said = succeed_in(at, &[verb, &clips, &["--out", &file], launch].concat());
            assert_eq!(said.out, format!("{last} in {file}\n"), "one rank speaks");
            fs::read(at.join(file)).unwrap()
        };
        assert!(make(1, &[]) == make(2, &two), "{name} differs");
    }
    let (packed, _) = read_safetensors(&at.join("packed-2.safetensors")).unwrap();
    let captions = String::from_utf8(Vec::try_from(&packed["captions"]).unwrap()).unwrap();
    assert_eq!(captions.matches("a caption of its own").count(), 4, "{captions}");
    succeed_in(at, &["train", "diffusion", "diffusion.yaml", "trainer.steps=1"]);
    for ending in ["npz", "npy"] {
        let sample = |name: &str, launch: &[&str]| {
            let file = format!("{name}.{ending}");
            let fixed =
                ["sample", "runs/diffusion", "--videos", "5", "--batch", "2", "--steps", "2", "--device", "cpu"];
            succeed_in(at, &[&fixed[..], &["--out", &file], launch].concat());
            fs::read(at.join(file)).unwrap()
        };
        assert!(sample("one", &[]) == sample("shared", &two), "samples differ");
    }
}
