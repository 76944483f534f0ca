//! Why a model cannot be run.

use crate::kernels::KernelError;
use crate::skip::{CalibrationError, SkipError};
use crate::weights::WeightsError;

/// Errors of loading a model or running a step.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ModelError {
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Metadata(#[from] crate::gguf::Error),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Skip(#[from] SkipError),
    #[error("{name}: {error}")]
    Calibration { name: String, error: Box<CalibrationError> },
    #[error("architecture {found:?} is not supported; skiff runs {known}")]
    Architecture { found: String, known: &'static str },
    #[error("key {key:?} is {found}, expected {expected}")]
    Config { key: String, found: String, expected: &'static str },
    #[error("token id {id} at position {position} is outside the vocabulary of {vocab}")]
    TokenId { id: u32, position: usize, vocab: usize },
    #[error(
        "the context is full: {needed} tokens do not fit in {context} (-c sets the size, --context-shift drops the oldest)"
    )]
    ContextFull { needed: usize, context: usize },
    #[error(
        "the cut plan reads columns coarsely below {found} times a threshold, expected a finite number of at least 0"
    )]
    CutCoarse { found: f32 },
    #[error("the cut plan has {found} layers, the model {layers}")]
    CutLayers { found: usize, layers: usize },
    #[error("the cut plan's {what} of layer {layer} has {found} entries, expected {expected} or none")]
    CutShape { layer: usize, what: &'static str, found: usize, expected: usize },
    #[error("the cut plan's {what} of layer {layer} has {found} at {index}, expected {expected}")]
    CutValue { layer: usize, what: &'static str, index: usize, found: f32, expected: &'static str },
    #[error("{found} stand-ins of {entries} entries, the model has {layers} layers of {embedding}")]
    StandIns { found: usize, entries: usize, layers: usize, embedding: usize },
    #[error(
        "a shortlist's centre and directions have {found:?} entries, expected {embedding} and {directions} times as many"
    )]
    Shortlist { found: (usize, usize), embedding: usize, directions: usize },
    #[error("the output matrix in 4 bits: {0}")]
    ShortlistMemory(#[source] crate::memory::MemoryError),
    #[error("FFNs laid out by columns: {0}")]
    CutMemory(#[from] crate::memory::MemoryError),
    #[error("the threads cannot be started: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}
