//! What can be wrong with the files of a model.

use std::io;
use std::path::PathBuf;

/// Why weights cannot be had.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum WeightsError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{}: {error}", path.display())]
    Gguf { path: PathBuf, error: crate::gguf::Error },
    #[error("{}: {bytes} bytes are more than the {available} bytes of memory that can be had; without --no-mmap the file is mapped", path.display())]
    TooLarge { path: PathBuf, bytes: u64, available: u64 },
    #[error("{}: {error}", path.display())]
    Memory { path: PathBuf, error: crate::memory::MemoryError },
    #[error("--mlock: {what} ({bytes} bytes) cannot be kept in memory: {error}{}", limit_hint(*limit))]
    Lock { what: String, bytes: u64, error: io::Error, limit: Option<u64> },
    #[error("the model has no tensor {tensor:?}")]
    Missing { tensor: String },
    #[error("tensor {tensor:?} has shape {found:?}, expected {expected:?}")]
    Shape { tensor: String, expected: Vec<u64>, found: Vec<u64> },
}

fn limit_hint(limit: Option<u64>) -> String {
    let Some(limit) = limit else { return String::new() };
    format!(
        "; RLIMIT_MEMLOCK is {limit} bytes: raise it with `ulimit -l unlimited`, `memlock` in /etc/security/limits.conf \
         or `LimitMEMLOCK=infinity` of a systemd unit"
    )
}
