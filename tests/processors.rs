//! Every parity case, samplings among them, on processors that this one is not: with all shortcuts of the CPU off, with
//! fewer vector instructions, and, where qemu is installed, on an emulated processor without AVX-512. And how many threads
//! compute, and how they wait.

mod common;

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use common::{Said, lvdm_in, skip, source};
use lvdm::torch::SHORTCUTS;

/// What a mixed-precision result may be off by. The tiny networks of most cases are beyond the 2e-2 that `lvdm verify`
/// asks for, with LibTorch's ordinary calls as with ours (experiments/bench/README.md): up to 4.0e-2. A loss is one number,
/// in which roundings cancel or not as it happens: 5.0e-2 by LibTorch's ordinary calls with AVX2, with LPIPS 7.9e-2. Five
/// steps of MCVD's DDIM, whose direction is not computed again after clipping, are off by 7.7e-2 by ordinary calls.
fn bfloat16_bound(case: &str) -> f64 {
    if case.contains("loss") || case.starts_with("mcvd_sampling_ddim") { 0.1 } else { 0.05 }
}

/// The parity cases; in `float32_networks` those alone that neither shortcut nor instruction leaves as they are: metrics,
/// schedules and training traces compute in float64, I3D and LPIPS by LibTorch's ordinary calls, and one token that is drawn
/// otherwise changes all that follow.
fn cases(float32_networks: bool) -> Vec<String> {
    const OTHERS: [&str; 8] =
        ["autoencoder_trace", "diffusion_trace", "fvd", "i3d", "lpips", "schedule", "clip_text", "tats_sampling"];
    let mut cases: Vec<PathBuf> =
        fs::read_dir(source("tests/parity")).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    assert!(cases.len() >= 29, "cases are missing: {cases:?}");
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
    cases.retain(|path| !(float32_networks && OTHERS.iter().any(|other| name(path).starts_with(other))));
    cases.sort();
    cases.into_iter().map(|path| path.to_str().unwrap().to_string()).collect()
}

/// The relative error of each case, as `lvdm verify` prints it.
fn errors(said: &Said, count: usize) -> BTreeMap<String, f64> {
    let rows = said.out.lines().skip(1).map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let error = words.get(3).and_then(|word| word.parse().ok());
        (words[0].to_string(), error.unwrap_or_else(|| panic!("no error in `{line}`\n{}", said.err)))
    });
    let rows: BTreeMap<String, f64> = rows.collect();
    assert_eq!(rows.len(), count, "{}\n{}", said.out, said.err);
    rows
}

fn verify(cases: &[String], dtype: &str, environment: &[(&str, &str)]) -> Said {
    let mut arguments = vec!["verify", "--dtype", dtype];
    arguments.extend(cases.iter().map(String::as_str));
    let mut command = lvdm_in(&source(""), &arguments);
    command.env_remove(SHORTCUTS).envs(environment.iter().copied());
    command.output().unwrap().into()
}

#[test]
fn parity_holds_without_shortcuts_as_with_them_in_both_precisions() {
    for dtype in ["f32", "bf16"] {
        let is_bfloat16 = dtype == "bf16";
        let cases = cases(is_bfloat16);
        let [with, without] = [vec![], vec![(SHORTCUTS, "off")]].map(|set| verify(&cases, dtype, &set));
        let (taken, ordinary) = (errors(&with, cases.len()), errors(&without, cases.len()));
        for (case, error) in &taken {
            println!("{case:38} {dtype}: {error:.1e}, without shortcuts {:.1e}", ordinary[case]);
            let bound = bfloat16_bound(case);
            assert!(!is_bfloat16 || (*error < bound && ordinary[case] < bound), "{case}, {dtype}");
        }
        if !is_bfloat16 {
            assert_eq!((with.status, without.status), (0, 0), "{}{}", with.out, without.out);
        }
        // they were off: other roundings
        assert!(taken.iter().any(|(case, error)| ordinary[case] != *error), "{dtype}: shortcuts change nothing");
    }
}

/// Our own kernels and LibTorch's have a set for AVX2 and one for every processor.
#[test]
fn parity_holds_with_fewer_vector_instructions() {
    for vectors in ["avx2", "default"] {
        let cases = cases(true);
        let said = verify(&cases, "f32", &[("ATEN_CPU_CAPABILITY", vectors), ("ONEDNN_MAX_CPU_ISA", "AVX2")]);
        assert_eq!(said.status, 0, "{vectors}\n{}\n{}", said.out, said.err);
        errors(&said, cases.len());
    }
}

/// What qemu emulates has AVX2 and no AVX-512, and says so to whoever asks: oneDNN has no bfloat16 on it.
#[test]
fn sampling_in_bfloat16_works_without_avx512() {
    const EMULATOR: &str = "qemu-x86_64";
    if Command::new(EMULATOR).arg("--version").output().is_err() {
        skip(&format!("{EMULATOR} is not installed (Debian package qemu-user): no processor without AVX-512"), true);
        return;
    }
    let case = source("tests/parity/sample_ddim_pred.safetensors");
    for (dtype, bound) in [("f32", 1e-4), ("bf16", bfloat16_bound("sample"))] {
        let mut command = Command::new(EMULATOR);
        command.args(["-cpu", "Haswell", env!("CARGO_BIN_EXE_lvdm"), "verify", "--dtype", dtype]).arg(&case);
        command.env_remove("LD_LIBRARY_PATH").env_remove(SHORTCUTS);
        // with one thread the program does not start anew, outside of the emulator
        command.env("OMP_NUM_THREADS", "1");
        let said: Said = command.output().unwrap().into();
        let error = errors(&said, 1)["sample_ddim_pred.safetensors"];
        println!("{dtype} on an emulated Haswell: {error:.1e}");
        assert!(error < bound, "{dtype}: {error}");
        let warned = said.err.contains("float32 is faster");
        assert_eq!(warned, dtype == "bf16", "{}", said.err);
    }
}

/// `lvdm doctor`'s line about threads, with these variables and none else of OpenMP.
fn threads(launcher: &[&str], environment: &[(&str, &str)]) -> String {
    let doctor = [env!("CARGO_BIN_EXE_lvdm"), "doctor"];
    let words: Vec<&str> = launcher.iter().copied().chain(doctor).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("CUDA_VISIBLE_DEVICES", "");
    for name in ["LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"] {
        command.env_remove(name);
    }
    let said: Said = command.envs(environment.iter().copied()).output().unwrap().into();
    let line = said.out.lines().find(|line| line.contains("CPUs that this process may use"));
    line.unwrap_or_else(|| panic!("{}{}", said.out, said.err)).to_string()
}

#[test]
fn waiting_threads_give_way_unless_the_user_says_otherwise() {
    if std::thread::available_parallelism().unwrap().get() > 1 {
        assert!(threads(&[], &[]).contains("GOMP_SPINCOUNT=5000"));
    }
    assert!(threads(&[], &[("OMP_WAIT_POLICY", "active")]).contains("OMP_WAIT_POLICY=active"));
    assert!(threads(&[], &[("OMP_NUM_THREADS", "1")]).contains(" 1 on "));
}

/// A container with a quota of one CPU on a machine of more.
#[test]
fn a_cgroup_quota_limits_the_number_of_threads() {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        skip("this process may use one CPU only", false);
        return;
    }
    let name = format!("lvdm-test-{}", std::process::id());
    // version 2, where the root shares the controller `cpu`, and version 1
    let places = [("/sys/fs/cgroup", "cpu.max", "100000 100000"), ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "100000")];
    let group = places.iter().find_map(|(root, quota, one)| {
        let group = PathBuf::from(root).join(&name);
        fs::create_dir(&group).ok()?;
        let set = group.join(quota).exists() && fs::write(group.join(quota), one).is_ok();
        if !set {
            let _ = fs::remove_dir(&group);
        }
        set.then_some(group)
    });
    let Some(group) = group else {
        skip("no cgroup with a quota can be made here (that needs root and a writable /sys/fs/cgroup)", false);
        return;
    };
    let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.display());
    let line = threads(&["sh", "-c", &join, "sh"], &[]);
    fs::remove_dir(&group).unwrap();
    assert!(line.contains(" 1 on 1 CPUs"), "{line}");
}
