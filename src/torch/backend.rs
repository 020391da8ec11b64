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
    fn lvdm_allow_tf32(allow: bool);
    fn lvdm_deterministic();
    fn lvdm_is_deterministic() -> bool;
    fn lvdm_autotune();
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

/// The place of a part that was built as a shared object of its own: beside the program, or where it was built.
pub(super) fn part(name: &str, built: Option<&str>) -> Result<PathBuf> {
    let beside = env::current_exe().ok().and_then(|path| Some(path.parent()?.join(name)));
    let found = beside.into_iter().chain(built.map(PathBuf::from)).find(|path| path.exists());
    found.with_context(|| {
        format!(
            "{name} is needed beside the program: this build was made where the headers that it needs are not (build \
             beside LibTorch with CUDA, `make setup` on a machine with a GPU)"
        )
    })
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

/// From now on cuDNN times its kernels at the first call of each shape and keeps the fastest.
pub fn autotune() {
    // SAFETY: sets a flag of LibTorch's context.
    unsafe { lvdm_autotune() }
}

/// Whether float32 products on a GPU may be rounded to TF32 (LibTorch's default for convolutions alone).
pub fn allow_tf32(allow: bool) {
    // SAFETY: sets two flags of LibTorch's context.
    unsafe { lvdm_allow_tf32(allow) }
}

/// From now on a GPU uses kernels only whose results repeat to the bit; an operation that has none is an error that
/// names it. To be called before the GPU is used, and from one thread.
pub fn be_deterministic() {
    // SAFETY: sets flags of LibTorch's context and, before other threads run, a variable of the environment.
    unsafe { lvdm_deterministic() }
}

/// Whether [`be_deterministic`] was called.
pub fn is_deterministic() -> bool {
    // SAFETY: reads a flag of LibTorch's context.
    unsafe { lvdm_is_deterministic() }
}
