//! How much memory tensors need.

use std::ffi::{c_char, c_int, c_void};

use tch::Device;

use super::{check, through_cpp};

unsafe extern "C" {
    fn lvdm_peak_host_memory(data: *mut c_void, call: unsafe extern "C" fn(*mut c_void), peak: *mut i64)
    -> *mut c_char;
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

/// Runs `body` and says how many bytes of host tensors this thread held at most, beyond those before.
pub fn peak_host_memory<T>(body: impl FnOnce() -> T) -> (T, i64) {
    let mut peak = 0;
    let value = through_cpp(body, |data, call| {
        // SAFETY: `call` matches the type behind `data`.
        check(unsafe { lvdm_peak_host_memory(data, call, &mut peak) })
    });
    (value.expect("installing a memory observer does not fail"), peak)
}
