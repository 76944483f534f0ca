//! The forward pass.

use super::probe::{FfnRows, MatmulInput, Probe};
use super::state::Scratch;
use super::{Attention, FfnStep, Layer, Model, ModelError, State};
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
        self.forward_probed(on, state, tokens, step, None)
    }

    /// [`forward`](Self::forward), with what `probe` asks for shown to it.
    pub fn forward_probed(
        &self,
        on: Compute<'_>,
        state: &mut State,
        tokens: &[u32],
        step: FfnStep,
        mut probe: Option<&mut dyn Probe>,
    ) -> Result<(), ModelError> {
        self.check(state, tokens)?;
        state.begin_step(tokens.len(), step);
        self.embed(tokens, &mut state.scratch.x);
        let first = state.position;
        let (frequencies, magnitude) = (&self.rope_frequencies, self.config.rope.magnitude());
        state.scratch.rope.fill(on, frequencies, magnitude, first, tokens.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let probe = reborrow(&mut probe);
            self.layer(on, state, layer, i, tokens.len(), step, probe);
        }
        if let Some(probe) = probe {
            let d = self.config.embedding;
            probe.stream(self.layers.len(), &state.scratch.x[..tokens.len() * d]);
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

    #[allow(clippy::too_many_arguments)]
    fn layer(
        &self,
        on: Compute<'_>,
        state: &mut State,
        layer: &Layer,
        index: usize,
        n: usize,
        step: FfnStep,
        mut probe: Option<&mut dyn Probe>,
    ) {
        if let Some(probe) = &mut probe {
            probe.stream(index, &state.scratch.x[..n * self.config.embedding]);
        }
        state.choose_layer_rows(index, n, step);
        self.attention(on, state, layer, index, n, reborrow(&mut probe));
        self.ffn(on, state, layer, index, n, step, probe);
    }

    /// `x += W_o attention(rope(W_q norm(x)), rope(W_k norm(x)), W_v norm(x))`
    ///
    /// Rows that leave the layer out have keys and values all the same, so that no later token finds a hole.
    fn attention(
        &self,
        on: Compute<'_>,
        state: &mut State,
        layer: &Layer,
        index: usize,
        n: usize,
        mut probe: Option<&mut dyn Probe>,
    ) {
        if state.scratch.in_layer.is_empty() {
            return self.keys_and_values(on, state, &layer.attention, index, n);
        }
        let c = &self.config;
        let w = &layer.attention;
        let (first, s) = (state.position, &mut state.scratch);
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let qkv_dim = q_dim + 2 * kv_dim;
        let qkv = &mut s.qkv[..n * qkv_dim];
        rms_norm(on, &s.x, &s.all_rows[..n], &w.norm, c.norm_eps, &mut s.normed);
        if let Some(probe) = &mut probe {
            probe.matmul(index, MatmulInput::Qkv, s.normed.values());
        }
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
        if let Some(probe) = &mut probe {
            probe.matmul(index, MatmulInput::AttentionOutput, s.attended.values());
        }
        let output = [w.output.matrix()];
        if s.in_layer.len() == n {
            let x = &mut s.x[..n * c.embedding];
            return matmul(on, &output, &s.attended, Epilogue::Add, x, &mut s.matmul);
        }
        // Some rows leave the layer out: what attention gives them is dropped.
        let out = &mut s.ffn_out[..n * c.embedding];
        matmul(on, &output, &s.attended, Epilogue::Store, out, &mut s.matmul);
        for &row in &s.in_layer {
            let out = &s.ffn_out[row * c.embedding..][..c.embedding];
            add_rows(&mut s.x, &[row], out, c.embedding);
        }
    }

    /// The part of [`attention`](Self::attention) that later tokens need.
    fn keys_and_values(&self, on: Compute<'_>, state: &mut State, w: &Attention, index: usize, n: usize) {
        let c = &self.config;
        let (first, s) = (state.position, &mut state.scratch);
        let kv_dim = c.kv_dim();
        let kv = &mut s.qkv[..n * 2 * kv_dim];
        rms_norm(on, &s.x, &s.all_rows[..n], &w.norm, c.norm_eps, &mut s.normed);
        let stack = [w.k.matrix(), w.v.matrix()];
        let bias = w.qkv_bias.get(c.q_dim()..).unwrap_or_default();
        matmul(on, &stack, &s.normed, Epilogue::Bias(bias), kv, &mut s.matmul);
        s.rope.apply(on, c.rope.style, kv, 2 * kv_dim, c.kv_heads, c.head_dim);
        let (keys, values) = state.kv.layer_mut(index);
        for (t, kv) in kv.chunks_exact(2 * kv_dim).enumerate() {
            keys.write(first + t, &kv[..kv_dim]);
            values.write(first + t, &kv[kv_dim..]);
        }
    }

    /// `x += W_down (silu(W_gate norm(x)) * W_up norm(x))`, for the rows that the policy lets run.
    #[allow(clippy::too_many_arguments)]
    fn ffn(
        &self,
        on: Compute<'_>,
        state: &mut State,
        layer: &Layer,
        index: usize,
        n: usize,
        step: FfnStep,
        mut probe: Option<&mut dyn Probe>,
    ) {
        let c = &self.config;
        let w = &layer.ffn;
        state.choose_rows(index, n, step);
        let observed = state.measure || (step != FfnStep::Full && state.policy.observes());
        let State { scratch: s, policy, stats, .. } = state;
        if step != FfnStep::Full {
            stats.ran(index, s.active.len() as u64);
            stats.skipped(index, (n - s.active.len()) as u64);
            stats.left_out(index, (n - s.in_layer.len()) as u64);
        }
        if s.active.is_empty() {
            return;
        }
        rms_norm(on, &s.x, &s.active, &w.norm, c.norm_eps, &mut s.normed);
        s.inner.reshape(s.active.len(), c.ffn);
        matmul_swiglu(on, w.gate.matrix(), w.up.matrix(), &s.normed, s.inner.values_mut(), &mut s.matmul);
        s.inner.quantize(on);
        if let Some(probe) = &mut probe {
            probe.matmul(index, MatmulInput::GateUp, s.normed.values());
            probe.matmul(index, MatmulInput::Down, s.inner.values());
        }
        let down: [Matrix<'_>; 1] = [w.down.matrix()];
        if s.active.len() == n && !observed && probe.is_none() {
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
        if let Some(probe) = probe {
            let (rows, stream) = (&s.active[..], &s.x[..n * c.embedding]);
            let (normed, inner) = (s.normed.values(), s.inner.values());
            probe.ffn(index, FfnRows { rows, stream, normed, inner, out });
        }
        add_rows(&mut s.x, &s.active, out, c.embedding);
    }
}

/// The same probe, for a call that does not keep it.
fn reborrow<'p>(probe: &'p mut Option<&mut dyn Probe>) -> Option<&'p mut dyn Probe> {
    match probe {
        Some(probe) => Some(&mut **probe),
        None => None,
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

    /// The rows that run the layer at all.
    fn choose_layer_rows(&mut self, layer: usize, n: usize, step: FfnStep) {
        let s = &mut self.scratch;
        s.in_layer.clear();
        match step {
            FfnStep::Full => s.in_layer.extend(0..n),
            FfnStep::Governed { .. } if n == 1 => {
                s.in_layer.extend(self.policy.runs_layer(layer).then_some(0));
            }
            FfnStep::Governed { .. } => {
                let policies = s.policies.iter_mut().enumerate();
                s.in_layer.extend(policies.filter_map(|(i, p)| p.runs_layer(layer).then_some(i)));
            }
        }
    }

    /// Of the rows that run the layer, those whose FFN runs.
    fn choose_rows(&mut self, layer: usize, n: usize, step: FfnStep) {
        let s = &mut self.scratch;
        s.active.clear();
        match step {
            FfnStep::Full => s.active.extend(0..n),
            FfnStep::Governed { .. } if n == 1 => {
                let in_layer = !s.in_layer.is_empty();
                if in_layer && self.policy.decide(layer) == Decision::Run {
                    s.active.push(0);
                }
            }
            FfnStep::Governed { .. } => {
                let policies = &mut s.policies;
                let runs = |&i: &usize| policies[i].decide(layer) == Decision::Run;
                s.active.extend(s.in_layer.iter().copied().filter(runs));
            }
        }
    }
}
