//! Kernels of our own for the CPU, in float32. Each does in one pass over memory what networks do between two products.

use std::ffi::{c_char, c_void};

use tch::{Device, Kind, Tensor};

use super::{check, gpu_path::is_as_on_gpu, processor::shortcuts};

unsafe extern "C" {
    fn lvdm_group_norm(
        x: *const c_void,
        scale: *const c_void,
        shift: *const c_void,
        groups: i64,
        eps: f64,
        silu: bool,
        y: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_frame_attention(
        qkv: *const c_void,
        keys: *const c_void,
        values: *const c_void,
        heads: i64,
        alpha: f64,
        beta: f64,
        transposed: bool,
        y: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_transposed_conv(
        x: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        stride: *const i64,
        crop: i64,
        y: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_repeat_edges(x: *const c_void, pads: *const i64, y: *mut *mut c_void) -> *mut c_char;
}

/// Whether the kernels of this file can take this tensor, and are faster on this processor (see
/// [`Shortcuts`](super::Shortcuts)).
pub fn fuses(x: &Tensor) -> bool {
    x.device() == Device::Cpu && x.kind() == Kind::Float && shortcuts().kernels && !is_as_on_gpu()
}

fn checked(x: &Tensor, shape: &[i64]) -> Tensor {
    assert!(fuses(x) && x.size() == shape, "float32 on the CPU of shape {shape:?} is needed, not {x:?}");
    x.contiguous()
}

pub(super) fn output(call: impl FnOnce(*mut *mut c_void) -> *mut c_char) -> Tensor {
    let mut y = std::ptr::null_mut();
    check(call(&mut y)).unwrap_or_else(|error| panic!("{error}"));
    // SAFETY: without an error `y` is a tensor handed over to us.
    unsafe { Tensor::from_ptr(y.cast()) }
}

/// Group norm of `[O, S, I, C]` over S and each group of channels, times `scale` plus `shift` (`[O, C]` or `[1, C]`),
/// then SiLU where it is asked for; the same shape. Differentiable once.
///
/// # Panics
/// On tensors of other shapes, devices or kinds.
pub fn group_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, groups: i64, eps: f64, silu: bool) -> Tensor {
    let (o, s, i, c) = x.size4().expect("[O, S, I, C]");
    assert!(c % groups == 0 && o * s * i > 0, "{c} channels in {groups} groups");
    let rows = if scale.size()[0] == 1 { 1 } else { o };
    let (x, scale, shift) = (checked(x, &[o, s, i, c]), checked(scale, &[rows, c]), checked(shift, &[rows, c]));
    // SAFETY: live, dense tensors of the shapes that the kernel expects.
    output(|y| unsafe {
        lvdm_group_norm(x.as_ptr().cast(), scale.as_ptr().cast(), shift.as_ptr().cast(), groups, eps, silu, y)
    })
}

/// `[B, C, F, H, W]` with its edges repeated: `pads` places before and behind W, then H, then F. Differentiable once.
///
/// # Panics
/// On tensors of other shapes, devices or kinds, and without a place to repeat.
pub fn repeat_edges(x: &Tensor, pads: [i64; 6]) -> Tensor {
    assert!(fuses(x) && x.dim() == 5 && x.numel() > 0, "a float32 video on the CPU is needed, not {x:?}");
    assert!(pads.iter().all(|&pad| pad >= 0), "pads of {pads:?}");
    // SAFETY: a live tensor and six numbers.
    output(|y| unsafe { lvdm_repeat_edges(x.as_ptr().cast(), pads.as_ptr(), y) })
}

/// Transposed 3D convolution of `[B, C, F, H, W]` by `[C, outputs, k, k, k]`, cut by `crop` on every side.
/// Differentiable once.
///
/// # Panics
/// On tensors of other shapes, devices or kinds.
pub fn transposed_conv(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: [i64; 3], crop: i64) -> Tensor {
    assert!(
        [x, weight, bias].iter().all(|t| fuses(t)),
        "float32 on the CPU is needed, not {x:?}, {weight:?}, {bias:?}"
    );
    // SAFETY: live tensors, whose shapes LibTorch checks, and three numbers.
    output(|y| unsafe {
        let [x, weight, bias] = [x, weight, bias].map(|t| t.as_ptr().cast::<c_void>());
        lvdm_transposed_conv(x, weight, bias, stride.as_ptr(), crop, y)
    })
}

/// How relative positions enter [`frame_attention`].
#[derive(Debug, Clone, Copy)]
pub struct PositionTerms {
    /// score[t, s] = α q_t·k_s + β q_t·R[t, s], or, transposed, … + β q_s·R[s, t].
    pub alpha: f64,
    /// Of the position term.
    pub beta: f64,
    /// Whether the position term is β q_s·R[s, t], as in the released code.
    pub transposed: bool,
}

/// Attention over the frames of each position: qkv `[B, F, P, 3·C]`, key and value rows `[F, F, C/heads]`
/// → `[B, F, P, C]`. Differentiable once.
///
/// # Panics
/// On tensors of other shapes, devices or kinds.
pub fn frame_attention(qkv: &Tensor, keys: &Tensor, values: &Tensor, heads: i64, terms: PositionTerms) -> Tensor {
    let (b, f, p, c) = qkv.size4().expect("[B, F, P, 3·C]");
    assert!(c % (3 * heads) == 0, "{c} channels of q, k and v in {heads} heads");
    let rows = [f, f, c / 3 / heads];
    let (qkv, keys, values) = (checked(qkv, &[b, f, p, c]), checked(keys, &rows), checked(values, &rows));
    let PositionTerms { alpha, beta, transposed } = terms;
    // SAFETY: live, dense tensors of the shapes that the kernel expects.
    output(|y| unsafe {
        let (keys, values) = (keys.as_ptr().cast(), values.as_ptr().cast());
        lvdm_frame_attention(qkv.as_ptr().cast(), keys, values, heads, alpha, beta, transposed, y)
    })
}
