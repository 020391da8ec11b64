//! Wrong usage, missing things and a full disk: one clear line, the right exit status, nothing half written.

mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use common::{Said, contents, lvdm_in, run_in, succeed_in, write_packed};
use tempfile::TempDir;

/// A folder with packed clips and the experiment files of a tiny autoencoder and a tiny denoiser.
fn workplace() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_packed(&folder.path().join("clips.safetensors"), 4, 4, 16);
    fs::write(
        folder.path().join("autoencoder.yaml"),
        "\
# a tiny autoencoder
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 16, workers: 1}
autoencoder: {channels: 4, factors: [2, 4, 4], norm_groups: 4}
loss: {perceptual_weight: 0.0, adversarial_weight: 0.0}
optimizer: {kind: adam, learning_rate: 1.0e-3}
trainer: {steps: 2, batch: 2, device: cpu, log_every: 1, checkpoint_every: 2, ema_decay: 0.9}
",
    )
    .unwrap();
    fs::write(
        folder.path().join("diffusion.yaml"),
        "\
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 16, workers: 1}
autoencoder: runs/autoencoder
unet: {channels: 32, multipliers: [1], blocks_per_level: 1, attention_factors: [1], heads: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-4}
trainer: {steps: 1, batch: 2, device: cpu}
sampler: {kind: ddim, steps: 2, eta: 1.0}
",
    )
    .unwrap();
    folder
}

/// Runs, wants the status and one line that holds all `words`, and that no file came, went or changed.
fn refused(folder: &Path, arguments: &[&str], status: i32, words: &[&str]) {
    let before = contents(folder);
    let said = run_in(folder, arguments);
    let line = said.error(status);
    for word in words {
        assert!(line.contains(word), "`{word}` is not in\n{line}");
    }
    assert!(contents(folder) == before, "{arguments:?} wrote or removed something");
    assert!(said.out.is_empty(), "{}", said.out);
}

/// Mistakes in what the user wrote: status 2 and a line with the file, the line in it, the key, the nearest right key.
#[test]
fn mistakes_are_status_2() {
    let folder = workplace();
    let at = folder.path();
    let train = |rest: &[&'static str]| [&["train", "autoencoder", "autoencoder.yaml"], rest].concat();
    let text = fs::read_to_string(at.join("autoencoder.yaml")).unwrap();
    for (file, from, to) in [
        ("unknown.yaml", "{steps: 2,", "{steps: 2, colour_of_the_sky: 3,"),
        ("mistyped.yaml", "checkpoint_every", "chekpoint_every"),
        ("type.yaml", "frames: 4", "frames: four"),
        ("list.yaml", "[2, 4, 4]", "[2, 4]"),
        ("kind.yaml", "kind: packed", "kind: pakced"),
        ("yaml.yaml", "loss: {", "loss: {{["),
        ("data.yaml", "clips.safetensors", "nowhere.safetensors"),
        ("folder.yaml", "kind: packed, file: clips.safetensors", "kind: folder, root: nowhere"),
        ("size.yaml", "resolution: 16", "resolution: 18"),
        ("steps.yaml", "steps: 2", "steps: 0"),
    ] {
        assert!(text.contains(from));
        fs::write(at.join(file), text.replace(from, to)).unwrap();
    }
    for (file, words) in [
        ("unknown.yaml", &["unknown.yaml:6", "trainer.colour_of_the_sky", "unknown key"][..]),
        ("mistyped.yaml", &["mistyped.yaml:6", "trainer.chekpoint_every", "did you mean `checkpoint_every`?"]),
        ("type.yaml", &["type.yaml:2", "data.frames", "four"]),
        ("list.yaml", &["list.yaml:3", "autoencoder.factors"]),
        ("kind.yaml", &["kind.yaml:2", "did you mean `packed`?"]),
        ("yaml.yaml", &["yaml.yaml", "not YAML"]),
        ("data.yaml", &["data.yaml", "nowhere.safetensors"]),
        ("folder.yaml", &["folder.yaml", "there is no nowhere"]),
        ("size.yaml", &["size.yaml", "18x18", "[2, 4, 4]"]),
        ("steps.yaml", &["steps.yaml", "steps must be at least 1"]),
        ("missing.yaml", &["missing.yaml"]),
    ] {
        refused(at, &["train", "autoencoder", file], 2, words);
    }
    refused(at, &train(&["trainer.stepz=3"]), 2, &["override `trainer.stepz`", "`steps`"]);
    refused(at, &train(&["nothing.at.all=3"]), 2, &["nothing"]);
    refused(at, &train(&["trainer.steps.more=3"]), 2, &["trainer.steps"]);
    refused(at, &train(&["trainer.steps=many"]), 2, &["override `trainer.steps`"]);
    refused(at, &train(&["trainer.steps"]), 2, &["key.path=value"]);
    // lengths without an end: never an abort
    let largest = "9223372036854775807";
    let tiny = "autoencoder=pixels unet.channels=4 unet.norm_groups=2 data.frames=2 data.resolution=8";
    for key in [
        "data.frames",
        "data.resolution",
        "data.workers",
        "trainer.batch",
        "schedule.steps",
        "unet.channels",
        "unet.blocks_per_level",
        "unet.multipliers.0",
        "latent_stride",
        "sampler.steps",
    ] {
        let setting = format!("{key}={largest}");
        let more = tiny.split(' ').chain([setting.as_str()]);
        let arguments: Vec<&str> = ["train", "diffusion", "diffusion.yaml"].into_iter().chain(more).collect();
        refused(at, &arguments, 2, &[key.rsplit('.').find(|part| part.parse::<u8>().is_err()).unwrap()]);
    }
    refused(at, &["train", "diffusion", "diffusion.yaml"], 2, &["runs/autoencoder", "train it first"]);
    refused(at, &["sample", "runs/nothing", "--out", "samples"], 2, &["runs/nothing"]);
    refused(at, &["sample", ".", "--videos", "0", "--out", "samples"], 2, &["--videos"]);
    refused(at, &["data", "pack", "--videos", "nowhere", "--out", "packed.safetensors"], 2, &["nowhere"]);
    refused(at, &["evaluate", "--real", "nowhere", "--generated", "nowhere"], 2, &["nowhere"]);
    refused(at, &["evaluate", "missing.yaml"], 2, &["missing.yaml"]);
    refused(at, &["demo", "nowhere"], 2, &["nowhere"]);
    refused(at, &["import", "lvdm", "nowhere.ckpt", "--out", "runs/imported"], 2, &["nowhere.ckpt"]);
    refused(
        at,
        &["import", "lvdm", "diffusion.yaml", "--out", "runs/imported"],
        1,
        &["diffusion.yaml", "nor a checkpoint of PyTorch"],
    );
    refused(at, &["export", "runs/nothing", "--out", "x.safetensors"], 2, &["runs/nothing"]);
    refused(at, &["export", ".", "--out", "x.ckpt"], 2, &[".safetensors"]);
    refused(at, &["export", ".", "--out", "x.safetensors"], 1, &["holds no checkpoint"]);
}

/// What clap refuses: status 2 too, and no panic.
#[test]
fn wrong_usage_is_status_2() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["trian"][..],
        &["train"],
        &["train", "autoencoder"],
        &["sample"],
        &["sample", "run", "--out", "x", "--steps", "many"],
        &["sample", "run", "--out", "x", "--sampler", "euler"],
        &["verify"],
        &["evaluate"],
        &["evaluate", "file.yaml", "--clips", "4"],
        &["evaluate", "file.yaml", "--out", "out"],
        &["data", "pack"],
        &["encode", "run"],
        &["demo", "--device", "tpu"],
        &["--nonsense"],
    ] {
        let said = run_in(folder.path(), arguments);
        assert_eq!(said.status, 2, "{arguments:?}: {}", said.err);
        assert!(said.err.starts_with("error:") || said.err.contains("Usage:"), "{arguments:?}: {}", said.err);
        assert!(!said.err.contains("panicked"), "{}", said.err);
    }
    assert_eq!(contents(folder.path()).len(), 0);
}

/// An empty data set is an error, and so is one of which nothing can be used; what is broken is named.
#[test]
fn an_empty_data_set_is_an_error() {
    let folder = workplace();
    let at = folder.path();
    fs::create_dir(at.join("empty")).unwrap();
    fs::create_dir(at.join("broken")).unwrap();
    fs::write(at.join("broken/zero.mp4"), []).unwrap();
    fs::write(at.join("broken/noise.mp4"), [7; 4000]).unwrap();
    for (root, words) in [("empty", &["video files", "empty"][..]), ("broken", &["broken"])] {
        let data = format!("data.dataset={{kind: folder, root: {root}}}");
        let said = run_in(at, &["train", "autoencoder", "autoencoder.yaml", &data]);
        let line = said.error(1);
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
        assert!(!at.join("runs/autoencoder/checkpoints").exists());
        let said = run_in(at, &["data", "pack", "--videos", root, "--out", "packed.safetensors"]);
        said.error(1);
        assert!(!at.join("packed.safetensors").exists());
        if root == "broken" {
            let line = said.error(1);
            assert!(line.contains("zero.mp4") && line.contains("noise.mp4"), "{line}");
        }
    }
}

/// A damaged or foreign checkpoint is a failure, status 1, not a mistake of usage; nothing is written.
#[test]
fn damaged_checkpoints_are_status_1() {
    let folder = workplace();
    let at = folder.path();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml"]);
    succeed_in(at, &["train", "diffusion", "diffusion.yaml"]);
    let of = |run: &str, step: i64| at.join(format!("runs/{run}/checkpoints/step-{step:08}.safetensors"));
    // another kind of run is a mistake in the command
    let before = contents(at);
    assert!(run_in(at, &["sample", "runs/autoencoder", "--out", "samples"]).error(2).contains("makes no videos"));
    run_in(at, &["sample", "autoencoder.yaml", "--out", "samples"]).error(1);
    assert!(contents(at) == before);
    // cut short, in the header, in the tensors; not a checkpoint at all
    let whole = fs::read(of("diffusion", 1)).unwrap();
    for bytes in [&whole[..5], &whole[..300], &whole[..whole.len() - 1], &b"hello"[..], &[]] {
        fs::write(of("diffusion", 1), bytes).unwrap();
        let before = contents(at);
        let said = run_in(at, &["sample", "runs/diffusion", "--videos", "1", "--out", "samples"]);
        assert!(said.error(1).contains("checkpoint"), "{}", said.err);
        run_in(at, &["train", "diffusion", "diffusion.yaml", "trainer.steps=2"]).error(1);
        assert!(contents(at) == before, "{} bytes", bytes.len());
    }
    fs::write(of("diffusion", 1), &whole).unwrap();
    let sample = ["sample", "runs/diffusion", "--videos", "1", "--steps", "2", "--out", "samples"];
    succeed_in(at, &sample);
    assert!(fs::metadata(at.join("samples/00000.mp4")).unwrap().len() > 100);
    // more steps than the schedule has
    run_in(at, &["sample", "runs/diffusion", "--videos", "1", "--steps", "1001", "--out", "other"]).error(2);
    assert!(!at.join("other").exists());
}

/// A disk that takes no more: one error that names the file, the old checkpoint stays and can be gone on from.
#[test]
fn a_full_disk_leaves_the_old_checkpoint() {
    let folder = workplace();
    let at = folder.path();
    let train = ["train", "autoencoder", "autoencoder.yaml"];
    succeed_in(at, &train);
    let checkpoints = at.join("runs/autoencoder/checkpoints");
    let before = contents(&checkpoints);
    let (path, bytes) = before.iter().next().unwrap();
    // files may not grow beyond half a checkpoint: the kernel refuses the write as a full disk does
    let blocks = bytes.len() / 512 / 2;
    let binary = env!("CARGO_BIN_EXE_lvdm");
    let script =
        format!("trap '' XFSZ; ulimit -f {blocks}; exec {binary} train autoencoder autoencoder.yaml trainer.steps=4");
    let output = Command::new("sh").args(["-c", &script]).current_dir(at).stdin(Stdio::null()).output().unwrap();
    let said = Said::from(output);
    let line = said.error(1);
    assert!(line.contains("step-00000004") && line.contains("cannot write"), "{line}");
    assert_eq!(contents(&checkpoints), before, "what was there before {} is untouched", path.display());
    // in the middle of a run: training goes on, and tries again at each checkpoint
    let script = script.replace("trainer.steps=4", "trainer.steps=6 trainer.checkpoint_every=1");
    let output = Command::new("sh").args(["-c", &script]).current_dir(at).stdin(Stdio::null()).output().unwrap();
    let said = Said::from(output);
    assert!(said.error(1).contains("step-00000006"), "{}", said.err);
    for step in 3..6 {
        let warned =
            said.err.lines().any(|line| line.contains(&format!("step-0000000{step}")) && line.contains("goes on"));
        assert!(warned, "{}", said.err);
    }
    assert_eq!(contents(&checkpoints), before);
    let said = succeed_in(at, &[&train[..], &["trainer.steps=4"]].concat());
    assert!(said.err.contains("going on from step 2"), "{}", said.err);
    assert!(checkpoints.join("step-00000004.safetensors").exists());
}

/// Names, sizes, rates, lengths and folders of earlier samples are looked at before anything is sampled.
#[test]
fn what_cannot_be_written_is_not_sampled() {
    let folder = workplace();
    let at = folder.path();
    let tiny = "autoencoder=pixels unet.channels=4 unet.norm_groups=2 data.frames=2 data.resolution=8 trainer.batch=1";
    let train: Vec<&str> = ["train", "diffusion", "diffusion.yaml"].into_iter().chain(tiny.split(' ')).collect();
    succeed_in(at, &train);
    let sample = |rest: &[&'static str]| [&["sample", "runs/diffusion", "--steps", "2"], rest].concat();
    let largest = "9223372036854775807";
    for (rest, words) in [
        (&["--videos", "2", "--out", "x.mp4"][..], &["x.mp4", "2 videos", "NAME.npz"][..]),
        (&["--videos", "1", "--out", "x.gif"], &["x.gif", "folder", "NAME.npz"]),
        (&["--videos", "1", "--out", "x.PT"], &["x.PT", "folder", "NAME.npz"]),
        (&["--height", "17", "--out", "s"], &["8x17", "even", "NAME.npz"]),
        (&["--width", "9", "--out", "s"], &["9x8", "even"]),
        (&["--fps", "nan", "--out", "s"], &["--fps"]),
        (&["--fps", "0", "--out", "s"], &["--fps 0"]),
        (&["--eta", "inf", "--out", "s"], &["--eta", "finite"]),
        (&["--frames", largest, "--out", "s"], &["--frames", "1..="]),
        (&["--videos", largest, "--out", "s"], &["--videos", "1..="]),
        (&["--batch", largest, "--out", "s"], &["--batch", "1..="]),
        (&["--height", largest, "--out", "s"], &["--height", "1..="]),
    ] {
        refused(at, &sample(rest), 2, words);
    }
    succeed_in(at, &sample(&["--videos", "1", "--out", "x.NPZ"]));
    succeed_in(at, &sample(&["--videos", "1", "--out", "x.MP4"]));
    assert!(fs::read(at.join("x.NPZ")).unwrap().starts_with(b"PK"));
    assert_eq!(&fs::read(at.join("x.MP4")).unwrap()[4..8], b"ftyp");
    // videos of one setting in a folder: more of them are welcome, others are not
    succeed_in(at, &sample(&["--videos", "2", "--out", "s"]));
    succeed_in(at, &sample(&["--videos", "3", "--out", "s"]));
    refused(
        at,
        &sample(&["--seed", "1", "--videos", "2", "--out", "s"]),
        2,
        &["s holds videos of other settings (seed"],
    );
    fs::remove_file(at.join("s/sampling.json")).unwrap();
    refused(at, &sample(&["--videos", "3", "--out", "s"]), 2, &["s holds videos already (00000.mp4)"]);
    for (arguments, words) in [
        (&["export", "runs/diffusion", "--out", "x.ckpt"][..], "ends in .safetensors"),
        (&["encode", "runs/diffusion", "--videos", ".", "--out", "x.npz"], "ends in .safetensors"),
        (&["data", "pack", "--videos", ".", "--out", "x"], "ends in .safetensors"),
        (&["report", "runs", "--out", "x.pdf"], "ends in .html"),
    ] {
        refused(at, arguments, 2, &[words]);
    }
}

/// A reader that ends early, as `head -1` does, is no failure; a disk that takes no more is one, and is told.
#[test]
fn a_stdout_that_is_closed_early_is_quiet() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&["doctor"][..], &["evaluate", "--protocols"], &["--help"], &["report", "--help"]] {
        let mut child =
            lvdm_in(folder.path(), arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let said = Said::from(child.wait_with_output().unwrap());
        assert_eq!(said.status, 0, "{arguments:?}: {}", said.err);
        for word in ["error", "anic", "ipe"] {
            assert!(!said.err.contains(word), "{arguments:?}: {}", said.err);
        }
    }
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = lvdm_in(folder.path(), &["evaluate", "--protocols"]).stdout(full).output().unwrap();
    assert!(Said::from(output).error(1).contains("cannot write to stdout: No space left"));
}

/// A folder that cannot be made is one clear error.
#[test]
fn an_unwritable_run_is_an_error() {
    let folder = workplace();
    refused(
        folder.path(),
        &["train", "autoencoder", "autoencoder.yaml", "--run", "autoencoder.yaml/run"],
        1,
        &["autoencoder.yaml"],
    );
    refused(
        folder.path(),
        &["train", "autoencoder", "autoencoder.yaml", "--run", "/proc/nothing"],
        1,
        &["/proc/nothing"],
    );
}

/// A training that was left before its end is not built upon in silence, and neither is another autoencoder than the
/// one that a run began with: both are said, and the work goes on.
#[test]
fn an_unfinished_or_exchanged_autoencoder_is_told() {
    let folder = workplace();
    let at = folder.path();
    let train = |what: &str, more: &[&str]| {
        let file = format!("{what}.yaml");
        succeed_in(at, &[&["train", what, &file, "trainer.checkpoint_every=1"], more].concat()).err
    };
    let cut = |run: &str, step: &str| {
        fs::remove_file(at.join(format!("runs/{run}/checkpoints/step-{step}.safetensors"))).unwrap();
    };
    train("autoencoder", &[]);
    cut("autoencoder", "00000002");
    let said = train("diffusion", &["trainer.steps=2"]);
    assert!(said.contains("warning: autoencoder: the training of runs/autoencoder was left at step 1 of 2"), "{said}");
    // gone on with, it is another
    assert!(!train("diffusion", &["trainer.steps=3"]).contains("warning"));
    train("autoencoder", &[]);
    let said = train("diffusion", &["trainer.steps=5"]);
    for words in ["runs/autoencoder now holds another autoencoder (step 2)", "runs/diffusion began with (step 1)"] {
        assert!(said.contains(words), "{said}");
    }
    // whole runs are built upon without a word
    let said = train("diffusion", &["--run", "runs/whole", "start_from=runs/diffusion"]);
    assert!(!said.contains("warning"), "{said}");
    cut("diffusion", "00000005");
    let said = train("diffusion", &["--run", "runs/cut", "start_from=runs/diffusion"]);
    assert!(said.contains("warning: start_from: the training of runs/diffusion was left at step 4 of 5"), "{said}");
}

/// A fault of the program, here LibTorch's refusal deep inside a network, is one line that says what was refused and in
/// which file and line; with RUST_BACKTRACE=1 the calls that led there stand above it.
#[test]
fn a_panic_keeps_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(common::source("tests/parity/autoencoder_f4s4.safetensors")).unwrap();
    // the posterior's noise in another shape than the posterior
    let (right, wrong) = (b"\"shape\":[1,4,2,8,8]", b"\"shape\":[1,8,2,4,8]");
    let at = bytes.windows(right.len()).position(|window| window == right).unwrap();
    let case = folder.path().join("case.safetensors");
    fs::write(&case, [&bytes[..at], wrong, &bytes[at + wrong.len()..]].concat()).unwrap();
    let command = || lvdm_in(folder.path(), &["verify", case.to_str().unwrap()]);

    let said: Said = command().env_remove("RUST_BACKTRACE").output().unwrap().into();
    let line = said.error(1);
    assert!(line.contains("The size of tensor a (8) must match the size of tensor b (4)"), "{line}");
    let (_, place) = line.rsplit_once(", at ").unwrap_or_else(|| panic!("no place in {line}"));
    let (file, number) = place.split_once(':').unwrap();
    let text = fs::read_to_string(common::source(file)).unwrap();
    let code = text.lines().nth(number.parse::<usize>().unwrap() - 1).unwrap();
    assert!(file.starts_with("src/codecs/") && code.contains("noise"), "{place}: {code}");
    let others = said.err.lines().filter(|line| !line.starts_with("device: "));
    assert_eq!(others.count(), 1, "{}", said.err);

    let said: Said = command().env("RUST_BACKTRACE", "1").output().unwrap().into();
    assert_eq!(said.status, 1);
    assert!(said.err.contains("lvdm::verify::") && said.err.contains(place), "{}", said.err);
    assert!(said.err.lines().last().unwrap().ends_with(place), "{}", said.err);
}

/// The verbs in `lvdm --help`, and their own verbs, explain themselves.
#[test]
fn every_verb_has_help() {
    fn verbs(help: &str) -> Vec<String> {
        let Some(list) = help.split("Commands:\n").nth(1) else { return Vec::new() };
        let lines = list.lines().take_while(|line| line.starts_with("  "));
        lines.filter_map(|line| line.split_whitespace().next()).filter(|v| *v != "help").map(String::from).collect()
    }
    fn visit(path: &[String]) -> usize {
        let arguments: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let said = succeed_in(Path::new("/"), &arguments);
        assert!(said.out.contains("Usage: lvdm"), "{arguments:?}: {}", said.out);
        assert!(said.out.lines().next().unwrap().len() > 10, "{arguments:?} says nothing: {}", said.out);
        let below: usize = verbs(&said.out).into_iter().map(|verb| visit(&[path, &[verb]].concat())).sum();
        1 + below
    }
    let said = succeed_in(Path::new("/"), &["--help"]);
    for verb in
        ["train", "sample", "evaluate", "demo", "data", "encode", "import", "export", "weights", "verify", "doctor"]
    {
        assert!(verbs(&said.out).contains(&verb.to_string()), "{verb}: {}", said.out);
    }
    let seen = visit(&[]);
    assert!(seen >= 14, "only {seen} pages of help");
}

/// The binary finds LibTorch by itself: nothing of the environment is left.
#[test]
fn the_binary_needs_no_environment() {
    let folder = workplace();
    let said: Said = lvdm_in(folder.path(), &["--version"]).env_clear().output().unwrap().into();
    assert_eq!((said.status, said.out.trim()), (0, concat!("lvdm ", env!("CARGO_PKG_VERSION"))), "{}", said.err);
    let said: Said =
        lvdm_in(folder.path(), &["train", "autoencoder", "autoencoder.yaml"]).env_clear().output().unwrap().into();
    assert_eq!(said.status, 0, "{}", said.err);
}

/// The others are seen where they are tested (evaluation, long_video, demo).
#[test]
fn every_verb_that_computes_names_its_device_once() {
    let folder = workplace();
    let at = folder.path();
    let pair = ["train", "autoencoder", "autoencoder.yaml", "trainer.steps=1", "--run", "pair", "--nproc", "2"];
    for arguments in [
        &["train", "autoencoder", "autoencoder.yaml"][..],
        &[
            "encode",
            "runs/autoencoder",
            "--videos",
            "clips.safetensors",
            "--out",
            "latents.safetensors",
            "--device",
            "cpu",
        ],
        &["train", "diffusion", "diffusion.yaml"],
        &["sample", "runs/diffusion", "--videos", "1", "--steps", "2", "--out", "a.npz", "--device", "cpu"],
        &["verify", "nothing.safetensors"],
        &["bench", "device=cpu", "unet=null", "autoencoder=null", "i3d=null", "loader=null"],
        &pair,
    ] {
        println!("{arguments:?}");
        run_in(at, arguments).names_its_device_once();
    }
}

/// The driver's tool answers, and LibTorch's CUDA half does not load: the CPU is taken where it is asked for, or where
/// the GPU is hidden, and never without a word.
#[test]
fn a_gpu_that_cannot_be_used_is_an_error_unless_the_cpu_is_asked_for() {
    use std::os::unix::fs::PermissionsExt;
    let folder = workplace();
    let at = folder.path();
    let tool = at.join("bin/nvidia-smi");
    fs::create_dir(at.join("bin")).unwrap();
    fs::write(&tool, "#!/bin/sh\nexit 0\n").unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(at.join("bin/libtorch_cuda.so"), "no library").unwrap();
    let run = |arguments: &[&str], hidden: bool| -> Said {
        let mut command = lvdm_in(at, arguments);
        let path = format!("{}:{}", at.join("bin").display(), std::env::var("PATH").unwrap());
        command.env("PATH", path).env("LD_LIBRARY_PATH", at.join("bin"));
        if !hidden {
            command.env_remove("CUDA_VISIBLE_DEVICES");
        }
        command.output().unwrap().into()
    };
    let train = ["train", "autoencoder", "autoencoder.yaml", "trainer.device=auto"];
    let said = run(&train, false);
    let line = said.error(1);
    assert!(
        ["cannot be used", "CUDA=1 make setup", "trainer.device=cpu"].iter().all(|word| line.contains(word)),
        "{line}"
    );
    assert!(!at.join("runs").exists(), "something was trained");
    let pair = run(&[&train[..], &["--nproc", "2"]].concat(), false);
    assert!(pair.status != 0 && pair.err.contains("cannot be used"), "{}", pair.err);
    for (device, hidden) in [("trainer.device=cpu", false), ("trainer.device=auto", true)] {
        let said = run(&["train", "autoencoder", "autoencoder.yaml", device, "--run", device], hidden);
        assert!(said.status == 0 && said.err.contains("device: cpu ("), "{}", said.err);
    }
}

/// Names of files may hold anything: what would move the cursor or change colours is shown by its code, and no line of an
/// error looks like another error.
#[test]
fn control_characters_do_not_reach_the_terminal() {
    let place = tempfile::tempdir().unwrap();
    let name = "odd\u{1b}[31m\nerror: all is well.yaml";
    let said = run_in(place.path(), &["evaluate", name]);
    assert_eq!(said.status, 2);
    assert!(said.err.contains("odd\\u{1b}[31m\n    error: all is well.yaml"), "{}", said.err);
    assert!(!said.err.contains('\u{1b}') && !said.err.contains("\nerror:"), "{}", said.err);
}

/// Interrupted in the middle of a long file, a command ends as by the signal and leaves nothing half written.
#[test]
fn an_interrupted_command_leaves_no_half_written_file() {
    use std::os::unix::process::ExitStatusExt;

    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    common::write_npy(&at.join("clips.npy"), &common::moving_clips(2, 4, 32));
    for (name, number) in [("INT", 2), ("TERM", 15)] {
        let size = ["--clips", "1000000", "--frames", "4", "--resolution", "32", "--out", "out/packed.safetensors"];
        // a shell lets what it starts in the background ignore Ctrl-C, and so may whoever runs this test
        let mut pack = std::process::Command::new("env");
        pack.current_dir(at).args(["--default-signal=INT", env!("CARGO_BIN_EXE_lvdm")]);
        pack.args(["data", "pack", "--videos", "clips.npy"]).args(size);
        let mut pack = pack.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        let files = || fs::read_dir(at.join("out")).map_or(0, |files| files.count());
        let start = std::time::Instant::now();
        while files() == 0 {
            assert!(start.elapsed().as_secs() < 60 && pack.try_wait().unwrap().is_none(), "nothing is written");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        common::processes::signal(&pack, name);
        assert_eq!(pack.wait().unwrap().signal(), Some(number), "{name}");
        assert_eq!(files(), 0, "{name}");
    }
}
