//! Output that must follow a JSON schema or a grammar, through llguidance.
//!
//! A [`TokenTable`] is built once a vocabulary and shared; a [`Constraint`] follows one reply. Before
//! each token [`mask`](Constraint::mask) bans what the grammar does not allow, and
//! [`accept`](Constraint::accept) moves on. Every failure is an error: a reply is never silently
//! unconstrained.

use std::fmt;
use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory, TokenParser};
use thiserror::Error;

/// Largest schema or grammar, in bytes. Real schemas reach some tens of KiB.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Deepest nesting of brackets in a grammar; llguidance parses by recursion.
const MAX_NESTING: usize = 64;
/// Stack for compiling: llguidance recurses over the schema, and an overflow would end the process.
const COMPILE_STACK_BYTES: usize = 64 << 20;
/// Longest token that a constrained reply may use: toktrie stops at 1024 levels.
const MAX_TOKEN_BYTES: usize = 512;
/// Bytes of all tokens together: toktrie's node index has 22 bits.
const MAX_TABLE_BYTES: usize = (1 << 22) - 1;
/// The tokens that may stand inside a JSON string. llguidance tests such a set as a whole instead of
/// token by token, which makes the mask of free text many times as fast. Its own default has three
/// more sets, for blanks and short strings: they take longer to build than they save.
const STRING_SLICE: &str = r#"[^"\\\x00-\x1F\x7F]+"#;

/// Why a constraint could not be built or followed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConstraintError {
    /// The vocabulary cannot be put into a token trie.
    #[error("vocabulary unusable for constrained output: {0}")]
    Vocabulary(String),
    /// The schema is not JSON, or uses what llguidance does not support.
    #[error("JSON schema: {0}")]
    Schema(String),
    /// The grammar does not parse or compile.
    #[error("grammar: {0}")]
    Grammar(String),
    /// The grammar is written in llama.cpp's GBNF.
    #[error(
        "grammar: this looks like GBNF (`::=`), but Lark syntax is expected, such as `start: \"yes\" | \"no\"`"
    )]
    Gbnf,
    /// The schema or grammar is too long.
    #[error("schema or grammar of {bytes} bytes, the limit is {MAX_SOURCE_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The grammar nests too deeply.
    #[error("grammar: brackets nest deeper than {MAX_NESTING}")]
    TooDeep,
    /// The token is not allowed here.
    #[error("token {id} is not allowed by the grammar: {message}")]
    Rejected {
        /// The refused token.
        id: u32,
        /// llguidance's message.
        message: String,
    },
    /// The grammar allows no token here, or became too complex to follow.
    #[error("constrained output: {0}")]
    Stuck(String),
}

/// A vocabulary prepared for constrained output. Cloning shares it.
///
/// A large vocabulary takes a noticeable part of a second, so build it when first needed, and keep it.
#[derive(Clone)]
pub struct TokenTable {
    shared: Arc<Shared>,
}

struct Shared {
    factory: ParserFactory,
    ends: Vec<u32>,
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trie = self.shared.factory.tok_env().tok_trie();
        f.debug_struct("TokenTable")
            .field("tokens", &trie.vocab_size())
            .field("ends", &self.shared.ends)
            .finish()
    }
}

impl TokenTable {
    /// A table of tokens by id, each with its bytes and whether it is a control token; `eos` ends a reply.
    pub fn new(tokens: Vec<(Vec<u8>, bool)>, eos: u32) -> Result<Self, ConstraintError> {
        Self::with_ends(tokens, &[eos])
    }

    /// As [`new`](Self::new), for models with several tokens that end a reply.
    ///
    /// Control tokens are never allowed as text; a grammar can ask for one by name (`<|im_end|>`).
    pub fn with_ends(tokens: Vec<(Vec<u8>, bool)>, ends: &[u32]) -> Result<Self, ConstraintError> {
        let vocabulary = |message: String| ConstraintError::Vocabulary(message);
        let size = u32::try_from(tokens.len()).map_err(|e| vocabulary(e.to_string()))?;
        let &first_end = ends.first().ok_or_else(|| vocabulary("no end token".into()))?;
        if let Some(end) = ends.iter().find(|&&end| end >= size) {
            return Err(vocabulary(format!("end token {end} of {size} tokens")));
        }
        let words = trie_words(tokens, ends);
        let bytes: usize = words.iter().map(Vec::len).sum();
        if bytes > MAX_TABLE_BYTES {
            return Err(vocabulary(format!("{bytes} bytes of tokens, the limit is {MAX_TABLE_BYTES}")));
        }
        let trie = TokTrie::from(&TokRxInfo::new(size, first_end), &words).with_eos_tokens(ends);
        let env: TokEnv = Arc::new(Environment { trie });
        let factory = factory(&env).map_err(|e| vocabulary(e.to_string()))?;
        Ok(Self { shared: Arc::new(Shared { factory, ends: ends.to_vec() }) })
    }

    /// How many tokens the table has.
    pub fn len(&self) -> usize {
        self.shared.factory.tok_env().tok_trie().vocab_size()
    }

    /// Whether the table has no tokens; it never is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The tokens as toktrie wants them: control tokens marked, unusable ones empty.
fn trie_words(tokens: Vec<(Vec<u8>, bool)>, ends: &[u32]) -> Vec<Vec<u8>> {
    let mark = TokTrie::SPECIAL_TOKEN_MARKER;
    let word = |(id, (mut bytes, control)): (u32, (Vec<u8>, bool))| {
        if bytes.len() > MAX_TOKEN_BYTES {
            bytes.clear();
        } else if control || ends.contains(&id) {
            bytes.insert(0, mark);
        } else if bytes.first() == Some(&mark) {
            // The marker's byte never occurs in UTF-8: a plain token with it could only confuse.
            bytes.clear();
        }
        bytes
    };
    (0..=u32::MAX).zip(tokens).map(word).collect()
}

fn factory(env: &TokEnv) -> Result<ParserFactory, impl fmt::Display + use<>> {
    // Forced text is left to the model token by token: our greedy tokenisation is not the model's.
    let capabilities = InferenceCapabilities::default();
    let factory = ParserFactory::new(env, capabilities, &[STRING_SLICE.to_owned()]);
    factory.map(|mut factory| {
        factory.quiet();
        *factory.limits_mut() = limits();
        factory
    })
}

/// Bounds on what a hostile grammar may cost; each step stays within some tens of milliseconds.
fn limits() -> ParserLimits {
    ParserLimits { verbose_errors: false, max_lexer_states: 50_000, ..ParserLimits::default() }
}

struct Environment {
    trie: TokTrie,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// The state of one constrained reply.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    table: TokenTable,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("complete", &self.is_complete()).finish_non_exhaustive()
    }
}

impl Constraint {
    /// Output that is JSON and valid under `schema`.
    pub fn json_schema(schema: &str, table: &TokenTable) -> Result<Self, ConstraintError> {
        check_length(schema)?;
        let mut schema = serde_json::from_str(schema).map_err(|e| ConstraintError::Schema(e.to_string()))?;
        bound_whitespace(&mut schema);
        Self::compile(TopLevelGrammar::from_json_schema(schema), table, ConstraintError::Schema)
    }

    /// Output that is some JSON object.
    pub fn json_object(table: &TokenTable) -> Result<Self, ConstraintError> {
        Self::json_schema(r#"{"type": "object"}"#, table)
    }

    /// Output that follows a grammar in llguidance's dialect of Lark.
    pub fn grammar(text: &str, table: &TokenTable) -> Result<Self, ConstraintError> {
        check_length(text)?;
        if nesting(text) > MAX_NESTING {
            return Err(ConstraintError::TooDeep);
        }
        let grammar = TopLevelGrammar::from_lark(text.to_owned());
        let compiled = Self::compile(grammar, table, ConstraintError::Grammar);
        // Valid Lark may hold `::=` in a string, so only a failure tells.
        compiled.map_err(|error| if text.contains("::=") { ConstraintError::Gbnf } else { error })
    }

    fn compile(
        grammar: TopLevelGrammar,
        table: &TokenTable,
        error: fn(String) -> ConstraintError,
    ) -> Result<Self, ConstraintError> {
        let parser = compile_on_own_stack(grammar, table).map_err(error)?;
        Ok(Self { matcher: Matcher::new(Ok(parser)), table: table.clone() })
    }

    /// Sets the logits of all tokens that are not allowed now to `-inf`.
    ///
    /// Once the grammar can only end, exactly the end tokens are left.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| stuck(&e))?;
        if allowed.first_bit_set().is_none_or(|id| id >= logits.len()) {
            return Err(ConstraintError::Stuck("no token is allowed".into()));
        }
        ban_others(&allowed, logits);
        Ok(())
    }

    /// Moves on by a token; an error if it is not allowed, after which the constraint is unusable.
    pub fn accept(&mut self, id: u32) -> Result<(), ConstraintError> {
        if self.is_complete() && self.table.shared.ends.contains(&id) {
            return Ok(());
        }
        let consumed = self.matcher.consume_token(id);
        consumed.map_err(|e| ConstraintError::Rejected { id, message: message(&e) })
    }

    /// Whether nothing can follow but the end.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && self.matcher.stop_reason().is_ok()
    }

    /// Whether the reply may end here.
    pub fn may_end(&mut self) -> bool {
        self.is_complete() || self.matcher.is_accepting().unwrap_or(false)
    }
}

fn ban_others(allowed: &SimpleVob, logits: &mut [f32]) {
    let mut usable = false;
    for (id, logit) in (0..=u32::MAX).zip(logits.iter_mut()) {
        if (id as usize) < allowed.len() && allowed.is_allowed(id) {
            usable |= *logit > f32::NEG_INFINITY;
        } else {
            *logit = f32::NEG_INFINITY;
        }
    }
    if !usable {
        // The model ruled out all that the grammar allows; the grammar decides.
        for id in allowed.iter() {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = 0.0;
            }
        }
    }
}

fn check_length(source: &str) -> Result<(), ConstraintError> {
    let bytes = source.len();
    if bytes > MAX_SOURCE_BYTES { Err(ConstraintError::TooLong { bytes }) } else { Ok(()) }
}

/// The deepest nesting of brackets, counting those in strings too: a bound, not a parse.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// Allows a line break and an indentation between elements, but no more: a small model that is free to
/// write white space may never come to the next key. A schema with options of its own keeps them.
fn bound_whitespace(schema: &mut serde_json::Value) {
    if let Some(object) = schema.as_object_mut() {
        object
            .entry("x-guidance")
            .or_insert_with(|| serde_json::json!({ "whitespace_pattern": r"\n?[ ]{0,16}" }));
    }
}

fn compile_on_own_stack(grammar: TopLevelGrammar, table: &TokenTable) -> Result<TokenParser, String> {
    let compile = || table.shared.factory.create_parser(grammar).map_err(|e| message(&e));
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK_BYTES);
        let thread = builder.spawn_scoped(scope, compile).map_err(|e| e.to_string())?;
        thread.join().unwrap_or_else(|_| Err("the grammar compiler panicked".into()))
    })
}

fn stuck(error: &impl fmt::Display) -> ConstraintError {
    ConstraintError::Stuck(message(error))
}

/// llguidance's message, on which it hangs a tag or, after a panic of its own, a backtrace.
fn message(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    let end = ["<non-verbose/>", "<backtrace>"].iter().filter_map(|tag| text.find(tag)).min();
    text[..end.unwrap_or(text.len())].trim_end().to_owned()
}

#[cfg(test)]
#[path = "constraint_tests.rs"]
mod tests;
