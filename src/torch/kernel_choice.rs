//! Which kernels a GPU may choose from, for the whole process.

unsafe extern "C" {
    fn lvdm_allow_tf32(allow: bool);
    fn lvdm_tf32_is_allowed() -> bool;
    fn lvdm_autotune(on: bool);
    fn lvdm_autotunes() -> bool;
    fn lvdm_deterministic();
    fn lvdm_is_deterministic() -> bool;
}

/// Whether float32 products on a GPU may be rounded to TF32 (LibTorch's default for convolutions alone).
pub fn allow_tf32(allow: bool) {
    // SAFETY: sets two flags of LibTorch's context.
    unsafe { lvdm_allow_tf32(allow) }
}

/// What holds until something else is asked for: float32 products are not rounded to TF32, and convolutions take those of
/// cuDNN's kernels whose results repeat to the bit, so that what is measured twice on one GPU gives one figure.
pub fn compute_exactly() {
    allow_tf32(false);
    // SAFETY: sets two flags of LibTorch's context.
    unsafe { lvdm_autotune(false) }
}

/// From now on a GPU uses kernels only whose results repeat to the bit; an operation that has none is an error that
/// names it. To be called before the GPU is used, and from one thread.
pub fn be_deterministic() {
    // SAFETY: sets flags of LibTorch's context and, before other threads run, a variable of the environment.
    unsafe { lvdm_deterministic() }
}

/// Whether [`be_deterministic`] was called.
fn is_deterministic() -> bool {
    // SAFETY: reads a flag of LibTorch's context.
    unsafe { lvdm_is_deterministic() }
}

/// While it lives, float32 products and convolutions on a GPU are rounded to TF32 (10 bits of mantissa), which its tensor
/// cores take. One thread alone is to say so.
pub struct Tf32 {
    before: bool,
}

impl Tf32 {
    /// Whether they are now.
    pub fn is_on() -> bool {
        // SAFETY: reads a flag of LibTorch's context.
        unsafe { lvdm_tf32_is_allowed() }
    }

    /// Where `enabled` is false, everything stays as it is.
    pub fn begin(enabled: bool) -> Self {
        let before = Self::is_on();
        allow_tf32(before || enabled);
        Tf32 { before }
    }
}

impl Drop for Tf32 {
    fn drop(&mut self) {
        allow_tf32(self.before);
    }
}

/// While it lives, cuDNN times its kernels at the first call of each shape and keeps the fastest. Which one that is differs
/// from start to start, and some of them add up in the order in which threads come, so the last bits of what is computed
/// differ too: training does it, and nothing whose results are measured.
pub struct Autotune {
    before: bool,
}

impl Autotune {
    /// Does nothing where [`be_deterministic`] was called.
    pub fn begin() -> Self {
        let before = Self::is_on();
        // SAFETY: sets a flag of LibTorch's context.
        unsafe { lvdm_autotune(before || !is_deterministic()) };
        Autotune { before }
    }

    /// Whether cuDNN does so now.
    pub fn is_on() -> bool {
        // SAFETY: reads a flag of LibTorch's context.
        unsafe { lvdm_autotunes() }
    }
}

impl Drop for Autotune {
    fn drop(&mut self) {
        // SAFETY: sets a flag of LibTorch's context.
        unsafe { lvdm_autotune(self.before) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, since the flags are the process's.
    #[test]
    fn kernels_are_chosen_anew_when_a_time_ends() {
        let tf32 = Tf32::is_on;
        allow_tf32(false);
        assert!(!tf32() && !Autotune::is_on());
        {
            let (_tf32, _autotune) = (Tf32::begin(true), Autotune::begin());
            let _inner = Tf32::begin(false);
            assert!(tf32() && Autotune::is_on());
        }
        assert!(!tf32() && !Autotune::is_on());
    }
}
