//! Processes that train together: where they meet, what they sum.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    net::IpAddr,
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use libloading::os::unix::{Library, RTLD_NOW};
use tch::{Kind, Tensor};

use super::{backend::GpuPart, check, free, pointers};

unsafe extern "C" {
    fn lvdm_store_open(
        host: *const c_char,
        port: u16,
        server: bool,
        timeout: i64,
        store: *mut *mut c_void,
        chosen: *mut u16,
    ) -> *mut c_char;
    fn lvdm_store_under(store: *const c_void, prefix: *const c_char, under: *mut *mut c_void) -> *mut c_char;
    fn lvdm_store_free(store: *mut c_void);
    fn lvdm_store_set(store: *const c_void, key: *const c_char, value: *const u8, length: usize) -> *mut c_char;
    fn lvdm_store_get(store: *const c_void, key: *const c_char, value: *mut *mut u8, length: *mut usize)
    -> *mut c_char;
    fn lvdm_store_has(store: *const c_void, key: *const c_char, has: *mut bool) -> *mut c_char;
    fn lvdm_group_open(
        store: *const c_void,
        rank: c_int,
        size: c_int,
        timeout: i64,
        devices: *const c_void,
        group: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_gloo_listen(interfaces: *const c_char, address: *const c_char, devices: *mut *mut c_void) -> *mut c_char;
    fn lvdm_gloo_free(devices: *mut c_void);
    fn lvdm_group_add_device(group: *mut c_void, device: *mut c_void);
    fn lvdm_group_sum_by_host(group: *const c_void);
    fn lvdm_group_free(group: *mut c_void);
    fn lvdm_group_failed(group: *const c_void) -> bool;
    fn lvdm_group_settle(group: *const c_void) -> *mut c_char;
    fn lvdm_group_abort(group: *const c_void) -> *mut c_char;
    fn lvdm_group_sum(group: *const c_void, tensor: *mut c_void) -> *mut c_char;
    fn lvdm_group_broadcast(group: *const c_void, tensor: *mut c_void, root: c_int) -> *mut c_char;
    fn lvdm_group_gather(group: *const c_void, tensor: *mut c_void, all: *const *mut c_void) -> *mut c_char;
    fn lvdm_group_gather_to(
        group: *const c_void,
        tensor: *mut c_void,
        root: c_int,
        all: *const *mut c_void,
    ) -> *mut c_char;
    fn lvdm_group_sum_with_gradient(group: *const c_void, x: *const c_void, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_buckets_new(
        group: *const c_void,
        parameters: *const *mut c_void,
        count: i64,
        flats: *const *mut c_void,
        counts: *const i64,
        buckets_count: i64,
        buckets: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_buckets_free(buckets: *mut c_void);
    fn lvdm_buckets_arm(buckets: *const c_void);
    fn lvdm_buckets_finish(buckets: *const c_void, reduced: *mut Reduced) -> *mut c_char;
}

fn text(text: &str) -> Result<CString> {
    CString::new(text).with_context(|| format!("{text:?} holds a zero byte"))
}

fn milliseconds(time: Duration) -> i64 {
    time.as_millis().min(i64::MAX as u128) as i64
}

/// Keys and values that all processes see: c10d's `TCPStore`, which one of them (or their launcher) serves.
pub struct Store {
    store: *mut c_void,
    port: u16,
}

// SAFETY: a TCPStore guards its connection by a lock of its own.
unsafe impl Send for Store {}

impl Store {
    /// Serves a store on this machine, to all that reach it, at this port or (0) at any free one; it lives as long as
    /// this value. `timeout` bounds the waiting for each key.
    ///
    /// # Errors
    /// A port in use (the text names EADDRINUSE); no port to be had.
    pub fn serve(port: u16, timeout: Duration) -> Result<Self> {
        Self::open("127.0.0.1", port, true, timeout)
    }

    /// Joins the store that is served at `host:port`. `timeout` bounds the waiting for the server and for each key.
    ///
    /// # Errors
    /// Nobody who answers.
    pub fn join(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        Self::open(host, port, false, timeout)
    }

    fn open(host: &str, port: u16, server: bool, timeout: Duration) -> Result<Self> {
        let (mut store, mut chosen) = (std::ptr::null_mut(), 0);
        // SAFETY: `store` receives an owned pointer where there is no error.
        check(unsafe {
            lvdm_store_open(text(host)?.as_ptr(), port, server, milliseconds(timeout), &mut store, &mut chosen)
        })?;
        Ok(Store { store, port: chosen })
    }

    /// The same store, with a prefix before each key.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn under(&self, prefix: &str) -> Result<Self> {
        let mut store = std::ptr::null_mut();
        // SAFETY: a live store; `store` receives an owned pointer that shares it.
        check(unsafe { lvdm_store_under(self.store, text(prefix)?.as_ptr(), &mut store) })?;
        Ok(Store { store, port: self.port })
    }

    /// Where the store listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// # Errors
    /// A server that is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        // SAFETY: a live store and a slice.
        check(unsafe { lvdm_store_set(self.store, text(key)?.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// The value of a key, once there is one.
    ///
    /// # Errors
    /// A server that is gone; nobody who sets the key within the timeout.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        let (mut value, mut length) = (std::ptr::null_mut(), 0);
        // SAFETY: a live store; where there is no error, `value` is `length` bytes of malloc's, ours to free.
        unsafe {
            check(lvdm_store_get(self.store, text(key)?.as_ptr(), &mut value, &mut length))?;
            let bytes = std::slice::from_raw_parts(value, length).to_vec();
            free(value.cast());
            Ok(bytes)
        }
    }

    /// Whether a key has a value.
    ///
    /// # Errors
    /// A server that is gone.
    pub fn has(&self, key: &str) -> Result<bool> {
        let mut has = false;
        // SAFETY: a live store.
        check(unsafe { lvdm_store_has(self.store, text(key)?.as_ptr(), &mut has) })?;
        Ok(has)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { lvdm_store_free(self.store) }
    }
}

/// Where Gloo listens for other processes.
pub struct Listener {
    devices: *mut c_void,
}

impl Listener {
    /// At the addresses of these network interfaces, between commas.
    ///
    /// # Errors
    /// One that is not there.
    pub fn on(interfaces: &str) -> Result<Self> {
        let mut devices = std::ptr::null_mut();
        // SAFETY: `devices` receives an owned pointer where there is no error.
        check(unsafe { lvdm_gloo_listen(text(interfaces)?.as_ptr(), std::ptr::null(), &mut devices) })?;
        Ok(Listener { devices })
    }

    /// At an address of this machine.
    ///
    /// # Errors
    /// One that is not this machine's.
    pub fn at(address: IpAddr) -> Result<Self> {
        let mut devices = std::ptr::null_mut();
        // SAFETY: as above.
        check(unsafe { lvdm_gloo_listen(std::ptr::null(), text(&address.to_string())?.as_ptr(), &mut devices) })?;
        Ok(Listener { devices })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; a group has its own share.
        unsafe { lvdm_gloo_free(self.devices) }
    }
}

/// A group of processes that sum, spread and gather tensors: Gloo for those of the host, NCCL for those of a GPU
/// ([`Self::add_gpu`]).
/// All of them must make the same calls in the same order. Cloning shares it.
#[derive(Clone)]
pub struct ProcessGroup {
    group: Rc<GroupPointer>,
    size: usize,
}

struct GroupPointer(*mut c_void);

impl Drop for GroupPointer {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { lvdm_group_free(self.0) }
    }
}

impl ProcessGroup {
    /// Waits for all `size` processes, each of which listens for the others. A call that is not answered within
    /// `timeout` is an error.
    ///
    /// # Errors
    /// Processes that do not come, or are not reached.
    pub fn open(store: &Store, listener: Listener, rank: usize, size: usize, timeout: Duration) -> Result<Self> {
        let mut group = std::ptr::null_mut();
        // SAFETY: a live store and listener; `group` receives an owned pointer where there is no error.
        check(unsafe {
            lvdm_group_open(
                store.store,
                rank as c_int,
                size as c_int,
                milliseconds(timeout),
                listener.devices,
                &mut group,
            )
        })?;
        Ok(ProcessGroup { group: Rc::new(GroupPointer(group)), size })
    }

    /// From here on tensors of this GPU may be summed, by NCCL. All processes must come here.
    ///
    /// # Errors
    /// A build without NCCL; a GPU that NCCL cannot use.
    pub fn add_gpu(&self, store: &Store, rank: usize, index: usize, timeout: Duration) -> Result<()> {
        let nccl = open_nccl(store, rank, self.size, index, timeout)?;
        // SAFETY: a live group and an owned backend, which it takes over.
        unsafe { lvdm_group_add_device(self.group.0, nccl) };
        Ok(())
    }

    /// From here on tensors of a GPU may be summed and broadcast, by Gloo: each is copied to the host, and the result is
    /// copied back.
    pub fn sum_gpu_by_host(&self) {
        // SAFETY: a live group.
        unsafe { lvdm_group_sum_by_host(self.group.0) }
    }

    /// Number of processes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The tensor becomes the sum over all processes.
    ///
    /// # Errors
    /// A process that is gone or does not answer in time.
    pub fn sum(&self, tensor: &mut Tensor) -> Result<()> {
        // SAFETY: a live group and tensor.
        check(unsafe { lvdm_group_sum(self.group.0, tensor.as_ptr().cast_mut().cast()) })
    }

    /// The tensor becomes that of process `root`. A GPU's is queued, not waited for.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        // SAFETY: a live group and tensor.
        check(unsafe { lvdm_group_broadcast(self.group.0, tensor.as_ptr().cast_mut().cast(), root as c_int) })
    }

    /// The tensors of all processes, which must have one shape and type.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        let tensor = tensor.contiguous();
        let all: Vec<Tensor> = (0..self.size).map(|_| tensor.zeros_like()).collect();
        // SAFETY: a live group and `size` live tensors.
        check(unsafe { lvdm_group_gather(self.group.0, tensor.as_ptr().cast_mut().cast(), pointers(&all).as_ptr()) })?;
        Ok(all)
    }

    /// As [`Self::gather`], on process `root`, which this one is or not; the others get nothing.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn gather_to(&self, tensor: &Tensor, root: usize, is_root: bool) -> Result<Vec<Tensor>> {
        let tensor = tensor.contiguous();
        let all: Vec<Tensor> = (0..if is_root { self.size } else { 0 }).map(|_| tensor.zeros_like()).collect();
        let places = pointers(&all);
        let places = if is_root { places.as_ptr() } else { std::ptr::null() };
        // SAFETY: a live group, and `size` live tensors on the process that wants them.
        check(unsafe { lvdm_group_gather_to(self.group.0, tensor.as_ptr().cast_mut().cast(), root as c_int, places) })?;
        Ok(all)
    }

    /// Σ over processes, in the graph: where the loss is the sum of the processes' losses, its gradient by `x` is the
    /// sum of their gradients.
    ///
    /// # Panics
    /// As ordinary `tch` calls do: where a process is gone, here or in the backward pass.
    pub fn sum_with_gradient(&self, x: &Tensor) -> Tensor {
        let mut y = std::ptr::null_mut();
        // SAFETY: a live group and tensor; `y` receives an owned tensor where there is no error.
        unsafe {
            check(lvdm_group_sum_with_gradient(self.group.0, x.as_ptr().cast(), &mut y))
                .unwrap_or_else(|error| panic!("{error}"));
            Tensor::from_ptr(y.cast())
        }
    }

    /// Waits until the calls so far for tensors of a GPU, which are queued there, are answered.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn settle(&self) -> Result<()> {
        // SAFETY: a live group.
        check(unsafe { lvdm_group_settle(self.group.0) })
    }

    /// Whether a call, here or in a backward pass, was not answered.
    pub fn has_failed(&self) -> bool {
        // SAFETY: a live group.
        unsafe { lvdm_group_failed(self.group.0) }
    }

    /// Ends what is under way, where the backend can.
    pub fn abort(&self) {
        // SAFETY: a live group. There is nothing to do about an error here.
        let _ = check(unsafe { lvdm_group_abort(self.group.0) });
    }
}

fn open_nccl(store: &Store, rank: usize, size: usize, device: usize, timeout: Duration) -> Result<*mut c_void> {
    type Open = unsafe extern "C" fn(*const c_void, c_int, c_int, i64, c_int, *mut *mut c_void) -> *mut c_char;
    if let Err(error) = super::load_cuda() {
        bail!("NCCL needs LibTorch with CUDA: {error}");
    }
    let path = GpuPart::NCCL.locate()?;
    let mut backend = std::ptr::null_mut();
    // SAFETY: the library is nccl.cpp, built with this program; its one function has this signature.
    unsafe {
        let library =
            Library::open(Some(&path), RTLD_NOW).map_err(|error| anyhow!("cannot load {}: {error}", path.display()))?;
        let open = *library.get::<Open>(b"lvdm_nccl_open").context("the library is of another build")?;
        std::mem::forget(library); // what it makes lives on
        check(open(store.store, rank as c_int, size as c_int, milliseconds(timeout), device as c_int, &mut backend))?;
    }
    Ok(backend)
}

/// Gradients that become their means over all processes, bucket by bucket, while the backward pass still runs.
pub struct GradientBuckets {
    buckets: *mut c_void,
}

/// What a reduction of gradients was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Reduced {
    /// Buckets that were sent before the backward pass was over.
    pub early: i64,
    /// All buckets.
    pub all: i64,
    /// What a process sums with the others, over all buckets.
    pub bytes: i64,
}

impl GradientBuckets {
    /// Watches the gradients of these parameters, and sums them as numbers of this kind. The first bucket holds those of the
    /// last `counts[0]` parameters, since a backward pass comes to them first, the second one those of the `counts[1]` before
    /// them, and so on.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn new(group: &ProcessGroup, parameters: &[Tensor], counts: &[usize], kind: Kind) -> Result<Self> {
        assert_eq!(counts.iter().sum::<usize>(), parameters.len(), "each parameter is in one bucket");
        let mut rest = parameters;
        let mut flats = Vec::new();
        for count in counts {
            let (before, members) = rest.split_at(rest.len() - count);
            let numbers: usize = members.iter().map(Tensor::numel).sum();
            flats.push(Tensor::f_zeros([numbers as i64], (kind, members[0].device()))?);
            rest = before;
        }
        let counts: Vec<i64> = counts.iter().map(|&count| count as i64).collect();
        let mut buckets = std::ptr::null_mut();
        // SAFETY: a live group and tensors, a flat tensor and a count for each bucket; `buckets` receives an owned pointer
        // where there is no error.
        check(unsafe {
            lvdm_buckets_new(
                group.group.0,
                pointers(parameters).as_ptr(),
                parameters.len() as i64,
                pointers(&flats).as_ptr(),
                counts.as_ptr(),
                counts.len() as i64,
                &mut buckets,
            )
        })?;
        Ok(GradientBuckets { buckets })
    }

    /// The next backward pass is the last one of the step: what it makes is sent.
    pub fn arm(&self) {
        // SAFETY: ours.
        unsafe { lvdm_buckets_arm(self.buckets) }
    }

    /// Waits until each gradient is the mean over all processes.
    ///
    /// # Errors
    /// A process that is gone or does not answer in time.
    pub fn finish(&self) -> Result<Reduced> {
        let mut reduced = Reduced::default();
        // SAFETY: ours, and a place for the answer.
        check(unsafe { lvdm_buckets_finish(self.buckets, &mut reduced) })?;
        Ok(reduced)
    }
}

impl Drop for GradientBuckets {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { lvdm_buckets_free(self.buckets) }
    }
}
