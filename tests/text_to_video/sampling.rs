//! Sampling from prompts, pictures and seeds.

use std::fs;

use lvdm::{
    checkpoint::{self, Checkpoint},
    data::{frame_folder::read_picture, pictures::write_png},
    diffusion::{FrameMask, GivenLatents, GivenTexts, GivenToClips, GuidanceConfig, Predict, Times, conditioned},
    models::LatentDiffusion,
    networks::Inputs,
    safetensors::read_safetensors,
    weights::stable_diffusion::is_temporal,
};
use tch::{Kind, Tensor};

use crate::{
    CPU,
    common::{
        noise, relative_error, run_in, succeed_in,
        text_runs::{TABLE, experiment, import, write_diffusers, write_videos},
    },
    model_of,
};

/// A text network that is also given frames: what is new in it starts without a say, training moves it beside the layers over
/// frames, and a video begins with the picture that it is given and shows what its prompt says.
#[test]
fn a_video_begins_with_a_picture_and_shows_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    write_videos(at);
    assert_eq!(import(at, "sd", "sd-run", &[]).status, 0);
    let more = "trained: {kind: temporal}\nconditioning: {prediction: 0.7, perturbation: 20}\n";
    let train = |name: &str, steps: &str| {
        let file = experiment(at, name, TABLE, more);
        succeed_in(at, &["train", "diffusion", &file, steps, "trainer.checkpoint_every=1", "trainer.picture_every=2"]);
        at.join("runs").join(name)
    };
    let (start, run) = (model_of(&at.join("sd-run")), train("both", "trainer.steps=4"));
    let moved = model_of(&run);
    assert_eq!(
        (moved["input_blocks.0.0.weight"].size(), moved["label_emb.weight"].size()),
        (vec![32, 5, 1, 3, 3], vec![21, 128])
    );
    for (name, tensor) in &moved {
        match name.as_str() {
            "input_blocks.0.0.weight" => assert!(tensor.narrow(1, 4, 1).abs().max().double_value(&[]) > 0.0),
            "label_emb.weight" => assert!(tensor.abs().max().double_value(&[]) > 0.0),
            name if is_temporal(name) => {}
            name => assert!(tensor.equal(&start[name]), "{name} was not to be trained"),
        }
    }

    // the denoiser given both is the network with mask, level and text
    let (generator, _) = LatentDiffusion::open(&run, CPU).unwrap();
    let encoder = generator.text.as_ref().unwrap();
    let [prompt, negative] = ["a red cat", "a dog"].map(|prompt| encoder.encode(&[prompt]).unwrap());
    let (z_t, first) = (noise(5, &[1, 4, 4, 8, 8]), noise(6, &[1, 4, 1, 8, 8]));
    let guidance = GuidanceConfig { weight: 0.0, level: Some(7), ..GuidanceConfig::default() };
    let given = GivenLatents { indices: &[0], frames: &first, noise: &noise(7, &first.size()), guidance };
    let denoiser = |guidance| {
        let GivenLatents { indices, frames, noise, guidance: of_frames } = &given;
        let to_clips = GivenToClips {
            frames: Some(GivenLatents { indices, frames, noise, guidance: *of_frames }),
            around: None,
            texts: Some(GivenTexts { contexts: prompt.shallow_clone(), guidance }),
            ..GivenToClips::default()
        };
        let LatentDiffusion { network, path, .. } = &generator;
        conditioned(&**network, &**path, Predict::Noise, &z_t, to_clips).unwrap()
    };
    let seen = Times::of_levels(&*generator.path, &[7], CPU).add_noise(&first, given.noise);
    let seen = Tensor::cat(&[&seen, &z_t.narrow(2, 1, 3)], 2);
    let mask = FrameMask::Prefix(1).tensor(4).unsqueeze(0).expand([1, 1, 4, 8, 8], false);
    let by_hand = |context: &Tensor| {
        let given = Inputs {
            mask: Some(mask.shallow_clone()),
            text: Some(context.shallow_clone()),
            level: Some(Tensor::from_slice(&[7i64])),
            ..Inputs::default()
        };
        generator.network.forward(&seen, &Tensor::from_slice(&[500i64]), &given)
    };
    let (with, without) = (by_hand(&prompt), by_hand(&negative));
    assert!(relative_error(&denoiser(None).predict(&z_t, 500.0).noise, &with) < 1e-6);
    let wanted = &without + (&with - &without) * 3.0;
    let error = relative_error(&denoiser(Some((negative, 3.0))).predict(&z_t, 500.0).noise, &wanted);
    assert!(error < 1e-5, "{error:e}");
    assert!(relative_error(&with, &without) > 1e-4);

    // four steps hardly move the layers over frames: here they say more
    let path = checkpoint::list(&run).unwrap().pop().unwrap();
    let mut found = Checkpoint::read(&path).unwrap();
    for (name, tensor) in found.tensors.iter_mut() {
        if (name.starts_with("model.") || name.starts_with("ema.")) && is_temporal(name) {
            *tensor = &*tensor + noise(8, &tensor.size()) * 0.3;
        }
    }
    found.write(&path).unwrap();

    // on the command line: two pictures of another size, two prompts
    let picture = |name: &str, shade: f64| {
        let x = Tensor::arange(40, (Kind::Float, CPU)).reshape([1, 40, 1]) * 5.0;
        let y = Tensor::arange(24, (Kind::Float, CPU)).reshape([24, 1, 1]) * 2.0;
        let image = ((x + y + Tensor::from_slice(&[0f32, 10.0, 20.0])) * shade).clamp(0.0, 255.0).to_kind(Kind::Uint8);
        write_png(&at.join(name), &image).unwrap();
    };
    picture("dark.png", 0.3);
    picture("light.png", 0.9);
    let sample = |out: &str, more: &[&str]| {
        let common = ["sample", "runs/both", "--steps", "3", "--guidance", "2", "--device", "cpu", "--out", out];
        let said = run_in(at, &[&common, more].concat());
        assert_eq!(said.status, 0, "{}", said.err);
        read_safetensors(&at.join(out)).unwrap().0["clips"].to_kind(Kind::Float) // [N, 3, F, H, W]
    };
    let pictures = ["--first-frame", "dark.png", "--first-frame", "light.png"];
    let made = sample("two.safetensors", &[&["--prompt", "a red cat"], &pictures[..], &["--seeds", "4"]].concat());
    assert_eq!(made.size(), [2, 3, 4, 16, 16]);
    for (i, name) in ["dark.png", "light.png"].into_iter().enumerate() {
        let latent = generator.picture_latent(&read_picture(&at.join(name)).unwrap());
        let wanted = lvdm::data::to_u8(&tch::no_grad(|| generator.space.decode(&latent))).to_kind(Kind::Float);
        let first = made.narrow(0, i as i64, 1).narrow(2, 0, 1);
        assert!((first - wanted).abs().max().double_value(&[]) <= 1.0, "{name}");
    }
    let rest = |clips: &Tensor, i| clips.get(i).narrow(1, 1, 3);
    let differ = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) > 1.0;
    assert!(differ(&rest(&made, 0), &rest(&made, 1)), "the frames that follow do not see the picture");
    let other = sample("other.safetensors", &["--prompt", "a dog", "--first-frame", "dark.png", "--seeds", "4"]);
    assert!(differ(&rest(&made, 0), &rest(&other, 0)), "the frames that follow do not see the text");
    assert_eq!(sample("none.safetensors", &["--prompt", "a dog"]).size()[0], 1);

    let refused = |run: &str, more: &[&str], word: &str| {
        let arguments = [&["sample", run, "--prompt", "a", "--out", "x"], more].concat();
        let said = run_in(at, &arguments);
        assert!(said.error(2).contains(word), "{}", said.err);
    };
    refused("sd-run", &["--first-frame", "dark.png"], "not trained to be given a first frame");
    refused("runs/both", &["--first-frame", "no.png"], "no.png");
}

/// With a seed of its own, a video depends on that and on its prompt alone: not on its number, nor on what is made beside it.
#[test]
fn each_video_has_its_own_seed() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers(&at.join("sd"));
    assert_eq!(import(at, "sd", "run", &[]).status, 0);
    fs::write(at.join("prompts.txt"), "a cat\na dog\n").unwrap();
    let sample = |out: &str, more: &[&str]| {
        let common = ["sample", "run", "--steps", "2", "--device", "cpu", "--out", out];
        succeed_in(at, &[&common, more].concat());
        read_safetensors(&at.join(out)).unwrap().0["clips"].to_kind(Kind::Float)
    };
    let alike = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) <= 1.0;
    let all = sample("all.safetensors", &["--prompts", "prompts.txt", "--seeds", "7,9,7,9"]);
    assert_eq!(all.size()[0], 4);
    let cat = sample("cat.safetensors", &["--prompt", "a cat", "--seed", "7"]);
    let dog = sample("dog.safetensors", &["--prompt", "a dog", "--seeds", "9"]);
    assert!(alike(&all.get(0), &cat.get(0)) && alike(&all.get(1), &dog.get(0)));
    assert!(alike(&all.get(2), &cat.get(0)) && !alike(&all.get(1), &cat.get(0)));
    let batches = sample("one.safetensors", &["--prompts", "prompts.txt", "--seeds", "9,9", "--batch", "1"]);
    assert!(alike(&batches.get(1), &dog.get(0)));
    let both = ["sample", "run", "--prompt", "a", "--seed", "1", "--seeds", "2", "--out", "x"];
    assert_eq!(run_in(at, &both).status, 2);
}
