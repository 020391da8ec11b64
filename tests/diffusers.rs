//! Runs ↔ diffusers: what was imported goes back as a folder that diffusers opens.

mod common;

use std::{fs, io::Write, path::Path, process::Command};

use common::{
    largest_difference, noise,
    pickle::write_checkpoint,
    relative_error, run_in, source, succeed_in,
    text_runs::{
        TABLE, TOLD, Tensors, experiment, import, networks, original, write_diffusers, write_tensors, write_tokenizer,
        write_videos,
    },
};
use lvdm::{
    checkpoint,
    diffusion::{Guidance, Guided, Predict, SamplerConfig, UNetDenoiser, sample},
    generate::{Generator, open_text_encoder, weights},
    models::{
        AttentionKind, ClipText, ClipTextConfig, TextActivation, TextEncoderConfig, TokenizerFiles, UNet3d,
        UNetCondition, UNetConfig, UNetPorts, stable_diffusion,
    },
    nn::Parameters,
    safetensors::read_safetensors,
    weights::stable_diffusion::is_temporal,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// The three networks' folders in diffusers, with the files that `write_diffusers` writes.
const PARTS: [(&str, &str, &str); 3] = [
    ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    ("vae", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.safetensors", "model.safetensors"),
];

fn tensors(path: &Path) -> Tensors {
    read_safetensors(path).unwrap().0
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn model_of(run: &Path) -> Tensors {
    weights(&mut checkpoint::open_averaged(run).unwrap().1).unwrap()
}

/// Folder of diffusers → run → folder: every tensor under its name to the bit, the same settings, schedule and tokens; and
/// what was trained since is in it.
#[test]
fn an_import_goes_back_to_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    let said = succeed_in(at, &["export", "stable-diffusion", "run", "--out", "back"]);
    assert!(said.out.contains("U-Net") && said.out.contains("back"), "{}", said.out);
    for (part, from, to) in PARTS {
        let (from, to) = (tensors(&at.join("sd").join(part).join(from)), tensors(&at.join("back").join(part).join(to)));
        let names = from.keys().filter(|name| !name.ends_with("position_ids"));
        assert_eq!(names.collect::<Vec<_>>(), to.keys().collect::<Vec<_>>(), "{part}");
        for (name, tensor) in &to {
            assert_eq!((tensor.size(), tensor.kind()), (from[name].size(), from[name].kind()), "{name}");
            assert!(tensor.equal(&from[name]), "{name}");
        }
    }
    let config = |folder: &str, part: &str| json(&at.join(folder).join(part).join("config.json"));
    assert_eq!(
        stable_diffusion::unet(&config("back", "unet")).unwrap(),
        stable_diffusion::unet(&config("sd", "unet")).unwrap()
    );
    let vae = |folder: &str| stable_diffusion::autoencoder(&config(folder, "vae")).unwrap();
    assert_eq!(vae("back"), vae("sd"));
    assert_eq!(config("back", "vae")["scaling_factor"], 0.3);
    let text = |folder: &str| stable_diffusion::text_encoder(&config(folder, "text_encoder")).unwrap();
    assert_eq!(text("back"), text("sd"));
    let schedule = json(&at.join("back/scheduler/scheduler_config.json"));
    assert_eq!((&schedule["num_train_timesteps"], &schedule["beta_start"]), (&900.into(), &0.001.into()));
    let bytes = fs::read(at.join("back/text_encoder/model.safetensors")).unwrap();
    let header = String::from_utf8_lossy(&bytes[8..80]).into_owned();
    assert!(header.starts_with(r#"{"__metadata__":{"format":"pt"}"#), "transformers asks for it: {header}");

    // the two files of the tokenizer are those that came, and the one says the same
    let file = |folder: &str, name: &str| fs::read_to_string(at.join(folder).join("tokenizer").join(name)).unwrap();
    assert_eq!(file("back", "merges.txt"), file("sd", "merges.txt"));
    assert_eq!(json(&at.join("back/tokenizer/vocab.json")), json(&at.join("sd/tokenizer/vocab.json")));
    fs::remove_file(at.join("back/tokenizer/tokenizer.json")).unwrap();
    TokenizerFiles::read(&at.join("back/tokenizer")).unwrap();
    assert_eq!(import(at, "back", "again", &[]).status, 0);
    let (run, again) = (model_of(&at.join("run")), model_of(&at.join("again")));
    assert_eq!(run.keys().collect::<Vec<_>>(), again.keys().collect::<Vec<_>>());
    assert!(run.iter().all(|(name, tensor)| tensor.equal(&again[name])));
    let encode = |run: &str| open_text_encoder(&at.join(run), CPU).unwrap().encode(&["a red cat", "a dog"]).unwrap();
    assert!(encode("run").equal(&encode("again")));

    // trained adapters are merged, layers over frames are left out, averages are what is written
    write_videos(at);
    fs::rename(at.join("run"), at.join("sd-run")).unwrap();
    let file = experiment(at, "adapters", TABLE, "trained: {kind: adapters, rank: 2, alpha: 4.0}\n");
    succeed_in(at, &["train", "diffusion", &file]);
    succeed_in(at, &["export", "stable-diffusion", "runs/adapters", "--out", "trained"]);
    assert_eq!(import(at, "trained", "trained-run", &[]).status, 0);
    let (trained, found) = (model_of(&at.join("runs/adapters")), model_of(&at.join("trained-run")));
    assert!(trained.iter().any(|(name, tensor)| !is_temporal(name) && !tensor.equal(&run[name])));
    for (name, tensor) in trained.iter().filter(|(name, _)| !is_temporal(name)) {
        assert!(tensor.equal(&found[name]), "{name}");
    }

    // nothing is written over, and nothing half
    let refused = |run: &str, out: &str| run_in(at, &["export", "stable-diffusion", run, "--out", out]);
    assert!(refused("sd-run", "back").error(2).contains("is there already"));
    assert!(refused("none", "x").error(2).contains("there is no run none"));
    fs::remove_file(at.join("again/text_encoder.safetensors")).unwrap();
    assert_eq!(refused("again", "x").status, 1);
    let left: Vec<_> = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name == "x" || name.to_string_lossy().ends_with(".partial")), "{left:?}");
}

/// Python with these modules: `PYTHON`, or python3 with what `make setup` installs. None is said aloud.
fn python(modules: &str) -> Option<Command> {
    let program = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let command = || {
        let mut command = Command::new(&program);
        command.env("PYTHONPATH", source(".python")).env("HF_HUB_OFFLINE", "1").env("PYTHONWARNINGS", "ignore");
        command
    };
    if command().args(["-c", &format!("import {modules}")]).output().is_ok_and(|output| output.status.success()) {
        return Some(command());
    }
    // past the harness, which hides what a test that passes says
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED: {program} has not all of {modules}; set PYTHON to one that has (pip install diffusers transformers peft)"
    );
    None
}

fn run_python(mut command: Command, script: &str, arguments: &[&Path]) -> String {
    let output = command.arg(source(script)).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}:\n{out}{err}");
    print!("{out}");
    out.into_owned()
}

/// diffusers opens the folder, and its pipeline makes the same pictures as one of the parts that were imported.
#[test]
fn diffusers_opens_an_export() {
    let Some(command) = python("torch, diffusers, transformers") else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    succeed_in(at, &["export", "stable-diffusion", "run", "--out", "back"]);
    let said = run_python(command, "tests/open_with_diffusers.py", &[&at.join("sd"), &at.join("back")]);
    assert!(said.contains("equal"), "{said}");
}

/// A change of one map: our name of it, that of diffusers, and the two halves.
struct Change {
    own: &'static str,
    diffusers: &'static str,
    down: Tensor,
    up: Tensor,
}

const RANK: i64 = 3;

/// Changes of a linear map, one with a bias, one that is stored as a convolution, a convolution, and one of the text encoder.
fn changes() -> Vec<Change> {
    let change = |i: u64, own, diffusers, down: &[i64], up: &[i64]| Change {
        own,
        diffusers,
        down: noise(60 + i, down) * 0.1,
        up: noise(80 + i, up),
    };
    vec![
        change(
            0,
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            &[RANK, 32],
            &[32, RANK],
        ),
        change(
            1,
            "middle_block.1.transformer_blocks.0.attn2.to_out.0",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
            &[RANK, 64],
            &[64, RANK],
        ),
        change(
            2,
            "encoder.layers.1.self_attn.q_proj",
            "text_model.encoder.layers.1.self_attn.q_proj",
            &[RANK, 24],
            &[24, RANK],
        ),
        change(
            3,
            "input_blocks.1.1.proj_in",
            "down_blocks.0.attentions.0.proj_in",
            &[RANK, 32, 1, 1],
            &[32, RANK, 1, 1],
        ),
        change(
            4,
            "input_blocks.1.0.in_layers.2",
            "down_blocks.0.resnets.0.conv1",
            &[RANK, 32, 3, 3],
            &[32, RANK, 1, 1],
        ),
    ]
}

/// The names of the three changes of linear maps, or of all, in every spelling in which LoRAs are found: what is added is
/// scale · α / rank · up · down, in half precision too; everything else stays.
#[test]
fn a_lora_in_any_spelling_is_merged() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    let before = [model_of(&at.join("run")), model_of(&at.join("run/text_encoder.safetensors"))];
    let joined = |name: &str| name.replace('.', "_");
    let is_text = |change: &Change| change.diffusers.starts_with("text_model");
    let of_kohya = |change: &Change, place: &str| {
        let place = joined(place);
        if is_text(change) { format!("lora_te_{place}") } else { format!("lora_unet_{place}") }
    };
    let sided = |change: &Change| {
        if is_text(change) {
            format!("text_encoder.{}", change.diffusers)
        } else {
            format!("unet.{}", change.diffusers)
        }
    };
    type Spelling<'a> = (&'a str, bool, f64, &'a dyn Fn(&Change) -> [String; 2]);
    let kohya = |change: &Change| {
        let place = of_kohya(change, change.diffusers);
        [format!("{place}.lora_down.weight"), format!("{place}.lora_up.weight")]
    };
    let original = |change: &Change| {
        let place = of_kohya(change, if is_text(change) { change.diffusers } else { change.own });
        [format!("{place}.lora_down.weight"), format!("{place}.lora_up.weight")]
    };
    let peft =
        |change: &Change| ["A", "B"].map(|half| format!("base_model.model.{}.lora_{half}.weight", change.diffusers));
    let adapter = |change: &Change| {
        ["A", "B"].map(|half| format!("base_model.model.{}.lora_{half}.default.weight", change.diffusers))
    };
    let diffusers = |change: &Change| ["A", "B"].map(|half| format!("{}.lora_{half}.weight", sided(change)));
    let older = |change: &Change| {
        let kind = if is_text(change) { "lora_linear_layer" } else { "lora" };
        ["down", "up"].map(|half| format!("{}.{kind}.{half}.weight", sided(change)))
    };
    let oldest = |change: &Change| {
        let (place, map) = change.diffusers.trim_end_matches(".0").rsplit_once('.').unwrap();
        ["down", "up"].map(|half| match is_text(change) {
            true => format!("{}.lora_linear_layer.{half}.weight", sided(change)),
            false => format!("{place}.processor.{map}_lora.{half}.weight"),
        })
    };
    // name of the file, whether convolutions can be said, α, names
    let spellings: [Spelling; 7] = [
        ("kohya.safetensors", true, 1.5, &kohya),
        ("original.safetensors", true, 6.0, &original),
        ("peft/adapter_model.safetensors", true, 4.5, &peft),
        ("adapter/adapter_model.safetensors", true, 3.0, &adapter),
        ("diffusers/pytorch_lora_weights.safetensors", true, RANK as f64, &diffusers),
        ("older.safetensors", true, RANK as f64, &older),
        ("oldest.ckpt", false, RANK as f64, &oldest),
    ];
    for (i, (file, convolutions, alpha, names)) in spellings.into_iter().enumerate() {
        let path = at.join("loras").join(file);
        let changes = changes().into_iter().take(if convolutions { 5 } else { 3 }).collect::<Vec<_>>();
        let mut tensors = Tensors::new();
        for change in &changes {
            let [down, up] = names(change);
            if file.starts_with("kohya") || file.starts_with("original") {
                tensors.insert(
                    down.replace(".lora_down.weight", ".alpha"),
                    Tensor::from(alpha as f32).to_kind(Kind::Half),
                );
            }
            tensors.insert(down, change.down.to_kind(Kind::Half));
            tensors.insert(up, change.up.to_kind(Kind::Half));
        }
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if file.ends_with(".ckpt") {
            write_checkpoint(&path, &tensors, &|_| {});
        } else {
            write_tensors(&path, &tensors);
        }
        let given = match path.parent().unwrap() {
            folder if file.contains("adapter_model") => {
                let configuration =
                    format!(r#"{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": {alpha}, "alpha_pattern": {{}}}}"#);
                fs::write(folder.join("adapter_config.json"), configuration).unwrap();
                folder.to_path_buf()
            }
            _ => path.clone(),
        };
        let out = format!("merged-{i}");
        let scale = 0.8;
        let arguments = ["import", "lora", given.to_str().unwrap(), "--into", "run", "--scale", "0.8", "--out", &out];
        let said = succeed_in(at, &arguments);
        let told = format!("merged into {} maps of the U-Net and 1 of the text encoder", changes.len() - 1);
        assert!(said.out.contains(&told), "{file}: {}", said.out);
        let after = [model_of(&at.join(&out)), model_of(&at.join(&out).join("text_encoder.safetensors"))];
        for (side, (before, after)) in before.iter().zip(&after).enumerate() {
            assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
            for (name, weight) in before {
                let of = |change: &&Change| {
                    format!("{}.weight", change.own) == *name && usize::from(is_text(change)) == side
                };
                let Some(change) = changes.iter().find(of) else {
                    assert!(after[name].equal(weight), "{file}: {name} was not to change");
                    continue;
                };
                let [down, up] = [&change.down, &change.up].map(|t| t.to_kind(Kind::Half).to_kind(Kind::Double));
                let added = up.flatten(1, -1).matmul(&down.flatten(1, -1)) * (scale * alpha / RANK as f64);
                let wanted = weight.to_kind(Kind::Double) + added.reshape(weight.size());
                assert!(relative_error(&after[name].to_kind(Kind::Double), &wanted) < 1e-6, "{file}: {name}");
                assert!(relative_error(&after[name], weight) > 1e-3, "{file}: {name} has not changed");
            }
        }
        let sampled =
            ["sample", &out, "--prompt", "a cat", "--steps", "2", "--out", "x.safetensors", "--device", "cpu"];
        succeed_in(at, &sampled);
    }

    // what cannot be merged is named, and nothing is left
    let refused = |name: &str, tensors: Tensors| {
        let path = at.join(name);
        write_tensors(&path, &tensors);
        let said = run_in(at, &["import", "lora", name, "--into", "run", "--out", "none"]);
        let error = said.error(1).to_string();
        assert!(!at.join("none").exists(), "{error}");
        error
    };
    let pair = |place: &str, down: &[i64], up: &[i64]| -> Tensors {
        [("down", down), ("up", up)]
            .into_iter()
            .map(|(half, shape)| (format!("{place}.lora_{half}.weight"), noise(1, shape)))
            .collect()
    };
    let place = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
    let unknown = refused("a.safetensors", pair("lora_unet_down_blocks_7_attentions_0_proj_in", &[2, 32], &[32, 2]));
    assert!(unknown.contains("down_blocks_7") && unknown.contains("another Stable Diffusion"), "{unknown}");
    let other = refused("b.safetensors", pair(place, &[2, 64], &[64, 2]));
    assert!(other.contains("[64, 2]") && other.contains("[32, 32]"), "{other}");
    let mut half = pair(place, &[2, 32], &[32, 2]);
    half.remove(&format!("{place}.lora_up.weight"));
    assert!(refused("c.safetensors", half).contains("no up map"));
    let mut kind = pair(place, &[2, 32], &[32, 2]);
    kind.insert(format!("{place}.dora_scale"), noise(1, &[32, 1]));
    assert!(refused("d.safetensors", kind).contains("DoRA"));
    let mut more = pair(place, &[2, 32], &[32, 2]);
    more.insert("something.else".into(), noise(1, &[2]));
    assert!(refused("e.safetensors", more).contains("`something.else`"));
    let mut strength = pair(place, &[2, 32], &[32, 2]);
    strength.insert(format!("{place}.alpha"), noise(1, &[2]));
    assert!(refused("f.safetensors", strength).contains("alpha` has shape [2]"));
    let mut strength = pair(place, &[2, 32], &[32, 2]);
    strength.insert(format!("{place}.alpha"), Tensor::from(f32::NAN));
    assert!(refused("g.safetensors", strength).contains("alpha` = NaN"));
    let mut none = pair(place, &[0, 32], &[32, 0]);
    none.extend(pair(&place.replace("to_q", "to_k"), &[2, 32], &[32, 2]));
    assert!(refused("h.safetensors", none).contains("a rank of 0"));
    let said = run_in(
        at,
        &["import", "lora", "sd/unet/diffusion_pytorch_model.safetensors", "--into", "run", "--out", "none"],
    );
    assert!(said.error(1).contains("not a LoRA"), "{}", said.err);
    let said = run_in(at, &["import", "lora", "nothing", "--into", "run", "--out", "none"]);
    assert!(said.error(2).contains("there is no nothing"), "{}", said.err);
}

/// The strength that diffusers notes in the header counts whatever the file is called.
#[test]
fn the_noted_strength_of_a_lora_counts_under_any_name() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    let change = changes().remove(0);
    let half = |half: &str| format!("unet.{}.lora_{half}.weight", change.diffusers);
    let plain = at.join("plain.safetensors");
    let tensors = Tensors::from([(half("A"), change.down.shallow_clone()), (half("B"), change.up.shallow_clone())]);
    write_tensors(&plain, &tensors);
    let bytes = fs::read(&plain).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header["__metadata__"] =
        serde_json::json!({"format": "pt", "lora_adapter_metadata": r#"{"unet.lora_alpha": 7.5}"#});
    let mut header = header.to_string();
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let noted = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat();
    let before = model_of(&at.join("run"));
    let weight = &before[&format!("{}.weight", change.own)];
    let wanted = weight + change.up.matmul(&change.down) * (7.5 / RANK as f64);
    for (i, name) in ["x.safetensors", "x.SAFETENSORS", "x.bin", "x"].into_iter().enumerate() {
        fs::write(at.join(name), &noted).unwrap();
        let out = format!("merged-{i}");
        succeed_in(at, &["import", "lora", name, "--into", "run", "--out", &out]);
        let after = &model_of(&at.join(out))[&format!("{}.weight", change.own)];
        assert!(relative_error(after, &wanted) < 1e-6, "{name}");
    }
}

/// Adapters of a training, on their own as PEFT has them, merged again into what they were trained over: the weights with
/// which the training samples.
#[test]
fn adapters_travel_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let file = experiment(at, "adapters", TABLE, "trained: {kind: adapters, rank: 2, alpha: 4.0}\n");
    succeed_in(at, &["train", "diffusion", &file]);
    let said = succeed_in(at, &["export", "lora", "runs/adapters", "--out", "alone"]);
    assert!(said.out.contains("adapters"), "{}", said.out);
    let configuration = json(&at.join("alone/adapter_config.json"));
    assert_eq!((&configuration["r"], &configuration["lora_alpha"]), (&2.into(), &4.0.into()));
    assert_eq!(configuration["target_modules"], serde_json::json!(["to_k", "to_out.0", "to_q", "to_v"]));
    let alone = tensors(&at.join("alone/adapter_model.safetensors"));
    let name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight";
    assert_eq!(alone[name].size(), [2, 32]);
    assert!(alone.keys().any(|name| name.contains("attn1_tmp.to_out.0.lora_B")));
    succeed_in(at, &["import", "lora", "alone", "--into", "sd-run", "--out", "merged"]);
    let (trained, merged) = (model_of(&at.join("runs/adapters")), model_of(&at.join("merged")));
    assert_eq!(trained.keys().collect::<Vec<_>>(), merged.keys().collect::<Vec<_>>());
    for (name, tensor) in &trained {
        assert!(largest_difference(&merged[name], tensor) < 1e-6, "{name}");
    }
    assert!(run_in(at, &["export", "lora", "sd-run", "--out", "x"]).error(2).contains("no adapters"));
    assert!(run_in(at, &["export", "lora", "runs/adapters", "--out", "alone"]).error(2).contains("is there already"));
}

/// PEFT and diffusers on both sides: a LoRA that PEFT writes is merged as PEFT merges it, one in kohya-ss's names as
/// diffusers fuses it, and PEFT opens the adapters of a training.
#[test]
fn peft_and_diffusers_merge_a_lora_alike() {
    let Some(command) = python("torch, diffusers, transformers, peft") else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    succeed_in(at, &["export", "stable-diffusion", "sd-run", "--out", "pipeline"]);
    let file = experiment(at, "adapters", TABLE, "trained: {kind: adapters, rank: 2, alpha: 4.0}\n");
    succeed_in(at, &["train", "diffusion", &file]);
    succeed_in(at, &["export", "lora", "runs/adapters", "--out", "alone"]);
    succeed_in(at, &["export", "stable-diffusion", "runs/adapters", "--out", "trained"]);
    let script = "tests/lora_with_diffusers.py";
    let again = || python("torch, diffusers, transformers, peft").expect("as before");
    run_python(command, script, &["write".as_ref(), at]);
    for (lora, out) in [("peft", "peft-run"), ("kohya.safetensors", "kohya-run")] {
        succeed_in(at, &["import", "lora", lora, "--into", "sd-run", "--scale", "0.8", "--out", out]);
        succeed_in(at, &["export", "stable-diffusion", out, "--out", &format!("{out}-pipeline")]);
    }
    let said = run_python(again(), script, &["compare".as_ref(), at]);
    assert_eq!(said.matches("alike").count(), 3, "{said}");
}

/// U-Net, image autoencoder and text encoder of other files and folders over a base, which need not have them all.
#[test]
fn networks_come_from_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_diffusers(&at.join("other"));
    for (part, file, _) in PARTS {
        let path = at.join("other").join(part).join(file);
        let larger = tensors(&path).into_iter().map(|(name, t)| match t.is_floating_point() {
            true => (name, t * 1.25),
            false => (name, t),
        });
        write_tensors(&path, &larger.collect());
    }
    let mut vae = json(&at.join("other/vae/config.json"));
    vae["scaling_factor"] = 0.5.into();
    fs::write(at.join("other/vae/config.json"), vae.to_string()).unwrap();
    // a file of the autoencoder alone in the original names, and a whole original file without an autoencoder
    let [_, (_, image, _), _] = networks();
    let alone: Tensors = image.named().into_iter().map(|(name, t)| (name, t.detach() * 1.25)).collect();
    write_tensors(&at.join("vae.safetensors"), &alone);
    let mut bare = original();
    bare.retain(|name, _| !name.starts_with("first_stage_model."));
    write_tensors(&at.join("bare.safetensors"), &bare);

    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    assert_eq!(import(at, "other", "other-run", &[]).status, 0);
    let of = |run: &str| {
        ["", "autoencoder.safetensors", "text_encoder.safetensors"].map(|file| model_of(&at.join(run).join(file)))
    };
    let (own, others) = (of("sd-run"), of("other-run"));
    let same = |a: &Tensors, b: &Tensors| {
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        a.iter().all(|(name, tensor)| tensor.equal(&b[name]))
    };
    let bare = [&["--vae", "vae.safetensors"][..], &TOLD[..]].concat();
    for (i, (base, more, replaced)) in [
        ("sd", vec!["--vae", "other/vae"], [false, true, false]),
        ("sd", vec!["--vae", "other"], [false, true, false]),
        ("sd", vec!["--vae", "vae.safetensors"], [false, true, false]),
        ("sd", vec!["--vae", "other/vae/diffusion_pytorch_model.fp16.safetensors"], [false, true, false]),
        ("sd", vec!["--unet", "other/unet"], [true, false, false]),
        ("sd", vec!["--unet", "other/unet/diffusion_pytorch_model.safetensors"], [true, false, false]),
        ("sd", vec!["--text-encoder", "other/text_encoder"], [false, false, true]),
        ("sd", vec!["--unet", "other", "--text-encoder", "other"], [true, false, true]),
        ("bare.safetensors", bare, [false, true, false]),
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run-{i}");
        let said = import(at, base, &run, &more);
        assert_eq!(said.status, 0, "{more:?}: {}", said.err);
        for (part, found) in of(&run).iter().enumerate() {
            let wanted = if replaced[part] { &others[part] } else { &own[part] };
            assert!(same(found, wanted), "{more:?}: part {part}");
        }
    }
    let scale = |run: &str| lvdm::generate::open_latent_space(&at.join(run), CPU).unwrap().moments.scale;
    assert_eq!([scale("run-0"), scale("run-2"), scale("run-4")], [0.5, 0.3, 0.3]);

    let refused = |base: &str, more: &[&str], status: i32, word: &str| {
        let said = import(at, base, "x", more);
        assert!(said.error(status).contains(word), "{}", said.err);
        assert!(!at.join("x").exists());
    };
    refused("sd", &["--vae", "other/unet"], 1, "not the image autoencoder");
    refused("sd", &["--unet", "vae.safetensors"], 1, "not the U-Net");
    refused("sd", &["--vae", "none"], 2, "there is no none");
    refused("sd", &["--vae", "sd/tokenizer"], 2, "config.json");
    refused("bare.safetensors", &TOLD, 1, "--vae");
}

/// The folder of a tiny Stable Diffusion 2, whose parts and values lie in tests/stable_diffusion_2. They were made, once, with
/// diffusers 0.35.2 and transformers 4.57.6, seed 5: `UNet2DConditionModel(block_out_channels=(8, 16), layers_per_block=1,
/// cross_attention_dim=16, attention_head_dim=[2, 4], norm_num_groups=4, use_linear_projection=True, upcast_attention=True)`
/// with attention at the first level, `AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4)`,
/// `CLIPTextModel(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu")`, `DDIMScheduler(…,
/// steps_offset=1, prediction_type="v_prediction")`, 0.1 · N(0, 1) on every parameter, which are then rounded to half
/// precision. The values: states of two texts, the U-Net's output at t = 300, ten steps of DDIM with guidance 7.5, and the
/// decoded picture.
fn write_second(folder: &Path) {
    let parts = source("tests/stable_diffusion_2");
    let all = tensors(&parts.join("weights.safetensors"));
    for (part, _, file) in PARTS {
        fs::create_dir_all(folder.join(part)).unwrap();
        fs::copy(parts.join(format!("{part}.json")), folder.join(part).join("config.json")).unwrap();
        let prefix = format!("{part}/");
        let own = all.iter().filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), t.shallow_clone())));
        write_tensors(&folder.join(part).join(file), &own.collect());
    }
    fs::create_dir_all(folder.join("scheduler")).unwrap();
    fs::copy(parts.join("scheduler.json"), folder.join("scheduler/scheduler_config.json")).unwrap();
    write_tokenizer(&folder.join("tokenizer"));
}

/// Stable Diffusion 2.x: heads as wide at every level, linear projections, velocity, OpenCLIP's names in an original file.
#[test]
fn stable_diffusion_2_is_what_diffusers_makes() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_second(&at.join("sd2"));
    let said = import(at, "sd2", "run", &[]);
    assert_eq!(said.status, 0, "{}", said.err);
    let (generator, experiment) = Generator::open(&at.join("run"), CPU).unwrap();
    assert_eq!((experiment.unet.head_width, experiment.objective.predict), (Some(4), Predict::Velocity));
    let case = tensors(&source("tests/stable_diffusion_2/case.safetensors"));
    let carried = checkpoint::open(&at.join("run/text_encoder.safetensors")).unwrap().1;
    let config: TextEncoderConfig = serde_json::from_value(carried.experiment.clone()).unwrap();
    let parameters = Parameters::new(CPU, 0);
    let clip = ClipText::new(&parameters.root(), &config.text_encoder);
    parameters.load(&carried.part("model")).unwrap();
    let near = |what: &str, found: &Tensor, wanted: &Tensor| {
        let error = relative_error(found, wanted);
        println!("{what}: {error:.1e}");
        assert!(error < 1e-5, "{what}: {error:e}");
    };
    tch::no_grad(|| {
        let [states, empty] = ["ids", "negative"].map(|ids| clip.forward(&case[ids]).unwrap());
        near("states", &states, &case["states"]);
        near("states of the empty text", &empty, &case["empty"]);
        // three frames, each as the image network sees it
        let start = case["z_t"].unsqueeze(2).repeat([1, 1, 3, 1, 1]);
        let told = |context: &Tensor| UNetCondition { level: None, context: Some(context.shallow_clone()) };
        let velocity = generator.unet.forward(&start, &Tensor::from_slice(&[300i64]), &told(&states));
        let denoiser = |context: &Tensor| UNetDenoiser {
            unet: &generator.unet,
            schedule: &generator.schedule,
            predict: experiment.objective.predict,
            mask: None,
            given: told(context),
        };
        let guided = Guided {
            conditional: denoiser(&states),
            unconditional: denoiser(&empty),
            weight: 7.5,
            form: Guidance::Interpolate,
            schedule: &generator.schedule,
        };
        let sampler = SamplerConfig::Ddim { steps: 10, eta: 0.0 };
        let none = |_| start.zeros_like();
        let z_0 = sample(&guided, &*sampler.build(), &generator.schedule, &start, &none, &mut |_, _| {}).unwrap();
        let decoded = generator.space.decode(&z_0);
        for frame in 0..3 {
            near("velocity", &velocity.select(2, frame), &case["velocity"]);
            near("ten steps", &z_0.select(2, frame), &case["z_0"]);
            near("decoded", &decoded.select(2, frame), &case["decoded"]);
        }
    });

    // back to diffusers, and by way of the released names
    succeed_in(at, &["export", "stable-diffusion", "run", "--out", "back"]);
    assert_eq!(json(&at.join("back/unet/config.json"))["attention_head_dim"], serde_json::json!([2, 4]));
    assert_eq!(json(&at.join("back/scheduler/scheduler_config.json"))["prediction_type"], "v_prediction");
    assert_eq!(import(at, "back", "again", &[]).status, 0);
    succeed_in(at, &["export", "run", "--out", "released.safetensors"]);
    succeed_in(at, &["import", "lvdm", "released.safetensors", "--out", "released"]);
    // one original file: the text encoder in OpenCLIP's names, with one layer more, which is not used
    let of = |run: &str| {
        ["", "autoencoder.safetensors", "text_encoder.safetensors"].map(|file| model_of(&at.join(run).join(file)))
    };
    let [unet, image, text] = of("run");
    let mut original = Tensors::new();
    for (name, tensor) in unet.into_iter().filter(|(name, _)| !is_temporal(name)) {
        let tensor = if tensor.dim() == 5 { tensor.squeeze_dim(2) } else { tensor };
        original.insert(format!("model.diffusion_model.{name}"), tensor);
    }
    original.extend(image.into_iter().map(|(name, tensor)| (format!("first_stage_model.{name}"), tensor)));
    let open = |name: &str| format!("cond_stage_model.model.{name}");
    for layer in 0..3 {
        let (from, to) = (format!("encoder.layers.{}", layer % 2), format!("transformer.resblocks.{layer}"));
        for (ours, theirs) in [
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ] {
            for leaf in ["weight", "bias"] {
                original.insert(
                    open(&format!("{to}.{theirs}.{leaf}")),
                    text[&format!("{from}.{ours}.{leaf}")].shallow_clone(),
                );
            }
        }
        for leaf in ["weight", "bias"] {
            let three = ["q", "k", "v"].map(|map| text[&format!("{from}.self_attn.{map}_proj.{leaf}")].shallow_clone());
            original.insert(open(&format!("{to}.attn.in_proj_{leaf}")), Tensor::cat(&three, 0));
        }
    }
    original.insert(open("token_embedding.weight"), text["embeddings.token_embedding.weight"].shallow_clone());
    original.insert(open("positional_embedding"), text["embeddings.position_embedding.weight"].shallow_clone());
    for leaf in ["weight", "bias"] {
        original.insert(open(&format!("ln_final.{leaf}")), text[&format!("final_layer_norm.{leaf}")].shallow_clone());
    }
    original.insert(open("text_projection"), noise(1, &[16, 16]));
    original.insert(open("logit_scale"), Tensor::from(4.6f32));
    original.insert(open("attn_mask"), noise(2, &[12, 12]));
    write_tensors(&at.join("sd2.safetensors"), &original);
    let told = ["--tokenizer", "sd2/tokenizer", "--heads", "2", "--norm-groups", "4", "--text-heads", "2"];
    assert!(import(at, "sd2.safetensors", "x", &told).error(2).contains("--predict velocity"));
    let said = import(at, "sd2.safetensors", "original", &[&told[..], &["--predict", "velocity"]].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    for run in ["again", "released", "original"] {
        let other = Generator::open(&at.join(run), CPU).unwrap().1;
        assert_eq!((&other.unet, &other.objective), (&experiment.unet, &experiment.objective), "{run}");
        for (own, other) in of("run").iter().zip(of(run)) {
            assert_eq!(own.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>(), "{run}");
            assert!(own.iter().all(|(name, tensor)| tensor.equal(&other[name])), "{run}");
        }
    }
    let encoder = |run: &str| open_text_encoder(&at.join(run), CPU).unwrap().encode(&["a cat"]).unwrap();
    assert!(encoder("run").equal(&encoder("original")), "OpenCLIP's nonlinearity is GELU");

    // its networks over a first one: heads, nonlinearity and what is predicted are theirs
    let experiment_of = |run: &str| Generator::open(&at.join(run), CPU).unwrap().1;
    write_diffusers(&at.join("sd"));
    write_tensors(&at.join("sd1.safetensors"), &common::text_runs::original());
    let over = ["--unet", "sd2", "--text-encoder", "sd2.safetensors"];
    let said = import(at, "sd1.safetensors", "mixed", &[&over[..], &TOLD].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    let mixed = experiment_of("mixed");
    assert_eq!((&mixed.unet, &mixed.schedule), (&experiment.unet, &experiment.schedule));
    assert_eq!(mixed.objective.predict, Predict::Velocity);
    assert!(encoder("run").equal(&encoder("mixed")), "OpenCLIP's nonlinearity is GELU");
    let whole = [&over[..], &TOLD, &["--predict", "noise"]].concat();
    assert!(import(at, "sd1.safetensors", "x", &whole).error(2).contains("scheduler_config.json"));
    // and where nothing says what it predicts, it must be told
    fs::copy(at.join("sd2/unet/diffusion_pytorch_model.safetensors"), at.join("alone.safetensors")).unwrap();
    let line = import(at, "sd2", "x", &["--unet", "alone.safetensors"]).error(2).to_string();
    assert!(line.contains("alone.safetensors") && line.contains("--predict velocity"), "{line}");
    let said = import(at, "sd2", "told", &["--unet", "alone.safetensors", "--predict", "noise"]);
    assert_eq!(said.status, 0, "{}", said.err);
    assert_eq!(experiment_of("told").objective.predict, Predict::Noise);

    // heads that are neither as many nor as wide
    let mut config = json(&at.join("sd2/unet/config.json"));
    config["attention_head_dim"] = serde_json::json!([2, 8]);
    let error = format!("{:#}", stable_diffusion::unet(&config).unwrap_err());
    assert!(error.contains("[2, 8]") && error.contains("[8, 16]"), "{error}");
}

/// A U-Net alone that attends to states 1024 wide is one of Stable Diffusion 2.x, whatever the parts beside it come from:
/// its heads are 64 wide, what it predicts is asked for, and its text encoder has OpenCLIP's nonlinearity.
#[test]
fn a_bare_unet_of_stable_diffusion_2_is_known_by_its_width() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    let config = UNetConfig {
        channels: 64,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![1],
        heads: 2,
        head_width: Some(64),
        attention: AttentionKind::Text,
        adaptive_norm: false,
        context_width: 1024,
        temporal: false,
        ..UNetConfig::default()
    };
    let parameters = Parameters::new(CPU, 24);
    UNet3d::new(&parameters.root(), &config, &UNetPorts { inputs: 4, outputs: 4, temporal_length: 4, classes: None });
    let image = |tensor: Tensor| if tensor.dim() == 5 { tensor.squeeze_dim(2) } else { tensor };
    let named = parameters.named().into_iter();
    let bare = named.map(|(name, tensor)| (format!("model.diffusion_model.{name}"), image(tensor.detach())));
    write_tensors(&at.join("bare.safetensors"), &bare.collect());
    let text = ClipTextConfig {
        vocabulary: 600,
        positions: 12,
        width: 1024,
        hidden: 32,
        layers: 1,
        heads: 16,
        ..ClipTextConfig::default()
    };
    let parameters = Parameters::new(CPU, 25);
    ClipText::new(&parameters.root(), &text);
    let named = parameters.named().into_iter();
    write_tensors(
        &at.join("text.safetensors"),
        &named.map(|(name, tensor)| (format!("text_model.{name}"), tensor.detach())).collect(),
    );
    let parts = ["--vae", "sd/vae", "--text-encoder", "text.safetensors", "--tokenizer", "sd/tokenizer"];
    let line = import(at, "bare.safetensors", "x", &parts).error(2).to_string();
    assert!(line.contains("Stable Diffusion 2.x") && line.contains("--predict velocity"), "{line}");
    let said = import(at, "bare.safetensors", "run", &[&parts[..], &["--predict", "velocity"]].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    let experiment = Generator::open(&at.join("run"), CPU).unwrap().1;
    let found = (experiment.unet.head_width, experiment.unet.heads, experiment.objective.predict);
    assert_eq!(found, (Some(64), 2, Predict::Velocity));
    let carried = checkpoint::open(&at.join("run/text_encoder.safetensors")).unwrap().1;
    let config: TextEncoderConfig = serde_json::from_value(carried.experiment).unwrap();
    assert_eq!((config.text_encoder.activation, config.text_encoder.heads), (TextActivation::Gelu, 16));
    let heads = import(at, "bare.safetensors", "x", &[&parts[..], &["--predict", "noise", "--heads", "65"]].concat());
    assert!(heads.error(2).contains("--heads 65"), "{}", heads.err);
}
