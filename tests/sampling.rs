//! Sample i depends on the seed and on i alone; DDIM takes any number of steps.

mod common;

use std::{cell::RefCell, collections::BTreeMap};

use common::{FirstClips as _, largest_difference, plain_loss, relative_error, wake};
use lvdm::{
    codecs::{AutoencoderConfig, LatentSpace, Normalization, VideoAutoencoder},
    data::{DatasetConfig, Folder},
    diffusion::{
        Ancestral, CosineLogSnr, Ddim, Ddpm, Denoiser, GivenLabels, GivenLatents, GivenToClips, Guidance,
        GuidanceConfig, Heun, Loss, NetworkDenoiser, NoisePath, NoisyBatch, Objective, Observed, Predict, Prediction,
        Reconstruction, RectifiedFlow, SamplerConfig, Times, ToldTime, Variance, conditioned, sample,
    },
    experiment::{DiffusionExperiment, Experiment, OptimizerConfig, Precision, parse},
    models::{CodecBaselines, Given, LatentConditions, LatentDiffusion, SampleId, VideoModel},
    networks::{Inputs, Network, NetworkSettings, Ports, UNetConfig},
    nn::Parameters,
    random::{Purpose, normal_batch, stream},
    train::{Optimizer, StepAround},
};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// A generator with random weights of which none is zero, on a schedule of 12 steps.
fn generator() -> LatentDiffusion {
    let text = "
data: {dataset: {kind: folder, root: none}, frames: 8, resolution: 16}
autoencoder: none
schedule: {kind: scaled_linear, steps: 12, beta_start: 0.01, beta_end: 0.4}
unet: {channels: 32, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [1, 2], heads: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-4}
trainer: {steps: 1, batch: 1}
";
    let experiment: DiffusionExperiment = parse("here", text, &[]).unwrap();
    let config = AutoencoderConfig { channels: 8, factors: [2, 4, 4], norm_groups: 8, ..AutoencoderConfig::default() };
    let parameters = Parameters::new(CPU, 2);
    VideoAutoencoder::new(&parameters.root(), &config);
    let weights: BTreeMap<String, Tensor> = parameters.named().into_iter().collect();
    let space = LatentSpace::new(&config, weights, Normalization::NONE, 2, CPU).unwrap();
    let parameters = Parameters::new(CPU, 3);
    let generator = LatentDiffusion::new(&experiment, space, None, &parameters).unwrap();
    wake(&parameters);
    parameters.freeze();
    generator
}

fn latents(generator: &LatentDiffusion, samples: &[u64], sampler: SamplerConfig, seed: u64) -> Tensor {
    generator.latents(samples, &LatentConditions::default(), sampler, seed, &mut |_, _| {}).unwrap()
}

const SAMPLERS: [SamplerConfig; 2] =
    [SamplerConfig::Ddim(Ddim { steps: 5, eta: 1.0 }), SamplerConfig::Ddpm(Ddpm { variance: Variance::Posterior })];

/// Noise equal to the bit and results within 1e-4, alone, in another order, in another batch, with other threads.
#[test]
fn a_sample_depends_on_seed_and_number_alone() {
    let shape = [4, 4, 4, 4];
    let all: Vec<u64> = (0..4).collect();
    for purpose in [Purpose::SampleStart, Purpose::SampleStep] {
        let together = normal_batch(7, purpose, &all, 3, &shape);
        for i in all.clone() {
            assert_eq!(together.get(i as i64), normal_batch(7, purpose, &[i], 3, &shape).get(0), "sample {i}");
        }
        assert_eq!(
            together.index_select(0, &Tensor::from_slice(&[3i64, 1])),
            normal_batch(7, purpose, &[3, 1], 3, &shape)
        );
    }
    let generator = generator();
    let threads = tch::get_num_threads();
    for sampler in SAMPLERS {
        tch::set_num_threads(2);
        let reference = latents(&generator, &all, sampler, 7);
        assert!(reference.isfinite().all().int64_value(&[]) == 1);
        let mut worst = 0.0f64;
        for (count, samples) in [(2, vec![3]), (1, vec![3]), (3, vec![2, 3, 0])] {
            tch::set_num_threads(count);
            let found = latents(&generator, &samples, sampler, 7);
            for (row, &i) in samples.iter().enumerate() {
                let error = largest_difference(&found.get(row as i64), &reference.get(i as i64));
                worst = worst.max(error);
                assert!(error < 1e-4, "{sampler:?}, sample {i} of {samples:?} with {count} threads: {error:e}");
            }
        }
        println!("{sampler:?}: at most {worst:.1e}");
        // other numbers and other seeds give something else
        assert!(relative_error(&reference.get(1), &reference.get(0)) > 0.1);
        assert!(relative_error(&latents(&generator, &[0], sampler, 8).get(0), &reference.get(0)) > 0.1);
    }
    tch::set_num_threads(threads);
}

/// From one step to as many as the schedule has, also where they do not divide it: finite, in step, and refused beyond.
#[test]
fn ddim_takes_any_number_of_steps() {
    let generator = generator();
    let mut results = Vec::new();
    for steps in [1, 2, 3, 5, 7, 11, 12] {
        let mut told = Vec::new();
        let sampler = SamplerConfig::Ddim(Ddim { steps, eta: 0.0 });
        let z = generator
            .latents(&[0], &LatentConditions::default(), sampler, 7, &mut |done, of| told.push((done, of)))
            .unwrap();
        assert_eq!(z.size(), [1, 4, 4, 4, 4]);
        assert!(z.isfinite().all().int64_value(&[]) == 1, "{steps} steps");
        let of = told.len();
        assert_eq!(told, (1..=of).map(|done| (done, of)).collect::<Vec<_>>());
        assert!(of as i64 >= steps - 1, "{steps} steps asked for, {of} made");
        results.push(z);
    }
    // more steps come closer to the finest walk
    let error = |i: usize| relative_error(&results[i], results.last().unwrap());
    assert!(error(0) > error(2) && error(2) > error(4), "{} {} {}", error(0), error(2), error(4));
    for (steps, eta) in [(0, 0.0), (13, 0.0), (-1, 0.0), (5, 1.5)] {
        let error = generator
            .latents(&[0], &LatentConditions::default(), SamplerConfig::Ddim(Ddim { steps, eta }), 7, &mut |_, _| {})
            .unwrap_err();
        assert!(error.to_string().contains("DDIM"), "{error:#}");
    }
}

/// In bfloat16 the networks round, and only they: z_0 stays float32 and near float32's.
#[test]
fn bfloat16_samples_are_near() {
    let sampler = SamplerConfig::Ddim(Ddim { steps: 3, eta: 0.0 });
    let exact = latents(&generator(), &[0, 1], sampler, 7);
    let mut half = generator();
    half.set_numerics(Precision::Bf16.into());
    let rounded = latents(&half, &[0, 1], sampler, 7);
    assert_eq!(rounded.kind(), tch::Kind::Float);
    let error = relative_error(&rounded, &exact);
    assert!(error > 1e-4 && error < 5e-2, "{error:e}");
}

/// Videos come out as bytes of the clip's size, decoded one by one, so equal in every batch.
#[test]
fn videos_are_bytes_of_the_clips_size() {
    let mut generator = generator();
    generator.set_sampling(&SamplerConfig::Ddim(Ddim { steps: 3, eta: 1.0 }).into()).unwrap();
    let sampled = |numbers: &[u64]| {
        let samples: Vec<SampleId> = numbers.iter().map(|&sample| SampleId { seed: 7, sample }).collect();
        generator.videos(&samples, &Given::default(), &mut |_, _| {}).unwrap()
    };
    let videos = sampled(&[0, 1]);
    assert_eq!((videos.size(), videos.kind()), (vec![2, 3, 8, 16, 16], tch::Kind::Uint8));
    let alone = sampled(&[1]);
    assert!(largest_difference(&alone.get(0), &videos.get(1)) <= 1.0, "more than a rounding");
    let gaussian = generator.gaussian_videos(&[0, 1], 7).unwrap();
    assert_eq!(gaussian.size(), videos.size());
    assert!(largest_difference(&gaussian, &videos) > 1.0);
}

/// Pixels, a tiny network, and these keys in place of schedule and objective.
fn on_path(keys: &[&str]) -> DiffusionExperiment {
    let text = "
data: {dataset: {kind: folder, root: none}, frames: 4, resolution: 8}
autoencoder: pixels
network: {kind: unet3d, channels: 8, norm_groups: 4, multipliers: [1], blocks_per_level: 1, attention_factors: [1], heads: 2}
optimizer: {kind: adamw, learning_rate: 1.0e-4}
trainer: {steps: 1, batch: 1}
";
    parse("here", text, &keys.iter().map(|key| key.to_string()).collect::<Vec<_>>()).unwrap()
}

/// On every path a network learns what can be predicted there, and every sampler that fits makes finite clips.
#[test]
fn every_path_is_learned_and_sampled() {
    let flow = "schedule={kind: rectified_flow, times: {kind: logit_normal, mean: 0.0, std: 1.0}, shift: 2.0}";
    let edm = "schedule={kind: edm, sigma_data: 0.5}";
    let stretched =
        "schedule={kind: scaled_linear, steps: 20, beta_start: 0.01, beta_end: 0.4, zero_terminal_snr: true}";
    let min_snr = "objective={predict: velocity, loss: l2, weight: {kind: min_snr, gamma: 5.0}}";
    for keys in [
        &[flow, "objective={predict: flow, loss: l2}"][..],
        &[flow, "objective={predict: z0, loss: l1}"],
        &[edm, "objective={predict: edm, loss: l2, weight: {kind: edm}}"],
        &[edm, "objective={predict: edm, loss: l2, weight: {kind: min_snr}}"],
        &["schedule={kind: cosine_log_snr, shift: -1.0}", min_snr],
        &["schedule={kind: cosine, steps: 20}", min_snr],
        &[stretched, min_snr],
    ] {
        let experiment = on_path(keys);
        let parameters = Parameters::new(CPU, 3);
        let space = LatentSpace::pixels(CPU);
        let generator = LatentDiffusion::new(&experiment, space, None, &parameters).unwrap();
        experiment.objective.validate(&*generator.path).unwrap();
        wake(&parameters);
        let z_0 = common::noise(0, &[2, 3, 4, 8, 8]);
        let noise = common::noise(1, &[2, 3, 4, 8, 8]);
        let draw = |i| generator.path.draw(&mut stream(5, Purpose::DiffusionTime, i, 0));
        let t = [draw(0), draw(1)];
        let loss = plain_loss(&experiment.objective, &*generator.network, &*generator.path, &z_0, &t, &noise);
        loss.backward();
        let gradients: f64 =
            parameters.trainable().iter().map(|(_, p)| p.grad().square().sum(None).double_value(&[])).sum();
        assert!(loss.double_value(&[]).is_finite() && gradients.is_finite() && gradients > 0.0, "{keys:?}: {loss:?}");
        parameters.freeze();
        for sampler in [
            "{kind: ddim, steps: 3, eta: 1.0}",
            "{kind: dpm_solver, steps: 3}",
            "{kind: unipc, steps: 4}",
            "{kind: euler, steps: 3}",
            "{kind: heun, steps: 3}",
        ] {
            let sampler: SamplerConfig = serde_yaml::from_str(sampler).unwrap();
            let reads_no_noise = keys[1].contains("z0") && sampler == SamplerConfig::Heun(Heun { steps: 3 });
            match generator.latents(&[0, 1], &LatentConditions::default(), sampler, 7, &mut |_, _| {}) {
                Ok(z) => assert!(z.isfinite().all().int64_value(&[]) == 1 && !reads_no_noise, "{keys:?} {sampler:?}"),
                Err(error) => {
                    assert!(reads_no_noise && error.to_string().contains("take another sampler"), "{error:#}")
                }
            }
        }
    }
}

/// What a network cannot predict on a path is refused before anything is trained, with what to write instead.
#[test]
fn what_does_not_fit_a_path_is_refused() {
    let flow = "schedule={kind: rectified_flow}";
    let edm = "schedule={kind: edm}";
    let frames = "conditioning={prediction: 0.5, prefixes: [1], perturbation: null}";
    for (keys, words) in [
        (&[flow, "objective.predict=noise"][..], "predict velocity, flow or z0"),
        (&[flow, "objective.predict=velocity"], "predict flow or noise"),
        (&[flow, "objective={predict: flow, loss: l1, weight: {kind: min_snr}}"], "write loss: l2"),
        (&[flow, "objective={predict: noise, loss: learned_variance}"], "a schedule of steps"),
        (&[flow, "objective={predict: flow}", "sampler={kind: ddpm, variance: beta}"], "take kind: ddim with eta: 1"),
        (&[flow, "objective={predict: flow}", "sampler={kind: respaced_ddpm, steps: 5}"], "take kind: ddim"),
        (&[edm, "objective={predict: edm, loss: l2}", frames], "take another kind"),
        (&["schedule={kind: edm, sigma_max: 0.001}", "objective={predict: edm}"], "sigma_min < sigma_max"),
        (&["schedule.zero_terminal_snr=true"], "there is noise alone"),
        (&[edm, "objective={predict: noise, loss: l1}"], "write objective: {predict: edm, loss: l2}"),
        (&[edm, "objective={predict: z0, loss: l2}"], "write objective: {predict: edm, loss: l2}"),
    ] {
        let mut experiment = on_path(keys);
        experiment.latents = None;
        let folder = tempfile::tempdir().unwrap();
        experiment.data.dataset = DatasetConfig::Folder(Folder { root: folder.path().into() });
        let error = format!("{:#}", experiment.validate().unwrap_err());
        assert!(error.contains(words), "{keys:?}: {error}");
    }
}

/// Answers zero, and keeps what it was asked.
struct Witness {
    seen: RefCell<Vec<(Tensor, Inputs)>>,
    ports: Ports,
}

impl Network for Witness {
    fn forward(&self, z: &Tensor, _: &Tensor, given: &Inputs) -> Tensor {
        self.seen.borrow_mut().push((z.shallow_clone(), given.clone()));
        z.zeros_like()
    }

    fn ports(&self) -> &Ports {
        &self.ports
    }
}

/// Rectified flow with given frames, in training and in sampling: they are z_0 where they are clean and
/// (1 − τ)·z_0 + τ·ε at the level τ, while the others are at the time of the clip; the target of each is the velocity of the
/// noise that it carries.
#[test]
fn a_flow_is_given_frames() {
    let flow = RectifiedFlow::default();
    let shape = [2, 3, 4, 5, 5];
    let (z_0, noise) = (common::noise(0, &shape), common::noise(1, &shape));
    let ports = Ports { mask: true, levels: Some(1000), ..Ports::of([3, 4, 5, 5]) };
    let witness = Witness { seen: RefCell::default(), ports };
    let mask = Tensor::from_slice(&[1f32, 1.0, 0.0, 0.0]).reshape([1, 1, 4, 1, 1]).expand([2, 1, 4, 1, 1], false);
    let t = [0.25, 0.5];
    let times = Times::of_clips(&flow, &t, CPU);
    let of_clips = |values: [f64; 2]| Tensor::from_slice(&values).to_kind(tch::Kind::Float).reshape([2, 1, 1, 1, 1]);
    let on_line = |tau: &Tensor| (1.0 - tau) * &z_0 + tau * &noise;
    let frames = |x: &Tensor, from: i64| x.narrow(2, from, 2);
    let near = |found: &Tensor, wanted: &Tensor| assert!(largest_difference(found, wanted) < 1e-5);
    for (level, masked) in [(None, false), (None, true), (Some([100, 700]), false), (Some([100, 700]), true)] {
        let given = Inputs { mask: Some(mask.shallow_clone()), ..Inputs::default() };
        let given_times = level.map(|levels: [i64; 2]| Times::of_levels(&flow, &levels, CPU));
        let objective = Objective { predict: Predict::Flow, loss: lvdm::diffusion::Loss::L2, ..Objective::default() };
        let batch = NoisyBatch {
            z_0: &z_0,
            noise: &noise,
            times: &times,
            given: &given,
            given_times: given_times.as_ref(),
            made_only: masked,
        };
        let loss = objective.loss(&witness, &flow, &batch).double_value(&[]);
        let (seen, _) = witness.seen.borrow_mut().pop().unwrap();
        let tau = of_clips(level.map_or([0.0; 2], |levels| levels.map(|level| level as f64 / 1000.0)));
        near(&frames(&seen, 0), &frames(&on_line(&tau), 0));
        near(&frames(&seen, 2), &frames(&on_line(&of_clips(t)), 2));
        // the answer is zero, so the loss is the mean square of the targets
        let square = |x: &Tensor| x.square().mean(tch::Kind::Double).double_value(&[]);
        let on_given = if level.is_some() { &noise - &z_0 } else { -&z_0 };
        let (on_given, on_others) = (square(&frames(&on_given, 0)), square(&frames(&(&noise - &z_0), 2)));
        let wanted = if masked { on_others } else { (on_given + on_others) / 2.0 };
        assert!((loss / wanted - 1.0).abs() < 1e-5, "{level:?}, {masked}: {loss}, not {wanted}");
    }
    let start = common::noise(2, &shape);
    for level in [None, Some(300)] {
        let guidance = GuidanceConfig { weight: 1.0, form: Guidance::Interpolate, level, reconstruction: None };
        let (frames_given, own) = (frames(&z_0, 0), frames(&noise, 0));
        let given = GivenLatents { indices: &[0, 1], frames: &frames_given, noise: &own, guidance };
        let given = GivenToClips { frames: Some(given), ..GivenToClips::default() };
        let denoiser = conditioned(&witness, &flow, Predict::Flow, &start, given).unwrap();
        let found = denoiser.predict(&start, 0.9);
        let (seen, given) = witness.seen.borrow_mut().pop().unwrap();
        let tau = of_clips([level.map_or(0.0, |level| level as f64 / 1000.0); 2]);
        near(&frames(&seen, 0), &frames(&on_line(&tau), 0));
        near(&frames(&seen, 2), &frames(&start, 2));
        assert!(given.mask.unwrap().equal(&mask));
        let told = given.level.map(|told| told.int64_value(&[1]));
        assert!(told == Some(level.unwrap_or(-1)), "{told:?}");
        // of no velocity z_0 is what the network saw
        near(&found.z_0, &seen);
    }
}

/// With the weight 1 guidance is the prediction for the class, made beside another one.
#[test]
fn guidance_of_weight_one_is_none() {
    let labels = |labels: &[i64]| Tensor::from_slice(labels);
    let experiment = on_path(&["objective={predict: velocity, loss: l2}"]);
    let parameters = Parameters::new(CPU, 3);
    let ports = Ports { classes: Some(5), ..Ports::of([3, 4, 8, 8]) };
    let network = experiment.network.build(&parameters.root(), &ports).unwrap();
    wake(&parameters);
    parameters.freeze();
    let path = experiment.schedule.build().unwrap();
    let z_t = common::noise(4, &[2, 3, 4, 8, 8]);
    let predicted = |classes: &[i64], guidance| {
        let given =
            GivenToClips { labels: Some(GivenLabels { labels: labels(classes), guidance }), ..Default::default() };
        conditioned(&*network, &*path, Predict::Velocity, &z_t, given).unwrap().predict(&z_t, 400.0).z_0
    };
    let without = predicted(&[1, 4], None);
    assert!(relative_error(&predicted(&[1, 4], Some(1.0)), &without) < 1e-5);
    assert!(relative_error(&predicted(&[1, 4], Some(3.0)), &without) > 1e-3);
    assert!(relative_error(&predicted(&[2, 4], None).get(0), &without.get(0)) > 1e-3);
    // away from no class: 0 leaves only that
    assert!(relative_error(&predicted(&[1, 4], Some(0.0)), &predicted(&[5, 5], None)) < 1e-5);
}

/// At the last step of a schedule that ends in noise alone, whatever is predicted and however it is weighed.
#[test]
fn every_weight_is_finite_where_there_is_noise_alone() {
    let stretched = "schedule={kind: linear, steps: 20, beta_start: 0.01, beta_end: 0.4, zero_terminal_snr: true}";
    let (z_0, noise) = (common::noise(0, &[1, 3, 4, 8, 8]), common::noise(1, &[1, 3, 4, 8, 8]));
    let witness = Witness { seen: RefCell::default(), ports: Ports::of([3, 4, 8, 8]) };
    let mut fitting = 0;
    for predict in ["noise", "z0", "velocity", "flow", "edm"] {
        for weight in ["constant", "min_snr", "edm"] {
            let objective = format!("objective={{predict: {predict}, loss: l2, weight: {{kind: {weight}}}}}");
            let experiment = on_path(&[stretched, &objective]);
            let path = experiment.schedule.build().unwrap();
            if experiment.objective.validate(&*path).is_err() {
                continue;
            }
            fitting += 1;
            for t in [0.0, 10.0, 19.0] {
                let loss = plain_loss(&experiment.objective, &witness, &*path, &z_0, &[t], &noise).double_value(&[]);
                assert!(loss.is_finite(), "{objective} at {t}: {loss}");
                // no part of z_0 is left that its signal-to-noise ratio could weigh
                assert_eq!(loss > 0.0, weight != "min_snr" || t < 19.0, "{objective} at {t}: {loss}");
            }
        }
    }
    assert_eq!(fitting, 9);
}

/// Remembers how much of the given first frame each prediction misses.
struct Watched<D> {
    inner: D,
    frame: Tensor,
    missed: RefCell<Vec<f64>>,
}

impl<D: Denoiser> Denoiser for &Watched<D> {
    fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
        let prediction = self.inner.predict(z_t, t);
        let missed = (&self.frame - prediction.z_0.narrow(2, 0, 1)).square().mean(Kind::Double);
        self.missed.borrow_mut().push(missed.double_value(&[]));
        prediction
    }
}

/// A small network is trained on clips whose frames are all alike. Given a first frame that it knows nothing of, it misses
/// less of that under reconstruction guidance than under plain replacement, and makes frames that are more like it.
#[test]
fn reconstruction_guidance_leads_a_trained_network_to_the_given_frame() {
    let path = CosineLogSnr { told: ToldTime::LogSnr, ..CosineLogSnr::default() };
    let settings = UNetConfig {
        channels: 16,
        multipliers: vec![1],
        blocks_per_level: 1,
        attention_factors: vec![1],
        heads: 2,
        norm_groups: 4,
        ..UNetConfig::default()
    };
    let parameters = Parameters::new(CPU, 4);
    let network = settings.build(&parameters.root(), &Ports::of([1, 3, 4, 4])).unwrap();
    let still = |step: u64| {
        let pictures = normal_batch(7, Purpose::GaussianLatents, &(0..8).collect::<Vec<_>>(), step, &[1, 1, 1, 1]);
        pictures.expand([8, 1, 3, 4, 4], false).contiguous()
    };
    let optimizer: OptimizerConfig = serde_yaml::from_str("{kind: adam, learning_rate: 4.0e-3}").unwrap();
    let mut optimizer = Optimizer::new(optimizer.adam(), &parameters);
    let objective = Objective { predict: Predict::Velocity, loss: Loss::L2, ..Objective::default() };
    for step in 0..200 {
        let z_0 = still(step);
        let noise = normal_batch(7, Purpose::DiffusionNoise, &(0..8).collect::<Vec<_>>(), step, &[1, 3, 4, 4]);
        let t: Vec<f64> = (0..8).map(|i| path.draw(&mut stream(7, Purpose::DiffusionTime, i, step))).collect();
        optimizer.zero_grad().unwrap();
        plain_loss(&objective, &*network, &path, &z_0, &t, &noise).backward();
        optimizer.step(&optimizer.gradients(), StepAround::default()).unwrap();
    }
    parameters.freeze();

    let (frame, all) = (still(1000).narrow(2, 0, 1), (0..8).collect::<Vec<u64>>());
    let draw = |purpose, step| normal_batch(11, purpose, &all, step, &[1, 3, 4, 4]);
    let mask = Tensor::from_slice(&[1f32, 0.0, 0.0]).reshape([1, 1, 3, 1, 1]);
    let sampled = |weight: f64| {
        let given = Inputs::default();
        let watched = Watched {
            inner: NetworkDenoiser { network: &*network, path: &path, predict: Predict::Velocity, given },
            frame: frame.shallow_clone(),
            missed: RefCell::default(),
        };
        let noise = Box::new(|call| draw(Purpose::Replacement, call));
        let frames = frame.expand([8, 1, 3, 4, 4], false);
        let observed = Observed::Frames { frames, mask: mask.shallow_clone(), noise };
        let denoiser = Reconstruction::new(&watched, &path, observed, weight);
        let sampler = Ancestral { steps: 24, ..Ancestral::default() };
        let noise = |i: usize| draw(Purpose::SampleStep, i as u64);
        let z = sample(&denoiser, &sampler, &path, &draw(Purpose::SampleStart, 0), &noise, &mut |_, _| {}).unwrap();
        let off = (z.narrow(2, 1, 2) - &frame).square().mean(Kind::Double).double_value(&[]);
        let missed = watched.missed.take();
        (missed.iter().sum::<f64>() / missed.len() as f64, off)
    };
    let ((missed_plain, off_plain), (missed, off)) = (sampled(0.0), sampled(2.0));
    println!(
        "missed of the given frame: {missed_plain:.4} replaced, {missed:.4} guided; of the others {off_plain:.4}, {off:.4}"
    );
    assert!(missed < 0.9 * missed_plain, "{missed} and {missed_plain}");
    assert!(off < 0.9 * off_plain, "{off} and {off_plain}");
}
