//! Settings compared with the full model on a few windows.

use std::ops::Range;

use super::{CONTEXT, Result, WARM_UP, state};
use crate::eval::perplexity::{Exact, PerplexityReport, Sums, evaluate, score_rows};
use crate::model::Model;
use crate::ops::Compute;
use crate::skip::{Decision, Never, SkipPolicy, SkipStats};

/// Last positions of a window that are compared where many settings are tried.
pub(super) const COMPARED: usize = 128;
/// All positions past the warm-up that foretell a token of the window.
pub(super) const ALL: usize = CONTEXT - WARM_UP - 1;

/// Windows, and what the full model says about them.
pub(super) struct Trials<'t> {
    windows: Vec<&'t [u32]>,
    /// Last positions of each window that are compared.
    compared: usize,
    /// Probabilities of the full model at the compared positions, window by window, and what else comparing takes.
    full: Vec<(Vec<f32>, Vec<Exact>)>,
}

/// How a setting did.
pub(super) struct Trial {
    /// Mean KL divergence from the full model, nats.
    pub kl: f64,
    /// Shares of FFN blocks skipped and of FFN bytes left unread, by tokens past the warm-up.
    pub blocks: f64,
    pub bytes: f64,
}

/// What a setting did on windows so far.
#[derive(Default)]
pub(super) struct Measured {
    sums: Sums,
    stats: SkipStats,
}

impl Measured {
    pub fn report(self, model: &Model) -> PerplexityReport {
        self.sums.report(&self.stats, model)
    }
}

/// The last `compared` positions of a window that foretell a token of it.
fn scored(compared: usize) -> Range<usize> {
    CONTEXT - 1 - compared..CONTEXT - 1
}

impl<'t> Trials<'t> {
    /// The full model's probabilities at the last `compared` positions of `windows` that foretell a token: `compared` times
    /// the vocabulary floats a window.
    pub fn new(model: &Model, on: Compute<'_>, windows: &[&'t [u32]], compared: usize) -> Result<Self> {
        let mut trials = Self { windows: windows.to_vec(), compared, full: Vec::new() };
        let mut state = state(model, on, Box::new(Never));
        for window in windows {
            let (mut probabilities, mut exact) = (Vec::new(), Vec::new());
            evaluate(model, on, &mut state, (window, scored(compared)), false, |_, targets, logits| {
                exact.extend(Exact::of(on, logits, targets));
                probabilities.extend_from_slice(logits);
            })?;
            trials.full.push((probabilities, exact));
        }
        Ok(trials)
    }

    /// The first window alone.
    pub fn first(&self) -> Self {
        let (windows, full) = (self.windows[..1].to_vec(), self.full[..1].to_vec());
        Self { windows, full, compared: self.compared }
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> usize {
        self.windows.len() * CONTEXT
    }

    /// Adds to `measured` what `policy` does on all windows.
    pub fn measure(
        &self,
        model: &Model,
        on: Compute<'_>,
        policy: Box<dyn SkipPolicy>,
        measured: &mut Measured,
    ) -> Result<()> {
        let (mut state, vocab) = (state(model, on, policy), model.config().vocab);
        for (window, (full, exact)) in self.windows.iter().zip(&self.full) {
            evaluate(
                model,
                on,
                &mut state,
                (window, scored(self.compared)),
                true,
                |first, targets, logits| {
                    let rows = first..first + targets.len();
                    let full = &full[rows.start * vocab..rows.end * vocab];
                    let scores = score_rows(on, logits, targets, Some((full, &exact[rows])));
                    scores.iter().for_each(|score| measured.sums.add(score));
                },
            )?;
        }
        measured.stats.add(state.stats());
        Ok(())
    }

    pub fn run(&self, model: &Model, on: Compute<'_>, policy: Box<dyn SkipPolicy>) -> Result<Trial> {
        let mut measured = Measured::default();
        self.measure(model, on, policy, &mut measured)?;
        let report = measured.report(model);
        let past_warm_up = CONTEXT as f64 / (CONTEXT - WARM_UP) as f64;
        Ok(Trial {
            kl: report.kl_mean.unwrap_or(0.0),
            blocks: report.ffn_skipped * past_warm_up,
            bytes: report.ffn_bytes_skipped * past_warm_up,
        })
    }
}

/// Decides about one layer, past the warm-up; all else runs.
#[derive(Clone)]
pub(super) struct Alone {
    layer: usize,
    decision: Decision,
    warming_up: bool,
}

impl Alone {
    pub fn new(layer: usize, decision: Decision) -> Self {
        Self { layer, decision, warming_up: true }
    }
}

impl SkipPolicy for Alone {
    fn name(&self) -> &'static str {
        "one layer"
    }

    fn begin_token(&mut self, index: usize) {
        self.warming_up = index < WARM_UP;
    }

    fn decide(&mut self, layer: usize) -> Decision {
        if layer == self.layer && !self.warming_up { self.decision } else { Decision::Run }
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}
