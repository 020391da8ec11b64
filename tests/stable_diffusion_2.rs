//! Stable Diffusion 2.x: as diffusers has it, as one file, and its parts among those of others.

mod common;

use std::{fs, path::Path};

use common::{
    diffusers::{PARTS, json, model_of, tensors},
    noise, relative_error, source, succeed_in,
    text_runs::{self, OPTIONS, Tensors, import, write_diffusers, write_tensors, write_tokenizer},
};
use lvdm::{
    checkpoint,
    diffusion::{Ddim, Guidance, Guided, NetworkDenoiser, Predict, SamplerConfig, sample},
    exchange::diffusers_config,
    models::LatentDiffusion,
    networks::{AttentionKind, Inputs, Ports, UNet3d, UNetConfig},
    nn::Parameters,
    run::open_text_encoder,
    text::{ClipText, ClipTextConfig, TextActivation, TextEncoderConfig},
    weights::stable_diffusion::is_temporal,
};
use tch::{Device, Tensor};

const CPU: Device = Device::Cpu;

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
    let (generator, experiment) = LatentDiffusion::open(&at.join("run"), CPU).unwrap();
    assert_eq!((experiment.unet().unwrap().head_width, experiment.objective.predict), (Some(4), Predict::Velocity));
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
        let told = |context: &Tensor| Inputs { text: Some(context.shallow_clone()), ..Inputs::default() };
        let velocity = generator.network.forward(&start, &Tensor::from_slice(&[300i64]), &told(&states));
        let denoiser = |context: &Tensor| NetworkDenoiser {
            network: &*generator.network,
            path: &*generator.path,
            predict: experiment.objective.predict,
            given: told(context),
        };
        let guided = Guided {
            conditional: denoiser(&states),
            unconditional: denoiser(&empty),
            weight: 7.5,
            form: Guidance::Interpolate,
            path: &*generator.path,
        };
        let sampler = SamplerConfig::Ddim(Ddim { steps: 10, eta: 0.0 });
        let none = |_| start.zeros_like();
        let z_0 = sample(&guided, &*sampler, &*generator.path, &start, &none, &mut |_, _| {}).unwrap();
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
        let other = LatentDiffusion::open(&at.join(run), CPU).unwrap().1;
        assert_eq!(
            (other.unet().unwrap(), &other.objective),
            (experiment.unet().unwrap(), &experiment.objective),
            "{run}"
        );
        for (own, other) in of("run").iter().zip(of(run)) {
            assert_eq!(own.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>(), "{run}");
            assert!(own.iter().all(|(name, tensor)| tensor.equal(&other[name])), "{run}");
        }
    }
    let encoder = |run: &str| open_text_encoder(&at.join(run), CPU).unwrap().encode(&["a cat"]).unwrap();
    assert!(encoder("run").equal(&encoder("original")), "OpenCLIP's nonlinearity is GELU");

    // its networks over a first one: heads, nonlinearity and what is predicted are theirs
    let experiment_of = |run: &str| LatentDiffusion::open(&at.join(run), CPU).unwrap().1;
    write_diffusers(&at.join("sd"));
    write_tensors(&at.join("sd1.safetensors"), &text_runs::original());
    let over = ["--unet", "sd2", "--text-encoder", "sd2.safetensors"];
    let said = import(at, "sd1.safetensors", "mixed", &[&over[..], &OPTIONS].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    let mixed = experiment_of("mixed");
    assert_eq!((mixed.unet().unwrap(), &mixed.schedule), (experiment.unet().unwrap(), &experiment.schedule));
    assert_eq!(mixed.objective.predict, Predict::Velocity);
    assert!(encoder("run").equal(&encoder("mixed")), "OpenCLIP's nonlinearity is GELU");
    // OpenCLIP's own file has no prefix, and a half that looks at pictures
    let bare =
        original.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(&open(""))?, tensor.shallow_clone())));
    let mut bare: Tensors = bare.map(|(name, tensor)| (name.to_string(), tensor)).collect();
    bare.insert("visual.transformer.resblocks.0.ln_1.weight".into(), noise(3, &[16]));
    write_tensors(&at.join("open_clip.safetensors"), &bare);
    let over = ["--unet", "sd2", "--text-encoder", "open_clip.safetensors"];
    let said = import(at, "sd1.safetensors", "open", &[&over[..], &OPTIONS].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    assert!(encoder("run").equal(&encoder("open")), "OpenCLIP's nonlinearity is GELU");
    let whole = [&over[..], &OPTIONS, &["--predict", "noise"]].concat();
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
    let error = format!("{:#}", diffusers_config::unet(&config).unwrap_err());
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
    UNet3d::new(&parameters.root(), &config, &Ports::of([4, 4, 1, 1]));
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
    let experiment = LatentDiffusion::open(&at.join("run"), CPU).unwrap().1;
    // the same without the place that an original file has for it
    let bare = lvdm::safetensors::read_safetensors(&at.join("bare.safetensors")).unwrap().0.into_iter();
    let place = "model.diffusion_model.";
    write_tensors(
        &at.join("no-place.safetensors"),
        &bare.map(|(name, tensor)| (name.replace(place, ""), tensor)).collect(),
    );
    let said = import(at, "no-place.safetensors", "same", &[&parts[..], &["--predict", "velocity"]].concat());
    assert_eq!(said.status, 0, "{}", said.err);
    let [own, same] = ["run", "same"].map(|run| model_of(&at.join(run)));
    assert!(own.iter().all(|(name, tensor)| tensor.equal(&same[name])) && own.len() == same.len());
    let found = (experiment.unet().unwrap().head_width, experiment.unet().unwrap().heads, experiment.objective.predict);
    assert_eq!(found, (Some(64), 2, Predict::Velocity));
    let carried = checkpoint::open(&at.join("run/text_encoder.safetensors")).unwrap().1;
    let config: TextEncoderConfig = serde_json::from_value(carried.experiment).unwrap();
    assert_eq!((config.text_encoder.activation, config.text_encoder.heads), (TextActivation::Gelu, 16));
    let heads = import(at, "bare.safetensors", "x", &[&parts[..], &["--predict", "noise", "--heads", "65"]].concat());
    assert!(heads.error(2).contains("--heads 65"), "{}", heads.err);
}
