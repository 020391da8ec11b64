//! Sample i depends on the seed and on i alone; DDIM takes any number of steps.

mod common;

use std::collections::BTreeMap;

use common::{largest_difference, plain_loss, relative_error, wake};
use lvdm::{
    codecs::{AutoencoderConfig, LatentSpace, Normalization, VideoAutoencoder},
    data::{DatasetConfig, Folder},
    diffusion::{Ddim, Ddpm, Heun, SamplerConfig, Variance},
    experiment::{DiffusionExperiment, Experiment, Precision, parse},
    models::{CodecBaselines, Given, LatentConditions, LatentDiffusion, SampleId, VideoModel},
    nn::Parameters,
    random::{Purpose, normal_batch, stream},
};
use tch::{Device, Tensor};

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
    ] {
        let mut experiment = on_path(keys);
        experiment.latents = None;
        let folder = tempfile::tempdir().unwrap();
        experiment.data.dataset = DatasetConfig::Folder(Folder { root: folder.path().into() });
        let error = format!("{:#}", experiment.validate().unwrap_err());
        assert!(error.contains(words), "{keys:?}: {error}");
    }
}
