//! The tokens by id: their text in the vocabulary, the bytes they stand for, their kind.

use super::bpe::ByteChars;
use super::source::{TokenKind, VocabSource};
use crate::gguf::StringArray;

/// SentencePiece's mark for a space.
pub(super) const SPACE_MARK: char = '\u{2581}';

/// Texts that end a generation wherever they are control tokens.
const END_TEXTS: [&str; 15] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|EOT|>",
    "<EOT>",
    "_<EOT>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[EOS]",
    "<eos>",
];

/// Turn markers that some files list as plain text.
const TURN_TEXTS: [&str; 2] = ["<start_of_turn>", "<end_of_turn>"];

/// All tokens of a model.
pub(super) struct Vocab {
    texts: StringArray,
    bytes: StringArray,
    kinds: Vec<TokenKind>,
}

impl Vocab {
    pub(super) fn new(source: &VocabSource, byte_chars: Option<&ByteChars>) -> Self {
        let mut vocab =
            Self { texts: source.tokens.clone(), bytes: StringArray::default(), kinds: Vec::new() };
        let mut bytes = Vec::new();
        for (id, text) in source.tokens.iter().enumerate() {
            let stated = source.kinds.as_ref().and_then(|kinds| kinds.get(id)).copied();
            let kind = kind_of(stated.unwrap_or(TokenKind::Normal), text);
            bytes.clear();
            match byte_chars {
                Some(chars) => byte_level_bytes(kind, text, chars, &mut bytes),
                None => sentencepiece_bytes(kind, text, &mut bytes),
            }
            vocab.bytes.push(&bytes);
            vocab.kinds.push(kind);
        }
        vocab
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    pub(super) fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    pub(super) fn text(&self, id: u32) -> Option<&[u8]> {
        self.texts.get(id as usize)
    }

    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.get(id as usize)
    }

    /// The tokens in order of id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &[u8], TokenKind)> {
        (0u32..).zip(&self.kinds).map(|(id, &kind)| (id, self.text(id).unwrap_or_default(), kind))
    }

    /// The tokens that the merging model may produce. Control tokens are not among them, so that no spelling
    /// of plain text can ever yield one.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (u32, &str)> {
        self.iter()
            .filter(|(_, text, kind)| {
                !text.is_empty()
                    && matches!(kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte)
            })
            .filter_map(|(id, text, _)| Some((id, std::str::from_utf8(text).ok()?)))
    }

    /// The control tokens that end a generation by their text.
    pub(super) fn ends(&self) -> impl Iterator<Item = u32> {
        self.iter()
            .filter(|(_, text, kind)| *kind == TokenKind::Control && is_one_of(text, &END_TEXTS))
            .map(|(id, ..)| id)
    }
}

fn is_one_of(text: &[u8], list: &[&str]) -> bool {
    list.iter().any(|item| item.as_bytes() == text)
}

/// The kind of a token. Files are not always right: markers of turns and ends that are listed as text would let
/// text from a user end its turn, so they count as control tokens.
fn kind_of(stated: TokenKind, text: &[u8]) -> TokenKind {
    let bar = text.len() > 4 && text.starts_with(b"<|") && text.ends_with(b"|>");
    let marker = match stated {
        TokenKind::Normal => bar && is_one_of(text, &END_TEXTS),
        TokenKind::UserDefined => bar || is_one_of(text, &END_TEXTS) || is_one_of(text, &TURN_TEXTS),
        _ => false,
    };
    if marker { TokenKind::Control } else { stated }
}

/// `<0x0A>` is byte 10; every other token is its text with the space mark as a space.
fn sentencepiece_bytes(kind: TokenKind, text: &[u8], out: &mut Vec<u8>) {
    match kind {
        TokenKind::Byte => match byte_token(text) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(text),
        },
        TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused => {
            let mut mark = [0; 4];
            let mark = SPACE_MARK.encode_utf8(&mut mark).as_bytes();
            let mut rest = text;
            while let Some((&first, after)) = rest.split_first() {
                if let Some(after) = rest.strip_prefix(mark) {
                    out.push(b' ');
                    rest = after;
                } else {
                    out.push(first);
                    rest = after;
                }
            }
        }
        TokenKind::Control | TokenKind::Unknown => out.extend_from_slice(text),
    }
}

/// The byte that a token like `<0x0A>` stands for.
fn byte_token(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    let digits = std::str::from_utf8(digits).ok().filter(|d| d.len() == 2 && !d.starts_with('+'))?;
    u8::from_str_radix(digits, 16).ok()
}

/// Normal tokens spell each byte as one character; characters outside that alphabet stand for themselves.
fn byte_level_bytes(kind: TokenKind, text: &[u8], chars: &ByteChars, out: &mut Vec<u8>) {
    match (kind, std::str::from_utf8(text)) {
        (TokenKind::Normal | TokenKind::Unused, Ok(text)) => {
            for c in text.chars() {
                match chars.byte(c) {
                    Some(byte) => out.push(byte),
                    None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
        }
        (TokenKind::Byte, _) => match byte_token(text) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(text),
        },
        _ => out.extend_from_slice(text),
    }
}
