//! What networks on a GPU do between their products: LibTorch's operations, with ways back that keep less and repeat.

use std::ffi::{c_char, c_void};

use tch::Tensor;

use super::fused::output;

unsafe extern "C" {
    fn lvdm_composed_norm(
        x: *const c_void,
        scale: *const c_void,
        shift: *const c_void,
        groups: i64,
        eps: f64,
        silu: bool,
        y: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_composed_edges(x: *const c_void, pads: *const i64, y: *mut *mut c_void) -> *mut c_char;
}

/// Group norm as [`group_norm`](super::group_norm), on any device and of any kind: half precision comes back as float32.
/// Of what went in it keeps `x` as it came. Differentiable once.
///
/// # Panics
/// On shapes that do not fit, as ordinary `tch` calls do.
pub fn composed_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, groups: i64, eps: f64, silu: bool) -> Tensor {
    let [x, scale, shift] = [x, scale, shift].map(|t| t.as_ptr().cast::<c_void>());
    // SAFETY: live tensors, whose shapes LibTorch checks.
    output(|y| unsafe { lvdm_composed_norm(x, scale, shift, groups, eps, silu, y) })
}

/// `[B, C, F, H, W]` with its edges repeated as by [`repeat_edges`](super::repeat_edges), on any device and of any kind. The
/// gradient is summed in float32 and in the same order each time, whatever kind it has. Differentiable once.
///
/// # Panics
/// As ordinary `tch` calls do.
pub fn composed_edges(x: &Tensor, pads: [i64; 6]) -> Tensor {
    // SAFETY: a live tensor, whose shape LibTorch checks, and six numbers.
    output(|y| unsafe { lvdm_composed_edges(x.as_ptr().cast(), pads.as_ptr(), y) })
}
