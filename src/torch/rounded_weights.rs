//! Weights in bfloat16 while a network is trained in mixed precision on a GPU.

use std::{
    ffi::{c_char, c_void},
    marker::PhantomData,
    ptr::{NonNull, null_mut},
};

use tch::Device;

use super::{Autocast, check, has_gpu_kernels};

unsafe extern "C" {
    fn lvdm_rounded_weights() -> *mut c_void;
    fn lvdm_rounded_weights_free(weights: *mut c_void);
    fn lvdm_rounded_weights_begin(weights: *mut c_void, before: *mut *mut c_void) -> *mut c_char;
    fn lvdm_rounded_weights_end(before: *mut c_void);
    fn lvdm_rounded_weights_go_back();
}

/// The weights that passes through a network take in bfloat16. The first pass finds out which these are; all later ones cast
/// them in a few launches, where [`Autocast`] would take one for each weight and one more for its gradient.
pub struct RoundedWeights(NonNull<c_void>);

/// A pass, forward and backward, as long as it lives.
pub struct RoundedPass<'a> {
    before: *mut c_void,
    // the pass is a thread's
    _weights: PhantomData<(&'a RoundedWeights, *const ())>,
}

impl RoundedWeights {
    /// Of no weights yet.
    #[expect(clippy::new_without_default, reason = "a default would not say that it is of a network's passes")]
    pub fn new() -> Self {
        // SAFETY: a new object, ours to free.
        RoundedWeights(NonNull::new(unsafe { lvdm_rounded_weights() }).expect("what `new` returns"))
    }

    /// Casts the weights for a pass of this thread. None outside of mixed precision, and where a GPU has no kernels for it.
    ///
    /// # Panics
    /// Where LibTorch does.
    pub fn pass(&mut self, device: Device) -> Option<RoundedPass<'_>> {
        if !Autocast::is_on(device) || !has_gpu_kernels(device) {
            return None;
        }
        let mut before = null_mut();
        // SAFETY: a live object, which outlives the pass.
        check(unsafe { lvdm_rounded_weights_begin(self.0.as_ptr(), &mut before) })
            .unwrap_or_else(|error| panic!("{error}"));
        Some(RoundedPass { before, _weights: PhantomData })
    }
}

/// A way back begins: weights that it does not need are no longer held for the forward pass of this thread, if it is in one.
pub(super) fn go_back() {
    // SAFETY: changes an object of this thread.
    unsafe { lvdm_rounded_weights_go_back() }
}

impl Drop for RoundedWeights {
    fn drop(&mut self) {
        // SAFETY: ours, freed once, and no pass is left.
        unsafe { lvdm_rounded_weights_free(self.0.as_ptr()) }
    }
}

impl Drop for RoundedPass<'_> {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { lvdm_rounded_weights_end(self.before) }
    }
}
