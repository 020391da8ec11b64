//! Arithmetic on all parameters of a network in one call.

use std::{
    ffi::{c_char, c_void},
    ptr::{null, null_mut},
};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{check, pointers};

unsafe extern "C" {
    fn lvdm_fused_adam(
        parameters: *const *mut c_void,
        gradients: *const *mut c_void,
        first_moments: *const *mut c_void,
        second_moments: *const *mut c_void,
        steps: *const c_void,
        count: i64,
        decoupled: bool,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        left_out: *const c_void,
    ) -> *mut c_char;
    fn lvdm_gpu_prepare_step(
        checked: *const c_void,
        rate: *const c_void,
        steps: *const c_void,
        average: AverageOfWeights,
        beta1: f64,
        beta2: f64,
        max_norm: f64,
        numbers: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_gpu_adam(
        parameters: *const *mut c_void,
        gradients: *const *mut c_void,
        first_moments: *const *mut c_void,
        second_moments: *const *mut c_void,
        average: *const *mut c_void,
        count: i64,
        numbers: *const c_void,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        decoupled: bool,
    ) -> *mut c_char;
    fn lvdm_foreach_lerp(a: *const *mut c_void, b: *const *mut c_void, count: i64, weight: f64) -> *mut c_char;
    fn lvdm_foreach_mul(a: *const *mut c_void, count: i64, factor: *const c_void) -> *mut c_char;
    fn lvdm_clear_gradients(parameters: *const *mut c_void, count: i64) -> *mut c_char;
    fn lvdm_global_norm(a: *const *mut c_void, count: i64, norm: *mut *mut c_void) -> *mut c_char;
}

/// An average, as C++ takes it.
#[repr(C)]
struct AverageOfWeights {
    updates: *const c_void,
    decay: f64,
    warmup: bool,
}

/// How a moving average of the weights counts its updates and weighs them.
#[derive(Clone, Copy)]
pub struct AverageDecay<'a> {
    /// A float64 scalar on the device: how many there were.
    pub updates: &'a Tensor,
    /// What is kept of the average at an update.
    pub decay: f64,
    /// At the n-th it is at most (1 + n)/(10 + n).
    pub warmup: bool,
}

/// Constants of Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019).
#[derive(Debug, Clone, Copy)]
pub struct Adam {
    /// Of this step.
    pub learning_rate: f64,
    /// Decay of the two moments.
    pub betas: (f64, f64),
    /// Decoupled for AdamW, else added to the gradient.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// True for AdamW: the decay acts on the weights, not on the gradients.
    pub decoupled: bool,
}

impl Adam {
    /// One step for all parameters in one call. `steps` is a float32 scalar, which counts the steps with this one. Nothing
    /// changes where `left_out` is one.
    ///
    /// # Errors
    /// LibTorch's own, for tensors that do not fit together.
    pub fn step(
        &self,
        parameters: &[Tensor],
        gradients: &[Tensor],
        moments: [&[Tensor]; 2],
        steps: &Tensor,
        left_out: Option<&Tensor>,
    ) -> Result<()> {
        if parameters.is_empty() {
            return Ok(());
        }
        let [first, second] = moments;
        // SAFETY: four lists of `count` live tensors; a live tensor, and one or none.
        check(unsafe {
            lvdm_fused_adam(
                pointers(parameters).as_ptr(),
                pointers(gradients).as_ptr(),
                pointers(first).as_ptr(),
                pointers(second).as_ptr(),
                steps.as_ptr().cast(),
                parameters.len() as i64,
                self.decoupled,
                self.learning_rate,
                self.betas.0,
                self.betas.1,
                self.weight_decay,
                self.eps,
                left_out.map_or(std::ptr::null(), |t| t.as_ptr().cast()),
            )
        })
    }

    /// Counts a step on a GPU and computes there what all parameters share, for [`Self::step_on_gpu`]. `checked` are float64 numbers,
    /// of which the last is the norm of the gradients: unless all are finite, nothing is counted and nothing will move. The
    /// gradients are scaled down to `max_norm`. `rate` is a float64 scalar, in place of [`Self::learning_rate`], and `steps` one
    /// of float32, how many there were. Where [`has_gpu_kernels`](super::has_gpu_kernels) says so.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn prepare_on_gpu(
        &self,
        checked: Option<&Tensor>,
        rate: &Tensor,
        steps: &Tensor,
        max_norm: Option<f64>,
        average: Option<AverageDecay>,
    ) -> Result<Tensor> {
        let average = match average {
            Some(AverageDecay { updates, decay, warmup }) => {
                AverageOfWeights { updates: updates.as_ptr().cast(), decay, warmup }
            }
            None => AverageOfWeights { updates: null(), decay: 0.0, warmup: false },
        };
        let mut numbers = null_mut();
        // SAFETY: live tensors or none; `numbers` receives an owned tensor where there is no error.
        unsafe {
            check(lvdm_gpu_prepare_step(
                checked.map_or(null(), |t| t.as_ptr().cast()),
                rate.as_ptr().cast(),
                steps.as_ptr().cast(),
                average,
                self.betas.0,
                self.betas.1,
                max_norm.unwrap_or(-1.0),
                &mut numbers,
            ))?;
            Ok(Tensor::from_ptr(numbers.cast()))
        }
    }

    /// One step for all parameters, which are float32, and of the averages of their weights, in few launches.
    ///
    /// # Errors
    /// LibTorch's own, for tensors that do not fit together.
    pub fn step_on_gpu(
        &self,
        parameters: &[Tensor],
        gradients: &[Tensor],
        moments: [&[Tensor]; 2],
        average: Option<&[Tensor]>,
        numbers: &Tensor,
    ) -> Result<()> {
        let count = parameters.len();
        assert!([gradients, moments[0], moments[1], average.unwrap_or(gradients)].iter().all(|all| all.len() == count));
        let [first, second] = moments.map(pointers);
        let average = average.map(pointers);
        // SAFETY: lists of `count` live tensors, of which the last may be none; a live tensor.
        check(unsafe {
            lvdm_gpu_adam(
                pointers(parameters).as_ptr(),
                pointers(gradients).as_ptr(),
                first.as_ptr(),
                second.as_ptr(),
                average.as_ref().map_or(null(), |all| all.as_ptr()),
                count as i64,
                numbers.as_ptr().cast(),
                self.betas.0,
                self.betas.1,
                self.weight_decay,
                self.eps,
                self.decoupled,
            )
        })
    }
}

/// a ← a + weight·(b − a) for every pair.
///
/// # Errors
/// LibTorch's own, for tensors that do not fit together.
pub fn lerp_all(a: &[Tensor], b: &[Tensor], weight: f64) -> Result<()> {
    if a.is_empty() {
        return Ok(());
    }
    assert_eq!(a.len(), b.len());
    // SAFETY: two lists of the same length of live tensors.
    check(unsafe { lvdm_foreach_lerp(pointers(a).as_ptr(), pointers(b).as_ptr(), a.len() as i64, weight) })
}

/// Forgets the gradients: the next backward pass hands over its own instead of adding them to zeros.
///
/// # Errors
/// LibTorch's own.
pub fn clear_gradients(parameters: &[Tensor]) -> Result<()> {
    // SAFETY: a list of live tensors.
    check(unsafe { lvdm_clear_gradients(pointers(parameters).as_ptr(), parameters.len() as i64) })
}

/// The L2 norm over all gradients: a scalar on their device.
///
/// # Errors
/// LibTorch's own.
pub fn global_norm(gradients: &[Tensor]) -> Result<Tensor> {
    if gradients.is_empty() {
        return Ok(Tensor::zeros([], (Kind::Float, Device::Cpu)));
    }
    let mut norm = null_mut();
    // SAFETY: a list of live tensors; `norm` receives an owned tensor when there is no error.
    unsafe {
        check(lvdm_global_norm(pointers(gradients).as_ptr(), gradients.len() as i64, &mut norm))?;
        Ok(Tensor::from_ptr(norm.cast()))
    }
}

/// Scales gradients of this norm down to the largest that is allowed.
///
/// # Errors
/// LibTorch's own.
pub fn clip_to_norm(gradients: &[Tensor], norm: &Tensor, max_norm: f64) -> Result<()> {
    if gradients.is_empty() {
        return Ok(());
    }
    let factor = (max_norm / (norm + 1e-6)).clamp_max(1.0);
    // SAFETY: a list of live tensors and a live scalar.
    check(unsafe { lvdm_foreach_mul(pointers(gradients).as_ptr(), gradients.len() as i64, factor.as_ptr().cast()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The norm is that over all tensors together; they are scaled to the largest that is allowed, in their places, and
    /// left alone below it.
    #[test]
    fn clipping_scales_to_the_norm_that_is_allowed() {
        let gradients =
            || [Tensor::from_slice(&[3.0f32, 0.0]), Tensor::from_slice(&[[0.0f32, 4.0], [12.0, 0.0]].concat())];
        let values = |tensors: &[Tensor]| -> Vec<f64> {
            tensors.iter().flat_map(|t| Vec::<f64>::try_from(t).unwrap()).collect()
        };
        let whole = [3.0, 0.0, 0.0, 4.0, 12.0, 0.0];
        for (max_norm, factor) in [(None, 1.0), (Some(6.5), 0.5), (Some(13.1), 1.0), (Some(0.13), 0.01)] {
            let clipped = gradients();
            let norm = global_norm(&clipped).unwrap();
            if let Some(most) = max_norm {
                clip_to_norm(&clipped, &norm, most).unwrap();
            }
            let norm = norm.double_value(&[]);
            assert_eq!(norm, 13.0, "{max_norm:?}: of the gradients as they were");
            for (found, value) in values(&clipped).iter().zip(whole) {
                assert!((found - value * factor).abs() < 1e-5, "{max_norm:?}: {:?}", values(&clipped));
            }
        }
        assert_eq!(global_norm(&[]).unwrap().double_value(&[]), 0.0);
    }
}
