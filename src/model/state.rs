//! What a sequence has of its own: cache, position, skipping state; and the buffers of a step.

use std::ops::Range;

use super::cut::CutScratch;
use super::{KvCache, KvType, Model, ModelError, Probe};
use crate::kernels::Kernels;
use crate::memory::Pages;
use crate::ops::attention::AttentionScratch;
use crate::ops::{Compute, Inputs, MatmulScratch, RopeTable};
use crate::skip::{Cut, SkipPolicy, SkipStats};
use crate::threads::Team;

/// A sequence being evaluated. All memory of decoding is allocated here, once.
pub struct State {
    pub(super) kv: KvCache,
    pub(super) scratch: Scratch,
    /// Positions in the cache.
    pub(super) position: usize,
    pub(super) policy: Box<dyn SkipPolicy>,
    pub(super) stats: SkipStats,
    /// Whether cosines are measured even if the policy does not ask.
    pub(super) measure: bool,
    /// Looks on.
    pub(super) probe: Option<Box<dyn Probe>>,
    /// Row of the last token in the buffers of the last step.
    pub(super) last_row: Option<usize>,
    /// Positions of the last step's tokens; empty once the cache has changed otherwise.
    pub(super) last_step: Range<usize>,
}

/// Which tokens of a step the skip policy governs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnStep {
    /// All FFNs run (a prompt).
    Full,
    /// The policy decides; the step's first token is the policy's `index`-th.
    Governed {
        /// Number of governed tokens before.
        index: usize,
    },
}

/// The buffers of a step, for up to `batch` tokens. Shapes in brackets; `n` is the step's tokens.
pub(super) struct Scratch {
    /// Most tokens of a step.
    pub batch: usize,
    /// `[n, embedding]`: the residual stream.
    pub x: Pages<f32>,
    /// `[rows, embedding]`: an FFN's output, where the stream before it is still needed.
    pub ffn_out: Pages<f32>,
    /// `[n, q_dim + 2 kv_dim]`
    pub qkv: Pages<f32>,
    /// `[n, embedding]`: normed stream.
    pub normed: Inputs,
    /// `[n, q_dim]`: the attention's output before its matrix.
    pub attended: Inputs,
    /// `[rows, ffn]`: the FFN's inner activations.
    pub inner: Inputs,
    pub rope: RopeTable,
    /// `[1, embedding]`: normed stream of the last token, refined.
    pub last: Inputs,
    /// `[vocab]`
    pub logits: Vec<f32>,
    /// `0..n`
    pub all_rows: Vec<usize>,
    /// Rows that run the current layer at all.
    pub in_layer: Vec<usize>,
    /// Rows whose FFN runs in full.
    pub active: Vec<usize>,
    /// Rows whose FFN runs with a cut.
    pub cut_rows: Vec<usize>,
    /// The cut of each of `cut_rows`.
    pub cuts: Vec<Cut>,
    /// Empty for models without a cut plan.
    pub cut: CutScratch,
    /// The policy's state for each token of a step, where it governs several.
    pub policies: Vec<Box<dyn SkipPolicy>>,
    pub matmul: Vec<MatmulScratch>,
    pub attention: Vec<AttentionScratch>,
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
        let config = model.config();
        let batch = batch.clamp(1, context.max(1));
        Self {
            kv: KvCache::new(config, context, kv),
            scratch: Scratch::new(model, batch, team.threads()),
            position: 0,
            policy,
            stats: SkipStats::new(config.layers),
            measure: false,
            probe: None,
            last_row: None,
            last_step: 0..0,
        }
    }

    /// Tokens evaluated so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Positions that fit.
    pub fn context(&self) -> usize {
        self.kv.context()
    }

    /// Most tokens of a step.
    pub fn batch(&self) -> usize {
        self.scratch.batch
    }

    /// The cache.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// Keeps the cache in memory (`--mlock`).
    pub fn lock(&mut self) -> Result<(), ModelError> {
        self.kv.lock()
    }

    /// What was skipped since the last [`clear_stats`](Self::clear_stats).
    pub fn stats(&self) -> &SkipStats {
        &self.stats
    }

    /// Sets the counts to zero.
    pub fn clear_stats(&mut self) {
        self.stats = SkipStats::new(self.stats.share_by_layer().len());
    }

    /// Measures the cosine of every FFN that runs, whatever the policy.
    pub fn measure_cosines(&mut self, measure: bool) {
        self.measure = measure;
    }

    /// Shows `probe` what the following steps compute, or nobody.
    pub fn set_probe(&mut self, probe: Option<Box<dyn Probe>>) {
        self.probe = probe;
    }

    /// Replaces the policy, and returns the one before.
    pub fn set_policy(&mut self, policy: Box<dyn SkipPolicy>) -> Box<dyn SkipPolicy> {
        self.scratch.policies.clear();
        std::mem::replace(&mut self.policy, policy)
    }

    /// Name of the policy.
    pub fn policy_name(&self) -> &'static str {
        self.policy.name()
    }

    /// Forgets all tokens from `position` on: the next step continues there.
    pub fn truncate(&mut self, position: usize) {
        if position < self.position {
            self.position = position;
            self.last_row = None;
            self.last_step = 0..0;
        }
        if self.position == 0 {
            self.policy.reset();
        }
    }

    /// Makes the first `rows` tokens of the last step the last ones: of the others nothing remains, but as
    /// long as no other step follows, this may be called again with more rows.
    ///
    /// # Panics
    /// If the last step had fewer tokens, or none.
    pub fn keep_rows(&mut self, rows: usize) {
        assert!(1 <= rows && rows <= self.last_step.len(), "{rows} rows of a step of {:?}", self.last_step);
        self.position = self.last_step.start + rows;
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
        let end = self.position;
        if drop == 0 || keep + drop > end {
            return Ok(());
        }
        let config = model.config();
        let frequencies: Vec<f32> = model.rope_frequencies.iter().map(|f| -f).collect();
        let mut back = RopeTable::default();
        // Every key turns by the same angle; the magnitude is in the keys already.
        back.fill(on, &frequencies, 1.0, drop, 1);
        let mut key = vec![0.0; config.kv_dim()];
        for layer in 0..config.layers {
            let (keys, values) = self.kv.layer_mut(layer);
            for from in keep + drop..end {
                keys.read(on.kernels, from, &mut key);
                back.apply(
                    on,
                    config.rope.style,
                    &mut key,
                    config.kv_dim(),
                    config.kv_heads,
                    config.head_dim,
                );
                keys.write(from - drop, &key);
                values.copy(from, from - drop);
            }
        }
        self.position = end - drop;
        self.last_step = 0..0;
        Ok(())
    }

    /// Row of the last token in the last step; `None` before the first step and after a truncation.
    pub fn last_row(&self) -> Option<usize> {
        self.last_row
    }

    /// The residual stream of the last step's tokens, `[n, embedding]`, before the final norm.
    pub fn stream(&self) -> &[f32] {
        &self.scratch.x
    }
}

impl Scratch {
    fn new(model: &Model, batch: usize, threads: usize) -> Self {
        let config = model.config();
        let (d, q, kv, ffn) = (config.embedding, config.q_dim(), config.kv_dim(), config.ffn);
        let widest = config.vocab.max(ffn).max(q + 2 * kv).max(d);
        let matmul = || MatmulScratch::with_capacity(batch, widest.div_ceil(4 * threads));
        let attention = || AttentionScratch::with_capacity(config.heads / config.kv_heads, config.head_dim);
        Self {
            batch,
            x: Pages::zeroed(batch * d),
            ffn_out: Pages::zeroed(batch * d),
            qkv: Pages::zeroed(batch * (q + 2 * kv)),
            normed: Inputs::with_capacity(batch, d),
            attended: Inputs::with_capacity(batch, q),
            inner: Inputs::with_capacity(batch, ffn),
            rope: RopeTable::with_capacity(batch, config.rope.dimensions / 2),
            last: Inputs::with_refined_capacity(1, d),
            logits: vec![0.0; config.vocab],
            all_rows: (0..batch).collect(),
            in_layer: Vec::with_capacity(batch),
            active: Vec::with_capacity(batch),
            cut_rows: Vec::with_capacity(batch),
            cuts: Vec::with_capacity(batch),
            cut: CutScratch::new(model, batch),
            policies: Vec::new(),
            matmul: (0..threads).map(|_| matmul()).collect(),
            attention: (0..threads).map(|_| attention()).collect(),
        }
    }
}

impl Model {
    /// What a step runs with.
    pub fn compute(team: &Team, kernels: Kernels) -> Compute<'_> {
        Compute { team, kernels }
    }
}
