//! An optimizer's state that ranks share out (ZeRO stage 1): the same training to the bit, and a share of the memory.

use std::{fs, path::Path, process::Command, rc::Rc};

use lvdm::{
    checkpoint::{self, Checkpoint},
    distributed::{Ranks, Shards},
    nn::{Init, Parameters},
    run_files::TENSORBOARD_FOLDER,
    torch::{Adam, global_norm},
    train::{Ema, Optimizer, StepAround},
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::{
    common::{Said, lvdm_in, noise, processes::said, same_checkpoint, skip, succeed_in},
    gradients::workers,
    log_difference, metrics, workplace,
};

/// Parameters of many sizes, of which one lies in memory in another order; the steps of an optimizer with clipping, with weight
/// decay of some of them and with an average, of which one is left out; all that there is afterwards, by name. `check` is called
/// with what this rank holds.
fn trained(shards: impl Fn(&Parameters) -> Rc<Shards>, check: impl Fn(usize)) -> Vec<(String, Tensor)> {
    let parameters = Parameters::new(Device::Cpu, 0);
    let weights: Vec<Tensor> = (0..30)
        .map(|i| {
            let root = parameters.root();
            let weight = root.parameter(format!("weight.{i}"), &[2 + i % 3, 5, 1 + i % 4, 3, 2], Init::ONES);
            if i == 7 {
                root.store_channels_last("weight.7");
            }
            weight
        })
        .collect();
    assert!(!weights[7].is_contiguous());
    let shards = shards(&parameters);
    let adam = Adam { learning_rate: 0.1, betas: (0.9, 0.99), weight_decay: 0.2, eps: 1e-8, decoupled: true };
    let mut optimizer = Optimizer::over(adam, &parameters, &shards).decaying(|name| !name.ends_with('5'));
    let config = serde_json::from_value(json!({"steps": 1, "batch": 1, "ema_decay": 0.6})).unwrap();
    let ema = Ema::of(&config, &parameters, &shards).unwrap();
    let bytes = |named: &[(String, Tensor)]| named.iter().map(|(_, t)| 4 * t.numel()).sum::<usize>();
    check(bytes(&optimizer.state()) + bytes(ema.named()));
    for step in 0..5 {
        optimizer.zero_grad().unwrap();
        let scale = if step == 3 { f64::NAN } else { 1.0 };
        for (i, weight) in weights.iter().enumerate() {
            (weight * noise((100 * step + i) as u64, &weight.size()) * scale).sum(None).backward();
        }
        let gradients = optimizer.gradients();
        let norm = global_norm(&gradients).unwrap().to_kind(Kind::Double).reshape([1]);
        let around = StepAround { checked: Some(&norm), max_norm: Some(20.0), average: Some(&ema) };
        optimizer.step(&gradients, around).unwrap();
    }
    let mut all = parameters.named();
    all.extend(optimizer.whole_state().unwrap());
    all.extend(ema.whole().unwrap().into_iter().map(|(name, t)| (format!("ema.{name}"), t)));
    all.into_iter().map(|(name, t)| (name, t.detach())).collect()
}

/// One of several ranks, each of which holds its part of the state: in pieces of a few parameters, and in one piece.
pub fn shares(ranks: &Ranks) {
    let of = |ranks: &Ranks, bytes: i64| {
        let ranks = ranks.clone();
        move |parameters: &Parameters| Rc::new(Shards::in_pieces_of(bytes, &ranks, &parameters.trainable()))
    };
    let whole = std::cell::Cell::new(0);
    let alone = trained(of(&Ranks::alone(), 1 << 20), |bytes| whole.set(bytes));
    for piece in [1500, 1 << 20] {
        let own = trained(of(ranks, piece), |bytes| {
            let (share, whole) = (bytes as f64, whole.get() as f64);
            assert!((share * ranks.size() as f64 / whole - 1.0).abs() < 0.1, "{share} of {whole}");
            // all have the number of steps
            let all = ranks.sum(&[share - 4.0]).unwrap()[0];
            assert_eq!(all, whole - 4.0);
        });
        // rank 0 has all of it, the others the weights and their own part
        assert!(if ranks.is_first() { own.len() == alone.len() } else { (30..80).contains(&own.len()) });
        for (name, tensor) in &own {
            let (_, wanted) = alone.iter().find(|(other, _)| other == name).unwrap();
            assert!(tensor.equal(wanted), "rank {}, pieces of {piece}: {name}", ranks.rank());
        }
    }
}

#[test]
fn ranks_hold_their_share_and_step_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let workers = workers::<2>("shares", folder.path()).into_iter().chain(workers::<3>("shares", folder.path()));
    for said in workers.map(said) {
        assert_eq!(said.status, 0, "{}\n{}", said.out, said.err);
    }
}

const SHARDED: &str = "trainer.shard_optimizer=true";

/// A run over so many ranks, as far as a step.
fn train(at: &Path, task: &str, run: &str, ranks: usize, steps: i64, more: &[&str]) {
    let (file, ranks, steps) = (format!("{task}.yaml"), ranks.to_string(), format!("trainer.steps={steps}"));
    let settings =
        ["trainer.batch=1", "trainer.accumulate=2", "trainer.clip_gradient=0.5", "optimizer.weight_decay=0.1"];
    let arguments = ["train", task, &file, "--run", run, "--nproc", &ranks, &steps, "trainer.picture_every=3"];
    succeed_in(at, &[&arguments[..], &settings, more].concat());
}

/// All that two runs have kept, checkpoints and figures of the log, is the same to the bit; pictures too.
fn same_run(at: &Path, a: &str, b: &str) {
    let (a, b) = (at.join(a), at.join(b));
    let steps = checkpoint::list(&a).unwrap();
    assert!(steps.len() >= 2);
    for path in steps {
        same_checkpoint(&path, &b.join(path.strip_prefix(&a).unwrap()));
    }
    assert_eq!(metrics(&a), metrics(&b));
    assert!(!pictures(&a).is_empty() && pictures(&a) == pictures(&b), "pictures of {} differ", b.display());
}

/// The PNGs in a run's log for TensorBoard.
fn pictures(run: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<_> =
        fs::read_dir(run.join(TENSORBOARD_FOLDER)).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let log = files.iter().flat_map(|file| fs::read(file).unwrap()).collect::<Vec<_>>();
    let places = |word: &[u8]| (0..log.len()).filter(|&at| log[at..].starts_with(word)).collect::<Vec<_>>();
    let (begins, ends) = (places(b"\x89PNG"), places(b"IEND"));
    begins.into_iter().zip(ends).map(|(begin, end)| log[begin..end].to_vec()).collect()
}

/// Two ranks and three train as they do unsharded. A run goes on where the ranks share the state otherwise than before, or are
/// others.
#[test]
fn a_sharded_training_is_the_same_to_the_bit() {
    let folder = workplace();
    let at = folder.path();
    for task in ["autoencoder", "diffusion"] {
        let run = |name: &str| format!("runs/{task}{name}");
        let train = |name: &str, ranks, steps, more: &[&str]| train(at, task, &run(name), ranks, steps, more);
        let same = |a: &str, b: &str| same_run(at, &run(a), &run(b));
        train("", 2, 6, &[]);
        train("-sharded", 2, 6, &[SHARDED]);
        same("", "-sharded");
        // stopped twice, once as it was and once not
        train("-parts", 2, 2, &[SHARDED]);
        train("-parts", 2, 4, &[]);
        train("-parts", 2, 6, &[SHARDED]);
        let last = |name: &str, step| checkpoint::path(&at.join(run(name)), step);
        same_checkpoint(&last("", 6), &last("-parts", 6));
        // over two ranks, three, one and three
        for (name, more) in [("-mixed", &[][..]), ("-mixed-sharded", &[SHARDED])] {
            train(name, 2, 2, more);
            train(name, 3, 4, more);
            train(name, 1, 5, more);
            train(name, 3, 6, more);
        }
        same("-mixed", "-mixed-sharded");
    }
}

/// Gradients that are summed in bfloat16 train nearly as others do, and to the bit so where the state is shared out.
#[test]
fn a_training_whose_gradients_are_summed_in_bfloat16() {
    let folder = workplace();
    let at = folder.path();
    let rounded = "trainer.reduce_dtype=bf16";
    train(at, "autoencoder", "runs/exact", 2, 6, &[]);
    train(at, "autoencoder", "runs/rounded", 2, 6, &[rounded]);
    train(at, "autoencoder", "runs/sharded", 2, 6, &[rounded, SHARDED]);
    same_run(at, "runs/rounded", "runs/sharded");
    let difference = log_difference(&at.join("runs/exact"), &at.join("runs/rounded"));
    println!("the logs differ by {difference:.1e}");
    assert!(difference > 1e-6 && difference < 1e-2, "{difference:e}");
}

/// What goes over the network, counted by it: gradients in bfloat16 are half of the bytes of float32, and weights that come
/// back from their owners are half as many as those of gradients, which each rank sends and receives.
#[test]
fn bytes_that_travel() {
    let folder = workplace();
    let in_own_network = |script: &str, training: &Command| -> Result<Said, String> {
        let mut command = Command::new("unshare");
        command.args(["-rn", "sh", "-c", script, "sh"]).arg(training.get_program()).args(training.get_args());
        command.env("OMP_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "").current_dir(folder.path());
        command.output().map(Said::from).map_err(|error| error.to_string())
    };
    match in_own_network("ip link set lo up", &Command::new("true")) {
        Ok(said) if said.status == 0 => {}
        Ok(said) => return skip(&format!("no network of its own: {}", said.err.trim()), false),
        Err(reason) => return skip(&format!("no network of its own: {reason}"), false),
    }
    let received = |more: &[&str]| -> f64 {
        let pixels = ["autoencoder=pixels", "unet.attention_factors=[]", "trainer.batch=1", "trainer.ema_decay=null"];
        let arguments = ["train", "diffusion", "diffusion.yaml", "--nproc", "2", "trainer.checkpoint_every=100"];
        let training = lvdm_in(folder.path(), &[&arguments[..], &pixels, more].concat());
        let said = in_own_network("ip link set lo up && \"$@\" >&2 && cat /proc/net/dev", &training).unwrap();
        assert_eq!(said.status, 0, "{}", said.err);
        let counted = said.out.lines().find_map(|line| line.trim().strip_prefix("lo:")?.split_whitespace().next());
        counted.unwrap().parse().unwrap()
    };
    let of_step = |name: &str, more: &[&str]| {
        let until = |steps: i64| {
            let (steps, run) = (format!("trainer.steps={steps}"), format!("runs/{name}-{steps}"));
            received(&[&[&steps[..], "--run", &run], more].concat())
        };
        (until(12) - until(2)) / 10.0
    };
    let exact = of_step("exact", &[]);
    let rounded = of_step("rounded", &["trainer.reduce_dtype=bf16"]);
    let sharded = of_step("sharded", &[SHARDED]);
    println!("a step: {exact:.0} bytes, in bfloat16 {rounded:.0}, sharded {sharded:.0}");
    let last = Checkpoint::read(&checkpoint::path(&folder.path().join("runs/exact-12"), 12)).unwrap();
    let model = last.tensors.iter().filter(|(name, _)| name.starts_with("model."));
    let weights = 4.0 * model.map(|(_, tensor)| tensor.numel()).sum::<usize>() as f64;
    // both ranks receive half of the sums, twice; each weight goes to the one that does not own it
    for (what, bytes, times) in [("float32", exact, 2.0), ("bfloat16", rounded, 1.0), ("sharded", sharded, 3.0)] {
        assert!((bytes / weights / times - 1.0).abs() < 0.03, "{what}: {bytes} bytes for {weights} of weights");
    }
}
