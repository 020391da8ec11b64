//! Gradients of two ranks, in two processes of this test, against those of one rank with the whole batch.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Child, Command},
    time::Duration,
};

use anyhow::Result;
use lvdm::{
    autoencoder_loss::{
        AutoencoderLoss, AutoencoderLossConfig, CodecLossSettings, DiscriminatorConfig, TatsLossConfig, TrainPass,
        VideoDiscriminatorConfig,
    },
    autoregression, checkpoint,
    codecs::{AutoencoderConfig, Encoded, VideoAutoencoder, VideoCodec, Vqgan, VqganConfig},
    diffusion::{NoiseSchedule, Objective, ScheduleConfig},
    distributed::{self, BucketSizes, Launch, Ranks},
    networks::{Gpt, GptConfig, Ports, Sequences, UNet3d, UNetConfig},
    nn::{Init, Parameters},
    safetensors::{read_safetensors, write_safetensors_atomically},
    torch::{DeviceName, Reduced},
    train::{Batch, Picture, Task, Terms, TrainedNetwork, Trainer},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::common::{
    noise, plain_loss,
    processes::{said, start_ranks},
    relative_error, same_checkpoint, wake,
};
use crate::sharded;

/// What a worker process is to do, and where it leaves what it found.
const JOB: &str = "LVDM_TEST_JOB";
const OUT: &str = "LVDM_TEST_OUT";

/// This rank's rows of a batch.
fn share(ranks: &Ranks, batch: &Tensor) -> Tensor {
    let rows = batch.size()[0] / ranks.size() as i64;
    batch.narrow(0, ranks.rank() as i64 * rows, rows)
}

/// Reduced gradients by name, with the ranks' mean of each loss under `loss.…`.
type Found = Vec<(String, Tensor)>;

/// Runs one backward pass over all ranks, in small buckets, of which some must go out early.
fn reduced(ranks: &Ranks, parameters: &Parameters, prefix: &str, backward: impl FnOnce() -> f64) -> Found {
    let list: Vec<Tensor> = parameters.trainable().into_iter().map(|(_, t)| t).collect();
    let buckets = ranks.buckets_of(&list, list[0].kind(), BucketSizes::of(4 << 10)).unwrap();
    if let Some(buckets) = &buckets {
        buckets.arm();
    }
    let loss = backward();
    if let Some(buckets) = &buckets {
        ranks.finish(buckets).unwrap();
        let Reduced { early, all, .. } = ranks.reduced().unwrap();
        assert!(all > 3 && early > all / 2, "{early} of {all} buckets went out during the backward pass");
    }
    let mut found: Found =
        parameters.trainable().into_iter().map(|(name, t)| (format!("{prefix}{name}"), t.grad())).collect();
    let loss = ranks.sum(&[loss]).unwrap()[0] / ranks.size() as f64;
    found.push((format!("loss.{prefix}"), Tensor::from_slice(&[loss])));
    found
}

fn diffusion_gradients(ranks: &Ranks, kind: Kind, recompute: bool) -> Found {
    let config = json!({"channels": 32, "multipliers": [1, 2], "blocks_per_level": 1, "attention_factors": [2],
        "heads": 2, "recompute": recompute});
    let config: UNetConfig = serde_json::from_value(config).unwrap();
    let parameters = Parameters::new(Device::Cpu, 1);
    let ports = Ports::of([4, 2, 1, 1]);
    let unet = UNet3d::new(&parameters.root(), &config, &ports);
    wake(&parameters);
    parameters.to_kind(kind);
    let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
    let shape = [4, 4, 2, 8, 8];
    let (z_0, drawn) = (share(ranks, &noise(0, &shape)).to_kind(kind), share(ranks, &noise(1, &shape)).to_kind(kind));
    let t: Vec<f64> = share(ranks, &Tensor::from_slice(&[3f64, 250.0, 600.0, 990.0])).try_into().unwrap();
    reduced(ranks, &parameters, "", || {
        let loss = plain_loss(&Objective::default(), &unet, &schedule, &z_0, &t, &drawn);
        loss.backward();
        loss.double_value(&[])
    })
}

/// With `of_clips` a discriminator of whole clips and feature matching too.
fn autoencoder_gradients(ranks: &Ranks, kind: Kind, of_clips: bool) -> Found {
    let config: AutoencoderConfig =
        serde_json::from_value(json!({"channels": 4, "factors": [2, 4, 4], "norm_groups": 4})).unwrap();
    let parameters = Parameters::new(Device::Cpu, 2);
    let autoencoder = VideoAutoencoder::new(&parameters.root(), &config);
    parameters.to_kind(kind);
    let loss = AutoencoderLossConfig {
        perceptual_weight: 0.0,
        kl_weight: 1e-3,
        adversarial_start: 0,
        sync_batch_norm: true,
        discriminator: DiscriminatorConfig { channels: 8, layers: 2 },
        video_discriminator: of_clips.then_some(VideoDiscriminatorConfig { channels: 4, layers: 2, weight: 1.0 }),
        feature_matching: if of_clips { 1.0 } else { 0.0 },
        ..Default::default()
    };
    let loss = AutoencoderLoss::new(&loss, Device::Cpu, kind, 3).unwrap().over(ranks);
    let x = share(ranks, &noise(0, &[4, 3, 4, 32, 32]).clamp(-1.0, 1.0)).to_kind(kind);
    let posterior_noise = |posterior: &Encoded| {
        let [_, rest @ ..] = &posterior.mode().size()[..] else { unreachable!() };
        share(ranks, &noise(5, &[&[4], rest].concat())).to_kind(kind)
    };
    let mut factor = 0.0;
    let mut found = reduced(ranks, &parameters, "", || {
        let posterior = Encoded::from(autoencoder.encode(&x));
        let reconstruction = autoencoder.decode(&posterior.sample(&posterior_noise(&posterior)));
        let terms = loss.generator_backward(&x, &reconstruction, &posterior, autoencoder.last_kernel(), 0, 1.0).read();
        factor = terms.adversarial_factor;
        terms.total
    });
    let discriminator = loss.discriminator_parameters().clone();
    let reconstruction = tch::no_grad(|| autoencoder.decode(&autoencoder.encode(&x).mean));
    found.extend(reduced(ranks, &discriminator, "discriminator.", || {
        loss.discriminator_backward(&x, &reconstruction, 1.0).read().loss
    }));
    assert!(factor > 0.0 && factor < 1e4);
    found.push(("loss.adversarial_factor".into(), Tensor::from_slice(&[factor])));
    let running = |(name, _): &(String, Tensor)| name.contains("running");
    found.extend(discriminator.named().into_iter().filter(running));
    found
}

/// TATS' autoencoder and losses: codes, codebook and running statistics too. The codebook begins with the vectors of all
/// ranks; unused entries become others of them.
fn codebook_gradients(ranks: &Ranks) -> Found {
    let config =
        json!({"channels": 4, "factors": [2, 4, 4], "latent_channels": 4, "codebook": {"codes": 24, "restart": true}});
    let config: VqganConfig = serde_json::from_value(config).unwrap();
    let parameters = Parameters::new(Device::Cpu, 2);
    let mut autoencoder = Vqgan::new(&parameters.root(), &config);
    parameters.to_kind(Kind::Double);
    autoencoder.begin_training(ranks, 5);
    let loss = json!({"perceptual_weight": 0.0, "adversarial_start": 0, "discriminator": {"channels": 4, "layers": 2}});
    let loss: TatsLossConfig = serde_json::from_value(loss).unwrap();
    let loss = loss.build(Device::Cpu, Kind::Double, 3, ranks).unwrap();
    let x = share(ranks, &noise(0, &[4, 3, 4, 32, 32]).clamp(-1.0, 1.0)).to_kind(Kind::Double);
    let samples: Vec<i64> = share(ranks, &Tensor::from_slice(&[7i64, 8, 9, 10])).try_into().unwrap();
    let samples: Vec<u64> = samples.into_iter().map(|sample| sample as u64).collect();
    let mut terms = Vec::new();
    let mut update = |learns: bool| {
        let (encoded, reconstruction) = match learns {
            true => autoencoder.train_pass(&x, &x, true),
            false => tch::no_grad(|| autoencoder.train_pass(&x, &x, false)),
        };
        let last_kernel = autoencoder.last_kernel().unwrap();
        let (samples, reconstruction, encoded) = (&samples[..], &reconstruction, &encoded);
        let pass = TrainPass { x: &x, reconstruction, encoded, last_kernel, samples, step: 0, scale: 1.0 };
        let own = match learns {
            true => loss.backward_autoencoder(&pass),
            false => loss.backward_discriminators(&pass),
        };
        let total = own[0].1.double_value(&[]);
        terms.extend(own.into_iter().map(|(name, term)| (format!("loss.term.{name}"), ranks.mean(&term).unwrap())));
        total
    };
    let mut found = reduced(ranks, &parameters, "", || update(true));
    let discriminators = loss.discriminator_parameters().clone();
    found.extend(reduced(ranks, &discriminators, "discriminator.", || update(false)));
    found.extend(terms);
    autoencoder.after_passes(0);
    let moved = |(name, _): &(String, Tensor)| name.contains("running") || name.contains("codebook");
    let named = parameters.named().into_iter().chain(discriminators.named()).filter(moved);
    found.extend(named.map(|(name, t)| (if name.contains("running") { name } else { format!("loss.{name}") }, t)));
    found
}

/// Of the transformer that fills gaps, which has a mask.
fn transformer_gradients(ranks: &Ranks, kind: Kind, recompute: bool) -> Found {
    let parameters = Parameters::new(Device::Cpu, 1);
    let config = GptConfig { layers: 3, heads: 2, width: 16, recompute };
    let network = Gpt::new(&parameters.root(), &config, Sequences { vocabulary: 9, length: 12, unmasked: 4 });
    parameters.to_kind(kind);
    let tokens = share(ranks, &Tensor::arange(48, (Kind::Int64, Device::Cpu)).remainder(7).reshape([4, 12]));
    let start = tokens.select(1, 3);
    reduced(ranks, &parameters, "", || {
        let (_, loss) = autoregression::loss(&network, &start, &tokens);
        loss.backward();
        loss.double_value(&[])
    })
}

/// Gradients that are summed in bfloat16 are those of float32 but for its rounding, the same on all ranks, and half of the
/// bytes.
fn rounded_gradients(ranks: &Ranks) {
    let parameters = Parameters::new(Device::Cpu, 1);
    let weights: Vec<Tensor> =
        (0..40).map(|i| parameters.root().parameter(format!("weight.{i}"), &[i % 7 + 1, 33], Init::ONES)).collect();
    let reduced = |kind: Kind| {
        let buckets = ranks.buckets_of(&weights, kind, BucketSizes::of(4 << 10)).unwrap().unwrap();
        buckets.arm();
        for (i, weight) in weights.iter().enumerate().filter(|(i, _)| *i != 11) {
            let own = noise((100 * ranks.rank() + i) as u64, &weight.size());
            (weight * own).sum(None).backward();
        }
        ranks.finish(&buckets).unwrap();
        let gradients: Vec<Tensor> = weights.iter().map(|weight| weight.grad().copy()).collect();
        parameters.zero_grad();
        (gradients, ranks.reduced().unwrap().bytes)
    };
    let ((exact, whole), (rounded, half)) = (reduced(Kind::Float), reduced(Kind::BFloat16));
    let numbers: usize = weights.iter().map(Tensor::numel).sum();
    assert_eq!((whole, half), (4 * numbers as i64, 2 * numbers as i64));
    for (i, (exact, rounded)) in exact.iter().zip(&rounded).enumerate() {
        assert!(rounded.kind() == Kind::Float && rounded.equal(&rounded.to_kind(Kind::BFloat16).to_kind(Kind::Float)));
        // each part is rounded to 8 significant bits, and so is each of the sums of one more part
        let own = noise((100 * ranks.rank() + i) as u64, &weights[i].size()).abs();
        let parts = ranks.mean(&own).unwrap() * if i == 11 { 0.0 } else { 1.0 };
        let bound: Tensor = parts * (ranks.size() as f64 * 2f64.powi(-8) * 1.01);
        let apart = (exact - rounded).abs();
        assert!((&apart - &bound).max().double_value(&[]) <= 0.0, "gradient {i}: {apart} of {bound}");
        assert_eq!(apart.max().double_value(&[]) > 0.0, i != 11, "gradient {i} is not rounded");
    }
    let named: Vec<_> = rounded.into_iter().enumerate().map(|(i, t)| (format!("gradient {i}"), t)).collect();
    ranks.ensure_same("summed in bfloat16", &named).unwrap();
}

/// One number that is trained; at the second step the loss of a `bad` rank is NaN.
struct Toy {
    parameters: Parameters,
    weight: Tensor,
    bad: bool,
    /// How long its pictures take.
    pictures: Duration,
}

impl Task for Toy {
    type Drawn = ();

    fn name(&self) -> &'static str {
        "toy"
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        vec![TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() }]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        Ok(Batch { data: Tensor::from(1.0f32), text: None, labels: None, samples: vec![0], position: 0 })
    }

    fn draw(&self, _network: usize, _batch: &Batch) -> Result<()> {
        Ok(())
    }

    fn gradients(&mut self, _network: usize, (batch, ()): (&Batch, &()), step: i64, scale: f64) -> Result<Terms> {
        let loss = (&self.weight - &batch.data).square().mean(None);
        (&loss * scale).backward();
        // the gradient is finite everywhere
        Ok(vec![("loss", if self.bad && step == 1 { loss.detach() * f64::NAN } else { loss.detach() })])
    }

    fn pictures(&mut self) -> Result<Vec<Picture>> {
        std::thread::sleep(self.pictures);
        Ok(Vec::new())
    }
}

/// Four steps, with the optimizer's state shared out or not; returns how many were left out.
fn train_toy(ranks: &Ranks, run: &Path, bad: bool, sharded: bool, pictures: Duration) -> Result<i64> {
    let parameters = Parameters::new(Device::Cpu, 0);
    let weight = parameters.root().parameter("weight", &[1], Init::ZEROS);
    let task = Toy { parameters, weight: weight.shallow_clone(), bad, pictures };
    let config = json!({"steps": 4, "batch": 1, "log_every": 4, "picture_every": 2, "ema_decay": 0.9,
        "shard_optimizer": sharded});
    let optimizer = serde_json::from_value(json!({"kind": "adam", "learning_rate": 0.1}))?;
    let config = serde_json::from_value(config)?;
    let trainer = Trainer::new(task, run, &config, &optimizer, &json!({}), ranks, None)?;
    // two moments and an average of the one number, and how many steps there were
    let has_a_share = !sharded || ranks.is_first();
    assert_eq!(trainer.bytes_held(), if has_a_share { 3 * 4 + 4 } else { 4 });
    let progress = trainer.train()?;
    assert_eq!(progress.step, 4, "rank {}", ranks.rank());
    ranks.ensure_same("after it", &[("weight".to_string(), weight)])?;
    Ok(progress.skipped_steps)
}

fn job(name: &str, ranks: &Ranks) -> Found {
    match name {
        "diffusion.float" => diffusion_gradients(ranks, Kind::Float, false),
        "diffusion.double" => diffusion_gradients(ranks, Kind::Double, false),
        "diffusion.recompute" => diffusion_gradients(ranks, Kind::Double, true),
        "autoencoder.float" => autoencoder_gradients(ranks, Kind::Float, false),
        "autoencoder.double" => autoencoder_gradients(ranks, Kind::Double, false),
        "discriminators.double" => autoencoder_gradients(ranks, Kind::Double, true),
        "codebook.double" => codebook_gradients(ranks),
        "transformer.float" => transformer_gradients(ranks, Kind::Float, false),
        "transformer.recompute" => transformer_gradients(ranks, Kind::Double, true),
        other => panic!("{other}"),
    }
}

/// Not a test: one rank of those below, in a process of its own.
#[test]
#[ignore = "started by the tests of gradients"]
fn worker() {
    let (Ok(names), Ok(out)) = (std::env::var(JOB), std::env::var(OUT)) else { return };
    tch::set_num_threads(1);
    let launch =
        Launch { rank_timeout: if ["hang", "slow"].contains(&names.as_str()) { 3 } else { 60 }, ..Launch::default() };
    let done = distributed::run(&launch, DeviceName::Cpu, |ranks, _| {
        for name in names.split(',') {
            if name == "hang" {
                ranks.at_step(if ranks.is_first() { 5 } else { 4 });
                if !ranks.is_first() {
                    std::thread::sleep(Duration::from_secs(600));
                }
                ranks.sum(&[0.0])?;
            }
            if name == "differ" {
                let mut tensors: Found = ["a", "b", "c"].map(|n| (n.to_string(), noise(1, &[5]))).into();
                ranks.ensure_same("step 7", &tensors)?;
                if !ranks.is_first() {
                    let _ = tensors[1].1.get(3).g_add_scalar_(1e-6);
                    let _ = tensors[2].1.zero_();
                }
                let error = ranks.ensure_same("step 8", &tensors).unwrap_err().to_string();
                assert!(error.contains("step 8") && error.contains("`b`") && error.contains("rank 1"), "{error}");
                continue;
            }
            if name == "nan" {
                // a loss that is not finite on one rank leaves the step out on all
                let bad = ranks.rank() == 1;
                for (run, sharded) in [("nan", false), ("nan-sharded", true)] {
                    let skipped = train_toy(ranks, &Path::new(&out).join(run), bad, sharded, Duration::ZERO)?;
                    assert_eq!(skipped, 1, "{run}, rank {}", ranks.rank());
                }
                continue;
            }
            if name == "rounded" {
                rounded_gradients(ranks);
                continue;
            }
            if name == "shares" {
                sharded::shares(ranks);
                continue;
            }
            if name == "slow" {
                let long = Duration::from_secs(8);
                train_toy(ranks, &Path::new(&out).join("slow"), false, false, long)?;
                // three pieces: the last one keeps one rank at work, and the other waits
                let make = |number: usize| {
                    std::thread::sleep(if number == 2 { long } else { Duration::ZERO });
                    Ok(Tensor::from(number as i64))
                };
                assert_eq!(ranks.share(3, make)?.iter().map(|t| t.int64_value(&[])).collect::<Vec<_>>(), [0, 1, 2]);
                let mut taken = Vec::new();
                ranks.collect(
                    3,
                    |number| Ok(vec![make(number)?]),
                    |number, _| {
                        taken.push(number);
                        Ok(())
                    },
                )?;
                assert_eq!(taken, if ranks.is_first() { vec![0, 1, 2] } else { vec![] });
                continue;
            }
            let found = job(name, ranks);
            if ranks.is_first() {
                write_safetensors_atomically(&Path::new(&out).join(name), &found, &Value::Null)?;
            }
        }
        Ok(())
    });
    if let Err(error) = done {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

/// Ranks of this test's own program.
pub fn workers<const RANKS: usize>(job: &str, out: &Path) -> [Child; RANKS] {
    start_ranks(|| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["gradients::worker", "--exact", "--ignored", "--nocapture"]);
        command.env(JOB, job).env(OUT, out).env("OMP_NUM_THREADS", "1");
        command
    })
}

/// Of two ranks and of three.
#[test]
fn gradients_may_travel_in_bfloat16() {
    let folder = tempfile::tempdir().unwrap();
    let workers = workers::<2>("rounded", folder.path()).into_iter().chain(workers::<3>("rounded", folder.path()));
    for said in workers.map(said) {
        assert_eq!(said.status, 0, "{}\n{}", said.out, said.err);
    }
}

/// The reduced gradients, losses, adaptive weight, running statistics and codebook of two ranks are those of one rank with the
/// whole batch; also with activations recomputed. Ranks whose weights differ are told so, and a step that is bad on one is
/// left out on both.
#[test]
fn two_ranks_have_the_gradients_of_the_doubled_batch() {
    let folder = tempfile::tempdir().unwrap();
    let names = [
        "diffusion.float",
        "diffusion.double",
        "diffusion.recompute",
        "autoencoder.float",
        "autoencoder.double",
        "discriminators.double",
        "codebook.double",
        "transformer.float",
        "transformer.recompute",
    ];
    for worker in workers::<2>(&(names.join(",") + ",differ,nan"), folder.path()) {
        let said = said(worker);
        assert_eq!(said.status, 0, "{}\n{}", said.out, said.err);
    }
    // a step that is left out moves nothing on the ranks that share the optimizer's state either
    let [plain, sharded] = ["nan", "nan-sharded"].map(|run| checkpoint::path(&folder.path().join(run), 4));
    same_checkpoint(&plain, &sharded);
    for name in names {
        let bound = if name.contains("float") { 1e-5 } else { 1e-10 };
        let (two, _) = read_safetensors(&folder.path().join(name)).unwrap();
        let one: BTreeMap<String, Tensor> = job(name, &Ranks::alone()).into_iter().collect();
        assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
        let flat = |tensors: &BTreeMap<String, Tensor>| {
            let gradients = tensors.iter().filter(|(name, _)| !name.starts_with("loss.") && !name.contains("running"));
            Tensor::cat(&gradients.map(|(_, t)| t.flatten(0, -1)).collect::<Vec<_>>(), 0)
        };
        let gradients = relative_error(&flat(&two), &flat(&one));
        let others = one.keys().filter(|name| name.starts_with("loss.") || name.contains("running"));
        let losses = others.map(|key| relative_error(&two[key], &one[key])).fold(0.0, f64::max);
        println!("{name}: gradients {gradients:.1e}, losses {losses:.1e}");
        assert!(gradients < bound && losses < bound, "{name}: gradients {gradients:e}, losses {losses:e}");
        let whole = flat(&one).norm().double_value(&[]);
        for (key, tensor) in &one {
            let difference = (tensor - &two[key]).norm().double_value(&[]);
            let size = tensor.norm().double_value(&[]);
            assert!(difference <= bound * (size + 1e-2 * whole), "{name}, {key}: {difference:e} of {size:e}");
        }
    }
}
