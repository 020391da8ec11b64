//! `setup.sh` asks for the right LibTorch, with tools in place of pip and apt that only write down what they were told.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use common::source;

/// Runs a copy of `setup.sh` in this folder, and says what it asked pip for.
fn set_up(at: &Path, cuda: Option<&str>, libtorch: Option<&Path>) -> (Output, String) {
    let bin: PathBuf = at.join("bin");
    let asked = at.join("asked");
    if !bin.exists() {
        fs::create_dir(&bin).unwrap();
        fs::copy(source("setup.sh"), at.join("setup.sh")).unwrap();
        // pip leaves what setup.sh looks for; every package of the system is there
        let python = "#!/bin/sh\ncase \"$*\" in *libtorch.partial*) echo \"$*\" >> \"$ASKED\"
            mkdir -p .libtorch.partial/torch/lib .libtorch.partial/nvidia/cu13/include/crt
            touch .libtorch.partial/torch/lib/libtorch_cpu.so
            echo \"__version__ = '2.11.0+cu130'\" > .libtorch.partial/torch/version.py
            case \"$*\" in *--no-deps*) ;; *) mkdir .libtorch.partial/nvidia/cudnn ;; esac ;; esac\n";
        let tools = [
            ("python3", python),
            ("dpkg-query", "#!/bin/sh\necho installed\n"),
            ("apt-get", "#!/bin/sh\nexit 0\n"),
            ("cargo", "#!/bin/sh\nexit 0\n"),
            ("nvidia-smi", "#!/bin/sh\nexit 1\n"),
        ];
        for (name, text) in tools {
            fs::write(bin.join(name), text).unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::create_dir_all(at.join(".python/clip")).unwrap();
        fs::write(at.join(".python/clip/bpe_simple_vocab_16e6.txt.gz"), "").unwrap();
    }
    fs::write(&asked, "").unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("sh");
    command.arg("setup.sh").current_dir(at).env("PATH", path).env("ASKED", &asked).env("LVDM_BROWSER", "sh");
    command.env_remove("CUDA").env_remove("LIBTORCH");
    if let Some(cuda) = cuda {
        command.env("CUDA", cuda);
    }
    if let Some(libtorch) = libtorch {
        command.env("LIBTORCH", libtorch);
    }
    (command.output().unwrap(), fs::read_to_string(&asked).unwrap())
}

/// On a login node: there is no GPU, and the nodes that will compute have one.
#[test]
fn cuda_1_prepares_for_a_gpu_that_is_not_here() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    if !Path::new("/dev/nvidia0").exists() {
        let (output, asked) = set_up(at, None, None);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(asked.contains("--no-deps torch==2.11.0"), "the CPU set is wanted: {asked}");
    }
    let (output, asked) = set_up(at, Some("1"), None);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(asked.contains("torch==2.11.0") && !asked.contains("--no-deps"), "the CUDA set is wanted: {asked}");
    assert!(asked.contains("nvidia-cuda-cccl"), "headers to build with are wanted: {asked}");
    // it stays, whoever calls next
    for cuda in [Some("1"), None] {
        assert_eq!(set_up(at, cuda, None).1, "", "CUDA={cuda:?}");
    }
}

#[test]
fn another_value_of_cuda_and_a_libtorch_without_it_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let own = at.join("own");
    fs::create_dir_all(own.join("lib")).unwrap();
    fs::write(own.join("lib/libtorch_cpu.so"), "").unwrap();
    for (cuda, libtorch, word) in [("yes", None, "CUDA is set to yes"), ("1", Some(own.as_path()), "no cuDNN")] {
        let (output, asked) = set_up(at, Some(cuda), libtorch);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(word), "{said}");
        assert_eq!(asked, "");
    }
    assert!(set_up(at, None, Some(&own)).0.status.success());
}
