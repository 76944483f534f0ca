//! The forward pass.

use super::probe::{FfnRows, Matrices};
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
        self.check(state, tokens)?;
        state.begin_step(tokens.len(), step);
        self.embed(tokens, &mut state.scratch.x);
        let first = state.position;
        let (frequencies, magnitude) = (&self.rope_frequencies, self.config.rope.magnitude());
        state.scratch.rope.fill(on, frequencies, magnitude, first, tokens.len());
        for (i, layer) in self.layers.iter().enumerate() {
            state.show_stream(i, tokens.len());
            state.choose_layer_rows(i, tokens.len(), step);
            self.attention(on, state, layer, i, tokens.len());
            self.ffn(on, state, layer, i, tokens.len(), step);
        }
        state.show_stream(self.layers.len(), tokens.len());
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
    ///
    /// Rows that leave the layer out have keys and values all the same, so that no later token finds a hole.
    fn attention(&self, on: Compute<'_>, state: &mut State, layer: &Layer, index: usize, n: usize) {
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
        if let Some(probe) = &mut state.probe {
            probe.matmul(index, Matrices::Qkv, &s.normed);
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
        if let Some(probe) = &mut state.probe {
            probe.matmul(index, Matrices::AttentionOutput, &s.attended);
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

    /// The FFN of the rows that the policy lets run, in full or cut.
    fn ffn(&self, on: Compute<'_>, state: &mut State, layer: &Layer, index: usize, n: usize, step: FfnStep) {
        state.choose_rows(index, step, self.cut(index).is_some());
        let (full, cut) = (state.scratch.active.len(), state.scratch.cut_rows.len());
        if step != FfnStep::Full {
            state.stats.ran(index, (full + cut) as u64);
            state.stats.skipped(index, (n - full - cut) as u64);
            state.stats.left_out(index, (n - state.scratch.in_layer.len()) as u64);
        }
        if full > 0 {
            self.ffn_full(on, state, layer, index, n, step);
        }
        if let Some(prepared) = self.cut(index).filter(|_| cut > 0) {
            self.ffn_cut(on, state, layer, prepared, index, step);
        }
    }

    /// `x += W_down (silu(W_gate norm(x)) * W_up norm(x))`, for the active rows.
    fn ffn_full(
        &self,
        on: Compute<'_>,
        state: &mut State,
        layer: &Layer,
        index: usize,
        n: usize,
        step: FfnStep,
    ) {
        let c = &self.config;
        let w = &layer.ffn;
        let observed = state.observed(step);
        let State { scratch: s, policy, stats, probe, .. } = state;
        rms_norm(on, &s.x, &s.active, &w.norm, c.norm_eps, &mut s.normed);
        s.inner.reshape(s.active.len(), c.ffn);
        matmul_swiglu(on, w.gate.matrix(), w.up.matrix(), &s.normed, s.inner.values_mut(), &mut s.matmul);
        s.inner.quantize(on);
        if let Some(probe) = probe {
            probe.matmul(index, Matrices::GateUp, &s.normed);
            probe.matmul(index, Matrices::Down, &s.inner);
        }
        let down: [Matrix<'_>; 1] = [w.down.matrix()];
        if s.active.len() == n && !observed && probe.is_none() {
            let x = &mut s.x[..n * c.embedding];
            matmul(on, &down, &s.inner, Epilogue::Add, x, &mut s.matmul);
            return;
        }
        let out = &mut s.ffn_out[..s.active.len() * c.embedding];
        matmul(on, &down, &s.inner, Epilogue::Store, out, &mut s.matmul);
        let ran = &s.active;
        if observed {
            observe(on, &s.x, ran, out, (&mut **policy, &mut s.policies), stats, index, step);
        }
        if let Some(probe) = probe {
            let (normed, inner) = (s.normed.values(), s.inner.values());
            let stream = &s.x[..n * c.embedding];
            let mut gate_up = vec![0.0; if probe.wants_gate_up() { ran.len() * 2 * c.ffn } else { 0 }];
            if !gate_up.is_empty() {
                let stack = [w.gate.matrix(), w.up.matrix()];
                matmul(on, &stack, &s.normed, Epilogue::Store, &mut gate_up, &mut s.matmul);
            }
            probe.ffn(index, FfnRows { rows: ran, stream, normed, gate_up: &gate_up, inner, out });
        }
        add_rows(&mut s.x, ran, out, c.embedding);
    }
}

/// Reports `cos(h, h + f)` of the rows that ran: the residual stream before and after the FFN.
#[allow(clippy::too_many_arguments)] // parts of one state, borrowed apart
pub(super) fn observe(
    on: Compute<'_>,
    x: &[f32],
    rows: &[usize],
    out: &[f32],
    (policy, policies): (&mut dyn SkipPolicy, &mut [Box<dyn SkipPolicy>]),
    stats: &mut SkipStats,
    layer: usize,
    step: FfnStep,
) {
    let d = out.len() / rows.len();
    for (&row, f) in rows.iter().zip(out.chunks_exact(d)) {
        let h = &x[row * d..][..d];
        let (hh, hf, ff) = (on.kernels.dot_f32(h, h), on.kernels.dot_f32(h, f), on.kernels.dot_f32(f, f));
        // h . (h + f) and |h + f|^2 without forming the sum.
        let cosine = (hh + hf) / (hh * (hh + 2.0 * hf + ff)).sqrt();
        stats.cosine(layer, cosine);
        if step != FfnStep::Full {
            match policies.get_mut(row) {
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
        self.last_step = self.position..self.position + n;
        self.position += n;
        self.last_row = Some(n - 1);
        let governed_together = step != FfnStep::Full && n > 1;
        if let Some(last) = self.scratch.policies.pop().filter(|_| governed_together) {
            self.policy = last;
        }
    }

    /// Shows the stream that enters `layer` to whoever looks on.
    fn show_stream(&mut self, layer: usize, n: usize) {
        let s = &self.scratch;
        if let Some(probe) = &mut self.probe {
            probe.stream(layer, &s.x[..s.x.len() / s.batch * n]);
        }
    }

    /// The rows that run the layer at all.
    fn choose_layer_rows(&mut self, layer: usize, n: usize, step: FfnStep) {
        let s = &mut self.scratch;
        s.in_layer.clear();
        for row in 0..n {
            let runs = match (step, s.policies.get_mut(row)) {
                (FfnStep::Full, _) => true,
                (FfnStep::Governed { .. }, Some(policy)) => policy.runs_layer(layer),
                (FfnStep::Governed { .. }, None) => self.policy.runs_layer(layer),
            };
            if runs {
                s.in_layer.push(row);
            }
        }
    }

    /// Whether cosines of this step are measured.
    pub(super) fn observed(&self, step: FfnStep) -> bool {
        self.measure || (step != FfnStep::Full && self.policy.observes())
    }

    /// Sorts the rows that run the layer by what happens to their FFN; `can_cut`: the layer is in the cut plan.
    fn choose_rows(&mut self, layer: usize, step: FfnStep, can_cut: bool) {
        let s = &mut self.scratch;
        s.active.clear();
        s.cut_rows.clear();
        s.cuts.clear();
        for &row in &s.in_layer {
            let decision = match (step, s.policies.get_mut(row)) {
                (FfnStep::Full, _) => Decision::Run,
                (FfnStep::Governed { .. }, Some(policy)) => policy.decide(layer),
                (FfnStep::Governed { .. }, None) => self.policy.decide(layer),
            };
            match decision {
                Decision::Skip => {}
                Decision::Cut(cut) if can_cut => {
                    s.cut_rows.push(row);
                    s.cuts.push(cut);
                }
                Decision::Run | Decision::Cut(_) => s.active.push(row),
            }
        }
    }
}
