//! What this processor has, and which shortcuts are taken on it. Whatever depends on the processor asks here.

use std::{
    env,
    ffi::{CStr, c_char, c_void},
    sync::OnceLock,
};

use super::{check, free};

unsafe extern "C" {
    fn lvdm_processor(text: *mut *mut c_char) -> *mut c_char;
    fn lvdm_onednn(on: *mut bool, bfloat16: *mut bool) -> *mut c_char;
}

/// Vector instructions that kernels are compiled for, ours as LibTorch's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vectors {
    /// Those of every processor of the architecture.
    Plain,
    /// AVX2 with FMA, 8 float32 numbers at a time.
    Avx2,
    /// AVX-512, 16 float32 numbers at a time.
    Avx512,
}

/// How products in bfloat16 are computed on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bfloat16 {
    /// By instructions for it (AVX512-BF16 or AMX).
    Native,
    /// oneDNN computes in float32 and converts what goes in and comes out.
    Emulated,
    /// oneDNN has no kernels for it on this processor; LibTorch's own are used.
    Slow,
}

/// The processor of this machine, as LibTorch sees it.
#[derive(Debug, Clone)]
pub struct Processor {
    /// As it names itself, such as `AMD EPYC`.
    pub name: String,
    /// What kernels use; the environment variable ATEN_CPU_CAPABILITY (`avx2`, `default`) lowers it.
    pub vectors: Vectors,
    /// Products in bfloat16.
    pub bfloat16: Bfloat16,
    onednn: bool,
}

/// Ways of the CPU other than LibTorch's ordinary calls, with the same results but for rounding. Each is taken only
/// where the processor has what it needs. With AVX2 and with AVX-512 they were measured to gain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortcuts {
    /// Our own kernels (group norm, attention over frames, repeated edges, transposed convolution) and matrix products
    /// as convolutions of 1×1.
    pub kernels: bool,
    /// While weights stay as they are, convolutions keep their kernels in oneDNN's order of memory, in float32.
    pub prepacked_f32: bool,
    /// The same in bfloat16.
    pub prepacked_bf16: bool,
    /// The video autoencoder's 3D convolutions have their channels last in memory.
    pub channels_last_3d: bool,
}

/// The environment variable that turns all [`Shortcuts`] off, where it says `off`.
pub const SHORTCUTS: &str = "LVDM_SHORTCUTS";

/// This machine's processor.
///
/// # Panics
/// Where LibTorch does not answer.
pub fn processor() -> &'static Processor {
    static PROCESSOR: OnceLock<Processor> = OnceLock::new();
    PROCESSOR.get_or_init(|| {
        let (mut text, mut onednn, mut bfloat16) = (std::ptr::null_mut(), false, false);
        // SAFETY: writes a string that is ours to free, and two flags.
        let text = unsafe {
            check(lvdm_processor(&mut text)).unwrap_or_else(|error| panic!("{error}"));
            check(lvdm_onednn(&mut onednn, &mut bfloat16)).unwrap_or_else(|error| panic!("{error}"));
            let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
            free(text.cast::<c_void>());
            owned
        };
        Processor::new(&text, onednn, bfloat16)
    })
}

/// The shortcuts that are taken on this machine.
///
/// # Panics
/// As [`processor`].
pub fn shortcuts() -> Shortcuts {
    static TAKEN: OnceLock<Shortcuts> = OnceLock::new();
    *TAKEN.get_or_init(|| {
        if env::var_os(SHORTCUTS).is_some_and(|value| value == "off") {
            Shortcuts::NONE
        } else {
            processor().shortcuts()
        }
    })
}

impl Processor {
    /// Of a name, a capability and features, one a line.
    fn new(text: &str, onednn: bool, onednn_bfloat16: bool) -> Self {
        let mut lines = text.lines();
        let mut line = || lines.next().unwrap_or_default().trim();
        let (name, capability, features) = (line(), line(), line());
        let has = |feature: &str| features.split(' ').any(|one| one == feature);
        Processor {
            name: name.to_string(),
            vectors: match capability {
                "AVX512" => Vectors::Avx512,
                "AVX2" => Vectors::Avx2,
                _ => Vectors::Plain,
            },
            bfloat16: match onednn_bfloat16 {
                false => Bfloat16::Slow,
                true if has("avx512_bf16") || has("amx_bf16") => Bfloat16::Native,
                true => Bfloat16::Emulated,
            },
            onednn,
        }
    }

    fn shortcuts(&self) -> Shortcuts {
        Shortcuts {
            kernels: true,
            prepacked_f32: self.onednn,
            prepacked_bf16: self.onednn && self.bfloat16 != Bfloat16::Slow,
            // oneDNN's AVX2 kernels are slower so, above all at the weights' gradients
            channels_last_3d: self.vectors == Vectors::Avx512,
        }
    }
}

impl Shortcuts {
    /// LibTorch's ordinary calls everywhere.
    pub const NONE: Self =
        Shortcuts { kernels: false, prepacked_f32: false, prepacked_bf16: false, channels_last_3d: false };
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVX2: &str = "AMD EPYC\nAVX2\nsse4_2 avx2 fma3 f16c";
    const AVX512: &str = "AMD EPYC\nAVX512\navx2 avx512_f avx512_bw avx512_dq avx512_vl";

    #[test]
    fn kernels_in_bfloat16_are_kept_only_where_onednn_has_them() {
        let without = Processor::new(AVX2, true, false);
        assert_eq!((without.vectors, without.bfloat16), (Vectors::Avx2, Bfloat16::Slow));
        assert!(!without.shortcuts().prepacked_bf16 && without.shortcuts().prepacked_f32);
        assert!(Processor::new(AVX512, true, true).shortcuts().prepacked_bf16);
        let off = Processor::new(AVX512, false, false).shortcuts();
        assert!(!off.prepacked_bf16 && !off.prepacked_f32);
    }

    #[test]
    fn bfloat16_is_native_where_there_are_instructions_for_it() {
        assert_eq!(Processor::new(AVX512, true, true).bfloat16, Bfloat16::Emulated);
        assert_eq!(Processor::new(&format!("{AVX512} avx512_bf16"), true, true).bfloat16, Bfloat16::Native);
        assert_eq!(Processor::new(&format!("{AVX512} amx_bf16"), true, true).bfloat16, Bfloat16::Native);
    }

    #[test]
    fn channels_are_last_in_3d_only_with_avx512() {
        assert!(Processor::new(AVX512, true, true).shortcuts().channels_last_3d);
        assert!(!Processor::new(AVX2, true, false).shortcuts().channels_last_3d);
    }

    #[test]
    fn libtorch_tells_of_this_processor() {
        assert!(!processor().name.is_empty());
    }
}
