//! Kernels of our own for GPUs, in `src/torch/gpu/`. NVRTC compiles them for the card that is there, once: what it made is
//! kept on disk.

use std::{
    env,
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    fs,
    path::{Path, PathBuf},
    ptr::null_mut,
    sync::OnceLock,
};

use anyhow::{Context, Result, bail, ensure};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use tch::{Device, Tensor};

use super::{PositionTerms, check, fused::output, takes_gpu_path};
use crate::atomic_file::write_atomically;

unsafe extern "C" {
    fn lvdm_gpu_kernel_list(names: *mut *const c_char, functions: *mut *mut *mut c_void, room: i64) -> i64;
    fn lvdm_gpu_kernels_are_compiled(launch: *const c_void, make_current: extern "C" fn(c_int) -> c_int);
    fn lvdm_gpu_falls_back() -> bool;
    fn lvdm_gpu_norm(
        x: *const c_void,
        beside: *const c_void,
        update: *const c_void,
        added: *const c_void,
        modulation: *const c_void,
        scale: *const c_void,
        shift: *const c_void,
        groups: i64,
        eps: f64,
        silu: bool,
        half: bool,
        keeps: i64,
        y: *mut *mut c_void,
        kept: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_gpu_mixed_sum(a: *const c_void, b: *const c_void, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_gpu_layer_norm(
        x: *const c_void,
        update: *const c_void,
        gate: *const c_void,
        scale: *const c_void,
        shift: *const c_void,
        plus_one: bool,
        eps: f64,
        half: bool,
        y: *mut *mut c_void,
        stream: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_gpu_geglu(x: *const c_void, y: *mut *mut c_void) -> *mut c_char;
    fn lvdm_gpu_attention_fits(qkv: *const c_void, keys: *const c_void, heads: i64) -> bool;
    fn lvdm_gpu_frame_attention(
        qkv: *const c_void,
        keys: *const c_void,
        values: *const c_void,
        heads: i64,
        alpha: f64,
        beta: f64,
        transposed: bool,
        y: *mut *mut c_void,
    ) -> *mut c_char;
    fn lvdm_gpu_repeat_edges(x: *const c_void, pads: *const i64, y: *mut *mut c_void) -> *mut c_char;
}

// ---- what networks call -------------------------------------------------------------------------------------------------

/// What a group norm gives beside y.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    /// Nothing.
    Nothing,
    /// x + update, or x where there is none: what comes back to it is added by the kernel of the way back.
    Stream,
    /// x, and what is beside it, in one piece and the kind of y.
    Narrow,
}

/// What a group norm takes in and how ([`gpu_norm`]).
#[derive(Clone, Copy)]
pub struct GpuNorm<'a> {
    /// `[O, S, I, C]`
    pub x: &'a Tensor,
    /// `[O, S, I, B]` of further channels, which are behind those of x; not with an update, nor with [`Keeps::Stream`].
    pub beside: Option<&'a Tensor>,
    /// Added to x, of its shape and of the kind of y.
    pub update: Option<&'a Tensor>,
    /// `[A, C]`, added for the norm alone; each row to O/A neighbours.
    pub added: Option<&'a Tensor>,
    /// `[O, 2·C]`: what scale and shift are multiplied by, less one, and then what is added.
    pub modulation: Option<&'a Tensor>,
    /// `[O, C]` or `[1, C]`
    pub scale: &'a Tensor,
    /// As `scale`.
    pub shift: &'a Tensor,
    /// Of channels.
    pub groups: i64,
    /// Added to the variance.
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
    /// Whether y is bfloat16, beside a float32 x; else it is of the kind of x.
    pub half: bool,
    /// What comes beside y.
    pub keeps: Keeps,
}

impl<'a> GpuNorm<'a> {
    /// Of x alone, in its kind.
    pub fn of(x: &'a Tensor, scale: &'a Tensor, shift: &'a Tensor, groups: i64, eps: f64, silu: bool) -> Self {
        let (half, keeps) = (false, Keeps::Nothing);
        let (beside, update, added, modulation) = (None, None, None, None);
        GpuNorm { x, beside, update, added, modulation, scale, shift, groups, eps, silu, half, keeps }
    }
}

/// Group norm over S and each group of channels, times `scale` plus `shift`; and what is kept. Where [`has_gpu_kernels`] says
/// so. Differentiable once.
///
/// # Panics
/// On shapes that do not fit, as ordinary `tch` calls do.
pub fn gpu_norm(norm: GpuNorm) -> (Tensor, Option<Tensor>) {
    let GpuNorm { x, beside, update, added, modulation, scale, shift, groups, eps, silu, half, keeps } = norm;
    let (mut y, mut kept) = (null_mut(), null_mut());
    let given = |t: Option<&Tensor>| t.map_or(std::ptr::null(), |t| t.as_ptr().cast::<c_void>());
    let [x, scale, shift] = [x, scale, shift].map(|t| given(Some(t)));
    let [beside, update, added, modulation] = [beside, update, added, modulation].map(given);
    let keeps = keeps as i64;
    // SAFETY: live tensors or none, whose shapes the operator checks; `y` and `kept` receive owned tensors or null.
    unsafe {
        let (y, kept) = (&mut y, &mut kept);
        let call =
            lvdm_gpu_norm(x, beside, update, added, modulation, scale, shift, groups, eps, silu, half, keeps, y, kept);
        check(call).unwrap_or_else(|error| panic!("{error}"));
        (Tensor::from_ptr(y.cast()), (!kept.is_null()).then(|| Tensor::from_ptr(kept.cast())))
    }
}

/// a + b, in float32 of an `a` in bfloat16, and in bfloat16 of one in float32; b is bfloat16. Where [`has_gpu_kernels`] says so.
/// Differentiable once.
///
/// # Panics
/// On shapes or strides that differ, as ordinary `tch` calls do.
pub fn gpu_mixed_sum(a: &Tensor, b: &Tensor) -> Tensor {
    // SAFETY: two live tensors, whose shapes the operator checks.
    output(|y| unsafe { lvdm_gpu_mixed_sum(a.as_ptr().cast(), b.as_ptr().cast(), y) })
}

/// What a layer norm takes in and how ([`gpu_layer_norm`]).
#[derive(Clone, Copy)]
pub struct GpuLayerNorm<'a> {
    /// `[R, D]`
    pub x: &'a Tensor,
    /// Of the shape of x and the kind of y: x + update, or x + gate·update, is normalised, and comes back too.
    pub update: Option<&'a Tensor>,
    /// `[O, D]`, each row for R / O rows of x.
    pub gate: Option<&'a Tensor>,
    /// As `gate`.
    pub scale: &'a Tensor,
    /// As `gate`.
    pub shift: &'a Tensor,
    /// Whether rows are multiplied by 1 + scale.
    pub plus_one: bool,
    /// Whether y is bfloat16, beside a sum in float32 or what it starts from in either; else all are of the kind of x.
    pub half: bool,
    /// Added to the variance.
    pub eps: f64,
}

/// Layer norm of each row, times its factors plus its shifts; and what was normalised: what comes back to that is added by the
/// kernel of the way back. Where [`has_gpu_kernels`] says so. Differentiable once.
///
/// # Panics
/// On shapes that do not fit, as ordinary `tch` calls do.
pub fn gpu_layer_norm(norm: GpuLayerNorm) -> (Tensor, Tensor) {
    let GpuLayerNorm { x, update, gate, scale, shift, plus_one, half, eps } = norm;
    let (mut y, mut stream) = (null_mut(), null_mut());
    let given = |t: Option<&Tensor>| t.map_or(std::ptr::null(), |t| t.as_ptr().cast::<c_void>());
    let [x, scale, shift] = [x, scale, shift].map(|t| given(Some(t)));
    let [update, gate] = [update, gate].map(given);
    // SAFETY: live tensors or none, whose shapes the operator checks; `y` and `stream` receive owned tensors.
    unsafe {
        let call = lvdm_gpu_layer_norm(x, update, gate, scale, shift, plus_one, eps, half, &mut y, &mut stream);
        check(call).unwrap_or_else(|error| panic!("{error}"));
        (Tensor::from_ptr(y.cast()), Tensor::from_ptr(stream.cast()))
    }
}

/// `[…, 2·D]` → `[…, D]`: the first half times GELU of the second. Where [`has_gpu_kernels`] says so. Differentiable once.
///
/// # Panics
/// As ordinary `tch` calls do.
pub fn gpu_geglu(x: &Tensor) -> Tensor {
    assert!(x.size().last().is_some_and(|width| width % 2 == 0), "halves of {x:?}");
    // SAFETY: a live tensor.
    output(|y| unsafe { lvdm_gpu_geglu(x.as_ptr().cast(), y) })
}

/// As [`frame_attention`](super::frame_attention), in the kind of `qkv` and with the `tables` of keys and values themselves,
/// `[2L+1, C/heads]`: rows of distances from −L to L, those beyond counting as L. Without tables there are no positions. None
/// where a block has no room for so many frames.
///
/// # Panics
/// On shapes that do not fit, as ordinary `tch` calls do.
pub fn gpu_frame_attention(
    qkv: &Tensor,
    tables: Option<[&Tensor; 2]>,
    heads: i64,
    terms: PositionTerms,
) -> Option<Tensor> {
    let PositionTerms { alpha, beta, transposed } = terms;
    let x = qkv.as_ptr().cast();
    let [k, v] = tables.map_or([std::ptr::null(); 2], |tables| tables.map(|t| t.as_ptr().cast::<c_void>()));
    // SAFETY: live tensors, of which the first has four axes, and two or none.
    assert!(qkv.dim() == 4 && qkv.size()[3] % (3 * heads) == 0, "[B, F, P, 3·C], not {qkv:?}");
    if !unsafe { lvdm_gpu_attention_fits(x, k, heads) } {
        return None;
    }
    // SAFETY: as above.
    Some(output(|y| unsafe { lvdm_gpu_frame_attention(x, k, v, heads, alpha, beta, transposed, y) }))
}

/// `[B, C, F, H, W]` with its edges repeated as by [`repeat_edges`](super::repeat_edges), in the kind that it has and with
/// channels last in memory. The gradient is summed in float32. Differentiable once.
///
/// # Panics
/// As ordinary `tch` calls do.
pub fn gpu_repeat_edges(x: &Tensor, pads: [i64; 6]) -> Tensor {
    assert!(x.dim() == 5 && pads.iter().all(|&pad| pad >= 0), "a video and pads, not {x:?} and {pads:?}");
    // SAFETY: a live video and six numbers.
    output(|y| unsafe { lvdm_gpu_repeat_edges(x.as_ptr().cast(), pads.as_ptr(), y) })
}

/// Whether the kernels of this file take tensors of this device: on a GPU where they could be compiled, unless
/// LVDM_GPU_KERNELS=0, and within [`as_on_gpu`](super::as_on_gpu). Why not is said once.
pub fn has_gpu_kernels(device: Device) -> bool {
    static COMPILED: OnceLock<bool> = OnceLock::new();
    takes_gpu_path(device)
        && *COMPILED.get_or_init(|| {
            if env::var_os("LVDM_GPU_KERNELS").is_some_and(|value| value == "0") {
                return false;
            }
            let Device::Cuda(index) = device else { return true };
            // SAFETY: asks LibTorch's dispatcher.
            if unsafe { lvdm_gpu_falls_back() } {
                return true;
            }
            let loaded = load(index as c_int);
            if let Err(error) = &loaded {
                tracing::warn!("networks run without their own kernels for GPUs, which is slower: {error:#}");
            }
            loaded.is_ok()
        })
}

// ---- how they come to a GPU ---------------------------------------------------------------------------------------------

const SOURCES: [(&CStr, &str); 11] = [
    (c"adam.h", include_str!("gpu/adam.h")),
    (c"block.h", include_str!("gpu/block.h")),
    (c"cast_all.h", include_str!("gpu/cast_all.h")),
    (c"column_sums.h", include_str!("gpu/column_sums.h")),
    (c"frame_attention.h", include_str!("gpu/frame_attention.h")),
    (c"geglu.h", include_str!("gpu/geglu.h")),
    (c"group_norm.h", include_str!("gpu/group_norm.h")),
    (c"layer_norm.h", include_str!("gpu/layer_norm.h")),
    (c"many_tensors.h", include_str!("gpu/many_tensors.h")),
    (c"mixed_sum.h", include_str!("gpu/mixed_sum.h")),
    (c"repeat_edges.h", include_str!("gpu/repeat_edges.h")),
];

/// The kernels' names in C++, and where their handles belong.
fn kernels() -> Vec<(&'static CStr, *mut *mut c_void)> {
    // SAFETY: both lists have room for as many as there are; the names live as long as the program.
    unsafe {
        let count = lvdm_gpu_kernel_list(null_mut(), null_mut(), 0);
        let (mut names, mut functions) = (vec![std::ptr::null(); count as usize], vec![null_mut(); count as usize]);
        lvdm_gpu_kernel_list(names.as_mut_ptr(), functions.as_mut_ptr(), count);
        names.into_iter().map(|name| CStr::from_ptr(name)).zip(functions).collect()
    }
}

/// Machine code for one kind of GPU, with the names under which the kernels stand in it.
#[derive(Debug)]
pub struct GpuCode {
    names: Vec<String>,
    code: Vec<u8>,
}

impl GpuCode {
    /// Compiles the kernels for GPUs of a compute capability, such as `(9, 0)`. No GPU is needed for it.
    ///
    /// # Errors
    /// NVRTC's own words; where it is missing, where it was looked for.
    pub fn compile(capability: (i32, i32)) -> Result<GpuCode> {
        Nvrtc::open()?.compile(capability)
    }

    /// Its machine code.
    pub fn code(&self) -> &[u8] {
        &self.code
    }

    /// In one piece: a line a name, an empty line, and the code.
    fn to_bytes(&self) -> Vec<u8> {
        let names: String = self.names.iter().map(|name| format!("{name}\n")).collect();
        [names.as_bytes(), b"\n", &self.code].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<GpuCode> {
        let end = bytes.windows(2).position(|pair| pair == b"\n\n")?;
        let names: Vec<String> = std::str::from_utf8(&bytes[..end]).ok()?.lines().map(str::to_string).collect();
        (names.len() == kernels().len()).then(|| GpuCode { names, code: bytes[end + 2..].to_vec() })
    }
}

/// Where the LibTorch lies that this process runs with.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .find(|path| path.ends_with("/libtorch_cpu.so"));
    Some(Path::new(path?).parent()?.to_path_buf())
}

/// The files in the folder of `path` whose names begin so.
fn beside(path: &Path, name: &str) -> Vec<PathBuf> {
    let files = path.parent().and_then(|folder| fs::read_dir(folder).ok());
    let paths = files.into_iter().flatten().flatten().map(|file| file.path());
    paths.filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(name))).collect()
}

type Program = *mut c_void;

/// NVIDIA's run-time compiler, which compiles the kernels for GPUs: its version and where it lies.
///
/// # Errors
/// Where it was looked for.
pub fn gpu_compiler() -> Result<String> {
    let nvrtc = Nvrtc::open()?;
    let (major, minor) = nvrtc.version()?;
    Ok(format!("NVRTC {major}.{minor}: {}", nvrtc.path.display()))
}

/// NVIDIA's run-time compiler.
struct Nvrtc {
    library: Library,
    path: PathBuf,
}

impl Nvrtc {
    /// Beside LibTorch, in a CUDA toolkit, or where the loader finds it.
    fn open() -> Result<Nvrtc> {
        let lib = libtorch_folder().unwrap_or_default(); // …/torch/lib
        let wheels = lib.join("../../nvidia/cu13/lib/libnvrtc.so.13");
        let toolkit = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("lib64/libnvrtc.so"));
        let places = [lib.join("libnvrtc.so.13"), wheels].into_iter().chain(toolkit);
        let mut tried: Vec<PathBuf> = places.filter(|path| path.exists()).collect();
        tried.extend(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from));
        for path in &tried {
            // SAFETY: libraries of NVIDIA's whose initialisers do nothing else.
            if let Ok(library) = unsafe { Library::open(Some(path), RTLD_NOW) } {
                // it opens a second one by name alone, and finds it where that was loaded before
                for builtins in beside(path, "libnvrtc-builtins.so") {
                    unsafe { Library::open(Some(builtins), RTLD_NOW | RTLD_GLOBAL) }.map(std::mem::forget).ok();
                }
                return Ok(Nvrtc { library, path: path.clone() });
            }
        }
        bail!("libnvrtc.so.13 is neither beside LibTorch nor in CUDA_HOME; `CUDA=1 make setup` installs it")
    }

    fn function<T>(&self, name: &CStr) -> Result<Symbol<T>> {
        // SAFETY: the callers give the signatures that NVRTC documents.
        unsafe { self.library.get(name.to_bytes_with_nul()) }
            .with_context(|| format!("this NVRTC has no {}", name.to_string_lossy()))
    }

    fn check(&self, code: c_int, what: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = self.function::<unsafe extern "C" fn(c_int) -> *const c_char>(c"nvrtcGetErrorString")?;
        // SAFETY: a text that lives as long as the library.
        bail!("NVRTC cannot {what}: {}", unsafe { CStr::from_ptr(text(code)) }.to_string_lossy())
    }

    fn version(&self) -> Result<(c_int, c_int)> {
        let (mut major, mut minor) = (0, 0);
        let version = self.function::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(c"nvrtcVersion")?;
        // SAFETY: writes two numbers.
        self.check(unsafe { version(&mut major, &mut minor) }, "say its version")?;
        Ok((major, minor))
    }

    fn compile(&self, (major, minor): (i32, i32)) -> Result<GpuCode> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
        type AddName = unsafe extern "C" fn(Program, *const c_char) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
        type Read = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
        type Lowered = unsafe extern "C" fn(Program, *const c_char, *mut *const c_char) -> c_int;
        let create = self.function::<Create>(c"nvrtcCreateProgram")?;
        let destroy = self.function::<Destroy>(c"nvrtcDestroyProgram")?;
        let add_name = self.function::<AddName>(c"nvrtcAddNameExpression")?;
        let compile = self.function::<Compile>(c"nvrtcCompileProgram")?;
        let lowered = self.function::<Lowered>(c"nvrtcGetLoweredName")?;

        let main: String =
            SOURCES.iter().map(|(name, _)| format!("#include \"{}\"\n", name.to_string_lossy())).collect();
        let main = CString::new(main)?;
        let texts = SOURCES.iter().map(|(_, text)| CString::new(*text)).collect::<Result<Vec<_>, _>>()?;
        let texts: Vec<_> = texts.iter().map(|text| text.as_ptr()).collect();
        let names = SOURCES.map(|(name, _)| name.as_ptr());
        let architecture = CString::new(format!("--gpu-architecture=sm_{major}{minor}"))?;
        let options = [architecture.as_c_str(), c"--std=c++17", c"--device-as-default-execution-space"];
        let options = options.map(CStr::as_ptr);
        let mut program = null_mut();
        let read = |program, size: &CStr, text: &CStr| -> Result<Vec<u8>> {
            let (of, read) = (self.function::<Size>(size)?, self.function::<Read>(text)?);
            let mut length = 0;
            // SAFETY: a live program; the buffer is as long as NVRTC says.
            unsafe {
                self.check(of(program, &mut length), "say the size of what it made")?;
                let mut bytes = vec![0; length];
                self.check(read(program, bytes.as_mut_ptr().cast()), "hand over what it made")?;
                Ok(bytes)
            }
        };
        // SAFETY: texts that outlive the calls; `program` is destroyed once, below.
        unsafe {
            let count = texts.len() as c_int;
            let created =
                create(&mut program, main.as_ptr(), c"lvdm.cu".as_ptr(), count, texts.as_ptr(), names.as_ptr());
            self.check(created, "take the source")?;
            let made = (|| {
                for (name, _) in kernels() {
                    self.check(add_name(program, name.as_ptr()), "take a kernel's name")?;
                }
                if compile(program, options.len() as c_int, options.as_ptr()) != 0 {
                    let log = read(program, c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog")?;
                    let log = String::from_utf8_lossy(&log);
                    let line = log.lines().find(|line| line.contains("error")).unwrap_or(&log);
                    bail!("NVRTC cannot compile for sm_{major}{minor}: {}", line.trim_end_matches('\0'));
                }
                let lowered = |(name, _): (&CStr, _)| {
                    let mut text = std::ptr::null();
                    self.check(lowered(program, name.as_ptr(), &mut text), "name a kernel")?;
                    Ok(CStr::from_ptr(text).to_str()?.to_string())
                };
                let names = kernels().into_iter().map(lowered).collect::<Result<_>>()?;
                Ok(GpuCode { names, code: read(program, c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN")? })
            })();
            destroy(&mut program);
            made
        }
    }
}

/// Where code that was compiled is kept.
fn kept(capability: (i32, i32), nvrtc: &Nvrtc) -> Result<Option<PathBuf>> {
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let Some(folder) = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home) else { return Ok(None) };
    let (major, minor) = nvrtc.version()?;
    let text: String = SOURCES.iter().map(|(_, text)| *text).collect();
    let text = kernels().iter().fold(text, |text, (name, _)| text + &name.to_string_lossy());
    let key =
        text.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3));
    let name = format!("sm_{}{}-nvrtc{major}.{minor}-{key:016x}.kernels", capability.0, capability.1);
    Ok(Some(folder.join("lvdm").join(name)))
}

fn code_for(capability: (i32, i32)) -> Result<GpuCode> {
    let nvrtc = Nvrtc::open()?;
    let path = kept(capability, &nvrtc)?;
    if let Some(code) = path.as_ref().and_then(|path| GpuCode::from_bytes(&fs::read(path).ok()?)) {
        return Ok(code);
    }
    let code = nvrtc.compile(capability)?;
    if let Some(path) = path {
        let kept = write_atomically(&path, |file| Ok(std::io::Write::write_all(file, &code.to_bytes())?));
        if let Err(error) = kept {
            tracing::debug!("kernels for GPUs are compiled anew next time: {error:#}");
        }
    }
    Ok(code)
}

/// Makes a GPU's context the one that the driver's calls of this thread are for; the driver's error.
extern "C" fn make_current(device: c_int) -> c_int {
    type Retain = unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int;
    type Current = unsafe extern "C" fn(*mut c_void) -> c_int;
    const NOT_FOUND: c_int = 500;
    // SAFETY: functions of the CUDA driver by the signatures it documents. The context stays for as long as the program.
    unsafe {
        let Ok(driver) = driver() else { return NOT_FOUND };
        let retain = driver.get::<Retain>(b"cuDevicePrimaryCtxRetain\0");
        let (Ok(retain), Ok(current)) = (retain, driver.get::<Current>(b"cuCtxSetCurrent\0")) else { return NOT_FOUND };
        let mut context = null_mut();
        match retain(&mut context, device) {
            0 => current(context),
            error => error,
        }
    }
}

fn driver() -> Result<&'static Library> {
    static DRIVER: OnceLock<Option<Library>> = OnceLock::new();
    // SAFETY: NVIDIA's driver, which LibTorch loads too.
    let driver = DRIVER.get_or_init(|| unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW) }.ok());
    driver.as_ref().context("the NVIDIA driver's libcuda.so.1 is missing")
}

/// Compiles the kernels for this GPU and hands them to the operators.
fn load(device: c_int) -> Result<()> {
    type Init = unsafe extern "C" fn(c_uint) -> c_int;
    type Get = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
    type Attribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
    type LoadData = unsafe extern "C" fn(
        *mut *mut c_void,
        *const c_void,
        *const c_void,
        *const c_void,
        c_uint,
        *const c_void,
        *const c_void,
        c_uint,
    ) -> c_int;
    type GetKernel = unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> c_int;
    const MAJOR: c_int = 75;
    const MINOR: c_int = 76;
    let driver = driver()?;
    let done = |code: c_int, what: &str| -> Result<()> {
        ensure!(code == 0, "the driver cannot {what}: CUDA error {code}");
        Ok(())
    };
    // SAFETY: functions of the CUDA driver by the signatures it documents. The library is never unloaded, and each handle is
    // of the kernel whose place it is put in.
    unsafe {
        done(driver.get::<Init>(b"cuInit\0")?(0), "start")?;
        let (mut gpu, mut major, mut minor) = (0, 0, 0);
        done(driver.get::<Get>(b"cuDeviceGet\0")?(&mut gpu, device), "find the GPU")?;
        let attribute = driver.get::<Attribute>(b"cuDeviceGetAttribute\0")?;
        done(attribute(&mut major, MAJOR, gpu), "tell the GPU's kind")?;
        done(attribute(&mut minor, MINOR, gpu), "tell the GPU's kind")?;
        let code = code_for((major, minor))?;
        let (load, get) = (
            driver.get::<LoadData>(b"cuLibraryLoadData\0").context("kernels need a driver of CUDA 12 or newer")?,
            driver.get::<GetKernel>(b"cuLibraryGetKernel\0")?,
        );
        let (mut library, none) = (null_mut(), std::ptr::null::<c_void>());
        done(load(&mut library, code.code.as_ptr().cast(), none, none, 0, none, none, 0), "load the kernels")?;
        for ((_, place), name) in kernels().into_iter().zip(&code.names) {
            let name = CString::new(name.as_str())?;
            let mut kernel = null_mut();
            done(get(&mut kernel, library, name.as_ptr()), "find a kernel")?;
            *place = kernel;
        }
        let launch = driver.get::<*const c_void>(b"cuLaunchKernel\0")?;
        lvdm_gpu_kernels_are_compiled(launch.into_raw(), make_current);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For each kind of card that the field trains on; and what is kept on disk is what was made.
    #[test]
    fn the_kernels_compile_for_gpus() {
        if let Err(error) = Nvrtc::open() {
            assert!(env::var_os("CI").is_none(), "{error:#}");
            eprintln!("skipped: {error:#}");
            return;
        }
        for capability in [(8, 0), (9, 0), (10, 0)] {
            let code = GpuCode::compile(capability).unwrap();
            assert_eq!(code.names.len(), kernels().len());
            assert!(code.names.iter().all(|name| code.code.windows(name.len()).any(|w| w == name.as_bytes())));
            let again = GpuCode::from_bytes(&code.to_bytes()).unwrap();
            assert_eq!((again.names, again.code), (code.names, code.code));
        }
        assert!(GpuCode::from_bytes(b"a\n\nb").is_none());
    }
}
