//! Text to token ids and back, built from the metadata of a GGUF file.
//!
//! The merging itself is the `tokenizers` crate's. Special tokens are cut out here before it sees a text, and it does
//! not know control tokens at all: so no spelling of plain text can ever become one, and recognising them is a
//! choice of each call ([`EncodeOptions::parse_special`]).
#![forbid(unsafe_code)]

mod bpe;
mod detokenize;
mod error;
mod source;
mod special;
mod spm;
#[cfg(test)]
mod tests;
mod vocab;

use std::borrow::Cow;

pub use detokenize::{Detokenizer, Utf8Stream};
pub use error::TokenizerError;
pub use source::{TokenKind, VocabSource};

use crate::gguf::Metadata;
use bpe::{Bpe, ByteChars};
use special::{Recognise, Segment, SpecialTokens};
use spm::Spm;
use vocab::Vocab;

/// How to encode a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Adds begin and end of text where the model wants them.
    pub add_special: bool,
    /// Recognises control tokens by their text. Not for text that comes from a user.
    pub parse_special: bool,
}

/// How to decode ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Also prints control tokens.
    pub show_control: bool,
}

/// The merging model.
enum Merger {
    Spm(Box<Spm>),
    Bpe(Box<Bpe>),
}

impl Merger {
    fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        match self {
            Self::Spm(spm) => spm.encode(text, ids),
            Self::Bpe(bpe) => bpe.encode(text, ids),
        }
    }
}

/// The tokenizer of a model.
pub struct Tokenizer {
    vocab: Vocab,
    special: SpecialTokens,
    merger: Merger,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    /// The tokens that end a generation, sorted.
    ends: Vec<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, TokenizerError> {
        Self::from_source(&VocabSource::from_metadata(metadata)?)
    }

    /// Builds a tokenizer from its parts.
    pub fn from_source(source: &VocabSource) -> Result<Self, TokenizerError> {
        source.check()?;
        let (vocab, merger, usual_bos) = match source.model.as_str() {
            "llama" => {
                let vocab = Vocab::new(source, None);
                let spm = Spm::new(source, &vocab)?;
                (vocab, Merger::Spm(Box::new(spm)), true)
            }
            "gpt2" => {
                let chars = ByteChars::new();
                let vocab = Vocab::new(source, Some(&chars));
                let bpe = Bpe::new(source, &vocab, chars)?;
                let usual_bos = bpe.adds_bos();
                (vocab, Merger::Bpe(Box::new(bpe)), usual_bos)
            }
            _ => return Err(TokenizerError::UnsupportedModel { model: source.model.clone() }),
        };
        // SentencePiece models from before the keys existed use LLaMA's ids.
        let usual = |id: u32| {
            matches!(merger, Merger::Spm(_)).then_some(id).filter(|&id| (id as usize) < vocab.len())
        };
        let bos = source.bos.or(usual(1));
        let eos = source.eos.or(usual(2));
        let mut ends: Vec<u32> = vocab.ends().chain(eos).chain(source.eot).chain(source.eom).collect();
        ends.sort_unstable();
        ends.dedup();
        Ok(Self {
            special: SpecialTokens::new(&vocab),
            vocab,
            merger,
            bos,
            eos,
            add_bos: source.add_bos.unwrap_or(usual_bos),
            add_eos: source.add_eos.unwrap_or(false),
            ends,
        })
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TokenizerError> {
        let which = if options.parse_special { Recognise::All } else { Recognise::UserDefined };
        let mut ids = Vec::new();
        if options.add_special && self.add_bos {
            ids.extend(self.bos);
        }
        for segment in self.special.split(text, which, None) {
            match segment {
                Segment::Special(id) => ids.push(id),
                Segment::Raw(raw) => self.merger.encode(raw, &mut ids)?,
            }
        }
        if options.add_special && self.add_eos {
            ids.extend(self.eos);
        }
        Ok(ids)
    }

    /// The ids of a text in which parts that are not ours carry `guard` characters: directly after a character, a
    /// guard keeps any control token from starting there. Guards themselves are not encoded. Begin of text is put in
    /// front where the model wants it and the text does not already start with it.
    pub(crate) fn encode_guarded(&self, text: &str, guard: char) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        for segment in self.special.split(text, Recognise::All, Some(guard)) {
            match segment {
                Segment::Special(id) => ids.push(id),
                Segment::Raw(raw) => {
                    let plain: String = raw.chars().filter(|&c| c != guard).collect();
                    ids.extend(self.encode(&plain, EncodeOptions::default())?);
                }
            }
        }
        if let Some(bos) = self.bos.filter(|bos| self.add_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The texts of the control tokens.
    pub(crate) fn control_texts(&self) -> &[String] {
        self.special.control_texts()
    }

    /// The bytes of a whole text; the space that encoding put in front of it is dropped again.
    pub fn decode(&self, ids: &[u32], options: DecodeOptions) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut strip_space = self.adds_space();
        for &id in ids {
            let (piece, strip_next) = self.visible_bytes(id, options.show_control, strip_space);
            bytes.extend_from_slice(piece);
            strip_space = strip_next;
        }
        bytes
    }

    /// Starts decoding token by token, hiding control tokens. The tokens are taken to continue a text; for a text from
    /// its start see [`Detokenizer::whole_text`].
    pub fn detokenizer(&self) -> Detokenizer<'_> {
        Detokenizer::new(self)
    }

    /// Whether encoding puts a space in front of a text.
    fn adds_space(&self) -> bool {
        matches!(&self.merger, Merger::Spm(spm) if spm.adds_space())
    }

    /// What decoding prints for a token, and whether the space that encoding added is still to be dropped after it.
    ///
    /// Encoding adds a space to each stretch of text: at the start and after each special token.
    fn visible_bytes(&self, id: u32, show_control: bool, strip_space: bool) -> (&[u8], bool) {
        let bytes = self.token_bytes(id);
        match self.vocab.kind(id) {
            None => (&[], strip_space),
            Some(TokenKind::Control) => {
                (if show_control { bytes } else { &[] }, strip_space || (self.adds_space() && show_control))
            }
            // An unknown token is text that was lost, so the text around it is one stretch.
            Some(TokenKind::Unknown) => (if show_control { bytes } else { &[] }, false),
            Some(TokenKind::UserDefined) => (bytes, self.adds_space()),
            Some(TokenKind::Normal | TokenKind::Unused | TokenKind::Byte) => {
                (bytes.strip_prefix(b" ").filter(|_| strip_space).unwrap_or(bytes), false)
            }
        }
    }

    /// The number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Begin of text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a model that produces this token has finished.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// The bytes that a token stands for (a space for SentencePiece's mark); a control token stands for its text.
    /// Empty for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocab.bytes(id).unwrap_or_default()
    }

    /// The text of a token as the vocabulary lists it.
    pub fn token_text(&self, id: u32) -> Option<Cow<'_, str>> {
        self.vocab.text(id).map(String::from_utf8_lossy)
    }

    /// The token that the vocabulary lists under this text. Searches the whole vocabulary.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.vocab.iter().find(|(_, listed, _)| *listed == text.as_bytes()).map(|(id, ..)| id)
    }

    /// What a token is for.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.vocab.kind(id)
    }

    /// Whether a token is structure, not text.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.vocab.kind(id), Some(TokenKind::Control | TokenKind::Unknown))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("tokens", &self.vocab_size()).finish_non_exhaustive()
    }
}
