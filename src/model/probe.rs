//! Looking on while a model runs: what calibration and importance matrices are made from.

use std::sync::{Arc, Mutex, PoisonError};

use crate::ops::Inputs;

/// Shown what a forward pass computes, step by step; every method does nothing unless written anew.
///
/// Rows are those of the step, `[rows, columns]`, before any rounding to 8 bits. A state takes its probe for good:
/// who wants to read what was gathered shares it, as `Arc<Mutex<P>>`, which is a probe if `P` is.
pub trait Probe: Send {
    /// The residual stream `[n, embedding]` that enters `layer`; that which leaves the last one comes as layer
    /// `layers`.
    fn stream(&mut self, _layer: usize, _x: &[f32]) {}

    /// What `matrices` are multiplied with, `[rows, columns]`.
    fn matmul(&mut self, _layer: usize, _matrices: Matrices, _x: &Inputs) {}

    /// Whether [`FfnRows::gate_up`] is wanted: it costs another product with both matrices.
    fn wants_gate_up(&self) -> bool {
        false
    }

    /// An FFN that ran, before its output is added to the stream.
    fn ffn(&mut self, _layer: usize, _rows: FfnRows<'_>) {}
}

/// Matrices of a layer that share their input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Matrices {
    /// Queries, keys and values.
    Qkv,
    /// The attention's output.
    AttentionOutput,
    /// Gate and up of the FFN.
    GateUp,
    /// Down of the FFN.
    Down,
}

impl Matrices {
    /// Names of the tensors, behind `blk.N.`.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Qkv => &["attn_q.weight", "attn_k.weight", "attn_v.weight"],
            Self::AttentionOutput => &["attn_output.weight"],
            Self::GateUp => &["ffn_gate.weight", "ffn_up.weight"],
            Self::Down => &["ffn_down.weight"],
        }
    }
}

/// The values of an FFN; `n` is the step's tokens, `r` those of them whose FFN ran.
pub struct FfnRows<'a> {
    /// Those tokens, `[r]`.
    pub rows: &'a [usize],
    /// `[n, embedding]`: the residual stream before the FFN.
    pub stream: &'a [f32],
    /// `[r, embedding]`: its norm, the input of gate and up.
    pub normed: &'a [f32],
    /// `[r, 2 ffn]`: gate and up of each row, if the probe [wants](Probe::wants_gate_up) them.
    pub gate_up: &'a [f32],
    /// `[r, ffn]`: the input of down.
    pub inner: &'a [f32],
    /// `[r, embedding]`
    pub out: &'a [f32],
}

impl<P: Probe> Probe for Arc<Mutex<P>> {
    fn stream(&mut self, layer: usize, x: &[f32]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).stream(layer, x);
    }
    fn matmul(&mut self, layer: usize, matrices: Matrices, x: &Inputs) {
        self.lock().unwrap_or_else(PoisonError::into_inner).matmul(layer, matrices, x);
    }
    fn wants_gate_up(&self) -> bool {
        self.lock().unwrap_or_else(PoisonError::into_inner).wants_gate_up()
    }
    fn ffn(&mut self, layer: usize, rows: FfnRows<'_>) {
        self.lock().unwrap_or_else(PoisonError::into_inner).ffn(layer, rows);
    }
}
