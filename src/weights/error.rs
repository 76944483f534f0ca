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
    #[error("the model has no tensor {tensor:?}")]
    Missing { tensor: String },
    #[error("tensor {tensor:?} has shape {found:?}, expected {expected:?}")]
    Shape { tensor: String, expected: Vec<u64>, found: Vec<u64> },
}
