//! Low-rank changes: LoRAs in every spelling are merged into runs, and the adapters that a run has trained leave it.

mod common;

use std::fs;

use common::{
    diffusers::{json, model_of, python, run_python, tensors},
    largest_difference, noise,
    pickle::write_checkpoint,
    relative_error, run_in, succeed_in,
    text_runs::{
        TABLE, Tensors, UNET, experiment, import, write_diffusers, write_diffusers_of, write_tensors, write_videos,
    },
};
use lvdm::{exchange::import_lora, torch::peak_host_memory, weights::stable_diffusion::is_temporal};
use serde_json::Value;
use tch::{Kind, Tensor};

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

/// Weights and changes are held once: no old weight beside its new one, though every map is changed.
#[test]
fn a_merge_holds_the_weights_once() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers_of(&at.join("sd"), 5);
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    let before = model_of(&at.join("run"));
    let mut lora = Tensors::new();
    for (name, weight) in before.iter().filter(|(name, weight)| weight.dim() >= 2 && !is_temporal(name)) {
        let place = UNET.module_in_diffusers(name.trim_end_matches(".weight")).unwrap();
        let (size, place) = (weight.size(), place.replace('.', "_"));
        let kernel: Vec<i64> = size[2..].iter().copied().filter(|&n| size.len() < 5 || n > 1).collect();
        let down = [&[1, size[1]][..], &kernel].concat();
        lora.insert(format!("lora_unet_{place}.lora_down.weight"), noise(1, &down));
        lora.insert(format!("lora_unet_{place}.lora_up.weight"), noise(2, &[size[0], 1]));
    }
    write_tensors(&at.join("full.safetensors"), &lora);
    let texts = model_of(&at.join("run/text_encoder.safetensors"));
    let weights: usize = before.values().chain(texts.values()).map(|weight| 4 * weight.numel()).sum();
    let count = lora.len() / 2;
    drop((before, texts, lora));
    let (file, run, out) = (at.join("full.safetensors"), at.join("run"), at.join("merged"));
    let (counts, peak) = peak_host_memory(|| import_lora(&file, &run, 1.0, &out).unwrap());
    assert_eq!(counts, [count, 0]);
    println!("merged: {:.2} times the weights", peak as f64 / weights as f64);
    assert!(weights > 30_000_000, "{weights} bytes are too few to tell");
    assert!(peak as f64 <= 1.3 * weights as f64, "merging holds {peak} bytes for weights of {weights}");
}
