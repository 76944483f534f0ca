//! FFNs with a cut: what is prepared at load, and the part of the forward pass that uses it.

use super::forward::observe;
use super::{FfnStep, Layer, Model, ModelError, State};
use crate::ops::{Compute, Epilogue, add_rows, matmul, rms_norm_then};
use crate::quant::Matrix;
use crate::skip::{CutPlan, CutSide, LayerCut};

/// A layer that may be cut.
pub(super) struct PreparedCut {
    plan: LayerCut,
    /// `W_gate centre` and `W_up centre`, `[2 ffn]`; empty where the centre is zero.
    gate_up_base: Vec<f32>,
    /// `W_down centre`, `[embedding]`; empty where the centre is zero.
    down_base: Vec<f32>,
}

impl Model {
    /// Makes the layers of `plan` ready to be cut: checks their vectors and multiplies the centres with the
    /// weights. `progress(layers done, layers)` is called after each.
    ///
    /// States made before do not have the buffers of a cut: call this first.
    ///
    /// # Errors
    /// The plan has another number of layers than the model, or a vector another length than the side that it
    /// belongs to, or a value that is not finite (or a weight that is negative).
    pub fn prepare_cuts(
        &mut self,
        on: Compute<'_>,
        plan: CutPlan,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(), ModelError> {
        let layers = self.layers.len();
        if plan.layers.len() != layers {
            return Err(ModelError::CutLayers { found: plan.layers.len(), layers });
        }
        let mut cuts = Vec::with_capacity(layers);
        for (i, cut) in plan.layers.into_iter().enumerate() {
            if let Some(cut) = &cut {
                check_side(i, &cut.inputs, ["centre of inputs", "weight of inputs"], self.config.embedding)?;
                check_side(i, &cut.inner, ["centre of neurons", "weight of neurons"], self.config.ffn)?;
            }
            cuts.push(cut.map(|cut| PreparedCut::new(on, &self.layers[i], cut)));
            progress(i + 1, layers);
        }
        self.cuts = cuts;
        Ok(())
    }

    /// Whether any layer can be cut.
    pub fn has_cuts(&self) -> bool {
        self.cuts.iter().any(Option::is_some)
    }

    pub(super) fn cut(&self, layer: usize) -> Option<&PreparedCut> {
        self.cuts.get(layer).and_then(Option::as_ref)
    }

    /// `x += W_down cut(silu(W_gate cut(norm(x))) * W_up cut(norm(x)))`, for the rows with a cut.
    pub(super) fn ffn_cut(
        &self,
        on: Compute<'_>,
        state: &mut State,
        layer: &Layer,
        prepared: &PreparedCut,
        index: usize,
        step: FfnStep,
    ) {
        let c = &self.config;
        let w = &layer.ffn;
        let observed = state.observed(step);
        let State { scratch: s, policy, stats, .. } = state;
        let (rows, cuts, plan) = (&s.cut_rows[..], &s.cuts[..], &prepared.plan);
        rms_norm_then(on, &s.x, rows, &w.norm, c.norm_eps, &mut s.normed, |i, x| {
            plan.inputs.apply(cuts[i].inputs, x);
        });
        let gate_up = &mut s.gate_up[..rows.len() * 2 * c.ffn];
        let stack = [w.gate.matrix(), w.up.matrix()];
        matmul(on, &stack, &s.normed, Epilogue::Bias(&prepared.gate_up_base), gate_up, &mut s.matmul);
        s.inner.reshape(rows.len(), c.ffn);
        s.inner.fill(on, |i, inner| {
            let (gate, up) = gate_up[i * 2 * c.ffn..][..2 * c.ffn].split_at(c.ffn);
            inner.copy_from_slice(gate);
            on.kernels.silu_mul(inner, up);
            plan.inner.apply(cuts[i].inner, inner);
        });
        let out = &mut s.ffn_out[..rows.len() * c.embedding];
        let down: [Matrix<'_>; 1] = [w.down.matrix()];
        matmul(on, &down, &s.inner, Epilogue::Bias(&prepared.down_base), out, &mut s.matmul);
        if observed {
            observe(on, &s.x, rows, out, (&mut **policy, &mut s.policies), stats, index, step);
        }
        add_rows(&mut s.x, rows, out, c.embedding);
    }
}

fn check_side(layer: usize, side: &CutSide, names: [&'static str; 2], n: usize) -> Result<(), ModelError> {
    for (what, vector) in names.into_iter().zip([&side.centre, &side.weight]) {
        if !vector.is_empty() && vector.len() != n {
            return Err(ModelError::CutShape { layer, what, found: vector.len(), expected: n });
        }
    }
    let value =
        |what, vector: &[f32], expected, fits: fn(f32) -> bool| match vector.iter().position(|&v| !fits(v)) {
            Some(index) => Err(ModelError::CutValue { layer, what, index, found: vector[index], expected }),
            None => Ok(()),
        };
    value(names[0], &side.centre, "a finite number", f32::is_finite)?;
    value(names[1], &side.weight, "a finite number of at least 0", |v| v.is_finite() && v >= 0.0)
}

impl PreparedCut {
    fn new(on: Compute<'_>, layer: &Layer, plan: LayerCut) -> Self {
        let ffn = &layer.ffn;
        let gate_up_base = base(on, &[ffn.gate.matrix(), ffn.up.matrix()], &plan.inputs);
        let down_base = base(on, &[ffn.down.matrix()], &plan.inner);
        Self { plan, gate_up_base, down_base }
    }
}

/// The product of the stacked matrices with the centre, in f32; nothing where the centre is zero.
fn base(on: Compute<'_>, stack: &[Matrix<'_>], side: &CutSide) -> Vec<f32> {
    if !side.is_centred() {
        return Vec::new();
    }
    let mut out = Vec::new();
    for matrix in stack {
        let mut product = vec![0.0; matrix.rows_len()];
        on.team.for_plain_tiles(&mut product, matrix.rows_len(), (1, 16), |mut tile| {
            let mut row = vec![0.0; matrix.cols()];
            let outputs = tile.cols();
            for (r, out) in outputs.zip(tile.row(0)) {
                matrix.dequantize_row(r, &mut row);
                *out = on.kernels.dot_f32(&row, &side.centre);
            }
        });
        out.extend(product);
    }
    out
}
