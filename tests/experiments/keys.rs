//! The page of all keys, and `lvdm config`.

use std::{collections::BTreeSet, fs};

use serde_yaml::Value;

use super::{
    common::{run_in, source, succeed_in},
    yaml_files,
};

/// docs/configuration.md is what `lvdm config --markdown` prints.
#[test]
fn the_page_of_keys_is_what_the_types_say() {
    let printed = succeed_in(&source(""), &["config", "--markdown"]).out;
    let page = fs::read_to_string(source("docs/configuration.md")).unwrap();
    let differing = printed.lines().zip(page.lines()).find(|(printed, page)| printed != page);
    assert!(
        printed == page,
        "docs/configuration.md is not what the types say: run `lvdm config --markdown > docs/configuration.md`; first \
         {differing:?}"
    );
}

/// Every key and every `kind` of every shipped file is on it, under the names that files use.
#[test]
fn the_page_of_keys_lists_what_shipped_files_say() {
    let page = fs::read_to_string(source("docs/configuration.md")).unwrap();
    let (mut keys, mut kinds) = (BTreeSet::new(), BTreeSet::new());
    fn collect(value: &Value, keys: &mut BTreeSet<String>, kinds: &mut BTreeSet<String>) {
        match value {
            Value::Mapping(mapping) => {
                for (key, value) in mapping {
                    let key = key.as_str().unwrap();
                    match (key, value) {
                        ("kind", kind) => kinds.insert(kind.as_str().unwrap().to_string()),
                        (key, _) => keys.insert(key.to_string()),
                    };
                    collect(value, keys, kinds);
                }
            }
            Value::Sequence(list) => list.iter().for_each(|value| collect(value, keys, kinds)),
            _ => {}
        }
    }
    for path in yaml_files(&source("experiments")) {
        collect(&serde_yaml::from_str(&fs::read_to_string(path).unwrap()).unwrap(), &mut keys, &mut kinds);
    }
    assert!(keys.len() > 60 && kinds.len() > 10, "{keys:?} {kinds:?}");
    // the older name of `network` is told in a sentence
    let missing: Vec<_> =
        keys.iter().filter(|key| *key != "unet" && !page.contains(&format!("\n| `{key}` | "))).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let of_kinds: Vec<&str> =
        page.lines().filter(|line| line.starts_with("**`kind: ") || line.starts_with("| `kind` ")).collect();
    let missing: Vec<_> = kinds
        .iter()
        .filter(|kind| {
            !of_kinds.iter().any(|line| line.contains(&format!("`{kind}`")) || line.contains(&format!("kind: {kind}`")))
        })
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    // each link leads to a heading, and each key has a meaning
    let headings: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .map(|title| title.to_lowercase().replace(' ', "-").replace(['`', '.'], ""))
        .collect();
    for link in page.split("](#").skip(1).map(|rest| rest.split(')').next().unwrap()) {
        assert!(headings.contains(link), "no heading for #{link}");
    }
    let without: Vec<&str> = page.lines().filter(|line| line.starts_with("| `") && line.ends_with("|  |")).collect();
    assert!(without.is_empty(), "{without:?}");
    // also where a file leaves the default out
    let is_null = |line: &&str| line.contains(" | `null` | ") && !line.contains("`null` | `null` | ");
    let null: Vec<&str> = page.lines().filter(is_null).collect();
    assert!(null.is_empty(), "a default of null, which the key cannot be: {null:?}");
}

#[test]
fn a_key_is_explained_on_the_command_line() {
    let at = source("");
    let said = succeed_in(&at, &["config", "trainer.steps"]).out;
    assert!(
        said.contains("lvdm train diffusion FILE\n  trainer.steps (integer; default: required)\n      Optimizer steps"),
        "{said}"
    );
    let said = succeed_in(&at, &["config", "schedule"]).out;
    assert!(said.contains("schedule.beta_start (number; default: 0.0015") && said.contains("schedule.times"), "{said}");
    // what differs from kind to kind is said of each, and so are the kinds
    let said = succeed_in(&at, &["config", "network.heads"]).out;
    assert!(said.contains("default: 4; of unet3d)") && said.contains("default: 16; of latte)"), "{said}");
    let default = |key: &str| {
        let said = succeed_in(&at, &["config", key]).out;
        let (_, rest) = said.split_once("default: ").unwrap_or_else(|| panic!("{said}"));
        rest[..rest.find([')', ';']).unwrap()].to_string()
    };
    // of a group that is there by default, of one that need not name its kind, and of one that a file must have
    let kinds = ["schedule.kind", "sampler.kind", "network.kind", "autoencoder.kind", "data.dataset.kind"];
    let expected = ["scaled_linear", "ddim", "unet3d", "video_autoencoder", "required"];
    assert_eq!(kinds.map(default), expected);
    assert!(succeed_in(&at, &["config", "schedule.kind"]).out.contains("rectified_flow"));
    // the older name of the network, and an entry of a list
    assert!(succeed_in(&at, &["config", "unet.channels"]).out.contains("network.channels"));
    assert!(succeed_in(&at, &["config", "curves.0.name"]).out.contains("curves.name"));
    let said = run_in(&at, &["config", "trainer.stepps"]);
    assert!(said.error(2).contains("`trainer.stepps`"), "{}", said.err);
    assert!(succeed_in(&at, &["config"]).out.contains("lvdm evaluate-long FILE"));
}
