//! What LibTorch has and `tch` does not expose. All `unsafe` of the project is here and in `src/ffmpeg.rs`.
//!
//! The C++ files: `core.cpp`; `fused.cpp`, kernels of our own for CPUs, whose inner loops `rows.cpp` has once for each kind
//! of processor; `composed.cpp`, what GPUs have in their place; `c10d.cpp`, processes; `nccl.cpp` and `graph.cpp`, each
//! opened on its own. Beside them stands one small safe Rust file a subject.

mod autocast;
mod backend;
mod caught;
mod checksum;
mod composed;
mod device;
mod fused;
mod graph;
mod kernels;
mod memory;
mod multi_tensor;
mod process_group;
mod processor;
mod recompute;
mod threads;
mod transfer;

pub use autocast::{Autocast, backward};
pub use backend::{AttentionKernels, Gpu, GpuPart, attention_kernels, gpus, libtorch_version, load_cuda};
pub use caught::{caught, locate_panics};
pub use checksum::checksums;
pub use composed::{composed_edges, composed_norm};
pub use device::{DeviceName, Machine, device_name, say_device};
pub use fused::{
    FixedWeights, PositionTerms, fixed_cast, fixed_conv, frame_attention, fuses, group_norm, repeat_edges,
    transposed_conv,
};
pub use graph::{cuda_graphs, replayed};
pub use kernels::{Autotune, Tf32, allow_tf32, be_deterministic};
pub use memory::{memory_so_far, peak_host_memory, peak_memory};
pub use multi_tensor::{Adam, clear_gradients, clip_global_norm, lerp_all};
pub use process_group::{GradientBuckets, Listener, Overlap, ProcessGroup, Store};
pub use processor::{Bfloat16, Processor, SHORTCUTS, Shortcuts, Vectors, processor, shortcuts};
pub use recompute::recompute;
pub use threads::{cpus, give_way_while_waiting, use_available_cpus, waiting};
pub use transfer::{PinnedMemory, Readback, upload, upload_all};

use std::ffi::{CStr, c_char, c_void};

use anyhow::{Result, anyhow};
use tch::Tensor;

unsafe extern "C" {
    fn free(pointer: *mut c_void);
}

/// A C++ function's error text as a Rust error: its first line.
fn check(error: *mut c_char) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null answer is a string from strdup, ours to free.
    let text = unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        free(error.cast());
        text
    };
    Err(anyhow!("{}", text.lines().next().unwrap_or("an error of LibTorch without a text")))
}

/// The C++ tensors behind Rust ones, borrowed as long as they live.
fn pointers(tensors: &[Tensor]) -> Vec<*mut c_void> {
    tensors.iter().map(|t| t.as_ptr().cast_mut().cast()).collect()
}
