use std::{fmt, str::FromStr};

use anyhow::{Result, bail};
use tch::{Cuda, Device};

use super::gpus;

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
    /// # Errors
    /// Where a GPU is asked for that is not there.
    pub fn open(self) -> Result<Device> {
        match self {
            DeviceName::Auto => Ok(Device::cuda_if_available()),
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda(index) if (index as i64) < Cuda::device_count() => Ok(Device::Cuda(index)),
            DeviceName::Cuda(index) => bail!(
                "device cuda:{index} is not there: LibTorch sees {} GPUs (`lvdm doctor` says why)",
                Cuda::device_count()
            ),
        }
    }
}

/// What kind of device this is, as its maker calls it: `NVIDIA H100 80GB HBM3`, `AMD EPYC 7B13 64-Core Processor`.
/// Devices of one name compute the same numbers; the number of a GPU is no part of it.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => gpus().get(index).map_or("a GPU".into(), |gpu| gpu.name.clone()),
        _ => {
            let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
            model.map_or_else(|| format!("a CPU ({})", std::env::consts::ARCH), |(_, name)| name.trim().to_string())
        }
    }
}
