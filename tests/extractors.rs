//! I3D, LPIPS and the figures made from them, with the real weights.
//!
//! They need the weight files (`lvdm weights fetch`, or LVDM_WEIGHTS) and fail without them.

mod common;

use std::{collections::BTreeMap, path::Path};

use lvdm::{
    extractors::{ExtractorConfig, FeatureExtractor, i3d::I3d, lpips::Lpips},
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
}
