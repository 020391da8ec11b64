//! Which parts of LibTorch are there and how they are set.

use std::{
    env,
    error::Error,
    ffi::{CStr, c_char, c_int, c_uint},
    path::PathBuf,
    sync::OnceLock,
};

use anyhow::{Context, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

unsafe extern "C" {
    fn lvdm_attention_kernels(flash: *mut bool, memory_efficient: *mut bool, math: *mut bool, cudnn: *mut bool);
}

/// Loads LibTorch's CUDA half, which the linker drops because nothing refers to it by name, and says
/// why it is not there. Later calls repeat the first one's answer.
///
/// Must run before anything asks about CUDA, since LibTorch keeps the first answer.
///
/// # Errors
/// The loader's own words, where this LibTorch has no CUDA half or libraries of it are missing.
pub fn load_cuda() -> Result<(), &'static str> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        // SAFETY: the initialisers of libtorch_cuda register kernels and do nothing else.
        let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
        library.map(std::mem::forget).map_err(|error| match error.source() {
            Some(words) => words.to_string(),
            None => error.to_string(),
        })
    });
    loaded.as_ref().copied().map_err(String::as_str)
}

/// A part for GPUs that is built as a shared object of its own, where the headers it needs are.
#[derive(Debug, Clone, Copy)]
pub struct GpuPart {
    /// Its file, which lies beside the program or where it was built.
    pub file: &'static str,
    /// What cannot be done without it.
    pub serves: &'static str,
    built: Option<&'static str>,
    /// Why it was not built.
    lacks: Option<&'static str>,
}

impl GpuPart {
    /// Sums over several GPUs.
    pub const NCCL: GpuPart = GpuPart {
        file: "liblvdm_nccl.so",
        serves: "several GPUs",
        built: option_env!("LVDM_NCCL"),
        lacks: option_env!("LVDM_NO_NCCL"),
    };
    /// What a function queues, launched as one.
    pub const GRAPHS: GpuPart = GpuPart {
        file: "liblvdm_graph.so",
        serves: "CUDA graphs",
        built: option_env!("LVDM_GRAPH"),
        lacks: option_env!("LVDM_NO_GRAPH"),
    };

    /// Where it lies.
    ///
    /// # Errors
    /// Why it is not there, and what to do.
    pub fn locate(&self) -> Result<PathBuf> {
        let beside = env::current_exe().ok().and_then(|path| Some(path.parent()?.join(self.file)));
        let found = beside.into_iter().chain(self.built.map(PathBuf::from)).find(|path| path.exists());
        found.with_context(|| {
            let why = self.lacks.unwrap_or("it was left behind where the program was built");
            format!("{} need {} beside the program, which is not there: {why}", self.serves, self.file)
        })
    }
}

/// A GPU as the driver describes it.
#[derive(Debug, Clone)]
pub struct Gpu {
    /// As the driver tells it.
    pub name: String,
    /// In bytes.
    pub memory: usize,
    /// No other GPU, nor part of one that is shared out, has the same.
    pub id: String,
}

/// The GPUs of the NVIDIA driver that this process may use; none where there is no driver.
pub fn gpus() -> Vec<Gpu> {
    type Init = unsafe extern "C" fn(c_uint) -> c_int;
    type Count = unsafe extern "C" fn(*mut c_int) -> c_int;
    type Get = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
    type Name = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    type Memory = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
    type Uuid = unsafe extern "C" fn(*mut [u8; 16], c_int) -> c_int;
    // SAFETY: functions of the CUDA driver by the signatures it documents; 0 is its success.
    let list = unsafe {
        let Ok(driver) = Library::open(Some("libcuda.so.1"), RTLD_NOW) else { return Vec::new() };
        let list = || -> Option<Vec<Gpu>> {
            let init = driver.get::<Init>(b"cuInit").ok()?;
            let count = driver.get::<Count>(b"cuDeviceGetCount").ok()?;
            let get = driver.get::<Get>(b"cuDeviceGet").ok()?;
            let name = driver.get::<Name>(b"cuDeviceGetName").ok()?;
            let memory = driver.get::<Memory>(b"cuDeviceTotalMem_v2").ok()?;
            let uuid = driver.get::<Uuid>(b"cuDeviceGetUuid_v2").or_else(|_| driver.get(b"cuDeviceGetUuid")).ok()?;
            let mut devices = 0;
            if init(0) != 0 || count(&mut devices) != 0 {
                return None;
            }
            let one = |index| {
                let (mut device, mut text, mut bytes, mut id) = (0, [0u8; 128], 0, [0; 16]);
                let known = get(&mut device, index) == 0
                    && name(text.as_mut_ptr().cast(), text.len() as c_int, device) == 0
                    && memory(&mut bytes, device) == 0
                    && uuid(&mut id, device) == 0;
                let name = CStr::from_bytes_until_nul(&text).ok()?.to_string_lossy().into_owned();
                let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
                known.then_some(Gpu { name, memory: bytes, id })
            };
            (0..devices).map(one).collect()
        };
        let list = list();
        std::mem::forget(driver); // LibTorch uses it too
        list
    };
    list.unwrap_or_default()
}

/// The LibTorch this was built against, such as `2.11.0`.
pub fn libtorch_version() -> &'static str {
    env!("LVDM_LIBTORCH_VERSION")
}

/// Kernels that `scaled_dot_product_attention` may choose from on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct AttentionKernels {
    /// Flash attention.
    pub flash: bool,
    /// The memory-efficient kernel.
    pub memory_efficient: bool,
    /// Plain products.
    pub math: bool,
    /// cuDNN's.
    pub cudnn: bool,
}

/// What LibTorch is set to use.
pub fn attention_kernels() -> AttentionKernels {
    let mut kernels = AttentionKernels { flash: false, memory_efficient: false, math: false, cudnn: false };
    // SAFETY: writes four flags.
    unsafe {
        lvdm_attention_kernels(&mut kernels.flash, &mut kernels.memory_efficient, &mut kernels.math, &mut kernels.cudnn)
    };
    kernels
}
