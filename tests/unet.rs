//! The denoising U-Net: joint attention, recomputed activations, batch independence; its average and its objective.

mod common;

use common::{largest_difference, noise, plain_loss, relative_error, wake};
use lvdm::{
    diffusion::{
        CosineLogSnr, Denoiser, Loss, NetworkDenoiser, NoiseSchedule, NoisyBatch, Objective, Observed, Predict,
        Reconstruction, ScheduleConfig, Times,
    },
    networks::{
        AttentionKind, Inputs, JointAttention, Network as _, NetworkSettings, Ports, Recompute, SelfAttention, UNet3d,
        UNetConfig,
    },
    nn::{FrameStack, Init, Parameters},
    torch::{Autocast, FixedWeights, caught, peak_host_memory, recompute},
    train::Ema,
};
use tch::{Device, Kind, Tensor, no_grad};

const CPU: Device = Device::Cpu;

fn config() -> UNetConfig {
    UNetConfig {
        channels: 32,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![1, 2],
        heads: 2,
        ..UNetConfig::default()
    }
}

/// A network in which no layer is left at zero.
fn network(config: &UNetConfig) -> (UNet3d, Parameters) {
    config.validate().unwrap();
    let parameters = Parameters::new(CPU, 4);
    let ports = Ports::of([4, 4, 1, 1]);
    let unet = UNet3d::new(&parameters.root(), config, &ports);
    wake(&parameters);
    (unet, parameters)
}

fn times(t: &[i64]) -> Tensor {
    Tensor::from_slice(t)
}

/// With one frame, attention over space and time is attention over space.
#[test]
fn joint_attention_at_one_frame_is_spatial_attention() {
    let (joint_parameters, spatial_parameters) = (Parameters::new(CPU, 1), Parameters::new(CPU, 1));
    let joint = JointAttention::new(&joint_parameters.root(), 32, 4, 32, None);
    let spatial = SelfAttention::new(&spatial_parameters.root(), "s", 32, 4, 32);
    wake(&joint_parameters);
    wake(&spatial_parameters);
    let x = noise(0, &[3, 32, 1, 6, 5]);
    no_grad(|| {
        let frames = FrameStack::fold(&x);
        let by_space = frames.from_positions(&spatial.forward(&frames.positions())).video();
        let error = largest_difference(&joint.forward(&frames).video(), &by_space);
        assert!(relative_error(&by_space, &x) > 1e-2, "attention does nothing");
        assert!(error < 1e-5, "{error:e}");
        // and at two frames it is not
        let frames = FrameStack::fold(&noise(0, &[3, 32, 2, 6, 5]));
        let by_space = frames.from_positions(&spatial.forward(&frames.positions())).video();
        let error = largest_difference(&joint.forward(&frames).video(), &by_space);
        assert!(error > 1e-3, "{error:e}");
    });
}

/// Without relative positions the network does not know the frames' order: permuted in, permuted out.
/// With them it does.
#[test]
fn joint_attention_without_positions_permutes_with_the_frames() {
    let order = Tensor::from_slice(&[2i64, 0, 3, 1]);
    let x = noise(1, &[2, 4, 4, 8, 8]);
    let error = |relative_position| {
        let (unet, parameters) =
            network(&UNetConfig { attention: AttentionKind::Joint, relative_position, ..config() });
        parameters.freeze();
        let run = |x: &Tensor| unet.forward(x, &times(&[30, 700]), &Inputs::default());
        relative_error(&run(&x.index_select(2, &order)), &run(&x).index_select(2, &order))
    };
    let (without, with) = (error(false), error(true));
    println!("permuted frames: {without:.1e} without relative positions, {with:.1e} with them");
    assert!(without < 1e-5, "{without:e}");
    assert!(with > 1e-3, "{with:e}");
}

/// Loss and gradients of one step, and the most memory it needed.
fn step(recompute: Recompute) -> (f64, Vec<(String, Tensor)>, i64) {
    let config = UNetConfig { blocks_per_level: 2, recompute, ..config() };
    let (unet, parameters) = network(&config);
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let (z_0, noise) = (noise(2, &[2, 4, 4, 32, 32]), noise(3, &[2, 4, 4, 32, 32]));
    // gradients are there before, so that only activations count
    for (_, p) in parameters.trainable() {
        (p.sum(None) * 0.0).backward();
    }
    parameters.zero_grad();
    let (loss, peak) = peak_host_memory(|| {
        let loss = plain_loss(&Objective::default(), &unet, &schedule, &z_0, &[10.0, 900.0], &noise);
        loss.backward();
        loss.double_value(&[])
    });
    (loss, parameters.trainable().into_iter().map(|(name, p)| (name, p.grad())).collect(), peak)
}

/// The same loss and the same gradients, in less than half the memory; where only the first level computes again,
/// in between.
#[test]
fn recomputation_changes_nothing_but_memory() {
    let (loss, gradients, peak) = step(Recompute::Everywhere(false));
    let again = |recompute: Recompute| {
        let (loss_again, gradients_again, peak_again) = step(recompute);
        assert!((loss - loss_again).abs() <= 1e-6 * loss, "{loss} and {loss_again}");
        let flat =
            |g: &[(String, Tensor)]| Tensor::cat(&g.iter().map(|(_, t)| t.flatten(0, -1)).collect::<Vec<_>>(), 0);
        let error = relative_error(&flat(&gradients_again), &flat(&gradients));
        assert!(error < 1e-6, "gradients differ by {error:e}");
        for ((name, a), (_, b)) in gradients.iter().zip(&gradients_again) {
            assert_eq!(a.norm().double_value(&[]) == 0.0, b.norm().double_value(&[]) == 0.0, "{name}");
        }
        peak_again
    };
    let (first, all) = (again(Recompute::At(vec![1])), again(Recompute::Everywhere(true)));
    println!("peak {:.1} MB, first level {:.1}, all {:.1}", peak as f64 / 1e6, first as f64 / 1e6, all as f64 / 1e6);
    assert!(peak as f64 / all as f64 > 2.0, "not half the memory");
    assert!(all < first && first < peak, "levels do not matter");
}

/// As of a frozen network's first block, of which only what comes after is trained.
#[test]
fn a_recomputed_block_may_hold_nothing_that_is_trained() {
    let (frozen, weight) = (noise(1, &[2, 4]), noise(2, &[4]).set_requires_grad(true));
    let made = recompute(&[&frozen], |inputs: &[Tensor]| &inputs[0] * 2.0);
    (made * &weight).sum(None).backward();
    assert!(weight.grad().equal(&(frozen * 2.0).sum_dim_intlist([0i64].as_slice(), false, None)));
}

/// What goes wrong in a block that is computed again is told in its own words.
#[test]
fn a_failure_inside_a_recomputed_block_says_what_it_was() {
    let body = |inputs: &[Tensor]| inputs[0].matmul(&Tensor::zeros([3, 3], (Kind::Float, Device::Cpu)));
    let error = caught(|| Ok(recompute(&[&noise(1, &[2, 4])], body))).unwrap_err().to_string();
    assert!(error.contains("mat1 and mat2"), "{error}");
}

/// Kernels that are laid out once, in float32 and in mixed precision, compute what others do, and are forgotten when
/// weights may change again.
#[test]
fn fixed_weights_change_no_result() {
    let text = UNetConfig { attention: AttentionKind::Text, context_width: 16, ..config() };
    for (config, half) in [(config(), false), (config(), true), (text.clone(), false), (text, true)] {
        let (unet, parameters) = network(&config);
        parameters.freeze();
        let (x, t) = (noise(4, &[1, 4, 4, 16, 16]), times(&[500]));
        let text = (config.attention == AttentionKind::Text).then(|| noise(5, &[1, 7, 16]));
        let given = Inputs { text, ..Default::default() };
        let run = || {
            let _autocast = Autocast::bfloat16(Device::Cpu, half);
            no_grad(|| unet.forward(&x, &t, &given))
        };
        let fixed = || {
            let _weights = FixedWeights::new();
            let (first, second) = (run(), run());
            assert_eq!(first, second);
            first
        };
        let bound = if half { 2e-2 } else { 1e-5 };
        let before = run();
        assert!(relative_error(&fixed(), &before) < bound);
        for (_, mut p) in parameters.named() {
            let _ = no_grad(|| p.g_mul_scalar_(1.25));
        }
        let after = run();
        assert!(relative_error(&fixed(), &after) < bound, "a kernel of before");
        assert!(relative_error(&before, &after) > 0.1);
    }
}

/// Reconstruction guidance, whose gradient runs through the network: the same where activations are computed again, and
/// while weights are fixed; in mixed precision close to it.
#[test]
fn guidance_runs_through_the_network() {
    let path = CosineLogSnr::default();
    let (z, frames) = (noise(4, &[1, 4, 4, 16, 16]), noise(5, &[1, 4, 4, 16, 16]));
    let mask = Tensor::from_slice(&[1f32, 0.0, 0.0, 0.0]).reshape([1, 1, 4, 1, 1]);
    let guided = |recompute: bool, half: bool, fixed: bool, weight: f64| {
        let (unet, parameters) = network(&UNetConfig { recompute: Recompute::Everywhere(recompute), ..config() });
        parameters.freeze();
        let _fixed = fixed.then(FixedWeights::new);
        let _autocast = Autocast::bfloat16(Device::Cpu, half);
        let inner =
            NetworkDenoiser { network: &unet, path: &path, predict: Predict::Velocity, given: Inputs::default() };
        let observed = Observed::Frames {
            frames: frames.shallow_clone(),
            mask: mask.shallow_clone(),
            noise: Box::new(|call| noise(6 + call, &[1, 4, 4, 16, 16])),
        };
        let denoiser = Reconstruction::new(inner, &path, observed, weight);
        no_grad(|| denoiser.predict(&z, 0.5).z_0)
    };
    let (plain, whole) = (guided(false, false, false, 0.0), guided(false, false, false, 2.0));
    // what guidance adds, against which precision is measured
    let far = |found: &Tensor| ((found - &whole).norm() / (&whole - &plain).norm()).double_value(&[]);
    assert!(relative_error(&whole, &plain) > 1e-2);
    assert!(far(&guided(true, false, false, 2.0)) < 1e-4 && far(&guided(false, false, true, 2.0)) < 1e-4);
    assert!(far(&guided(true, true, true, 2.0)) < 0.2, "{}", far(&guided(true, true, true, 2.0)));
}

/// A sample's result does not depend on its neighbours.
#[test]
fn a_batch_is_its_samples() {
    for attention in [AttentionKind::Factorized, AttentionKind::Joint] {
        let (unet, parameters) = network(&UNetConfig { attention, ..config() });
        parameters.freeze();
        let (x, t) = (noise(4, &[3, 4, 4, 8, 8]), times(&[5, 500, 999]));
        let together = unet.forward(&x, &t, &Inputs::default());
        for i in 0..3 {
            let alone = unet.forward(&x.narrow(0, i, 1), &t.narrow(0, i, 1), &Inputs::default());
            let error = relative_error(&together.narrow(0, i, 1), &alone);
            assert!(error < 1e-5, "{attention:?}, sample {i}: {error:e}");
        }
        let other = unet.forward(&x, &times(&[5, 501, 999]), &Inputs::default());
        assert!(relative_error(&other.narrow(0, 1, 1), &together.narrow(0, 1, 1)) > 1e-6, "t has no effect");
    }
}

/// Noise, z_0 and velocity (√ᾱ·ε − √(1−ᾱ)·z_0; Salimans and Ho 2022) predicted, with L1 and L2, against the formulas, and
/// that a denoiser turns each into the others.
#[test]
fn the_objective_is_the_formula() {
    let (unet, parameters) = network(&config());
    parameters.freeze();
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let (z_0, noise, t) = (noise(5, &[2, 4, 4, 8, 8]), noise(6, &[2, 4, 4, 8, 8]), [40i64, 800]);
    let alpha = |f: fn(f64) -> f64| {
        Tensor::from_slice(&t.map(|t| f(schedule.alpha_bar[t as usize]) as f32)).view([2, 1, 1, 1, 1])
    };
    let z_t = &z_0 * alpha(f64::sqrt) + &noise * alpha(|a| (1.0 - a).sqrt());
    let output = unet.forward(&z_t, &times(&t), &Inputs::default());
    let velocity = &noise * alpha(f64::sqrt) - &z_0 * alpha(|a| (1.0 - a).sqrt());
    for (predict, target) in [(Predict::Noise, &noise), (Predict::Z0, &z_0), (Predict::Velocity, &velocity)] {
        let difference: Tensor = &output - target;
        let (l1, l2) = (difference.abs().mean(None), difference.square().mean(None));
        for (loss, expected) in [(Loss::L1, l1), (Loss::L2, l2)] {
            let found = plain_loss(
                &Objective { predict, loss, ..Objective::default() },
                &unet,
                &schedule,
                &z_0,
                &t.map(|t| t as f64),
                &noise,
            );
            let error = relative_error(&found, &expected);
            assert!(error < 1e-5, "{predict:?} {loss:?}: {error:e}");
        }
        let given = Inputs::default();
        let denoiser = NetworkDenoiser { network: &unet, path: &schedule, predict, given };
        let z = z_t.narrow(0, 1, 1);
        let prediction = denoiser.predict(&z, 800.0);
        let a = schedule.alpha_bar[800];
        let again = &prediction.z_0 * a.sqrt() + &prediction.noise * (1.0 - a).sqrt();
        assert!(relative_error(&again, &z) < 1e-4, "{predict:?}");
        let direct = match predict {
            Predict::Noise => prediction.noise.shallow_clone(),
            Predict::Z0 => prediction.z_0.shallow_clone(),
            Predict::Velocity => &prediction.noise * a.sqrt() - &prediction.z_0 * (1.0 - a).sqrt(),
            Predict::Flow | Predict::Edm => unreachable!("not among them"),
        };
        assert!(relative_error(&direct, &output.narrow(0, 1, 1)) < 1e-5, "{predict:?}");
    }
}

/// What a network that predicts the velocity is trained on where frames are given: on those that carry noise of a level s
/// the velocity at s, on clean ones, whose ᾱ is one, the noise they carry; elsewhere that at t. The loss is the mean over
/// all frames, or over those that are not given.
#[test]
fn the_velocity_of_given_frames_is_that_of_their_own_noise() {
    const CLASSES: i64 = 300;
    let parameters = Parameters::new(CPU, 4);
    let ports = Ports { mask: true, levels: Some(CLASSES), ..Ports::of([4, 4, 1, 1]) };
    let unet = UNet3d::new(&parameters.root(), &config(), &ports);
    wake(&parameters);
    parameters.freeze();
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let shape = [2, 4, 4, 8, 8];
    let (z_0, at_t) = (noise(5, &shape), noise(6, &shape));
    let (t, s) = ([40i64, 800], [250i64, 3]);
    // the first frame of one clip, the last two of the other
    let mask = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]).view([2, 1, 4, 1, 1]);
    let rates = |times: [i64; 2]| {
        let of = |f: fn(f64) -> f64| {
            Tensor::from_slice(&times.map(|t| f(schedule.alpha_bar[t as usize]) as f32)).view([2, 1, 1, 1, 1])
        };
        (of(f64::sqrt), of(|a| (1.0 - a).sqrt()))
    };
    let clean = (Tensor::ones([1], (Kind::Float, CPU)), Tensor::zeros([1], (Kind::Float, CPU)));
    for level in [true, false] {
        let (signal, sigma) = rates(t);
        let (given_signal, given_sigma) =
            if level { rates(s) } else { (clean.0.shallow_clone(), clean.1.shallow_clone()) };
        // one noise for both levels; clean frames carry none
        let at_s = if level { at_t.shallow_clone() } else { at_t.zeros_like() };
        let free = 1.0 - &mask;
        let z = (&z_0 * &signal + &at_t * &sigma) * &free + (&z_0 * &given_signal + &at_s * &given_sigma) * &mask;
        let given = Inputs { mask: Some(mask.shallow_clone()), level: level.then(|| times(&s)), ..Inputs::default() };
        let output = unet.forward(&z, &times(&t), &given);
        let velocity =
            (&at_t * &signal - &z_0 * &sigma) * &free + (&at_s * &given_signal - &z_0 * &given_sigma) * &mask;
        for masked_loss in [false, true] {
            for loss in [Loss::L1, Loss::L2] {
                let difference: Tensor = &output - &velocity;
                let difference = if loss == Loss::L1 { difference.abs() } else { difference.square() };
                let expected = match masked_loss {
                    false => difference.mean(None),
                    // five of the eight frames are free
                    true => (difference * &free).sum(None) / (5 * 4 * 8 * 8) as f64,
                };
                let objective = Objective { predict: Predict::Velocity, loss, ..Objective::default() };
                let at = |t: &[i64]| Times::of_levels(&schedule, t, CPU);
                let given_times = level.then(|| at(&s));
                let batch = NoisyBatch {
                    z_0: &z_0,
                    noise: &at_t,
                    times: &at(&t),
                    given: &given,
                    given_times: given_times.as_ref(),
                    made_only: masked_loss,
                };
                let found = objective.loss(&unet, &schedule, &batch);
                let error = relative_error(&found, &expected);
                assert!(error < 1e-5, "level {level}, masked {masked_loss}, {loss:?}: {error:e}");
            }
        }
    }
}

/// The n-th update has the decay min(decay, (1 + n)/(10 + n)).
#[test]
fn the_average_warms_up() {
    for decay in [0.9999, 0.25] {
        let parameters = Parameters::new(CPU, 0);
        let mut weight = parameters.root().parameter("w", &[3], Init::Constant(0.0));
        let ema = Ema::new(decay, &parameters);
        let mut expected = 0.0f64;
        for n in 1..=20 {
            let value = (n as f64).sin() + 2.0;
            let _ = no_grad(|| weight.fill_(value));
            ema.take_in(&[weight.shallow_clone()], None).unwrap();
            let now = f64::min(decay, (1.0 + n as f64) / (10.0 + n as f64));
            expected = now * expected + (1.0 - now) * value;
            let found = ema.named()[0].1.double_value(&[1]);
            assert!((found - expected).abs() < 1e-5, "decay {decay}, update {n}: {found}, not {expected}");
        }
        assert_eq!(weight.kind(), Kind::Float);
    }
}

/// Classes, a text, a mask and a level are told together, each changes the answer, and "no class" is as if there were none.
/// A network that learns classes starts as one that knows none.
#[test]
fn all_that_is_given_is_seen_together() {
    let config = UNetConfig { attention: AttentionKind::Text, context_width: 16, ..config() };
    let plain = Ports { text: Some(16), ..Ports::of([4, 4, 8, 8]) };
    let ports = Ports { mask: true, levels: Some(11), classes: Some(3), ..plain.clone() };
    let parameters = Parameters::new(CPU, 4);
    let known = UNet3d::new(&parameters.root(), &config, &plain);
    wake(&parameters);
    parameters.freeze();
    let mut weights = parameters.named().into_iter().collect();
    config.adopt(&mut weights, &ports);
    let parameters = Parameters::new(CPU, 5);
    let network = config.build(&parameters.root(), &ports).unwrap();
    parameters.load(&weights).unwrap();
    parameters.freeze();
    let (z, t) = (noise(1, &[2, 4, 4, 8, 8]), times(&[10, 700]));
    let all = || Inputs {
        mask: Some(Tensor::from_slice(&[1f32, 0.0, 0.0, 1.0]).reshape([1, 1, 4, 1, 1])),
        text: Some(noise(2, &[2, 5, 16])),
        label: Some(times(&[2, 0])),
        level: Some(times(&[3, 10])),
        ..Inputs::default()
    };
    let text = Inputs { text: all().text, ..Inputs::default() };
    assert!(relative_error(&network.forward(&z, &t, &all()), &known.forward(&z, &t, &text)) < 1e-6);
    let parameters = Parameters::new(CPU, 6);
    let network = config.build(&parameters.root(), &ports).unwrap();
    wake(&parameters);
    parameters.freeze();
    let answer = |given: &Inputs| network.forward(&z, &t, given);
    let with_all = answer(&all());
    for (part, without) in [
        ("mask", Inputs { mask: None, ..all() }),
        ("text", Inputs { text: Some(noise(3, &[2, 5, 16])), ..all() }),
        ("label", Inputs { label: Some(times(&[1, 1])), ..all() }),
        ("level", Inputs { level: None, ..all() }),
    ] {
        assert!(relative_error(&answer(&without), &with_all) > 1e-4, "{part}");
    }
    let completed = text.completed(&z, &ports);
    let (_, table) = parameters.named().into_iter().find(|(name, _)| name == "class_emb.weight").unwrap();
    let _ = no_grad(|| table.narrow(0, 3, 1).zero_());
    assert_eq!(table.size(), [4, 128]);
    assert!(relative_error(&answer(&completed), &answer(&text)) < 1e-6);
}

/// A network that is given further channels with noise starts as the network that it comes from, whatever these hold, and
/// learns to see both.
#[test]
fn a_network_adopts_channels_with_noise() {
    let plain = Ports::of([4, 4, 8, 8]);
    let ports = Ports { concat: 2, concat_time: true, ..plain.clone() };
    let (known, parameters) = {
        let parameters = Parameters::new(CPU, 4);
        let unet = UNet3d::new(&parameters.root(), &config(), &plain);
        wake(&parameters);
        (unet, parameters)
    };
    let mut weights = parameters.named().into_iter().collect();
    config().adopt(&mut weights, &ports);
    let parameters = Parameters::new(CPU, 5);
    let network = config().build(&parameters.root(), &ports).unwrap();
    parameters.load(&weights).unwrap();
    let (z, t) = (noise(1, &[2, 4, 4, 8, 8]), times(&[10, 700]));
    let given = |time: f64, channels: u64| Inputs {
        concat: vec![noise(channels, &[2, 2, 4, 8, 8])],
        concat_time: Some(Tensor::from_slice(&[time, -time])),
        ..Inputs::default()
    };
    let before = known.forward(&z, &t, &Inputs::default());
    let answer = network.forward(&z, &t, &given(3.0, 2));
    assert!(relative_error(&answer, &before) < 1e-6);
    answer.square().sum(Kind::Float).backward();
    let moved = |name: &str| {
        let (_, weight) = parameters.named().into_iter().find(|(known, _)| known == name).unwrap();
        weight.grad().abs().max().double_value(&[]) > 0.0
    };
    assert!(moved("concat_time_embed.2.weight") && moved("input_blocks.0.0.weight"));
    for (_, mut weight) in parameters.named() {
        let _ = no_grad(|| weight.g_add_(&(weight.randn_like() * 0.05)));
    }
    let with = network.forward(&z, &t, &given(3.0, 2));
    assert!(relative_error(&network.forward(&z, &t, &given(5.0, 2)), &with) > 1e-4);
    assert!(relative_error(&network.forward(&z, &t, &given(3.0, 3)), &with) > 1e-4);
}
