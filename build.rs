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

    let sources = ["src/torch/core.cpp", "src/torch/fused.cpp"];
    for source in sources {
        println!("cargo:rerun-if-changed={source}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .warnings(false)
        .opt_level(3)
        .flags(["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"])
        .debug(false)
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .files(sources)
        .compile("lvdm_torch");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
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
