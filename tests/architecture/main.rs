//! The floors that `src/lib.rs` states, and those inside `commands` and `data`: imports go down only, and no files import
//! each other.

#[path = "../common/mod.rs"]
mod common;
mod imports;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use common::source;
use imports::{Graph, circles, described, graph};

/// Each name with the number of its floor, counted from the top, out of the map that heads a file of `src/`.
fn floors_in(file: &str) -> BTreeMap<String, usize> {
    let text = fs::read_to_string(source("src").join(file)).unwrap();
    let map = text.split("//! ```text\n").nth(1).unwrap().split("//! ```").next().unwrap();
    let mut floors = BTreeMap::new();
    for (floor, line) in map.lines().enumerate() {
        let line = line.trim_start_matches("//! ");
        let names = &line[..line.find("  ").unwrap()];
        for name in names.split(" | ") {
            assert!(floors.insert(name.to_string(), floor).is_none(), "{file}: `{name}` stands twice");
        }
    }
    floors
}

fn floors() -> BTreeMap<String, usize> {
    floors_in("lib.rs")
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Every source file, by its path below `src/`, without comments.
fn sources() -> Vec<(String, String)> {
    let root = source("src");
    let files: Vec<_> = rust_files(&root)
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_string();
            (name, without_comments(&fs::read_to_string(&path).unwrap()))
        })
        .collect();
    assert!(files.len() > 50, "only {} files", files.len());
    files
}

fn without_comments(text: &str) -> String {
    let code = |line: &str| match line.find("//") {
        Some(at) if !line[..at].contains('"') => line[..at].to_string(),
        _ => line.to_string(),
    };
    text.lines().map(code).collect::<Vec<_>>().join("\n")
}

/// The top-level modules that a text names: `crate::x::…` and the first names in `crate::{x::…, y}`.
fn imports(text: &str) -> BTreeSet<String> {
    let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = BTreeSet::new();
    for (at, start) in text.match_indices("crate::") {
        let rest = &text[at + start.len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut begins = true;
            for (i, c) in list.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => begins = true,
                    c if begins && !c.is_whitespace() => {
                        found.insert(name(&list[i..]));
                        begins = false;
                    }
                    _ => {}
                }
            }
        } else {
            found.insert(name(rest));
        }
    }
    found
}

fn module_of(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// What breaks the rule in one file.
fn breaks(floors: &BTreeMap<String, usize>, file: &str, text: &str) -> Vec<String> {
    let module = module_of(file);
    let own = floors.get(module).unwrap_or_else(|| panic!("src/lib.rs's map lacks `{module}`"));
    let allowed = |import: &String| {
        import == module || *floors.get(import).unwrap_or_else(|| panic!("{file}: the map lacks `{import}`")) > *own
    };
    imports(text)
        .iter()
        .filter(|i| !allowed(i))
        .map(|i| format!("{file} imports `{i}`, which is not below it"))
        .collect()
}

/// The picture of the floors and the page around it show every module of the map, and no other.
#[test]
fn the_picture_shows_the_map() {
    let [picture, page] =
        ["docs/floors.svg", "docs/architecture.md"].map(|path| fs::read_to_string(source(path)).unwrap());
    let names = floors().into_keys().collect::<BTreeSet<_>>();
    let bold = |text: &str| -> BTreeSet<String> {
        let names = text.split("font-weight=\"bold\"").skip(2).filter_map(|rest| rest.split_once('>'));
        names.map(|(_, rest)| rest.split('<').next().unwrap().to_string()).collect()
    };
    assert_eq!(bold(&picture), names);
    let missing: Vec<_> = names.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/architecture.md lacks {missing:?}");
}

/// A module imports lower floors only, so there is no cycle either.
#[test]
fn imports_go_down_only() {
    let floors = floors();
    let mut checked = 0;
    let mut broken = Vec::new();
    for (file, text) in sources().iter().filter(|(file, _)| !matches!(file.as_str(), "lib.rs" | "main.rs")) {
        checked += imports(text).len();
        broken.extend(breaks(&floors, file, text));
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(checked > 60, "only {checked} imports were seen");
}

/// The check itself sees what it must.
#[test]
fn a_planted_import_is_found() {
    let floors = floors();
    let upward = "use crate::{\n    nn::{Conv3d, GroupNorm},\n    diffusion::sample,\n};";
    assert_eq!(imports(upward), BTreeSet::from(["nn".to_string(), "diffusion".to_string()]));
    assert_eq!(breaks(&floors, "networks/x.rs", upward).len(), 1, "diffusion is no floor below networks");
    for (file, text) in [
        ("data/x.rs", "fn f() { crate::extractors::I3d::load(None) }"),
        ("data/x.rs", "use crate::diffusion::NoiseSchedule;"),
        ("metrics/x.rs", "use crate::{diffusion::sample, data::Loader};"),
        ("experiment/x.rs", "use crate::train::Trainer;"),
        ("torch/x.rs", "use crate::nn::Parameters;"),
    ] {
        assert_eq!(breaks(&floors, file, text).len(), 1, "{file}: {text}");
    }
    assert_eq!(breaks(&floors, "metrics/x.rs", "use crate::{data::Loader, extractors::I3d};").len(), 0);
    assert_eq!(imports(&without_comments("// crate::train\nuse super::x; // crate::data")).len(), 0);
}

/// What breaks the floors inside a module: files of `module/` that import one of its files that is not below them.
fn breaks_inside(module: &str, floors: &BTreeMap<String, usize>, graph: &Graph) -> Vec<String> {
    let place = |file: &str| {
        let name = file.strip_prefix(module)?.strip_prefix('/')?.split(['/', '.']).next()?;
        // what the whole module shares stands below all of it
        (name != "mod").then(|| name.replace("video_file_absent", "video_file"))
    };
    let floor = |name: &String| *floors.get(name).unwrap_or_else(|| panic!("{module}/mod.rs: the map lacks `{name}`"));
    let mut found = Vec::new();
    for (file, imported) in graph {
        let Some(own) = place(file) else { continue };
        for other in imported.keys().filter_map(|other| place(other)).filter(|other| *other != own) {
            if floor(&other) <= floor(&own) {
                found.push(format!("{file} imports `{other}`, which is not below it"));
            }
        }
        floor(&own);
    }
    found
}

/// Inside the two largest modules imports go down too.
#[test]
fn imports_go_down_inside_commands_and_data() {
    let graph = graph(&sources());
    for module in ["commands", "data"] {
        let floors = floors_in(&format!("{module}/mod.rs"));
        let broken = breaks_inside(module, &floors, &graph);
        assert!(broken.is_empty(), "{}", broken.join("\n"));
        for name in floors.keys() {
            let [file, folder] = [format!("{module}/{name}.rs"), format!("{module}/{name}/mod.rs")];
            assert!(graph.contains_key(&file) || graph.contains_key(&folder), "{module}/mod.rs: there is no `{name}`");
        }
    }
}

/// No file imports one that imports it, directly or by way of others.
#[test]
fn no_files_import_each_other() {
    let graph = graph(&sources());
    let circles: Vec<String> = circles(&graph).iter().map(|circle| described(&graph, circle)).collect();
    assert!(circles.is_empty(), "{}", circles.join("\n"));
    let arrows: usize = graph.values().map(BTreeMap::len).sum();
    assert!(arrows > 400, "only {arrows} imports of files were seen");
}

/// The check sees a circle however its files name each other, and none where a module only hands on.
#[test]
fn a_planted_circle_is_found() {
    let found = |files: &[(&str, &str)]| {
        let files: Vec<(String, String)> =
            files.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
        circles(&graph(&files))
    };
    let both = [vec!["a/b.rs".to_string(), "a/c.rs".to_string()]];
    let module = ("a/mod.rs", "mod b;\nmod c;\npub use b::Bee;\npub use c::{Sea, Other as Wave};");
    for (b, c) in [
        ("use super::c::Sea;", "use super::b::Bee;"),
        ("use super::Sea;", "use crate::a::{self, Bee};"),
        ("use crate::{a::{Wave, d}, x};", "fn f() { super::b::bee(super::Bee) }"),
        ("use super::c;\nfn f() { c::sea() }", "pub fn sea() { crate::a::Bee::new() }"),
        ("fn f(c: char) { if c == '\"' { crate::a::Wave() } }", "use super::{\n    b::Bee,\n};"),
    ] {
        assert_eq!(found(&[module, ("a/b.rs", b), ("a/c.rs", c), ("lib.rs", "pub mod a;")]), both, "{b} / {c}");
    }
    // by way of the module's own file, which then uses what it hands on
    let used = "mod b;\npub use b::Bee;\npub struct Base;\nfn f(bee: Bee) {}";
    assert_eq!(found(&[("a/mod.rs", used), ("a/b.rs", "use super::Base;")]).len(), 1);
    // in three steps
    let files = [("a.rs", "use crate::b::B;"), ("b.rs", "use crate::c::C;"), ("c.rs", "use crate::a::A;")];
    assert_eq!(found(&[files[0], files[1], files[2], ("lib.rs", "mod a; mod b; mod c;")])[0].len(), 3);
    for (b, c) in [
        ("use super::Sea;", "use super::Base;"),
        ("use super::Sea;", "// use super::Bee;\nconst TEXT: &str = \"crate::a::Bee\";"),
        ("use super::Sea;", "#[cfg(test)]\nmod tests {\n    use crate::a::{Bee, b};\n}"),
        ("use super::Sea;", "use std::b::Bee;"),
    ] {
        assert_eq!(found(&[module, ("a/b.rs", b), ("a/c.rs", c)]), Vec::<Vec<String>>::new(), "{b} / {c}");
    }
}

/// Neighbours that must not know each other although their floors would allow it.
#[test]
fn strangers_stay_strangers() {
    for (module, stranger) in
        [("diffusion", "data"), ("train", "metrics"), ("metrics", "train"), ("metrics", "diffusion")]
    {
        let files = sources();
        let of_module: Vec<_> = files.iter().filter(|(file, _)| module_of(file) == module).collect();
        assert!(!of_module.is_empty());
        for (file, text) in of_module {
            assert!(!imports(text).contains(stranger), "{file} imports `{stranger}`");
        }
    }
    let files = sources();
    let (_, sampler) = files.iter().find(|(file, _)| file == "diffusion/sampler.rs").unwrap();
    for word in ["mask", "Guid", "UNet", "context"] {
        assert!(!sampler.contains(word), "samplers know nothing of `{word}`");
    }
}

/// The map names every module, and no other.
#[test]
fn the_map_is_complete() {
    let text = fs::read_to_string(source("src/lib.rs")).unwrap();
    let modules: BTreeSet<String> =
        text.lines().filter_map(|l| Some(l.strip_prefix("pub mod ")?.trim_end_matches(';').to_string())).collect();
    assert_eq!(modules, floors().into_keys().collect());
    let (_, main) = sources().into_iter().find(|(file, _)| file == "main.rs").unwrap();
    assert!(imports(&main).is_empty(), "main.rs uses the library by its name");
}

/// The compiler refuses `unsafe` in the whole library and allows it in `torch` and `ffmpeg`; nothing else allows it again.
#[test]
fn unsafe_is_in_torch_and_ffmpeg_alone() {
    let files = sources();
    let text = |name: &str| files.iter().find(|(file, _)| file == name).unwrap().1.as_str();
    assert!(text("lib.rs").contains("#![deny(unsafe_code)]"));
    assert!(text("main.rs").contains("#![forbid(unsafe_code)]"));
    let allowing: Vec<(&str, &str)> = files
        .iter()
        .flat_map(|(file, text)| text.lines().map(move |line| (file.as_str(), line.trim())))
        .filter(|(_, line)| line.contains("unsafe_code") && !line.contains("deny(") && !line.contains("forbid("))
        .collect();
    assert_eq!(allowing, [("lib.rs", "#[allow(unsafe_code)]"); 2]);
    for module in ["torch", "ffmpeg"] {
        assert!(text("lib.rs").contains(&format!("#[allow(unsafe_code)]\npub mod {module};")));
    }
}
