//! Between host and device, without waiting and in few transfers.

use std::ffi::{c_char, c_int, c_void};

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use super::{check, fused::output, graph::is_recording};

unsafe extern "C" {
    fn lvdm_upload(x: *const c_void, device: c_int, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_pin(x: *const c_void, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_pinned(bytes: i64, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_begin_copy(from: *const c_void, to: *mut c_void) -> *mut c_char;
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
    assert!(!is_recording(), "something comes from the host in the middle of it: {x:?}");
    let mut y = std::ptr::null_mut();
    // SAFETY: a live tensor; `y` receives an owned tensor where there is no error.
    unsafe {
        check(lvdm_upload(x.as_ptr().cast(), index as c_int, &mut y)).unwrap_or_else(|error| panic!("{error}"));
        Tensor::from_ptr(y.cast())
    }
}

/// This tensor of the host in memory from which the device's copies come without the host's help; as it is where the device is no
/// GPU.
///
/// # Panics
/// Where LibTorch refuses, as ordinary `tch` calls do.
pub fn pinned(x: Tensor, device: Device) -> Tensor {
    match device {
        // SAFETY: a live tensor.
        Device::Cuda(_) => output(|y| unsafe { lvdm_pin(x.as_ptr().cast(), y) }),
        _ => x,
    }
}

/// Tensors go up together as long as they are no more bytes than this: what it takes beside them on both sides.
const PIECE: usize = 256 << 20;
/// Each begins at a multiple of so many bytes, as tensors of a GPU do that have memory of their own.
const ALIGNMENT: usize = 512;

/// Tensors of one kind that go up together.
struct Piece {
    kind: Kind,
    length: usize,
    /// Their numbers, and where each begins.
    members: Vec<(usize, usize)>,
}

/// Tensors on this device. To a GPU those of one kind go in few transfers, each of many tensors, which share one piece of
/// memory there; their order in memory stays.
///
/// # Panics
/// Where LibTorch refuses, as ordinary `tch` calls do.
pub fn upload_all(tensors: &[Tensor], device: Device) -> Vec<Tensor> {
    let mut placed: Vec<Option<Tensor>> = tensors.iter().map(|_| None).collect();
    let mut pieces: Vec<Piece> = Vec::new();
    for (i, tensor) in tensors.iter().enumerate() {
        if tensor.device() != Device::Cpu || !matches!(device, Device::Cuda(_)) {
            placed[i] = Some(tensor.to_device(device));
            continue;
        }
        let size = tensor.kind().elt_size_in_bytes();
        let length = (tensor.numel() * size).next_multiple_of(ALIGNMENT) / size;
        let fits = |piece: &&mut Piece| piece.kind == tensor.kind() && (piece.length + length) * size <= PIECE;
        match pieces.iter_mut().rev().find(fits) {
            Some(piece) => {
                piece.members.push((i, piece.length));
                piece.length += length;
            }
            None => pieces.push(Piece { kind: tensor.kind(), length, members: vec![(i, 0)] }),
        }
    }
    no_grad(|| {
        for Piece { kind, length, members } in pieces {
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

// SAFETY: an event of the device may be waited for, and a tensor let go, by any thread.
unsafe impl Send for Readback {}

/// Pinned memory, in which tensors of a GPU are copied again and again.
#[derive(Default)]
pub struct PinnedMemory {
    blocks: Vec<Tensor>,
}

/// Tensors go into blocks of so many bytes: LibTorch pins a power of two in any case.
const BLOCK: usize = 256 << 20;
/// Each begins at a multiple of so many bytes.
const BEGIN: usize = 64;

impl PinnedMemory {
    /// Copies of a GPU's tensors in this memory, in the place of those that were there before. They come on their own: the
    /// answer says when they are there, and steps that are queued from now on do not change them.
    ///
    /// # Errors
    /// LibTorch's own; too little memory.
    pub fn hold(&mut self, tensors: &[&Tensor]) -> Result<(Vec<Tensor>, Readback)> {
        let bytes = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()).next_multiple_of(BEGIN);
        let (mut sizes, mut places) = (Vec::<usize>::new(), Vec::new());
        for tensor in tensors {
            match sizes.last_mut().filter(|size| **size + bytes(tensor) <= BLOCK) {
                Some(size) => *size += bytes(tensor),
                None => sizes.push(bytes(tensor)),
            }
            places.push((sizes.len() - 1, sizes[sizes.len() - 1] - bytes(tensor)));
        }
        for (i, size) in sizes.iter().enumerate() {
            if self.blocks.get(i).is_some_and(|block| block.numel() >= *size) {
                continue;
            }
            let mut block = std::ptr::null_mut();
            // SAFETY: a number; `block` receives an owned tensor where there is no error.
            let block = unsafe {
                check(lvdm_pinned(*size as i64, &mut block))?;
                Tensor::from_ptr(block.cast())
            };
            if i < self.blocks.len() { self.blocks[i] = block } else { self.blocks.push(block) }
        }
        let mut copies = Vec::new();
        for (tensor, (block, first)) in tensors.iter().zip(places) {
            let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
            let part = self.blocks[block].f_narrow(0, first as i64, length as i64)?;
            let copy = part.f_view_dtype(tensor.kind())?.f_view(tensor.size().as_slice())?;
            // SAFETY: live tensors of one shape and kind.
            check(unsafe { lvdm_begin_copy(tensor.as_ptr().cast(), copy.as_ptr().cast_mut().cast()) })?;
            copies.push(copy);
        }
        // what comes after them in the device's order comes when they are there
        let device = tensors.first().map_or(Device::Cpu, |t| t.device());
        let last = Readback::of(&Tensor::f_zeros([1i64], (Kind::Uint8, device))?)?;
        Ok((copies, last))
    }
}

impl Drop for Readback {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { lvdm_readback_free(self.0) }
    }
}
