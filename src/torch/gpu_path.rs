//! Which of two ways a network takes where a GPU's differs from this CPU's.

use std::cell::Cell;

use tch::Device;

thread_local! {
    static AS_ON_GPU: Cell<bool> = const { Cell::new(false) };
}

/// Whether what lies on this device is computed as on a GPU: there, or within [`as_on_gpu`].
pub fn takes_gpu_path(device: Device) -> bool {
    device.is_cuda() || is_as_on_gpu()
}

pub(super) fn is_as_on_gpu() -> bool {
    AS_ON_GPU.get()
}

/// Runs `body`, in which networks on the CPU do what they do on a GPU, so that a forward pass keeps for its backward pass
/// what it keeps there, whatever this processor's own kernels are.
pub fn as_on_gpu<T>(body: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            AS_ON_GPU.set(self.0);
        }
    }
    let _before = Before(AS_ON_GPU.replace(true));
    body()
}
