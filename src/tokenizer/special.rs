//! Tokens that are found in a text before anything else: control tokens and user-defined ones.

use super::source::TokenKind;
use super::vocab::Vocab;

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Segment<'t> {
    /// Text for the merging model.
    Raw(&'t str),
    /// A token that was spelled out.
    Special(u32),
}

/// Which tokens may be recognised by their text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Recognise {
    /// Only user-defined ones, which are text. The right choice for text that is not ours.
    UserDefined,
    /// Control tokens too.
    All,
}

/// One list of texts, sorted, so that a search narrows to a range with each byte.
#[derive(Default)]
struct Texts {
    sorted: Vec<(Box<[u8]>, u32)>,
    first: Vec<u8>, // the first bytes that occur, sorted
}

impl Texts {
    fn new(tokens: impl Iterator<Item = (u32, Box<[u8]>)>) -> Self {
        let mut sorted: Vec<_> = tokens.map(|(id, text)| (text, id)).collect();
        sorted.sort();
        sorted.dedup_by(|later, earlier| later.0 == earlier.0); // the lower id wins
        let mut first: Vec<u8> = sorted.iter().filter_map(|(text, _)| text.first().copied()).collect();
        first.dedup();
        Self { sorted, first }
    }

    /// The longest text that `bytes` starts with: its length and id.
    fn longest_prefix(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        if self.first.binary_search(bytes.first()?).is_err() {
            return None;
        }
        let mut range = self.sorted.as_slice();
        let mut best = None;
        for (depth, byte) in bytes.iter().enumerate() {
            // Texts that end here sort first, and `None < Some`.
            let from = range.partition_point(|(text, _)| text.get(depth) < Some(byte));
            let to = range.partition_point(|(text, _)| text.get(depth) <= Some(byte));
            range = range.get(from..to).unwrap_or_default();
            let Some((text, id)) = range.first() else { break };
            if text.len() == depth + 1 {
                best = Some((text.len(), *id));
            }
        }
        best
    }
}

/// The special tokens of a vocabulary.
pub(super) struct SpecialTokens {
    all: Texts,
    user_defined: Texts,
    control: Vec<String>,
}

impl SpecialTokens {
    pub(super) fn new(vocab: &Vocab) -> Self {
        let of = |wanted: fn(TokenKind) -> bool| {
            vocab
                .iter()
                .filter(move |(_, text, kind)| {
                    wanted(*kind) && !text.is_empty() && std::str::from_utf8(text).is_ok()
                })
                .map(|(id, text, _)| (id, Box::from(text)))
        };
        let is_control = |kind| matches!(kind, TokenKind::Control | TokenKind::Unknown);
        let is_user_defined = |kind| kind == TokenKind::UserDefined;
        Self {
            all: Texts::new(of(|kind| {
                matches!(kind, TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined)
            })),
            user_defined: Texts::new(of(is_user_defined)),
            control: of(is_control)
                .filter_map(|(_, text): (u32, Box<[u8]>)| String::from_utf8(text.into_vec()).ok())
                .collect(),
        }
    }

    /// The texts of the control tokens, in order of id.
    pub(super) fn control_texts(&self) -> &[String] {
        &self.control
    }

    /// Cuts the text at special tokens: leftmost first, the longest of those that start at one place.
    ///
    /// With a `guard`, a one-character token directly before it is text: the guard marks the character before it as
    /// coming from a user, and there is no room for it inside a single character.
    pub(super) fn split<'t>(&self, text: &'t str, which: Recognise, guard: Option<char>) -> Vec<Segment<'t>> {
        let texts = match which {
            Recognise::UserDefined => &self.user_defined,
            Recognise::All => &self.all,
        };
        let mut segments = Vec::new();
        if texts.sorted.is_empty() {
            push_raw(&mut segments, text);
            return segments;
        }
        let mut raw_from = 0;
        let mut at = 0;
        while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
            let here = rest.chars().next().map_or(1, char::len_utf8);
            let found = texts.longest_prefix(rest.as_bytes()).filter(|&(len, _)| {
                let guarded =
                    || guard.is_some_and(|g| rest.get(len..).is_some_and(|after| after.starts_with(g)));
                !(len == here && guarded())
            });
            match found {
                Some((len, id)) => {
                    push_raw(&mut segments, text.get(raw_from..at).unwrap_or_default());
                    segments.push(Segment::Special(id));
                    at += len;
                    raw_from = at;
                }
                None => at += here,
            }
        }
        push_raw(&mut segments, text.get(raw_from..).unwrap_or_default());
        segments
    }
}

fn push_raw<'t>(segments: &mut Vec<Segment<'t>>, text: &'t str) {
    if !text.is_empty() {
        segments.push(Segment::Raw(text));
    }
}
