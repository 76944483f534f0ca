//! Files of the cache: locks, temporary files, checks and the rename that makes a file visible.
//!
//! A file under its final name is whole: bytes are gathered under a temporary name, hashed, flushed to the disk
//! and only then renamed. Beside `M.gguf` lie `M.gguf.lock` (held while it is pulled), `M.gguf.sha256` (what was
//! verified, and of which size and time), and during a pull `M.gguf.tmp/` or `M.gguf.part`.

use super::error::PullError;
use super::progress;
use crate::memory;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Large enough that system calls do not count, small enough for L2.
pub(super) const CHUNK: usize = 256 << 10;

/// The cache directory: `$SKIFF_CACHE`, else `$XDG_CACHE_HOME/skiff`, else `~/.cache/skiff`.
pub(super) fn directory(var: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, PullError> {
    let set = |name| var(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    // A relative XDG_CACHE_HOME is to be ignored, says its specification.
    set("SKIFF_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").filter(|p| p.is_absolute()).map(|p| p.join("skiff")))
        .or_else(|| set("HOME").map(|p| p.join(".cache").join("skiff")))
        .ok_or(PullError::NoCacheDir)
}

/// `path` with `suffix` put to its file name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Held while one file is pulled. The system frees it when the process ends, however it ends, so that a killed
/// pull never blocks the next one. The lock file stays: to remove it would race with who waits for it.
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until no other process pulls `target`; creates its directory.
    pub(super) fn of(target: &Path) -> Result<Lock, PullError> {
        if let Some(dir) = target.parent() {
            fs::create_dir_all(dir).map_err(PullError::io("create", dir))?;
        }
        let path = beside(target, ".lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(PullError::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("waiting for another process that pulls {}", target.display());
                file.lock().map_err(PullError::io("lock", &path))?;
            }
            Err(TryLockError::Error(e)) => return Err(PullError::io("lock", &path)(e)),
        }
        Ok(Lock { _file: file })
    }
}

/// A directory for one pull, beside `target`, removed when dropped. The caller holds the lock of `target`, so
/// that whatever lies there already was left by a killed pull.
pub(super) struct TempDir(PathBuf);

impl TempDir {
    pub(super) fn of(target: &Path, _lock: &Lock) -> Result<TempDir, PullError> {
        let dir = beside(target, ".tmp");
        remove_dir(&dir)?;
        fs::create_dir_all(&dir).map_err(PullError::io("create", &dir))?;
        Ok(TempDir(dir))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next pull.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn remove_dir(dir: &Path) -> Result<(), PullError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(PullError::io("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// What a file should be, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) bytes: Option<u64>,
    /// 64 lower-case hexadecimal digits.
    pub(super) sha256: Option<String>,
}

/// Checks `tmp` and gives it its final name. A file that fails the check is removed.
pub(super) fn publish(tmp: &Path, target: &Path, expected: &Expected) -> Result<(), PullError> {
    let sha256 = match check(tmp, expected) {
        Ok(sha256) => sha256,
        Err(error) => {
            if matches!(error, PullError::Checksum { .. } | PullError::Length { .. }) {
                let _ = fs::remove_file(tmp);
            }
            return Err(error);
        }
    };
    // Without this a power cut could leave the new name on blocks that were never written.
    let file = File::open(tmp).and_then(|file| file.sync_all().map(|()| file));
    memory::leave_page_cache(&file.map_err(PullError::io("write", tmp))?);
    fs::rename(tmp, target).map_err(PullError::io("rename", tmp))?;
    write_marker(target, &sha256)
}

/// Compares length and SHA-256; the SHA-256 that was found comes back.
fn check(path: &Path, expected: &Expected) -> Result<String, PullError> {
    let found = fs::metadata(path).map_err(PullError::io("read", path))?.len();
    if let Some(expected) = expected.bytes.filter(|&n| n != found) {
        return Err(PullError::Length { path: path.into(), expected, found });
    }
    let sha256 = hash(path, found)?;
    match &expected.sha256 {
        Some(expected) if !expected.eq_ignore_ascii_case(&sha256) => {
            Err(PullError::Checksum { path: path.into(), expected: expected.clone(), found: sha256 })
        }
        _ => Ok(sha256),
    }
}

fn hash(path: &Path, bytes: u64) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(PullError::io("open", path))?;
    let bar = progress::bar("verifying", &file_name(path), bytes);
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                sha256.update(&buffer[..n]);
                bar.inc(n as u64);
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(PullError::io("read", path)(e)),
        }
    }
    bar.finish_and_clear();
    Ok(sha256.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// The last part of `path`, for people.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// True if `target` is there, whole and as expected. The hash is only computed where the marker does not
/// already vouch for a file of this size and time.
pub(super) fn is_good(target: &Path, expected: &Expected) -> Result<bool, PullError> {
    let Ok(metadata) = fs::metadata(target) else { return Ok(false) };
    if !metadata.is_file() || expected.bytes.is_some_and(|n| n != metadata.len()) {
        return Ok(false);
    }
    let marker = fs::read_to_string(beside(target, ".sha256")).ok();
    let noted = marker.as_deref().and_then(parse_marker);
    let wanted = expected.sha256.as_deref().or(noted.map(|(_, sha)| sha));
    match (wanted, noted) {
        // A file that somebody put there by hand, and nobody knows its hash.
        (None, _) => Ok(true),
        (Some(wanted), Some((stamp, sha))) if wanted == sha && stamp == stamp_of(target)? => Ok(true),
        (Some(wanted), _) => match check(target, &Expected { bytes: None, sha256: Some(wanted.into()) }) {
            Ok(sha256) => {
                // A cache that cannot be written to is still good to read from.
                let _ = write_marker(target, &sha256);
                Ok(true)
            }
            Err(PullError::Checksum { .. }) => Ok(false),
            Err(error) => Err(error),
        },
    }
}

/// In the format of `sha256sum`, which ignores the first line; `sha256sum -c M.gguf.sha256` checks the file.
fn write_marker(target: &Path, sha256: &str) -> Result<(), PullError> {
    let (path, tmp) = (beside(target, ".sha256"), beside(target, ".sha256.tmp"));
    let text = format!("# verified {}\n{sha256}  {}\n", stamp_of(target)?, file_name(target));
    fs::write(&tmp, text).map_err(PullError::io("write", &tmp))?;
    fs::rename(&tmp, &path).map_err(PullError::io("rename", &tmp))
}

/// The stamp and the SHA-256 of a marker.
fn parse_marker(text: &str) -> Option<(&str, &str)> {
    let (first, second) = text.split_once('\n')?;
    let sha256 = second.split_whitespace().next().filter(|s| is_sha256(s))?;
    Some((first.strip_prefix("# verified ")?, sha256))
}

/// What changes when a file is written to: its size and its time.
fn stamp_of(path: &Path) -> Result<String, PullError> {
    let metadata = fs::metadata(path).map_err(PullError::io("read", path))?;
    let time = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Ok(format!("size={} mtime={}.{:09}", metadata.len(), time.as_secs(), time.subsec_nanos()))
}

/// 64 hexadecimal digits.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn expect(sha256: &str) -> Expected {
        Expected { bytes: Some(3), sha256: Some(sha256.into()) }
    }

    #[test]
    fn the_directory_follows_the_variables_in_order() {
        let of = |vars: &[(&str, &str)]| {
            let vars: Vec<_> = vars.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
            directory(move |k| vars.iter().find(|(n, _)| n == k).map(|(_, v)| v.into())).ok()
        };
        let all = [("SKIFF_CACHE", "/s"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(of(&all), Some("/s".into()));
        assert_eq!(of(&all[1..]), Some("/x/skiff".into()));
        assert_eq!(of(&all[2..]), Some("/h/.cache/skiff".into()));
        assert_eq!(
            of(&[("SKIFF_CACHE", ""), ("XDG_CACHE_HOME", "rel"), ("HOME", "/h")]),
            Some("/h/.cache/skiff".into())
        );
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn a_published_file_is_vouched_for_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (tmp, target) = (dir.path().join("t"), dir.path().join("m.gguf"));
        fs::write(&tmp, "abc").unwrap();
        publish(&tmp, &target, &expect(ABC)).unwrap();
        assert!(!tmp.exists() && is_good(&target, &expect(ABC)).unwrap());

        // Same size, other bytes, other time: hashed again and found bad.
        fs::write(&target, "abd").unwrap();
        File::options().write(true).open(&target).unwrap().set_modified(UNIX_EPOCH).unwrap();
        assert!(!is_good(&target, &expect(ABC)).unwrap());
        assert!(!is_good(&target, &Expected::default()).unwrap(), "the marker's own hash counts too");
    }

    #[test]
    fn a_wrong_file_is_not_published() {
        let dir = tempfile::tempdir().unwrap();
        let (tmp, target) = (dir.path().join("t"), dir.path().join("m.gguf"));
        for (bytes, error) in [("abd", "SHA-256"), ("abcd", "4 bytes, expected 3")] {
            fs::write(&tmp, bytes).unwrap();
            let said = publish(&tmp, &target, &expect(ABC)).unwrap_err().to_string();
            assert!(said.contains(error), "{said}");
            assert!(!tmp.exists() && !target.exists());
        }
    }

    #[test]
    fn temporary_files_of_a_killed_pull_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a/m.gguf");
        let lock = Lock::of(&target).unwrap();
        let left = dir.path().join("a/m.gguf.tmp/half");
        fs::create_dir_all(left.parent().unwrap()).unwrap();
        fs::write(&left, "x").unwrap();
        let tmp = TempDir::of(&target, &lock).unwrap();
        assert!(!left.exists() && tmp.path().is_dir());
    }

    #[test]
    fn a_lock_excludes_the_second() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.gguf");
        let lock = Lock::of(&target).unwrap();
        let other = File::options().write(true).open(beside(&target, ".lock")).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(lock);
        other.try_lock().unwrap();
    }
}
