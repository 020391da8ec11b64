//! Damaged files of every kind that is read: each is refused in words, or read; none brings a panic, a hang or much memory.
//!
//! `LVDM_FUZZ=2000 cargo test --release --test fuzz` reads so many of them instead of a tenth. A file that fails is kept, and
//! its path is printed.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    io::{Cursor, Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Result;
use common::{
    moving_clips, noise,
    pickle::{Pickle, write_checkpoint, write_legacy_checkpoint},
    run_in, source,
    text_runs::{write_diffusers, write_tokenizer},
    write_packed,
};
use lvdm::{
    checkpoint::{Checkpoint, Progress},
    data::{
        Captioned, DataConfig, DatasetConfig, Numpy, Packed, PackedFile, VideoFile, VideoSource, Webvid, frame_folder,
        index, pictures, write_video,
    },
    exchange::{StableDiffusionOptions, import_stable_diffusion},
    experiment::{AutoencoderExperiment, DiffusionExperiment, EvaluationExperiment, Experiment},
    random::{Purpose, stream},
    safetensors::{read_safetensors, write_foreign_safetensors},
    text::{Tokenizer, TokenizerFiles},
    weights::{lora::Lora, numpy::read_arrays, read_state_dict},
};
use rand::{Rng, RngExt};
use serde_json::{Value, json};
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::FileOptions};

const FOLDER: &str = "LVDM_FUZZ_FOLDER";
const FIRST: &str = "LVDM_FUZZ_FIRST";
const COUNT: &str = "LVDM_FUZZ";
/// A tenth of the whole.
const USUAL: u64 = 200;
/// Seconds for one file; reading a whole one takes milliseconds.
const PATIENCE: u64 = 60;
/// Bytes that one file may cost.
const MOST: u64 = 1_000_000_000;
/// The tenth, twentieth, … file is also given to the command: a step that leads through all kinds.
const COMMAND: u64 = 10;

/// What is damaged.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Mp4,
    Gif,
    Png,
    Table,
    Index,
    Npy,
    Npz,
    Checkpoint,
    /// Tensors of another maker, without a digest.
    Foreign,
    Packed,
    Torch,
    /// The pickle in PyTorch's archive, whose sums are right.
    Pickle,
    Arrays,
    Yaml,
    Tokenizer,
    /// A text beside a video.
    Caption,
    Lora,
    /// A description in a folder of diffusers.
    Pipeline,
}

const KINDS: [Kind; 19] = {
    use Kind::*;
    [
        Mp4, Yaml, Torch, Table, Npz, Pickle, Checkpoint, Mp4, Gif, Arrays, Index, Npy, Png, Tokenizer, Packed,
        Foreign, Caption, Lora, Pipeline,
    ]
};

// ---- whole files -----------------------------------------------------------------------------------------------------

fn write_index(path: &Path) {
    let entry = |i: i64| {
        let entry =
            json!({"path": format!("{i}.mp4"), "split": "train", "frames": 16, "width": 32, "height": 32, "fps": 8.0});
        format!("{entry}\n")
    };
    fs::write(path, (0..4).map(entry).collect::<String>()).unwrap();
}

/// Small whole files of each kind, under their names.
fn write_whole(folder: &Path) {
    let clips = moving_clips(2, 16, 32);
    let at = |name: &str| folder.join(name);
    write_video(&at("whole.mp4"), &clips.get(0), 8.0).unwrap();
    fs::write(at("whole.gif"), pictures::gif(&clips, 8.0).unwrap()).unwrap();
    let frame = clips.get(0).select(1, 0).permute([1, 2, 0]);
    fs::write(at("whole.png"), pictures::png(&frame).unwrap()).unwrap();
    let rows: String = (0..5).map(|i| format!("{i},\"a dog, number {i}, runs\",0{i}_0{i}\n")).collect();
    for i in 0..5 {
        let video = at(&format!("0{i}_0{i}/{i}.mp4"));
        fs::create_dir(video.parent().unwrap()).unwrap();
        fs::copy(at("whole.mp4"), video).unwrap();
    }
    fs::write(at("whole.csv"), format!("videoid,name,page_dir\n{rows}")).unwrap();
    write_index(&at("whole.jsonl"));
    let mut array = lvdm::data::numpy::NumpyWriter::create(&at("whole.npy"), 2, [3, 16, 32, 32]).unwrap();
    array.push(&clips).unwrap();
    array.finish().unwrap();
    let mut archive = ZipWriter::new(fs::File::create(at("whole.npz")).unwrap());
    archive.start_file("arr_0.npy", FileOptions::default().compression_method(CompressionMethod::Deflated)).unwrap();
    archive.write_all(&fs::read(at("whole.npy")).unwrap()).unwrap();
    archive.finish().unwrap();
    let tensors = || -> BTreeMap<String, tch::Tensor> {
        let shapes = [("model.a.weight", &[3i64, 4][..]), ("model.b.bias", &[7]), ("ema.a.weight", &[3, 4])];
        shapes.into_iter().map(|(name, shape)| (name.to_string(), noise(1, shape))).collect()
    };
    let progress = Progress { step: 3, position: 6, ema_updates: 3, skipped_steps: 0, seconds: 1.0 };
    let experiment = json!({"seed": 1});
    Checkpoint { task: "autoencoder".into(), progress, experiment, tensors: tensors() }
        .write(&at("whole.safetensors"))
        .unwrap();
    let header = json!({"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.bias": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}});
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[60; 34]].concat();
    fs::write(at("foreign.safetensors"), bytes).unwrap();
    write_packed(&at("packed.safetensors"), 2, 8, 16);
    write_checkpoint(&at("whole.ckpt"), &tensors(), &|pickle: &mut Pickle| {
        pickle.text("global_step");
        pickle.int(3);
    });
    write_legacy_checkpoint(&at("old.ckpt"), &tensors());
    // one array as numpy pickles it
    let mut pickle = Pickle(b"\x80\x02".to_vec());
    pickle.raw(b"}(");
    pickle.text("weight");
    pickle.raw(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01");
    pickle.ints(&[2]);
    pickle.raw(b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C\x08");
    pickle.raw(&[0, 0, 128, 63, 0, 0, 0, 64]);
    pickle.raw(b"tbu.");
    fs::write(at("whole.pkl"), &pickle.0).unwrap();
    for (name, from) in
        [("a.yaml", "demo/autoencoder.yaml"), ("d.yaml", "demo/diffusion.yaml"), ("e.yaml", "demo/evaluate.yaml")]
    {
        fs::copy(source("experiments").join(from), at(name)).unwrap();
    }
    write_tokenizer(folder);
    write_diffusers(&at("sd"));
    fs::create_dir(at("captioned")).unwrap();
    fs::copy(at("whole.mp4"), at("captioned/clip.mp4")).unwrap();
    fs::write(at("captioned/clip.txt"), "a red ball rolls\n").unwrap();
    let place = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
    let lora = [("lora_down.weight", &[2i64, 32][..]), ("lora_up.weight", &[32, 2]), ("alpha", &[])];
    let lora = lora.map(|(half, shape)| (format!("{place}.{half}"), noise(3, shape)));
    write_foreign_safetensors(&at("lora.safetensors"), &lora).unwrap();
}

// ---- damage ------------------------------------------------------------------------------------------------------------

/// Numbers at which readers go wrong.
const EDGES: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];
const WORDS: [&str; 16] = [
    "\"",
    "\n",
    ",",
    "-1",
    "0",
    "99999999999999999999",
    "1e308",
    "nan",
    "{",
    "[",
    "'",
    "\u{feff}",
    "\0",
    ": ",
    "../",
    "é",
];

fn damage(bytes: &mut Vec<u8>, random: &mut impl Rng) {
    let times = if random.random_bool(0.5) { 1 } else { random.random_range(2..=4) };
    for _ in 0..times {
        if bytes.is_empty() {
            bytes.push(random.random());
        }
        let at = random.random_range(0..bytes.len());
        // headers are where readers decide
        let at = if random.random_bool(0.5) { at % 256.min(bytes.len()) } else { at };
        let length = random.random_range(1..=64usize).min(bytes.len() - at);
        match random.random_range(0..9) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = random.random(),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let piece = bytes[at..at + length].to_vec();
                let to = random.random_range(0..=bytes.len());
                drop(bytes.splice(to..to, piece));
            }
            5 => bytes[at..at + length].fill(if random.random_bool(0.5) { 0 } else { 0xff }),
            6 => {
                let edge = EDGES[random.random_range(0..EDGES.len())];
                let edge = if random.random_bool(0.5) { edge.to_le_bytes() } else { edge.to_be_bytes() };
                for (byte, new) in bytes[at..].iter_mut().zip(edge) {
                    *byte = new;
                }
            }
            7 => {
                let word = WORDS[random.random_range(0..WORDS.len())];
                drop(bytes.splice(at..at, word.bytes()));
            }
            _ => {
                // a digit becomes many
                if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                    drop(bytes.splice(at + digit..at + digit + 1, *b"999999999"));
                }
            }
        }
    }
}

/// The damaged pickle of an archive that is whole otherwise.
fn damage_pickle(bytes: &[u8], random: &mut impl Rng) -> Vec<u8> {
    let mut whole = ZipArchive::new(Cursor::new(bytes)).unwrap();
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for i in 0..whole.len() {
        let mut entry = whole.by_index(i).unwrap();
        let mut contents = Vec::new();
        entry.read_to_end(&mut contents).unwrap();
        if entry.name().ends_with("data.pkl") {
            damage(&mut contents, random);
        }
        archive.start_file(entry.name(), FileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
        archive.write_all(&contents).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// A folder of diffusers: so many descriptions, then the weights.
const DESCRIPTIONS: usize = 6;
const PIPELINE: &[&str] = &[
    "sd/unet/config.json",
    "sd/vae/config.json",
    "sd/text_encoder/config.json",
    "sd/scheduler/scheduler_config.json",
    "sd/tokenizer/vocab.json",
    "sd/tokenizer/merges.txt",
    "sd/unet/diffusion_pytorch_model.safetensors",
    "sd/vae/diffusion_pytorch_model.fp16.safetensors",
    "sd/text_encoder/model.safetensors",
];

/// What files of a kind are called.
fn names(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Mp4 => &["whole.mp4"],
        Kind::Gif => &["whole.gif"],
        Kind::Png => &["whole.png"],
        Kind::Table => &["whole.csv"],
        Kind::Index => &["whole.jsonl"],
        Kind::Npy => &["whole.npy"],
        Kind::Npz => &["whole.npz"],
        Kind::Checkpoint => &["whole.safetensors"],
        Kind::Foreign => &["foreign.safetensors"],
        Kind::Packed => &["packed.safetensors"],
        Kind::Torch => &["whole.ckpt", "old.ckpt"],
        Kind::Pickle => &["whole.ckpt"],
        Kind::Arrays => &["whole.pkl"],
        Kind::Yaml => &["a.yaml", "d.yaml", "e.yaml"],
        Kind::Tokenizer => &["vocab.json", "merges.txt"],
        Kind::Caption => &["captioned/clip.txt"],
        Kind::Lora => &["lora.safetensors"],
        Kind::Pipeline => PIPELINE.split_at(DESCRIPTIONS).0,
    }
}

/// Writes the damaged file of this number into the folder, and says its kind and path.
fn write_damaged(whole: &Path, folder: &Path, number: u64) -> (Kind, PathBuf) {
    let mut random = stream(20, Purpose::Scene, number, 0);
    let kind = KINDS[number as usize % KINDS.len()];
    let names = names(kind);
    let name = names[random.random_range(0..names.len())];
    let mut bytes = fs::read(whole.join(name)).unwrap();
    if let Kind::Pickle = kind {
        bytes = damage_pickle(&bytes, &mut random);
    } else {
        damage(&mut bytes, &mut random);
    }
    // what it is read with
    let beside: &[&str] = match kind {
        Kind::Tokenizer => names,
        Kind::Caption => &["captioned/clip.mp4"],
        Kind::Pipeline => PIPELINE,
        _ => &[],
    };
    for other in beside {
        fs::create_dir_all(folder.join(other).parent().unwrap()).unwrap();
        fs::copy(whole.join(other), folder.join(other)).unwrap();
    }
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    (kind, path)
}

// ---- reading -----------------------------------------------------------------------------------------------------------

fn read_video(source: &dyn VideoSource) -> Result<()> {
    let mut open = source.open()?;
    let frames = open.frames();
    open.read(0, frames.clamp(1, 4), 1)?;
    open.read((frames - 2).max(0), 2.min(frames.max(1)), 1)?;
    Ok(())
}

fn read_dataset(dataset: DatasetConfig) -> Result<()> {
    let config = DataConfig { dataset, frames: 4, frame_stride: 1, resolution: 16, flip: false, workers: 1 };
    for video in config.videos()?.videos.iter().take(2) {
        read_video(&*video.source)?;
    }
    Ok(())
}

fn read_experiment<T: Experiment>(path: &Path) -> Result<()> {
    let experiment: T = lvdm::experiment::read(path, &[])?;
    // what it names is not there
    experiment.validate().err();
    Ok(())
}

/// Reads a file with what belongs to it in the folder of whole ones.
fn read(kind: Kind, path: &Path, whole: &Path) -> Result<()> {
    match kind {
        Kind::Mp4 | Kind::Gif => read_video(&VideoFile::new(path)),
        Kind::Png => frame_folder::read_picture(path).map(drop),
        Kind::Table => read_dataset(DatasetConfig::Webvid(Webvid { table: path.into(), root: whole.into() })),
        Kind::Index => index::read_index(path).map(drop),
        Kind::Npy | Kind::Npz => read_dataset(DatasetConfig::Numpy(Numpy { file: path.into() })),
        Kind::Checkpoint => {
            read_safetensors(path)?;
            Checkpoint::read(path).map(drop)
        }
        Kind::Foreign => read_state_dict(path).map(drop),
        Kind::Packed => {
            PackedFile::open(path)?;
            read_dataset(DatasetConfig::Packed(Packed { file: path.into() }))
        }
        Kind::Torch | Kind::Pickle => read_state_dict(path).map(drop),
        Kind::Arrays => read_arrays(&fs::read(path)?).map(drop),
        Kind::Yaml => match path.file_name().unwrap().to_str() {
            Some("a.yaml") => read_experiment::<AutoencoderExperiment>(path),
            Some("d.yaml") => read_experiment::<DiffusionExperiment>(path),
            _ => read_experiment::<EvaluationExperiment>(path),
        },
        Kind::Tokenizer => Tokenizer::new(&TokenizerFiles::read(path.parent().unwrap())?).map(drop),
        Kind::Caption => read_dataset(DatasetConfig::Captioned(Captioned { root: path.parent().unwrap().into() })),
        Kind::Lora => Lora::sort(read_state_dict(path)?, &Value::Null).map(drop),
        Kind::Pipeline => {
            let sd = path.ancestors().find(|folder| folder.ends_with("sd")).unwrap();
            let told = StableDiffusionOptions { frames: 4, resolution: 16, ..Default::default() };
            import_stable_diffusion(sd, &told, &tempfile::tempdir()?.path().join("run")).map(drop)
        }
    }
}

/// The command that reads such a file, and ends in the name of what it would write.
fn command(kind: Kind, path: &str) -> Option<Vec<&str>> {
    let pack = |videos| {
        vec!["data", "pack", "--videos", videos, "--frames", "4", "--resolution", "16", "--out", "out.safetensors"]
    };
    Some(match kind {
        Kind::Mp4 | Kind::Gif => pack("."),
        Kind::Index | Kind::Npy | Kind::Npz | Kind::Packed => pack(path),
        Kind::Foreign | Kind::Torch | Kind::Pickle => vec!["import", "lvdm", path, "--out", "out"],
        Kind::Checkpoint => vec!["export", path, "--out", "out.safetensors"],
        Kind::Lora => vec!["import", "stable-diffusion", path, "--out", "out"],
        Kind::Pipeline => {
            vec!["import", "stable-diffusion", "sd", "--frames", "4", "--resolution", "16", "--out", "out"]
        }
        Kind::Png | Kind::Table | Kind::Arrays | Kind::Yaml | Kind::Tokenizer | Kind::Caption => return None,
    })
}

// ---- one process after another ---------------------------------------------------------------------------------------

/// A number of bytes out of /proc/PID/status.
fn bytes_of(process: &str, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Not a test: reads damaged files, one after the other, in a process that may die of one.
#[test]
#[ignore = "started by the test below"]
fn worker() {
    let (Ok(folder), Ok(first), Ok(count)) = (std::env::var(FOLDER), std::env::var(FIRST), std::env::var(COUNT)) else {
        return;
    };
    tch::set_num_threads(1);
    let folder = PathBuf::from(folder);
    let (first, count): (u64, u64) = (first.parse().unwrap(), count.parse().unwrap());
    let before = bytes_of("self", "VmRSS");
    for number in first..count {
        let own = folder.join("damaged");
        fs::create_dir_all(&own).unwrap();
        let (kind, path) = write_damaged(&folder.join("whole"), &own, number);
        fs::write(folder.join("at"), number.to_string()).unwrap();
        // the highest memory from here on
        let _ = fs::write("/proc/self/clear_refs", "5");
        let result = catch_unwind(AssertUnwindSafe(|| read(kind, &path, &folder.join("whole"))));
        let memory = bytes_of("self", "VmHWM").saturating_sub(before);
        let outcome = match result {
            Err(_) => "panicked",
            _ if memory > MOST => "took much memory",
            Ok(Ok(())) => "read",
            Ok(Err(error)) => {
                assert!(!format!("{error:#}").trim().is_empty());
                "refused"
            }
        };
        let line = format!("{number} {kind:?} {outcome}\n");
        fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(folder.join("log"))
            .unwrap()
            .write_all(line.as_bytes())
            .unwrap();
        fs::remove_dir_all(&own).unwrap();
    }
    fs::write(folder.join("at"), "done").unwrap();
}

fn start_worker(folder: &Path, first: u64, count: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["worker", "--exact", "--ignored", "--nocapture"]);
    command.env(FOLDER, folder).env(FIRST, first.to_string()).env(COUNT, count.to_string()).env("OMP_NUM_THREADS", "1");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Two thousand damaged files, or a tenth of them: no panic, no crash, no hang, no more than 1 GB; and what the command makes
/// of them is one line of error, or all of its work.
#[test]
fn damaged_files_are_refused_in_words_or_read() {
    let count = std::env::var(COUNT).map_or(USUAL, |count| count.parse().expect("LVDM_FUZZ is a number of files"));
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    fs::create_dir(folder.join("whole")).unwrap();
    write_whole(&folder.join("whole"));
    // without damage each is read
    for kind in KINDS {
        for name in names(kind) {
            let whole = folder.join("whole");
            read(kind, &whole.join(name), &whole).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        }
    }
    let mut faults: Vec<String> = Vec::new();
    let mut first = 0;
    while first < count {
        fs::write(folder.join("at"), first.to_string()).unwrap();
        let mut worker = start_worker(folder, first, count);
        let at = || fs::read_to_string(folder.join("at")).unwrap_or_default();
        let (mut now, mut since) = (at(), Instant::now());
        let fault = loop {
            if let Some(status) = worker.try_wait().unwrap() {
                if at() == "done" && status.success() {
                    break None;
                }
                break Some(format!("ended its process: {status}"));
            }
            if at() != now && !at().is_empty() {
                (now, since) = (at(), Instant::now());
            }
            let slow = since.elapsed() > Duration::from_secs(PATIENCE);
            if slow || bytes_of(&worker.id().to_string(), "VmRSS") > 4 * MOST {
                worker.kill().unwrap();
                worker.wait().unwrap();
                break Some(if slow { "did not end".to_string() } else { "took all memory".to_string() });
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let Some(fault) = fault else { break };
        let number: u64 = at().parse().expect("the number of a file");
        faults.push(format!("{number} {fault}"));
        first = number + 1;
    }
    let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
    faults.extend(log.lines().filter(|line| line.ends_with("panicked") || line.ends_with("memory")).map(String::from));
    let counted = |outcome: &str| log.lines().filter(|line| line.ends_with(outcome)).count();
    println!("{count} damaged files: {} refused, {} read all the same", counted("refused"), counted(" read"));
    // the command, on some of them
    let mut commands = BTreeMap::<String, usize>::new();
    for number in (0..count).step_by(COMMAND as usize) {
        let own = tempfile::tempdir().unwrap();
        let (kind, path) = write_damaged(&folder.join("whole"), own.path(), number);
        let Some(arguments) = command(kind, path.file_name().unwrap().to_str().unwrap()) else { continue };
        let said = run_in(own.path(), &arguments);
        *commands.entry(format!("{kind:?}")).or_default() += 1;
        let written = own.path().join(arguments[arguments.len() - 1]).exists();
        match said.status {
            0 if written => {}
            1 | 2 if !written => {
                said.error(said.status);
            }
            status => faults
                .push(format!("{number} {kind:?}: {arguments:?}: status {status}, written: {written}: {}", said.err)),
        }
    }
    println!("given to the command: {commands:?}");
    assert!(count < COMMAND * KINDS.len() as u64 || commands.len() >= 12, "a kind was not given to the command");
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    for fault in &faults {
        let number: u64 = fault.split(' ').next().unwrap().parse().unwrap();
        let folder = kept.join(number.to_string());
        fs::create_dir_all(&folder).unwrap();
        println!("{fault}: {}", write_damaged(&place.path().join("whole"), &folder, number).1.display());
    }
    assert!(faults.is_empty(), "{} of {count} files", faults.len());
}
