//! The forward pass.

use super::state::Scratch;
use super::{FfnStep, Layer, Matrices, Model, ModelError, State};
use crate::ops::attention::{self, attention};
use crate::ops::{Compute, Epilogue, Inputs, MatmulScratch, add_rows, matmul, matmul_swiglu, rms_norm};
use crate::quant::Matrix;
use crate::skip::{Decision, SkipPolicy, SkipStats};

impl Model {
    /// Evaluates `tokens` after those that `state` holds, and leaves their residual streams in it.
    ///
    /// # Errors
    /// A token id outside the vocabulary, or no room in the context or the batch.
    pub fn forward(
        &self,
        on: Compute<'_>,
        state: &mut State,
        tokens: &[u32],
        step: FfnStep,
    ) -> Result<(), ModelError> {
        self.check(state, tokens)?;
        state.begin_step(tokens.len(), step);
        self.embed(tokens, &mut state.scratch.x);
        let first = state.position;
        let (frequencies, magnitude) = (&self.rope_frequencies, self.config.rope.magnitude());
        state.scratch.rope.fill(on, frequencies, magnitude, first, tokens.len());
        for (i, layer) in self.layers.iter().enumerate() {
            self.attention(on, state, layer, i, tokens.len());
            self.ffn(on, state, layer, i, tokens.len(), step);
        }
        state.end_step(tokens.len(), step);
        Ok(())
    }

    /// Logits of row `row` of the last step, `[vocab]`.
    pub fn logits<'s>(&self, on: Compute<'_>, state: &'s mut State, row: usize) -> &'s mut [f32] {
        let s = &mut state.scratch;
        self.project(on, &s.x, &[row], &mut s.last, &mut s.logits, &mut s.matmul);
        &mut s.logits
    }

    /// Logits of the rows `rows` of the last step into `out`, `[rows, vocab]`.
    pub fn logits_of(
        &self,
        on: Compute<'_>,
        state: &mut State,
        rows: std::ops::Range<usize>,
        out: &mut [f32],
    ) {
        let s = &mut state.scratch;
        self.project(on, &s.x, &s.all_rows[rows], &mut s.last, out, &mut s.matmul);
    }

    /// The output matrix alone adds its rounding straight to the logits - a quarter of the divergence
    /// from exact arithmetic on small models (docs/experiments.md) - so its inputs are refined.
    fn project(
        &self,
        on: Compute<'_>,
        x: &[f32],
        rows: &[usize],
        normed: &mut Inputs,
        out: &mut [f32],
        scratch: &mut [MatmulScratch],
    ) {
        rms_norm(on, x, rows, &self.output_norm, self.config.norm_eps, normed);
        normed.refine(on);
        matmul(on, &[self.output.matrix()], normed, Epilogue::Store, out, scratch);
    }

    fn check(&self, state: &State, tokens: &[u32]) -> Result<(), ModelError> {
        let vocab = self.config.vocab;
        if let Some(i) = tokens.iter().position(|&id| id as usize >= vocab) {
            return Err(ModelError::TokenId { id: tokens[i], position: state.position + i, vocab });
        }
        let (needed, context) = (state.position + tokens.len(), state.context());
        if needed > context {
            return Err(ModelError::ContextFull { needed, context });
        }
        assert!(!tokens.is_empty() && tokens.len() <= state.batch(), "a step takes 1 to `batch` tokens");
        Ok(())
    }

    fn embed(&self, tokens: &[u32], x: &mut [f32]) {
        let embedding = self.embedding.matrix();
        for (&id, x) in tokens.iter().zip(x.chunks_exact_mut(self.config.embedding)) {
            embedding.dequantize_row(id as usize, x);
        }
    }

    /// `x += W_o attention(rope(W_q norm(x)), rope(W_k norm(x)), W_v norm(x))`
    fn attention(&self, on: Compute<'_>, state: &mut State, layer: &Layer, index: usize, n: usize) {
        let c = &self.config;
        let w = &layer.attention;
        let (first, s) = (state.position, &mut state.scratch);
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let qkv_dim = q_dim + 2 * kv_dim;
        let qkv = &mut s.qkv[..n * qkv_dim];
        rms_norm(on, &s.x, &s.all_rows[..n], &w.norm, c.norm_eps, &mut s.normed);
        state.observer.see(index, Matrices::Qkv, &s.normed);
        let stack = [w.q.matrix(), w.k.matrix(), w.v.matrix()];
        matmul(on, &stack, &s.normed, Epilogue::Bias(&w.qkv_bias), qkv, &mut s.matmul);
        s.rope.apply(on, c.rope.style, qkv, qkv_dim, c.heads + c.kv_heads, c.head_dim);

        let (keys, values) = state.kv.layer_mut(index);
        for (t, qkv) in qkv.chunks_exact(qkv_dim).enumerate() {
            keys.write(first + t, &qkv[q_dim..][..kv_dim]);
            values.write(first + t, &qkv[q_dim + kv_dim..]);
        }
        let (keys, values) = state.kv.layer(index);
        s.attended.reshape(n, q_dim);
        let shape = attention::Shape { heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim, first };
        attention(on, shape, (qkv, qkv_dim), keys, values, s.attended.values_mut(), &mut s.attention);
        s.attended.quantize(on);
        state.observer.see(index, Matrices::AttentionOutput, &s.attended);
        let x = &mut s.x[..n * c.embedding];
        matmul(on, &[w.output.matrix()], &s.attended, Epilogue::Add, x, &mut s.matmul);
    }

    /// `x += W_down (silu(W_gate norm(x)) * W_up norm(x))`, for the rows that the policy lets run.
    fn ffn(&self, on: Compute<'_>, state: &mut State, layer: &Layer, index: usize, n: usize, step: FfnStep) {
        let c = &self.config;
        let w = &layer.ffn;
        state.choose_rows(index, n, step);
        let observed = state.measure || (step != FfnStep::Full && state.policy.observes());
        let State { scratch: s, policy, stats, observer, .. } = state;
        if step != FfnStep::Full {
            stats.ran(index, s.active.len() as u64);
            stats.skipped(index, (n - s.active.len()) as u64);
        }
        if s.active.is_empty() {
            return;
        }
        rms_norm(on, &s.x, &s.active, &w.norm, c.norm_eps, &mut s.normed);
        observer.see(index, Matrices::GateUp, &s.normed);
        s.inner.reshape(s.active.len(), c.ffn);
        matmul_swiglu(on, w.gate.matrix(), w.up.matrix(), &s.normed, s.inner.values_mut(), &mut s.matmul);
        s.inner.quantize(on);
        observer.see(index, Matrices::Down, &s.inner);
        let down: [Matrix<'_>; 1] = [w.down.matrix()];
        if s.active.len() == n && !observed {
            let x = &mut s.x[..n * c.embedding];
            matmul(on, &down, &s.inner, Epilogue::Add, x, &mut s.matmul);
            return;
        }
        let out = &mut s.ffn_out[..s.active.len() * c.embedding];
        matmul(on, &down, &s.inner, Epilogue::Store, out, &mut s.matmul);
        if observed {
            observe(on, s, &mut **policy, stats, index, c.embedding, step);
        }
        let out = &s.ffn_out[..s.active.len() * c.embedding];
        add_rows(&mut s.x, &s.active, out, c.embedding);
    }
}

/// Reports `cos(h, h + f)` of the rows that ran: the residual stream before and after the FFN.
fn observe(
    on: Compute<'_>,
    s: &mut Scratch,
    policy: &mut dyn SkipPolicy,
    stats: &mut SkipStats,
    layer: usize,
    d: usize,
    step: FfnStep,
) {
    for (i, &row) in s.active.iter().enumerate() {
        let (h, f) = (&s.x[row * d..][..d], &s.ffn_out[i * d..][..d]);
        let (hh, hf, ff) = (on.kernels.dot_f32(h, h), on.kernels.dot_f32(h, f), on.kernels.dot_f32(f, f));
        // h . (h + f) and |h + f|^2 without forming the sum.
        let cosine = (hh + hf) / (hh * (hh + 2.0 * hf + ff)).sqrt();
        stats.cosine(layer, cosine);
        if step != FfnStep::Full {
            match s.policies.get_mut(row) {
                Some(policy) => policy.observe(layer, cosine),
                None => policy.observe(layer, cosine),
            }
        }
    }
}

impl State {
    /// One token is governed by the sequence's policy itself; several, each by a copy of its own.
    fn begin_step(&mut self, n: usize, step: FfnStep) {
        let FfnStep::Governed { index } = step else { return };
        let s = &mut self.scratch;
        if n == 1 {
            s.policies.clear();
            self.policy.begin_token(index);
            return;
        }
        s.policies.clear();
        s.policies.resize_with(n, || self.policy.boxed_clone());
        for (i, policy) in s.policies.iter_mut().enumerate() {
            policy.begin_token(index + i);
        }
    }

    fn end_step(&mut self, n: usize, step: FfnStep) {
        self.position += n;
        self.last_row = Some(n - 1);
        let governed_together = step != FfnStep::Full && n > 1;
        if let Some(last) = self.scratch.policies.pop().filter(|_| governed_together) {
            self.policy = last;
        }
    }

    fn choose_rows(&mut self, layer: usize, n: usize, step: FfnStep) {
        let s = &mut self.scratch;
        s.active.clear();
        match step {
            FfnStep::Full => s.active.extend(0..n),
            FfnStep::Governed { .. } if n == 1 => {
                if self.policy.decide(layer) == Decision::Run {
                    s.active.push(0);
                }
            }
            FfnStep::Governed { .. } => {
                let policies = s.policies.iter_mut().enumerate();
                s.active
                    .extend(policies.filter_map(|(i, p)| (p.decide(layer) == Decision::Run).then_some(i)));
            }
        }
    }
}
