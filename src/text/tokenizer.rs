//! CLIP's tokenizer: a prompt → the numbers that the text encoder reads.

use std::{collections::BTreeMap, path::Path, str::FromStr};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::captions::mended;
use crate::{file_format::read_json, text_file::read_text};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// What a tokenizer is made of: a run carries it beside its text encoder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenizerFiles {
    /// The contents of a `tokenizer.json`.
    pub contents: Value,
    /// The token that fills short prompts up, if it is not the one that ends them.
    pub padding: Option<String>,
}

impl TokenizerFiles {
    /// A folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`; words that were added to it
    /// (`added_tokens.json`, or `added_tokens_decoder` of `tokenizer_config.json`); and the padding, which
    /// `special_tokens_map.json` names before `tokenizer_config.json` does, unless the latter lists added tokens.
    ///
    /// # Errors
    /// Names the file that is missing or damaged, or the added word whose number is another's.
    pub fn read(folder: &Path) -> Result<Self> {
        let [whole, vocabulary, merges, config] =
            ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"].map(|name| folder.join(name));
        let mut contents = if whole.exists() {
            read_json(&whole)?
        } else {
            ensure!(
                vocabulary.exists() && merges.exists(),
                "{} holds neither tokenizer.json nor vocab.json and merges.txt",
                folder.display()
            );
            let merges = read_text(&merges).with_context(|| format!("cannot read {}", merges.display()))?;
            described(&read_json(&vocabulary)?, &merges).with_context(|| vocabulary.display().to_string())?
        };
        let optional = |path: &Path| if path.exists() { read_json(path) } else { Ok(Value::Null) };
        let config = optional(&config)?;
        let [added, special] = ["added_tokens.json", "special_tokens_map.json"].map(|name| folder.join(name));
        let decoder = config["added_tokens_decoder"].as_object();
        for (id, token) in decoder.into_iter().flatten() {
            let context = || format!("added_tokens_decoder of {}", folder.join("tokenizer_config.json").display());
            let content = token["content"].as_str().with_context(context)?;
            let id: i64 = id.parse().with_context(context)?;
            add_token(&mut contents, content, &json!(id), token).with_context(context)?;
        }
        for (content, id) in optional(&added)?.as_object().into_iter().flatten() {
            add_token(&mut contents, content, id, &Value::Null).with_context(|| added.display().to_string())?;
        }
        let special = if decoder.is_some() { Value::Null } else { optional(&special)? };
        let padding = [&special, &config].into_iter().find_map(|of| {
            let token = of.get("pad_token")?;
            Some(token.get("content").unwrap_or(token).as_str()?.to_string())
        });
        Ok(TokenizerFiles { contents, padding })
    }
}

/// A word that is one token; one that is there already has its number. How it is found in a text (alone or within a word,
/// with the white space beside it, in the text as it is or in lower case) is as `flags` say, or as by default.
fn add_token(contents: &mut Value, content: &str, id: &Value, flags: &Value) -> Result<()> {
    let listed = contents["added_tokens"].as_array().into_iter().flatten();
    let listed = listed.map(|token| (token["content"].as_str().unwrap_or_default(), &token["id"]));
    let vocabulary = contents["model"]["vocab"].as_object();
    let mut known = vocabulary.into_iter().flatten().map(|(word, id)| (word.as_str(), id)).chain(listed);
    let other = known.find(|(word, number)| (*word == content) != (*number == id));
    if let Some((word, number)) = other {
        bail!("`{content}` has the number {id}, but the vocabulary says `{word}` = {number}");
    }
    let is_listed = contents["added_tokens"]
        .as_array()
        .is_some_and(|listed| listed.iter().any(|token| token["content"] == content));
    if !is_listed {
        let words = contents["model"]["vocab"].as_object_mut().context("the tokenizer has no vocabulary of words")?;
        words.insert(content.to_string(), id.clone());
        let mut token = json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": true, "special": false});
        for flag in ["single_word", "lstrip", "rstrip", "normalized", "special"] {
            if flags[flag].is_boolean() {
                token[flag] = flags[flag].clone();
            }
        }
        match contents["added_tokens"].as_array_mut() {
            Some(listed) => listed.push(token),
            None => contents["added_tokens"] = json!([token]),
        }
    }
    Ok(())
}

/// A vocabulary and merges as a `tokenizer.json`, with the rules by which CLIP's are applied.
fn described(vocabulary: &Value, merges: &str) -> Result<Value> {
    let is_merge = |line: &&str| !line.is_empty() && !line.starts_with("#version");
    let merges: Vec<&str> = merges.lines().filter(is_merge).collect();
    let special = |content: &str| -> Result<Value> {
        let id = vocabulary.get(content).with_context(|| format!("the vocabulary has no `{content}`"))?;
        Ok(json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}))
    };
    let words = format!(
        r"{}|{}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
        START.replace('|', r"\|"),
        END.replace('|', r"\|")
    );
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(START)?, special(END)?],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": END, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": merges,
        },
    }))
}

/// Lower case, one space for any white space, composed letters, then byte pairs of words (Radford et al. 2021).
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: i64,
    end: i64,
    padding: i64,
    /// What stands for one added word besides its first token: `<cat-toy>` was learned with `<cat-toy>_1` and so on.
    more: BTreeMap<i64, Vec<i64>>,
}

impl Tokenizer {
    /// # Errors
    /// Files that are no tokenizer's; a vocabulary without start, end or padding.
    pub fn new(files: &TokenizerFiles) -> Result<Self> {
        let mut inner =
            tokenizers::Tokenizer::from_str(&files.contents.to_string()).map_err(|e| anyhow!("tokenizer: {e}"))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| anyhow!("tokenizer: {e}"))?;
        let id = |token: &str| {
            inner.token_to_id(token).map(i64::from).with_context(|| format!("the tokenizer has no `{token}`"))
        };
        let (start, end) = (id(START)?, id(END)?);
        let padding = files.padding.as_deref().map_or(Ok(end), id)?;
        let added: BTreeMap<String, i64> =
            inner.get_added_tokens_decoder().into_iter().map(|(id, token)| (token.content, i64::from(id))).collect();
        let further = |word: &str| (1..).map_while(|i| added.get(&format!("{word}_{i}")).copied()).collect::<Vec<_>>();
        let more = added.iter().map(|(word, &id)| (id, further(word))).filter(|(_, more)| !more.is_empty()).collect();
        Ok(Tokenizer { inner, start, end, padding, more })
    }

    /// One more than the largest number it gives.
    pub fn vocabulary(&self) -> i64 {
        self.inner.get_vocab(true).into_values().max().map_or(0, |most| i64::from(most) + 1)
    }

    /// Start, the prompt with its entities and quotes mended, end, and padding up to `length`. A longer prompt is cut, with a warning.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn tokens(&self, prompt: &str, length: i64) -> Result<Vec<i64>> {
        let prompt = &*mended(prompt);
        let encoding = self.inner.encode_fast(prompt, false).map_err(|e| anyhow!("tokenizer: {e}"))?;
        let ids = self.with_further(encoding.get_ids());
        let room = length.max(2) as usize - 2;
        if ids.len() > room {
            let head: String = prompt.chars().take(40).collect();
            tracing::warn!("a prompt of {} tokens is cut to {length}: `{head}…`", ids.len() + 2);
        }
        let words = ids.into_iter().take(room);
        let mut tokens: Vec<i64> = std::iter::once(self.start).chain(words).chain([self.end]).collect();
        tokens.resize(length as usize, self.padding);
        Ok(tokens)
    }

    /// An added word of several vectors is all of them, as diffusers has it, where the prompt does not spell them out.
    fn with_further(&self, ids: &[u32]) -> Vec<i64> {
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let mut all = Vec::with_capacity(ids.len());
        for (i, id) in ids.iter().enumerate() {
            all.push(*id);
            all.extend(self.more.get(id).filter(|more| !ids[i + 1..].starts_with(more)).into_iter().flatten());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_byte_order_mark_is_no_merge() {
        let folder = tempfile::tempdir().unwrap();
        let vocabulary = json!({"a": 0, "b</w>": 1, "ab</w>": 2, START: 3, END: 4}).to_string();
        let read = |mark: &str| {
            fs::write(folder.path().join("vocab.json"), format!("{mark}{vocabulary}")).unwrap();
            fs::write(folder.path().join("merges.txt"), format!("{mark}#version: 0.2\na b</w>\n")).unwrap();
            TokenizerFiles::read(folder.path()).unwrap().contents
        };
        let right = read("");
        assert_eq!(right["model"]["merges"].as_array().unwrap().len(), 1);
        assert_eq!(read("\u{feff}"), right);
    }
}
