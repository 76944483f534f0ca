//! Perplexity over consecutive windows, and the divergence of a skipping model from the full one.
//!
//! Each window is evaluated from an empty cache. Position `i` predicts token `i + 1`; positions from
//! `warm` on are scored. A skip policy governs every token of a window, past its warm-up, just as if
//! the text were being generated.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use serde::Serialize;

use super::npy::NpyWriter;
use crate::kernels::Kernels;
use crate::model::{FfnStep, KvType, Model, ModelError, State};
use crate::ops::Compute;
use crate::session::Engine;
use crate::skip::{Never, SkipOptions, SkipPolicy, SkipStats};

/// Positions whose logits are held at a time: 64 rows of a large vocabulary are 40 MB.
const ROWS: usize = 64;

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct PerplexityOptions {
    /// Tokens of a window.
    pub context: usize,
    /// Windows; `None`: as many as the text has.
    pub chunks: Option<usize>,
    /// First scored position of a window; `None`: half of it.
    pub warm: Option<usize>,
    /// How keys and values are stored.
    pub kv: KvType,
    /// FFN skipping.
    pub skip: SkipOptions,
    /// Also run the full model and compare.
    pub kl: bool,
    /// Write every position's logits here, `[tokens, vocab]`.
    pub logits_out: Option<PathBuf>,
}

/// What came out. KL is in nats.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)]
pub struct PerplexityReport {
    pub ppl: f64,
    /// Mean negative log-likelihood, nats.
    pub nll: f64,
    /// Standard error of `nll`.
    pub nll_error: f64,
    /// Scored tokens.
    pub tokens: usize,
    /// Share of FFN blocks skipped, of all positions.
    pub ffn_skipped: f64,
    /// Share of FFN weight bytes left unread if the tokens were decoded one by one.
    pub ffn_bytes_skipped: f64,
    /// Share of the output matrix's bytes left unread, of tokens whose logits were shortlisted.
    pub output_bytes_skipped: f64,
    /// Perplexity of the full model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ppl_full: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_mean: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_p99: Option<f64>,
    /// Share of positions at which both models' most likely token is the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_top1: Option<f64>,
    /// Mean cosine of the residual stream across each FFN that ran, where it was measured.
    pub cosine_by_layer: Vec<Option<f64>>,
    pub skipped_by_layer: Vec<f64>,
}

/// Errors of an evaluation.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum EvalError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the text has {tokens} tokens, fewer than one window of {context}")]
    TooShort { tokens: usize, context: usize },
    #[error("scoring from position {warm} leaves nothing of windows of {context}")]
    Warm { warm: usize, context: usize },
    #[error(
        "windows of {context} tokens: the full model's probabilities take {bytes} bytes, more than {most}"
    )]
    TooLarge { context: usize, bytes: usize, most: usize },
    #[error("{other} has another vocabulary than {model}: the two cannot be compared")]
    OtherVocabulary { model: String, other: String },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// Evaluates `tokens`. `progress(windows done, windows, perplexity so far)` is called after each window
/// and stops the evaluation by returning false; the report then covers the windows done.
pub fn perplexity(
    engine: &Engine,
    tokens: &[u32],
    options: &PerplexityOptions,
    mut progress: impl FnMut(usize, usize, f64) -> bool,
) -> Result<PerplexityReport, EvalError> {
    let (model, on) = (engine.model(), engine.compute());
    let policy = model.policy(&options.skip).map_err(ModelError::from)?;
    let run = Run::new(model, on, tokens, options)?;
    let mut sums = Sums::default();
    let mut test = run.state(policy);
    test.measure_cosines(true);
    let mut full = options.kl.then(|| run.state(Box::new(Never)));
    let mut out = run.logits_file()?;
    for i in 0..run.windows {
        let window = &tokens[i * options.context..][..options.context];
        run.window(window, &mut test, full.as_mut(), &mut sums, out.as_mut())?;
        if !progress(i + 1, run.windows, sums.mean_nll().exp()) {
            break;
        }
    }
    if let (Some(out), Some(path)) = (out, &options.logits_out) {
        out.finish().map_err(|error| EvalError::Io { path: path.clone(), error })?;
    }
    Ok(sums.report(test.stats(), model))
}

struct Run<'a> {
    model: &'a Model,
    on: Compute<'a>,
    options: &'a PerplexityOptions,
    warm: usize,
    windows: usize,
}

impl<'a> Run<'a> {
    fn new(
        model: &'a Model,
        on: Compute<'a>,
        tokens: &[u32],
        options: &'a PerplexityOptions,
    ) -> Result<Self, EvalError> {
        let context = options.context;
        let warm = options.warm.unwrap_or(context / 2);
        if warm + 1 >= context {
            return Err(EvalError::Warm { warm, context });
        }
        let windows = (tokens.len() / context).min(options.chunks.unwrap_or(usize::MAX));
        if windows == 0 {
            return Err(EvalError::TooShort { tokens: tokens.len(), context });
        }
        Ok(Self { model, on, options, warm, windows })
    }

    fn state(&self, policy: Box<dyn SkipPolicy>) -> State {
        let context = self.options.context;
        State::new(self.model, self.on.team, (context, context.min(512)), self.options.kv, policy)
    }

    fn logits_file(&self) -> Result<Option<NpyWriter>, EvalError> {
        let Some(path) = &self.options.logits_out else { return Ok(None) };
        let (rows, cols) = (self.windows * self.options.context, self.model.config().vocab);
        let created = NpyWriter::create(path, rows, cols);
        created.map(Some).map_err(|error| EvalError::Io { path: path.clone(), error })
    }

    fn window(
        &self,
        window: &[u32],
        test: &mut State,
        mut full: Option<&mut State>,
        sums: &mut Sums,
        mut out: Option<&mut NpyWriter>,
    ) -> Result<(), EvalError> {
        let on = self.on;
        let vocab = self.model.config().vocab;
        let (mut q, mut p) = (Vec::new(), Vec::new());
        test.truncate(0);
        if let Some(full) = &mut full {
            full.truncate(0);
        }
        let batch = test.batch();
        for (b, tokens) in window.chunks(batch).enumerate() {
            self.model.forward(on, test, tokens, FfnStep::Governed { index: b * batch })?;
            if let Some(full) = &mut full {
                self.model.forward(on, full, tokens, FfnStep::Full)?;
            }
            for from in (0..tokens.len()).step_by(ROWS) {
                let rows = from..(from + ROWS).min(tokens.len());
                let first = b * batch + from;
                if out.is_none() && first + rows.len() <= self.warm {
                    continue;
                }
                q.resize(rows.len() * vocab, 0.0);
                self.model.logits_of(on, test, rows.clone(), &mut q);
                if let (Some(out), Some(path)) = (out.as_mut(), &self.options.logits_out) {
                    out.write(&q).map_err(|error| EvalError::Io { path: path.clone(), error })?;
                }
                let scored = first.max(self.warm)..(first + rows.len()).min(window.len() - 1);
                let (skip, n) = ((scored.start - first).min(rows.len()), scored.len());
                let targets = &window[scored.start + 1..scored.start + 1 + n];
                let exact = match &mut full {
                    Some(full) => {
                        p.resize(rows.len() * vocab, 0.0);
                        self.model.logits_of(on, full, rows.clone(), &mut p);
                        Some(Exact::of(on, &mut p[skip * vocab..][..n * vocab], targets))
                    }
                    None => None,
                };
                let exact = exact.as_deref().map(|exact| (&p[skip * vocab..][..n * vocab], exact));
                let scores = score_rows(on, &mut q[skip * vocab..][..n * vocab], targets, exact);
                scores.iter().for_each(|score| sums.add(score));
            }
        }
        Ok(())
    }
}

/// Evaluates a window from an empty cache, governed or in full. `each(position, targets, logits)` gets the logits of the `scored`
/// positions, some at a time and counted from the first of them, and the tokens that came.
pub(super) fn evaluate(
    model: &Model,
    on: Compute<'_>,
    state: &mut State,
    (window, scored): (&[u32], Range<usize>),
    governed: bool,
    mut each: impl FnMut(usize, &[u32], &mut [f32]),
) -> Result<(), EvalError> {
    state.truncate(0);
    let (batch, vocab, mut logits) = (state.batch(), model.config().vocab, Vec::new());
    for (b, tokens) in window.chunks(batch).enumerate() {
        let begin = b * batch;
        let step = if governed { FfnStep::Governed { index: begin } } else { FfnStep::Full };
        model.forward(on, state, tokens, step)?;
        let here = scored.start.max(begin)..(begin + tokens.len()).min(scored.end);
        for from in here.clone().step_by(ROWS) {
            let to = (from + ROWS).min(here.end);
            logits.resize((to - from) * vocab, 0.0);
            model.logits_of(on, state, from - begin..to - begin, &mut logits);
            each(from - scored.start, &window[from + 1..to + 1], &mut logits);
        }
    }
    Ok(())
}

/// What the full model says at a position: beside its probabilities, what comparing with them needs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Exact {
    /// Negative log-likelihood of the token that came, nats.
    nll: f64,
    /// Most likely token, the first of equals.
    top: usize,
    /// `sum p ln p`
    negentropy: f64,
}

impl Exact {
    /// Turns the logits of some positions, `[targets, vocab]`, into probabilities; `targets` are the tokens that came.
    pub fn of(on: Compute<'_>, logits: &mut [f32], targets: &[u32]) -> Vec<Self> {
        by_row(on, logits, targets, |row, _, target| {
            let (max, top) = maximum(row);
            let logits = row.to_vec();
            let sum = exp_sum(on.kernels, row, max);
            let inverse = (1.0 / sum) as f32;
            row.iter_mut().for_each(|p| *p *= inverse);
            let mean = row.iter().zip(&logits).map(|(p, l)| f64::from(p * (l - max))).sum::<f64>();
            let nll = sum.ln() - f64::from(logits[target] - max);
            Self { nll, top, negentropy: mean - sum.ln() }
        })
    }
}

/// How well a position's logits foretold the token that came.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Score {
    nll: f64,
    /// In comparison with the full model: its `nll`, KL in nats, and whether the most likely tokens are the same.
    pub compared: Option<(f64, f64, bool)>,
}

/// Scores logits `[targets, vocab]`, which are overwritten, against the full model's probabilities if there are any.
pub(super) fn score_rows(
    on: Compute<'_>,
    logits: &mut [f32],
    targets: &[u32],
    exact: Option<(&[f32], &[Exact])>,
) -> Vec<Score> {
    by_row(on, logits, targets, |q, row, target| {
        let (max, top) = maximum(q);
        let at_target = f64::from(q[target] - max);
        // Relative to the maximum, the terms that matter are small and round little.
        let cross = exact.map(|(p, _)| {
            let p = &p[row * q.len()..][..q.len()];
            p.iter().zip(&*q).map(|(p, q)| f64::from(p * (q - max))).sum::<f64>()
        });
        let sum = exp_sum(on.kernels, q, max).ln();
        let compared = exact.zip(cross).map(|((_, exact), cross)| {
            let exact = &exact[row];
            (exact.nll, (exact.negentropy - cross + sum).max(0.0), exact.top == top)
        });
        Score { nll: sum - at_target, compared }
    })
}

/// `job(row's logits, row, its target)` of all rows, shared among the threads.
fn by_row<T: Default + Send>(
    on: Compute<'_>,
    logits: &mut [f32],
    targets: &[u32],
    job: impl Fn(&mut [f32], usize, usize) -> T + Sync,
) -> Vec<T> {
    let mut results: Vec<T> = Vec::new();
    results.resize_with(targets.len(), T::default);
    let cols = (logits.len() / targets.len().max(1)).max(1);
    let mut rows: Vec<_> = logits.chunks_exact_mut(cols).zip(&mut results).collect();
    on.team.for_plain_tiles(&mut rows, 1, (1, 1), |mut tile| {
        for row in tile.rows() {
            let (logits, result) = &mut tile.row(row)[0];
            **result = job(logits, row, targets[row] as usize);
        }
    });
    results
}

/// The largest value and where it is (the first, of equals).
fn maximum(x: &[f32]) -> (f32, usize) {
    (0..).zip(x).fold((f32::NEG_INFINITY, 0), |best, (i, &v)| if v > best.0 { (v, i) } else { best })
}

/// `x = exp(x - max)`; returns the sum.
fn exp_sum(kernels: Kernels, x: &mut [f32], max: f32) -> f64 {
    // In parts, so that single precision does not round the sum of a large vocabulary.
    x.chunks_mut(1024).map(|x| f64::from(kernels.exp_sum(x, max))).sum()
}

/// Scores of many positions.
#[derive(Clone, Default)]
pub(super) struct Sums {
    nll: f64,
    nll_squared: f64,
    nll_full: f64,
    tokens: usize,
    same_top1: usize,
    kl: Vec<f64>,
}

impl Sums {
    pub fn add(&mut self, score: &Score) {
        self.tokens += 1;
        self.nll += score.nll;
        self.nll_squared += score.nll * score.nll;
        if let Some((nll, kl, same)) = score.compared {
            self.nll_full += nll;
            self.kl.push(kl);
            self.same_top1 += usize::from(same);
        }
    }

    fn mean_nll(&self) -> f64 {
        self.nll / self.tokens.max(1) as f64
    }

    pub fn report(mut self, stats: &SkipStats, model: &Model) -> PerplexityReport {
        let n = self.tokens.max(1) as f64;
        let nll = self.mean_nll();
        let variance = (self.nll_squared / n - nll * nll).max(0.0);
        self.kl.sort_by(f64::total_cmp);
        let compared = !self.kl.is_empty();
        let p99 = self.kl.get(self.kl.len() * 99 / 100).copied();
        PerplexityReport {
            ppl: nll.exp(),
            nll,
            nll_error: (variance / n).sqrt(),
            tokens: self.tokens,
            ffn_skipped: stats.share(),
            ffn_bytes_skipped: stats.weighted_share(|layer| model.layers()[layer].ffn.bytes() as u64),
            output_bytes_skipped: model.output_share(stats),
            ppl_full: compared.then(|| (self.nll_full / n).exp()),
            kl_mean: compared.then(|| self.kl.iter().sum::<f64>() / n),
            kl_p99: p99,
            same_top1: compared.then_some(self.same_top1 as f64 / n),
            cosine_by_layer: stats.mean_cosines(),
            skipped_by_layer: stats.share_by_layer(),
        }
    }
}
