//! How much memory tensors need.

use std::{
    ffi::{c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use tch::Device;

use super::check;

unsafe extern "C" {
    fn lvdm_peak_host_memory(data: *mut c_void, call: unsafe extern "C" fn(*mut c_void), peak: *mut i64)
    -> *mut c_char;
    fn lvdm_host_memory_now() -> i64;
    fn lvdm_device_memory(index: c_int, reset: bool, peak: *mut i64) -> *mut c_char;
}

/// Runs `body` and says how many bytes of tensors it held at most on the device: on a GPU by LibTorch's allocator, with
/// what was there before; on the CPU as [`peak_host_memory`].
pub fn peak_memory<T>(device: Device, body: impl FnOnce() -> T) -> (T, i64) {
    let Device::Cuda(index) = device else { return peak_host_memory(body) };
    let mut peak = 0;
    // SAFETY: plain numbers in and out.
    let reset = check(unsafe { lvdm_device_memory(index as c_int, true, &mut peak) });
    let value = body();
    tch::Cuda::synchronize(index as i64);
    // SAFETY: as above.
    let read = check(unsafe { lvdm_device_memory(index as c_int, false, &mut peak) });
    (value, if reset.and(read).is_ok() { peak } else { 0 })
}

/// The most memory that this process has taken so far, in bytes: of a GPU what its tensors held, else what of the
/// process lay in the machine's memory. None where the system does not say.
pub fn memory_so_far(device: Device) -> Option<i64> {
    if let Device::Cuda(index) = device {
        let mut peak = 0;
        // SAFETY: plain numbers in and out.
        return check(unsafe { lvdm_device_memory(index as c_int, false, &mut peak) }).ok().map(|()| peak);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// The bytes of host tensors that the body of the [`peak_host_memory`] which runs now holds, beyond those before; 0 outside of
/// one.
pub fn host_memory_now() -> i64 {
    // SAFETY: a number out.
    unsafe { lvdm_host_memory_now() }
}

/// Runs `body` and says how many bytes of host tensors this thread held at most, beyond those before.
pub fn peak_host_memory<T>(body: impl FnOnce() -> T) -> (T, i64) {
    struct Call<F, T> {
        body: Option<F>,
        result: Option<std::thread::Result<T>>,
    }
    unsafe extern "C" fn run<F: FnOnce() -> T, T>(data: *mut c_void) {
        // SAFETY: `data` is the `Call` below, borrowed for the length of the C++ call.
        let call = unsafe { &mut *data.cast::<Call<F, T>>() };
        let body = call.body.take().expect("called once");
        call.result = Some(catch_unwind(AssertUnwindSafe(body)));
    }
    fn of<F: FnOnce() -> T, T>(_: &Call<F, T>) -> unsafe extern "C" fn(*mut c_void) {
        run::<F, T>
    }
    let mut call = Call { body: Some(body), result: None };
    let entry = of(&call);
    let mut peak = 0;
    // SAFETY: `entry` matches the type behind `data`.
    check(unsafe { lvdm_peak_host_memory((&raw mut call).cast(), entry, &mut peak) })
        .expect("installing a memory observer does not fail");
    match call.result.expect("the body was run") {
        Ok(value) => (value, peak),
        Err(panic) => resume_unwind(panic),
    }
}
