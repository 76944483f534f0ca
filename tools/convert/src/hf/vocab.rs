//! The tokenizer of a checkpoint as `tokenizer.ggml.*` keys.
//!
//! tokenizer.model (SentencePiece) is taken where it is there, else tokenizer.json: byte-level BPE (`gpt2`), or BPE with
//! byte fallback, which is a SentencePiece model in other clothes (`llama`).

use std::path::Path;

use serde_json::Value;
use skiff::gguf::{Builder, StringArray};

use super::config::HfConfig;
use super::json::{JsonFile, read_limited, shortened};
use super::proto::SentencePiece;
use crate::ConvertError;

// `tokenizer.ggml.token_type`
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The score of tokens that no text is merged to.
const NEVER: f32 = -1000.0;

/// tokenizer.model of the largest vocabularies has 5 MB.
const MAX_MODEL_BYTES: u64 = 64 << 20;

/// A vocabulary being put together.
struct Vocab {
    /// `llama` or `gpt2`
    model: &'static str,
    pre: String,
    tokens: Vec<Vec<u8>>,
    kinds: Vec<i32>,
    /// `llama` only.
    scores: Vec<f32>,
    /// `gpt2` only.
    merges: Vec<String>,
    add_space_prefix: Option<bool>,
}

/// The JSON files, as far as they are there.
struct Files {
    tokenizer: Option<JsonFile>,
    config: Option<JsonFile>,
    generation: Option<JsonFile>,
    added: Option<JsonFile>,
}

/// Writes the tokenizer's keys; `pre` replaces what would be detected.
pub(super) fn write(
    builder: &mut Builder,
    dir: &Path,
    config: &HfConfig,
    pre: Option<&str>,
) -> Result<(), ConvertError> {
    let files = Files {
        tokenizer: JsonFile::optional(dir, "tokenizer.json")?,
        config: JsonFile::optional(dir, "tokenizer_config.json")?,
        generation: JsonFile::optional(dir, "generation_config.json")?,
        added: JsonFile::optional(dir, "added_tokens.json")?,
    };
    let mut vocab = match (dir.join("tokenizer.model"), &files.tokenizer) {
        (path, _) if path.is_file() => from_sentencepiece(&path, config)?,
        (_, Some(json)) => from_json(json, config, pre)?,
        _ => {
            let problem = "there is neither tokenizer.model nor tokenizer.json".to_owned();
            return Err(ConvertError::Checkpoint { path: dir.to_owned(), problem });
        }
    };
    vocab.add_tokens(&files)?;
    if vocab.tokens.len() != config.vocab {
        vocab.fit(dir, config.vocab)?;
    }
    vocab.write(builder)?;
    special_ids(builder, &vocab, &files, config)?;
    chat_template(builder, dir, &files)
}

fn from_sentencepiece(path: &Path, config: &HfConfig) -> Result<Vocab, ConvertError> {
    let bytes = read_limited(path, MAX_MODEL_BYTES)?;
    let model = SentencePiece::parse(&bytes)
        .map_err(|problem| ConvertError::Checkpoint { path: path.to_owned(), problem })?;
    let mut vocab = Vocab {
        model: "llama",
        pre: "default".into(),
        tokens: Vec::with_capacity(config.vocab),
        kinds: Vec::new(),
        scores: Vec::new(),
        merges: Vec::new(),
        // True is the default of every reader.
        add_space_prefix: (!model.add_dummy_prefix).then_some(false),
    };
    for piece in model.pieces {
        vocab.tokens.push(piece.text);
        vocab.kinds.push(piece.kind);
        vocab.scores.push(piece.score);
    }
    Ok(vocab)
}

fn from_json(json: &JsonFile, config: &HfConfig, pre: Option<&str>) -> Result<Vocab, ConvertError> {
    let model = json.get("model").ok_or_else(|| json.wrong("model", "is missing"))?;
    // Files from before 0.10 of the tokenizers crate have no type.
    if let Some(kind) = model.get("type").and_then(Value::as_str).filter(|&kind| kind != "BPE") {
        return Err(json.wrong("model.type", format!("is {kind:?}: only BPE is supported")));
    }
    let ids = model.get("vocab").and_then(Value::as_object);
    let ids = ids.ok_or_else(|| json.wrong("model.vocab", "is missing or no object"))?;
    let mut tokens: Vec<Option<Vec<u8>>> = vec![None; config.vocab];
    for (token, id) in ids {
        let slot = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
        let wrong = || {
            let range = format!("has id {} in a vocabulary of {}", shortened(id), config.vocab);
            json.wrong(token, range)
        };
        *slot.ok_or_else(wrong)? = Some(token.as_bytes().to_vec());
    }
    let merges = merges(json, model)?;
    let fallback = model.get("byte_fallback").and_then(Value::as_bool).unwrap_or(false);
    let kinds = tokens.iter().map(|token| match token {
        None => UNUSED,
        Some(token) if fallback && is_byte(token) => BYTE,
        Some(_) => NORMAL,
    });
    let kinds = kinds.collect();
    let named = tokens.into_iter().enumerate();
    let mut vocab = Vocab {
        model: "gpt2",
        pre: String::new(),
        tokens: named.map(|(i, token)| token.unwrap_or_else(|| format!("[PAD{i}]").into_bytes())).collect(),
        kinds,
        scores: Vec::new(),
        merges: Vec::new(),
        add_space_prefix: None,
    };
    if fallback {
        vocab.model = "llama";
        vocab.pre = "default".into();
        vocab.scores = scores_of(&vocab.tokens, &merges);
        vocab.add_space_prefix = (!prepends_space(json)).then_some(false);
    } else {
        vocab.pre = match pre {
            Some(pre) => pre.to_owned(),
            None => detect_pre(json)?.to_owned(),
        };
        vocab.merges = merges.iter().map(|(a, b)| format!("{} {}", escaped(a), escaped(b))).collect();
    }
    Ok(vocab)
}

/// `<0x0A>`
fn is_byte(token: &[u8]) -> bool {
    let digits = token.strip_prefix(b"<0x").and_then(|rest| rest.strip_suffix(b">"));
    digits.is_some_and(|d| d.len() == 2 && d.iter().all(u8::is_ascii_hexdigit))
}

/// A space inside a part of a merge would end it; the converter moves it as byte-level BPE moves spaces.
fn escaped(part: &str) -> String {
    part.replace(' ', "\u{120}")
}

/// Pairs, as both notations have them: `"a b"` and `["a", "b"]`.
fn merges<'a>(json: &JsonFile, model: &'a Value) -> Result<Vec<(&'a str, &'a str)>, ConvertError> {
    let list = model.get("merges").and_then(Value::as_array);
    let list = list.ok_or_else(|| json.wrong("model.merges", "is missing or no array"))?;
    let pair = |merge: &'a Value| match merge {
        // A part may begin with a space, but is not empty.
        Value::String(text) => {
            let at = text.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at)?;
            Some((&text[..at], &text[at + 1..]))
        }
        Value::Array(parts) => match parts.as_slice() {
            [Value::String(a), Value::String(b)] => Some((a.as_str(), b.as_str())),
            _ => None,
        },
        _ => None,
    };
    let read =
        |merge| pair(merge).ok_or_else(|| json.wrong("model.merges", format!("has {}", shortened(merge))));
    list.iter().map(read).collect()
}

/// Scores that make SentencePiece's merging do the merges in their order: of a merged token, minus its rank.
fn scores_of(tokens: &[Vec<u8>], merges: &[(&str, &str)]) -> Vec<f32> {
    let mut rank = std::collections::HashMap::new();
    for (i, (a, b)) in merges.iter().enumerate() {
        rank.entry(format!("{a}{b}").into_bytes()).or_insert(i);
    }
    tokens
        .iter()
        .map(|token| rank.get(token).map_or(NEVER * NEVER, |&i| i as f32).min(f32::MAX))
        .map(|r| -r)
        .collect()
}

/// Whether the tokenizer puts a space before a text.
fn prepends_space(json: &JsonFile) -> bool {
    let mut found = false;
    let mut look = |kind: &str, stage: &Value| {
        let scheme = stage.get("prepend_scheme").and_then(Value::as_str);
        let prefix = stage.get("add_prefix_space").and_then(Value::as_bool);
        found |= kind == "Prepend"
            || kind == "Metaspace" && scheme != Some("never") && (scheme.is_some() || prefix == Some(true));
    };
    for key in ["normalizer", "pre_tokenizer"] {
        json.get(key).into_iter().for_each(|stage| each_stage(stage, &mut look));
    }
    found
}

/// Calls `look(type, stage)` for a stage, or for those of a sequence.
fn each_stage(stage: &Value, look: &mut impl FnMut(&str, &Value)) {
    let parts =
        ["normalizers", "pretokenizers", "processors"].iter().find_map(|key| stage.get(key)?.as_array());
    match (stage.get("type").and_then(Value::as_str), parts) {
        // One level: nobody nests them, and recursion would be the file's to choose.
        (Some("Sequence"), Some(parts)) => {
            for part in parts {
                look(part.get("type").and_then(Value::as_str).unwrap_or_default(), part);
            }
        }
        (kind, _) => look(kind.unwrap_or_default(), stage),
    }
}

/// `tokenizer.ggml.pre` by the splitting expression. (llama.cpp's converter tells them by a hash of the ids of a test
/// text, for which it has to run the tokenizer.)
const PRES: [(&str, &str); 3] = [
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken",
    ),
];

fn detect_pre(json: &JsonFile) -> Result<&'static str, ConvertError> {
    let (mut stages, mut regex) = (Vec::new(), None::<String>);
    if let Some(stage) = json.get("pre_tokenizer") {
        each_stage(stage, &mut |kind, stage| {
            let flag = |key: &str, default| stage.get(key).and_then(Value::as_bool).unwrap_or(default);
            stages.push(match kind {
                "ByteLevel" if flag("use_regex", true) => "gpt2",
                "ByteLevel" => "bytes",
                "Digits" if flag("individual_digits", false) => "digits",
                "Split" => "split",
                _ => "other",
            });
            let pattern = stage.get("pattern").and_then(|p| p.get("Regex")).and_then(Value::as_str);
            if kind == "Split" && regex.is_none() {
                regex = pattern.map(str::to_owned);
            }
        });
    }
    let by_regex =
        || PRES.iter().find(|(pattern, _)| Some(*pattern) == regex.as_deref()).map(|(_, pre)| *pre);
    let found = match stages.as_slice() {
        ["gpt2"] => Some("gpt-2"),
        ["digits", "gpt2"] => Some("smollm"),
        ["split", "bytes"] => by_regex(),
        _ => None,
    };
    found.ok_or_else(|| {
        let what = json.get("pre_tokenizer").map_or("missing".to_owned(), shortened);
        json.wrong("pre_tokenizer", format!("is none that is known ({what}); --pre NAME says which it is"))
    })
}

impl Vocab {
    /// Adds what added_tokens.json, tokenizer.json and tokenizer_config.json list besides the model.
    fn add_tokens(&mut self, files: &Files) -> Result<(), ConvertError> {
        // Of SentencePiece models the first file's tokens are plain text; the others tell special ones.
        if let Some(json) = files.added.as_ref().filter(|_| self.model == "llama") {
            for (token, id) in json.value.as_object().into_iter().flatten() {
                self.set(token_id(json, token, id)?, token, USER_DEFINED);
            }
        }
        if let Some(json) = &files.tokenizer {
            for entry in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
                let content = entry.get("content").and_then(Value::as_str);
                let content =
                    content.ok_or_else(|| json.wrong("added_tokens", "has an entry without content"))?;
                let id = token_id(json, content, entry.get("id").unwrap_or(&Value::Null))?;
                self.set_added(id, content, entry);
            }
        }
        if let Some(json) = &files.config {
            for (id, entry) in
                json.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten()
            {
                let content = entry.get("content").and_then(Value::as_str);
                let (Some(content), Ok(id)) = (content, id.parse()) else {
                    return Err(json.wrong("added_tokens_decoder", format!("has a malformed entry {id:?}")));
                };
                self.set_added(id, content, entry);
            }
        }
        Ok(())
    }

    fn set_added(&mut self, id: usize, content: &str, entry: &Value) {
        let special =
            entry.get("special").and_then(Value::as_bool).unwrap_or(false) || looks_special(content);
        // The unknown token of a SentencePiece model keeps its kind.
        let unknown = self.kinds.get(id) == Some(&2);
        match special {
            true => self.set(id, content, if unknown { 2 } else { CONTROL }),
            false => self.set(id, &content.replace('\u{2581}', " "), USER_DEFINED),
        }
    }

    /// Ids beyond the vocabulary grow it; [`fit`](Self::fit) has the last word.
    fn set(&mut self, id: usize, token: &str, kind: i32) {
        if id > self.tokens.len() + MAX_GAP {
            return; // `fit` would refuse it anyway
        }
        for i in self.tokens.len()..=id {
            self.tokens.push(format!("[PAD{i}]").into_bytes());
            self.kinds.push(UNUSED);
            if self.model == "llama" {
                self.scores.push(NEVER);
            }
        }
        self.tokens[id] = token.as_bytes().to_vec();
        self.kinds[id] = kind;
        if self.model == "llama" && kind != 2 {
            self.scores[id] = NEVER;
        }
    }

    /// Pads the vocabulary to the rows of the embedding; drops added tokens that have no row there, as the converter
    /// does.
    fn fit(&mut self, dir: &Path, size: usize) -> Result<(), ConvertError> {
        let spare = self.kinds.iter().skip(size).all(|&kind| matches!(kind, CONTROL | USER_DEFINED | UNUSED));
        if self.tokens.len() > size && !spare {
            let problem = format!("the tokenizer has {} tokens, vocab_size is {size}", self.tokens.len());
            return Err(ConvertError::Checkpoint { path: dir.to_owned(), problem });
        }
        self.tokens.truncate(size);
        self.kinds.truncate(size);
        self.scores.truncate(size);
        for i in self.tokens.len()..size {
            self.tokens.push(format!("[PAD{i}]").into_bytes());
        }
        self.kinds.resize(size, UNUSED);
        if self.model == "llama" {
            self.scores.resize(size, NEVER);
        }
        Ok(())
    }

    fn write(&self, builder: &mut Builder) -> Result<(), ConvertError> {
        builder.insert("tokenizer.ggml.model", self.model)?;
        builder.insert("tokenizer.ggml.pre", self.pre.as_str())?;
        builder.insert("tokenizer.ggml.tokens", self.tokens.iter().collect::<StringArray>())?;
        if self.model == "llama" {
            builder.insert("tokenizer.ggml.scores", self.scores.clone())?;
        }
        builder.insert("tokenizer.ggml.token_type", self.kinds.clone())?;
        if self.model == "gpt2" {
            builder.insert("tokenizer.ggml.merges", self.merges.iter().collect::<StringArray>())?;
        }
        if let Some(on) = self.add_space_prefix {
            builder.insert("tokenizer.ggml.add_space_prefix", on)?;
        }
        Ok(())
    }

    fn id_of(&self, token: &str) -> Option<u32> {
        self.tokens.iter().position(|t| t == token.as_bytes()).and_then(|id| id.try_into().ok())
    }
}

/// Unused ids between a vocabulary and its added tokens: some embeddings are padded by hundreds of rows.
const MAX_GAP: usize = 1 << 16;

fn token_id(json: &JsonFile, token: &str, id: &Value) -> Result<usize, ConvertError> {
    let id_of = id.as_u64().filter(|&id| id < 1 << 31);
    id_of.map(|id| id as usize).ok_or_else(|| json.wrong(token, format!("has the id {}", shortened(id))))
}

/// Control tokens that some tokenizers forget to mark (the converter's `does_token_look_special`).
fn looks_special(token: &str) -> bool {
    let known = ["<pad>", "<mask>", "<2mass>", "[@BOS@]"];
    known.contains(&token)
        || token.starts_with("<|") && token.ends_with("|>")
        || token.starts_with("<｜") && token.ends_with("｜>")
        || token.starts_with("<unused") && token.ends_with('>')
}

/// `tokenizer.ggml.*_token_id` and `add_*_token`: tokenizer_config.json, then config.json and generation_config.json.
fn special_ids(
    builder: &mut Builder,
    vocab: &Vocab,
    files: &Files,
    config: &HfConfig,
) -> Result<(), ConvertError> {
    let size = vocab.tokens.len() as u64;
    let generation = |key: &str| {
        let value = files.generation.as_ref()?.get(key)?;
        let value = value.as_array().map_or(Some(value), |ids| ids.first())?;
        value.as_u64().and_then(|id| id.try_into().ok())
    };
    let named = |key: &str| {
        let token = files.config.as_ref()?.get(key)?;
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        vocab.id_of(text)
    };
    let (template_bos, template_eos) = files.tokenizer.as_ref().map_or((None, None), added_by_template);
    for (name, key, fallback) in [
        ("bos", "bos_token", config.bos.or(generation("bos_token_id"))),
        ("eos", "eos_token", config.eos.or(generation("eos_token_id"))),
        ("unknown", "unk_token", None),
        ("padding", "pad_token", config.pad.or(generation("pad_token_id"))),
    ] {
        if let Some(id) = named(key).or(fallback).filter(|&id| u64::from(id) < size) {
            builder.insert(format!("tokenizer.ggml.{name}_token_id"), id)?;
        }
    }
    for (name, key, template) in
        [("add_bos_token", "add_bos_token", template_bos), ("add_eos_token", "add_eos_token", template_eos)]
    {
        let said = files.config.as_ref().and_then(|json| json.bool(key));
        if let Some(on) = said.or(template) {
            builder.insert(format!("tokenizer.ggml.{name}"), on)?;
        }
    }
    Ok(())
}

/// Whether the post-processor of tokenizer.json adds a token before and after a text; `None`: it does not say.
fn added_by_template(json: &JsonFile) -> (Option<bool>, Option<bool>) {
    let mut found = (None, None);
    if let Some(processor) = json.get("post_processor") {
        each_stage(processor, &mut |kind, stage| match kind {
            "ByteLevel" => {
                found.0 = found.0.or(Some(false));
                found.1 = found.1.or(Some(false));
            }
            "TemplateProcessing" => {
                let parts = stage.get("single").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
                let special =
                    |part: Option<&Value>| part.is_some_and(|part| part.get("SpecialToken").is_some());
                found = (Some(special(parts.first())), Some(special(parts.last())));
            }
            _ => {}
        });
    }
    found
}

/// chat_template.jinja, or the template of tokenizer_config.json; of several named ones that called `default`.
fn chat_template(builder: &mut Builder, dir: &Path, files: &Files) -> Result<(), ConvertError> {
    const MAX_TEMPLATE_BYTES: u64 = 4 << 20;
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        let bytes = read_limited(&path, MAX_TEMPLATE_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|_| ConvertError::Checkpoint {
            path: path.clone(),
            problem: "it is not UTF-8".into(),
        })?;
        builder.insert("tokenizer.chat_template", text)?;
        return Ok(());
    }
    let template = files.config.as_ref().and_then(|json| json.get("chat_template"));
    let named = |all: &Value| -> Option<String> {
        let default =
            all.as_array()?.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"))?;
        default.get("template")?.as_str().map(str::to_owned)
    };
    if let Some(text) = template.and_then(|t| t.as_str().map(str::to_owned).or_else(|| named(t))) {
        builder.insert("tokenizer.chat_template", text)?;
    }
    Ok(())
}
