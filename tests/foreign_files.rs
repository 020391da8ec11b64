//! Weights as people have them: told by their first bytes, called what they are, read without what trainings put around
//! them.

mod common;

use std::{collections::BTreeMap, fs, os::unix::fs::symlink, path::Path};

use common::{
    diffusers::model_of,
    noise,
    pickle::{Pickle, write_checkpoint, write_legacy_checkpoint, write_zip},
    run_in, same, source,
    text_runs::{OPTIONS, Tensors, import, write_diffusers, write_tensors, write_tokenizer},
};
use lvdm::{
    extractors::{i3d::I3d, lpips::Lpips},
    safetensors::read_safetensors,
    weights::{Layout, TensorShapes, WeightsFile, WeightsKind, read_state_dict},
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// What is found where weights should be, by its first bytes, and a word of what is said of it.
fn no_weights(folder: &Path) -> Vec<(String, &'static str)> {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4265380512\n";
    let tar = [&[b'a'; 257][..], b"ustar\x0000", &[0; 300]].concat();
    let mut whole = Vec::new();
    for name in ["whole.zip", "whole.old"] {
        let tensors = BTreeMap::from([("a".to_string(), noise(1, &[40]))]);
        let path = folder.join(name);
        if name == "whole.zip" {
            write_checkpoint(&path, &tensors, &|_| {})
        } else {
            write_legacy_checkpoint(&path, &tensors)
        }
        whole.push(fs::read(path).unwrap());
    }
    let plain: Vec<(&str, &[u8], &str)> = vec![
        ("pointer", pointer, "git-lfs"),
        ("page", b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "web page"),
        ("json", b"{\"error\": \"Unauthorized\"}", "JSON"),
        ("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "gzip"),
        ("tar", &tar, "tar archive"),
        ("empty", b"", "empty"),
        ("gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("pickle", b"\x80\x04}\x94.", "pickle"),
        ("text", b"these are no weights at all", "neither a safetensors file nor"),
        ("half.zip", &whole[0][..whole[0].len() / 2], "truncated"),
        ("half.old", &whole[1][..whole[1].len() - 20], "truncated"),
    ];
    for (name, contents, _) in &plain {
        fs::write(folder.join(name), contents).unwrap();
    }
    write_zip(&folder.join("script"), &[("m/data.pkl", b"\x80\x02N."), ("m/constants.pkl", b"\x80\x02).")]);
    write_zip(&folder.join("npz"), &[("arr_0.npy", b"\x93NUMPY")]);
    write_zip(&folder.join("other"), &[("model/readme.txt", b"hello")]);
    write_zip(&folder.join("module"), &[("m/data.pkl", b"\x80\x02cmodels\nNet\n)R.")]);
    let zips = [("script", "TorchScript"), ("npz", "numpy"), ("other", "data.pkl"), ("module", "models.Net")];
    plain.into_iter().map(|(name, _, word)| (name, word)).chain(zips).map(|(n, w)| (n.to_string(), w)).collect()
}

/// One network under any name, in any of the formats; and what is no network is called what it is, by every reader.
#[test]
fn weight_files_are_told_by_their_first_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let tensors: Tensors = [("a.weight", noise(1, &[3, 4])), ("a.bias", noise(2, &[3]).to_kind(Kind::Half))]
        .map(|(n, t)| (n.into(), t))
        .into();
    for name in ["x.safetensors", "X.SAFETENSORS", "x.ckpt", "X.CKPT", "x", "x.bin", "x.pth"] {
        let path = at.join(name);
        write_tensors(&path, &tensors);
        same(&read_state_dict(&path).unwrap(), &tensors);
        write_checkpoint(&path, &tensors, &|_| {});
        same(&read_state_dict(&path).unwrap(), &tensors);
        write_legacy_checkpoint(&path, &tensors);
        same(&read_state_dict(&path).unwrap(), &tensors);
        let shapes = WeightsFile::open(&path).unwrap().shapes().clone();
        assert_eq!(shapes, TensorShapes::from([("a.weight".into(), vec![3, 4]), ("a.bias".into(), vec![3])]));
    }
    // a header of 19280 bytes begins as a zip file does
    let mut padded = fs::read(source("tests/parity/sd_vae.safetensors")).unwrap();
    let length = u64::from_le_bytes(padded[..8].try_into().unwrap()) as usize;
    assert!(length < 0x4b50);
    padded.splice(8 + length..8 + length, vec![b' '; 0x4b50 - length]);
    padded[..8].copy_from_slice(&0x4b50u64.to_le_bytes());
    assert!(padded.starts_with(b"PK"));
    fs::write(at.join("padded.ckpt"), padded).unwrap();
    same(
        &read_state_dict(&at.join("padded.ckpt")).unwrap(),
        &read_safetensors(&source("tests/parity/sd_vae.safetensors")).unwrap().0,
    );

    write_tokenizer(&at.join("sd/tokenizer"));
    for (name, word) in no_weights(at) {
        let error = format!("{:#}", WeightsFile::open(&at.join(&name)).err().expect(&name));
        assert!(error.contains(word) && error.contains(&name), "{name}: {error}");
        if ["pointer", "page", "empty", "half.old"].contains(&name.as_str()) {
            for said in [import(at, &name, "run", &OPTIONS), run_in(at, &["import", "lvdm", &name, "--out", "run"])] {
                let line = said.error(1);
                assert!(line.contains(word) && line.contains(&name) && !at.join("run").exists(), "{line}");
            }
        }
        if ["pointer", "page", "empty", "gzip"].contains(&name.as_str()) {
            let path = at.join(&name);
            let i3d = I3d::load(Some(&path), CPU).err().unwrap();
            let lpips = Lpips::load(Some(&path), CPU, Kind::Float).err().unwrap();
            for error in
                [format!("{i3d:#}"), format!("{lpips:#}"), format!("{:#}", read_safetensors(&path).unwrap_err())]
            {
                assert!(error.contains(word) && error.contains(&name), "{error}");
            }
        }
    }
}

/// Cut anywhere or with any bit flipped, a file of before PyTorch 1.6 is refused or gives numbers of its own tensors, each
/// its own: it has no sum that would tell a changed number or stride, but it is never read into the next storage, and
/// there is never a panic.
#[test]
fn damage_of_an_old_checkpoint_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.ckpt");
    let tensors = Tensors::from([("a".to_string(), noise(1, &[2, 3])), ("b".to_string(), noise(2, &[3, 2]))]);
    write_legacy_checkpoint(&path, &tensors);
    let whole = fs::read(&path).unwrap();
    let numbers = |tensor: &Tensor| Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
    // a length of 8 bytes and six numbers each
    let is_number = |byte: usize| {
        let from_end = whole.len() - byte;
        from_end <= 24 || (33..=56).contains(&from_end)
    };
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(read_state_dict(&path).is_err(), "cut to {length} of {} bytes", whole.len());
    }
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &flipped).unwrap();
        let read = std::panic::catch_unwind(|| read_state_dict(&path)).expect("no panic");
        let Ok(found) = read else { continue };
        for (name, tensor) in &found {
            let (Some(own), false) = (tensors.get(name), is_number(bit / 8)) else { continue };
            let own = numbers(own);
            for number in numbers(tensor) {
                assert!(own.contains(&number), "bit {bit}: {number} is none of `{name}`'s {own:?}");
            }
        }
    }
    // more or fewer elements than the storage has, which would be read on into the next one
    let flipped = |at: usize, value: u8| {
        let mut flipped = whole.clone();
        assert_eq!(flipped[at], 6);
        flipped[at] = value;
        fs::write(&path, &flipped).unwrap();
        format!("{:#}", read_state_dict(&path).unwrap_err())
    };
    let first = whole.windows(7).position(|bytes| bytes == b"J\x06\0\0\0Nt").unwrap() + 1;
    for (at, value) in [(first, 8), (first, 4), (whole.len() - 64, 7), (whole.len() - 64, 5)] {
        let error = flipped(at, value);
        assert!(error.contains("storage"), "{error}");
    }
}

fn shapes(names: &[(&str, &[i64])]) -> TensorShapes {
    names.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
}

/// Names of public files of each kind.
#[test]
fn what_a_file_is_is_told_by_its_names() {
    use WeightsKind as Kind;
    let whole = "model.diffusion_model.input_blocks.0.0.weight";
    let vae = "first_stage_model.decoder.conv_in.weight";
    let key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight";
    let text = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";
    let unet = [
        "down_blocks.0.resnets.0.conv1.weight",
        "up_blocks.0.resnets.0.conv1.weight",
        "time_embedding.linear_1.weight",
    ];
    for (names, kind) in [
        (
            shapes(&[(whole, &[320, 4, 3, 3]), (key, &[320, 768]), (vae, &[512, 4, 3, 3]), (text, &[49408, 768])]),
            Kind::StableDiffusion1(Layout::Original),
        ),
        (
            shapes(&[
                (whole, &[320, 4, 3, 3]),
                (key, &[320, 1024]),
                (vae, &[512, 4, 3, 3]),
                ("cond_stage_model.model.token_embedding.weight", &[49408, 1024]),
            ]),
            Kind::StableDiffusion2(Layout::Original),
        ),
        (
            shapes(&[
                (whole, &[320, 4, 3, 3]),
                ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", &[768]),
            ]),
            Kind::StableDiffusionXl,
        ),
        (
            shapes(&[("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", &[4608, 1536])]),
            Kind::StableDiffusion3,
        ),
        (shapes(&[("double_blocks.0.img_attn.qkv.weight", &[9216, 3072])]), Kind::Transformer),
        (
            shapes(&[
                ("transformer_blocks.0.attn.to_q.weight", &[8, 8]),
                ("single_transformer_blocks.0.attn.to_q.weight", &[8, 8]),
            ]),
            Kind::Transformer,
        ),
        (shapes(&[(whole, &[320, 9, 3, 3]), (vae, &[512, 4, 3, 3])]), Kind::Inpainting),
        (shapes(&[(whole, &[320, 8, 3, 3]), (vae, &[512, 4, 3, 3])]), Kind::InstructPix2Pix),
        (shapes(&[(whole, &[320, 4, 3, 3])]), Kind::UNet(Layout::Original)),
        (unet.iter().map(|name| (name.to_string(), vec![8])).collect(), Kind::UNet(Layout::Diffusers)),
        (
            shapes(&[("input_blocks.0.0.weight", &[320, 4, 3, 3]), ("output_blocks.0.0.in_layers.0.weight", &[8])]),
            Kind::UNet(Layout::Original),
        ),
        (
            shapes(&[
                ("encoder.conv_in.weight", &[128, 3, 3, 3]),
                ("decoder.conv_in.weight", &[512, 4, 3, 3]),
                ("decoder.mid.attn_1.k.bias", &[512]),
            ]),
            Kind::Autoencoder(Layout::Original),
        ),
        (
            shapes(&[("first_stage_model.encoder.conv_in.weight", &[128, 3, 3, 3]), (vae, &[512, 4, 3, 3])]),
            Kind::Autoencoder(Layout::Original),
        ),
        (
            shapes(&[
                ("encoder.conv_in.weight", &[128, 3, 3, 3]),
                ("decoder.conv_in.weight", &[512, 4, 3, 3]),
                ("decoder.mid_block.attentions.0.to_k.bias", &[512]),
            ]),
            Kind::Autoencoder(Layout::Diffusers),
        ),
        (
            shapes(&[("decoder.conv_in.weight", &[512, 4, 3, 3]), ("post_quant_conv.bias", &[4])]),
            Kind::Decoder(Layout::Original),
        ),
        (shapes(&[("text_model.embeddings.token_embedding.weight", &[49408, 768])]), Kind::TextEncoder),
        (
            shapes(&[("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", &[8, 320, 1, 1])]),
            Kind::Lora(Layout::Original),
        ),
        (shapes(&[("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", &[768, 8])]), Kind::Lora(Layout::Original)),
        (
            shapes(&[("base_model.model.down_blocks.0.attentions.0.to_q.lora_A.weight", &[8, 320])]),
            Kind::Lora(Layout::Peft),
        ),
        (
            shapes(&[("unet.down_blocks.0.attentions.0.to_q.lora.down.weight", &[8, 320])]),
            Kind::Lora(Layout::Diffusers),
        ),
        (
            shapes(&[("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", &[8, 320])]),
            Kind::Lora(Layout::Diffusers),
        ),
        (
            shapes(&[
                ("down_blocks.0.attn1.to_q.base_layer.weight", &[8, 8]),
                ("down_blocks.0.attn1.to_q.lora_A.default.weight", &[2, 8]),
            ]),
            Kind::UnfusedLora,
        ),
        (shapes(&[("emb_params", &[2, 768])]), Kind::TextualInversion),
        (shapes(&[("<cat-toy>", &[768])]), Kind::TextualInversion),
        (shapes(&[("clip_g", &[2, 1280]), ("clip_l", &[2, 768])]), Kind::TextualInversion),
        (shapes(&[("control_model.zero_convs.0.0.weight", &[320, 320, 1, 1])]), Kind::ControlNet),
        (
            shapes(&[
                ("controlnet_cond_embedding.conv_in.weight", &[16, 3, 3, 3]),
                ("down_blocks.0.resnets.0.conv1.weight", &[8]),
            ]),
            Kind::ControlNet,
        ),
        (shapes(&[("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", &[320])]), Kind::MotionModule),
        (
            shapes(&[
                ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1_tmp.to_q.weight", &[8, 8]),
                (whole, &[8, 4, 3, 3]),
            ]),
            Kind::Video,
        ),
        (shapes(&[("something.weight", &[3, 3])]), Kind::Unknown),
        (shapes(&[]), Kind::Unknown),
    ] {
        assert_eq!(WeightsKind::of_shapes(&names), kind, "{names:?}");
    }
}

/// A file or folder that is no Stable Diffusion 1.x is refused by its name, whatever else is asked for.
#[test]
fn what_is_no_stable_diffusion_is_called_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (name, tensor, words) in [
        ("lora", "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("peft", "base_model.model.mid_block.to_q.lora_B.weight", "a LoRA"),
        ("inversion", "emb_params", "textual inversion"),
        ("control", "control_model.zero_convs.0.0.weight", "a ControlNet"),
        ("decoder", "decoder.conv_in.weight", "the encoder and the U-Net are missing"),
        ("motion", "up_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "motion module of AnimateDiff"),
    ] {
        write_tensors(&at.join(name), &Tensors::from([(tensor.to_string(), noise(1, &[24, 24]))]));
        assert!(import(at, name, "run", &[]).error(1).contains(words), "{name}");
        if name != "decoder" {
            assert!(run_in(at, &["import", "lvdm", name, "--out", "run"]).error(1).contains(words), "{name}");
        }
    }
    // as the original code of textual inversion saves them
    let mut pickle = Pickle(b"\x80\x02}(".to_vec());
    pickle.text("string_to_token");
    pickle.raw(b"}");
    pickle.text("string_to_param");
    pickle.raw(b"}u.");
    write_zip(&at.join("words.pt"), &[("archive/data.pkl", &pickle.0)]);
    assert!(import(at, "words.pt", "run", &[]).error(1).contains("textual inversion"));

    let unet = json!({"_class_name": "UNet2DConditionModel", "in_channels": 4, "cross_attention_dim": 768});
    let with = |key: &str, value: serde_json::Value| {
        let mut config = unet.clone();
        config[key] = value;
        config
    };
    let pipeline = |class: &str| Some(json!({"_class_name": class}));
    for (i, (index, part, config, words)) in [
        (pipeline("StableDiffusionXLPipeline"), "unet", unet.clone(), "SDXL"),
        (None, "unet", with("addition_embed_type", json!("text_time")), "SDXL"),
        (pipeline("StableDiffusion3Pipeline"), "transformer", json!({}), "Stable Diffusion 3"),
        (pipeline("FluxPipeline"), "transformer", json!({}), "Flux"),
        (None, "transformer", json!({}), "transformer"),
        (pipeline("StableDiffusionInpaintPipeline"), "unet", with("in_channels", json!(9)), "inpainting"),
        (pipeline("StableDiffusionInstructPix2PixPipeline"), "unet", with("in_channels", json!(8)), "InstructPix2Pix"),
        (pipeline("StableVideoDiffusionPipeline"), "unet", unet.clone(), "StableVideoDiffusionPipeline"),
        (None, "", json!({"_class_name": "ControlNetModel"}), "ControlNet"),
        (None, "", json!({"_class_name": "AutoencoderKL"}), "image autoencoder (VAE) alone"),
        (None, "", json!({"architectures": ["CLIPTextModel"]}), "a text encoder alone"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("folder{i}");
        let place = at.join(&name).join(part);
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("config.json"), config.to_string()).unwrap();
        if let Some(index) = index {
            fs::write(at.join(&name).join("model_index.json"), index.to_string()).unwrap();
        }
        assert!(import(at, &name, "run", &[]).error(1).contains(words), "{words}");
    }
    fs::create_dir(at.join("adapter")).unwrap();
    fs::write(at.join("adapter/adapter_config.json"), "{}").unwrap();
    assert!(import(at, "adapter", "run", &[]).error(1).contains("a LoRA"));
    fs::create_dir(at.join("one")).unwrap();
    fs::write(at.join("one/model.ckpt"), "").unwrap();
    assert!(import(at, "one", "run", &[]).error(2).contains("one/model.ckpt is meant, give that"));
}

/// Pickled, in shards of either format, in variants, in a hub's cache: the same run. Else what is there is said.
#[test]
fn folders_of_weights_are_read_as_they_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    let run = |path: &str, name: &str, more: &[&str]| {
        let said = import(at, path, name, more);
        assert_eq!(said.status, 0, "{}", said.err);
        (model_of(&at.join(name)), said)
    };
    let (expected, _) = run("sd", "plain", &[]);
    assert!(run_in(at, &["import", "lvdm", "sd", "--out", "x"]).error(2).contains("`lvdm import stable-diffusion`"));
    let unet = at.join("sd/unet");
    let file = |name: &str| unet.join(format!("diffusion_pytorch_model{name}"));
    let whole = read_safetensors(&file(".safetensors")).unwrap().0;

    // a part itself
    let line = import(at, "sd/unet", "x", &[]).error(2).to_string();
    assert!(line.contains("a U-Net alone") && line.contains("It is a part of"), "{line}");

    // other weights beside the plain ones
    let other: Tensors = whole.iter().map(|(name, tensor)| (name.clone(), tensor * 2.0)).collect();
    write_tensors(&file(".non_ema.safetensors"), &other);
    same(&run("sd", "beside", &[]).0, &expected);
    let (twice, _) = run("sd", "non_ema", &["--variant", "non_ema"]);
    assert!(twice["input_blocks.0.0.weight"].equal(&(&expected["input_blocks.0.0.weight"] * 2.0)));
    let line = import(at, "sd", "x", &["--variant", "fp8"]).error(2).to_string();
    assert!(line.contains("variants there: fp16, non_ema"), "{line}");
    fs::remove_file(file(".safetensors")).unwrap();
    let line = import(at, "sd", "x", &[]).error(2).to_string();
    assert!(line.contains("--variant non_ema takes them"), "{line}");
    fs::remove_file(file(".non_ema.safetensors")).unwrap();

    // PyTorch's file alone
    write_checkpoint(&file(".bin"), &whole, &|_| {});
    same(&run("sd", "pickled", &[]).0, &expected);
    fs::remove_file(file(".bin")).unwrap();

    // shards
    for (ending, index) in [
        ("safetensors", ".safetensors.index.json"),
        ("bin", ".bin.index.json"),
        ("safetensors", ".safetensors.index.fp16.json"),
    ] {
        let mut map = BTreeMap::new();
        let shard = |i: usize| format!("diffusion_pytorch_model-0000{}-of-00002.{ending}", i + 1);
        for i in 0..2 {
            let part: Tensors = whole
                .iter()
                .enumerate()
                .filter(|(n, _)| n % 2 == i)
                .map(|(_, (name, tensor))| (name.clone(), tensor.shallow_clone()))
                .collect();
            map.extend(part.keys().map(|name| (name.clone(), shard(i))));
            let path = unet.join(shard(i));
            if ending == "bin" { write_checkpoint(&path, &part, &|_| {}) } else { write_tensors(&path, &part) }
        }
        fs::write(file(index), json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()).unwrap();
        same(&run("sd", &format!("sharded{index}"), &[]).0, &expected);
        fs::remove_file(unet.join(shard(1))).unwrap();
        let line = import(at, "sd", "x", &[]).error(1).to_string();
        assert!(
            line.contains("the shard diffusion_pytorch_model-00002-of-00002") && line.contains("missing"),
            "{line}"
        );
        fs::remove_file(file(index)).unwrap();
        fs::remove_file(unet.join(shard(0))).unwrap();
    }
    fs::write(file(".safetensors.index.json"), json!({"weight_map": {"a": "../../x"}}).to_string()).unwrap();
    assert!(import(at, "sd", "x", &[]).error(1).contains("lies in no file of this folder"));
    fs::remove_file(file(".safetensors.index.json")).unwrap();

    // a LoRA beside the weights
    let unfused: Tensors = whole
        .iter()
        .map(|(name, tensor)| (name.replace(".to_q.", ".to_q.base_layer."), tensor.shallow_clone()))
        .collect();
    write_tensors(&file(".safetensors"), &unfused);
    assert!(import(at, "sd", "x", &[]).error(1).contains("pipe.fuse_lora()"));
    fs::remove_file(file(".safetensors")).unwrap();

    // what is not read is named
    fs::write(unet.join("diffusion_flax_model.msgpack"), "x").unwrap();
    assert!(import(at, "sd", "x", &[]).error(1).contains("diffusion_flax_model.msgpack is of Flax"));

    // a description that was not downloaded
    let described = fs::read(unet.join("config.json")).unwrap();
    fs::write(unet.join("config.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 743\n")
        .unwrap();
    assert!(import(at, "sd", "x", &[]).error(1).contains("config.json is not JSON but a pointer of git-lfs"));
    fs::write(unet.join("config.json"), [b"\xef\xbb\xbf", &described[..]].concat()).unwrap();

    // a hub's cache, whose files are links to blobs
    fs::create_dir_all(at.join("models--a--b/blobs")).unwrap();
    write_tensors(&at.join("models--a--b/blobs/4d7a"), &whole);
    fs::create_dir_all(at.join("models--a--b/snapshots")).unwrap();
    fs::rename(at.join("sd"), at.join("models--a--b/snapshots/39593d")).unwrap();
    let link = at.join("models--a--b/snapshots/39593d/unet/diffusion_pytorch_model.safetensors");
    symlink("../../../blobs/4d7a", &link).unwrap();
    let (found, said) = run("models--a--b", "cache", &[]);
    same(&found, &expected);
    assert!(said.err.contains("snapshots/39593d is taken"), "{}", said.err);
    fs::create_dir(at.join("hub")).unwrap();
    symlink("../models--a--b", at.join("hub/models--a--b")).unwrap();
    assert!(import(at, "hub", "x", &[]).error(2).contains("if hub/models--a--b is meant, give that"));
    fs::remove_file(at.join("models--a--b/blobs/4d7a")).unwrap();
    assert!(import(at, "models--a--b", "x", &[]).error(1).contains("unfinished download"));
    fs::create_dir_all(at.join("models--a--b/snapshots/aa00")).unwrap();
    let line = import(at, "models--a--b", "x", &[]).error(2).to_string();
    assert!(line.contains("snapshots/39593d") && line.contains("snapshots/aa00"), "{line}");
    assert!(!at.join("x").exists());
}
