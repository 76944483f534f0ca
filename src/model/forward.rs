//! The forward pass.

use std::ops::Range;

use super::buffers::Owner;
use super::probe::{FfnRows, Matrices};
use super::{Attention, Buffers, Layer, Model, ModelError, Part};
use crate::ops::attention::{self, AttentionScratch, attention};
use crate::ops::{Compute, Epilogue, add_rows, matmul, matmul_swiglu, rms_norm};
use crate::quant::Matrix;

impl Model {
    /// Evaluates the tokens of each part after those that its sequence holds, all in one step that reads each weight
    /// once, and leaves their residual streams in the buffers, the rows in the order of the parts.
    ///
    /// # Errors
    /// A token id outside the vocabulary, or no room in a context: then nothing was evaluated.
    ///
    /// # Panics
    /// If there are more tokens than the buffers have rows, or a part has none.
    pub fn forward_parts(
        &self,
        on: Compute<'_>,
        buffers: &mut Buffers,
        parts: &mut [Part<'_>],
    ) -> Result<(), ModelError> {
        self.check(buffers, parts)?;
        buffers.begin_step(parts);
        self.embed(parts, &mut buffers.x);
        let (frequencies, magnitude) = (&self.rope_frequencies, self.config.rope.magnitude());
        buffers.rope.fill(on, frequencies, magnitude, &buffers.positions);
        for (i, layer) in self.layers.iter().enumerate() {
            buffers.show_stream(i);
            buffers.choose_layer_rows(parts, i);
            self.attention(on, buffers, parts, layer, i);
            self.ffn(on, buffers, parts, layer, i);
        }
        buffers.show_stream(self.layers.len());
        parts.iter_mut().for_each(Part::end);
        Ok(())
    }

    /// Logits of the rows `rows` of the last step into `out`, `[rows, vocab]`; of rows whose policy
    /// [shortlists](crate::skip::SkipPolicy::shortlists), those of unlikely tokens are estimates.
    pub fn logits_of_parts(&self, on: Compute<'_>, s: &mut Buffers, rows: Range<usize>, out: &mut [f32]) {
        if let Some(buffers) = &mut s.shortlist {
            buffers.unread = (0, 0);
        }
        let Some(shortlist) = &self.shortlist else { return self.project(on, s, rows, out) };
        let (mut from, mut out) = (rows.start, out);
        while from < rows.end {
            let listed = s.shortlists(from);
            let to = (from..rows.end).find(|&row| s.shortlists(row) != listed).unwrap_or(rows.end);
            let (of_these, of_others) = out.split_at_mut((to - from) * self.config.vocab);
            match listed {
                true => self.project_shortlist(on, s, shortlist, from..to, of_these),
                false => self.project(on, s, from..to, of_these),
            }
            (from, out) = (to, of_others);
        }
    }

    /// The output matrix alone adds its rounding straight to the logits - a quarter of the divergence
    /// from exact arithmetic on small models (docs/experiments.md) - so its inputs are refined.
    fn project(&self, on: Compute<'_>, s: &mut Buffers, rows: Range<usize>, out: &mut [f32]) {
        let rows = &s.all_rows[rows];
        rms_norm(on, &s.x, rows, &self.output_norm, self.config.norm_eps, &mut s.last);
        s.last.refine(on);
        matmul(on, &[self.output.matrix()], &s.last, Epilogue::Store, out, &mut s.matmul);
    }

    fn check(&self, buffers: &Buffers, parts: &[Part<'_>]) -> Result<(), ModelError> {
        let (vocab, mut rows) = (self.config.vocab, 0);
        for Part { sequence, tokens, .. } in parts {
            if let Some(i) = tokens.iter().position(|&id| id as usize >= vocab) {
                return Err(ModelError::TokenId { id: tokens[i], position: sequence.position + i, vocab });
            }
            let (needed, context) = (sequence.position + tokens.len(), sequence.context());
            if needed > context {
                return Err(ModelError::ContextFull { needed, context });
            }
            assert!(!tokens.is_empty(), "a part has at least one token");
            rows += tokens.len();
        }
        assert!((1..=buffers.batch).contains(&rows), "a step takes 1 to `batch` tokens");
        Ok(())
    }

    fn embed(&self, parts: &[Part<'_>], x: &mut [f32]) {
        let embedding = self.embedding.matrix();
        let tokens = parts.iter().flat_map(|part| part.tokens);
        for (&id, x) in tokens.zip(x.chunks_exact_mut(self.config.embedding)) {
            embedding.dequantize_row(id as usize, x);
        }
    }

    /// `x += W_o attention(rope(W_q norm(x)), rope(W_k norm(x)), W_v norm(x))`
    ///
    /// Rows that leave the layer out have keys and values all the same, so that no later token finds a hole.
    fn attention(
        &self,
        on: Compute<'_>,
        s: &mut Buffers,
        parts: &mut [Part<'_>],
        layer: &Layer,
        index: usize,
    ) {
        if s.in_layer.is_empty() {
            return self.keys_and_values(on, s, parts, &layer.attention, index);
        }
        let (c, w, n) = (&self.config, &layer.attention, s.rows());
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let qkv_dim = q_dim + 2 * kv_dim;
        let qkv = &mut s.qkv[..n * qkv_dim];
        rms_norm(on, &s.x, &s.all_rows[..n], &w.norm, c.norm_eps, &mut s.normed);
        if let Some(probe) = &mut s.probe {
            probe.matmul(index, Matrices::Qkv, &s.normed);
        }
        let stack = [w.q.matrix(), w.k.matrix(), w.v.matrix()];
        matmul(on, &stack, &s.normed, Epilogue::Bias(&w.qkv_bias), qkv, &mut s.matmul);
        s.rope.apply(on, c.rope.style, qkv, qkv_dim, c.heads + c.kv_heads, c.head_dim);
        let kv = qkv.chunks_exact(qkv_dim).map(|qkv| &qkv[q_dim..]);
        remember(&s.owners, &s.positions, parts, index, kv, kv_dim);

        s.attended.reshape(n, q_dim);
        let shape = c.attention();
        attend(on, shape, (qkv, qkv_dim), parts, index, s.attended.values_mut(), &mut s.attention);
        s.attended.quantize(on);
        if let Some(probe) = &mut s.probe {
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
    fn keys_and_values(
        &self,
        on: Compute<'_>,
        s: &mut Buffers,
        parts: &mut [Part<'_>],
        w: &Attention,
        index: usize,
    ) {
        let (c, n) = (&self.config, s.rows());
        let kv_dim = c.kv_dim();
        let kv = &mut s.qkv[..n * 2 * kv_dim];
        rms_norm(on, &s.x, &s.all_rows[..n], &w.norm, c.norm_eps, &mut s.normed);
        let stack = [w.k.matrix(), w.v.matrix()];
        let bias = w.qkv_bias.get(c.q_dim()..).unwrap_or_default();
        matmul(on, &stack, &s.normed, Epilogue::Bias(bias), kv, &mut s.matmul);
        s.rope.apply(on, c.rope.style, kv, 2 * kv_dim, c.kv_heads, c.head_dim);
        remember(&s.owners, &s.positions, parts, index, kv.chunks_exact(2 * kv_dim), kv_dim);
    }

    /// The FFN of the rows that the policy lets run, in full or cut.
    fn ffn(&self, on: Compute<'_>, s: &mut Buffers, parts: &mut [Part<'_>], layer: &Layer, index: usize) {
        let (cut, stand_in) = (self.cut(index), self.stand_in(index));
        s.choose_rows(parts, index, (cut.is_some(), stand_in.is_some()));
        let normed = stand_in.filter(|_| !s.may_stand_in.is_empty());
        let normed = normed.is_some_and(|stand_in| self.ffn_stand_in(on, s, parts, layer, stand_in, index));
        if !s.active.is_empty() {
            self.ffn_full(on, s, parts, layer, index, normed);
        }
        if let Some(prepared) = cut.filter(|_| !s.cut_rows.is_empty()) {
            self.ffn_cut(on, s, parts, layer, prepared, index);
        }
    }

    /// `x += W_down (silu(W_gate norm(x)) * W_up norm(x))`, for the active rows; `normed`: there is norm(x) already.
    fn ffn_full(
        &self,
        on: Compute<'_>,
        s: &mut Buffers,
        parts: &mut [Part<'_>],
        layer: &Layer,
        index: usize,
        normed: bool,
    ) {
        let (c, w, n) = (&self.config, &layer.ffn, s.rows());
        let observed = parts.iter().any(Part::observed);
        if !normed {
            rms_norm(on, &s.x, &s.active, &w.norm, c.norm_eps, &mut s.normed);
        }
        s.inner.reshape(s.active.len(), c.ffn);
        matmul_swiglu(on, w.gate.matrix(), w.up.matrix(), &s.normed, s.inner.values_mut(), &mut s.matmul);
        s.inner.quantize(on);
        if let Some(probe) = &mut s.probe {
            probe.matmul(index, Matrices::GateUp, &s.normed);
            probe.matmul(index, Matrices::Down, &s.inner);
        }
        let down: [Matrix<'_>; 1] = [w.down.matrix()];
        if s.active.len() == n && !observed && s.probe.is_none() {
            let x = &mut s.x[..n * c.embedding];
            matmul(on, &down, &s.inner, Epilogue::Add, x, &mut s.matmul);
            return;
        }
        let out = &mut s.ffn_out[..s.active.len() * c.embedding];
        matmul(on, &down, &s.inner, Epilogue::Store, out, &mut s.matmul);
        let ran = &s.active;
        if observed {
            observe(on, &s.x, ran, out, &s.owners, parts, index);
        }
        if let Some(probe) = &mut s.probe {
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

/// Writes keys and values of each row, one behind the other in `kv`, to its sequence's cache.
fn remember<'a>(
    owners: &[Owner],
    positions: &[usize],
    parts: &mut [Part<'_>],
    layer: usize,
    kv: impl Iterator<Item = &'a [f32]>,
    kv_dim: usize,
) {
    for ((owner, &position), kv) in owners.iter().zip(positions).zip(kv) {
        let (keys, values) = kv.split_at(kv_dim);
        parts[owner.part].sequence.kv.write(layer, position, keys, values);
    }
}

/// Each part's queries over its own cache.
fn attend(
    on: Compute<'_>,
    shape: attention::Shape,
    queries: (&[f32], usize),
    parts: &[Part<'_>],
    layer: usize,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    match parts {
        // A list on the stack: one sequence allocates nothing.
        [part] => attention(on, shape, queries, &[part.seen(layer)], out, scratch),
        parts => {
            let seen: Vec<_> = parts.iter().map(|part| part.seen(layer)).collect();
            attention(on, shape, queries, &seen, out, scratch);
        }
    }
}

/// Reports `cos(h, h + f)` of the rows that ran: the residual stream before and after the FFN.
pub(super) fn observe(
    on: Compute<'_>,
    x: &[f32],
    rows: &[usize],
    out: &[f32],
    owners: &[Owner],
    parts: &mut [Part<'_>],
    layer: usize,
) {
    let d = out.len() / rows.len();
    for (&row, f) in rows.iter().zip(out.chunks_exact(d)) {
        let Owner { part, row: token } = owners[row];
        if !parts[part].observed() {
            continue;
        }
        let h = &x[row * d..][..d];
        let (hh, hf, ff) = (on.kernels.dot_f32(h, h), on.kernels.dot_f32(h, f), on.kernels.dot_f32(f, f));
        // h . (h + f) and |h + f|^2 without forming the sum.
        let cosine = (hh + hf) / (hh * (hh + 2.0 * hf + ff)).sqrt();
        parts[part].observe(token, layer, cosine);
    }
}
