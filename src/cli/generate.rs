//! What `run` and `chat` share: prompts, streaming to stdout, statistics.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::interrupt::Listener;
use super::{Failure, note, put, read_text};
use crate::chat::{ChatTemplate, Message};
use crate::model::ModelError;
use crate::session::{DraftStats, End, Engine, Sampling, Session, SessionError, Times};
use crate::tokenizer::Tokenizer;

/// How messages are written for the model.
#[derive(Args)]
pub(super) struct TemplateArgs {
    /// Text that tells the model how to behave
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    pub system: Option<String>,
    /// Chat template: a well-known name or a file with its Jinja source [default: the model's own]
    #[arg(long, value_name = "NAME|FILE", help_heading = "Prompt")]
    pub chat_template: Option<String>,
}

impl TemplateArgs {
    /// The template asked for, or the model's own if it has one.
    pub fn template(&self, engine: &Engine) -> Result<Option<ChatTemplate>, Failure> {
        match &self.chat_template {
            Some(given) if Path::new(given).is_file() => {
                Ok(Some(ChatTemplate::from_source(&read_text(Path::new(given))?)?))
            }
            Some(given) => Ok(Some(ChatTemplate::named(given)?)),
            None if engine.metadata().contains("tokenizer.chat_template") => {
                Ok(Some(ChatTemplate::from_gguf(engine.metadata())?))
            }
            None => Ok(None),
        }
    }

    /// The system message, if there is one.
    pub fn system_message(&self) -> Option<Message> {
        self.system.as_ref().map(|text| Message::new("system", text))
    }
}

/// The tokens of a conversation, up to where the assistant is to speak.
pub(super) fn encode_messages(
    template: &ChatTemplate,
    messages: &[Message],
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, Failure> {
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
    let prompt = template.render(messages, true, &text(tokenizer.bos()), &text(tokenizer.eos()))?;
    Ok(prompt.encode(tokenizer)?)
}

/// Evaluates a prompt with a bar on stderr; true if Ctrl-C stopped it.
pub(super) fn evaluate_prompt(
    session: &mut Session<'_>,
    tokens: &[u32],
    options: &Shown,
    listener: &Listener,
) -> Result<bool, Failure> {
    if tokens.is_empty() && session.tokens().is_empty() {
        return Err(SessionError::EmptyPrompt.into());
    }
    let (needed, context) = (session.tokens().len() + tokens.len(), session.context());
    if needed > context && !options.context_shift {
        return Err(ModelError::ContextFull { needed, context }.into());
    }
    let bar = progress_bar(
        tokens.len(),
        "prompt {wide_bar} {pos}/{len} tokens, {eta} left",
        // A bar that is gone at once only flickers.
        options.quiet || tokens.len() <= session.state_mut().batch(),
    );
    let mut stopped = false;
    session.prompt(tokens, |done, _| {
        bar.set_position(done as u64);
        stopped = listener.raised();
        !stopped
    })?;
    bar.finish_and_clear();
    Ok(stopped)
}

/// A bar on stderr; hidden if that is no terminal.
pub(super) fn progress_bar(len: usize, template: &str, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::with_draw_target(Some(len as u64), ProgressDrawTarget::hidden());
    }
    let bar = ProgressBar::new(len as u64);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// What a generation shows and allows besides the text.
pub(super) struct Shown {
    /// No progress.
    pub quiet: bool,
    /// Whether the context may be shifted.
    pub context_shift: bool,
}

/// Why a reply ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    By(End),
    CtrlC,
}

impl Ended {
    /// Its name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::By(End::EndOfGeneration) => "end",
            Self::By(End::StopString) => "stop",
            Self::By(End::Length) => "length",
            Self::By(End::ContextFull) => "context",
            Self::CtrlC => "interrupted",
        }
    }

    fn in_words(self) -> &'static str {
        match self {
            Self::By(End::EndOfGeneration) => "the model ended its text",
            Self::By(End::StopString) => "a stop string",
            Self::By(End::Length) => "-n tokens",
            Self::By(End::ContextFull) => "the context is full",
            Self::CtrlC => "Ctrl-C",
        }
    }
}

/// Generates up to `max` tokens, streamed to stdout. Returns the text too.
pub(super) fn stream(
    session: &mut Session<'_>,
    sampling: Sampling<'_>,
    max: usize,
    listener: &Listener,
) -> Result<(String, Ended), Failure> {
    let mut text = String::new();
    let mut generation = session.generate(sampling, max);
    let mut interrupted = false;
    for piece in generation.by_ref() {
        let piece = piece?;
        put(&piece.text)?;
        text.push_str(&piece.text);
        interrupted = listener.raised();
        if interrupted {
            break;
        }
    }
    let ended = match generation.end() {
        Some(end) if !interrupted => Ended::By(end),
        _ => Ended::CtrlC,
    };
    Ok((text, ended))
}

/// Statistics of a session, for people and for programs.
#[derive(Serialize)]
pub(super) struct Statistics {
    prompt_tokens: usize,
    prompt_seconds: f64,
    prompt_tokens_per_second: f64,
    generated_tokens: usize,
    generated_seconds: f64,
    generated_tokens_per_second: f64,
    skip: &'static str,
    /// Share of the FFN blocks of the tokens that the policy governed.
    ffn_skipped: f64,
    ffn_bytes_skipped: f64,
    /// Share of the bytes of the output matrix that those of their logits that were shortlisted left unread.
    output_bytes_skipped: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped_by_layer: Option<Vec<f64>>,
    draft: &'static str,
    /// Tokens guessed, those of them that were right, and steps of the full model.
    drafted: usize,
    drafts_accepted: usize,
    verifications: usize,
    kernel: &'static str,
    threads: usize,
    threads_batch: usize,
    context: usize,
    context_used: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    end: &'static str,
    #[serde(skip)]
    ended: Ended,
}

impl Statistics {
    pub fn of(session: &mut Session<'_>, seed: Option<u64>, ended: Ended, by_layer: bool) -> Self {
        let Times { prompt_tokens, prompt_time, generated_tokens, generation_time } = session.times();
        let DraftStats { steps, drafted, accepted } = session.draft_stats();
        let skipped = session.skip_stats().share();
        let layers = session.engine().model().layers();
        let bytes_skipped = session.skip_stats().weighted_share(|layer| layers[layer].ffn.bytes() as u64);
        let output_skipped = session.engine().model().output_share(session.skip_stats());
        Self {
            prompt_tokens,
            prompt_seconds: prompt_time.as_secs_f64(),
            prompt_tokens_per_second: rate(prompt_tokens, prompt_time),
            generated_tokens,
            generated_seconds: generation_time.as_secs_f64(),
            generated_tokens_per_second: rate(generated_tokens, generation_time),
            ffn_skipped: skipped,
            ffn_bytes_skipped: bytes_skipped,
            output_bytes_skipped: output_skipped,
            skipped_by_layer: by_layer.then(|| session.skip_stats().share_by_layer()),
            skip: session.state_mut().policy_name(),
            draft: session.options().draft.mode.name(),
            drafted,
            drafts_accepted: accepted,
            verifications: steps,
            kernel: session.engine().kernels().name(),
            threads: session.engine().threads().0,
            threads_batch: session.engine().threads().1,
            context: session.context(),
            context_used: session.tokens().len(),
            seed,
            end: ended.name(),
            ended,
        }
    }

    /// A few lines on stderr.
    pub fn print(&self) {
        note(&format!(
            "prompt     {:>6} tokens  {:>8.1} tokens/s",
            self.prompt_tokens, self.prompt_tokens_per_second
        ));
        note(&format!(
            "generated  {:>6} tokens  {:>8.1} tokens/s, ended by: {}",
            self.generated_tokens,
            self.generated_tokens_per_second,
            self.ended.in_words()
        ));
        note(&format!(
            "skipped    {:>6.1} % of the FFN blocks, {:.1} % of their bytes{} (--skip {})",
            100.0 * self.ffn_skipped,
            100.0 * self.ffn_bytes_skipped,
            match self.output_bytes_skipped {
                0.0 => String::new(),
                share => format!(", {:.1} % of the output matrix", 100.0 * share),
            },
            self.skip
        ));
        if self.verifications > 0 {
            note(&format!(
                "drafted    {:>6} tokens, {} of them right, in {} steps of the full model (--draft {})",
                self.drafted, self.drafts_accepted, self.verifications, self.draft
            ));
        }
        note(&format!(
            "ran on     kernel {}, threads {}, context {} of {}",
            self.kernel,
            match self.threads_batch == self.threads {
                true => self.threads.to_string(),
                false => format!("{} ({} for prompts)", self.threads, self.threads_batch),
            },
            self.context_used,
            self.context
        ));
        if let Some(shares) = &self.skipped_by_layer {
            print_shares(shares);
        }
    }

    /// One line of JSON on stderr.
    pub fn print_json(&self) -> Result<(), Failure> {
        note(&serde_json::to_string(self)?);
        Ok(())
    }
}

fn print_shares(shares: &[f64]) {
    note("FFNs skipped by layer");
    for (layer, share) in shares.iter().enumerate() {
        let bar = "#".repeat((40.0 * share).round() as usize);
        note(&format!("  {layer:>3} {:>5.1} % {bar}", 100.0 * share));
    }
}

/// Tokens a second; 0 where there was no time to measure.
pub(super) fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// Tells what to do about a full context.
pub(super) fn explain_full_context(ended: Ended, context: usize) {
    if ended == Ended::By(End::ContextFull) {
        note(&format!(
            "the context of {context} tokens is full: the text ends here (-c N sets the size, --context-shift drops the oldest)"
        ));
    }
}
