//! Recognises what a file or a folder of weights is, by the names and shapes of its tensors or by its configuration.

use std::{collections::BTreeMap, fmt, path::Path};

use anyhow::Result;
use serde_json::Value;

use crate::{file_format::read_json, run_files::is_run};

/// The shape of each tensor by its name.
pub type TensorShapes = BTreeMap<String, Vec<i64>>;

/// Whose names a file uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Those of the original code (`input_blocks`, `decoder.mid.block_1`, `lora_unet_…` of kohya-ss).
    Original,
    /// Those of diffusers and transformers (`down_blocks`, `decoder.mid_block`, `lora.down`).
    Diffusers,
    /// Those of PEFT (`lora_A`, `lora_B`).
    Peft,
}

/// What weights are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightsKind {
    /// A whole Stable Diffusion 1.x: one original file, or a folder of diffusers.
    StableDiffusion1(Layout),
    /// The same of Stable Diffusion 2.x, whose text encoder is OpenCLIP's.
    StableDiffusion2(Layout),
    /// Stable Diffusion XL.
    StableDiffusionXl,
    /// Stable Diffusion 3.
    StableDiffusion3,
    /// Flux, or another network that is a transformer in place of a U-Net.
    Transformer,
    /// A U-Net that also sees a mask and the masked picture.
    Inpainting,
    /// A U-Net that also sees the picture to be edited.
    InstructPix2Pix,
    /// A U-Net alone.
    UNet(Layout),
    /// An image autoencoder alone.
    Autoencoder(Layout),
    /// The half of an image autoencoder that decodes.
    Decoder(Layout),
    /// A text encoder alone.
    TextEncoder,
    /// Low-rank changes of a network, without the network.
    Lora(Layout),
    /// A network with low-rank changes beside its weights.
    UnfusedLora,
    /// Vectors of new words.
    TextualInversion,
    /// A network that steers a U-Net by pictures.
    ControlNet,
    /// AnimateDiff's layers over frames.
    MotionModule,
    /// A video network: a run of this program, a released LVDM, or another one.
    Video,
    /// A pipeline of diffusers that is none of the above, by the name of its class.
    OtherPipeline(String),
    /// Nothing that is known.
    Unknown,
}

impl fmt::Display for WeightsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use WeightsKind as Kind;
        let lora = |names: &str| format!("a LoRA ({names}): low-rank changes of a network, without the network itself");
        f.write_str(match self {
            Kind::StableDiffusion1(_) => "a Stable Diffusion 1.x",
            Kind::StableDiffusion2(_) => "a Stable Diffusion 2.x (with OpenCLIP's text encoder)",
            Kind::StableDiffusionXl => "a Stable Diffusion XL (SDXL, with two text encoders)",
            Kind::StableDiffusion3 => "a Stable Diffusion 3 (a transformer, not a U-Net)",
            Kind::Transformer => "a transformer as Flux is, not a U-Net",
            Kind::Inpainting => {
                "a Stable Diffusion for inpainting: its U-Net has 9 input channels, five of them for a mask and a picture"
            }
            Kind::InstructPix2Pix => {
                "an InstructPix2Pix: its U-Net has 8 input channels, four of them for the picture to be edited"
            }
            Kind::UNet(_) => "a U-Net alone, without image autoencoder and text encoder",
            Kind::Autoencoder(_) => "an image autoencoder (VAE) alone, without a U-Net",
            Kind::Decoder(_) => "the decoder of an image autoencoder (VAE) alone: the encoder and the U-Net are missing",
            Kind::TextEncoder => "a text encoder alone, without a U-Net",
            Kind::Lora(Layout::Original) => return f.write_str(&lora("names of kohya-ss")),
            Kind::Lora(Layout::Diffusers) => return f.write_str(&lora("names of diffusers")),
            Kind::Lora(Layout::Peft) => return f.write_str(&lora("names of PEFT")),
            Kind::UnfusedLora => {
                "a network with a LoRA beside its weights (`base_layer`): fuse it in Python first \
                 (`pipe.fuse_lora(); pipe.unload_lora_weights()`, or `model.merge_and_unload()`) and save again"
            }
            Kind::TextualInversion => "a textual inversion: vectors (embeddings) of new words, without a network",
            Kind::ControlNet => "a ControlNet, which steers a Stable Diffusion by pictures, without the U-Net itself",
            Kind::MotionModule => "a motion module of AnimateDiff: layers over frames, without the image network",
            Kind::Video => {
                "a video network already: `lvdm import lvdm` reads checkpoints of LVDM, and a run needs no import"
            }
            Kind::OtherPipeline(class) => return write!(f, "a {class} of diffusers"),
            Kind::Unknown => "of a kind that this program does not know",
        })
    }
}

impl WeightsKind {
    /// Of a folder: of a pipeline, or of a part of one.
    ///
    /// # Errors
    /// A description that is not JSON.
    pub fn of_folder(path: &Path) -> Result<Self> {
        let json = |name: &str| -> Result<Option<Value>> {
            let file = path.join(name);
            if file.is_file() { read_json(&file).map(Some) } else { Ok(None) }
        };
        if json("adapter_config.json")?.is_some() {
            return Ok(WeightsKind::Lora(Layout::Peft));
        }
        if is_run(path) {
            return Ok(WeightsKind::Video);
        }
        let has = |name: &str| ["safetensors", "bin"].iter().any(|end| path.join(format!("{name}.{end}")).is_file());
        if has("pytorch_lora_weights") {
            return Ok(WeightsKind::Lora(Layout::Diffusers));
        }
        if has("learned_embeds") {
            return Ok(WeightsKind::TextualInversion);
        }
        if let Some(config) = json("unet/config.json")? {
            let class = json("model_index.json")?;
            return Ok(pipeline(class.as_ref().and_then(|index| index["_class_name"].as_str()), &config));
        }
        if let Some(index) = json("model_index.json")? {
            return Ok(pipeline(index["_class_name"].as_str(), &Value::Null));
        }
        if path.join("transformer/config.json").is_file() {
            return Ok(WeightsKind::Transformer);
        }
        Ok(json("config.json")?.map_or(WeightsKind::Unknown, |config| part(&config)))
    }

    /// Of tensors, by their names and shapes.
    pub fn of_shapes(shapes: &TensorShapes) -> Self {
        let any = |word: &str| shapes.keys().any(|name| name.contains(word));
        let below = |prefix: &str| shapes.keys().any(|name| name.starts_with(prefix));
        let inputs = |name: &str| shapes.get(name).and_then(|shape| shape.get(1)).copied();
        if any(".base_layer.") {
            return WeightsKind::UnfusedLora;
        }
        let whole = below("model.diffusion_model.");
        let lora = [
            (Layout::Peft, [".lora_A.", ".lora_B.", ".lora_embedding_A"]),
            (Layout::Original, ["lora_unet_", "lora_te", "lora_transformer_"]),
            (Layout::Diffusers, ["lora.down.", "_lora.down.", "lora_linear_layer."]),
            (Layout::Original, [".lora_down.", ".hada_w1", ".lokr_w1"]),
        ];
        if let Some((layout, _)) = lora.iter().find(|(_, words)| !whole && words.iter().any(|word| any(word))) {
            return WeightsKind::Lora(*layout);
        }
        if any("attn1_tmp") || any("temopral_conv") || any("time_stack.") || any("temp_convs.") {
            return WeightsKind::Video;
        }
        if any("motion_modules.") || any("temporal_transformer.") {
            return WeightsKind::MotionModule;
        }
        if below("conditioner.embedders.") || any("add_embedding.linear_1.") {
            return WeightsKind::StableDiffusionXl;
        }
        if any("joint_blocks.") || any(".attn.add_q_proj.") && !any("single_transformer_blocks.") {
            return WeightsKind::StableDiffusion3;
        }
        if any("double_blocks.") || any("single_transformer_blocks.") || below("transformer_blocks.") {
            return WeightsKind::Transformer;
        }
        let first = ["model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight"];
        if (whole || below("input_blocks.") || below("down_blocks.") && below("up_blocks."))
            && !below("control_model.") | whole
            && !any("controlnet_cond_embedding.")
        {
            match first.iter().find_map(|name| inputs(name)) {
                Some(9) => return WeightsKind::Inpainting,
                Some(8) => return WeightsKind::InstructPix2Pix,
                _ => {}
            }
        }
        if whole {
            let parts = below("first_stage_model.") || below("cond_stage_model.");
            return match is_second(shapes) {
                _ if !parts => WeightsKind::UNet(Layout::Original),
                true => WeightsKind::StableDiffusion2(Layout::Original),
                false => WeightsKind::StableDiffusion1(Layout::Original),
            };
        }
        let control = ["zero_convs.", "input_hint_block.", "controlnet_cond_embedding.", "controlnet_down_blocks."];
        if below("control_model.") || control.iter().any(|word| any(word)) {
            return WeightsKind::ControlNet;
        }
        if below("input_blocks.") && below("output_blocks.") {
            return WeightsKind::UNet(Layout::Original);
        }
        if below("down_blocks.") && below("up_blocks.") && below("time_embedding.") {
            return WeightsKind::UNet(Layout::Diffusers);
        }
        if any("decoder.conv_in.weight") {
            let layout = if any("decoder.mid_block.") { Layout::Diffusers } else { Layout::Original };
            let whole = any("encoder.conv_in.weight");
            return if whole { WeightsKind::Autoencoder(layout) } else { WeightsKind::Decoder(layout) };
        }
        if any("token_embedding.weight") || any("transformer.resblocks.") {
            return WeightsKind::TextEncoder;
        }
        // vectors as wide as a text encoder, under names of their own or called as the word itself
        const WIDTHS: [i64; 4] = [768, 1024, 1280, 4096];
        let vectors = |(name, shape): (&String, &Vec<i64>)| {
            let known = matches!(name.as_str(), "emb_params" | "clip_l" | "clip_g") || name.starts_with('<');
            let word = shapes.len() == 1 && !name.contains('.') && WIDTHS.contains(shape.last().unwrap_or(&0));
            (known || word) && matches!(shape.len(), 1 | 2)
        };
        if !shapes.is_empty() && shapes.iter().all(vectors) {
            return WeightsKind::TextualInversion;
        }
        WeightsKind::Unknown
    }
}

/// Whether networks are those of Stable Diffusion 2.x, alone or together, under whatever prefix: their text encoder is
/// OpenCLIP's, to whose states, 1024 wide, the U-Net attends.
pub fn is_second(shapes: &TensorShapes) -> bool {
    let is_open = |name: &String| name.starts_with("cond_stage_model.model.");
    let attended =
        |(name, shape): (&String, &Vec<i64>)| name.ends_with("attn2.to_k.weight") && shape.get(1) == Some(&1024);
    shapes.keys().any(is_open) || shapes.iter().any(attended)
}

/// A folder of several networks, by the class that its index names and its U-Net's configuration.
fn pipeline(class: Option<&str>, unet: &Value) -> WeightsKind {
    let class = class.unwrap_or("StableDiffusionPipeline");
    match class {
        _ if class.starts_with("StableDiffusionXL") => return WeightsKind::StableDiffusionXl,
        _ if class.starts_with("StableDiffusion3") => return WeightsKind::StableDiffusion3,
        _ if class.starts_with("Flux") => return WeightsKind::Transformer,
        _ if class.contains("InstructPix2Pix") => return WeightsKind::InstructPix2Pix,
        _ if class.contains("Inpaint") && unet["in_channels"] == 9 => return WeightsKind::Inpainting,
        _ if class.contains("Video") || class.starts_with("AnimateDiff") || !unet.is_object() => {}
        // the same networks, whatever is done with them
        _ => {
            return match part(unet) {
                WeightsKind::UNet(layout) if unet["cross_attention_dim"] == 1024 => {
                    WeightsKind::StableDiffusion2(layout)
                }
                WeightsKind::UNet(layout) => WeightsKind::StableDiffusion1(layout),
                WeightsKind::Unknown => WeightsKind::OtherPipeline(class.to_string()),
                other => other,
            };
        }
    }
    WeightsKind::OtherPipeline(class.to_string())
}

/// One network, by its configuration in diffusers' or transformers' words.
fn part(config: &Value) -> WeightsKind {
    let architecture = config["architectures"][0].as_str();
    match config["_class_name"].as_str().or(architecture) {
        _ if config["addition_embed_type"] == "text_time" => WeightsKind::StableDiffusionXl,
        Some("UNet2DConditionModel") if config["in_channels"] == 9 => WeightsKind::Inpainting,
        Some("UNet2DConditionModel") if config["in_channels"] == 8 => WeightsKind::InstructPix2Pix,
        Some("UNet2DConditionModel") => WeightsKind::UNet(Layout::Diffusers),
        Some("AutoencoderKL") => WeightsKind::Autoencoder(Layout::Diffusers),
        Some("ControlNetModel") => WeightsKind::ControlNet,
        Some("MotionAdapter" | "UNetMotionModel") => WeightsKind::MotionModule,
        Some("SD3Transformer2DModel") => WeightsKind::StableDiffusion3,
        Some(name) if name.contains("Transformer2DModel") => WeightsKind::Transformer,
        Some(name) if name.starts_with("CLIPText") => WeightsKind::TextEncoder,
        // the first releases named no class
        None if config["block_out_channels"].is_array() && config["cross_attention_dim"].is_number() => {
            WeightsKind::UNet(Layout::Diffusers)
        }
        _ => WeightsKind::Unknown,
    }
}
