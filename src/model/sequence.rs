//! What a sequence has of its own: cache, position, skipping. Steps take any number of them.

use std::sync::Arc;

use super::{KvCache, KvType, Model, ModelError};
use crate::ops::attention::{CacheTile, Seen};
use crate::ops::{Compute, RopeTable};
use crate::skip::{SkipPolicy, SkipStats};

/// A sequence being evaluated, without the buffers of a step: sequences that are never in the same step can share those.
pub struct Sequence {
    pub(super) kv: KvCache,
    /// Positions in the cache.
    pub(super) position: usize,
    pub(super) policy: Box<dyn SkipPolicy>,
    /// The policy's state for each token of a step in which it governs several; empty otherwise.
    pub(super) policies: Vec<Box<dyn SkipPolicy>>,
    pub(super) stats: SkipStats,
    /// Whether cosines are measured even if the policy does not ask.
    pub(super) measure: bool,
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

/// The tokens of one sequence in a step.
pub struct Part<'a> {
    /// Whose they are.
    pub sequence: &'a mut Sequence,
    /// The tokens that follow those it holds; at least one.
    pub tokens: &'a [u32],
    /// Who decides about their FFNs.
    pub step: FfnStep,
}

impl Sequence {
    /// An empty sequence of up to `context` tokens.
    pub fn new(model: &Model, context: usize, kv: KvType, policy: Box<dyn SkipPolicy>) -> Self {
        let config = model.config();
        Self {
            kv: KvCache::new(config, context, kv),
            position: 0,
            policy,
            policies: Vec::new(),
            stats: SkipStats::new(config.layers),
            measure: false,
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

    /// Replaces the policy, and returns the one before.
    pub fn set_policy(&mut self, policy: Box<dyn SkipPolicy>) -> Box<dyn SkipPolicy> {
        self.policies.clear();
        std::mem::replace(&mut self.policy, policy)
    }

    /// Name of the policy.
    pub fn policy_name(&self) -> &'static str {
        self.policy.name()
    }

    /// Forgets all tokens from `position` on: the next step continues there.
    pub fn truncate(&mut self, position: usize) {
        if position < self.position {
            self.kv.truncate(position);
            self.position = position;
        }
        if self.position == 0 {
            self.policy.reset();
        }
    }

    /// Takes over the first `positions` tokens of `other`, a sequence of the same model, and forgets its own. The policy
    /// stays, and what it has counted.
    ///
    /// # Panics
    /// If `other` has fewer, or they do not fit, or are stored in another way.
    pub fn copy_prefix(&mut self, other: &Self, positions: usize) {
        assert!(positions <= other.position, "{positions} positions of {}", other.position);
        self.kv.copy_prefix(&other.kv, positions);
        self.position = positions;
        self.policy.reset();
    }

    /// [`copy_prefix`](Self::copy_prefix) from the cache of a sequence that is [done](Self::into_kv), and most of it is
    /// not copied: attention reads what sequences share from one place, which stays in the caches of the CPU.
    pub fn share_prefix(&mut self, cache: &Arc<KvCache>, positions: usize) {
        self.kv.share_prefix(cache, positions);
        self.position = positions;
        self.policy.reset();
    }

    /// The cache, for others to [share](Self::share_prefix).
    pub fn into_kv(self) -> Arc<KvCache> {
        Arc::new(self.kv)
    }

    /// Drops positions `keep..keep + drop` and moves the later ones down, their keys turned back to
    /// the new positions (as llama.cpp's context shift does).
    pub fn shift(&mut self, model: &Model, on: Compute<'_>, keep: usize, drop: usize) {
        let end = self.position;
        if drop == 0 || keep + drop > end {
            return;
        }
        self.kv.own(end);
        let config = model.config();
        let frequencies: Vec<f32> = model.rope_frequencies.iter().map(|f| -f).collect();
        let mut back = RopeTable::default();
        // Every key turns by the same angle; the magnitude is in the keys already.
        back.fill(on, &frequencies, 1.0, &[drop]);
        let (style, kv_dim) = (config.rope.style, config.kv_dim());
        for layer in 0..config.layers {
            for from in keep + drop..end {
                let mut keys = self.kv.keys(on.kernels, layer, from);
                back.apply(on, style, &mut keys, kv_dim, config.kv_heads, config.head_dim);
                self.kv.move_position(layer, from, from - drop, &keys);
            }
        }
        self.position = end - drop;
    }

    /// A step of `n` tokens begins. One token is governed by the sequence's policy itself; several, each by a copy of
    /// its own.
    fn begin(&mut self, n: usize, step: FfnStep) {
        self.policies.clear();
        let FfnStep::Governed { index } = step else { return };
        if n == 1 {
            return self.policy.begin_token(index);
        }
        self.policies.resize_with(n, || self.policy.boxed_clone());
        for (i, policy) in self.policies.iter_mut().enumerate() {
            policy.begin_token(index + i);
        }
    }
}

impl Part<'_> {
    pub(super) fn begin(&mut self) {
        self.sequence.begin(self.tokens.len(), self.step);
    }

    /// The tokens are in the cache now, and what the policy knows after the last of them is kept.
    pub(super) fn end(&mut self) {
        self.sequence.position += self.tokens.len();
        if let Some(last) = self.sequence.policies.pop() {
            self.sequence.policy = last;
        }
    }

    /// Whether the policy decides.
    pub(super) fn governed(&self) -> bool {
        self.step != FfnStep::Full
    }

    /// Who decides about the part's `row`-th token; nobody where all FFNs run.
    pub(super) fn policy(&mut self, row: usize) -> Option<&mut Box<dyn SkipPolicy>> {
        let governed = self.governed();
        let Sequence { policy, policies, .. } = &mut *self.sequence;
        governed.then(|| policies.get_mut(row).unwrap_or(policy))
    }

    /// What the part's tokens look back on in `layer`.
    pub(super) fn seen(&self, layer: usize) -> Seen<impl CacheTile + Copy> {
        let (keys, values) = self.sequence.kv.layer(layer);
        Seen { keys, values, first: self.sequence.position, rows: self.tokens.len() }
    }

    /// Whether cosines of this step are measured.
    pub(super) fn observed(&self) -> bool {
        self.sequence.measure || self.governed() && self.sequence.policy.observes()
    }

    /// The cosine of an FFN that ran for the part's `row`-th token.
    pub(super) fn observe(&mut self, row: usize, layer: usize, cosine: f32) {
        self.sequence.stats.cosine(layer, cosine);
        if let Some(policy) = self.policy(row) {
            policy.observe(layer, cosine);
        }
    }
}
