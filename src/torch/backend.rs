//! Which parts of LibTorch are there and how they are set.

use anyhow::{Result, anyhow};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

unsafe extern "C" {
    fn lvdm_attention_kernels(flash: *mut bool, memory_efficient: *mut bool, math: *mut bool, cudnn: *mut bool);
    fn lvdm_allow_tf32(allow: bool);
}

/// Loads LibTorch's CUDA half, which the linker drops because nothing refers to it by name.
///
/// Must run before anything asks about CUDA, since LibTorch keeps the first answer.
///
/// # Errors
/// The loader's own words, where this LibTorch has no CUDA half or the driver's libraries are missing.
pub fn load_cuda() -> Result<()> {
    // SAFETY: the initialisers of libtorch_cuda register kernels and do nothing else.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    match library {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(anyhow!("{error}")),
    }
}

/// Kernels that `scaled_dot_product_attention` may choose from on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct AttentionKernels {
    pub flash: bool,
    pub memory_efficient: bool,
    pub math: bool,
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

/// Whether float32 products on a GPU may be rounded to TF32 (off unless this is called).
pub fn allow_tf32(allow: bool) {
    // SAFETY: sets two flags of LibTorch's context.
    unsafe { lvdm_allow_tf32(allow) }
}
