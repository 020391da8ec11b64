//! Automatic mixed precision: matrix products and convolutions in bfloat16, the rest in float32.

use std::{ffi::c_int, marker::PhantomData, sync::Once};

use tch::{Device, Tensor};

use super::{
    gpu_path::is_as_on_gpu,
    processor::{Bfloat16, processor},
    rounded_weights::go_back,
};

unsafe extern "C" {
    fn lvdm_autocast_set(device_type: c_int, enabled: bool, bfloat16: bool);
    fn lvdm_autocast_get(device_type: c_int) -> bool;
}

/// While it lives, this thread's LibTorch calls on the device run in mixed precision.
pub struct Autocast {
    device_type: c_int,
    before: bool,
    // the state belongs to the thread
    _not_send: PhantomData<*const ()>,
}

impl Autocast {
    /// Mixed precision with bfloat16 on this device, or, where `enabled` is false, full precision. On a processor without
    /// instructions for bfloat16 one line says that float32 is faster.
    pub fn bfloat16(device: Device, enabled: bool) -> Self {
        static SAID: Once = Once::new();
        if enabled && device == Device::Cpu && processor().bfloat16 != Bfloat16::Native && !is_as_on_gpu() {
            SAID.call_once(|| {
                let name = &processor().name;
                tracing::warn!("{name} has no instructions for bfloat16, which is emulated: float32 is faster here");
            });
        }
        let device_type = if device.is_cuda() { 1 } else { 0 };
        // SAFETY: sets a thread-local flag of LibTorch; 0 and 1 are its CPU and CUDA.
        let before = unsafe {
            let before = lvdm_autocast_get(device_type);
            lvdm_autocast_set(device_type, enabled, enabled);
            before
        };
        Autocast { device_type, before, _not_send: PhantomData }
    }
}

impl Autocast {
    /// Whether this thread's calls on the device run in mixed precision.
    pub fn is_on(device: Device) -> bool {
        // SAFETY: reads a thread-local flag of LibTorch.
        unsafe { lvdm_autocast_get(if device.is_cuda() { 1 } else { 0 }) }
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { lvdm_autocast_set(self.device_type, self.before, false) }
    }
}

/// Adds the gradients of a scalar to those of the parameters it comes from. The operations of the way back take the
/// precision that the way there had; mixed precision does not choose it anew.
pub fn backward(loss: &Tensor) {
    let _precision = Autocast::bfloat16(loss.device(), false);
    go_back();
    loss.backward();
}

/// The gradient of a scalar by one tensor, in the precision of [`backward`]; parameters gain none. Without `keep_graph` there
/// is no second one through the same operations.
pub fn gradient(of: &Tensor, by: &Tensor, keep_graph: bool) -> Tensor {
    let _precision = Autocast::bfloat16(of.device(), false);
    Tensor::run_backward(&[of], &[by], keep_graph, false).remove(0)
}
