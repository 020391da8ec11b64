//! A small Stable Diffusion with random weights, captioned videos, and what trains on them.

use std::{collections::BTreeMap, fs, path::Path};

use lvdm::{
    codecs::{ImageAutoencoder, ImageAutoencoderConfig},
    data::write_video,
    networks::{AttentionKind, Ports, UNet3d, UNetConfig},
    nn::Parameters,
    safetensors::write_safetensors_atomically,
    text::{ClipText, ClipTextConfig},
    weights::stable_diffusion::Network,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{Said, moving_clips, run_in, wake};

const CPU: Device = Device::Cpu;

pub type Tensors = BTreeMap<String, Tensor>;

pub const UNET: Network = Network::UNet { blocks_per_level: 1 };
pub const AUTOENCODER: Network = Network::Autoencoder { levels: 2 };

/// The three networks with random weights, none of them zero, and where each stands in an original checkpoint.
pub fn networks() -> [(Network, Parameters, &'static str); 3] {
    networks_of(1)
}

/// As [`networks`], so many times as wide.
fn networks_of(times: i64) -> [(Network, Parameters, &'static str); 3] {
    let unet = UNetConfig {
        channels: 32 * times,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![1],
        heads: 2,
        attention: AttentionKind::Text,
        adaptive_norm: false,
        norm_groups: 16,
        context_width: 24 * times,
        ..UNetConfig::default()
    };
    let image = ImageAutoencoderConfig {
        widths: vec![16 * times, 32 * times],
        blocks_per_level: 1,
        norm_groups: 16,
        ..ImageAutoencoderConfig::default()
    };
    let text = ClipTextConfig {
        vocabulary: 600,
        positions: 12,
        width: 24 * times,
        hidden: 48 * times,
        layers: 2,
        heads: 2,
        ..ClipTextConfig::default()
    };
    let [one, two, three] = [21, 22, 23].map(|seed| Parameters::new(CPU, seed));
    let ports = Ports::of([4, 4, 1, 1]);
    UNet3d::new(&one.root(), &unet, &ports);
    ImageAutoencoder::new(&two.root(), &image);
    ClipText::new(&three.root(), &text);
    for parameters in [&one, &two, &three] {
        wake(parameters);
    }
    [
        (UNET, one, "model.diffusion_model."),
        (AUTOENCODER, two, "first_stage_model."),
        (Network::TextEncoder, three, "cond_stage_model.transformer.text_model."),
    ]
}

/// All bytes as letters, a few merges, start and end.
pub fn write_tokenizer(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let prints = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let letters: Vec<String> = (0..256u32)
        .filter(prints)
        .chain((0..256u32).filter(|b| !prints(b)).zip(256..).map(|(_, c)| c))
        .map(|c| char::from_u32(c).unwrap().to_string())
        .collect();
    let merges = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>"];
    let mut tokens = letters.clone();
    tokens.extend(letters.iter().map(|letter| format!("{letter}</w>")));
    tokens.extend(merges.map(|pair| pair.replace(' ', "")));
    tokens.extend(["<|startoftext|>", "<|endoftext|>"].map(String::from));
    let vocabulary: BTreeMap<&String, usize> = tokens.iter().zip(0..).collect();
    fs::write(folder.join("vocab.json"), serde_json::to_string(&vocabulary).unwrap()).unwrap();
    fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).unwrap();
}

pub fn write_tensors(path: &Path, tensors: &Tensors) {
    let tensors: Vec<(&String, &Tensor)> = tensors.iter().collect();
    write_safetensors_atomically(path, &tensors, &Value::Null).unwrap();
}

/// A folder as diffusers writes it.
pub fn write_diffusers(folder: &Path) {
    write_diffusers_of(folder, 1);
}

/// As [`write_diffusers`], its networks so many times as wide.
pub fn write_diffusers_of(folder: &Path, times: i64) {
    let unet = json!({"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": [32 * times, 64 * times], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 24 * times, "attention_head_dim": 2,
        "norm_num_groups": 16});
    let vae = json!({"_class_name": "AutoencoderKL", "block_out_channels": [16 * times, 32 * times], "layers_per_block": 1,
        "down_block_types": vec!["DownEncoderBlock2D"; 2], "up_block_types": vec!["UpDecoderBlock2D"; 2],
        "norm_num_groups": 16, "scaling_factor": 0.3});
    let text = json!({"vocab_size": 600, "max_position_embeddings": 12, "hidden_size": 24 * times, "intermediate_size": 48 * times,
        "num_hidden_layers": 2, "num_attention_heads": 2, "model_type": "clip_text_model"});
    let files =
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.safetensors"];
    let parts = [("unet", unet), ("vae", vae), ("text_encoder", text)];
    for (((name, config), file), (network, parameters, _)) in parts.into_iter().zip(files).zip(networks_of(times)) {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let mut tensors = network.in_diffusers(&parameters);
        if name == "text_encoder" {
            tensors = tensors.into_iter().map(|(name, tensor)| (format!("text_model.{name}"), tensor)).collect();
            tensors.insert("text_model.embeddings.position_ids".into(), Tensor::arange(12, (Kind::Int64, CPU)));
        }
        write_tensors(&folder.join(file), &tensors);
    }
    write_tokenizer(&folder.join("tokenizer"));
    fs::create_dir(folder.join("scheduler")).unwrap();
    let scheduler = json!({"beta_start": 0.001, "beta_end": 0.0125, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 900, "clip_sample": false});
    fs::write(folder.join("scheduler/scheduler_config.json"), scheduler.to_string()).unwrap();
}

/// The three networks as one original file has them: images' kernels under our names, each network at its place.
pub fn original() -> Tensors {
    let mut original = Tensors::new();
    for (network, parameters, place) in networks() {
        for (name, tensor) in parameters.named() {
            if network.diffusers_name(&name).is_some() {
                let tensor = if tensor.dim() == 5 { tensor.squeeze_dim(2) } else { tensor };
                original.insert(format!("{place}{name}"), tensor.detach());
            }
        }
    }
    original
}

/// What an original file of these networks does not tell.
pub const OPTIONS: [&str; 8] =
    ["--tokenizer", "sd/tokenizer", "--heads", "2", "--norm-groups", "16", "--text-heads", "2"];

pub const SIZE: [&str; 4] = ["--frames", "4", "--resolution", "16"];

pub fn import(at: &Path, path: &str, run: &str, more: &[&str]) -> Said {
    run_in(at, &[&["import", "stable-diffusion", path, "--out", run], &SIZE[..], more].concat())
}

pub const CAPTIONS: [&str; 3] = ["a red cat", "a dog", "a very long caption of more than twelve tokens, which is cut"];

/// Captioned videos in both forms: a text beside each, and a table.
pub fn write_videos(at: &Path) {
    fs::create_dir_all(at.join("videos/part")).unwrap();
    let clips = moving_clips(4, 12, 16);
    let mut table = "videoid,name,page_dir,contentUrl\n".to_string();
    for (i, caption) in CAPTIONS.iter().enumerate() {
        let path = at.join(format!("videos/part/{i}.mp4"));
        write_video(&path, &clips.get(i as i64), 8.0).unwrap();
        fs::write(path.with_extension("txt"), caption).unwrap();
        table += &format!("{i},\"{caption}\",part,\n");
    }
    write_video(&at.join("videos/silent.mp4"), &clips.get(3), 8.0).unwrap();
    fs::write(at.join("table.csv"), table + "7,not there,part,\nsilent,,,\n").unwrap();
}

pub fn experiment(at: &Path, name: &str, dataset: &str, more: &str) -> String {
    let file = format!("{name}.yaml");
    let text = format!(
        "seed: 5\ndata: {{dataset: {dataset}, frames: 4, resolution: 16, workers: 1}}\nautoencoder: sd-run\n\
         start_from: sd-run\ntext: {{encoder: sd-run, drop: 0.3, prompts: [a cat]}}\n\
         unet: {{channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [1], heads: 2, \
         attention: text, adaptive_norm: false, norm_groups: 16, norm_per_frame: true, context_width: 24}}\n\
         schedule: {{kind: scaled_linear, steps: 900, beta_start: 0.001, beta_end: 0.0125}}\n\
         optimizer: {{kind: adamw, learning_rate: 1.0e-3}}\n\
         trainer: {{steps: 4, batch: 2, device: cpu, log_every: 1, checkpoint_every: 2, picture_every: 4, ema_decay: 0.5}}\n\
         sampler: {{kind: ddim, steps: 2, eta: 1.0}}\n{more}"
    );
    fs::write(at.join(&file), text).unwrap();
    file
}

pub const BESIDE: &str = "{kind: captioned, root: videos}";
pub const TABLE: &str = "{kind: webvid, table: table.csv, root: videos}";
