//! Between host and device without waiting.

use std::ffi::{c_char, c_int, c_void};

use anyhow::Result;
use tch::{Device, Tensor};

use super::check;

unsafe extern "C" {
    fn lvdm_upload(x: *const c_void, device: c_int, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_readback(values: *const c_void, readback: *mut *mut c_void) -> *mut c_char;
    fn lvdm_readback_wait(readback: *const c_void, values: *mut *mut c_void) -> *mut c_char;
    fn lvdm_readback_free(readback: *mut c_void);
}

/// A tensor on this device. To a GPU it goes from pinned memory, and the host does not wait for it.
///
/// # Panics
/// Where LibTorch refuses, as ordinary `tch` calls do.
pub fn upload(x: &Tensor, device: Device) -> Tensor {
    let (Device::Cpu, Device::Cuda(index)) = (x.device(), device) else { return x.to_device(device) };
    let mut y = std::ptr::null_mut();
    // SAFETY: a live tensor; `y` receives an owned tensor where there is no error.
    unsafe {
        check(lvdm_upload(x.as_ptr().cast(), index as c_int, &mut y)).unwrap_or_else(|error| panic!("{error}"));
        Tensor::from_ptr(y.cast())
    }
}

/// A tensor on its way to the host. Nothing waits before [`Self::wait`], and that only for what the tensor comes from,
/// not for what was begun since.
pub struct Readback(*mut c_void);

impl Readback {
    /// Begins it.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn of(values: &Tensor) -> Result<Self> {
        let mut readback = std::ptr::null_mut();
        // SAFETY: a live tensor; `readback` receives an owned pointer where there is no error.
        check(unsafe { lvdm_readback(values.as_ptr().cast(), &mut readback) })?;
        Ok(Readback(readback))
    }

    /// The tensor, on the host.
    ///
    /// # Errors
    /// LibTorch's own, and those of the device on the way to these values.
    pub fn wait(&self) -> Result<Tensor> {
        let mut values = std::ptr::null_mut();
        // SAFETY: a live readback; `values` receives an owned tensor where there is no error.
        unsafe {
            check(lvdm_readback_wait(self.0, &mut values))?;
            Ok(Tensor::from_ptr(values.cast()))
        }
    }
}

impl Drop for Readback {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { lvdm_readback_free(self.0) }
    }
}
