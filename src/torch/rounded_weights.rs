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

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;
    use crate::torch::{as_on_gpu, cast_weight, cast_weights, recompute};

    /// Weights that a block takes once more on the way back have the same gradients as where its activations are kept, pass
    /// after pass; some are taken outside of it too, and some stand side by side.
    #[test]
    fn a_block_that_is_computed_again() {
        tch::manual_seed(1);
        let weights: Vec<Tensor> =
            (0..4).map(|_| Tensor::randn([8, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true)).collect();
        let x = Tensor::randn([5, 8], (Kind::Float, Device::Cpu));
        let block = |weights: &[Tensor], x: &Tensor| {
            let h = x.linear(&cast_weights(&[&weights[0], &weights[1]]), None::<Tensor>).gelu("none");
            (h.narrow(1, 0, 8) * h.narrow(1, 8, 8)).linear(&cast_weight(&weights[2]), None::<Tensor>)
        };
        let run = |again: bool| -> Vec<Tensor> {
            let _autocast = Autocast::bfloat16(Device::Cpu, true);
            let copies = || weights.iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
            as_on_gpu(|| {
                let mut rounded = RoundedWeights::new();
                for _ in 0..3 {
                    let _pass = rounded.pass(Device::Cpu);
                    let x = x.linear(&cast_weight(&weights[3]), None::<Tensor>);
                    let (of, x) = (copies(), x.to_kind(Kind::Float));
                    let y = if again { recompute(&[&x], move |x| block(&of, &x[0])) } else { block(&of, &x) };
                    y.linear(&cast_weight(&weights[3]), None::<Tensor>).square().sum(Kind::Float).backward();
                }
            });
            weights.iter().map(|weight| weight.grad().copy()).collect()
        };
        let found = run(true);
        weights.iter().for_each(|weight| weight.shallow_clone().zero_grad());
        for (found, wanted) in found.iter().zip(&run(false)) {
            let error = ((found - wanted).norm() / wanted.norm()).double_value(&[]);
            assert!(wanted.norm().double_value(&[]) > 0.0 && error < 1e-6, "{error}");
        }
    }
}
