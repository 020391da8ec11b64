//! The cases of `lvdm verify`, on the device.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{common::source, device::Gpu};

/// Every case of `tests/parity`, and of the folder that LVDM_PARITY names, agrees with its reference on the GPU too.
#[test]
fn every_case_agrees_on_the_gpu() {
    let Some(gpu) = Gpu::simulated() else { return };
    let mut cases: Vec<PathBuf> = Vec::new();
    for folder in
        [Some(source("tests/parity")), std::env::var_os("LVDM_PARITY").map(PathBuf::from)].into_iter().flatten()
    {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let known = cases.iter().any(|case| case.file_name() == path.file_name());
            if path.extension().is_some_and(|extension| extension == "safetensors") && !known {
                cases.push(path);
            }
        }
    }
    assert!(cases.len() >= 29, "cases are missing: {cases:?}");
    let mut arguments = vec!["verify", "--device", "cuda"];
    arguments.extend(cases.iter().map(|case| case.to_str().unwrap()));
    let (said, counts) = gpu.succeed(Path::new("/"), &arguments);
    println!("{}", said.out);
    for case in &cases {
        let name = case.file_name().unwrap().to_str().unwrap();
        let row = said.out.lines().find(|line| line.split(' ').next() == Some(name)).unwrap_or_default();
        assert!(row.ends_with("  ok"), "{name}: {row}");
    }
    assert_eq!(said.out.lines().count(), cases.len() + 1, "{}", said.out);
    assert!(counts.launches > 10_000, "the GPU did next to nothing: {counts:?}");
}
