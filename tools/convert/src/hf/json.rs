//! JSON files of a checkpoint, and typed lookups whose errors name file and key.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::ConvertError;

/// Tokenizers of large vocabularies have some 30 MB.
const MAX_BYTES: u64 = 256 << 20;

/// A parsed file.
pub(super) struct JsonFile {
    path: PathBuf,
    pub value: Value,
}

impl JsonFile {
    /// The file `name` in `dir`, if there is one.
    pub(super) fn optional(dir: &Path, name: &str) -> Result<Option<Self>, ConvertError> {
        let path = dir.join(name);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = read_limited(&path, MAX_BYTES)?;
        let wrong = |problem: String| ConvertError::Checkpoint { path: path.clone(), problem };
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        if !value.is_object() {
            return Err(wrong(format!("is {}, no object", shortened(&value))));
        }
        Ok(Some(Self { path, value }))
    }

    /// The file `name` in `dir`.
    pub(super) fn required(dir: &Path, name: &str) -> Result<Self, ConvertError> {
        Self::optional(dir, name)?.ok_or_else(|| ConvertError::Checkpoint {
            path: dir.to_owned(),
            problem: format!("there is no {name}: not the directory of a Hugging Face checkpoint"),
        })
    }

    /// An error about a key of this file.
    pub(super) fn wrong(&self, key: &str, problem: impl std::fmt::Display) -> ConvertError {
        ConvertError::Checkpoint { path: self.path.clone(), problem: format!("{key:?} {problem}") }
    }

    /// The value at `key`; null counts as missing.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    /// The whole number at `key`, from 1 to `max`.
    pub(super) fn size(&self, key: &str, max: usize) -> Result<Option<usize>, ConvertError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let n = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=max).contains(n));
        n.map(Some)
            .ok_or_else(|| self.wrong(key, format!("is {}, no number from 1 to {max}", shortened(value))))
    }

    /// [`size`](Self::size), where a missing key is an error.
    pub(super) fn required_size(&self, key: &str, max: usize) -> Result<usize, ConvertError> {
        self.size(key, max)?.ok_or_else(|| self.wrong(key, "is missing"))
    }

    /// The finite number at `key`.
    pub(super) fn number(&self, key: &str) -> Result<Option<f32>, ConvertError> {
        self.number_in(&self.value, key)
    }

    /// The finite number at `key` of an object of this file.
    pub(super) fn number_in(&self, object: &Value, key: &str) -> Result<Option<f32>, ConvertError> {
        let Some(value) = object.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
        let n = value.as_f64().map(|n| n as f32).filter(|n| n.is_finite());
        n.map(Some).ok_or_else(|| self.wrong(key, format!("is {}, no number", shortened(value))))
    }

    /// The string at `key`; another type counts as missing.
    pub(super) fn str(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// The boolean at `key`; another type counts as missing.
    pub(super) fn bool(&self, key: &str) -> Option<bool> {
        self.get(key).and_then(Value::as_bool)
    }
}

/// The bytes of a file that has at most `max`.
pub(super) fn read_limited(path: &Path, max: u64) -> Result<Vec<u8>, ConvertError> {
    let io = ConvertError::io(path);
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(max + 1).read_to_end(&mut bytes)).map_err(io)?;
    if bytes.len() as u64 > max {
        let problem = format!("it is larger than {} MB", max >> 20);
        return Err(ConvertError::Checkpoint { path: path.to_owned(), problem });
    }
    Ok(bytes)
}

/// A value in an error message.
pub(super) fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}
