//! SentencePiece (`tokenizer.ggml.model = llama`): merges by score, bytes for what the vocabulary lacks.

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::TokenizerError;
use super::source::VocabSource;
use super::vocab::{SPACE_MARK, Vocab};

/// Longer pieces are never merged to. Real ones stay below 100 bytes; trying every split of a piece of any length
/// would let a small file keep us busy for minutes.
const MAX_PIECE_BYTES: usize = 256;

pub(super) struct Spm {
    model: BPE,
    add_space_prefix: bool,
}

impl Spm {
    pub(super) fn new(source: &VocabSource, vocab: &Vocab) -> Result<Self, TokenizerError> {
        let scores = source.scores.as_deref().ok_or(TokenizerError::Missing { what: "scores" })?;
        let mut pieces = BpeVocab::default();
        for (id, text) in vocab.pieces() {
            pieces.entry(text.to_owned()).or_insert(id);
        }
        let merges = merges(&pieces, vocab, scores);
        let mut builder = BPE::builder()
            .byte_fallback(true)
            .fuse_unk(true)
            // Its cache is per thread and outlives the model; whole texts seldom repeat.
            .cache_capacity(0);
        if let Some(unk) = source.unk {
            // The crate wants the unknown token by text. No text spells this one.
            let name = "\u{fdd0}unknown\u{fdd0}".to_owned();
            pieces.insert(name.clone(), unk);
            builder = builder.unk_token(name);
        }
        let model = builder.vocab_and_merges(pieces, merges).build().map_err(TokenizerError::model)?;
        Ok(Self { model, add_space_prefix: source.add_space_prefix.unwrap_or(true) })
    }

    /// Whether encoding puts a space in front of a text.
    pub(super) fn adds_space(&self) -> bool {
        self.add_space_prefix
    }

    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        let mut escaped = String::with_capacity(text.len() + text.len() / 4 + 4);
        if self.add_space_prefix {
            escaped.push(SPACE_MARK);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { SPACE_MARK } else { c }));
        let tokens = self.model.tokenize(&escaped).map_err(TokenizerError::model)?;
        ids.extend(tokens.into_iter().map(|token| token.id));
        Ok(())
    }
}

/// SentencePiece has no merge list: any two neighbours that together are a piece may merge, the piece of the highest
/// score first. As a list that is every split of every piece, best piece first.
fn merges(pieces: &BpeVocab, vocab: &Vocab, scores: &[f32]) -> Vec<(String, String)> {
    let mut ranked: Vec<(f32, u32, &str)> = vocab
        .pieces()
        .filter(|(id, text)| text.len() <= MAX_PIECE_BYTES && vocab.kind(*id) != Some(super::TokenKind::Byte))
        .map(|(id, text)| (scores.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY), id, text))
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let is_piece =
        |text: &str| pieces.get(text).is_some_and(|&id| vocab.kind(id) != Some(super::TokenKind::Byte));
    let mut merges = Vec::new();
    for (_, _, text) in ranked {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if is_piece(left) && is_piece(right) {
                merges.push((left.to_owned(), right.to_owned()));
            }
        }
    }
    merges
}
