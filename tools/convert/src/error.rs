//! What can go wrong. Every variant names the datum.

use std::io;
use std::path::{Path, PathBuf};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are named for what the message prints
pub enum ConvertError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: the disk is full: {written} bytes of {needed} fitted; the unfinished file was removed", path.display())]
    DiskFull { path: PathBuf, written: u64, needed: u64 },
    #[error("{}: {error}", path.display())]
    Write { path: PathBuf, error: skiff::gguf::WriteError },
    #[error("{}: {error}", path.display())]
    Gguf { path: PathBuf, error: skiff::gguf::Error },
    #[error(transparent)]
    Weights(#[from] skiff::weights::WeightsError),
    #[error("metadata: {0}")]
    Metadata(#[from] skiff::gguf::Error),
    #[error("{} is the input itself", path.display())]
    OutputIsInput { path: PathBuf },
    #[error("unknown type or mix {name:?}: known are {known}")]
    UnknownMix { name: String, known: String },
    #[error("{shape:?}: {problem}")]
    Shape { shape: String, problem: String },
    #[error("{}: {problem}", path.display())]
    Checkpoint { path: PathBuf, problem: String },
    #[error("the model would be split into {found} files (1 to 65535 are possible)")]
    TooManyShards { found: usize },
    #[error("{}: {found} of {tensors} tensors have values that are NaN or infinite", path.display())]
    NotFinite { path: PathBuf, found: usize, tensors: usize },
    #[error("{}: not an importance matrix: {problem}", path.display())]
    NotAnImatrix { path: PathBuf, problem: String },
    #[error(
        "the importance matrix has {found} columns for tensor {tensor:?} (expected {expected}): it is of another model"
    )]
    ForeignImatrix { tensor: String, expected: usize, found: usize },
    #[error(transparent)]
    Session(#[from] skiff::session::SessionError),
    #[error(transparent)]
    Model(#[from] skiff::model::ModelError),
    #[error(transparent)]
    Tokenizer(#[from] skiff::tokenizer::TokenizerError),
    #[error("{}: it has {tokens} tokens, fewer than one window of {window}", path.display())]
    TextTooShort { path: PathBuf, tokens: usize, window: usize },
    /// In a closure that writes to a [`GgufOutput`](crate::output::GgufOutput), which adds the path.
    #[error("the output cannot be written: {0}")]
    Output(io::Error),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl ConvertError {
    /// Wraps an error of the file at `path`.
    pub(crate) fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { path: path.clone(), error }
    }
}
