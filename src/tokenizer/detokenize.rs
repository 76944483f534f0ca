//! Token by token back to text.

use super::Tokenizer;

/// Bytes to text as they come: a character split over several pushes comes out once it is whole.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    /// The start of a character, at most three bytes between calls.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Takes bytes and returns all text that is certain by now. Bytes that can no longer become a character come
    /// out as U+FFFD, one for each maximal invalid part, as `String::from_utf8_lossy` does.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.pending.len());
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            let at_end = done + chunk.invalid().len() == self.pending.len();
            if at_end && may_continue(chunk.invalid()) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            done += chunk.invalid().len();
        }
        self.pending.drain(..done);
        text
    }

    /// The end: what is left can no longer become a character.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether bytes are the start of a character that more bytes could complete.
fn may_continue(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

/// Turns a stream of token ids into text. Made by [`Tokenizer::detokenizer`].
#[derive(Clone)]
pub struct Detokenizer<'t> {
    tokenizer: &'t Tokenizer,
    stream: Utf8Stream,
    show_control: bool,
    strip_space: bool,
}

impl<'t> Detokenizer<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, stream: Utf8Stream::default(), show_control: false, strip_space: false }
    }

    /// Also prints control tokens.
    pub fn show_control(mut self) -> Self {
        self.show_control = true;
        self
    }

    /// The tokens are a whole text, not the continuation of one: drops the space that encoding put in front.
    pub fn whole_text(mut self) -> Self {
        self.strip_space = self.tokenizer.adds_space();
        self
    }

    /// The text that this token makes certain.
    pub fn push(&mut self, id: u32) -> String {
        let (bytes, strip_next) = self.tokenizer.visible_bytes(id, self.show_control, self.strip_space);
        self.strip_space = strip_next;
        self.stream.push(bytes)
    }

    /// The text that is left at the end.
    pub fn finish(&mut self) -> String {
        self.stream.finish()
    }
}
