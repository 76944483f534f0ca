//! Sampled tokens to text: when it ends, and what of it may be shown already.

use super::{End, Piece};
use crate::sampler::StopMatcher;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// The text of a generation in progress.
pub(super) struct Writer<'e> {
    tokenizer: &'e Tokenizer,
    detokenizer: Detokenizer<'e>,
    stop: StopMatcher,
    ignore_eos: bool,
    pub remaining: usize,
    pub end: Option<End>,
}

impl<'e> Writer<'e> {
    /// For up to `max` tokens.
    pub fn new(tokenizer: &'e Tokenizer, stop: StopMatcher, ignore_eos: bool, max: usize) -> Self {
        let detokenizer = tokenizer.detokenizer();
        Self { tokenizer, detokenizer, stop, ignore_eos, remaining: max, end: None }
    }

    /// Whether `id` ends the text.
    pub fn ends(&self, id: u32) -> bool {
        !self.ignore_eos && self.tokenizer.is_end_of_generation(id)
    }

    /// Takes the next token: a piece, unless it ends the text and nothing was held back.
    pub fn take(&mut self, id: u32) -> Option<Piece> {
        self.remaining -= 1;
        if self.ends(id) {
            return self.finish(End::EndOfGeneration, Some(id));
        }
        let text = self.detokenizer.push(id);
        let step = self.stop.push(&text);
        if step.stopped.is_some() {
            self.end = Some(End::StopString);
        }
        Some(Piece { id, text: step.emit.to_owned() })
    }

    /// Ends with what is still held back, if anything, as a piece of token `id`.
    pub fn finish(&mut self, end: End, id: Option<u32>) -> Option<Piece> {
        self.end = Some(end);
        let rest = self.detokenizer.finish();
        let step = self.stop.push(&rest);
        let (mut text, stopped) = (step.emit.to_owned(), step.stopped.is_some());
        if !stopped {
            text.push_str(&self.stop.flush());
        }
        let id = id?;
        (!text.is_empty()).then_some(Piece { id, text })
    }
}
