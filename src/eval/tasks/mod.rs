//! The paper's three tasks (FFN-SkipLLM, section 4): what skipping does to answers.
//!
//! Data becomes [`Item`]s, all policies answer the same items from the same prompts ([`Runner`]), each answer becomes a
//! [`Record`] with its scores, kept in a [`Ledger`] as soon as it is there, and records become a [`Report`]. An answer
//! depends on nothing but its item and the settings, and a table on nothing but the records: so a run that was killed
//! and resumed gives the same table as one that was not.
//!
//! What is governed: a prompt runs in full, as the paper has it, and the policy governs from the prompt's last token on,
//! whose logits give the first token of the answer. Every turn of a conversation starts like this: what was said before
//! is prompt.

mod data;
mod interval;
mod judge;
mod record;
mod report;
mod run;
mod text;

use std::io;
use std::path::PathBuf;

pub use data::{add_references, freebaseqa, interleaved, mt_bench, shuffled, stories};
pub use interval::Estimate;
pub use judge::{Comparison, Judge, Judged};
pub use record::{Contender, Judgment, Ledger, Record, Row};
pub use report::{Line, Measure, Report, fastchat};
pub use run::{Runner, Settings};
pub use text::{Rouge, collapsed, contains, distinct, exact, longest_repeat, normalised, rouge};

use super::EvalError;
use crate::chat::ChatError;
use crate::model::ModelError;
use crate::sampler::SamplerError;
use crate::session::SessionError;
use crate::tokenizer::TokenizerError;

/// Which task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Factoid questions: FreebaseQA.
    FreebaseQa,
    /// Two-turn conversations: MT-Bench.
    MtBench,
    /// Summaries of news: CNN/DailyMail.
    Summarize,
}

impl Task {
    /// All, with their names.
    pub const NAMES: [(&'static str, Self); 3] =
        [("freebaseqa", Self::FreebaseQa), ("mt-bench", Self::MtBench), ("summarize", Self::Summarize)];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|row| row.1 == self).map_or("", |row| row.0)
    }
}

/// One question, story or conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Item {
    /// Unique in its data.
    pub id: String,
    /// Category or length group; may be empty.
    pub group: String,
    /// What the user says, turn by turn: the question, the story, ...
    pub turns: Vec<String>,
    /// Right answers, the reference summary, or a reference answer to each turn.
    pub references: Vec<String>,
}

/// Errors of a task.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum TaskError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: line {line}: {why}", path.display())]
    Line { path: PathBuf, line: usize, why: String },
    #[error("{}: larger than {most} bytes", path.display())]
    TooLarge { path: PathBuf, most: u64 },
    #[error("{}: there is nothing in it", path.display())]
    Empty { path: PathBuf },
    #[error("{} holds results: give --resume to go on from them, or another name", path.display())]
    Exists { path: PathBuf },
    #[error("the model has no chat template, which this task needs: name one with --chat-template")]
    NoTemplate,
    #[error("item {item:?}: prompt and answer take {needed} tokens, the context has {context}")]
    TooLong { item: String, needed: usize, context: usize },
    #[error("the judge at {url}: {why}")]
    Judge { url: String, why: String },
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    #[error(transparent)]
    Eval(#[from] EvalError),
    #[error(transparent)]
    Plot(#[from] super::plot::PlotError),
}

impl From<TokenizerError> for TaskError {
    fn from(error: TokenizerError) -> Self {
        Self::Session(error.into())
    }
}
