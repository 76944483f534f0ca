//! A sequence in progress: tokens in, an iterator of tokens out. All mutable state meets here.

mod batch;
mod draft;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use batch::{Batch, Lane};
pub use draft::{DraftMode, DraftOptions, DraftStats, MAX_DRAFT};

use crate::gguf::Metadata;
use crate::kernels::Kernels;
use crate::model::{FfnStep, KvType, Model, ModelError, State};
use crate::ops::Compute;
use crate::sampler::{Constraint, ConstraintError, Sampler, StopMatcher, TokenTable};
use crate::skip::{SkipOptions, SkipStats};
use crate::threads::{PinError, Team};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::weights::{LoadOptions, Progress};
use draft::Length;
use writer::Writer;

/// A loaded model with what is needed to run it. Sessions borrow it.
pub struct Engine {
    model: Arc<Model>,
    tokenizer: Tokenizer,
    team: Team,
    kernels: Kernels,
    table: std::sync::OnceLock<TokenTable>,
    options: EngineOptions,
}

/// How an engine runs.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Threads; `None`: the physical cores that the process may use.
    pub threads: Option<usize>,
    /// Threads for steps of several tokens (prompts); `None`: as many as for others.
    pub threads_batch: Option<usize>,
    /// Whether each thread stays on one CPU.
    pub pinned: bool,
    /// Kernel; `None`: the best.
    pub kernel: Option<String>,
    /// How the weights come to memory; `mlock` is for caches too.
    pub load: LoadOptions,
}

/// Errors of a session.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SessionError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error("the prompt is empty: there is nothing to continue")]
    EmptyPrompt,
    #[error("the tokenizer has {tokenizer} tokens, the embedding {embedding}")]
    Vocabulary { tokenizer: usize, embedding: usize },
}

impl Engine {
    /// Loads the model at `path`. `threads`: default, the physical cores; `kernel`: default, the best.
    pub fn load(path: &Path, threads: Option<usize>, kernel: Option<&str>) -> Result<Self, SessionError> {
        let kernel = kernel.map(str::to_owned);
        Self::load_with(path, EngineOptions { threads, kernel, ..Default::default() }, &|_, _| {})
    }

    /// Loads the model at `path`; `progress` is told of bytes of it that have to be read.
    pub fn load_with(
        path: &Path,
        options: EngineOptions,
        progress: Progress<'_>,
    ) -> Result<Self, SessionError> {
        let kernels = Kernels::select(options.kernel.as_deref()).map_err(ModelError::from)?;
        let threads = options.threads.unwrap_or_else(crate::threads::default_threads);
        let most = threads.max(options.threads_batch.unwrap_or(0));
        let options = EngineOptions { threads: Some(threads), ..options };
        let model = Model::load_with(path, options.load, progress)?;
        // After loading, whose threads would inherit the place of this one.
        let team = match options.pinned {
            true => Team::pinned(most)?,
            false => Team::new(most).map_err(ModelError::from)?,
        };
        let tokenizer = Tokenizer::from_gguf(model.weights().metadata())?;
        // Some embeddings are padded with rows that no token has; the other way round is an error.
        if tokenizer.vocab_size() > model.config().vocab {
            let embedding = model.config().vocab;
            return Err(SessionError::Vocabulary { tokenizer: tokenizer.vocab_size(), embedding });
        }
        Ok(Self { model: Arc::new(model), tokenizer, team, kernels, table: Default::default(), options })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The model while nothing else holds it, with what operations run with: to prepare skipping.
    pub fn model_mut(&mut self) -> Option<(&mut Model, Compute<'_>)> {
        let on = Compute { team: &self.team, kernels: self.kernels };
        Arc::get_mut(&mut self.model).map(|model| (model, on))
    }

    /// Makes ready what the policy of `options` needs; before the first session.
    pub fn prepare_skip(
        &mut self,
        options: &SkipOptions,
        progress: impl FnMut(usize, usize),
    ) -> Result<(), ModelError> {
        match self.model_mut() {
            Some((model, on)) => model.prepare_skip(on, options, progress),
            None => Ok(()),
        }
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The metadata of its file.
    pub fn metadata(&self) -> &Metadata {
        self.model.weights().metadata()
    }

    /// The threads.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// The kernels in use.
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Threads for a step of one token, and of several.
    pub fn threads(&self) -> (usize, usize) {
        let one = self.options.threads.unwrap_or(self.team.threads());
        (one, self.options.threads_batch.unwrap_or(one))
    }

    /// What operations run with.
    pub fn compute(&self) -> Compute<'_> {
        Compute { team: &self.team, kernels: self.kernels }
    }

    /// The vocabulary in the form that [`Constraint`] takes; built on first use, which takes a moment.
    pub fn token_table(&self) -> Result<&TokenTable, ConstraintError> {
        if let Some(table) = self.table.get() {
            return Ok(table);
        }
        let t = &self.tokenizer;
        let ids = 0..t.vocab_size() as u32;
        let tokens = ids.clone().map(|id| (t.token_bytes(id).to_vec(), t.is_control(id))).collect();
        let ends: Vec<u32> = ids.filter(|&id| t.is_end_of_generation(id)).collect();
        let table = TokenTable::with_ends(tokens, &ends)?;
        Ok(self.table.get_or_init(|| table))
    }
}

/// How a session runs.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Positions; `None`: what the model was trained for, at most 8192.
    pub context: Option<usize>,
    /// Prompt tokens evaluated at a time.
    pub batch: usize,
    /// How keys and values are stored.
    pub kv: KvType,
    /// FFN skipping.
    pub skip: SkipOptions,
    /// When the context is full, drop the older half instead of stopping.
    pub context_shift: bool,
    /// Guessing of tokens ahead. With any, the generated text is the full model's: `skip` only drafts.
    pub draft: DraftOptions,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            context: None,
            batch: 512,
            kv: KvType::F16,
            skip: SkipOptions::default(),
            context_shift: false,
            draft: DraftOptions::default(),
        }
    }
}

/// Largest context that is taken unasked: its cache fits a small machine.
const DEFAULT_CONTEXT: usize = 8192;
/// First tokens that a context shift keeps (attention sinks, Xiao et al. 2023).
const SHIFT_KEEP: usize = 4;

/// A sequence in progress.
pub struct Session<'e> {
    engine: &'e Engine,
    state: State,
    options: SessionOptions,
    /// Tokens in the cache.
    tokens: Vec<u32>,
    /// Tokens that the skip policy has governed.
    governed: usize,
    times: Times,
    drafts: DraftStats,
}

/// Tokens and time of a session, prompt and generation apart.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Times {
    pub prompt_tokens: usize,
    pub prompt_time: Duration,
    pub generated_tokens: usize,
    pub generation_time: Duration,
}

impl<'e> Session<'e> {
    /// An empty sequence.
    pub fn new(engine: &'e Engine, options: SessionOptions) -> Result<Self, SessionError> {
        let config = engine.model.config();
        let context = options.context.unwrap_or(config.trained_context.min(DEFAULT_CONTEXT)).max(2);
        let policy = engine.model.policy(&options.skip).map_err(ModelError::from)?;
        let mut state = State::new(&engine.model, &engine.team, (context, options.batch), options.kv, policy);
        if engine.options.load.mlock {
            state.lock()?;
        }
        Ok(Self {
            engine,
            state,
            options,
            tokens: Vec::with_capacity(context),
            governed: 0,
            times: Times::default(),
            drafts: DraftStats::default(),
        })
    }

    /// The engine.
    pub fn engine(&self) -> &'e Engine {
        self.engine
    }

    /// Tokens in the cache.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Positions.
    pub fn context(&self) -> usize {
        self.state.context()
    }

    /// Tokens and times so far.
    pub fn times(&self) -> Times {
        self.times
    }

    /// What was skipped so far.
    pub fn skip_stats(&self) -> &SkipStats {
        self.state.stats()
    }

    /// What drafts came to so far.
    pub fn draft_stats(&self) -> DraftStats {
        self.drafts
    }

    /// How it runs.
    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// The state, for evaluations that look inside.
    pub fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }

    /// Forgets all tokens from `position` on.
    pub fn truncate(&mut self, position: usize) {
        self.state.truncate(position);
        self.tokens.truncate(position);
        if position == 0 {
            self.governed = 0;
        }
    }

    /// Replaces the skip policy. What it governs, and what is counted, starts anew.
    pub fn set_skip(&mut self, skip: &SkipOptions) -> Result<(), SessionError> {
        let policy = self.engine.model.policy(skip).map_err(ModelError::from)?;
        self.state.set_policy(policy);
        self.state.clear_stats();
        self.options.skip = skip.clone();
        self.governed = 0;
        Ok(())
    }

    /// Evaluates a prompt (more tokens of it), in batches. `progress(done, total)` is called after each;
    /// when it returns false, evaluation stops there.
    pub fn prompt(
        &mut self,
        tokens: &[u32],
        mut progress: impl FnMut(usize, usize) -> bool,
    ) -> Result<(), SessionError> {
        let started = Instant::now();
        let mut done = 0;
        for batch in tokens.chunks(self.state.batch()) {
            self.make_room(batch.len())?;
            let governed = self.options.skip.prefill && self.options.draft.mode == DraftMode::Off;
            let step = match governed {
                true => FfnStep::Governed { index: self.governed },
                false => FfnStep::Full,
            };
            self.step(batch, step)?;
            done += batch.len();
            self.times.prompt_tokens += batch.len();
            if !progress(done, tokens.len()) {
                break;
            }
        }
        self.times.prompt_time += started.elapsed();
        Ok(())
    }

    /// Evaluates one generated token.
    pub fn push(&mut self, token: u32) -> Result<(), SessionError> {
        self.make_room(1)?;
        self.step(&[token], FfnStep::Governed { index: self.governed })
    }

    /// Logits after the last token, `[vocab]`; they may be changed.
    pub fn logits(&mut self) -> Result<&mut [f32], SessionError> {
        let last = self.state.last_row().ok_or(SessionError::EmptyPrompt)?;
        Ok(self.engine.model.logits(self.engine.compute(), &mut self.state, last))
    }

    /// Evaluates generated tokens with the full model, each as if alone, and keeps the first; the logits of all
    /// go to `logits`, `[tokens, vocab]`.
    fn verify(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<(), SessionError> {
        let (model, on, state) = (&self.engine.model, self.engine.compute(), &mut self.state);
        logits.resize(tokens.len() * model.config().vocab, 0.0);
        model.forward(on, state, tokens, FfnStep::Full)?;
        model.logits_of(on, state, 0..tokens.len(), logits);
        state.keep_rows(1);
        self.tokens.push(tokens[0]);
        Ok(())
    }

    /// The most likely tokens after `token` by the model with FFNs skipped, one after the other: up to `max`, as long
    /// as it is sure of them. The cache is left as it was.
    fn guess(&mut self, token: u32, max: usize) -> Result<Vec<u32>, SessionError> {
        let (engine, start) = (self.engine, self.state.position());
        let (mut drafts, mut token) = (Vec::new(), token);
        while drafts.len() < max {
            let step = FfnStep::Governed { index: self.state.position() };
            engine.model.forward(engine.compute(), &mut self.state, &[token], step)?;
            let Some(guess) = draft::sure_of(self.logits()?) else { break };
            drafts.push(guess);
            token = guess;
        }
        self.state.truncate(start);
        Ok(drafts)
    }

    fn step(&mut self, tokens: &[u32], step: FfnStep) -> Result<(), SessionError> {
        let (one, several) = self.engine.threads();
        self.engine.team.use_threads(if tokens.len() == 1 { one } else { several });
        self.engine.model.forward(self.engine.compute(), &mut self.state, tokens, step)?;
        self.tokens.extend_from_slice(tokens);
        if step != FfnStep::Full {
            self.governed += tokens.len();
        }
        Ok(())
    }

    /// With context shift, drops half of what is not kept when `n` tokens do not fit any more.
    fn make_room(&mut self, n: usize) -> Result<(), SessionError> {
        let (used, context) = (self.tokens.len(), self.context());
        if !self.options.context_shift || used + n <= context || n + SHIFT_KEEP > context {
            return Ok(());
        }
        let keep = SHIFT_KEEP.min(used);
        let drop = ((used - keep) / 2).max(used + n - context).min(used - keep);
        self.state.shift(&self.engine.model, self.engine.compute(), keep, drop)?;
        self.tokens.drain(keep..keep + drop);
        Ok(())
    }

    /// Generates up to `max` tokens after what is in the cache.
    pub fn generate<'s>(&'s mut self, sampling: Sampling<'s>, max: usize) -> Generation<'s, 'e> {
        let drafting = (self.options.draft.mode != DraftMode::Off).then(|| Drafting::new(self.options.draft));
        let Sampling { sampler, constraint, stop, ignore_eos } = sampling;
        let writer = Writer::new(&self.engine.tokenizer, stop, ignore_eos, max);
        Generation { session: self, sampler, constraint, writer, pending: None, drafting }
    }
}

/// How the next token is chosen and when to stop.
pub struct Sampling<'s> {
    /// Logits to token; it must have accepted the prompt's tokens where penalties are to count them.
    pub sampler: &'s mut Sampler,
    /// Grammar that the output must follow.
    pub constraint: Option<&'s mut Constraint>,
    /// Strings that end the output; they are not part of it.
    pub stop: StopMatcher,
    /// Go on after an end-of-generation token.
    pub ignore_eos: bool,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum End {
    /// An end-of-generation token (or the end of the grammar).
    EndOfGeneration,
    StopString,
    /// As many tokens as asked for.
    Length,
    ContextFull,
}

/// A generated token and the text that it completed (none, while a character or a possible stop string
/// is incomplete).
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Piece {
    pub id: u32,
    pub text: String,
}

/// An iterator of [`Piece`]s. Dropping it ends the generation; the session keeps what was evaluated.
pub struct Generation<'s, 'e> {
    session: &'s mut Session<'e>,
    sampler: &'s mut Sampler,
    constraint: Option<&'s mut Constraint>,
    writer: Writer<'e>,
    /// Sampled, not evaluated yet: the last token of an answer need not be.
    pending: Option<u32>,
    drafting: Option<Drafting>,
}

/// The step of the full model that the next tokens are sampled from.
struct Drafting {
    length: Length,
    /// What was guessed to follow the step's first token.
    drafts: Vec<u32>,
    /// What [`Length`] knows the draft as.
    kind: usize,
    /// `[1 + drafts, vocab]`; empty before the first step.
    logits: Vec<f32>,
    /// Row of the last token that counts: the first of the step, or a draft that was right.
    row: usize,
}

impl Drafting {
    fn new(options: DraftOptions) -> Self {
        Self { length: Length::new(options), drafts: Vec::new(), kind: 0, logits: Vec::new(), row: 0 }
    }

    /// Whether the step has logits after `token`, should that come now.
    fn foresaw(&self, token: u32) -> bool {
        self.drafts.get(self.row) == Some(&token)
    }

    /// Makes `token` the last of the session's: from the step if it was foreseen, else in a new one along with
    /// a draft of at most `room` tokens.
    fn evaluate(
        &mut self,
        session: &mut Session<'_>,
        token: u32,
        room: usize,
        ends: impl Fn(u32) -> bool,
    ) -> Result<(), SessionError> {
        if self.foresaw(token) {
            self.row += 1;
            session.state.keep_rows(self.row + 1);
            session.tokens.push(token);
            return Ok(());
        }
        session.make_room(1)?;
        let room = room.min(session.context() - session.tokens.len() - 1).min(session.state.batch() - 1);
        self.draft(session, token, room)?;
        // Nothing that follows an end will be asked for.
        let end = self.drafts.iter().position(|&id| ends(id));
        self.drafts.truncate(end.map_or(self.drafts.len(), |i| i + 1));
        self.row = 0;
        let step: Vec<u32> = std::iter::once(token).chain(self.drafts.iter().copied()).collect();
        let started = Instant::now();
        session.verify(&step, &mut self.logits)?;
        self.length.stepped(step.len(), started.elapsed());
        session.drafts.steps += 1;
        session.drafts.drafted += self.drafts.len();
        Ok(())
    }

    fn draft(&mut self, session: &mut Session<'_>, token: u32, room: usize) -> Result<(), SessionError> {
        self.drafts.clear();
        if session.options.draft.mode == DraftMode::Lookup {
            session.tokens.push(token);
            let (drafts, agree) = draft::lookup(&session.tokens, MAX_DRAFT);
            self.kind = agree;
            let n = self.length.choose(agree, room.min(drafts.len()));
            self.drafts.extend_from_slice(&drafts[..n]);
            session.tokens.pop();
            return Ok(());
        }
        self.kind = 0;
        let started = Instant::now();
        let n = self.length.choose(0, room);
        if n > 0 {
            self.drafts = session.guess(token, n)?;
            self.length.guessed(self.drafts.len().max(1), started.elapsed());
        }
        Ok(())
    }

    /// `id` was sampled from the logits of the current row.
    fn sampled(&mut self, stats: &mut DraftStats, id: u32) {
        if self.row < self.drafts.len() {
            let right = self.foresaw(id);
            self.length.verified(self.kind, right);
            stats.accepted += usize::from(right);
        }
    }
}

impl Generation<'_, '_> {
    /// Why the generation ended, once it has.
    pub fn end(&self) -> Option<End> {
        self.writer.end
    }

    fn advance(&mut self) -> Result<Option<Piece>, SessionError> {
        if self.writer.end.is_some() {
            return Ok(None);
        }
        if self.writer.remaining == 0 {
            return Ok(self.writer.finish(End::Length, self.pending));
        }
        let started = Instant::now();
        if let Some(token) = self.pending {
            let full = self.session.tokens.len() >= self.session.context();
            if full && !self.session.options.context_shift {
                return Ok(self.writer.finish(End::ContextFull, self.pending));
            }
            self.pending = None;
            self.evaluate(token)?;
        }
        let id = self.sample()?;
        self.session.times.generation_time += started.elapsed();
        self.session.times.generated_tokens += 1;
        if !self.writer.ends(id) {
            self.pending = Some(id);
        }
        Ok(self.writer.take(id))
    }

    fn evaluate(&mut self, token: u32) -> Result<(), SessionError> {
        let Some(drafting) = &mut self.drafting else { return self.session.push(token) };
        let writer = &self.writer;
        drafting.evaluate(self.session, token, writer.remaining - 1, |id| writer.ends(id))
    }

    fn sample(&mut self) -> Result<u32, SessionError> {
        let vocab = self.session.engine.model.config().vocab;
        let logits = match &mut self.drafting {
            Some(d) if !d.logits.is_empty() => &mut d.logits[d.row * vocab..][..vocab],
            _ => self.session.logits()?,
        };
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(logits)?;
        }
        let id = self.sampler.sample(logits);
        self.sampler.accept(id);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(id)?;
        }
        if let Some(drafting) = &mut self.drafting {
            drafting.sampled(&mut self.session.drafts, id);
        }
        Ok(id)
    }
}

impl Iterator for Generation<'_, '_> {
    type Item = Result<Piece, SessionError>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.advance();
        if piece.is_err() {
            self.writer.end.get_or_insert(End::EndOfGeneration);
        }
        piece.transpose()
    }
}
