//! Which device a name stands for, and what it is called.

use std::{env, fmt, fs, process::Command, str::FromStr, sync::Once};

use anyhow::{Result, bail};
use tch::{Cuda, Device};

use super::{Vectors, gpus, load_cuda, processor};

/// A device as the command line and experiments name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// The GPU if there is one, else the CPU.
    Auto,
    /// The host.
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "auto" => DeviceName::Auto,
            "cpu" => DeviceName::Cpu,
            "cuda" => DeviceName::Cuda(0),
            other => match other.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
                Some(index) => DeviceName::Cuda(index),
                None => bail!("`{other}` is not a device: use auto, cpu, cuda or cuda:N"),
            },
        })
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Auto => f.write_str("auto"),
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl DeviceName {
    /// The device, which is named once in a note: what computes is never a guess.
    ///
    /// # Errors
    /// Where a GPU is asked for that is not there, and where `auto` would be the CPU beside a GPU that cannot be used.
    pub fn open(self) -> Result<Device> {
        let device = self.find()?;
        say_device(device);
        Ok(device)
    }

    /// As [`Self::open`], without a word.
    ///
    /// # Errors
    /// The same.
    pub fn find(self) -> Result<Device> {
        self.among(&Machine::here())
    }

    /// The device of this name on such a machine.
    fn among(self, machine: &Machine) -> Result<Device> {
        match self {
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Auto if machine.usable > 0 => Ok(Device::Cuda(0)),
            DeviceName::Auto => match machine.obstacle() {
                None => Ok(Device::Cpu),
                Some(why) => bail!(
                    "there is a GPU, and it cannot be used: {why}. To compute on the CPU all the same, say so: --device \
                     cpu, or trainer.device=cpu for a training"
                ),
            },
            DeviceName::Cuda(index) if index < machine.usable => Ok(Device::Cuda(index)),
            DeviceName::Cuda(index) => {
                let why = machine.obstacle().unwrap_or_else(|| "`lvdm doctor` says why".into());
                bail!("device cuda:{index} is not there: LibTorch sees {} GPUs ({why})", machine.usable)
            }
        }
    }
}

/// What a machine has for CUDA.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Whether LibTorch's CUDA half was loaded, or why not.
    pub loaded: Result<(), String>,
    /// GPUs that LibTorch can use.
    pub usable: usize,
    /// Whether the machine has a GPU, usable or not.
    pub has_gpu: bool,
    /// Whether CUDA_VISIBLE_DEVICES lets this process see none.
    pub hidden: bool,
}

impl Machine {
    /// This one. It is looked at only where LibTorch finds no GPU.
    pub fn here() -> Self {
        let loaded = load_cuda().map_err(str::to_string);
        let usable = Cuda::device_count().max(0) as usize;
        let hidden = env::var("CUDA_VISIBLE_DEVICES").is_ok_and(|seen| hides_all(&seen));
        Machine { loaded, usable, has_gpu: usable > 0 || has_gpu(), hidden }
    }

    /// Why its GPU cannot be used and what to do; none where there is none, where it can be, or where it was hidden.
    pub fn obstacle(&self) -> Option<String> {
        if self.usable > 0 || self.hidden || !self.has_gpu {
            return None;
        }
        Some(match &self.loaded {
            Ok(()) => {
                "LibTorch with CUDA is there and finds no usable device: check `nvidia-smi`, CUDA_VISIBLE_DEVICES \
                       and that the driver is one for CUDA 13"
                    .into()
            }
            Err(reason) => format!(
                "LibTorch's CUDA half is not loaded ({reason}): run `make setup` for LibTorch with CUDA (on a login node \
                 `CUDA=1 make setup`), or point LIBTORCH at one, and build again"
            ),
        })
    }
}

/// Whether this value of CUDA_VISIBLE_DEVICES shows no GPU: CUDA takes the entries before the first that is none.
fn hides_all(seen: &str) -> bool {
    let first = seen.split(',').next().unwrap_or_default().trim();
    !(first.parse::<u32>().is_ok() || first.starts_with("GPU-") || first.starts_with("MIG-"))
}

/// Whether the machine has an NVIDIA GPU: its driver shows one in /dev, or its tool answers.
fn has_gpu() -> bool {
    let number = |name: &str| name.strip_prefix("nvidia").is_some_and(|rest| rest.parse::<u32>().is_ok());
    fs::read_dir("/dev").is_ok_and(|files| files.flatten().any(|file| file.file_name().to_str().is_some_and(number)))
        || Command::new("nvidia-smi").arg("-L").output().is_ok_and(|said| said.status.success())
}

/// Says once which device computes: `device: cuda:0 (NVIDIA H100 80GB HBM3)`.
pub fn say_device(device: Device) {
    static SAID: Once = Once::new();
    SAID.call_once(|| tracing::info!("device: {}", described(device)));
}

/// A device with its name: `cuda:0 (NVIDIA H100 80GB HBM3)`, `cpu (AMD EPYC 9654, avx512)`.
fn described(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index} ({})", device_name(device)),
        _ => {
            let vectors = match processor().vectors {
                Vectors::Avx512 => "avx512",
                Vectors::Avx2 => "avx2",
                Vectors::Plain => "no vector instructions beyond the architecture's",
            };
            format!("cpu ({}, {vectors})", device_name(device))
        }
    }
}

/// What kind of device this is, as its maker calls it: `NVIDIA H100 80GB HBM3`, `AMD EPYC 7B13 64-Core Processor`.
/// Devices of one name compute the same numbers; the number of a GPU is no part of it.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => gpus().get(index).map_or("a GPU".into(), |gpu| gpu.name.clone()),
        _ => {
            let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
            model.map_or_else(|| format!("a CPU ({})", env::consts::ARCH), |(_, name)| name.trim().to_string())
        }
    }
}

/// The device for people: a GPU's name, or the processor's with the number of threads that compute.
pub fn processor_or_gpu(device: Device) -> String {
    match device {
        Device::Cuda(_) => device_name(device),
        _ => format!("{} ({} threads)", device_name(device), tch::get_num_threads()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: Machine = Machine { loaded: Ok(()), usable: 2, has_gpu: true, hidden: false };

    fn unloaded(has_gpu: bool, hidden: bool) -> Machine {
        Machine { loaded: Err("libcudnn.so.9: not found".into()), usable: 0, has_gpu, hidden }
    }

    #[test]
    fn auto_is_the_gpu_where_there_is_one_and_else_the_cpu() {
        assert_eq!(DeviceName::Auto.among(&READY).unwrap(), Device::Cuda(0));
        assert_eq!(DeviceName::Auto.among(&unloaded(false, false)).unwrap(), Device::Cpu);
        assert_eq!(DeviceName::Cpu.among(&READY).unwrap(), Device::Cpu);
        assert_eq!(DeviceName::Cuda(1).among(&READY).unwrap(), Device::Cuda(1));
        let error = DeviceName::Cuda(2).among(&READY).unwrap_err().to_string();
        assert!(error.contains("cuda:2") && error.contains("2 GPUs"), "{error}");
    }

    #[test]
    fn a_gpu_that_cannot_be_used_is_an_error_unless_the_cpu_is_asked_for() {
        for (machine, words) in [
            (unloaded(true, false), ["libcudnn.so.9", "CUDA=1 make setup", "--device cpu"]),
            (Machine { usable: 0, ..READY }, ["nvidia-smi", "CUDA 13", "trainer.device=cpu"]),
        ] {
            let error = DeviceName::Auto.among(&machine).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
            assert!(DeviceName::Cuda(0).among(&machine).is_err());
            assert_eq!(DeviceName::Cpu.among(&machine).unwrap(), Device::Cpu);
        }
    }

    /// Whoever hides the GPUs asks for the CPU.
    #[test]
    fn a_hidden_gpu_is_no_error() {
        assert_eq!(DeviceName::Auto.among(&unloaded(true, true)).unwrap(), Device::Cpu);
        for (seen, hidden) in [("", true), ("-1", true), ("NoDevFiles", true), ("0", false), ("2,3", false)] {
            assert_eq!(hides_all(seen), hidden, "{seen}");
        }
        assert!(!hides_all("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6") && !hides_all("MIG-1"));
    }

    #[test]
    fn a_device_is_named() {
        let name = described(Device::Cpu);
        assert!(name.starts_with("cpu (") && name.len() > "cpu (, )".len(), "{name}");
        assert!(described(Device::Cuda(0)).starts_with("cuda:0"));
    }
}
