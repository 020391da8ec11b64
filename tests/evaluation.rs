//! `lvdm evaluate`: inputs of every kind, protocols, the card, reconstructions. With the real weights of I3D and LPIPS.

mod common;

use std::{fs, path::Path};

use common::{moving_clips, run_in, succeed_in, write_generated, write_npy, write_packed};
use lvdm::safetensors::{read_safetensors, write_safetensors_atomically};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// `numpy.savez_compressed`.
fn write_npz(path: &Path, clips: &Tensor) {
    let array = path.with_extension("npy");
    write_npy(&array, clips);
    let mut writer = zip::ZipWriter::new(fs::File::create(path).unwrap());
    writer.start_file("arr_0.npy", zip::write::FileOptions::default()).unwrap();
    std::io::Write::write_all(&mut writer, &fs::read(&array).unwrap()).unwrap();
    writer.finish().unwrap();
    fs::remove_file(&array).unwrap();
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn samples(at: &Path, out: &str) -> [f64; 2] {
    let figures = json(&at.join(out).join("figures.json"));
    ["fvd", "kvd"].map(|figure| figures["figures"]["samples"][figure].as_f64().unwrap())
}

/// The figure of the original TensorFlow implementation, 151.39244, out of a numpy file.
#[test]
fn black_and_white_out_of_numpy_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let plain = |value: f64| Tensor::full([8, 3, 30, 64, 64], value, (Kind::Uint8, Device::Cpu));
    write_npy(&at.join("black.npy"), &plain(0.0));
    write_npz(&at.join("white.npz"), &plain(255.0));
    let said = succeed_in(
        at,
        &[
            "evaluate",
            "--real",
            "black.npy",
            "--generated",
            "white.npz",
            "--frames",
            "30",
            "--resolution",
            "64",
            "--out",
            "out",
        ],
    );
    said.names_its_device_once();
    let [fvd, _] = samples(at, "out");
    assert!((fvd - 151.39244).abs() < 0.02, "{fvd}\n{}", said.out);
    assert!(said.out.contains("151.39") && said.out.contains("8 clips of 30 frames"), "{}", said.out);
}

/// Features of real clips are kept, and used again as long as the data and the file that keeps them are as they were.
#[test]
fn features_of_real_clips_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("real.safetensors"), 4, 10, 32);
    write_npy(&at.join("generated.npy"), &moving_clips(8, 10, 32).narrow(0, 4, 4));
    let measure = || {
        let files = ["evaluate", "--real", "real.safetensors", "--generated", "generated.npy"];
        let size = ["--frames", "10", "--resolution", "32", "--out", "out"];
        let said = succeed_in(at, &[&files[..], &size].concat());
        (samples(at, "out"), said.err)
    };
    let kept = || fs::read_dir(at.join("runs/features")).unwrap().map(|f| f.unwrap().path()).collect::<Vec<_>>();
    let (first, _) = measure();
    let [file] = &kept()[..] else { panic!("{:?}", kept()) };
    assert_eq!(measure().0, first);

    // that it is read: other features give other figures
    let (mut tensors, key) = read_safetensors(file).unwrap();
    let moved = &tensors["0"] * 2.0;
    tensors.insert("0".into(), moved);
    let tensors: Vec<_> = tensors.into_iter().collect();
    write_safetensors_atomically(file, &tensors, &key.unwrap()).unwrap();
    assert_ne!(measure().0, first);

    let bytes = fs::read(file).unwrap();
    fs::write(file, &bytes[..bytes.len() - 5]).unwrap();
    let (again, said) = measure();
    assert_eq!(again, first);
    assert!(said.contains("made anew"), "{said}");

    write_packed(&at.join("real.safetensors"), 4, 11, 32);
    assert_ne!(measure().0, first);
    assert_eq!(kept().len(), 2);
}

/// Clips that were packed when videos had other colours are not used without a word; generated ones are what they are.
#[test]
fn clips_of_a_former_reading_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let clips = moving_clips(8, 10, 32);
    write_generated(&at.join("generated.safetensors"), &clips.narrow(0, 4, 4));
    let spec = |dataset: serde_json::Value| serde_json::json!({"dataset": dataset, "frames": 10, "frame_stride": 1, "resolution": 32, "seed": 0});
    let real = || clips.narrow(0, 0, 4).contiguous();
    for (dataset, reading, told) in [
        (serde_json::json!({"kind": "folder", "root": "clips"}), Some(0), 1),
        (serde_json::json!({"kind": "numpy", "file": "clips.npy"}), None, 0),
    ] {
        write_safetensors_atomically(&at.join("real.safetensors"), &[("clips", real())], &spec(dataset)).unwrap();
        let files = ["evaluate", "--real", "real.safetensors", "--generated", "generated.safetensors"];
        let said = succeed_in(at, &[&files[..], &["--frames", "10", "--resolution", "32", "--out", "out"]].concat());
        let line = "real.safetensors was made when lvdm read every video as BT.601";
        assert_eq!(said.err.matches(line).count(), told, "{}", said.err);
        assert_eq!(said.err.matches("make it again with `lvdm data pack`").count(), told, "{}", said.err);
        // and the figures say of which reading they are
        assert_eq!(json(&at.join("out/figures.json"))["protocol"]["reading"].as_u64(), reading);
    }
}

/// Equal data have one protocol under any path; others of the same shape have another, and other features.
#[test]
fn the_protocol_is_of_the_data_and_not_of_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let clips = moving_clips(12, 24, 32);
    write_npy(&at.join("a.npy"), &clips.narrow(0, 0, 4));
    write_npy(&at.join("other.npy"), &clips.narrow(0, 4, 4).flip([4]));
    write_npy(&at.join("generated.npy"), &clips.narrow(0, 8, 4));
    fs::create_dir(at.join("deep")).unwrap();
    fs::copy(at.join("a.npy"), at.join("deep/copy.npy")).unwrap();
    let measure = |real: &str, out: &str| {
        let size = ["--frames", "10", "--resolution", "32", "--out", out];
        succeed_in(at, &[&["evaluate", "--real", real, "--generated", "generated.npy"][..], &size].concat());
        let figures = json(&at.join(out).join("figures.json"));
        let of = |key: &str| figures[key].as_str().unwrap().to_string();
        (of("protocol_hash"), samples(at, out), of("protocol_text"))
    };
    let (hash, found, text) = measure("a.npy", "first");
    for word in
        ["a.npy (sha256 ", "Fréchet distance", "covariances over n - 1", "unbiased MMD²", "real clips at random"]
    {
        assert!(text.contains(word), "`{word}` is not in {text}");
    }
    for real in ["./a.npy", "deep/copy.npy"] {
        let again = measure(real, "again");
        assert_eq!((&again.0, again.1), (&hash, found), "{real}");
    }
    assert_eq!(fs::read_dir(at.join("runs/features")).unwrap().count(), 1);
    // the real clips are 4 of 10 frames out of 4 videos of 24: the real-vs-real baseline is of as many
    let floor = json(&at.join("first/figures.json"))["floor"].clone();
    assert!(floor["clips"] == 4 && floor["sets"] == "parts", "{floor}");
    fs::copy(at.join("other.npy"), at.join("a.npy")).unwrap();
    let other = measure("a.npy", "other");
    assert!(other.0 != hash && other.1 != found, "{other:?}");
    // a further metric stands beside FVD and KVD, which stay under the same protocol
    let metrics = ["--metrics", "kvd,frame_distance", "--frames", "10", "--resolution", "32", "--out", "further"];
    succeed_in(at, &[&["evaluate", "--real", "deep/copy.npy", "--generated", "generated.npy"][..], &metrics].concat());
    let figures = json(&at.join("further/figures.json"));
    assert_eq!(figures["protocol_hash"], hash.as_str());
    assert_eq!(figures["figures"]["samples"]["kvd"], found[1]);
    assert!(figures["protocol_text"].as_str().unwrap().contains("; frame distance ("), "{figures}");
    // a page of both says that they do not compare
    succeed_in(at, &["report", "first", "other", "--out", "report.html"]);
    let page = fs::read_to_string(at.join("report.html")).unwrap();
    assert!(page.contains(&hash) && page.contains(&other.0));
}

/// Where real videos are fewer than clips and each gives one, table and text say how many there were.
#[test]
fn the_number_of_real_clips_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let clips = moving_clips(10, 16, 32);
    write_npy(&at.join("real.npy"), &clips.narrow(0, 0, 4));
    write_npy(&at.join("generated.npy"), &clips.narrow(0, 4, 6));
    let start = ["evaluate", "--real", "real.npy", "--generated", "generated.npy"];
    let said = succeed_in(at, &[&start[..], &["--protocol", "stylegan-v-16", "--clips", "6"]].concat());
    for word in ["6 clips against 4 real ones", "4 real clips where 6 are asked for", "real against real at 2 clips"] {
        assert!(said.out.contains(word), "`{word}` is not in\n{}", said.out);
    }
    assert!(!said.err.contains("real clips are taken from"), "{}", said.err);
    // of 32 px, and so are the protocol's 256 said to be
    for word in ["real videos have 32 px and are scaled up to the 256 px", "generated videos have 32 px"] {
        assert!(said.err.contains(word), "`{word}` is not in\n{}", said.err);
    }
    // another protocol goes to another folder, and the same one to the same
    let plain = succeed_in(at, &[&start[..], &["--resolution", "32"]].concat());
    let word = "6 real clips are taken from 4 videos, some of which give several";
    assert!(plain.err.contains(word), "{}", plain.err);
    succeed_in(at, &[&start[..], &["--resolution", "32", "--clips", "5"]].concat());
    let folders = || fs::read_dir(at.join("runs/evaluation")).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(folders().filter(|folder| folder.join("figures.json").exists()).count(), 3);
    succeed_in(at, &[&start[..], &["--resolution", "32"]].concat());
    assert_eq!(folders().count(), 3);

    let refused = |more: &[&str]| run_in(at, &[&start[..], more].concat());
    assert!(refused(&["--card", "--nproc", "2"]).error(2).contains("one process"));
    assert!(refused(&["--split", "test"]).error(2).contains("real.npy has no splits"));
    let said = refused(&["--extractor", "nowhere.ckpt"]);
    assert!(said.error(1).contains("nowhere.ckpt"), "{}", said.err);
    // an extractor of single frames has no features of clips: said before any are computed
    for card in [&[][..], &["--card"]] {
        let said = refused(&[&["--extractor", "vgg16_frames", "--clips", "3", "--resolution", "32"], card].concat());
        let words = "FVD (fvd) compares one row of features a video, and the extractor vgg16_frames gives several";
        assert!(said.error(2).contains(words) && said.err.contains("or of the metrics frame_distance"), "{}", said.err);
    }
    let said = succeed_in(at, &["evaluate", "--protocols"]);
    assert_eq!(said.out.lines().count(), 4);
    assert!(said.out.starts_with("lvdm16: 2048 clips of 16 frames"), "{}", said.out);
}

/// An index is taken whole or by one split, and the figures say which.
#[cfg(feature = "video")]
#[test]
fn a_split_of_an_index_is_measured() {
    use lvdm::data::{
        index::{IndexEntry, write_index},
        write_video,
    };

    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let clips = moving_clips(6, 10, 32);
    let entries: Vec<IndexEntry> = (0..6)
        .map(|i| {
            let path = at.join(format!("videos/{i}.mp4"));
            write_video(&path, &clips.get(i), 8.0).unwrap();
            let split = Some(if i < 3 { "train" } else { "test" }.to_string());
            IndexEntry { path, frames: 10, width: 32, height: 32, fps: None, class: None, split }
        })
        .collect();
    write_index(&at.join("index.jsonl"), &entries).unwrap();
    write_npy(&at.join("generated.npy"), &clips.narrow(0, 0, 3));
    let of = |more: &[&str]| {
        let start = ["evaluate", "--real", "index.jsonl", "--generated", "generated.npy"];
        run_in(at, &[&start[..], &["--frames", "10", "--resolution", "32", "--clips", "3"], more].concat())
    };
    let all = of(&[]);
    assert!(all.err.contains("all splits: `test` (3), `train` (3)"), "{}", all.err);
    assert!(all.out.contains("index.jsonl, all splits (sha256"), "{}", all.out);
    let test = of(&["--split", "test"]);
    assert!(test.out.contains("index.jsonl, split test (sha256"), "{}{}", test.out, test.err);
    assert!(!test.err.contains("all splits"), "{}", test.err);
    let hash = |out: &str| out[out.find("protocol ").unwrap()..].split(':').next().unwrap().to_string();
    assert_ne!(hash(&all.out), hash(&test.out));
    let wrong = of(&["--split", "validation"]);
    assert!(wrong.error(2).contains("`validation`") && wrong.err.contains("`test` (3)"), "{}", wrong.err);
}

/// The same videos as a packed file, a numpy array and pictures give the same figures; as mp4 what the compression
/// costs: within 3 % of FVD here.
#[cfg(all(feature = "video", feature = "opencv"))]
#[test]
fn every_kind_of_input_agrees() {
    use lvdm::data::{pictures::write_png, write_video};

    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("real.safetensors"), 6, 10, 64);
    let generated = moving_clips(12, 10, 64).narrow(0, 6, 6).flip([3]);
    write_generated(&at.join("packed.safetensors"), &generated);
    write_npy(&at.join("array.npy"), &generated);
    write_npz(&at.join("archive.npz"), &generated);
    for i in 0..6 {
        let clip = generated.get(i);
        write_video(&at.join(format!("videos/{i}.mp4")), &clip, 8.0).unwrap();
        for f in 0..10 {
            let picture = clip.select(1, f).permute([1, 2, 0]).contiguous();
            let path = at.join(format!("frames/{i}/{f}.png"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            write_png(&path, &picture).unwrap();
        }
    }
    let measure = |generated: &str| {
        let out = format!("out-{}", generated.replace('.', "-"));
        succeed_in(
            at,
            &[
                "evaluate",
                "--real",
                "real.safetensors",
                "--generated",
                generated,
                "--frames",
                "10",
                "--resolution",
                "64",
                "--out",
                &out,
            ],
        );
        samples(at, &out)
    };
    let packed = measure("packed.safetensors");
    for exact in ["array.npy", "archive.npz", "frames"] {
        assert_eq!(measure(exact), packed, "{exact}");
    }
    let mp4 = measure("videos");
    println!("exact {packed:?}, mp4 {mp4:?}");
    assert!(mp4 != packed && (mp4[0] / packed[0] - 1.0).abs() < 0.03, "{mp4:?} {packed:?}");
}

/// Runs of next to no training.
fn toy_runs(at: &Path) {
    write_packed(&at.join("clips.safetensors"), 8, 16, 16);
    let data = "data: {dataset: {kind: packed, file: clips.safetensors}, frames: 16, resolution: 16}\n";
    let trainer = "optimizer: {kind: adam, learning_rate: 1.0e-3}\n\
                   trainer: {steps: 2, batch: 2, device: cpu, log_every: 1, checkpoint_every: 2, picture_every: 2}\n";
    let autoencoder = "autoencoder: {channels: 8, factors: [2, 4, 4], norm_groups: 8}\n\
                       loss: {perceptual_weight: 0.0, adversarial_weight: 0.0}\n";
    let diffusion = "autoencoder: runs/autoencoder\n\
                     unet: {channels: 32, multipliers: [1], blocks_per_level: 1, attention_factors: [1], heads: 2}\n\
                     sampler: {kind: ddim, steps: 2, eta: 1.0}\n";
    for (task, text) in
        [("autoencoder", [data, autoencoder, trainer].concat()), ("diffusion", [data, diffusion, trainer].concat())]
    {
        fs::write(at.join(format!("{task}.yaml")), text).unwrap();
        succeed_in(at, &["train", task, &format!("{task}.yaml")]);
    }
}

/// A run gives what its samples in a file give; the card has every protocol that fits, and says why others do not.
#[test]
fn runs_cards_and_reconstructions() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    toy_runs(at);
    let evaluate = |generated: &str, out: &str| {
        let arguments =
            ["evaluate", "--real", "clips.safetensors", "--generated", generated, "--clips", "4", "--out", out];
        succeed_in(at, &arguments)
    };
    succeed_in(
        at,
        &["sample", "runs/diffusion", "--videos", "4", "--steps", "2", "--batch", "4", "--out", "s.safetensors"],
    );
    let said = evaluate("runs/diffusion", "of-run");
    assert!(said.out.contains("real against real at 4 clips") && said.out.contains("16 px"), "{}", said.out);
    let arguments = ["evaluate", "--real", "clips.safetensors", "--generated", "s.safetensors", "--clips", "4"];
    succeed_in(at, &[&arguments[..], &["--resolution", "16", "--out", "of-file"]].concat());
    let (run, file) = (samples(at, "of-run"), samples(at, "of-file"));
    assert!((run[0] / file[0] - 1.0).abs() < 1e-4, "{run:?} {file:?}");
    let [of_run, of_file] = ["of-run", "of-file"].map(|out| json(&at.join(out).join("figures.json")));
    assert_eq!(of_run["protocol_hash"], of_file["protocol_hash"]);

    assert!(
        said.out.contains("reconstruction of 4 clips of clips.safetensors, on which the run was trained"),
        "{}",
        said.out
    );

    // how exactly the run computed is an option, and part of the figures
    let rounded = ["--precision", "bf16", "--tf32", "--clips", "2", "--out", "rounded"];
    let of_run = ["evaluate", "--real", "clips.safetensors", "--generated", "runs/diffusion"];
    succeed_in(at, &[&of_run[..], &rounded].concat());
    let rounded = json(&at.join("rounded/figures.json"));
    assert_eq!((&rounded["generated"]["precision"], &rounded["generated"]["tf32"]), (&"bf16".into(), &true.into()));
    let text = rounded["generated_text"].as_str().unwrap();
    assert!(text.contains("bf16, float32 as TF32"), "{text}");
    let line = run_in(at, &[&arguments[..], &["--resolution", "16", "--tf32"]].concat());
    assert!(line.error(2).contains("measured in float32"), "{}", line.err);

    // its mp4 files are compressed, which is said
    #[cfg(feature = "video")]
    {
        let arguments =
            ["evaluate", "--real", "clips.safetensors", "--generated", "of-run/samples", "--resolution", "16"];
        let said = succeed_in(at, &[&arguments[..], &["--out", "of-mp4"]].concat());
        let mp4 = samples(at, "of-mp4");
        println!("exact {run:?}, mp4 {mp4:?}");
        // by how much a figure moves is the encoder's matter; that it moves is why it is said
        assert!((mp4[0] / run[0] - 1.0).abs() > 1e-3, "{mp4:?} {run:?}: nothing was lost, so what is warned of?");
        assert!(said.err.contains("compressed (mp4)") && said.err.contains("16 % higher"), "{}", said.err);
        // fewer samples leave none of more behind
        let arguments = ["evaluate", "--real", "clips.safetensors", "--generated", "runs/diffusion", "--clips", "2"];
        succeed_in(at, &[&arguments[..], &["--out", "of-run"]].concat());
        assert_eq!(fs::read_dir(at.join("of-run/samples")).unwrap().count(), 2);
    }

    let text = "evaluation: {clips: 4}\n\
                real: {dataset: {kind: packed, file: clips.safetensors}, frames: 16, resolution: 16}\n\
                generated: {kind: run, run: runs/diffusion, sampler: {kind: ddim, steps: 2, eta: 1.0}, batch: 4}\n\
                out: card\n";
    fs::write(at.join("card.yaml"), text).unwrap();
    let said = succeed_in(at, &["evaluate", "--card", "card.yaml"]);
    println!("{}", said.out);
    let card = json(&at.join("card/card.json"));
    let names: Vec<&str> = card["reports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["protocol"]["settings"]["name"].as_str().unwrap())
        .collect();
    // lvdm16 drops what does not fill a batch of 32
    assert_eq!(names, ["plain", "stylegan-v-16@4"]);
    for report in card["reports"].as_array().unwrap() {
        let sets: Vec<&String> = report["figures"].as_object().unwrap().keys().collect();
        assert_eq!(sets, ["frozen", "gaussian", "real", "samples", "shuffled"]);
    }
    // real clips with a fault against other real clips: what a metric does not see leaves it where it was
    let fvd = |fault: &str| card["sensitivity"]["figures"][fault]["fvd"].as_f64();
    let faults = ["blurred", "jittered", "shuffled", "reversed", "frozen"].map(|fault| fvd(fault).unwrap());
    println!("real {:?}, {faults:?}", fvd("real"));
    assert!(faults.iter().all(|fvd| fvd.is_finite() && *fvd > 0.0));
    assert_eq!(card["sensitivity"]["protocol_hash"], card["reports"][0]["protocol_hash"]);
    assert!(fvd("sped_up").is_none(), "16 frames hold no clip of 16 at twice the speed");
    for word in [
        "sensitivity under protocol",
        "played backwards",
        "2 protocols",
        "compare only",
        "lvdm16@4 is not measured",
        "full batch",
        "128 frames",
        "evaluate-long",
    ] {
        assert!(said.out.contains(word), "`{word}` is not in\n{}", said.out);
    }
    // the page shows the table too
    succeed_in(at, &["report", "card", "--out", "card.html"]);
    let page = fs::read_to_string(at.join("card.html")).unwrap();
    let table = page.split("How the metrics answer to faults: card").nth(1).unwrap().split("</table>").next().unwrap();
    for fault in ["real", "blurred", "jittered", "shuffled", "reversed", "frozen"] {
        let row = format!("<th>{fault}</th><td class=\"n\">{:.2}", fvd(fault).unwrap());
        assert!(table.contains(&row), "`{row}` is not in\n{table}");
    }
    assert!(!table.contains("sped_up") && table.contains("played backwards"), "{table}");
    let plain = &card["reports"][0]["figures"]["samples"];
    assert!((plain["fvd"].as_f64().unwrap() / run[0] - 1.0).abs() < 1e-4, "{plain} {run:?}");

    // reconstructions, by either run
    let said = succeed_in(at, &["evaluate", "reconstruction", "runs/autoencoder", "--clips", "3"]);
    said.names_its_device_once();
    println!("{}", said.out);
    succeed_in(at, &["evaluate", "reconstruction", "runs/diffusion", "--clips", "3", "--real", "s.safetensors"]);
    let [own, other] = ["autoencoder", "diffusion"]
        .map(|run| json(&at.join("runs").join(run).join("reconstruction/reconstruction.json")));
    assert!(own["trained_on"] == true && other["trained_on"] == false, "{own} {other}");
    for (figure, low, high) in [("psnr_db", 3.0, 60.0), ("ssim", -1.0, 1.0), ("lpips", 0.0, 2.0)] {
        let mean = own[figure]["mean"].as_f64().unwrap();
        assert!(low < mean && mean < high, "{figure} {mean}");
    }
    assert!(at.join("runs/autoencoder/reconstruction/reconstructions.png").exists());
    run_in(at, &["evaluate", "reconstruction", "nowhere"]).error(2);
    run_in(at, &["evaluate", "reconstruction", "runs/autoencoder", "--resolution", "18"]).error(2);
}

/// A user's own protocol: several runs, whose figures are all told; and what does not fit is a mistake.
#[test]
fn protocols_of_users() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("real.safetensors"), 8, 10, 16);
    write_generated(&at.join("generated.safetensors"), &moving_clips(12, 10, 16).narrow(0, 8, 4));
    let text = "name: mine\nclips: 4\nframes: 9\nresolution: 20\nruns: 3\nredraw: real\nfit: {filter: bilinear}\n";
    fs::write(at.join("mine.yaml"), text).unwrap();
    let of = |protocol: &'static str, more: &[&'static str]| {
        let start = ["evaluate", "--real", "real.safetensors", "--generated", "generated.safetensors"];
        [&start[..], &["--protocol", protocol, "--out", "out"], more].concat()
    };
    let said = succeed_in(at, &of("mine.yaml", &[]));
    println!("{}", said.out);
    let figures = json(&at.join("out/figures.json"));
    let found = &figures["figures"]["samples"];
    assert_eq!(found["runs"].as_array().unwrap().len(), 3);
    assert!(found["fvd_std"].as_f64().unwrap() > 0.0);
    let mean = found["runs"].as_array().unwrap().iter().map(|run| run["fvd"].as_f64().unwrap()).sum::<f64>() / 3.0;
    assert!((found["fvd"].as_f64().unwrap() - mean).abs() < 1e-9);
    let [low, high] = [0, 1].map(|end| found["fvd_interval"][end].as_f64().unwrap());
    assert!(low < found["runs"][0]["fvd"].as_f64().unwrap() && found["runs"][0]["fvd"].as_f64().unwrap() < high);
    assert_eq!(figures["floor"]["sets"], "draws");
    for word in
        ["±", "3 runs, real clips redrawn", "FVD of each run", "bilinear", "real against real at 4 clips", "mine:"]
    {
        assert!(said.out.contains(word), "`{word}` is not in\n{}", said.out);
    }
    // the same again is the same, and other numbers of clips are another protocol
    let again = succeed_in(at, &of("mine.yaml", &[]));
    assert_eq!(again.out, said.out);
    // with twice as many videos the real-vs-real baseline is of two draws, whichever way clips are drawn
    fs::write(at.join("listed.yaml"), text.replace("runs: 3", "runs: 1\ndraw: {kind: listed}")).unwrap();
    let listed = succeed_in(at, &of("listed.yaml", &[]));
    assert!(
        listed.out.contains("real against real at 4 clips") && listed.out.contains("two draws of the real"),
        "{}",
        listed.out
    );
    let fewer = succeed_in(at, &of("mine.yaml", &["--clips", "3"]));
    assert!(fewer.out.contains("mine@3"), "{}", fewer.out);

    fs::write(at.join("wrong.yaml"), text.replace("redraw: real", "redrew: real")).unwrap();
    fs::write(at.join("none.yaml"), text.replace("runs: 3", "runs: 0")).unwrap();
    fs::write(at.join("both.yaml"), text.replace("redraw: real", "redraw: both")).unwrap();
    fs::write(at.join("same.yaml"), text.replace("redraw: real", "redraw: real\ndraw: {kind: listed}")).unwrap();
    for (protocol, word) in [
        ("fvd", "lvdm16"),
        ("nowhere.yaml", "nowhere.yaml"),
        ("wrong.yaml", "did you mean `redraw`?"),
        ("none.yaml", "runs must be at least 1"),
        ("both.yaml", "12 clips are asked for"),
        ("same.yaml", "listed gives the same videos in each run"),
        ("lvdm1024", "evaluate-long"),
        ("lvdm16", "4 generated videos"),
    ] {
        let said = run_in(at, &of(protocol, &[]));
        assert!(said.error(2).contains(word), "{protocol}: {}", said.err);
    }
}

/// What a user of the library writes; metrics that are not asked for are not measured, and clips without their motion are
/// farther from real clips than other real clips are.
#[test]
fn a_program_evaluates_in_ten_lines() {
    use lvdm::{
        distributed::Ranks,
        evaluation::{VideoPaths, card, evaluate},
        metrics::Metric,
    };

    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_npy(&at.join("real.npy"), &moving_clips(8, 20, 64));
    write_npy(&at.join("generated.npy"), &moving_clips(12, 10, 64).narrow(0, 8, 4));
    let paths = VideoPaths {
        real: at.join("real.npy"),
        generated: at.join("generated.npy"),
        frames: Some(10),
        resolution: Some(64),
        metrics: Some(vec![Metric::FVD]),
        out: Some(at.join("out")),
        ..VideoPaths::default()
    };
    let experiment = paths.experiment().unwrap();
    let evaluation = evaluate(&experiment, Device::Cpu, &Ranks::alone()).unwrap();
    let figure = &evaluation.figures["samples"];
    assert!(figure.value(Metric::FVD).unwrap() > 0.0 && figure.value(Metric::KVD).is_none());
    assert_eq!(json(&at.join("out/figures.json"))["figures"]["samples"].get("kvd"), None);

    let card = card(&experiment, Device::Cpu).unwrap();
    let sensitivity = card.sensitivity.unwrap().figures;
    let fvd = |fault: &str| sensitivity[fault].value(Metric::FVD).unwrap();
    println!("{:?}", sensitivity.keys().map(|fault| (fault.as_str(), fvd(fault))).collect::<Vec<_>>());
    // four clips: what takes the motion away is far beyond the noise
    for fault in ["shuffled", "frozen"] {
        assert!(fvd(fault) > 1.3 * fvd("real"), "{fault}: {} {}", fvd(fault), fvd("real"));
    }
}

/// Single frames do not change where clips are reversed or shuffled, and so does no distance of single frames.
#[test]
fn a_frame_distance_is_blind_to_the_order_of_frames() {
    use lvdm::{
        distributed::Ranks,
        evaluation::{VideoPaths, card, evaluate},
        metrics::Metric,
    };

    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_npy(&at.join("real.npy"), &moving_clips(8, 6, 32));
    write_npy(&at.join("generated.npy"), &moving_clips(12, 3, 32).narrow(0, 8, 4));
    let frame_distance: Metric = "frame_distance".parse().unwrap();
    let paths = VideoPaths {
        real: at.join("real.npy"),
        generated: at.join("generated.npy"),
        frames: Some(3),
        resolution: Some(32),
        metrics: Some(vec![frame_distance]),
        out: Some(at.join("out")),
        ..VideoPaths::default()
    };
    // three frames are enough where no metric needs I3D
    let experiment = paths.experiment().unwrap();
    let of_fvd = VideoPaths { metrics: Some(vec![Metric::FVD, frame_distance]), ..paths }.experiment().unwrap();
    let error = format!("{:#}", evaluate(&of_fvd, Device::Cpu, &Ranks::alone()).unwrap_err());
    assert!(error.contains("needs videos of at least 9 frames"), "{error}");

    let sensitivity = card(&experiment, Device::Cpu).unwrap().sensitivity.unwrap().figures;
    let of = |fault: &str| sensitivity[fault].value(frame_distance).unwrap();
    println!("{:?}", sensitivity.keys().map(|fault| (fault.as_str(), of(fault))).collect::<Vec<_>>());
    for fault in ["reversed", "shuffled"] {
        assert!((of(fault) / of("real") - 1.0).abs() < 1e-4, "{fault}: {} {}", of(fault), of("real"));
    }
    assert!(of("blurred") > of("real"), "{} {}", of("blurred"), of("real"));
    assert!(sensitivity.contains_key("sped_up"), "6 frames hold a clip of 3 at twice the speed");
}
