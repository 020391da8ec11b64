//! Whether this machine has what `lvdm` needs: its processor, GPUs, libraries and weights.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Result;
use tch::{Cuda, Device, Kind, TchError, Tensor};

use crate::torch::{
    Bfloat16, GpuPart, Machine, Processor, Vectors, attention_kernels, cpus, gpu_compiler, gpus, libtorch_version,
    processor, shortcuts, waiting,
};
use crate::weights::released::ALL;

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Good,
    /// Missing, but not needed on this machine.
    Absent,
    /// Missing or broken, and needed.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone)]
pub struct Finding {
    /// How it stands.
    pub outcome: Outcome,
    /// Of the thing.
    pub name: String,
    /// What was found; of a bad one, what to do.
    pub detail: String,
}

impl Finding {
    fn new(outcome: Outcome, name: impl Into<String>, detail: impl Into<String>) -> Self {
        Finding { outcome, name: name.into(), detail: detail.into() }
    }
}

/// Looks at everything that the work depends on, and tries what can be tried.
pub fn examine() -> Vec<Finding> {
    let mut findings = vec![
        Finding::new(Outcome::Good, "lvdm", format!("{} {}", env!("CARGO_PKG_VERSION"), features())),
        Finding::new(Outcome::Good, "LibTorch", format!("{}{}", libtorch_version(), libtorch_place())),
        Finding::new(
            Outcome::Good,
            "threads",
            format!("{} on {} CPUs that this process may use; {}", tch::get_num_threads(), cpus(), waiting()),
        ),
        cpu(),
        cuda(),
    ];
    for (index, gpu) in gpus().iter().enumerate() {
        let memory = gpu.memory as f64 / (1u64 << 30) as f64;
        findings.push(Finding::new(Outcome::Good, format!("GPU {index}"), format!("{}, {memory:.0} GiB", gpu.name)));
    }
    let mut devices = vec![Device::Cpu];
    if Cuda::is_available() {
        devices.extend((0..Cuda::device_count() as usize).map(Device::Cuda));
    }
    findings.extend(devices.into_iter().map(computation));
    findings.push(attention());
    findings.extend([GpuPart::NCCL, GpuPart::GRAPHS].map(|part| gpu_part(part.serves, part.locate())));
    findings.push(match gpu_compiler() {
        Ok(compiler) => Finding::new(Outcome::Good, "kernels for GPUs", format!("compiled by {compiler}")),
        Err(error) => Finding::new(Outcome::Absent, "kernels for GPUs", format!("{error:#}")),
    });
    findings.push(ffmpeg());
    findings.push(opencv());
    findings.extend(weights());
    findings.push(current_folder());
    findings
}

/// The cargo features compiled in.
fn features() -> String {
    let all = [("video", cfg!(feature = "video")), ("opencv", cfg!(feature = "opencv"))];
    let names: Vec<&str> = all.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    if names.is_empty() { "(without video and opencv)".into() } else { format!("(with {})", names.join(" and ")) }
}

/// Where the loader found LibTorch, which a run path or LD_LIBRARY_PATH may have decided.
fn libtorch_place() -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|p| p.ends_with("/libtorch_cpu.so"));
    path.and_then(|path| Path::new(path).parent()).map(|path| format!(" in {}", path.display())).unwrap_or_default()
}

/// The processor's instructions, and the shortcuts that are taken because of them.
fn cpu() -> Finding {
    let Processor { name, vectors, bfloat16, .. } = processor();
    let vectors = match vectors {
        Vectors::Avx512 => "AVX-512",
        Vectors::Avx2 => "AVX2",
        Vectors::Plain => "no vector instructions beyond the architecture's",
    };
    let bfloat16 = match bfloat16 {
        Bfloat16::Native => "bfloat16 instructions",
        Bfloat16::Emulated | Bfloat16::Slow => "bfloat16 emulated (float32 is faster)",
    };
    let taken = shortcuts();
    let all = [
        ("own kernels", taken.kernels),
        ("prepacked convolution weights", taken.prepacked_f32),
        ("prepacked bfloat16 convolution weights", taken.prepacked_bf16),
        ("channels-last 3D convolutions", taken.channels_last_3d),
    ];
    let list = |on: bool| all.iter().filter(|(_, is)| *is == on).map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let [on, off] = [true, false].map(|on| Some(list(on)).filter(|names| !names.is_empty()));
    let [on, off] = [on, off].map(|names| names.unwrap_or("none".into()));
    let detail = format!("{name}: {vectors}, {bfloat16}; faster paths in use: {on}; not in use: {off}");
    Finding::new(Outcome::Good, "processor", detail)
}

fn cuda() -> Finding {
    let (outcome, detail) = judge_cuda(&Machine::here());
    Finding::new(outcome, "CUDA", detail)
}

fn judge_cuda(machine: &Machine) -> (Outcome, String) {
    match (machine.obstacle(), &machine.loaded) {
        (Some(why), _) => (Outcome::Bad, why),
        (None, Ok(())) if machine.usable > 0 => (Outcome::Good, format!("linked; usable GPUs: {}", machine.usable)),
        (None, _) if machine.has_gpu => (Outcome::Absent, "the GPU is hidden by CUDA_VISIBLE_DEVICES".into()),
        (None, Ok(())) => (Outcome::Absent, "linked, but this machine has no NVIDIA GPU".into()),
        (None, Err(reason)) => {
            (Outcome::Absent, format!("no NVIDIA GPU, and LibTorch's CUDA libraries do not load ({reason})"))
        }
    }
}

/// Products, convolutions and attention on a device, against what they must give.
fn computation(device: Device) -> Finding {
    let name = match device {
        Device::Cuda(index) => format!("compute on GPU {index}"),
        _ => "compute on CPU".into(),
    };
    let began = Instant::now();
    match compute(device) {
        Ok(None) => {
            let time = began.elapsed().as_millis();
            Finding::new(Outcome::Good, name, format!("matmul, conv2d, conv3d, attention, bf16: correct ({time} ms)"))
        }
        Ok(Some(wrong)) => Finding::new(Outcome::Bad, name, format!("wrong result of {wrong}: use another LibTorch")),
        Err(error) => {
            let text = error.to_string();
            Finding::new(Outcome::Bad, name, text.lines().next().unwrap_or("an error without a text"))
        }
    }
}

/// The first operation whose result is wrong.
fn compute(device: Device) -> Result<Option<&'static str>, TchError> {
    let differs = |a: &Tensor, b: &Tensor, bound: f64| -> Result<bool, TchError> {
        let difference = a.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_sub(b)?.f_abs()?.f_max()?;
        let difference = difference.f_double_value(&[])?;
        Ok(difference.is_nan() || difference > bound)
    };
    // sin of 0, 1, 2, …: no random generator is disturbed
    let waves = |shape: &[i64]| -> Result<Tensor, TchError> {
        Tensor::f_arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu))?.f_sin()?.f_reshape(shape)
    };
    let there = |x: &Tensor, kind: Kind| x.f_to_kind(kind)?.f_to_device(device);

    let (a, b) = (waves(&[48, 64])?, waves(&[64, 32])?);
    // Σ_k a[i,k]·b[k,j], without a matrix product
    let product = a.f_unsqueeze(2)?.f_mul(&b.f_unsqueeze(0)?)?.f_sum_dim_intlist(&[1i64][..], false, Kind::Double)?;
    if differs(&there(&a, Kind::Float)?.f_matmul(&there(&b, Kind::Float)?)?, &product, 1e-4)? {
        return Ok(Some("a matrix product"));
    }
    if differs(&there(&a, Kind::BFloat16)?.f_matmul(&there(&b, Kind::BFloat16)?)?, &product, 0.3)? {
        return Ok(Some("a matrix product in bfloat16"));
    }

    // a kernel of ones sums its window, as an average pool times its size does
    let x = waves(&[1, 3, 8, 9, 10])?;
    let frames = x.f_squeeze_dim(0)?.f_transpose(0, 1)?; // [8, 3, 9, 10]
    let ones = |shape: &[i64]| Tensor::f_ones(shape, (Kind::Float, device));
    let sum = frames.f_avg_pool2d([3, 3], [1, 1], [0, 0], false, true, 1)?.f_sum_dim_intlist(
        &[1i64][..],
        true,
        Kind::Double,
    )?;
    let conv = there(&frames, Kind::Float)?.f_conv2d(&ones(&[1, 3, 3, 3])?, None::<Tensor>, 1, 0, 1, 1)?;
    if differs(&conv, &sum, 1e-4)? {
        return Ok(Some("conv2d"));
    }
    let sum = x.f_avg_pool3d([3, 3, 3], [1, 1, 1], [0, 0, 0], false, true, 1)?.f_sum_dim_intlist(
        &[1i64][..],
        true,
        Kind::Double,
    )?;
    let conv = there(&x, Kind::Float)?.f_conv3d(&ones(&[1, 3, 3, 3, 3])?, None::<Tensor>, 1, 0, 1, 1)?;
    if differs(&conv, &sum, 1e-4)? {
        return Ok(Some("conv3d"));
    }

    let [q, k, v] = [0, 1, 2].map(|part| waves(&[3, 2, 2, 16, 32]).and_then(|all| all.f_get(part)));
    let (q, k, v) = (q?, k?, v?);
    let scores = q.f_matmul(&k.f_transpose(-2, -1)?)?.f_mul_scalar(32f64.powf(-0.5))?;
    let attention = scores.f_softmax(-1, Kind::Double)?.f_matmul(&v)?;
    let attend = |kind: Kind| {
        let (q, k, v) = (there(&q, kind)?, there(&k, kind)?, there(&v, kind)?);
        Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, false, None, false)
    };
    if differs(&attend(Kind::Float)?, &attention, 1e-4)? {
        return Ok(Some("attention"));
    }
    if differs(&attend(Kind::BFloat16)?, &attention, 0.05)? {
        return Ok(Some("attention in bfloat16"));
    }
    Ok(None)
}

/// Kernels that attention may choose from on a GPU.
fn attention() -> Finding {
    let kernels = attention_kernels();
    let all = [
        ("flash", kernels.flash),
        ("memory-efficient", kernels.memory_efficient),
        ("cuDNN", kernels.cudnn),
        ("plain", kernels.math),
    ];
    let names: Vec<&str> = all.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    Finding::new(Outcome::Good, "attention", format!("kernels allowed: {}", names.join(", ")))
}

/// A part that GPUs need: absent where the headers to build it were.
fn gpu_part(serves: &str, located: Result<PathBuf>) -> Finding {
    match located {
        Ok(path) => Finding::new(Outcome::Good, serves, format!("built: {}", path.display())),
        Err(error) => Finding::new(Outcome::Absent, serves, format!("{error:#}")),
    }
}

#[cfg(feature = "video")]
fn ffmpeg() -> Finding {
    use video_rs::ffmpeg;
    if let Err(error) = video_rs::ffmpeg::init() {
        return Finding::new(Outcome::Bad, "FFmpeg", format!("does not start: {error}"));
    }
    let version = ffmpeg::codec::version();
    let version = format!("libavcodec {}.{}.{}", version >> 16, version >> 8 & 255, version & 255);
    let encoder = ffmpeg::encoder::find(ffmpeg::codec::Id::H264);
    match encoder {
        Some(encoder) => {
            Finding::new(Outcome::Good, "FFmpeg", format!("{version}, writes H.264 with {}", encoder.name()))
        }
        None => Finding::new(
            Outcome::Bad,
            "FFmpeg",
            format!("{version} has no H.264 encoder: install an FFmpeg built with libx264 (Debian's is)"),
        ),
    }
}

#[cfg(not(feature = "video"))]
fn ffmpeg() -> Finding {
    Finding::new(
        Outcome::Absent,
        "FFmpeg",
        "built without it: networks train on packed clips (`lvdm data pack`), and samples are written as arrays",
    )
}

#[cfg(feature = "opencv")]
fn opencv() -> Finding {
    match opencv::core::get_version_string() {
        Ok(version) => Finding::new(Outcome::Good, "OpenCV", version),
        Err(error) => Finding::new(Outcome::Bad, "OpenCV", format!("does not answer: {error}")),
    }
}

#[cfg(not(feature = "opencv"))]
fn opencv() -> Finding {
    Finding::new(Outcome::Absent, "OpenCV", "built without it: folders of frames cannot be read")
}

/// The extractors' weights: there, and the right ones?
fn weights() -> Vec<Finding> {
    ALL.iter().map(|file| weight(file.content, file.locate())).collect()
}

/// The line about one file of weights, from where it was found or why it was not.
fn weight(name: &str, located: Result<impl AsRef<Path>>) -> Finding {
    match located {
        Ok(path) => Finding::new(Outcome::Good, name, format!("{}, SHA-256 correct", path.as_ref().display())),
        Err(error) => Finding::new(Outcome::Bad, name, format!("{error:#}; `lvdm weights fetch` gets it")),
    }
}

/// Runs and data go below the current folder.
fn current_folder() -> Finding {
    let folder = std::env::current_dir().map_or_else(|_| ".".into(), |folder| folder.display().to_string());
    let probe = format!(".lvdm-doctor-{}", std::process::id());
    let written = fs::write(&probe, b"x");
    let _ = fs::remove_file(&probe);
    match written {
        Ok(()) => Finding::new(Outcome::Good, "folder", format!("{folder} can be written")),
        Err(error) => Finding::new(
            Outcome::Bad,
            "folder",
            format!("{folder} cannot be written ({error}): change into a folder that is yours"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes() {
        assert_eq!(compute(Device::Cpu).unwrap(), None);
    }

    #[test]
    fn a_gpu_without_cuda_is_a_failure_that_says_why() {
        let machine = |loaded: Result<(), &str>, usable, has_gpu| Machine {
            loaded: loaded.map_err(str::to_string),
            usable,
            has_gpu,
            hidden: false,
        };
        let (outcome, detail) = judge_cuda(&machine(Err("libcudnn.so.9: not found"), 0, true));
        assert_eq!(outcome, Outcome::Bad);
        assert!(detail.contains("libcudnn.so.9") && detail.contains("make setup"), "{detail}");
        assert_eq!(judge_cuda(&machine(Ok(()), 0, true)).0, Outcome::Bad);
        assert_eq!(judge_cuda(&machine(Ok(()), 2, true)).0, Outcome::Good);
        assert_eq!(judge_cuda(&machine(Err("not found"), 0, false)).0, Outcome::Absent);
        assert_eq!(judge_cuda(&Machine { hidden: true, ..machine(Ok(()), 0, true) }).0, Outcome::Absent);
    }

    #[test]
    fn missing_weights_are_a_failure_with_the_remedy() {
        let finding = weight("I3D", Err::<&Path, _>(anyhow::anyhow!("weights/i3d.ckpt is not there")));
        assert_eq!(finding.outcome, Outcome::Bad);
        assert!(finding.detail.contains("lvdm weights fetch"));
    }
}
