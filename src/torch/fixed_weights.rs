//! What may be kept of weights while they do not change.

use std::{
    cell::RefCell,
    ffi::{c_char, c_void},
    marker::PhantomData,
};

use tch::Tensor;

use super::{
    check,
    fused::{fuses, output},
    processor::shortcuts,
};

unsafe extern "C" {
    fn lvdm_fixed_weights(begin: bool) -> bool;
    fn lvdm_weights_are_fixed() -> bool;
    fn lvdm_cast_weights(weights: *const *const c_void, count: i64, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_fixed_conv(
        x: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        stride: i64,
        padding: i64,
        in_float32: bool,
        in_bfloat16: bool,
        y: *mut *mut c_void,
    ) -> *mut c_char;
}

/// While it lives, this thread promises to change no weight. [`fixed_conv`] then keeps kernels in the order in which oneDNN
/// takes them, and [`cast_weight`] weights in half precision. On the CPU that takes 128 MiB at most, or of larger networks an
/// eighth of their weights' memory; on a GPU, in mixed precision, half of it.
pub struct FixedWeights {
    // the promise is a thread's
    _not_send: PhantomData<*const ()>,
}

thread_local! {
    /// What else is forgotten when this thread's weights may change again.
    static AT_END: RefCell<Vec<fn()>> = const { RefCell::new(Vec::new()) };
}

impl FixedWeights {
    /// Begins the promise. Where this thread has made it already, it holds until the outermost one ends.
    #[expect(clippy::new_without_default, reason = "a default would not say that something begins")]
    pub fn new() -> Self {
        // SAFETY: counts in a variable of this thread.
        unsafe { lvdm_fixed_weights(true) };
        FixedWeights { _not_send: PhantomData }
    }

    /// Runs `forget` once, when this thread's weights may change again. To be called while they are fixed.
    pub(super) fn at_end(forget: fn()) {
        AT_END.with_borrow_mut(|list| list.push(forget));
    }
}

impl Drop for FixedWeights {
    fn drop(&mut self) {
        // SAFETY: as above; forgets the kept weights at the end of the outermost.
        if !unsafe { lvdm_fixed_weights(false) } {
            AT_END.take().into_iter().for_each(|forget| forget());
        }
    }
}

/// Whether this thread's weights are fixed ([`FixedWeights`]) and it keeps no gradients.
pub(super) fn weights_are_fixed() -> bool {
    // SAFETY: reads variables of this thread.
    unsafe { lvdm_weights_are_fixed() }
}

/// A float32 weight as [`Autocast`](super::Autocast) would cast it at every call: kept while weights are fixed
/// ([`FixedWeights`]), or cast together with all others ([`RoundedWeights`](super::RoundedWeights)). Itself in full precision,
/// and elsewhere.
pub fn cast_weight(weight: &Tensor) -> Tensor {
    cast_weights(&[weight])
}

/// Several weights, one behind the other along their first axis, as [`cast_weight`] has each.
///
/// # Panics
/// On weights whose other axes differ, as ordinary `tch` calls do.
pub fn cast_weights(weights: &[&Tensor]) -> Tensor {
    let pointers: Vec<_> = weights.iter().map(|weight| weight.as_ptr().cast()).collect();
    // SAFETY: so many live tensors.
    output(|y| unsafe { lvdm_cast_weights(pointers.as_ptr(), pointers.len() as i64, y) })
}

/// Convolution of `[N, C, H, W]` by `[outputs, C, k, k]` by a kernel that oneDNN brings into its order once, in bfloat16 under
/// [`Autocast`](super::Autocast). None where weights may change (see [`FixedWeights`]), gradients are kept, the device is
/// another, or the processor's kernels cannot be kept (see [`Shortcuts`](super::Shortcuts)).
///
/// # Panics
/// Where LibTorch refuses the shapes, as ordinary `tch` calls do.
pub fn fixed_conv(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: i64, padding: i64) -> Option<Tensor> {
    if ![x, weight].into_iter().chain(bias).all(fuses) {
        return None;
    }
    let mut y = std::ptr::null_mut();
    // SAFETY: live tensors or none; without an error `y` is null or a tensor handed over to us.
    unsafe {
        let [x, weight] = [x, weight].map(|t| t.as_ptr().cast::<c_void>());
        let bias = bias.map_or(std::ptr::null(), |t| t.as_ptr().cast());
        let shortcuts = shortcuts();
        let call = lvdm_fixed_conv(
            x,
            weight,
            bias,
            stride,
            padding,
            shortcuts.prepacked_f32,
            shortcuts.prepacked_bf16,
            &mut y,
        );
        check(call).unwrap_or_else(|error| panic!("{error}"));
        (!y.is_null()).then(|| Tensor::from_ptr(y.cast()))
    }
}
