//! Automatic mixed precision: matrix products and convolutions in bfloat16, the rest in float32.

use std::{ffi::c_int, marker::PhantomData, sync::Once};

use tch::Device;

use super::{
    gpu_path::is_as_on_gpu,
    processor::{Bfloat16, processor},
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
