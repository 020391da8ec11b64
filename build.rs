//! Checks LibTorch, compiles the C++ in `src/torch/`, and writes LibTorch's place into the binary,
//! so that neither the build nor the binary needs `LD_LIBRARY_PATH`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::exit,
};

/// The release that `tch` 0.24 binds.
const LIBTORCH_VERSION: &str = "2.11.0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = PathBuf::from(env::var("LIBTORCH").unwrap_or_default());
    let lib = libtorch.join("lib");
    if !lib.join("libtorch_cpu.so").exists() {
        fail(&format!(
            "there is no LibTorch in `{}`: run `make setup`, or set LIBTORCH to the folder that holds lib/ and include/ of LibTorch {LIBTORCH_VERSION}",
            libtorch.display()
        ));
    }
    let found = version(&libtorch);
    println!("cargo:rustc-env=LVDM_LIBTORCH_VERSION={}", found.as_deref().unwrap_or("of unknown version"));
    match found {
        Some(found) if found.split('+').next() == Some(LIBTORCH_VERSION) => {}
        Some(found) => fail(&format!(
            "LIBTORCH `{}` is version {found}, this crate needs {LIBTORCH_VERSION}: unset LIBTORCH and run `make setup`, or point it at that release",
            libtorch.display()
        )),
        None => println!(
            "cargo:warning=cannot tell the version of LibTorch in {}; {LIBTORCH_VERSION} is needed",
            libtorch.display()
        ),
    }

    let sources = ["core", "fused", "composed", "shapes", "gpu/kernels", "gpu/optimizer", "gpu/autograd", "c10d"]
        .map(|name| format!("src/torch/{name}.cpp"));
    let headers =
        ["guarded.h", "readback.h", "fused", "gpu", "gloo/gloo/context.h"].map(|file| format!("src/torch/{file}"));
    for file in sources.iter().chain(&headers) {
        println!("cargo:rerun-if-changed={file}");
    }
    let mut build = cc::Build::new();
    // Without OpenMP LibTorch's parallel_for is a plain loop. Other compilers bring a runtime other than LibTorch's.
    let threads = build.cpp(true).get_compiler().is_like_gnu();
    build
        .std("c++20")
        .warnings(false)
        .opt_level(3)
        .flags([if threads { "-fopenmp" } else { "-fopenmp-simd" }, "-fno-math-errno", "-fno-trapping-math"])
        .debug(false)
        .include("src/torch/gloo")
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .define("USE_C10D_GLOO", None)
        .files(sources)
        .compile("lvdm_torch");
    if threads {
        println!("cargo:rustc-link-lib=gomp");
    }
    inner_loops();
    shared_object(&libtorch, "graph", "CUDA graphs", &["cuda_runtime_api.h", "crt/host_defines.h"]);
    let needed = ["nccl.h", "cuda_runtime.h", "crt/host_config.h", "cusparse.h", "cublas_v2.h", "cusolverDn.h"];
    shared_object(&libtorch, "nccl", "several GPUs", &needed);
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// Compiles `rows.cpp` once for each set of vector instructions; the program chooses among them when it runs.
fn inner_loops() {
    let mut sets = vec![("plain", vec![])];
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
        sets.push(("avx2", vec!["-mavx2", "-mfma"]));
        sets.push(("avx512", vec!["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]));
    }
    for (name, instructions) in sets {
        cc::Build::new()
            .cpp(true)
            .std("c++20")
            .opt_level(3)
            .flags(["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"])
            .flags(instructions)
            .debug(false)
            .define("LVDM_ROWS", format!("rows_{name}").as_str())
            .file("src/torch/fused/rows.cpp")
            .compile(&format!("lvdm_rows_{name}"));
    }
}

/// Compiles a part for GPUs into a shared object of its own, which is opened where a GPU is used, and says its place in
/// `LVDM_NAME`. It is left out where the headers it needs are neither beside LibTorch nor in CUDA_HOME: `LVDM_NO_NAME` then
/// says why, and where LibTorch is one for GPUs, a warning does.
fn shared_object(libtorch: &Path, name: &str, serves: &str, needed: &[&str]) {
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-changed=src/torch/{name}.cpp");
    let without = |why: &str| {
        println!("cargo:rustc-env=LVDM_NO_{}={why}", name.to_uppercase());
        if is_for_gpus(libtorch) {
            println!("cargo:warning=built without {name}.cpp, which is needed for {serves}: {why}");
        }
    };
    let wheels = libtorch.parent().unwrap_or(libtorch).join("nvidia");
    let mut includes = vec![wheels.join("cu13/include"), wheels.join("nccl/include")];
    includes.extend(env::var("CUDA_HOME").map(|home| PathBuf::from(home).join("include")));
    let absent = |header: &&&str| !includes.iter().any(|folder| folder.join(header).exists());
    if let Some(header) = needed.iter().find(absent) {
        return without(&format!(
            "{header} is neither in {} nor in CUDA_HOME/include; `CUDA=1 make setup` installs it, or set CUDA_HOME to a CUDA \
             13 toolkit, and build again",
            wheels.display()
        ));
    }
    let object = PathBuf::from(env::var("OUT_DIR").unwrap_or_default()).join(format!("liblvdm_{name}.so"));
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").warnings(false).opt_level(2).debug(false).define("USE_C10D_NCCL", None);
    let mut command = build.get_compiler().to_command();
    command.args(["-shared", "-fPIC", &format!("src/torch/{name}.cpp"), "-o"]).arg(&object);
    includes.extend([libtorch.join("include"), libtorch.join("include/torch/csrc/api/include")]);
    for folder in includes {
        command.arg("-I").arg(folder);
    }
    let failed = match command.output() {
        Ok(output) if output.status.success() => {
            println!("cargo:rustc-env=LVDM_{}={}", name.to_uppercase(), object.display());
            return;
        }
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().find(|l| l.contains("error")).map(str::to_string),
        Err(error) => Some(error.to_string()),
    };
    without(&failed.unwrap_or_default().replace('\n', " "));
}

/// Whether this LibTorch can use a GPU. The wheel for the CPU holds the CUDA half too, without the libraries it needs.
fn is_for_gpus(libtorch: &Path) -> bool {
    let bundled = fs::read_dir(libtorch.join("lib"))
        .is_ok_and(|files| files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libcudnn")));
    bundled || libtorch.parent().is_some_and(|beside| beside.join("nvidia/cudnn").exists())
}

/// LibTorch's version: the wheel says it in `version.py`, the zip archive in `build-version`.
fn version(libtorch: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(libtorch.join("build-version")) {
        return Some(text.trim().to_string());
    }
    let text = fs::read_to_string(libtorch.join("version.py")).ok()?;
    let line = text.lines().find(|line| line.starts_with("__version__"))?;
    line.split(['\'', '"']).nth(1).map(str::to_string)
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
