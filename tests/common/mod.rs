//! What several test files need. Each of them uses a part of it.
#![allow(dead_code)]

pub mod browser;
pub mod diffusers;
pub mod pickle;
pub mod processes;
pub mod text_runs;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::Result;
use lvdm::{
    checkpoint::{Checkpoint, Progress},
    data::PackedWriter,
    diffusion::{NoisePath, NoisyBatch, Objective, SamplerConfig, Times},
    models::{ClipId, LatentConditions, LatentDiffusion},
    networks::{Inputs, Network},
    nn::{Parameters, fnv1a64},
    random::{Purpose, normal, stream},
    safetensors::write_safetensors_atomically,
};
use rand::RngExt;
use serde_json::json;
use tch::{Tensor, no_grad};

/// The first clips of numbered samples, before they are decoded.
pub trait FirstClips {
    /// Normalised z_0, `[N, C, F, h, w]`.
    fn latents(
        &self,
        samples: &[u64],
        given: &LatentConditions,
        sampler: SamplerConfig,
        seed: u64,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor>;
}

impl FirstClips for LatentDiffusion {
    fn latents(
        &self,
        samples: &[u64],
        given: &LatentConditions,
        sampler: SamplerConfig,
        seed: u64,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let clips: Vec<ClipId> = samples.iter().map(|&sample| ClipId { seed, sample, clip: 0 }).collect();
        self.clips(&clips, self.latent[1], given, sampler, on_step)
    }
}

/// A path inside the source tree.
pub fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Says why a test is not run here, past the harness, which keeps to itself what passing tests print. Where CI=true, what
/// set-up installs must be there.
pub fn skip(reason: &str, set_up_installs_it: bool) {
    let test = std::thread::current().name().unwrap_or("a test").to_string();
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!(is_ci && set_up_installs_it), "{reason}");
}

/// `lvdm`, run in `folder` on the CPU, single-threaded so that results repeat to the bit.
pub fn lvdm_in(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lvdm"));
    command.args(arguments).current_dir(folder).env_remove("LD_LIBRARY_PATH");
    command.env("OMP_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "");
    command
}

/// What a finished command said.
pub struct Said {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Said {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs `lvdm` in `folder` to its end.
pub fn run_in(folder: &Path, arguments: &[&str]) -> Said {
    lvdm_in(folder, arguments).output().unwrap().into()
}

/// Runs it and wants success.
pub fn succeed_in(folder: &Path, arguments: &[&str]) -> Said {
    let said = run_in(folder, arguments);
    assert_eq!(said.status, 0, "lvdm {arguments:?}\n{}\n{}", said.out, said.err);
    said
}

impl Said {
    /// On stderr, by the first rank, however often the device is opened.
    pub fn names_its_device_once(&self) {
        let lines: Vec<&str> = self.err.lines().filter(|line| line.contains("device: cpu (")).collect();
        assert_eq!(lines.len(), 1, "{}\n{}", self.out, self.err);
        assert!(!self.out.contains("device: cpu ("), "{}", self.out);
    }

    /// The one line that says what is wrong; no panic, no backtrace, and the status asked for.
    pub fn error(&self, status: i32) -> &str {
        let Said { out, err, .. } = self;
        assert_eq!(self.status, status, "{out}\n{err}");
        for word in ["panicked", "RUST_BACKTRACE", "stack backtrace", "frame #", "unwrap()"] {
            assert!(!err.contains(word) && !out.contains(word), "`{word}` in\n{err}{out}");
        }
        let lines: Vec<&str> = err.lines().filter(|line| line.starts_with("error:")).collect();
        assert_eq!(lines.len(), 1, "one line of error is wanted:\n{err}");
        assert!(lines[0].len() > "error: ".len() + 10, "{err}");
        lines[0]
    }
}

/// Everything a checkpoint stores, to the bit; and its progress but for the clock.
pub fn same_checkpoint(a: &Path, b: &Path) {
    let (a, b) = (Checkpoint::read(a).unwrap(), Checkpoint::read(b).unwrap());
    assert_eq!(Progress { seconds: 0.0, ..a.progress }, Progress { seconds: 0.0, ..b.progress });
    assert_eq!(a.tensors.keys().collect::<Vec<_>>(), b.tensors.keys().collect::<Vec<_>>());
    for (name, tensor) in &a.tensors {
        assert!(tensor.equal(&b.tensors[name]), "{name} differs");
    }
}

/// Every file under a folder with its bytes.
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

/// Smooth moving clips, u8 `[N, 3, F, H, W]`.
pub fn moving_clips(count: i64, frames: i64, side: i64) -> Tensor {
    let axis = |n: i64| Tensor::arange(n, (tch::Kind::Float, tch::Device::Cpu));
    let rows: Vec<Tensor> = (0..count)
        .map(|i| {
            let mut random = stream(9, Purpose::Scene, i as u64, 0);
            let mut draw = || random.random::<f64>() * 6.0;
            let channels: Vec<Tensor> = (0..3)
                .map(|_| {
                    let (x, y, t) = (axis(side).view([1, 1, -1]), axis(side).view([1, -1, 1]), axis(frames));
                    let wave = x * (0.1 + 0.05 * draw()) + y * 0.2 + t.view([-1, 1, 1]) * (0.3 + 0.1 * draw()) + draw();
                    wave.sin() * 110.0 + 128.0
                })
                .collect();
            Tensor::stack(&channels, 0)
        })
        .collect();
    Tensor::stack(&rows, 0).to_kind(tch::Kind::Uint8)
}

/// Writes such clips as `lvdm data pack` would.
pub fn write_packed(path: &Path, count: i64, frames: i64, side: i64) {
    let spec = json!({"dataset": {"kind": "folder", "root": "clips"}, "frames": frames, "frame_stride": 1,
        "resolution": side, "seed": 0, "reading": lvdm::data::READING});
    write_safetensors_atomically(path, &[("clips", moving_clips(count, frames, side))], &spec).unwrap();
}

/// Writes clips u8 `[N, 3, F, S, S]` as `lvdm sample --out NAME.safetensors` does.
pub fn write_generated(path: &Path, clips: &Tensor) {
    let [count, _, frames, side, _] = clips.size()[..] else { panic!("{:?}", clips.size()) };
    let mut writer = PackedWriter::create(path, count, frames, side, 0).unwrap();
    writer.push(clips).unwrap();
    writer.finish().unwrap();
}

/// `numpy.save` of clips u8 `[N, 3, F, H, W]` as `[N, F, H, W, 3]`.
pub fn write_npy(path: &Path, clips: &Tensor) {
    let videos = clips.permute([0, 2, 3, 4, 1]).contiguous();
    let mut pixels = vec![0u8; videos.numel()];
    videos.copy_data_u8(&mut pixels, videos.numel());
    let sizes: Vec<String> = videos.size().iter().map(i64::to_string).collect();
    let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({}), }}", sizes.join(", "));
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(pixels);
    fs::write(path, bytes).unwrap();
}

/// Gives parameters that start at zero a value, so that every layer does something.
pub fn wake(parameters: &Parameters) {
    for (name, mut tensor) in parameters.trainable() {
        if tensor.abs().max().double_value(&[]) == 0.0 {
            let noise = normal(3, Purpose::Weights, fnv1a64(&name), 1, &tensor.size()) * 0.1;
            no_grad(|| tensor.copy_(&noise.to_kind(tensor.kind())));
        }
    }
}

/// Standard normal test data.
pub fn noise(sample: u64, shape: &[i64]) -> Tensor {
    normal(11, Purpose::Evaluation, sample, 0, shape)
}

/// ‖a − b‖ / ‖b‖ in float64.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(tch::Kind::Double), b.to_kind(tch::Kind::Double));
    ((a - &b).norm() / b.norm()).double_value(&[])
}

/// The same tensors under the same names.
pub fn same(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    a.iter().for_each(|(name, tensor)| assert!(tensor.equal(&b[name]), "{name}"));
}

/// The largest |a − b|, in float64.
pub fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(tch::Kind::Double) - b.to_kind(tch::Kind::Double)).abs().max().double_value(&[])
}

/// The loss of a batch at these times, one a clip, given nothing.
pub fn plain_loss(
    objective: &Objective,
    network: &dyn Network,
    path: &dyn NoisePath,
    z_0: &Tensor,
    t: &[f64],
    noise: &Tensor,
) -> Tensor {
    let times = Times::of_clips(path, t, z_0.device());
    let given = Inputs::default();
    let batch = NoisyBatch { z_0, noise, times: &times, given: &given, given_times: None, made_only: false };
    objective.loss(network, path, &batch)
}
