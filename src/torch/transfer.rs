//! Between host and device, without waiting and in few transfers.

use std::ffi::{c_char, c_int, c_void};

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

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

/// Tensors go up together as long as they are no more bytes than this: what it takes beside them on both sides.
const PIECE: usize = 256 << 20;
/// Each begins at a multiple of so many bytes, as tensors of a GPU do that have memory of their own.
const ALIGNMENT: usize = 512;

/// Tensors on this device. To a GPU those of one kind go in few transfers, each of many tensors, which lie there without
/// gaps and share their memory.
///
/// # Panics
/// Where LibTorch refuses, as ordinary `tch` calls do.
pub fn upload_all(tensors: &[Tensor], device: Device) -> Vec<Tensor> {
    let mut placed: Vec<Option<Tensor>> = tensors.iter().map(|_| None).collect();
    let mut pieces: Vec<(Kind, usize, Vec<(usize, usize)>)> = Vec::new();
    for (i, tensor) in tensors.iter().enumerate() {
        if tensor.device() != Device::Cpu || !matches!(device, Device::Cuda(_)) {
            placed[i] = Some(tensor.to_device(device));
            continue;
        }
        let size = tensor.kind().elt_size_in_bytes();
        let length = (tensor.numel() * size).next_multiple_of(ALIGNMENT) / size;
        let fits = |(kind, held, _): &&mut (Kind, usize, _)| *kind == tensor.kind() && (held + length) * size <= PIECE;
        match pieces.iter_mut().rev().find(fits) {
            Some((_, held, members)) => {
                members.push((i, *held));
                *held += length;
            }
            None => pieces.push((tensor.kind(), length, vec![(i, 0)])),
        }
    }
    no_grad(|| {
        for (kind, length, members) in pieces {
            let host = Tensor::zeros([length as i64], (kind, Device::Cpu));
            let part = |all: &Tensor, (i, first): (usize, usize)| {
                let (size, stride) = (tensors[i].size(), strides(&tensors[i]));
                all.as_strided(&size[..], &stride[..], first as i64)
            };
            for &member in &members {
                part(&host, member).copy_(&tensors[member.0]);
            }
            let there = upload(&host, device);
            for &member in &members {
                placed[member.0] = Some(part(&there, member));
            }
        }
    });
    placed.into_iter().map(|tensor| tensor.expect("each has its place")).collect()
}

/// A tensor's own strides where its values lie in memory without gaps, in whatever order; else those of a plain copy.
fn strides(tensor: &Tensor) -> Vec<i64> {
    let (size, stride) = (tensor.size(), tensor.stride());
    let mut axes: Vec<(i64, i64)> = stride.iter().copied().zip(size).filter(|(_, n)| *n != 1).collect();
    axes.sort();
    let mut next = 1;
    let dense = axes.iter().all(|(stride, n)| *stride == std::mem::replace(&mut next, stride * n));
    if dense { stride } else { tensor.contiguous().stride() }
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
