//! In which order the values of a video lie in memory.

use tch::{Device, Tensor};

use crate::torch::{Autocast, shortcuts, takes_gpu_path};

/// The same video `[B, C, F, H, W]` (or images `[B, C, H, W]`) with its channels last in memory: in the order B, F, H, W, C.
pub fn channels_last(video: &Tensor) -> Tensor {
    video.movedim_int(1, -1).contiguous().movedim_int(-1, 1)
}

/// Whether 3D convolutions on this device are faster with channels last in memory. On the CPU this was measured for each kind
/// of processor. On a GPU it holds in half precision, whose kernels are written for that order; this was not measured.
pub fn prefers_channels_last(device: Device) -> bool {
    if takes_gpu_path(device) { Autocast::is_on(device) } else { shortcuts().channels_last_3d }
}
