//! `lvdm verify` on the cases under `tests/parity/`, which independent implementations computed.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{Said, run_in, source};
use serde_json::Value;

fn verify(cases: &[PathBuf]) -> Said {
    let mut arguments = vec!["verify"];
    arguments.extend(cases.iter().map(|case| case.to_str().unwrap()));
    run_in(Path::new("/"), &arguments)
}

fn case(name: &str) -> PathBuf {
    source(&format!("tests/parity/{name}.safetensors"))
}

/// The header of a safetensors file, and where its data begin.
fn header(bytes: &[u8]) -> (Value, usize) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), 8 + length)
}

/// A copy of a case in which `change` was applied to the f32 values of tensor `name`.
fn altered(folder: &Path, from: &str, name: &str, change: impl Fn(usize, f32) -> f32) -> PathBuf {
    let mut bytes = fs::read(case(from)).unwrap();
    let (header, start) = header(&bytes);
    let info = &header[name];
    assert_eq!(info["dtype"], "F32", "{name} of {from}");
    let place = |i: usize| start + info["data_offsets"][i].as_u64().unwrap() as usize;
    for (i, value) in bytes[place(0)..place(1)].chunks_exact_mut(4).enumerate() {
        let new = change(i, f32::from_le_bytes(value.try_into().unwrap()));
        value.copy_from_slice(&new.to_le_bytes());
    }
    let path = folder.join(format!("{from}.safetensors"));
    fs::write(&path, bytes).unwrap();
    path
}

/// A copy of a case whose header's text was changed; `from` and `to` are of one length.
fn renamed(folder: &Path, name: &str, from: &str, to: &str) -> PathBuf {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(case(name)).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    let path = folder.join(format!("{name}.safetensors"));
    fs::write(&path, bytes).unwrap();
    path
}

/// The cases in a folder.
fn cases_in(folder: &Path) -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    cases.sort();
    cases
}

/// Networks, schedules, samplers, losses, extractors, metrics and the training traces agree with the references. Cases of
/// a checkpoint are too large for the tree: with `LVDM_PARITY` naming a folder of more, those run too.
#[test]
fn every_case_agrees() {
    let mut cases = cases_in(&source("tests/parity"));
    assert!(cases.len() >= 50, "cases are missing: {cases:?}");
    if let Some(folder) = std::env::var_os("LVDM_PARITY") {
        let known: Vec<_> = cases.iter().map(|case| case.file_name().unwrap().to_owned()).collect();
        let more = cases_in(Path::new(&folder)).into_iter();
        cases.extend(more.filter(|case| !known.iter().any(|name| case.ends_with(name))));
    }
    let said = verify(&cases);
    assert_eq!(said.status, 0, "{}\n{}", said.out, said.err);
    println!("{}", said.out);
    for case in &cases {
        let name = case.file_name().unwrap().to_str().unwrap();
        let rows: Vec<&str> = said.out.lines().filter(|line| line.split(' ').next() == Some(name)).collect();
        assert_eq!(rows.len(), 1, "{name}\n{}", said.out);
        assert!(rows[0].ends_with("  ok"), "{}", rows[0]);
    }
    assert_eq!(said.out.lines().count(), cases.len() + 1, "{}", said.out);
}

/// One per cent off is noticed in every kind of case.
#[test]
fn an_altered_expectation_fails() {
    let folder = tempfile::tempdir().unwrap();
    for (name, tensor) in [
        ("unet3d_factorized", "out.eps"),
        ("autoencoder_f4s8", "out.reconstruction"),
        ("patch_discriminator", "out.logits"),
        ("sample_ddim_eta1", "out.x_0"),
        ("latte_unconditional", "out.output"),
        ("learned_sigma_loss", "out.vb"),
        ("flow_loss_frame_wise", "out.per_sample"),
        ("flow_sampling_heun", "out.x_0"),
        ("edm_loss", "out.denoised"),
        ("min_snr_weight", "out.velocity"),
        ("mcvd_unet_spade", "out.eps"),
        ("mcvd_loss", "out.loss_per_sample"),
        ("mcvd_sampling", "out.video"),
        ("mcvd_schedule", "out.sub_betas"),
        ("gpt_sos", "out.logits"),
        ("top_k_top_p", "out.probabilities"),
        ("tats_sampling_hierarchical", "out.logits_interpolation"),
        ("sd_unet_inflated", "out.eps"),
        ("sd_vae", "out.logvar"),
        ("clip_text", "out.last_hidden_state"),
        ("i3d_logits", "out.logits"),
        ("fvd_kvd_from_features", "in.real"),
    ] {
        let said = verify(&[altered(folder.path(), name, tensor, |_, value| value * 1.01), case("schedule_lvdm")]);
        assert!(said.error(1).contains("1 of 2 cases failed"), "{}", said.err);
        assert!(said.out.lines().any(|line| line.starts_with(name) && line.ends_with("FAIL")), "{}", said.out);
        assert!(said.out.lines().any(|line| line.starts_with("schedule") && line.ends_with("ok")), "{}", said.out);
    }
}

/// Codes are integers: one that is another by one is wrong, however small the difference is beside all others.
#[test]
fn codes_must_be_equal() {
    let folder = tempfile::tempdir().unwrap();
    let one_off = |i: usize, value: f32| if i == 5 { (value - 1.0).abs() } else { value };
    let said = verify(&[altered(folder.path(), "tats_sampling", "out.codes", one_off)]);
    assert!(said.error(1).contains("1 of 1 cases failed"), "{}", said.err);
    assert!(said.out.contains("inf") && said.out.contains("FAIL"), "{}", said.out);
}

/// NaN never passes: not in what is expected (whichever tensor of several holds it), not in what comes out.
#[test]
fn nan_fails() {
    let folder = tempfile::tempdir().unwrap();
    let nan_first = |i: usize, value: f32| if i == 0 { f32::NAN } else { value };
    for (name, tensor) in [
        ("autoencoder_f4s8", "out.logvar"),
        ("autoencoder_f4s8", "out.sample"),
        ("unet3d_factorized", "out.eps"),
        ("unet3d_factorized", "in.x"),
    ] {
        let said = verify(&[altered(folder.path(), name, tensor, nan_first)]);
        assert!(said.error(1).contains("1 of 1 cases failed"), "{}", said.err);
        assert!(said.out.contains("NaN") && said.out.contains("FAIL"), "{name} {tensor}\n{}", said.out);
    }
}

/// What is not a case is wrong usage, and is not counted as a failed one.
#[test]
fn no_case_is_status_2() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.safetensors");
    fs::write(&text, "hello").unwrap();
    let foreign = folder.path().join("foreign.safetensors");
    tch::Tensor::write_safetensors(&[("x", tch::Tensor::from(1.0f32))], &foreign).unwrap();
    let unknown = renamed(folder.path(), "unet3d_factorized", "\"unet3d\"", "\"unet4d\"");
    for path in [text, foreign, unknown, folder.path().join("missing.safetensors")] {
        let said = verify(&[path.clone(), case("schedule_lvdm")]);
        assert!(said.error(2).contains("1 of 2 files"), "{}", said.err);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(said.out.lines().any(|line| line.starts_with(name)), "{}", said.out);
        assert!(said.out.lines().any(|line| line.starts_with("schedule") && line.ends_with("ok")), "{}", said.out);
    }
}

/// Weights that are not there: an error that says how to get them, never a pass.
#[test]
fn missing_weights_are_named() {
    let nowhere = tempfile::tempdir().unwrap();
    let arguments =
        ["verify", case("i3d_logits").to_str().unwrap(), case("lpips_vgg").to_str().unwrap()].map(String::from);
    let said: Said = common::lvdm_in(Path::new("/"), &arguments.each_ref().map(String::as_str))
        .env("LVDM_WEIGHTS", nowhere.path())
        .output()
        .unwrap()
        .into();
    said.error(1);
    let rows = said.out.lines().filter(|line| line.contains("FAIL") && line.contains("lvdm weights fetch"));
    assert_eq!(rows.count(), 2, "{}", said.out);
}
