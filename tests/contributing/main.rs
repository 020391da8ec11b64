//! What CONTRIBUTING.md says of new parts: its examples compile and work, each a whole file; and the parts that are there
//! lie in one file each, with one line in a registry.

#[path = "../common/mod.rs"]
mod common;

mod codec;
mod data_set;
mod metric;
mod network;
mod noise_path;
mod sampler;

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
};

use common::source;
use lvdm::diffusion::{Denoiser, Prediction};
use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use tch::Tensor;

const CONTRIBUTING: &str = include_str!("../../CONTRIBUTING.md");

/// The settings of an example as a file gives them; they have what a registry asks of settings.
fn settings<T: Debug + Clone + PartialEq + Serialize + DeserializeOwned + JsonSchema>(yaml: &str) -> T {
    let settings: T = serde_yaml::from_str(yaml).unwrap();
    let written = serde_yaml::to_string(&settings).unwrap();
    assert_eq!(serde_yaml::from_str::<T>(&written).unwrap(), settings);
    assert!(serde_yaml::from_str::<T>(&format!("{{unknown: 1, {}", &yaml[1..])).is_err());
    settings
}

/// A denoiser that knows the one z_0 that there is.
struct Knowing(Tensor);

impl Denoiser for Knowing {
    fn predict(&self, z_t: &Tensor, _t: f64) -> Prediction {
        Prediction { z_t: z_t.shallow_clone(), z_0: self.0.shallow_clone(), noise: z_t.zeros_like(), variance: None }
    }
}

/// Each example of the page is a file beside this one, up to its tests.
#[test]
fn every_example_is_a_file_that_compiles() {
    let mut files: Vec<&str> = [
        include_str!("network.rs"),
        include_str!("noise_path.rs"),
        include_str!("codec.rs"),
        include_str!("data_set.rs"),
        include_str!("sampler.rs"),
        include_str!("metric.rs"),
    ]
    .map(|text| text.split("\n// What follows is its test").next().unwrap())
    .to_vec();
    let examples = CONTRIBUTING.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    for example in examples {
        let place = files.iter().position(|file| *file == example);
        let Some(place) = place else { panic!("this example is no file of tests/contributing/:\n{example}") };
        files.remove(place);
    }
    assert!(files.is_empty(), "CONTRIBUTING.md does not show this example:\n{}", files[0]);
}

/// One that is there, as a row of the table of registries names it.
struct Known {
    registry: String,
    line: String,
    name: String,
    file: String,
}

/// The rows of the table.
fn known() -> Vec<Known> {
    let rows = CONTRIBUTING.lines().skip_while(|line| !line.starts_with("| part | traits |")).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
            let [_, _, line, name] = cells[..] else { panic!("four cells are wanted: {row}") };
            let quoted = |cell: &str| {
                cell.split('`').skip(1).step_by(2).map(|text| text.replace("\\|", "|")).collect::<Vec<_>>()
            };
            let (line, name) = (quoted(line), quoted(name));
            let ([line, registry], [name, file]) = (&line[..], &name[..]) else {
                panic!("two names are wanted: {row}")
            };
            Known { registry: registry.clone(), line: line.clone(), name: name.clone(), file: file.clone() }
        })
        .collect()
}

/// Every Rust file of `src/`, relative to the repository.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(source("").join(folder)).unwrap() {
        let path = folder.join(entry.unwrap().file_name());
        match source("").join(&path).is_dir() {
            true => files(&path, found),
            false if path.extension().is_some_and(|ending| ending == "rs") => found.push(path),
            false => {}
        }
    }
}

/// Whether code outside of tests and comments has this word.
fn uses(text: &str, word: &str) -> bool {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = code.lines().map(|line| line.split("//").next().unwrap());
    let is_in_name = |byte: u8| byte == b'_' || byte.is_ascii_alphanumeric();
    lines.into_iter().any(|line| {
        line.match_indices(word).any(|(at, _)| {
            let (before, after) = (&line.as_bytes()[..at], &line.as_bytes()[at + word.len()..]);
            !before.last().is_some_and(|byte| is_in_name(*byte)) && !after.first().is_some_and(|byte| is_in_name(*byte))
        })
    })
}

/// The lines of registries that the page shows are there, and what they register is named nowhere else: only in its own
/// file, in the `mod.rs` beside it, in reference cases, and where released checkpoints of it are read.
#[test]
fn a_part_is_one_file_and_one_line() {
    let mut all = Vec::new();
    files(Path::new("src"), &mut all);
    let parts = known();
    assert_eq!(parts.len(), 9);
    for Known { registry, line, name, file } in parts {
        let read = |path: &Path| fs::read_to_string(source("").join(path)).unwrap();
        let lines = read(Path::new(&registry));
        assert_eq!(lines.lines().filter(|known| known.trim().contains(&line)).count(), 1, "{registry}: {line}");
        assert!(uses(&line, &name), "{line} does not register {name}");
        let own = Path::new(&file);
        assert!(uses(&read(own), &name), "{file} does not declare {name}");
        let mod_file = own.parent().unwrap().join("mod.rs");
        for path in &all {
            let is_its_own = [own, Path::new(&registry), &mod_file].contains(&path.as_path());
            let may_know_all = ["src/verify", "src/exchange", "src/exchange.rs"].iter().any(|at| path.starts_with(at));
            let is_stated = OTHER_LINES.contains(&(name.as_str(), path.to_str().unwrap()));
            assert!(
                is_its_own || may_know_all || is_stated || !uses(&read(path), &name),
                "{} names {name}, which should be known in {file} and {registry} alone",
                path.display()
            );
        }
    }
}

/// Further lines, of which the page speaks: options of the command line.
const OTHER_LINES: [(&str, &str); 1] = [("Webvid", "src/commands/data.rs")];

#[test]
fn words_are_found_in_code_alone() {
    assert!(uses("let a = Heun { steps };", "Heun") && uses("Heun", "Heun"));
    assert!(!uses("// Heun", "Heun") && !uses("HeunRun", "Heun") && !uses("my_Heun", "Heun"));
    assert!(!uses("fn a() {}\n#[cfg(test)]\nmod tests {\n use super::Heun;", "Heun"));
}
