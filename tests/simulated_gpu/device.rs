//! The device itself: built from `simulated_gpu.cpp`, loaded in place of LibTorch's CUDA half, and asked what it counted.

use std::{
    env, fs,
    ops::Sub,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use lvdm::{
    nn::fnv1a64,
    torch::{Readback, upload, upload_all},
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::common::{Said, lvdm_in, skip};

const SOURCE: &str = include_str!("simulated_gpu.cpp");

/// What a process did, as `simulated_gpu.cpp` explains it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Counts {
    pub launches: i64,
    pub up: i64,
    pub blocking_up: i64,
    pub down: i64,
    pub blocking_down: i64,
    pub reads: i64,
    pub stalls: i64,
    pub autotuned: i64,
    pub tf32: i64,
    pub graphs: i64,
    pub allocations: i64,
}

impl Sub for Counts {
    type Output = Counts;

    fn sub(self, other: Counts) -> Counts {
        Counts {
            launches: self.launches - other.launches,
            up: self.up - other.up,
            blocking_up: self.blocking_up - other.blocking_up,
            down: self.down - other.down,
            blocking_down: self.blocking_down - other.blocking_down,
            reads: self.reads - other.reads,
            stalls: self.stalls - other.stalls,
            autotuned: self.autotuned - other.autotuned,
            tf32: self.tf32 - other.tf32,
            graphs: self.graphs - other.graphs,
            allocations: self.allocations - other.allocations,
        }
    }
}

impl Counts {
    /// These are the counts of so many steps more: of none of them the host may have waited.
    pub fn wait_for_nothing(self, what: &str, steps: i64) {
        let Counts { launches, up, blocking_up, down, blocking_down, reads, stalls, .. } = self;
        println!(
            "{what}: {steps} steps more are {launches} kernels, {up} copies to the device ({blocking_up} blocking), {down} \
             back ({blocking_down} blocking), {reads} values read, {stalls} stalls"
        );
        assert!(launches > 10 * steps, "{what}: {launches} kernels in {steps} steps: was it the GPU that made them?");
        assert_eq!((blocking_up, blocking_down, reads), (0, 0, 0), "{what}: {self:?} in {steps} steps");
    }
}

/// A folder with the device.
pub struct Gpu {
    folder: PathBuf,
}

impl Gpu {
    /// None where there is no compiler for C++, which is said.
    pub fn simulated() -> Option<&'static Gpu> {
        static BUILT: OnceLock<Option<Gpu>> = OnceLock::new();
        BUILT.get_or_init(build).as_ref()
    }

    /// `lvdm` in `folder`, with one such GPU.
    pub fn command(&self, folder: &Path, arguments: &[&str]) -> Command {
        let mut command = lvdm_in(folder, arguments);
        command.env_remove("CUDA_VISIBLE_DEVICES").env("LD_LIBRARY_PATH", &self.folder).env("SIMULATED_GPUS", "1");
        command
    }

    /// A copy of `lvdm` in `folder` that finds the device's graphs beside it, as it would find those of a real GPU.
    pub fn with_graphs(&self, folder: &Path) -> PathBuf {
        let program = folder.join("lvdm");
        fs::copy(env!("CARGO_BIN_EXE_lvdm"), &program).unwrap();
        fs::copy(self.folder.join("liblvdm_graph.so"), folder.join("liblvdm_graph.so")).unwrap();
        program
    }

    /// Runs a command to its end: what it said, and what each of its processes counted.
    pub fn finish(&self, mut command: Command) -> (Said, Vec<Counts>) {
        let counts = tempfile::NamedTempFile::new().unwrap();
        let said: Said = command.env("SIMULATED_GPU_COUNTS", counts.path()).output().unwrap().into();
        let text = fs::read_to_string(counts.path()).unwrap();
        (said, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    /// Runs `lvdm` in one process and wants success.
    pub fn succeed(&self, folder: &Path, arguments: &[&str]) -> (Said, Counts) {
        let (said, counts) = self.finish(self.command(folder, arguments));
        assert_eq!(said.status, 0, "lvdm {arguments:?}\n{}\n{}", said.out, said.err);
        let [counts] = counts[..] else { panic!("lvdm {arguments:?}: {counts:?}") };
        (said, counts)
    }
}

/// Compiles the device into the target folder, once for each version of it and of LibTorch.
fn build() -> Option<Gpu> {
    let libtorch = PathBuf::from(env::var("LIBTORCH").expect("cargo sets LIBTORCH"));
    let version =
        ["version.py", "build-version"].map(|file| fs::read_to_string(libtorch.join(file)).unwrap_or_default());
    let key = fnv1a64(&[SOURCE, libtorch.to_str().unwrap(), &version.concat()].concat());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("simulated_gpu-{key:016x}"));
    let library = folder.join("libtorch_cuda.so");
    if library.exists() {
        return Some(Gpu { folder });
    }
    let named = env::var("CXX").ok();
    let runs = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    let Some(compiler) = named.as_deref().into_iter().chain(["c++", "g++", "clang++"]).find(runs) else {
        skip("the simulated GPU needs a compiler for C++ (none of CXX, c++, g++, clang++ runs)", true);
        return None;
    };
    fs::create_dir_all(&folder).unwrap();
    let source = folder.join("simulated_gpu.cpp");
    fs::write(&source, SOURCE).unwrap();
    let unfinished = tempfile::NamedTempFile::new_in(&folder).unwrap();
    let include = |path: &str| format!("-I{}", libtorch.join(path).display());
    let built = Command::new(compiler)
        .args([
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libtorch_cuda.so",
            &include("include"),
            &include("include/torch/csrc/api/include"),
        ])
        .arg(&source)
        .arg("-o")
        .arg(unfinished.path())
        .arg(format!("-L{}", libtorch.join("lib").display()))
        .args(["-ltorch_cpu", "-lc10"])
        .output()
        .unwrap();
    assert!(built.status.success(), "{compiler}: {}", String::from_utf8_lossy(&built.stderr));
    // what opens this finds the functions of the device, on which it depends
    let graphs = Command::new(compiler)
        .args(["-shared", "-Wl,--no-as-needed", "-x", "c++", "/dev/null", "-x", "none"])
        .arg(unfinished.path())
        .arg("-o")
        .arg(folder.join("liblvdm_graph.so"))
        .output()
        .unwrap();
    assert!(graphs.status.success(), "{compiler}: {}", String::from_utf8_lossy(&graphs.stderr));
    unfinished.persist(&library).unwrap();
    Some(Gpu { folder })
}

/// Not a test: a process that does to the device what a program must not, and what is counted.
#[test]
#[ignore = "started by the test below"]
fn culprit() {
    lvdm::torch::load_cuda().unwrap();
    let gpu = Device::Cuda(0);
    let x = Tensor::ones([4], (Kind::Float, gpu));
    let address = x.data_ptr() as usize;
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let of = |line: &&str| {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        (number(from)..number(to)).contains(&address)
    };
    let rights = maps.lines().find(of).unwrap().split(' ').nth(1).unwrap();
    assert_eq!(rights, "---p", "the host may read what only the GPU may");
    let mixed = x.f_add(&Tensor::ones([4], (Kind::Float, Device::Cpu))).unwrap_err();
    assert!(mixed.to_string().contains("same device"), "{mixed}");
    // two copies that block, two that do not, two values read, one wait for what has just begun
    let y = (x + Tensor::ones([4], (Kind::Float, Device::Cpu)).to_device(gpu)).to_device(Device::Cpu);
    assert_eq!(Vec::<f32>::try_from(&y).unwrap(), [2.0; 4]);
    let z = upload(&y, gpu);
    assert!(z.equal(&z) && z.sum(None).f_double_value(&[]).unwrap() == 8.0);
    let _ = Readback::of(&z).unwrap().wait().unwrap();
    // two transfers for four tensors of two kinds, whose order in memory stays
    let float = |n: i64| Tensor::arange(n, (Kind::Float, Device::Cpu));
    let own = [
        float(6).reshape([2, 3]).tr(),
        Tensor::from(1.5f32),
        Tensor::from_slice(&[1.0, 2.0]),
        float(9).slice(0, 1, 9, 3),
    ];
    let there = upload_all(&own, gpu);
    for (own, there) in own.iter().zip(&there) {
        assert!(own.equal(&there.to_device(Device::Cpu)), "{own:?} {there:?}");
    }
    assert_eq!((there[0].stride(), there[3].stride()), (vec![1, 3], vec![1]));
}

/// What the other tests stand on.
#[test]
fn the_device_catches_and_counts() {
    let Some(gpu) = Gpu::simulated() else { return };
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["device::culprit", "--exact", "--ignored", "--nocapture"]).env("LD_LIBRARY_PATH", &gpu.folder);
    let (said, counts) = gpu.finish(command);
    assert_eq!(said.status, 0, "{}\n{}", said.out, said.err);
    let [Counts { up, blocking_up, down, blocking_down, reads, stalls, .. }] = counts[..] else { panic!("{counts:?}") };
    assert_eq!((up, blocking_up, down, blocking_down, reads, stalls), (4, 1, 6, 5, 2, 1), "{counts:?}");
}
