//! Byte-level BPE (`tokenizer.ggml.model = gpt2`): a text is cut by the model's regexes, and the bytes of each piece
//! are merged by rank.

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};
use tokenizers::utils::SysRegex;

use super::TokenizerError;
use super::source::VocabSource;
use super::vocab::Vocab;
use crate::gguf::StringArray;

/// How a family of models cuts text before merging.
struct Pre {
    /// The values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Applied one after the other; what lies between matches is a piece too.
    patterns: &'static [&'static str],
    /// Whether a piece that is in the vocabulary is taken whole.
    ignore_merges: bool,
    /// Whether a text starts with `bos` unless the file says otherwise.
    add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Cased letters, by code point: some of them look like others that Unicode normalisation puts in their place.
const DEEPSEEK_WORDS: &str = r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+";
const DEEPSEEK_PUNCTUATION: &str = "\\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+";
const DEEPSEEK_CJK: &str = "[一-龥\u{800}-一가-\u{d7ff}]+";

/// One row per way of cutting.
const PRES: [Pre; 9] = [
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    Pre { names: &["dbrx", "smaug-bpe"], patterns: &[LLAMA3], ignore_merges: false, add_bos: false },
    Pre {
        names: &["gpt-2", "phi-2", "mpt", "olmo"],
        patterns: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2"],
        patterns: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Pre { names: &["tekken"], patterns: &[TEKKEN], ignore_merges: true, add_bos: true },
    Pre {
        names: &["deepseek-llm"],
        patterns: &[r"[\r\n]", DEEPSEEK_WORDS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_CJK, r"\p{N}+"],
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["deepseek-coder"],
        patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"],
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
];

/// The names of all supported pre-tokenizers.
pub(super) fn pre_names() -> Vec<&'static str> {
    PRES.iter().flat_map(|pre| pre.names).copied().collect()
}

/// The alphabet of byte-level BPE: each byte is spelled as one printable character.
pub(super) struct ByteChars {
    chars: [char; 256],
    bytes: [Option<u8>; 0x144], // by code point
}

impl ByteChars {
    pub(super) fn new() -> Self {
        let mut table = Self { chars: ['\0'; 256], bytes: [None; 0x144] };
        let mut next = 0x100u32; // bytes without a character of their own take these, in order
        for byte in 0..=255u8 {
            let code = match byte {
                b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
                _ => {
                    next += 1;
                    next - 1
                }
            };
            table.chars[usize::from(byte)] = char::from_u32(code).unwrap_or('\0');
            table.bytes[code as usize] = Some(byte);
        }
        table
    }

    /// The byte that a character spells.
    pub(super) fn byte(&self, c: char) -> Option<u8> {
        self.bytes.get(c as usize).copied().flatten()
    }

    fn spell(&self, text: &str, out: &mut String) {
        out.clear();
        out.extend(text.bytes().map(|byte| self.chars[usize::from(byte)]));
    }
}

pub(super) struct Bpe {
    model: BPE,
    patterns: Vec<SysRegex>,
    chars: ByteChars,
    add_bos: bool,
}

impl Bpe {
    pub(super) fn new(source: &VocabSource, vocab: &Vocab, chars: ByteChars) -> Result<Self, TokenizerError> {
        let pre = pre(source.pre.as_deref())?;
        let patterns = pre
            .patterns
            .iter()
            .map(|p| SysRegex::new(p))
            .collect::<Result<_, _>>()
            .map_err(TokenizerError::model)?;
        let model = model(&source.merges, vocab, pre.ignore_merges)?;
        Ok(Self { model, patterns, chars, add_bos: pre.add_bos })
    }

    /// Whether models of this family start a text with `bos`.
    pub(super) fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// Bytes that the vocabulary cannot spell are left out, as in llama.cpp.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut spelled = String::new();
        for part in cut_long_spaces(text) {
            for piece in self.pieces(part) {
                self.chars.spell(piece, &mut spelled);
                let tokens = self.model.tokenize(&spelled).map_err(TokenizerError::model)?;
                ids.extend(tokens.into_iter().map(|token| token.id));
            }
        }
        Ok(())
    }

    fn pieces<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for pattern in &self.patterns {
            let mut finer = Vec::with_capacity(pieces.len() * 2);
            pieces.into_iter().for_each(|piece| split_isolated(pattern, piece, &mut finer));
            pieces = finer;
        }
        pieces
    }
}

/// The way of cutting with this name; files from before there were names have none.
fn pre(name: Option<&str>) -> Result<&'static Pre, TokenizerError> {
    let name = name.unwrap_or("default");
    PRES.iter()
        .find(|pre| pre.names.contains(&name))
        .ok_or_else(|| TokenizerError::UnsupportedPreTokenizer { pre: name.to_owned() })
}

/// Matches and what lies between them, in order.
fn split_isolated<'t>(pattern: &SysRegex, text: &'t str, out: &mut Vec<&'t str>) {
    let mut from = 0;
    let mut push = |from, to| {
        if let Some(piece) = text.get(from..to).filter(|piece| !piece.is_empty()) {
            out.push(piece);
        }
    };
    for (start, end) in pattern.find_iter(text) {
        push(from, start);
        push(start, end);
        from = end;
    }
    push(from, text.len());
}

/// Cuts very long runs of whitespace: the patterns backtrack over such a run once per character, and the regex crate
/// gives up after a million steps. No text that is not an attack has runs of this length.
fn cut_long_spaces(text: &str) -> Vec<&str> {
    const MAX_RUN: usize = 1 << 16;
    let mut parts = Vec::new();
    let (mut from, mut run) = (0, 0);
    for (at, c) in text.char_indices() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        if run > MAX_RUN {
            parts.extend(text.get(from..at));
            (from, run) = (at, 1);
        }
    }
    parts.extend(text.get(from..).filter(|rest| !rest.is_empty()));
    parts
}

/// Nearly every file lists sound merges only, and the crate looks each of them up again. So they are tried unchecked,
/// and checked if the crate complains.
fn model(lines: &StringArray, vocab: &Vocab, ignore_merges: bool) -> Result<BPE, TokenizerError> {
    let pieces = || -> BpeVocab {
        // Of tokens with the same text the first counts, so that it comes last.
        let mut pieces: Vec<_> = vocab.pieces().collect();
        pieces.reverse();
        pieces.into_iter().map(|(id, text)| (text.to_owned(), id)).collect()
    };
    let build = |pieces: BpeVocab, merges| {
        BPE::builder().vocab_and_merges(pieces, merges).ignore_merges(ignore_merges).build()
    };
    let longest = vocab.pieces().map(|(_, text)| text.len()).max().unwrap_or(0);
    build(pieces(), short_merges(lines, longest)).or_else(|_| {
        let pieces = pieces();
        let merges = sound_merges(lines, longest, &pieces);
        build(pieces, merges).map_err(TokenizerError::model)
    })
}

/// The merges, best first, whose result is not longer than any piece: the crate would panic on others.
fn short_merges(lines: &StringArray, longest: usize) -> Vec<(String, String)> {
    lines
        .iter()
        .filter_map(|line| split_merge(std::str::from_utf8(line).ok()?))
        .filter(|(left, right)| left.len() + right.len() <= longest)
        .map(|(left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}

/// The merges whose parts and result are in the vocabulary.
fn sound_merges(lines: &StringArray, longest: usize, pieces: &BpeVocab) -> Vec<(String, String)> {
    let mut merges = short_merges(lines, longest);
    merges.retain(|(left, right)| {
        [left, right].iter().all(|part| pieces.contains_key(*part))
            && pieces.contains_key(&format!("{left}{right}"))
    });
    merges
}

/// `left right`; the left part may itself be a space, so the separator is looked for from the second character.
fn split_merge(line: &str) -> Option<(&str, &str)> {
    let first = line.chars().next()?.len_utf8();
    let at = first + line.get(first..)?.find(' ')?;
    Some((line.get(..at)?, line.get(at + 1..)?)).filter(|(_, right)| !right.is_empty())
}
