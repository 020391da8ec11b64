//! The video autoencoder's time equivariance, its sizes, and the pieces of its loss.

mod common;

use common::{moving_clips, noise, relative_error};
use lvdm::{
    autoencoder_loss::{AutoencoderLoss, AutoencoderLossConfig, PixelLoss},
    autoencoder_loss::{
        CodecLossSettings, DiscriminatorConfig, PatchDiscriminator, TatsDiscriminator, VideoDiscriminatorConfig,
    },
    codecs::{AutoencoderConfig, CodecSettings, Encoded, Posterior, VideoAutoencoder},
    data::normalise,
    extractors::Lpips,
    nn::{Padding, Parameters},
    torch::Autocast,
};
use tch::{Device, Kind, Tensor, no_grad};

const CPU: Device = Device::Cpu;

fn small(padding: Padding) -> AutoencoderConfig {
    AutoencoderConfig { channels: 8, factors: [4, 4, 4], norm_groups: 8, padding, ..AutoencoderConfig::default() }
}

/// The same motion, `before` still frames behind the start, between stills of one and the same picture: 112 frames.
fn motion_after(before: i64) -> Tensor {
    let (moving, total) = (16, 112);
    // there and back again, so that both ends are the same picture
    let there = normalise(&moving_clips(1, moving / 2, 16));
    let motion = Tensor::cat(&[there.shallow_clone(), there.flip([2])], 2);
    let still = motion.narrow(2, 0, 1);
    let stills = |count: i64| still.repeat([1, 1, count, 1, 1]);
    Tensor::cat(&[stills(before), motion, stills(total - moving - before)], 2)
}

/// How far latents are from moving with the video, and the inner frames of what is decoded from them.
fn equivariance_errors(padding: Padding) -> (f64, f64) {
    let config = small(padding);
    let ft = config.factors[0];
    let parameters = Parameters::new(CPU, 5);
    let autoencoder = VideoAutoencoder::new(&parameters.root(), &config);
    parameters.freeze();
    no_grad(|| {
        let latent = |before| autoencoder.encode(&motion_after(before)).mean;
        let (early, late) = (latent(48), latent(48 + ft));
        let count = early.size()[2];
        assert!(relative_error(&early.narrow(2, 1, count - 1), &early.narrow(2, 0, count - 1)) > 1e-2, "all still");
        let error = |early: &Tensor, late: &Tensor, by: i64, edge: i64| {
            let count = early.size()[2] - by - 2 * edge;
            relative_error(&early.narrow(2, edge, count), &late.narrow(2, edge + by, count))
        };
        // what is decoded has the pattern of the upsampling, which no edge can go on with
        (error(&early, &late, 1, 0), error(&autoencoder.decode(&early), &autoencoder.decode(&late), ft, 16))
    })
}

/// One motion between still frames, shifted by ft frames: with replicated edges the latents shift too; with zeros
/// beyond the edges they do not.
#[test]
fn a_shift_in_time_shifts_the_latents() {
    let (latents, videos) = equivariance_errors(Padding::Replicate);
    let (latents_of_zeros, _) = equivariance_errors(Padding::Zeros);
    println!("latents: {latents:.1e} with replicated edges, {latents_of_zeros:.1e} with zeros; decoded: {videos:.1e}");
    assert!(latents < 3e-6, "{latents:e}");
    assert!(videos < 1e-5, "{videos:e}");
    assert!(latents_of_zeros > 1e-2, "{latents_of_zeros:e}");
}

/// Sizes come out as `latent_shape` says, for factors that differ by axis; sizes that do not divide are refused.
#[test]
fn sizes() {
    for (factors, frames, height, width) in
        [([2, 4, 4], 6, 12, 20), ([4, 8, 8], 4, 8, 24), ([1, 4, 2], 3, 8, 10), ([4, 1, 1], 8, 5, 7)]
    {
        let config = AutoencoderConfig { channels: 4, factors, norm_groups: 4, ..AutoencoderConfig::default() };
        config.validate().unwrap();
        let parameters = Parameters::new(CPU, 0);
        let autoencoder = VideoAutoencoder::new(&parameters.root(), &config);
        parameters.freeze();
        let [c, f, h, w] = config.latent_shape(frames, height, width).unwrap();
        let posterior = autoencoder.encode(&noise(0, &[2, 3, frames, height, width]));
        assert_eq!(posterior.mean.size(), [2, c, f, h, w], "{factors:?}");
        assert_eq!(posterior.logvar.size(), [2, c, f, h, w], "{factors:?}");
        assert_eq!(autoencoder.decode(&posterior.mean).size(), [2, 3, frames, height, width], "{factors:?}");
        assert!(config.latent_shape(frames, height, width + 1).is_err() || factors[2] == 1);
    }
    let config = AutoencoderConfig::default();
    for (frames, height, width) in [(15, 64, 64), (16, 60, 64), (16, 64, 68), (2, 64, 64)] {
        let error = config.latent_shape(frames, height, width).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{frames} frames of {height}x{width}")) && error.contains("[4, 8, 8]"),
            "{error}"
        );
    }
    for (config, word) in [
        (AutoencoderConfig { factors: [3, 8, 8], ..AutoencoderConfig::default() }, "powers of two"),
        (AutoencoderConfig { factors: [1, 1, 1], ..AutoencoderConfig::default() }, "at least one"),
        (AutoencoderConfig { norm_groups: 24, ..AutoencoderConfig::default() }, "does not divide"),
        (AutoencoderConfig { channels: 0, ..AutoencoderConfig::default() }, "positive"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

/// A loss without LPIPS, a clip, and a kernel whose product with a picture is the reconstruction.
struct Bench {
    loss: AutoencoderLoss,
    x: Tensor,
    base: Tensor,
    kernel: Tensor,
}

const SHAPE: [i64; 5] = [2, 3, 4, 32, 32];

fn plain() -> AutoencoderLossConfig {
    AutoencoderLossConfig {
        perceptual_weight: 0.0,
        adversarial_start: 10,
        adversarial_warmup: 4,
        discriminator: DiscriminatorConfig { channels: 8, layers: 2 },
        ..AutoencoderLossConfig::default()
    }
}

impl Bench {
    fn new(config: AutoencoderLossConfig) -> Self {
        let loss = AutoencoderLoss::new(&config, CPU, Kind::Float, 1).unwrap();
        let kernel = Tensor::from_slice(&[0.5f32, 0.8, 1.1]).view([1, 3, 1, 1, 1]).set_requires_grad(true);
        Bench { loss, x: noise(0, &SHAPE).clamp(-1.0, 1.0), base: noise(1, &SHAPE).clamp(-1.0, 1.0), kernel }
    }

    fn reconstruction(&self) -> Tensor {
        &self.base * &self.kernel
    }

    fn terms(&mut self, step: i64, posterior: &Posterior) -> lvdm::autoencoder_loss::GeneratorTerms<f64> {
        self.kernel.zero_grad();
        let [mean, logvar] = [&posterior.mean, &posterior.logvar].map(Tensor::shallow_clone);
        let encoded = Encoded::Gaussian(Posterior { mean, logvar });
        self.loss.generator_backward(&self.x, &self.reconstruction(), &encoded, &self.kernel, step, 1.0).read()
    }
}

fn unit_posterior() -> Posterior {
    let zeros = || Tensor::zeros([2, 4, 2, 4, 4], (Kind::Float, CPU));
    Posterior { mean: zeros(), logvar: zeros() }
}

/// Summed over pixels and divided by B·F, for both pixel losses, value and gradient.
#[test]
fn pixel_losses() {
    for (pixel, power) in [(PixelLoss::L1, 1), (PixelLoss::L2, 2)] {
        let mut bench = Bench::new(AutoencoderLossConfig { pixel, ..plain() });
        let terms = bench.terms(0, &unit_posterior());
        let gradient = bench.kernel.grad().copy();
        bench.kernel.zero_grad();
        let by_hand = (&bench.x - bench.reconstruction()).abs().pow_tensor_scalar(power).sum(None) / (2.0 * 4.0);
        by_hand.backward();
        let value = by_hand.double_value(&[]);
        assert!((terms.reconstruction / value - 1.0).abs() < 1e-5, "{pixel:?}: {} and {value}", terms.reconstruction);
        assert!((terms.total / value - 1.0).abs() < 1e-5);
        assert!((terms.pixel * (3 * 32 * 32) as f64 / value - 1.0).abs() < 1e-5, "{}", terms.pixel);
        assert!(relative_error(&gradient, &bench.kernel.grad()) < 1e-5, "{pixel:?}");
    }
}

/// A frame's LPIPS counts once for each of its 3·H·W values; looking at every second frame sees only those.
#[test]
fn lpips_counts_for_every_pixel() {
    let lpips = Lpips::load(None, CPU, Kind::Float).unwrap_or_else(|error| panic!("{error:#}"));
    let frames = |video: &Tensor| video.transpose(1, 2).flatten(0, 1);
    let distances = |bench: &Bench| no_grad(|| lpips.distance(&frames(&bench.x), &frames(&bench.reconstruction())));
    for (every, step, seen) in
        [(1, 0, vec![0, 1, 2, 3, 4, 5, 6, 7]), (2, 0, vec![0, 2, 4, 6]), (2, 1, vec![1, 3, 5, 7])]
    {
        let config = AutoencoderLossConfig { perceptual_weight: 0.5, perceptual_every: every, ..plain() };
        let mut bench = Bench::new(config);
        let terms = bench.terms(step, &unit_posterior());
        let expected = distances(&bench).view(-1).index_select(0, &Tensor::from_slice(&seen)).mean(None);
        let expected = expected.double_value(&[]);
        assert!((terms.perceptual / expected - 1.0).abs() < 1e-4, "{} and {expected}", terms.perceptual);
        let sum = (terms.pixel + 0.5 * expected) * (3 * 32 * 32) as f64;
        assert!((terms.reconstruction / sum - 1.0).abs() < 1e-4, "{} and {sum}", terms.reconstruction);
    }
}

/// Nothing adversarial before the start step; then a factor that grows in `adversarial_warmup` steps to the full
/// adaptive weight, which is ‖∇ L_rec‖ / ‖∇ L_adv‖ at the last kernel times the configured weight.
#[test]
fn the_discriminator_comes_in_slowly() {
    let mut bench = Bench::new(plain());
    // loud enough for an adaptive weight below its clamp
    for (_, mut parameter) in bench.loss.discriminator_parameters().trainable() {
        let _ = no_grad(|| parameter.g_mul_scalar_(30.0));
    }
    let posterior = unit_posterior();
    for step in [0, 9] {
        let terms = bench.terms(step, &posterior);
        assert!(!bench.loss.is_adversarial(step));
        assert_eq!((terms.adversarial, terms.adversarial_factor), (0.0, 0.0), "step {step}");
        assert_eq!(terms.total, terms.reconstruction);
    }
    let full = bench.loss.adversarial_weight(&bench.x, &bench.reconstruction(), &bench.kernel, 10).double_value(&[]);
    assert!(full > 0.0 && full < 0.5e4, "{full}");
    for (step, part) in [(10, 0.25), (11, 0.5), (12, 0.75), (13, 1.0), (14, 1.0), (1000, 1.0)] {
        let terms = bench.terms(step, &posterior);
        let found = terms.adversarial_factor / full;
        assert!((found - part).abs() < 1e-4, "step {step}: {found} of the full weight, not {part}");
        let total = terms.reconstruction + terms.adversarial_factor * terms.adversarial;
        assert!(terms.adversarial != 0.0 && (terms.total - total).abs() < 1e-6 * total.abs());
    }
    // the two gradients at the last kernel, each on its own
    let gradient = |bench: &mut Bench, step| {
        let terms = bench.terms(step, &unit_posterior());
        (bench.kernel.grad().copy(), terms.adversarial_factor)
    };
    let (reconstruction, _) = gradient(&mut bench, 0);
    let (both, factor) = gradient(&mut bench, 13);
    let adversary = (both - &reconstruction) / factor;
    let lambda = (reconstruction.norm() / (adversary.norm() + 1e-4)).double_value(&[]);
    assert!((full / (0.5 * lambda) - 1.0).abs() < 1e-2, "{full} and {}", 0.5 * lambda);
    // the discriminator takes no gradient from the generator's loss
    assert!(bench.loss.discriminator_parameters().trainable().iter().all(|(_, p)| !p.grad().defined()));
}

/// λ stays in [0, 10⁴], times the configured weight.
#[test]
fn the_adaptive_weight_is_clamped() {
    let mut bench = Bench::new(AutoencoderLossConfig { pixel: PixelLoss::L2, adversarial_warmup: 0, ..plain() });
    // a discriminator that does not see its input has no gradient to give
    for (_, mut parameter) in bench.loss.discriminator_parameters().trainable() {
        let _ = no_grad(|| parameter.zero_());
    }
    assert_eq!(bench.terms(10, &unit_posterior()).adversarial_factor, 0.5 * 1e4);
    // nothing left to reconstruct, nothing to weigh against
    let mut bench = Bench::new(AutoencoderLossConfig { pixel: PixelLoss::L2, adversarial_warmup: 0, ..plain() });
    bench.x = bench.reconstruction().detach();
    let terms = bench.terms(10, &unit_posterior());
    assert_eq!((terms.adversarial_factor, terms.reconstruction), (0.0, 0.0));
    // a weight of nought is no discriminator
    let bench = Bench::new(AutoencoderLossConfig { adversarial_weight: 0.0, ..plain() });
    assert!(!bench.loss.is_adversarial(1_000_000));
}

/// ½ (mean relu(1 − D(x)) + mean relu(1 + D(x̂))): one where D is nought, and its gradient reaches D.
#[test]
fn the_hinge_loss() {
    let bench = Bench::new(plain());
    let terms = bench.loss.discriminator_backward(&bench.x, &bench.reconstruction(), 1.0).read();
    assert!(bench.kernel.grad().numel() == 0 || !bench.kernel.grad().defined(), "the autoencoder gets no gradient");
    let norm = |(_, p): &(String, Tensor)| p.grad().norm().double_value(&[]);
    assert!(bench.loss.discriminator_parameters().trainable().iter().map(norm).sum::<f64>() > 1e-3);
    assert!(terms.loss > 0.0);
    let bench = Bench::new(plain());
    for (_, mut parameter) in bench.loss.discriminator_parameters().trainable() {
        let _ = no_grad(|| parameter.zero_());
    }
    let terms = bench.loss.discriminator_backward(&bench.x, &bench.reconstruction(), 1.0).read();
    assert_eq!((terms.loss, terms.real, terms.fake), (1.0, 0.0, 0.0));
}

/// With a discriminator of clips and feature matching, in float64: values and gradients of both updates against the
/// formulas, which are written here with networks of their own, of the same parameters.
#[test]
fn a_discriminator_of_clips_and_feature_matching() {
    let of_clips = VideoDiscriminatorConfig { channels: 4, layers: 2, weight: 0.7 };
    let config = AutoencoderLossConfig {
        pixel: PixelLoss::L2,
        video_discriminator: Some(of_clips.clone()),
        feature_matching: 0.3,
        ..plain()
    };
    let loss = AutoencoderLoss::new(&config, CPU, Kind::Double, 1).unwrap();
    let double = |sample| noise(sample, &SHAPE).clamp(-1.0, 1.0).to_kind(Kind::Double);
    let (x, base) = (double(0), double(1));
    let kernel = Tensor::from_slice(&[0.5f64, 0.8, 1.1]).view([1, 3, 1, 1, 1]).set_requires_grad(true);
    let zeros = || Tensor::zeros([2, 4, 2, 4, 4], (Kind::Double, CPU));
    let encoded = Encoded::Gaussian(Posterior { mean: zeros(), logvar: zeros() });
    // at step 11 half of the warm-up is over
    let terms = loss.generator_backward(&x, &(&base * &kernel), &encoded, &kernel, 11, 1.0).read();
    let gradient = kernel.grad().copy();
    assert!(loss.discriminator_parameters().trainable().iter().all(|(_, p)| !p.grad().defined()));

    let parameters = Parameters::new(CPU, 0);
    let image = PatchDiscriminator::new(&parameters.root(), 3, &config.discriminator);
    let video = TatsDiscriminator::of_clips(&parameters.root().sub("video"), 3, of_clips.channels, of_clips.layers);
    parameters.to_kind(Kind::Double);
    parameters.load(&loss.discriminator_parameters().named().into_iter().collect()).unwrap();
    let frames = |video: &Tensor| video.transpose(1, 2).reshape([8, 3, 32, 32]);
    let distance = |fake: &[Tensor], real: &[Tensor]| -> Tensor {
        fake.iter().zip(real).map(|(fake, real)| (fake - real.detach()).abs().mean(None)).sum()
    };
    let fake = &base * &kernel;
    let ([image_fake, image_real], [video_fake, video_real]) =
        ([&fake, &x].map(|clips| image.judge(&frames(clips))), [&fake, &x].map(|clips| video.judge(clips)));
    assert_eq!((image_fake.features.len(), video_fake.features.len()), (3, 3));
    // n → ⌊n/2⌋ + 1 twice, then n + 1 twice
    assert_eq!(video_fake.logits.size(), [2, 1, 4, 11, 11]);
    let adversarial: Tensor = -image_fake.logits.mean(None) - video_fake.logits.mean(None) * 0.7;
    let matching =
        distance(&image_fake.features, &image_real.features) + distance(&video_fake.features, &video_real.features);
    let pixels = (&x - &fake).square().sum(None) / 8.0;
    let values = (3 * 32 * 32) as f64;
    let by_hand = &pixels + &adversarial * terms.adversarial_factor + &matching * (0.3 * 0.5 * values);
    kernel.shallow_clone().zero_grad();
    by_hand.backward();
    assert!(relative_error(&gradient, &kernel.grad()) < 1e-12, "{gradient:?} and {:?}", kernel.grad());
    for (name, found, wanted) in [
        ("total", terms.total, &by_hand),
        ("adversarial", terms.adversarial, &adversarial),
        ("matching", terms.feature_matching, &matching),
    ] {
        let wanted = wanted.double_value(&[]);
        assert!((found / wanted - 1.0).abs() < 1e-12 && wanted != 0.0, "{name}: {found} and {wanted}");
    }
    // feature matching is seen in the gradient: the same without it is another one
    let without =
        AutoencoderLoss::new(&AutoencoderLossConfig { feature_matching: 0.0, ..config }, CPU, Kind::Double, 1);
    kernel.shallow_clone().zero_grad();
    without.unwrap().generator_backward(&x, &(&base * &kernel), &encoded, &kernel, 11, 1.0);
    assert!(relative_error(&kernel.grad(), &gradient) > 1e-2);

    // the discriminators' own update
    let terms = loss.discriminator_backward(&x, &fake, 1.0).read();
    let hinge =
        |real: &Tensor, fake: &Tensor| ((1.0f64 - real).relu().mean(None) + (fake + 1.0).relu().mean(None)) * 0.5;
    let fake = fake.detach();
    let ([image_fake, image_real], [video_fake, video_real]) =
        ([&fake, &x].map(|clips| image.forward(&frames(clips))), [&fake, &x].map(|clips| video.judge(clips).logits));
    let by_hand = hinge(&image_real, &image_fake) + hinge(&video_real, &video_fake) * 0.7;
    parameters.zero_grad();
    by_hand.backward();
    assert!((terms.loss / by_hand.double_value(&[]) - 1.0).abs() < 1e-12);
    let [real, fake] = terms.video.unwrap();
    let wanted = [&video_real, &video_fake].map(|logits| logits.mean(None).double_value(&[]));
    assert!((real / wanted[0] - 1.0).abs() < 1e-12 && (fake / wanted[1] - 1.0).abs() < 1e-12);
    for ((name, found), (_, wanted)) in loss.discriminator_parameters().trainable().iter().zip(parameters.trainable()) {
        let difference = (found.grad() - wanted.grad()).norm().double_value(&[]);
        assert!(difference <= 1e-12 * wanted.grad().norm().double_value(&[]) + 1e-14, "{name}: {difference:e}");
    }
}

/// What has no discriminator to stand on is refused by its key.
#[test]
fn discriminators_that_make_no_sense() {
    let of_clips = |config| Some(VideoDiscriminatorConfig { channels: 4, ..config });
    let base = VideoDiscriminatorConfig::default;
    for (config, words) in [
        (AutoencoderLossConfig { feature_matching: -1.0, ..plain() }, "feature_matching is a weight of 0 or more"),
        (
            AutoencoderLossConfig { feature_matching: 1.0, adversarial_weight: 0.0, ..plain() },
            "adversarial_weight is 0",
        ),
        (
            AutoencoderLossConfig { video_discriminator: Some(base()), adversarial_weight: 0.0, ..plain() },
            "video_discriminator.weight needs",
        ),
        (
            AutoencoderLossConfig {
                video_discriminator: of_clips(VideoDiscriminatorConfig { layers: 0, ..base() }),
                ..plain()
            },
            "video_discriminator.layers must be at least 1, not 0",
        ),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    AutoencoderLossConfig { video_discriminator: Some(base()), feature_matching: 1.0, ..plain() }.validate().unwrap();
}

/// In mixed precision the discriminator runs in bfloat16; margins, their means and what is logged are float32. In
/// bfloat16 a mean of about one has steps of 1/128, which the loss would keep.
#[test]
fn the_hinge_loss_is_float32_in_mixed_precision() {
    let terms = |half: bool| {
        let bench = Bench::new(plain());
        let _precision = Autocast::bfloat16(CPU, half);
        bench.loss.discriminator_backward(&bench.x, &bench.reconstruction(), 1.0)
    };
    let (half, full) = (terms(true), terms(false));
    for (name, half, full) in
        [("loss", half.loss, full.loss), ("real", half.real, full.real), ("fake", half.fake, full.fake)]
    {
        assert_eq!(half.kind(), Kind::Float, "{name}");
        let [half, full] = [half, full].map(|t| t.double_value(&[]));
        println!("{name}: {half} in mixed precision, {full} in float32");
        let rounded = Tensor::from(half).to_kind(Kind::BFloat16).double_value(&[]);
        assert!(half != rounded && half != full && (half - full).abs() < 2e-3, "{name}: {half}, {full}");
    }
}

/// KL from N(0, I): nought at (0, 1), else ½ Σ (μ² + σ² − 1 − ln σ²), weighted into the total.
#[test]
fn kl() {
    let mut bench = Bench::new(AutoencoderLossConfig { kl_weight: 0.01, ..plain() });
    let terms = bench.terms(0, &unit_posterior());
    assert_eq!((terms.kl, terms.total), (0.0, terms.reconstruction));
    let shape = [2, 4, 2, 4, 4];
    let mean = Tensor::full(shape, 0.3, (Kind::Float, CPU));
    let logvar = Tensor::full(shape, -0.7, (Kind::Float, CPU));
    let terms = bench.terms(0, &Posterior { mean, logvar });
    let expected = 0.5 * (0.3f64.powi(2) + (-0.7f64).exp() - 1.0 + 0.7) * (4 * 2 * 4 * 4) as f64;
    assert!((terms.kl / expected - 1.0).abs() < 1e-5, "{} and {expected}", terms.kl);
    assert!((terms.total - terms.reconstruction - 0.01 * expected).abs() < 1e-3 * expected);
    // of a posterior that comes in bfloat16 the sum, here over 256 values, is not rounded again
    let half = |sample| noise(sample, &shape).to_kind(Kind::BFloat16);
    let posterior = Posterior { mean: half(2), logvar: half(3) };
    let exact =
        Posterior { mean: posterior.mean.to_kind(Kind::Double), logvar: posterior.logvar.to_kind(Kind::Double) };
    let (found, exact) = (posterior.kl(), exact.kl());
    assert!(found.kind() == Kind::Float && relative_error(&found, &exact) < 1e-6, "{found:?}, {exact:?}");
    // sampling: mean + σ·noise
    let posterior = Posterior {
        mean: Tensor::full([1], 2.0, (Kind::Float, CPU)),
        logvar: Tensor::full([1], 4f64.ln(), (Kind::Float, CPU)),
    };
    assert!((posterior.sample(&Tensor::from_slice(&[1.5f32])).double_value(&[0]) - 5.0).abs() < 1e-6);
}
