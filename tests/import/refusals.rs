//! Options that are missing; tensors that do not fit; files that are damaged or hostile.

use std::{
    fs::{self, File},
    io::{Read, Write},
    panic::catch_unwind,
    path::Path,
    process::Command,
};

use lvdm::{checkpoint::Checkpoint, exchange, networks::UNetConfig};
use tch::Tensor;
use zip::{ZipWriter, write::FileOptions};

use crate::{
    OPTIONS, SHORT, Tensors, autoencoder, beside,
    common::{
        contents, noise,
        pickle::{Pickle, write_checkpoint},
        run_in, succeed_in,
    },
    diffusion, import, import_options, latest, same, small_unet, workplace,
};

/// What the file does not tell is asked for: status 2, the option by its name, nothing written.
#[test]
fn missing_options_are_named() {
    let folder = workplace();
    let at = folder.path();
    let bare = UNetConfig { relative_position: false, ..small_unet() };
    write_checkpoint(&at.join("bare.ckpt"), &diffusion(SHORT, &bare), &beside);
    write_checkpoint(&at.join("autoencoder.ckpt"), &autoencoder(false), &beside);
    let before = contents(at);
    let without =
        |name: &str| -> Vec<&str> { OPTIONS.chunks(2).filter(|option| option[0] != name).flatten().copied().collect() };
    let refused = |file: &str, options: &[&str], words: &[&str]| {
        let said = run_in(at, &[&["import", "lvdm", file, "--out", "run"], options].concat());
        let line = said.error(2);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} are not in\n{line}");
        assert!(contents(at) == before);
    };
    refused("short.ckpt", &without("--latents"), &["--latents sky|ucf101|taichi|text", "--scale and --shift"]);
    refused("short.ckpt", &without("--temporal-factor"), &["--temporal-factor"]);
    refused("short.ckpt", &without("--norm-groups"), &["--norm-groups"]);
    refused("short.ckpt", &[], &["--latents", "--temporal-factor", "--norm-groups"]);
    refused("autoencoder.ckpt", &without("--latents"), &["--latents"]);
    refused("autoencoder.ckpt", &without("--norm-groups"), &["--norm-groups"]);
    refused("bare.ckpt", &OPTIONS, &["--heads", "--frames"]);
    let more = |more: &[&'static str]| [&OPTIONS[..], more].concat();
    // what does not fit
    refused("short.ckpt", &more(&["--heads", "2"]), &["--heads 2", "say 4"]);
    refused("short.ckpt", &more(&["--frames", "16"]), &["--frames 16", "8 latent frames", "4"]);
    refused("short.ckpt", &more(&["--conditioning", "prediction"]), &["--conditioning", "no mask channel"]);
    refused("short.ckpt", &more(&["--latent-stride", "0"]), &["--latent-stride"]);
    refused("bare.ckpt", &more(&["--heads", "3", "--frames", "8"]), &["3 heads"]);
    refused("autoencoder.ckpt", &more(&["--heads", "2"]), &["--heads"]);
    let changed = |name: &'static str, value: &'static str| [without(name), vec![name, value]].concat();
    refused("short.ckpt", &changed("--temporal-factor", "8"), &["factor 8", "2 blocks"]);
    refused("short.ckpt", &changed("--norm-groups", "3"), &["norm_groups = 3"]);
    refused("short.ckpt", &changed("--resolution", "12"), &["--resolution 12"]);
    refused("nothing.ckpt", &OPTIONS, &["nothing.ckpt"]);
    // and what does
    assert_eq!(
        run_in(
            at,
            &[&["import", "lvdm", "bare.ckpt", "--out", "bare"], &more(&["--heads", "4", "--frames", "8"])[..]]
                .concat()
        )
        .status,
        0
    );
    let said = import(at, "short.ckpt", "bare", &[]);
    assert!(said.error(2).contains("is there already"), "{}", said.err);
}

/// Scale and shift in the file are used, and a contradiction is noticed.
#[test]
fn a_file_may_hold_its_scale() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let mut tensors = diffusion(SHORT, &small_unet());
    tensors.insert("scale_factor".into(), Tensor::from(0.18215f32));
    write_checkpoint(&at.join("x.ckpt"), &tensors, &beside);
    let with = |options: &[&str]| {
        run_in(at, &[&["import", "lvdm", "x.ckpt", "--out", "run"], &OPTIONS[2..], options].concat())
    };
    assert!(with(&["--latents", "sky"]).error(2).contains("scale = 0.18215"));
    assert!(with(&[]).error(2).contains("--shift"));
    assert_eq!(with(&["--shift", "-0.5"]).status, 0);
    let carried = Checkpoint::read(&at.join("run/autoencoder.safetensors")).unwrap();
    assert_eq!(carried.tensors["latent.scale"].double_value(&[]), 0.18215);
    assert_eq!(carried.tensors["latent.shift"].double_value(&[]), -0.5);
}

/// Anything missing, unknown, misshapen or contradictory: status 1, the tensor by its name, nothing written.
#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let good = diffusion(SHORT, &small_unet());
    let qkv = "model.diffusion_model.middle_block.1.qkv_t.weight";
    type Change<'a> = Box<dyn Fn(&mut Tensors) + 'a>;
    let remove = |name: &'static str| -> Change<'_> { Box::new(move |t| drop(t.remove(name).unwrap())) };
    let put = |name: &'static str, value: Tensor| -> Change<'_> {
        Box::new(move |t| drop(t.insert(name.into(), value.shallow_clone())))
    };
    let keep = |words: &'static [&'static str]| -> Change<'_> {
        Box::new(move |t| t.retain(|name, _| words.iter().any(|word| name.starts_with(word))))
    };
    let cases: Vec<(Change<'_>, &[&str])> = vec![
        (remove(qkv), &["qkv_t.weight` is missing"]),
        (remove("first_stage_model.decoder.conv_out.conv.bias"), &["conv_out.conv.bias` is missing"]),
        (remove("model_ema.diffusion_modelout0bias"), &["1 averaged", "model_ema.diffusion_modelout0bias"]),
        (put("model.diffusion_model.middle_block.1.other", noise(1, &[3])), &["middle_block.1.other` is unknown"]),
        (put("something.else", noise(1, &[3])), &["1 tensors are unknown: `something.else`"]),
        (put("model_ema.what", noise(1, &[3])), &["`model_ema.what`"]),
        (put(qkv, noise(1, &[192, 64, 2])), &["qkv_t.weight` has shape [192, 64, 2]"]),
        (put("model_ema.diffusion_modelout0bias", noise(1, &[33])), &["average of `out.0.bias` has shape [33]"]),
        (
            put("first_stage_model.encoder.conv_first.weight", noise(1, &[4, 3, 3, 3, 3])),
            &["encoder.conv_first.weight", "the file's differ"],
        ),
        (put("betas", noise(1, &[1000]).abs()), &["betas"]),
        (put("scale_factor", noise(1, &[2])), &["scale_factor"]),
        (keep(&["model.", "model_ema."]), &["its autoencoder is missing"]),
        (keep(&["betas", "logvar"]), &["neither a U-Net"]),
        (keep(&["first_stage_model.encoder"]), &["is missing"]),
    ];
    for (change, words) in cases {
        let mut tensors: Tensors = good.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        change(&mut tensors);
        write_checkpoint(&at.join("x.ckpt"), &tensors, &beside);
        let said = import(at, "x.ckpt", "run", &[]);
        let line = said.error(1);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} are not in\n{line}");
        assert!(line.contains("x.ckpt") && !at.join("run").exists(), "{line}");
        assert!(said.out.is_empty(), "{}", said.out);
    }
    let unknown = |pickle: &mut Pickle| {
        beside(pickle);
        pickle.text("a_new_thing");
        pickle.int(1);
    };
    write_checkpoint(&at.join("x.ckpt"), &good, &unknown);
    assert!(import(at, "x.ckpt", "run", &[]).error(1).contains("a_new_thing"));
}

/// Cut short anywhere, or with any bit flipped: an error, or what is imported is right. Never a panic.
#[test]
fn damage_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let config = UNetConfig { multipliers: vec![1], attention_factors: vec![], ..small_unet() };
    let path = at.join("x.ckpt");
    write_checkpoint(&path, &diffusion(SHORT, &config), &beside);
    exchange::import(&path, &import_options(), &at.join("good")).unwrap();
    succeed_in(at, &["export", "good", "--out", "x.safetensors"]);
    let good = latest(&at.join("good"));
    let attempt = |path: &Path| {
        let run = at.join("run");
        let outcome = catch_unwind(|| exchange::import(path, &import_options(), &at.join("run"))).expect("no panic");
        match outcome {
            Err(error) => assert!(!run.exists(), "{error:#}"),
            Ok(_) => {
                let found = latest(&run);
                let carried = Checkpoint::read(&run.join("autoencoder.safetensors")).unwrap();
                fs::remove_dir_all(&run).unwrap();
                return Some((found, carried));
            }
        }
        None
    };
    for file in ["x.ckpt", "x.safetensors"] {
        let path = at.join(file);
        let whole = fs::read(&path).unwrap();
        let (length, damaged) = (whole.len(), at.join(format!("damaged-{file}")));
        for cut in [0, 1, 8, 9, 100, length / 3, length / 2, length - 100, length - 1] {
            fs::write(&damaged, &whole[..cut]).unwrap();
            assert!(attempt(&damaged).is_none(), "{file} cut to {cut} of {length} bytes");
        }
        // the pickle or header densely, the rest in places
        let places = (0..20_000).step_by(197).chain((20_000..length).step_by(length / 40)).chain(length - 40..length);
        for place in places {
            let mut flipped = whole.clone();
            flipped[place] ^= 1 << (place % 8);
            fs::write(&damaged, &flipped).unwrap();
            // safetensors have no checksum: a flipped weight is not noticed there
            if let (Some((found, _)), "x.ckpt") = (attempt(&damaged), file) {
                same(&found.tensors, &good.tensors);
            }
        }
    }
}

/// A pickle that runs a command when Python loads it: imported where it stands beside the weights, refused where
/// a weight should be, and the command does not run.
#[test]
fn a_hostile_pickle_runs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let marker = at.join("marker");
    let python = |path: &Path| {
        let script = "
import pickle, sys, zipfile
class Loader(pickle.Unpickler):
    def find_class(self, module, name):
        if module in ('posix', 'builtins', 'collections'):
            return super().find_class(module, name)
        return lambda *arguments: None
    def persistent_load(self, reference):
        return None
Loader(zipfile.ZipFile(sys.argv[1]).open('archive/data.pkl')).load()
";
        Command::new("python3").args(["-c", script]).arg(path).status().unwrap()
    };
    let tensors = diffusion(SHORT, &small_unet());
    let command = format!("echo run > {}", marker.display());
    let call = |pickle: &mut Pickle| {
        pickle.raw(b"cposix\nsystem\n(");
        pickle.text(&command);
        pickle.raw(b"tR");
    };
    let evaluate = |pickle: &mut Pickle| {
        pickle.raw(b"cbuiltins\neval\n(");
        pickle.text(&format!("open({:?}, 'w').close()", marker.display().to_string()));
        pickle.raw(b"tR");
    };
    type Add<'a> = &'a dyn Fn(&mut Pickle);
    let beside_weights: [(&str, Add<'_>); 2] = [("callbacks", &call), ("hyper_parameters", &evaluate)];
    for (key, hostile) in beside_weights {
        write_checkpoint(&at.join("x.ckpt"), &tensors, &|pickle| {
            pickle.text(key);
            hostile(pickle);
        });
        assert!(python(&at.join("x.ckpt")).success() && marker.exists(), "this file is not hostile");
        fs::remove_file(&marker).unwrap();
        let said = import(at, "x.ckpt", key, &[]);
        assert_eq!(said.status, 0, "{}", said.err);
        assert!(said.out.contains(key), "{}", said.out);
        assert!(!marker.exists(), "the command was run");
    }
    // a dictionary that ends in a hostile state dict; the last of equal keys counts
    let cases: [(&str, Add<'_>); 2] = [("state_dict", &call), ("unknown_key", &evaluate)];
    for (key, hostile) in cases {
        let path = at.join("x.ckpt");
        write_checkpoint(&path, &tensors, &beside);
        let mut text = Vec::new();
        let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        archive.by_name("archive/data.pkl").unwrap().read_to_end(&mut text).unwrap();
        let mut pickle = Pickle(text[..text.len() - 2].to_vec());
        pickle.text(key);
        hostile(&mut pickle);
        pickle.raw(b"u.");
        let mut archive = ZipWriter::new(File::create(&path).unwrap());
        archive.start_file("archive/data.pkl", FileOptions::default()).unwrap();
        archive.write_all(&pickle.0).unwrap();
        archive.finish().unwrap();
        assert!(python(&path).success() && marker.exists(), "this file is not hostile");
        fs::remove_file(&marker).unwrap();
        let said = import(at, "x.ckpt", "run", &[]);
        said.error(1);
        assert!(!marker.exists() && !at.join("run").exists());
    }
}
