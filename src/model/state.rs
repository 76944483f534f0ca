//! A sequence with buffers of its own.

use std::ops::Range;

use super::{Buffers, FfnStep, KvCache, KvType, Model, ModelError, Part, Probe, Products, Sequence};
use crate::kernels::Kernels;
use crate::ops::{Compute, norm_row};
use crate::skip::{SkipPolicy, SkipStats};
use crate::threads::Team;

/// A sequence being evaluated by itself. All memory of decoding is allocated here, once.
pub struct State {
    sequence: Sequence,
    buffers: Buffers,
    /// Row of the last token in the buffers of the last step.
    last_row: Option<usize>,
    /// Positions of the last step's tokens; empty once the cache has changed otherwise.
    last_step: Range<usize>,
}

impl State {
    /// An empty sequence of up to `context` tokens, evaluated `batch` tokens at a time at most.
    pub fn new(
        model: &Model,
        team: &Team,
        (context, batch): (usize, usize),
        kv: KvType,
        policy: Box<dyn SkipPolicy>,
    ) -> Self {
        let batch = batch.clamp(1, context.max(1));
        Self {
            sequence: Sequence::new(model, context, kv, policy),
            buffers: Buffers::new(model, team, batch, Products::Fastest),
            last_row: None,
            last_step: 0..0,
        }
    }

    /// Tokens evaluated so far.
    pub fn position(&self) -> usize {
        self.sequence.position
    }

    /// Positions that fit.
    pub fn context(&self) -> usize {
        self.sequence.context()
    }

    /// Most tokens of a step.
    pub fn batch(&self) -> usize {
        self.buffers.batch
    }

    /// The cache.
    pub fn kv(&self) -> &KvCache {
        &self.sequence.kv
    }

    /// Keeps the cache in memory (`--mlock`).
    pub fn lock(&mut self) -> Result<(), ModelError> {
        self.sequence.lock()
    }

    /// What was skipped since the last [`clear_stats`](Self::clear_stats).
    pub fn stats(&self) -> &SkipStats {
        &self.sequence.stats
    }

    /// Sets the counts to zero.
    pub fn clear_stats(&mut self) {
        self.sequence.clear_stats();
    }

    /// Measures the cosine of every FFN that runs, whatever the policy.
    pub fn measure_cosines(&mut self, measure: bool) {
        self.sequence.measure_cosines(measure);
    }

    /// Shows `probe` what the following steps compute, or nobody.
    pub fn set_probe(&mut self, probe: Option<Box<dyn Probe>>) {
        self.buffers.set_probe(probe);
    }

    /// Replaces the policy, and returns the one before.
    pub fn set_policy(&mut self, policy: Box<dyn SkipPolicy>) -> Box<dyn SkipPolicy> {
        self.sequence.set_policy(policy)
    }

    /// Name of the policy.
    pub fn policy_name(&self) -> &'static str {
        self.sequence.policy_name()
    }

    /// Forgets all tokens from `position` on: the next step continues there.
    pub fn truncate(&mut self, position: usize) {
        if position < self.sequence.position {
            self.last_row = None;
            self.last_step = 0..0;
        }
        self.sequence.truncate(position);
    }

    /// Makes the first `rows` tokens of the last step the last ones: of the others nothing remains, but as
    /// long as no other step follows, this may be called again with more rows.
    ///
    /// # Panics
    /// If the last step had fewer tokens, or none.
    pub fn keep_rows(&mut self, rows: usize) {
        assert!(1 <= rows && rows <= self.last_step.len(), "{rows} rows of a step of {:?}", self.last_step);
        self.sequence.position = self.last_step.start + rows;
        self.last_row = Some(rows - 1);
    }

    /// Drops positions `keep..keep + drop` and moves the later ones down, their keys turned back to
    /// the new positions (as llama.cpp's context shift does).
    pub fn shift(
        &mut self,
        model: &Model,
        on: Compute<'_>,
        keep: usize,
        drop: usize,
    ) -> Result<(), ModelError> {
        self.sequence.shift(model, on, keep, drop);
        self.last_step = 0..0;
        Ok(())
    }

    /// Row of the last token in the last step; `None` before the first step and after a truncation.
    pub fn last_row(&self) -> Option<usize> {
        self.last_row
    }

    /// The residual stream of the last step's tokens, `[n, embedding]`, before the final norm.
    pub fn stream(&self) -> &[f32] {
        self.buffers.stream()
    }
}

impl Model {
    /// What a step runs with.
    pub fn compute(team: &Team, kernels: Kernels) -> Compute<'_> {
        Compute { team, kernels }
    }

    /// Evaluates `tokens` after those that `state` holds, and leaves their residual streams in it.
    ///
    /// # Errors
    /// A token id outside the vocabulary, or no room in the context.
    pub fn forward(
        &self,
        on: Compute<'_>,
        state: &mut State,
        tokens: &[u32],
        step: FfnStep,
    ) -> Result<(), ModelError> {
        let first = state.sequence.position;
        let part = Part { sequence: &mut state.sequence, tokens, step };
        self.forward_parts(on, &mut state.buffers, &mut [part])?;
        state.last_step = first..first + tokens.len();
        state.last_row = Some(tokens.len() - 1);
        Ok(())
    }

    /// Logits of row `row` of the last step, `[vocab]`.
    pub fn logits<'s>(&self, on: Compute<'_>, state: &'s mut State, row: usize) -> &'s mut [f32] {
        let mut logits = std::mem::take(&mut state.buffers.logits);
        self.logits_of(on, state, row..row + 1, &mut logits);
        state.buffers.logits = logits;
        &mut state.buffers.logits
    }

    /// Logits of the rows `rows` of the last step into `out`, `[rows, vocab]`.
    pub fn logits_of(&self, on: Compute<'_>, state: &mut State, rows: Range<usize>, out: &mut [f32]) {
        self.logits_of_parts(on, &mut state.buffers, rows, out);
        state.sequence.stats.output_unread(state.buffers.output_unread());
    }

    /// What the output matrix is multiplied with for the rows `rows` of the last step, `[rows, embedding]`.
    pub fn output_inputs(&self, on: Compute<'_>, state: &State, rows: Range<usize>) -> Vec<f32> {
        let d = self.config.embedding;
        let mut inputs = vec![0.0; rows.len() * d];
        for (x, out) in state.stream()[rows.start * d..].chunks_exact(d).zip(inputs.chunks_exact_mut(d)) {
            norm_row(on, x, &self.output_norm, self.config.norm_eps, out);
        }
        inputs
    }
}
