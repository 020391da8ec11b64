//! Every key that a file of settings can have, out of the types that read it: name, type, default and meaning. The meaning
//! is the key's documentation in the code.

use std::collections::{BTreeMap, VecDeque};

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value};

/// The keys of some kinds of files.
#[derive(Default)]
pub struct Keys {
    generator: SchemaGenerator,
    files: Vec<File>,
}

/// A kind of file.
struct File {
    title: String,
    schema: Value,
}

/// One key, as the page and the command line show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// With the keys above it, a dot between them.
    pub path: String,
    /// For people, in Markdown.
    pub r#type: String,
    /// As a file would say it, or `required`.
    pub default: String,
    /// What the key's documentation says.
    pub meaning: String,
    /// The kinds of the group that have it so, where kinds differ.
    pub kinds: Vec<String>,
}

impl Keys {
    /// And those of the files that are read as a `T`, under a title.
    pub fn of<T: JsonSchema>(mut self, title: &str) -> Self {
        let schema = self.generator.subschema_for::<T>().to_value();
        self.files.push(File { title: title.into(), schema });
        self
    }

    /// The titles of the files, in their order.
    pub fn titles(&self) -> Vec<&str> {
        self.files.iter().map(|file| file.title.as_str()).collect()
    }

    /// All of them as a page in Markdown: a table for each kind of file, then one for each group of settings inside.
    pub fn markdown(&self) -> String {
        let Groups { order, titles } = self.groups();
        let mut page = String::new();
        for file in &self.files {
            let schema = self.resolved(&file.schema);
            page += &format!("## {}\n\n{}\n\n{}", file.title, description(schema), self.table(schema, &titles));
        }
        page += "## Settings inside\n\n";
        for name in order {
            let schema = &self.definitions()[&name];
            page += &format!("### {}\n\n{}\n\n", titles[&name], description(schema));
            match kinds(schema) {
                None => page += &self.table(schema, &titles),
                Some(kinds) => {
                    for kind in kinds {
                        page += &format!("**`kind: {}`** — {}\n\n", words_of(kind).join("`, `"), description(kind));
                        page += &self.table(self.settings_of(kind), &titles);
                    }
                }
            }
        }
        page.trim_end().to_string() + "\n"
    }

    /// The keys of each file whose path is `path`, or lies below it; by the titles of the files.
    pub fn below(&self, path: &str) -> Vec<(&str, Vec<Key>)> {
        let titles = BTreeMap::new();
        let is_below =
            |key: &Key| key.path == path || key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
        let of_file = |file| {
            let mut keys = Vec::new();
            self.walk("", &Value::Null, self.resolved(file), &titles, &mut keys);
            keys.retain(is_below);
            keys
        };
        let found = self.files.iter().map(|file| (file.title.as_str(), of_file(&file.schema)));
        found.filter(|(_, keys)| !keys.is_empty()).collect()
    }

    /// The keys of a mapping and of all in it. `own` is the mapping where a file does not have it.
    fn walk(&self, above: &str, own: &Value, schema: &Value, titles: &BTreeMap<String, String>, keys: &mut Vec<Key>) {
        let below = |name: &str| if above.is_empty() { name.to_string() } else { format!("{above}.{name}") };
        if let Some(kinds) = kinds(schema) {
            keys.push(tag(below(KIND), own, kinds));
        }
        let parts: Vec<(Vec<&str>, &Value)> = kinds(schema).map_or(vec![(Vec::new(), schema)], |kinds| {
            kinds.iter().map(|kind| (words_of(kind), self.settings_of(kind))).collect()
        });
        for (of_kinds, part) in parts {
            for (name, property) in properties(part) {
                let mut key = self.key(name, property, part, titles);
                key.path = below(name);
                let path = key.path.clone();
                let is_same = |known: &&mut Key| Key { kinds: Vec::new(), ..(**known).clone() } == key;
                let known = keys.iter_mut().find(is_same);
                let of_kinds = of_kinds.iter().map(|kind| kind.to_string());
                match known {
                    Some(known) => known.kinds.extend(of_kinds),
                    None => keys.push(Key { kinds: of_kinds.collect(), ..key }),
                }
                if let Some(inside) = self.group(property) {
                    let own = property.get("default").unwrap_or(&Value::Null);
                    self.walk(&path, own, &self.definitions()[&inside], titles, keys);
                }
            }
        }
    }

    fn definitions(&self) -> &Map<String, Value> {
        self.generator.definitions()
    }

    /// What a reference refers to, or the schema itself.
    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        reference(schema).map_or(schema, |name| &self.definitions()[name])
    }

    /// The settings of a kind: those of the registry's implementation, or its own.
    fn settings_of<'a>(&'a self, kind: &'a Value) -> &'a Value {
        kind["allOf"].get(0).map_or(kind, |settings| self.resolved(settings))
    }

    /// The groups of settings, in the order in which files come to them, and under which title each stands: the keys that
    /// lead to it first.
    fn groups(&self) -> Groups {
        let mut groups = Groups::default();
        for file in &self.files {
            let mut open = VecDeque::from([(String::new(), self.resolved(&file.schema))]);
            while let Some((above, schema)) = open.pop_front() {
                let parts = kinds(schema)
                    .map_or(vec![schema], |kinds| kinds.iter().map(|kind| self.settings_of(kind)).collect());
                for (name, property) in parts.into_iter().flat_map(properties) {
                    let Some(inside) = self.group(property) else { continue };
                    let path = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
                    if groups.titles.contains_key(&inside) {
                        continue;
                    }
                    let own = format!("`{path}`");
                    let is_taken = groups.titles.values().any(|title| *title == own);
                    let title = if is_taken { format!("{own} of {}", file.title) } else { own };
                    groups.titles.insert(inside.clone(), title);
                    open.push_back((path, &self.definitions()[&inside]));
                    groups.order.push(inside);
                }
            }
        }
        groups
    }

    /// The name of the group of settings that a property is, or is a list of.
    fn group(&self, property: &Value) -> Option<String> {
        let inner = without_null(property);
        let inner = if inner.get("items").is_some() { &inner["items"] } else { inner };
        let name = reference(inner)?;
        let schema = &self.definitions()[name];
        (schema.get("properties").is_some() || kinds(schema).is_some()).then(|| name.to_string())
    }

    /// The keys of a mapping: first those that a file must have.
    fn table(&self, schema: &Value, titles: &BTreeMap<String, String>) -> String {
        let rows: Vec<Key> =
            properties(schema).map(|(name, property)| self.key(name, property, schema, titles)).collect();
        if rows.is_empty() {
            return String::new();
        }
        let (required, others): (Vec<Key>, Vec<Key>) = rows.into_iter().partition(|key| key.default == REQUIRED);
        let row = |key: Key| {
            let cell = |text: &str| text.replace('|', "\\|");
            let default = if key.default == REQUIRED { REQUIRED.into() } else { format!("`{}`", key.default) };
            format!("| `{}` | {} | {} | {} |\n", key.path, cell(&key.r#type), cell(&default), cell(&key.meaning))
        };
        let rows: String = required.into_iter().chain(others).map(row).collect();
        format!("| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n")
    }

    fn key(&self, name: &str, property: &Value, of: &Value, titles: &BTreeMap<String, String>) -> Key {
        let is_required = of["required"].as_array().is_some_and(|names| names.iter().any(|other| other == name));
        let default = match property.get("default") {
            _ if is_required => REQUIRED.into(),
            None => "null".into(),
            Some(default) => flow(default),
        };
        let words = self.words(property).into_iter().filter(|(_, about)| !about.is_empty());
        let words: Vec<String> =
            words.map(|(word, about)| format!("`{word}`: {}", about.trim_end_matches('.'))).collect();
        let meaning = match words.is_empty() {
            true => description(property),
            false => format!("{} {}.", description(property), words.join("; ")),
        };
        let (r#type, meaning) = (self.type_of(property, titles), meaning.trim().into());
        Key { path: name.into(), r#type, default, meaning, kinds: Vec::new() }
    }

    /// The words that a property can be, each with what it means.
    fn words(&self, property: &Value) -> Vec<(String, String)> {
        let schema = self.resolved(without_null(property));
        let list = schema["oneOf"].as_array().into_iter().flatten();
        list.filter_map(|word| Some((word["const"].as_str()?.to_string(), description(word)))).collect()
    }

    fn type_of(&self, schema: &Value, titles: &BTreeMap<String, String>) -> String {
        if let Some(of) = schema["anyOf"].as_array() {
            let types: Vec<String> = of.iter().map(|part| self.type_of(part, titles)).collect();
            return types.join(" or ");
        }
        if let Some(name) = reference(schema) {
            let inside = &self.definitions()[name];
            let words: Vec<String> = self.words(schema).into_iter().map(|(word, _)| format!("`{word}`")).collect();
            let what = if kinds(inside).is_some() { "settings by `kind`" } else { "settings" };
            return match titles.get(name) {
                Some(title) => format!("[{what}](#{})", anchor(title)),
                None if !words.is_empty() => words.join(", "),
                None if inside.get("properties").is_some() || kinds(inside).is_some() => what.into(),
                None => self.type_of(inside, titles),
            };
        }
        if let Some(words) = schema["enum"].as_array() {
            return words
                .iter()
                .filter_map(Value::as_str)
                .map(|word| format!("`{word}`"))
                .collect::<Vec<_>>()
                .join(", ");
        }
        match &schema["type"] {
            Value::Array(types) => {
                let of = |kind: &Value| self.type_of(&with_type(schema, kind), titles);
                types.iter().map(of).collect::<Vec<_>>().join(" or ")
            }
            Value::String(kind) => match kind.as_str() {
                "integer" => "integer".into(),
                "number" => "number".into(),
                "boolean" => "`true` or `false`".into(),
                "string" => "text".into(),
                "null" => "`null`".into(),
                "array" => match (schema["minItems"].as_i64(), schema.get("items"), schema["prefixItems"].get(0)) {
                    (Some(count), items, first) => {
                        let of = first.or(items).map_or(String::new(), |item| self.type_of(item, titles));
                        format!("list of {count}, each {of}")
                    }
                    (None, Some(items), _) => format!("list, each {}", self.type_of(items, titles)),
                    (None, None, _) => "list".into(),
                },
                other => other.into(),
            },
            _ => "any".into(),
        }
    }
}

#[derive(Default)]
struct Groups {
    /// Names of definitions.
    order: Vec<String>,
    /// The title of each.
    titles: BTreeMap<String, String>,
}

const REQUIRED: &str = "required";

/// The key by which a group of settings names its implementation.
const KIND: &str = "kind";

/// The definition that a schema refers to.
fn reference(schema: &Value) -> Option<&str> {
    schema["$ref"].as_str()?.rsplit('/').next()
}

/// The alternatives of a schema that has a `kind`.
fn kinds(schema: &Value) -> Option<&Vec<Value>> {
    let alternatives = schema["oneOf"].as_array()?;
    alternatives.iter().all(|kind| kind["properties"].get("kind").is_some()).then_some(alternatives)
}

/// How a kind is called: one word or several.
fn words_of(kind: &Value) -> Vec<&str> {
    let tag = &kind["properties"]["kind"];
    let several = tag["enum"].as_array().into_iter().flatten();
    tag.get("const").into_iter().chain(several).filter_map(Value::as_str).collect()
}

/// The key that says which kind a group is of: where the group is left out that of its default, else the kind that need not
/// be named, if there is one.
fn tag(path: String, own: &Value, kinds: &[Value]) -> Key {
    let words = |kind| words_of(kind).join(" or ");
    let meaning: Vec<String> =
        kinds.iter().map(|kind| format!("`{}`: {}", words(kind), description(kind).trim_end_matches('.'))).collect();
    let r#type = kinds.iter().flat_map(words_of).map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ");
    let names_it = |kind: &&Value| kind["required"].as_array().is_some_and(|keys| keys.iter().any(|key| key == KIND));
    let unnamed = || kinds.iter().find(|kind| !names_it(kind)).and_then(|kind| words_of(kind).first().copied());
    let default = own[KIND].as_str().or_else(unnamed).unwrap_or(REQUIRED).into();
    Key { path, r#type, default, meaning: meaning.join("; "), kinds: Vec::new() }
}

/// The keys of a mapping, but the `kind` that stands above its table.
fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    let is_tag =
        |name: &str, property: &Value| name == "kind" && property.get("const").or(property.get("enum")).is_some();
    schema["properties"].as_object().into_iter().flatten().filter(move |(name, property)| !is_tag(name, property))
}

/// Of what may also be nothing the other alternative.
fn without_null(schema: &Value) -> &Value {
    let others = schema["anyOf"].as_array().into_iter().flatten().filter(|part| part["type"] != "null");
    match others.collect::<Vec<_>>()[..] {
        [only] => only,
        _ => schema,
    }
}

fn with_type(schema: &Value, kind: &Value) -> Value {
    let mut one = schema.clone();
    one["type"] = kind.clone();
    one
}

/// The documentation in one line, without links that only the code's own pages follow.
fn description(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace("[`", "`").replace("`]", "`")
}

/// A value as a file says it in one line.
fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => format!("[{}]", list.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::Object(object) => {
            let kind = object.get("kind").into_iter().map(|kind| format!("kind: {}", flow(kind)));
            let others = object
                .iter()
                .filter(|(name, _)| *name != "kind")
                .map(|(name, value)| format!("{name}: {}", flow(value)));
            let all: Vec<String> = kind.chain(others).collect();
            match all.len() {
                0..=4 => format!("{{{}}}", all.join(", ")),
                _ => "{}".into(),
            }
        }
        Value::Number(number) => number.as_f64().map_or(number.to_string(), |float| match number.is_f64() {
            true => format!("{float:?}"),
            false => number.to_string(),
        }),
        other => other.to_string(),
    }
}

/// The anchor that GitHub and others give a heading.
fn anchor(title: &str) -> String {
    let kept = title.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
}
