//! What can be wrong with a tokenizer.

/// Why a vocabulary could not be used, or a text not be tokenised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are named for what the message prints
pub enum TokenizerError {
    #[error(transparent)]
    Metadata(#[from] crate::gguf::Error),
    #[error("tokenizer model {model:?} is not supported (expected \"llama\" or \"gpt2\")")]
    UnsupportedModel { model: String },
    #[error("pre-tokenizer {pre:?} is not supported (expected one of: {})", super::bpe::pre_names().join(", "))]
    UnsupportedPreTokenizer { pre: String },
    #[error("the vocabulary is empty")]
    EmptyVocabulary,
    #[error("a vocabulary of {found} tokens is too large")]
    TooManyTokens { found: usize },
    #[error("{found} {what} for {tokens} tokens")]
    LengthMismatch { what: &'static str, found: usize, tokens: usize },
    #[error("the tokenizer has no {what}")]
    Missing { what: &'static str },
    #[error("{what} token id {id} is not in the vocabulary of {tokens} tokens")]
    IdOutOfRange { what: &'static str, id: u32, tokens: usize },
    #[error("tokenizer: {message}")]
    Model { message: String },
}

impl TokenizerError {
    /// Wraps an error of the tokenizers crate, which has no type of its own.
    pub(super) fn model(error: impl std::fmt::Display) -> Self {
        Self::Model { message: error.to_string() }
    }
}
