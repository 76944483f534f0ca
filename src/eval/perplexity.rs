//! Perplexity over consecutive windows, and the divergence of a skipping model from the full one.
//!
//! Each window is evaluated from an empty cache. Position `i` predicts token `i + 1`; positions from
//! `warm` on are scored. A skip policy governs every token of a window, past its warm-up, just as if
//! the text were being generated.

use std::io;
use std::path::PathBuf;

use serde::Serialize;

use super::npy::NpyWriter;
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
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// Evaluates `tokens`. `progress(windows done, windows, perplexity so far)` is called after each window
/// and stops the evaluation by returning false; the report then covers the windows done.
pub fn perplexity(
    engine: &Engine,
    tokens: &[u32],
    options: &PerplexityOptions,
    progress: impl FnMut(usize, usize, f64) -> bool,
) -> Result<PerplexityReport, EvalError> {
    let policy = engine.model().policy(&options.skip).map_err(ModelError::from)?;
    with_policy(engine.model(), engine.compute(), tokens, options, policy, progress)
}

/// [`perplexity`] under `policy`, whatever the options say about skipping.
pub fn with_policy(
    model: &Model,
    on: Compute<'_>,
    tokens: &[u32],
    options: &PerplexityOptions,
    policy: Box<dyn SkipPolicy>,
    mut progress: impl FnMut(usize, usize, f64) -> bool,
) -> Result<PerplexityReport, EvalError> {
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
    let ffn_bytes = |layer: usize| model.layers()[layer].ffn.bytes() as u64;
    Ok(sums.report(test.stats(), ffn_bytes))
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
                if let Some(full) = &mut full {
                    p.resize(rows.len() * vocab, 0.0);
                    self.model.logits_of(on, full, rows.clone(), &mut p);
                }
                for (i, q) in q.chunks_exact(vocab).enumerate() {
                    let position = first + i;
                    if position >= self.warm && position + 1 < window.len() {
                        let p = p.chunks_exact(vocab).nth(i);
                        sums.add(window[position + 1] as usize, q, p);
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Sums {
    nll: f64,
    nll_squared: f64,
    nll_full: f64,
    tokens: usize,
    same_top1: usize,
    kl: Vec<f64>,
}

impl Sums {
    /// Scores the logits `q` (and those of the full model, `p`) for the token that came.
    fn add(&mut self, target: usize, q: &[f32], p: Option<&[f32]>) {
        let (q_max, q_top, q_norm) = log_sum_exp(q);
        let nll = q_max + q_norm - f64::from(q[target]);
        self.tokens += 1;
        self.nll += nll;
        self.nll_squared += nll * nll;
        let Some(p) = p else { return };
        let (p_max, p_top, p_norm) = log_sum_exp(p);
        self.nll_full += p_max + p_norm - f64::from(p[target]);
        self.same_top1 += usize::from(q_top == p_top);
        let (p_all, q_all) = (p_max + p_norm, q_max + q_norm);
        self.kl.push(divergence_of((p, p_all), (q, q_all)));
    }

    fn mean_nll(&self) -> f64 {
        self.nll / self.tokens.max(1) as f64
    }

    fn report(mut self, stats: &SkipStats, ffn_bytes: impl Fn(usize) -> u64) -> PerplexityReport {
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
            ffn_bytes_skipped: stats.weighted_share(ffn_bytes),
            ppl_full: compared.then(|| (self.nll_full / n).exp()),
            kl_mean: compared.then(|| self.kl.iter().sum::<f64>() / n),
            kl_p99: p99,
            same_top1: compared.then_some(self.same_top1 as f64 / n),
            cosine_by_layer: stats.mean_cosines(),
            skipped_by_layer: stats.share_by_layer(),
        }
    }
}

/// KL divergence of the distribution with logits `q` from that with logits `p`, nats.
pub(super) fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let all = |logits| {
        let (max, _, norm) = log_sum_exp(logits);
        max + norm
    };
    divergence_of((p, all(p)), (q, all(q)))
}

/// [`divergence`], where the log of the sum of exponentials is known.
fn divergence_of((p, p_all): (&[f32], f64), (q, q_all): (&[f32], f64)) -> f64 {
    let kl = p.iter().zip(q).map(|(&p, &q)| {
        let (log_p, log_q) = (f64::from(p) - p_all, f64::from(q) - q_all);
        log_p.exp() * (log_p - log_q)
    });
    kl.sum::<f64>().max(0.0)
}

/// Maximum, where it is (the first, of equals), and the log of the sum of exponentials relative to it.
fn log_sum_exp(x: &[f32]) -> (f64, usize, f64) {
    let (mut max, mut top) = (f32::NEG_INFINITY, 0);
    for (i, &v) in x.iter().enumerate() {
        if v > max {
            (max, top) = (v, i);
        }
    }
    let max = f64::from(max);
    let sum: f64 = x.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    (max, top, sum.ln())
}
