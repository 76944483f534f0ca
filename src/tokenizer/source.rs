//! The metadata of a tokenizer, as one plain struct.

use super::TokenizerError;
use crate::gguf::{Metadata, StringArray};

/// What a token is for; `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// Stands for text that the vocabulary lacks.
    Unknown,
    /// Structure, never text: begin, end, turn markers.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// A gap in the vocabulary.
    Unused,
    /// One byte, `<0x0A>`.
    Byte,
}

impl TokenKind {
    /// The kind with this id in a file; ids that no tool writes count as normal, as in llama.cpp.
    fn from_id(id: i32) -> Self {
        match id {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// Everything that a GGUF file says about its tokenizer, unchecked.
#[derive(Clone, Debug, Default)]
pub struct VocabSource {
    /// `llama` (SentencePiece) or `gpt2` (byte-level BPE).
    pub model: String,
    /// The pre-tokenizer of a `gpt2` model.
    pub pre: Option<String>,
    /// The text of each token, in the model's own escaping.
    pub tokens: StringArray,
    /// How good each token is (`llama` only).
    pub scores: Option<Vec<f32>>,
    /// What each token is for; without them all are normal.
    pub kinds: Option<Vec<TokenKind>>,
    /// `left right`, best first (`gpt2` only).
    pub merges: StringArray,
    /// Begin of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
    /// End of turn.
    pub eot: Option<u32>,
    /// End of message.
    pub eom: Option<u32>,
    /// The token for text that the vocabulary lacks.
    pub unk: Option<u32>,
    /// Whether a text starts with `bos`; without it, as is usual for the model.
    pub add_bos: Option<bool>,
    /// Whether a text ends with `eos`.
    pub add_eos: Option<bool>,
    /// Whether a text starts with a space that is not in it (`llama` only).
    pub add_space_prefix: Option<bool>,
}

impl VocabSource {
    /// Reads the `tokenizer.ggml` keys.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let id = |name: &str| metadata.opt_u32(&key(name));
        let flag = |name: &str| metadata.opt_bool(&key(name));
        let strings = |name: &str| metadata.opt_array_str(&key(name));
        Ok(Self {
            model: metadata.str(&key("model"))?.to_owned(),
            pre: metadata.opt_str(&key("pre"))?.map(str::to_owned),
            tokens: strings("tokens")?.cloned().ok_or(TokenizerError::EmptyVocabulary)?,
            scores: metadata.opt_array_f32(&key("scores"))?.map(<[f32]>::to_vec),
            kinds: metadata
                .opt_array_i32(&key("token_type"))?
                .map(|types| types.iter().map(|&id| TokenKind::from_id(id)).collect()),
            merges: strings("merges")?.cloned().unwrap_or_default(),
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            eot: id("eot_token_id")?,
            eom: id("eom_token_id")?,
            unk: id("unknown_token_id")?,
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            add_space_prefix: flag("add_space_prefix")?,
        })
    }

    /// Checks that counts and ids agree, so that nothing after this has to.
    pub(super) fn check(&self) -> Result<(), TokenizerError> {
        let tokens = self.tokens.len();
        if tokens == 0 {
            return Err(TokenizerError::EmptyVocabulary);
        }
        // Ids are 32 bits wide, and llama.cpp keeps the top one for "none".
        if i32::try_from(tokens).is_err() {
            return Err(TokenizerError::TooManyTokens { found: tokens });
        }
        let lengths = [
            ("scores", self.scores.as_ref().map(Vec::len)),
            ("token types", self.kinds.as_ref().map(Vec::len)),
        ];
        for (what, found) in lengths {
            if let Some(found) = found.filter(|&found| found != tokens) {
                return Err(TokenizerError::LengthMismatch { what, found, tokens });
            }
        }
        let ids = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot),
            ("eom", self.eom),
            ("unknown", self.unk),
        ];
        for (what, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= tokens) {
                return Err(TokenizerError::IdOutOfRange { what, id, tokens });
            }
        }
        Ok(())
    }
}
