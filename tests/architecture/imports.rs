//! Which file imports which: the graph of the files of a crate, read from their text.

use std::collections::{BTreeMap, BTreeSet};

/// `importer → imported → the names that it takes from there`, all files by their paths below `src/`.
pub type Graph = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// A text without comments, without the insides of string and character literals, and without items that
/// `#[cfg(test)]` keeps out of the crate.
pub fn code(text: &str) -> String {
    without_tests(&without_literals(text))
}

fn without_literals(text: &str) -> String {
    let text: Vec<char> = text.chars().collect();
    let starts = |at: usize, pattern: &str| pattern.chars().enumerate().all(|(i, c)| text.get(at + i) == Some(&c));
    let (mut code, mut at) = (String::new(), 0);
    while at < text.len() {
        let before = if at == 0 { ' ' } else { text[at - 1] };
        let hashes = text[at + 1..].iter().take_while(|c| **c == '#').count();
        if starts(at, "//") {
            at += text[at..].iter().take_while(|c| **c != '\n').count();
        } else if starts(at, "/*") {
            at = (at + 2..text.len()).find(|&i| starts(i, "*/")).map_or(text.len(), |i| i + 2);
            code.push(' ');
        } else if text[at] == 'r' && !is_word(before) && text.get(at + 1 + hashes) == Some(&'"') {
            let end = format!("\"{}", "#".repeat(hashes));
            at = (at + 2 + hashes..text.len()).find(|&i| starts(i, &end)).map_or(text.len(), |i| i + end.len());
            code += "\"\"";
        } else if text[at] == '"' {
            at += 1;
            while at < text.len() && text[at] != '"' {
                at += if text[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
            code += "\"\"";
        } else if text[at] == '\'' && text.get(at + 1) == Some(&'\\') {
            at = (at + 3..text.len()).find(|&i| text[i] == '\'').map_or(text.len(), |i| i + 1);
            code += "' '";
        } else if text[at] == '\'' && text.get(at + 2) == Some(&'\'') {
            at += 3;
            code += "' '";
        } else {
            code.push(text[at]);
            at += 1;
        }
    }
    code
}

fn without_tests(code: &str) -> String {
    let mut rest = code;
    let mut kept = String::new();
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept += &rest[..at];
        rest = &rest[at..];
        let mut depth = 0;
        let end = rest.char_indices().find(|&(_, c)| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0 && matches!(c, ';' | '}')
        });
        rest = end.map_or("", |(i, _)| &rest[i + 1..]);
    }
    kept + rest
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The words of a code with `::`, `{`, `}`, `,`, `;` and `*` between them; what else stands there is a `.`.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        if is_word(c) {
            let mut word = c.to_string();
            while let Some(c) = chars.next_if(|c| is_word(*c)) {
                word.push(c);
            }
            tokens.push(word);
        } else if c == ':' && chars.next_if_eq(&':').is_some() {
            tokens.push("::".into());
        } else if !c.is_whitespace() {
            tokens.push(if "{},;*".contains(c) { c.to_string() } else { ".".into() });
        }
    }
    tokens
}

/// One name that a `use` brings in, and its path.
#[derive(Debug, PartialEq)]
struct Use {
    path: Vec<String>,
    name: String,
    is_public: bool,
}

/// What a file declares, imports and mentions.
struct File {
    module: Vec<String>,
    children: BTreeSet<String>,
    uses: Vec<Use>,
    /// Paths of at least two words outside of `use`.
    paths: BTreeSet<Vec<String>>,
    words: BTreeSet<String>,
}

/// Reads the tree behind `use` from `at` to its end, below `path`.
fn tree(tokens: &[String], at: &mut usize, mut path: Vec<String>, is_public: bool, uses: &mut Vec<Use>) {
    loop {
        let token = tokens.get(*at).map_or(";", String::as_str);
        *at += 1;
        match token {
            "::" => {}
            "{" => {
                while tokens.get(*at).is_some_and(|token| token != "}") {
                    tree(tokens, at, path.clone(), is_public, uses);
                    if tokens.get(*at).is_some_and(|token| token == ",") {
                        *at += 1;
                    }
                }
                *at += 1;
                return;
            }
            "as" => {
                let name = tokens[*at].clone();
                *at += 1;
                uses.push(Use { path, name, is_public });
                return;
            }
            "," | ";" | "}" => {
                *at -= 1;
                let name = path.last().cloned().unwrap_or_default();
                uses.push(Use { path, name, is_public });
                return;
            }
            "self" if !path.is_empty() => {}
            word => path.push(word.to_string()),
        }
    }
}

impl File {
    fn read(name: &str, text: &str) -> Self {
        let tokens = tokens(&code(text));
        let stem = name.trim_end_matches(".rs").trim_end_matches("/mod");
        let module = if stem == "lib" { vec![] } else { stem.split('/').map(str::to_string).collect() };
        let mut file =
            File { module, children: BTreeSet::new(), uses: vec![], paths: BTreeSet::new(), words: BTreeSet::new() };
        let mut at = 0;
        while at < tokens.len() {
            match tokens[at].as_str() {
                "mod" if tokens.get(at + 2).is_some_and(|token| token == ";") => {
                    file.children.insert(tokens[at + 1].clone());
                    at += 3;
                }
                "use" => {
                    // `pub`, or `pub(crate)` and the like, whose brackets are dots
                    let is_public = at > 0 && (tokens[at - 1] == "pub" || tokens[at - 1] == ".");
                    at += 1;
                    tree(&tokens, &mut at, vec![], is_public, &mut file.uses);
                }
                word if is_word(word.chars().next().unwrap_or(' ')) => {
                    let mut path = vec![word.to_string()];
                    while at + 2 < tokens.len() && tokens[at + 1] == "::" && tokens[at + 2].chars().all(is_word) {
                        at += 2;
                        path.push(tokens[at].clone());
                    }
                    at += 1;
                    if path.len() > 1 {
                        file.paths.insert(path.clone());
                    }
                    file.words.extend(path);
                }
                _ => at += 1,
            }
        }
        file
    }

    /// A path as it stands in this file, from the crate's root; none of another crate.
    fn below_root(&self, path: &[String]) -> Option<Vec<String>> {
        let mut module = self.module.clone();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => {
                module.clear();
                rest = &path[1..];
            }
            "self" => rest = &path[1..],
            "super" => {
                while rest.first().is_some_and(|word| word == "super") {
                    module.pop();
                    rest = &rest[1..];
                }
            }
            child if self.children.contains(child) => {}
            _ => return None,
        }
        module.extend(rest.iter().cloned());
        Some(module)
    }
}

/// The graph of files `(path below src/, text)`. `lib.rs`, which holds nothing but modules, is no part of it.
pub fn graph(sources: &[(String, String)]) -> Graph {
    let files: BTreeMap<&str, File> =
        sources.iter().map(|(name, text)| (name.as_str(), File::read(name, text))).collect();
    let modules: BTreeMap<&[String], &str> = files.iter().map(|(name, file)| (file.module.as_slice(), *name)).collect();
    let mut graph = Graph::new();
    for (name, file) in &files {
        let imported = graph.entry(name.to_string()).or_default();
        let mut add = |path: &[String]| {
            if let Some((defining, taken)) = file.below_root(path).and_then(|path| defining(&files, &modules, &path, 0))
                && defining != *name
                && defining != "lib.rs"
            {
                imported.entry(defining).or_default().insert(taken);
            }
        };
        for Use { path, name, is_public } in &file.uses {
            // what is handed on belongs to the file that defines it; here it counts if it is used here
            if *is_public && !file.words.contains(name) {
                continue;
            }
            let Some(root) = file.below_root(path) else { continue };
            let through: Vec<&Vec<String>> = file.paths.iter().filter(|path| path[0] == *name).collect();
            if modules.contains_key(root.as_slice()) && !through.is_empty() {
                for rest in through {
                    add(&[path, &rest[1..]].concat());
                }
            } else {
                add(path);
            }
        }
        for path in &file.paths {
            add(path);
        }
    }
    graph
}

/// The file that defines what a path from the root names, and its name there: past modules and what they hand on.
fn defining(
    files: &BTreeMap<&str, File>,
    modules: &BTreeMap<&[String], &str>,
    path: &[String],
    depth: usize,
) -> Option<(String, String)> {
    assert!(depth < 10, "{} is handed on in a circle", path.join("::"));
    let length = (0..=path.len()).rev().find(|&length| modules.contains_key(&path[..length]))?;
    let name = modules[&path[..length]];
    let Some(word) = path.get(length) else { return Some((name.to_string(), "itself".into())) };
    let handed_on = files[name].uses.iter().find(|found| found.is_public && found.name == *word);
    match handed_on.and_then(|found| files[name].below_root(&found.path)) {
        Some(elsewhere) => {
            let path = [&elsewhere, &path[length + 1..]].concat();
            defining(files, modules, &path, depth + 1)
        }
        None => Some((name.to_string(), word.clone())),
    }
}

/// Files that import each other, directly or by way of others: each circle's files, sorted.
pub fn circles(graph: &Graph) -> Vec<Vec<String>> {
    let reached = |from: &str| {
        let mut reached = BTreeSet::new();
        let mut open = vec![from];
        while let Some(file) = open.pop() {
            for next in graph.get(file).into_iter().flat_map(BTreeMap::keys) {
                if reached.insert(next.as_str()) {
                    open.push(next);
                }
            }
        }
        reached
    };
    let all: BTreeMap<&str, BTreeSet<&str>> = graph.keys().map(|file| (file.as_str(), reached(file))).collect();
    let together = |a: &str, b: &str| all[a].contains(b) && all.get(b).is_some_and(|reached| reached.contains(a));
    let circle = |file: &str| all.keys().filter(|other| together(file, other)).map(|s| s.to_string()).collect();
    let circles: BTreeSet<Vec<String>> =
        all.keys().map(|file| circle(file)).filter(|c: &Vec<_>| !c.is_empty()).collect();
    circles.into_iter().collect()
}

/// A circle with what ties it, for people.
pub fn described(graph: &Graph, circle: &[String]) -> String {
    let mut lines = vec![format!("{} files import each other:", circle.len())];
    for file in circle {
        for (other, names) in graph[file].iter().filter(|(other, _)| circle.contains(other)) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            lines.push(format!("  {file} takes {} from {other}", names.join(", ")));
        }
    }
    lines.join("\n")
}
