//! What LibTorch has and `tch` does not expose. All `unsafe` of the project is here and in `src/ffmpeg.rs`.
//!
//! Each subject has one small Rust file with a safe interface. Behind them stand these C++ files:
//!
//! - `core.cpp`: functions of LibTorch that `tch` lacks;
//! - `fused.cpp`: kernels of our own for CPUs, each in a header below `fused/`; their inner loops, `fused/rows.cpp`, are
//!   compiled once for each set of vector instructions;
//! - `gpu/`: kernels of our own for GPUs, compiled on the machine that has one;
//! - `composed.cpp`: what GPUs run where these could not be compiled, made of LibTorch's operations;
//! - `shapes.cpp`: operations that run for the shapes of their results alone;
//! - `c10d.cpp`: process groups;
//! - `nccl.cpp` and `graph.cpp`: the parts for GPUs, shared objects that are opened where they are needed.

mod autocast;
mod backend;
mod backward;
mod caught;
mod checksum;
mod composed;
mod device;
mod fixed_weights;
mod fused;
mod gpu_kernels;
mod gpu_path;
mod graph;
mod kernel_choice;
mod memory;
mod multi_tensor;
mod process_group;
mod processor;
mod recompute;
mod rounded_weights;
mod shapes;
mod threads;
mod transfer;

pub use autocast::Autocast;
pub use backend::{AttentionKernels, Gpu, GpuPart, attention_kernels, gpus, libtorch_version, load_cuda};
pub use backward::{backward, gradient};
pub use caught::{caught, locate_panics};
pub use checksum::checksums;
pub use composed::{composed_edges, composed_norm};
pub use device::{DeviceName, Machine, device_name, processor_or_gpu, say_device};
pub use fixed_weights::{FixedWeights, cast_weight, cast_weights, fixed_conv};
pub use fused::{PositionTerms, frame_attention, fuses, group_norm, repeat_edges, transposed_conv};
pub use gpu_kernels::{
    GpuCode, GpuLayerNorm, GpuNorm, Keeps, gpu_compiler, gpu_frame_attention, gpu_geglu, gpu_layer_norm, gpu_mixed_sum,
    gpu_norm, gpu_repeat_edges, has_gpu_kernels,
};
pub use gpu_path::{as_on_gpu, takes_gpu_path};
pub use graph::{StepGraphs, StepInputs, cuda_graphs, replayed};
pub use kernel_choice::{Autotune, Tf32, allow_tf32, be_deterministic, compute_exactly};
pub use memory::{memory_so_far, peak_host_memory, peak_memory};
pub use multi_tensor::{Adam, AverageDecay, clear_gradients, clip_to_norm, global_norm, lerp_all};
pub use process_group::{GradientBuckets, Listener, ProcessGroup, Reduced, Store};
pub use processor::{Bfloat16, Processor, SHORTCUTS, Shortcuts, Vectors, processor, shortcuts};
pub use recompute::{Kept, kept_for_backward, recompute};
pub use rounded_weights::RoundedWeights;
pub use shapes::{ByShapes, Kernel, by_shapes, held_by_shapes, without_memory};
pub use threads::{cpus, give_way_while_waiting, use_available_cpus, waiting};
pub use transfer::{PinnedMemory, Readback, pinned, upload, upload_all};

use std::{
    ffi::{CStr, c_char, c_void},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use anyhow::{Result, anyhow};
use tch::Tensor;

unsafe extern "C" {
    fn free(pointer: *mut c_void);
}

/// A function of C++'s calls `body` once: `cpp` gives it `data` and `call`, with which it does so.
fn through_cpp<F: FnOnce() -> T, T>(
    body: F,
    cpp: impl FnOnce(*mut c_void, unsafe extern "C" fn(*mut c_void)) -> Result<()>,
) -> Result<T> {
    struct Call<F, T> {
        body: Option<F>,
        result: Option<std::thread::Result<T>>,
    }
    unsafe extern "C" fn run<F: FnOnce() -> T, T>(data: *mut c_void) {
        // SAFETY: `data` is the `Call` below, borrowed for the length of the C++ call.
        let call = unsafe { &mut *data.cast::<Call<F, T>>() };
        let body = call.body.take().expect("called once");
        call.result = Some(catch_unwind(AssertUnwindSafe(body)));
    }
    let mut call = Call { body: Some(body), result: None };
    cpp((&raw mut call).cast(), run::<F, T>)?;
    match call.result.expect("the body was run") {
        Ok(value) => Ok(value),
        Err(panic) => resume_unwind(panic),
    }
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
