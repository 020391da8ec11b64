//! I3D, LPIPS and the figures made from them, with the real weights; the motion distance; weights that a user brings.
//!
//! They need the weight files (`lvdm weights fetch`, or LVDM_WEIGHTS) and fail without them.

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use common::{Said, lvdm_in, pickle::write_checkpoint_under};
use lvdm::{
    extractors::{ExtractorConfig, ExtractorKind, FeatureExtractor, i3d::I3d, lpips::Lpips},
    metrics::{ComparedFeatures, Divisor, Metric, frechet_distance, kernel_distance},
    torch::Autocast,
};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

fn i3d() -> I3d {
    I3d::load(None, CPU).unwrap_or_else(|error| panic!("{error:#}"))
}

fn lpips(kind: Kind) -> Lpips {
    Lpips::load(None, CPU, kind).unwrap_or_else(|error| panic!("{error:#}"))
}

fn case(name: &str) -> BTreeMap<String, Tensor> {
    let path = format!("{}/tests/parity/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    ((found - &expected).norm() / expected.norm()).double_value(&[])
}

fn plain(count: i64, frames: i64, value: f64) -> Tensor {
    Tensor::full([count, frames, 64, 64, 3], value, (Kind::Uint8, CPU))
}

#[test]
fn i3d_gives_the_reference_logits() {
    let (i3d, case) = (i3d(), case("i3d_logits"));
    let logits = i3d.features(&case["in.video"]).unwrap();
    let error = relative_error(&logits, &case["out.logits"]);
    assert!(error < 1e-5, "{error:e}");
    // one video's logits do not depend on its neighbours, nor on the autocast around them
    let _precision = Autocast::bfloat16(CPU, true);
    let alone = i3d.logits(&case["in.video"].narrow(0, 1, 1));
    assert_eq!(alone.kind(), Kind::Float);
    let error = relative_error(&alone, &logits.narrow(0, 1, 1));
    assert!(error < 1e-5, "{error:e}");
}

/// The figure of the original TensorFlow implementation for black against white.
#[test]
fn black_and_white_are_151_39_apart() {
    let i3d = i3d();
    let (black, white) = (i3d.logits(&plain(8, 30, 0.0)), i3d.logits(&plain(8, 30, 255.0)));
    let distance = frechet_distance(&black, &white).unwrap();
    assert!((distance - 151.39244).abs() < 0.02, "{distance}");
    assert!(kernel_distance(&black, &white).unwrap() > 1.0);
}

#[test]
fn videos_that_i3d_cannot_see_are_errors() {
    let i3d = i3d();
    let message = |videos: Tensor| i3d.features(&videos).unwrap_err().to_string();
    assert!(message(plain(1, 8, 0.0)).contains("at least 9 frames"));
    assert!(message(plain(1, 16, 0.0).to_kind(Kind::Float)).contains("Uint8"));
    assert!(message(plain(1, 16, 0.0).permute([0, 4, 1, 2, 3])).contains("[N, F, H, W, 3]"));
    assert_eq!(i3d.features(&plain(1, 9, 0.0)).unwrap().size(), [1, i3d.width()]);
    assert_eq!(i3d.features(&plain(0, 16, 0.0)).unwrap().size(), [0, 400]);
}

#[test]
fn lpips_gives_the_reference_distance() {
    let (lpips, case) = (lpips(Kind::Float), case("lpips_vgg"));
    for distance in [lpips.distance(&case["in.a"], &case["in.b"]), lpips.distance_to(&case["in.b"], &case["in.a"])] {
        let error = relative_error(&distance, &case["out.distance"]);
        assert!(error < 1e-5, "{error:e}");
    }
    assert_eq!(lpips.distance(&case["in.a"], &case["in.a"]).abs().max().double_value(&[]), 0.0);
}

/// Central differences along a direction, in float64.
#[test]
fn lpips_has_the_right_gradient() {
    let lpips = lpips(Kind::Double);
    let wave =
        |frequency: f64| (Tensor::arange(3 * 16 * 16, (Kind::Double, CPU)) * frequency).sin().view([1, 3, 16, 16]);
    let (a, direction) = (wave(0.7), wave(3.1));
    let b = wave(1.3).set_requires_grad(true);
    lpips.distance_to(&a, &b).sum(Kind::Double).backward();
    let slope = (b.grad() * &direction).sum(Kind::Double).double_value(&[]);
    let at = |step: f64| lpips.distance(&a, &(b.detach() + &direction * step)).double_value(&[0]);
    let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
    assert!((slope - expected).abs() < 1e-5 * expected.abs(), "{slope} is not {expected}");

    // the target gets a gradient only through `distance`
    let target = a.set_requires_grad(true);
    lpips.distance_to(&target, &b).sum(Kind::Double).backward();
    assert!(!target.grad().defined());
    lpips.distance(&target, &b).sum(Kind::Double).backward();
    assert!(target.grad().defined());
}

/// Nothing but finite gradients, also where images agree exactly and where all of them are flat.
#[test]
fn lpips_has_finite_gradients_everywhere() {
    let lpips = lpips(Kind::Float);
    for (a, b) in [(0.0, 0.0), (-1.0, 1.0), (1.0, -1.0), (-1e4, 1e4)] {
        let image = |value: f64| Tensor::full([2, 3, 32, 32], value, (Kind::Float, CPU));
        let b = image(b).set_requires_grad(true);
        lpips.distance_to(&image(a), &b).sum(Kind::Float).backward();
        assert!(b.grad().isfinite().all().int64_value(&[]) == 1);
    }
}

#[test]
fn another_network_is_named_as_such() {
    let folder = lvdm::weights::released::folder();
    let vgg = folder.join(lvdm::weights::released::LPIPS_VGG16.file);
    let message = format!("{:#}", I3d::load(Some(&vgg), CPU).err().unwrap());
    assert!(message.contains("another network than I3D") && message.contains("missing"), "{message}");
    let message = format!("{:#}", Lpips::load(Some(Path::new("nowhere.ckpt")), CPU, Kind::Float).err().unwrap());
    assert!(message.contains("nowhere.ckpt cannot be read"), "{message}");
}

/// A smooth texture of side `side` that moves by `v` pixels a frame (right, down), u8 `[frames, side, side, 3]`.
fn moving_texture(seed: u64, frames: i64, side: i64, v: [f64; 2]) -> Tensor {
    let axis = |n: i64, shape: [i64; 3]| Tensor::arange(n, (Kind::Double, CPU)).view(shape);
    let t = axis(frames, [-1, 1, 1]);
    let (x, y) = (axis(side, [1, 1, -1]) - &t * v[0], axis(side, [1, -1, 1]) - &t * v[1]);
    let draws = Vec::<f64>::try_from(common::noise(seed, &[40]).to_kind(Kind::Double)).unwrap();
    let scale = 128.0 / side as f64;
    let waves = draws.chunks(4).map(|draw| {
        let (a, b) = (draw[0] * 0.15 * scale, draw[1] * 0.15 * scale);
        (&x * a + &y * b + draw[2] * 6.0).sin() * (20.0 + 5.0 * draw[3])
    });
    let grey: Tensor = waves.sum::<Tensor>() + 128.0; // [F, S, S]
    let channels = [1.0, 0.8, 0.6].map(|part| (&grey - 128.0) * part + 120.0);
    Tensor::stack(&channels, 3).clamp(0.0, 255.0).to_kind(Kind::Uint8)
}

fn motion() -> Box<dyn FeatureExtractor> {
    ExtractorConfig::from(ExtractorKind::MOTION).open(CPU).unwrap()
}

/// Velocities that are known, in pixels of 128², land in their directions; nothing accelerates.
#[test]
fn motion_has_the_right_speed_and_direction() {
    let motion = motion();
    for (v, side, direction, speed) in [
        ([3.0, 0.0], 128, 0, 3.0),
        ([0.0, -2.0], 128, 6, 2.0),
        ([-1.5, 0.0], 64, 4, 3.0),
        ([2.0, 2.0], 128, 1, 8f64.sqrt()),
    ] {
        let clip = moving_texture(3, 5, side, v).unsqueeze(0);
        let features = motion.features(&clip).unwrap().to_kind(Kind::Double).view([2, 4, 4, 8]);
        // cells inside, where no edge comes in
        let inside = features.narrow(1, 1, 2).narrow(2, 1, 2).mean_dim([1i64, 2].as_slice(), false, Kind::Double);
        let [velocity, acceleration] = [0, 1].map(|i| Vec::<f64>::try_from(inside.get(i)).unwrap());
        let wanted = (1.0 + speed).log2();
        println!("{v:?} at {side}: {:.3} of {wanted:.3}, {velocity:.3?}, {acceleration:.3?}", velocity[direction]);
        assert!((velocity[direction] / wanted - 1.0).abs() < 0.1, "{v:?}: {velocity:?}");
        assert!(velocity.iter().enumerate().all(|(i, size)| i == direction || *size < 0.12), "{v:?}: {velocity:?}");
        assert!(acceleration.iter().all(|size| *size < 0.06), "{v:?}: {acceleration:?}");
    }
    // the same on other numbers of threads, and whatever else is in the batch
    let clips = Tensor::stack(&[0, 1, 2].map(|seed| moving_texture(seed, 5, 64, [1.0, 0.5])), 0);
    let all = motion.features(&clips).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let bytes = Vec::<u8>::try_from(clips.get(1).flatten(0, -1)).unwrap();
    let alone = pool.install(|| {
        let clip = Tensor::from_slice(&bytes).view([1, 5, 64, 64, 3]);
        Vec::<f32>::try_from(self::motion().features(&clip).unwrap().view(-1)).unwrap()
    });
    assert_eq!(alone, Vec::<f32>::try_from(all.get(1)).unwrap());
    let error = motion.features(&clips.narrow(1, 0, 2)).unwrap_err().to_string();
    assert!(error.contains("at least 3 frames, these have 2"), "{error}");
    assert_eq!(motion.features(&clips.narrow(0, 0, 0)).unwrap().size(), [0, 256]);
}

/// Clips whose textures move mostly to the right and get faster, u8 `[N, F, S, S, 3]`.
fn moving_set(count: u64, first: u64) -> Tensor {
    let clip = |i: u64| {
        let drawn = common::noise(100 + first + i, &[2]);
        let v = [1.2 + 0.15 * drawn.double_value(&[0]), 0.15 * drawn.double_value(&[1])];
        // faster from the middle on
        let early = moving_texture(first + i, 4, 64, v);
        let late = moving_texture(first + i, 8, 64, [2.0 * v[0], 2.0 * v[1]]).narrow(0, 2, 6);
        Tensor::cat(&[early, late], 0)
    };
    Tensor::stack(&(0..count).map(clip).collect::<Vec<_>>(), 0)
}

/// A metric's distance from some real videos, whose features are made once.
fn distance_from(metric: &str, real: &Tensor) -> impl Fn(&Tensor) -> f64 {
    let metric = Metric::named(metric).unwrap();
    let ComparedFeatures::Of(kind) = metric.compares() else { panic!("{metric:?}") };
    let extractor = ExtractorConfig::from(kind).open(CPU).unwrap();
    let real = extractor.features(real).unwrap();
    move |videos| metric.compute(&real, &extractor.features(videos).unwrap(), Divisor::NMinusOne).unwrap()
}

/// The order of frames, without which every frame is what it was.
fn reordered(videos: &Tensor, order: &[i64]) -> Tensor {
    videos.index_select(1, &Tensor::from_slice(order))
}

/// Motion and nothing else: what stands still, plays backwards, is shuffled or sped up is far; other colours are not.
#[test]
fn the_motion_distance_sees_motion() {
    let (real, others) = (moving_set(16, 0), moving_set(16, 50));
    let from_real = distance_from("motion_distance", &real);
    let same = from_real(&real);
    assert!(same.abs() < 1e-6, "{same}");
    let other_clips = from_real(&others);
    let frozen = from_real(&reordered(&real, &[0; 10]));
    let backwards = from_real(&reordered(&real, &[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]));
    let shuffled = from_real(&reordered(&real, &[3, 9, 0, 6, 2, 8, 5, 1, 7, 4]));
    let sped_up = from_real(&reordered(&real, &[0, 2, 4, 6, 8]));
    let float = real.to_kind(Kind::Float);
    let darker = from_real(&(&float * 0.7 + 10.0).round().to_kind(Kind::Uint8));
    let negative = from_real(&(-&float + 255.0).to_kind(Kind::Uint8));
    println!(
        "other clips {other_clips:.4}, frozen {frozen:.4}, backwards {backwards:.4}, shuffled {shuffled:.4}, sped up \
         {sped_up:.4}, darker {darker:.5}, negative {negative:.5}"
    );
    for (name, value) in [("frozen", frozen), ("backwards", backwards), ("shuffled", shuffled), ("sped up", sped_up)] {
        assert!(value > 2.0 * other_clips, "{name}: {value}, and other clips {other_clips}");
        for (name, value) in [("darker", darker), ("negative", negative)] {
            assert!(value < 0.5 * other_clips && value < 0.01 * frozen, "{name}: {value}");
        }
    }
}

/// Frames and nothing else: their order does not count, their colours and their sharpness do.
#[test]
fn the_frame_distance_sees_frames() {
    let real = moving_set(3, 0).narrow(1, 2, 4);
    let from_real = distance_from("frame_distance", &real);
    let (backwards, shuffled) =
        (from_real(&reordered(&real, &[3, 2, 1, 0])), from_real(&reordered(&real, &[2, 0, 3, 1])));
    let float = real.to_kind(Kind::Float);
    let negative = from_real(&(-&float + 255.0).to_kind(Kind::Uint8));
    let flat = float.flatten(0, 1).permute([0, 3, 1, 2]);
    let blurred = flat.avg_pool2d([5, 5], [1, 1], [2, 2], false, false, None::<i64>);
    let blurred = from_real(&blurred.permute([0, 2, 3, 1]).reshape(real.size()).to_kind(Kind::Uint8));
    println!("backwards {backwards:.1e}, shuffled {shuffled:.1e}, negative {negative:.3}, blurred {blurred:.3}");
    assert!(backwards.abs() < 1e-6 && shuffled.abs() < 1e-6 && negative > 0.01 && blurred > 0.001);

    // of a long clip no more than sixteen, from the first to the last
    let extractor = ExtractorConfig::from(ExtractorKind::VGG16_FRAMES).open(CPU).unwrap();
    let long = Tensor::cat(&[moving_set(1, 0), moving_set(1, 5)], 1);
    let features = extractor.features(&long).unwrap();
    assert_eq!((long.size()[1], features.size()), (20, vec![1, 16, 512]));
    let ends = extractor.features(&reordered(&long, &[0, 1, 19])).unwrap();
    for (row, of_ends) in [(0, 0), (1, 1), (15, 2)] {
        let error = (features.select(1, row) - ends.select(1, of_ends)).abs().max().double_value(&[]);
        assert!(error < 1e-4, "{row}: {error:e}");
    }
}

/// A checkpoint as it is published: wrapped, with other networks beside it.
fn write_v_jepa(path: &Path) -> BTreeMap<String, Tensor> {
    let case = common::source("tests/parity/v_jepa.safetensors");
    let notes = lvdm::safetensors::read_notes(&case).unwrap();
    let config: serde_json::Value = serde_json::from_str(&notes["config"]).unwrap();
    let named: Vec<(String, Tensor)> = serde_json::from_value::<Vec<(String, Vec<i64>)>>(config["tensors"].clone())
        .unwrap()
        .into_iter()
        .map(|(name, shape)| (name, Tensor::zeros(&shape, (Kind::Float, CPU))))
        .collect();
    let tensors = lvdm::weights::synthesize(&named, "");
    let wrapped = tensors.iter().map(|(name, t)| (format!("module.backbone.{name}"), t.shallow_clone())).collect();
    write_checkpoint_under("target_encoder", path, &wrapped, &|pickle| {
        pickle.text("encoder");
        pickle.raw(b"}");
        pickle.text("epoch");
        pickle.int(300);
    });
    tensors
}

/// `lvdm weights add` takes what the extractor needs out of a published checkpoint; its hash is that of the checkpoint, and
/// the features are those of the reference.
#[test]
fn weights_that_a_user_brings() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let lvdm = |arguments: &[&str]| -> Said {
        lvdm_in(at, arguments).env("LVDM_WEIGHTS", at.join("weights")).output().unwrap().into()
    };
    let tensors = write_v_jepa(&at.join("vith16.pth.tar"));
    let listed = lvdm(&["weights"]);
    assert!(
        listed.out.contains("V-JEPA, the network of JEDi: missing") && listed.out.contains("lvdm weights add v_jepa")
    );
    assert!(
        listed.out.contains("I3D (Kinetics-400), the network of FVD: missing; `lvdm weights fetch`"),
        "{}",
        listed.out
    );

    // what is another network's, or no file at all, is refused, and nothing is written
    lvdm::safetensors::write_foreign_safetensors(
        &at.join("own.safetensors"),
        &tensors.into_iter().collect::<Vec<(String, Tensor)>>(),
    )
    .unwrap();
    for (file, word) in [("vith16.pth.tar", "`encoder`: is a dictionary"), ("own.safetensors", "attn.q")] {
        let said = lvdm(&["weights", "add", "video_mae_v2", file]);
        let error = said.error(1);
        assert!(error.contains("is not VideoMAE-v2") && error.contains(word), "{error}");
    }
    assert!(lvdm(&["weights", "add", "v_jepa", "nowhere.pt"]).error(1).contains("there is no file nowhere.pt"));
    assert_eq!(lvdm(&["weights", "add", "v_jepo", "vith16.pth.tar"]).status, 2);
    assert!(!at.join("weights").exists());

    let added = lvdm(&["weights", "add", "v_jepa", "vith16.pth.tar"]);
    let bytes = fs::read(at.join("vith16.pth.tar")).unwrap();
    let sha256: String = sha2_of(&bytes);
    assert!(added.out.contains(&sha256), "{}\n{}", added.out, added.err);
    assert!(lvdm(&["weights"]).out.contains(&format!("SHA-256 {sha256}")));

    // from its place, from the checkpoint, and as safetensors
    let open = |file: &Path| {
        let kind = ExtractorKind::named("v_jepa").unwrap();
        ExtractorConfig { kind, file: Some(file.to_path_buf()) }.open(CPU)
    };
    let placed = at.join("weights/v_jepa.safetensors");
    let case = case("v_jepa");
    for (file, hash) in [(&placed, &sha256), (&at.join("vith16.pth.tar"), &sha256)] {
        let network = open(file).unwrap();
        assert_eq!((network.weights_sha256(), network.width()), (hash.as_str(), 64));
        let error = relative_error(&network.features(&case["in.video"]).unwrap(), &case["out.features"]);
        assert!(error < 1e-5, "{error:e}");
        // one at a time: a video's features do not depend on its neighbours
        let alone = network.features(&case["in.video"].narrow(0, 1, 1)).unwrap();
        assert!(relative_error(&alone, &case["out.features"].narrow(0, 1, 1)) < 1e-5);
        assert!(network.features(&plain(1, 1, 0.0)).unwrap_err().to_string().contains("at least 2 frames"));
    }
    assert_ne!(open(&at.join("own.safetensors")).unwrap().weights_sha256(), sha256);

    // damage is found
    let mut damaged = fs::read(&placed).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&placed, damaged).unwrap();
    let error = format!("{:#}", open(&placed).err().unwrap());
    assert!(error.contains("v_jepa.safetensors"), "{error}");
}

fn sha2_of(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
