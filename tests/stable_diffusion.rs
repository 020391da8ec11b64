//! Stable Diffusion's parts: their names in every spelling, the inflated U-Net, the image autoencoder, the text encoder.

mod common;

use std::{collections::BTreeMap, fs};

use common::{largest_difference, noise, relative_error, source, wake};
use lvdm::{
    codecs::{AutoencoderConfig, CodecConfig, ImageAutoencoder, ImageAutoencoderConfig, LatentSpace, Normalization},
    exchange::diffusers_config,
    networks::{Inputs, Network as _, Ports, UNet3d, UNetConfig},
    nn::Parameters,
    text::{ClipText, ClipTextConfig, TextActivation},
    weights::{stable_diffusion::Network, synthesize},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};

const CPU: Device = Device::Cpu;

type Tensors = BTreeMap<String, Tensor>;

/// Names with shapes.
type Shapes = BTreeMap<String, Vec<i64>>;

/// A case's configuration, in diffusers' words.
fn configuration(case: &str) -> Value {
    let bytes = fs::read(source(&format!("tests/parity/{case}.safetensors"))).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    serde_json::from_str(header["__metadata__"]["config"].as_str().unwrap()).unwrap()
}

/// What a diffusers file lists.
fn listed(file: &str) -> Shapes {
    let text = fs::read_to_string(source(&format!("tests/parity/names/{file}.json"))).unwrap();
    serde_json::from_str::<Vec<(String, Vec<i64>)>>(&text).unwrap().into_iter().collect()
}

fn shapes(tensors: &Tensors) -> Shapes {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect()
}

fn synthetic(shapes: &Shapes) -> Tensors {
    let of_shape = |shape: &Vec<i64>| Tensor::zeros([1], (Kind::Float, CPU)).expand(shape, false);
    let named: Vec<_> = shapes.iter().map(|(name, shape)| (name.clone(), of_shape(shape))).collect();
    synthesize(&named, "")
}

fn copies(tensors: &Tensors) -> Tensors {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

const UNET: Network = Network::UNet { blocks_per_level: 1 };
const AUTOENCODER: Network = Network::Autoencoder { levels: 2 };

fn unet_config() -> UNetConfig {
    diffusers_config::unet(&configuration("sd_unet_inflated")).unwrap().0
}

fn unet(config: &UNetConfig) -> (UNet3d, Parameters) {
    let parameters = Parameters::new(CPU, 5);
    let ports = Ports::of([4, 5, 1, 1]);
    (UNet3d::new(&parameters.root(), config, &ports), parameters)
}

fn autoencoder() -> (ImageAutoencoder, Parameters) {
    let parameters = Parameters::new(CPU, 5);
    let config = diffusers_config::autoencoder(&configuration("sd_vae")).unwrap();
    (ImageAutoencoder::new(&parameters.root(), &config), parameters)
}

/// Each network with its diffusers names, and where it stands in an original checkpoint.
fn both() -> [(Network, Parameters, Shapes, &'static str); 2] {
    [
        (UNET, unet(&unet_config()).1, listed("sd_unet_diffusers_names"), "model.diffusion_model."),
        (AUTOENCODER, autoencoder().1, listed("sd_vae_diffusers_names"), "first_stage_model."),
    ]
}

/// diffusers → ours → the original checkpoint's names, amid what else lies there → ours → diffusers: every tensor
/// is where it was, and every name of a diffusers file is one of ours.
#[test]
fn names_travel_round() {
    for (network, parameters, listed, place) in both() {
        assert_eq!(shapes(&network.in_diffusers(&parameters)), listed);
        let tensors = synthetic(&listed);
        let import = network.import(&tensors, &parameters).unwrap();
        assert_eq!((import.loaded.len(), import.ignored.len()), (listed.len(), 0));
        assert_eq!(import.loaded.len() + import.new.len(), parameters.named().len());

        // images' kernels under our names
        let image_shape = |name: &str, tensor: &Tensor| match tensor.dim() {
            5 => tensor.squeeze_dim(2),
            _ => {
                assert!(tensor.dim() < 5, "{name}");
                tensor.shallow_clone()
            }
        };
        let mut original: Tensors = parameters
            .named()
            .into_iter()
            .filter(|(name, _)| !import.new.contains(name))
            .map(|(name, tensor)| (format!("{place}{name}"), image_shape(&name, &tensor)))
            .collect();
        let other = if place.starts_with("model") { "first_stage_model." } else { "model.diffusion_model." };
        let clutter = ["model_ema.decay", "betas", "logvar", "cond_stage_model.transformer.x"].map(String::from);
        for name in clutter.into_iter().chain([format!("{other}x"), "first_stage_model.loss.logvar".to_string()]) {
            original.insert(name, Tensor::from(1.0));
        }
        let again = Parameters::new(CPU, 6);
        match network {
            Network::UNet { .. } => {
                let ports = Ports::of([4, 5, 1, 1]);
                UNet3d::new(&again.root(), &unet_config(), &ports);
            }
            _ => {
                let config = diffusers_config::autoencoder(&configuration("sd_vae")).unwrap();
                ImageAutoencoder::new(&again.root(), &config);
            }
        }
        let import = network.import(&original, &again).unwrap();
        assert_eq!((import.loaded.len(), import.ignored.len()), (listed.len(), 6));
        for (name, tensor) in network.in_diffusers(&again) {
            assert!(tensor.equal(&tensors[&name]), "{name}");
        }
        assert_eq!(import.to_string(), format!("{} loaded, {} new, 6 ignored", listed.len(), import.new.len()));
    }
}

/// diffusers' U-Net as its own modules count: levels, and in each the residual blocks, attentions and resizing.
fn diffusers_unet(widths: &[i64], attends: &[bool], blocks: usize, context: i64) -> Shapes {
    let mut found = BTreeMap::new();
    let mut add = |name: String, shape: &[i64]| {
        found.insert(format!("{name}.weight"), shape.to_vec());
        if !["to_q", "to_k", "to_v"].iter().any(|map| name.ends_with(map)) {
            found.insert(format!("{name}.bias"), shape[..1].to_vec());
        }
    };
    let (base, time) = (widths[0], 4 * widths[0]);
    fn residual(add: &mut dyn FnMut(String, &[i64]), at: String, inputs: i64, width: i64, time: i64) {
        add(format!("{at}.norm1"), &[inputs]);
        add(format!("{at}.conv1"), &[width, inputs, 3, 3]);
        add(format!("{at}.time_emb_proj"), &[width, time]);
        add(format!("{at}.norm2"), &[width]);
        add(format!("{at}.conv2"), &[width, width, 3, 3]);
        if inputs != width {
            add(format!("{at}.conv_shortcut"), &[width, inputs, 1, 1]);
        }
    }
    fn transformer(add: &mut dyn FnMut(String, &[i64]), at: String, width: i64, context: i64) {
        add(format!("{at}.norm"), &[width]);
        for name in ["proj_in", "proj_out"] {
            add(format!("{at}.{name}"), &[width, width, 1, 1]);
        }
        let block = format!("{at}.transformer_blocks.0");
        for (name, source) in [("attn1", width), ("attn2", context)] {
            add(format!("{block}.{name}.to_q"), &[width, width]);
            add(format!("{block}.{name}.to_k"), &[width, source]);
            add(format!("{block}.{name}.to_v"), &[width, source]);
            add(format!("{block}.{name}.to_out.0"), &[width, width]);
        }
        for i in 1..=3 {
            add(format!("{block}.norm{i}"), &[width]);
        }
        add(format!("{block}.ff.net.0.proj"), &[8 * width, width]);
        add(format!("{block}.ff.net.2"), &[width, 4 * width]);
    }
    add("time_embedding.linear_1".to_string(), &[time, base]);
    add("time_embedding.linear_2".to_string(), &[time, time]);
    add("conv_in".to_string(), &[base, 4, 3, 3]);
    add("conv_norm_out".to_string(), &[base]);
    add("conv_out".to_string(), &[4, base, 3, 3]);
    let levels = widths.len();
    for (level, &width) in widths.iter().enumerate() {
        let before = widths[level.saturating_sub(1)];
        for i in 0..blocks {
            let inputs = if i == 0 { before } else { width };
            residual(&mut add, format!("down_blocks.{level}.resnets.{i}"), inputs, width, time);
            if attends[level] {
                transformer(&mut add, format!("down_blocks.{level}.attentions.{i}"), width, context);
            }
        }
        if level + 1 < levels {
            add(format!("down_blocks.{level}.downsamplers.0.conv"), &[width, width, 3, 3]);
        }
        // the way up, from the deepest level
        let up = levels - 1 - level;
        let below = widths[(level + 1).min(levels - 1)];
        for i in 0..=blocks {
            let inputs = if i == 0 { below } else { width };
            let skip = if i == blocks { before } else { width };
            residual(&mut add, format!("up_blocks.{up}.resnets.{i}"), inputs + skip, width, time);
            if attends[level] {
                transformer(&mut add, format!("up_blocks.{up}.attentions.{i}"), width, context);
            }
        }
        if level > 0 {
            add(format!("up_blocks.{up}.upsamplers.0.conv"), &[width, width, 3, 3]);
        }
    }
    let deepest = widths[levels - 1];
    for i in 0..2 {
        residual(&mut add, format!("mid_block.resnets.{i}"), deepest, deepest, time);
    }
    transformer(&mut add, "mid_block.attentions.0".to_string(), deepest, context);
    found
}

/// Whatever the levels, the blocks a level and where there is attention: each of our parameters has the name and
/// the shape that diffusers gives to the one of the same place.
#[test]
fn any_unet_has_its_diffusers_names() {
    let listed = listed("sd_unet_diffusers_names");
    assert_eq!(diffusers_unet(&[32, 64], &[true, false], 1, 48), listed, "the list of names is a witness");
    for (widths, attends, blocks) in [
        (vec![320, 640, 1280, 1280], vec![true, true, true, false], 2),
        (vec![64, 128, 192], vec![false, true, false], 3),
        (vec![32, 32, 32], vec![false, false, false], 1),
        (vec![32], vec![true], 2),
        (vec![32, 64, 64, 128, 256], vec![false, true, true, false, true], 1),
    ] {
        let block = |kind: &str, attends: bool| format!("{}{kind}Block2D", if attends { "CrossAttn" } else { "" });
        let config = json!({"block_out_channels": widths, "layers_per_block": blocks, "cross_attention_dim": 40,
            "down_block_types": attends.iter().map(|&a| block("Down", a)).collect::<Vec<_>>(),
            "up_block_types": attends.iter().rev().map(|&a| block("Up", a)).collect::<Vec<_>>()});
        let (config, [inputs, outputs]) = diffusers_config::unet(&config).unwrap();
        let parameters = Parameters::unfilled(CPU);
        let ports = Ports { outputs, ..Ports::of([inputs, 4, 1, 1]) };
        UNet3d::new(&parameters.root(), &config, &ports);
        let ours = shapes(&Network::UNet { blocks_per_level: blocks }.in_diffusers(&parameters));
        assert_eq!(ours, diffusers_unet(&widths, &attends, blocks, 40), "{widths:?}");
    }
}

/// The released sizes: 686 tensors of 859,520,964 numbers in the image model's U-Net, the temporal ones are new.
#[test]
fn stable_diffusion_1_is_whole() {
    let parameters = Parameters::unfilled(CPU);
    let ports = Ports::of([4, 16, 1, 1]);
    UNet3d::new(&parameters.root(), &UNetConfig::stable_diffusion(), &ports);
    let listed = shapes(&Network::UNet { blocks_per_level: 2 }.in_diffusers(&parameters));
    assert_eq!(listed.len(), 686);
    assert_eq!(listed.values().map(|shape| shape.iter().product::<i64>()).sum::<i64>(), 859_520_964);
    assert_eq!(listed["down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight"], [1280, 768]);
    assert_eq!(listed["up_blocks.0.upsamplers.0.conv.weight"], [1280, 1280, 3, 3]);
    assert_eq!(listed["up_blocks.3.resnets.2.conv_shortcut.weight"], [320, 640, 1, 1]);
    assert_eq!(parameters.named().len() - listed.len(), 16 * 18);

    let parameters = Parameters::unfilled(CPU);
    ImageAutoencoder::new(&parameters.root(), &ImageAutoencoderConfig::default());
    let listed = shapes(&Network::Autoencoder { levels: 4 }.in_diffusers(&parameters));
    assert_eq!(listed.len(), 248);
    assert_eq!(listed["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"], [256, 128, 1, 1]);
    assert_eq!(listed["encoder.mid_block.attentions.0.to_out.0.weight"], [512, 512]);
    assert_eq!(listed["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"], [256, 512, 1, 1]);
    assert_eq!(listed["decoder.up_blocks.2.upsamplers.0.conv.weight"], [256, 256, 3, 3]);

    let parameters = Parameters::unfilled(CPU);
    ClipText::new(&parameters.root(), &ClipTextConfig::default());
    assert_eq!(parameters.count(), 123_060_480);
    assert_eq!(parameters.named().len(), 196);
}

/// What is missing, unknown or of another shape is named, and nothing is loaded.
#[test]
fn a_wrong_file_is_refused() {
    for (network, parameters, listed, _) in both() {
        let before = network.in_diffusers(&parameters);
        let before: Tensors = before.into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect();
        let whole = synthetic(&listed);
        let refused = |tensors: &Tensors| format!("{:#}", network.import(tensors, &parameters).unwrap_err());

        let mut less = copies(&whole);
        let lost = less.keys().find(|name| name.contains("mid_block.resnets.1.conv2")).unwrap().clone();
        less.remove(&lost);
        let error = refused(&less);
        assert!(error.contains("is missing") && error.contains(&lost), "{error}");

        let mut more = copies(&whole);
        more.insert("mid_block.resnets.7.conv1.weight".to_string(), Tensor::from(1.0));
        let error = refused(&more);
        assert!(error.contains("`mid_block.resnets.7.conv1.weight` is unknown"), "{error}");

        let mut other = copies(&whole);
        other.insert(lost.clone(), whole[&lost].unsqueeze(0).repeat([2; 1].repeat(whole[&lost].dim() + 1)));
        let error = refused(&other);
        assert!(error.contains(&lost) && error.contains("has shape"), "{error}");

        let error = refused(&Tensors::new());
        assert!(error.contains("more") && error.len() < 1000, "{error}");
        for (name, tensor) in network.in_diffusers(&parameters) {
            assert!(tensor.equal(&before[&name]), "{name} was loaded");
        }
    }
}

/// Spellings of other versions: linear projections, the autoencoder's old attention, transformers' prefix.
#[test]
fn older_and_newer_spellings_are_known() {
    let (_, parameters) = unet(&unet_config());
    let linear: Tensors = synthetic(&listed("sd_unet_diffusers_names"))
        .into_iter()
        .map(|(name, tensor)| {
            let projection = name.contains(".proj_in.weight") || name.contains(".proj_out.weight");
            (name, if projection { tensor.flatten(1, -1) } else { tensor })
        })
        .collect();
    assert!(linear.values().any(|t| t.dim() == 2));
    UNET.import(&linear, &parameters).unwrap();

    let (_, parameters) = autoencoder();
    let old: Tensors = synthetic(&listed("sd_vae_diffusers_names"))
        .into_iter()
        .map(|(name, tensor)| {
            let words =
                [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
            (words.iter().fold(name, |name, (new, old)| name.replace(new, old)), tensor)
        })
        .collect();
    assert!(old.contains_key("encoder.mid_block.attentions.0.proj_attn.weight"));
    AUTOENCODER.import(&old, &parameters).unwrap();

    let own = text_encoder(TextActivation::Gelu).1;
    for prefix in ["", "text_model.", "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."] {
        let mut file: Tensors =
            own.named().into_iter().map(|(name, t)| (format!("{prefix}{name}"), &t * 2.0)).collect();
        let ignored = format!("{prefix}embeddings.position_ids");
        file.insert(ignored.clone(), Tensor::arange(9, (Kind::Int64, CPU)));
        let fresh = text_encoder(TextActivation::Gelu).1;
        let import = Network::TextEncoder.import(&file, &fresh).unwrap();
        assert_eq!((import.loaded.len(), import.new.len()), (own.named().len(), 0));
        assert_eq!(import.ignored, [ignored]);
        for ((name, fresh), (_, own)) in fresh.named().iter().zip(own.named()) {
            assert!(fresh.equal(&(own * 2.0)), "{prefix}{name}");
        }
    }
}

/// At its start each frame of a video is what the network makes of that frame alone. It is not where norms
/// pool over the clip, and not once temporal layers do something.
#[test]
fn the_inflated_network_starts_as_the_image_network() {
    let difference = |config: &UNetConfig, awake: bool| {
        let (unet, parameters) = unet(config);
        UNET.import(&synthetic(&listed("sd_unet_diffusers_names")), &parameters).unwrap();
        if awake {
            wake(&parameters);
        }
        parameters.freeze();
        let given = Inputs { text: Some(noise(1, &[2, 7, 48])), ..Inputs::default() };
        let (x, t) = (noise(2, &[2, 4, 5, 8, 8]), Tensor::from_slice(&[30i64, 700]));
        let together = unet.forward(&x, &t, &given);
        let alone: Vec<Tensor> = (0..5).map(|frame| unet.forward(&x.narrow(2, frame, 1), &t, &given)).collect();
        relative_error(&together, &Tensor::cat(&alone, 2))
    };
    let config = unet_config();
    assert!(config.norm_per_frame);
    let error = difference(&config, false);
    assert!(error < 1e-6, "{error:e}");
    // without temporal layers it is the image network, whatever its weights
    let image = UNetConfig { temporal: false, ..config.clone() };
    assert_eq!(unet(&image).1.named().len(), listed("sd_unet_diffusers_names").len());
    let error = difference(&image, true);
    assert!(error < 1e-6, "{error:e}");
    let pooled = UNetConfig { norm_per_frame: false, ..config.clone() };
    for error in [difference(&pooled, false), difference(&config, true)] {
        assert!(error > 1e-3, "{error:e}");
    }
}

/// diffusers' configurations in our words: what is silent, what is said in two ways, what is refused.
#[test]
fn configurations_are_read_strictly() {
    let released = json!({
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    });
    assert_eq!(diffusers_config::unet(&released).unwrap(), (UNetConfig::stable_diffusion(), [4, 4]));
    let silent = diffusers_config::unet(&json!({})).unwrap().0;
    assert_eq!(silent, UNetConfig { context_width: 1280, ..UNetConfig::stable_diffusion() });
    let heads = json!({"num_attention_heads": [5, 5, 5, 5], "attention_head_dim": 8, "class_embed_type": null});
    assert_eq!(diffusers_config::unet(&heads).unwrap().0.heads, 5);
    let wide = json!({"attention_head_dim": [5, 10, 20, 20]});
    assert_eq!(diffusers_config::unet(&wide).unwrap().0.head_width, Some(64), "as Stable Diffusion 2.x says it");
    let none = json!({"block_out_channels": [16, 48], "norm_num_groups": 8, "down_block_types": vec!["DownBlock2D"; 2],
        "up_block_types": vec!["UpBlock2D"; 2], "resnet_time_scale_shift": "scale_shift", "only_cross_attention": [false, false]});
    let none = diffusers_config::unet(&none).unwrap().0;
    assert_eq!((none.attention_factors, none.multipliers, none.norm_groups), (vec![], vec![1, 3], 8));
    assert!(none.adaptive_norm);
    for (wrong, word) in [
        (json!({"block_out_channels": [320, 500, 1280, 1280]}), "multiple of the first"),
        (json!({"block_out_channels": [320, 640]}), "4 block types"),
        (json!({"down_block_types": vec!["DownBlock2D"; 4]}), "the same levels"),
        (json!({"down_block_types": vec!["AttnDownBlock2D"; 4]}), "`AttnDownBlock2D` is not supported"),
        (json!({"transformer_layers_per_block": 2}), "transformer_layers_per_block = 2"),
        (json!({"attention_head_dim": [5, 10, 20, 21]}), "as wide, or as many"),
        (json!({"attention_head_dim": 7}), "7 heads"),
        (json!({"norm_num_groups": null}), "norm_num_groups = null"),
        (json!({"mid_block_type": null}), "mid_block_type = null"),
        (json!({"norm_eps": 1e-6}), "norm_eps"),
        (json!({"class_embed_type": "timestep"}), "class_embed_type"),
        (json!({"dual_cross_attention": true}), "dual_cross_attention = true"),
        (json!([1]), "dictionary"),
    ] {
        let error = format!("{:#}", diffusers_config::unet(&wrong).unwrap_err());
        assert!(error.contains(word), "{wrong}: {error}");
    }

    let vae = json!({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4], "act_fn": "silu"});
    assert_eq!(diffusers_config::autoencoder(&vae).unwrap(), ImageAutoencoderConfig::default());
    assert_eq!(diffusers_config::autoencoder(&json!({})).unwrap().widths, [64]);
    for (wrong, word) in [
        (json!({"in_channels": 1}), "in_channels = 1"),
        (json!({"use_quant_conv": false}), "use_quant_conv = false"),
        (json!({"down_block_types": ["AttnDownEncoderBlock2D"]}), "`AttnDownEncoderBlock2D`"),
        (json!({"block_out_channels": [32, 64]}), "1 levels"),
        (json!({"norm_num_groups": 48}), "48"),
    ] {
        let error = format!("{:#}", diffusers_config::autoencoder(&wrong).unwrap_err());
        assert!(error.contains(word), "{wrong}: {error}");
    }

    let text = json!({"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "top_k": 50});
    assert_eq!(diffusers_config::text_encoder(&text).unwrap(), ClipTextConfig::default());
    for (wrong, word) in [
        (json!({"hidden_act": "relu"}), "`relu`"),
        (json!({"num_attention_heads": 7}), "7 heads"),
        (json!({"layer_norm_eps": 1e-6}), "layer_norm_eps"),
    ] {
        let error = format!("{:#}", diffusers_config::text_encoder(&wrong).unwrap_err());
        assert!(error.contains(word), "{wrong}: {error}");
    }
}

/// A video through the image autoencoder is its frames, however many go through at a time.
#[test]
fn the_image_autoencoder_sees_frames_alone() {
    let (autoencoder, parameters) = autoencoder();
    parameters.freeze();
    let x = noise(3, &[2, 3, 9, 16, 24]);
    let posterior = autoencoder.encode(&x);
    assert_eq!(posterior.mean.size(), [2, 4, 9, 8, 12]);
    let decoded = autoencoder.decode(&posterior.mean);
    assert_eq!(decoded.size(), [2, 3, 9, 16, 24]);
    for (sample, frame) in [(0, 0), (0, 8), (1, 3)] {
        let one = |video: &Tensor| video.narrow(0, sample, 1).narrow(2, frame, 1);
        let alone = autoencoder.encode(&one(&x));
        for (together, alone) in [(&posterior.mean, &alone.mean), (&posterior.logvar, &alone.logvar)] {
            let error = relative_error(&one(together), alone);
            assert!(error < 1e-5, "{error:e}");
        }
        let error = relative_error(&one(&decoded), &autoencoder.decode(&alone.mean));
        assert!(error < 1e-5, "{error:e}");
    }
}

/// A latent space holds either autoencoder; what runs stored before there were two is read as the video's.
#[test]
fn a_latent_space_holds_either_autoencoder() {
    let old = json!({"channels": 8, "factors": [2, 4, 4], "z_channels": 4, "latent_channels": 4, "norm_groups": 8,
        "padding": "replicate"});
    let video = AutoencoderConfig { channels: 8, factors: [2, 4, 4], norm_groups: 8, ..AutoencoderConfig::default() };
    assert_eq!(CodecConfig::stored(old.clone()).unwrap(), video.clone().into());
    let mut new = old;
    new["kind"] = json!("video_autoencoder");
    assert_eq!(serde_json::to_value(CodecConfig::from(video)).unwrap(), new);
    let image = diffusers_config::autoencoder(&configuration("sd_vae")).unwrap();
    let config = CodecConfig::from(image.clone());
    let stored = serde_json::to_value(&config).unwrap();
    assert_eq!((&stored["kind"], &stored["widths"]), (&json!("image_autoencoder"), &json!([32, 64])));
    assert_eq!(CodecConfig::stored(stored).unwrap(), config);
    assert_eq!(CodecConfig::stored(json!({"image": image})).unwrap(), config);

    let (autoencoder, parameters) = autoencoder();
    let weights: Tensors = parameters.named().into_iter().collect();
    let space = LatentSpace::new(&*config, copies(&weights), Normalization::STABLE_DIFFUSION, 2, CPU).unwrap();
    let x = noise(4, &[1, 3, 3, 16, 16]);
    let encoded = space.encode(&x);
    let shape = config.latent_shape(3, 16, 16).unwrap();
    assert_eq!(shape, [4, 3, 8, 8]);
    assert_eq!(encoded.stacked().size(), [1, 8, 3, 8, 8]);
    assert!(config.latent_shape(3, 15, 16).unwrap_err().to_string().contains("factor 2"));
    let z_0 = space.sample(&encoded, &Tensor::zeros([1, 4, 3, 8, 8], (Kind::Float, CPU)));
    no_grad(|| {
        let mean = autoencoder.encode(&x).mean;
        assert!(relative_error(&z_0, &(&mean * 0.18215)) < 1e-6);
        let decoded = autoencoder.decode(&mean);
        assert!(relative_error(&space.decode(&z_0), &decoded) < 1e-5);
        // chunks of two frames are the same as the whole
        let mut pieces = Vec::new();
        let mut keep = |piece: &Tensor| {
            pieces.push(piece.shallow_clone());
            Ok(())
        };
        space.decode_long(&z_0, &mut keep).unwrap();
        assert!(pieces.len() > 1);
        assert!(relative_error(&Tensor::cat(&pieces, 1).unsqueeze(0), &decoded) < 1e-5);
    });
    let wrong = CodecConfig::from(ImageAutoencoderConfig { norm_groups: 24, ..image });
    let error = LatentSpace::new(&*wrong, weights, Normalization::STABLE_DIFFUSION, 2, CPU).err().unwrap();
    assert!(error.to_string().contains("24"), "{error}");
}

fn text_encoder(activation: TextActivation) -> (ClipText, Parameters) {
    let parameters = Parameters::new(CPU, 7);
    let config =
        ClipTextConfig { vocabulary: 30, positions: 9, width: 16, hidden: 40, layers: 2, heads: 2, activation };
    (ClipText::new(&parameters.root(), &config), parameters)
}

/// A token changes what stands at its place and after it, never before it; both activations do something.
#[test]
fn the_text_encoder_is_causal() {
    let (encoder, parameters) = text_encoder(TextActivation::QuickGelu);
    parameters.freeze();
    let tokens = |middle: i64| Tensor::from_slice(&[29i64, 3, 5, middle, 7, 28, 28]).unsqueeze(0);
    let (one, other) = (encoder.forward(&tokens(4)).unwrap(), encoder.forward(&tokens(9)).unwrap());
    assert_eq!(one.size(), [1, 7, 16]);
    assert_eq!(largest_difference(&one.narrow(1, 0, 3), &other.narrow(1, 0, 3)), 0.0);
    for place in 3..7 {
        assert!(largest_difference(&one.narrow(1, place, 1), &other.narrow(1, place, 1)) > 1e-5, "{place}");
    }
    let (exact, parameters) = text_encoder(TextActivation::Gelu);
    parameters.freeze();
    assert!(largest_difference(&one, &exact.forward(&tokens(4)).unwrap()) > 1e-6);

    let long = Tensor::zeros([1, 10], (Kind::Int64, CPU));
    assert!(encoder.forward(&long).unwrap_err().to_string().contains("10 tokens"));
    assert!(encoder.forward(&tokens(30)).unwrap_err().to_string().contains("0 to 29"));
}
